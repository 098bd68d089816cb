/* codec_share.c - share, share+int8, share+int4: two layers keep one direction.
 *
 * Per token and head the two layers' vectors are replaced by one direction between them (SLERP,
 * weight 0.6 towards the upper layer) and two magnitudes. The tokens whose vectors point apart the
 * most, 5 %, are kept in full for both layers and stand in no other part. The payload has no
 * header: its size follows from the shape. Parts in order (FORMAT.md, "Codec share"): positions of
 * the kept tokens, kept rows of the lower and of the upper layer, magnitudes of the lower and of
 * the upper layer, directions. A half that is not wanted is not read. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "codec_share.h"
#include "compressor.h"
#include "dtype.h"
#include "internal.h"

static const double upper_weight = 0.6;
static const double smallest_sine = 1e-3;

enum { KEPT_PERCENT = 5 };

/* Take n_items of item_bytes from the running offset; false when it overflows. */
static bool
take(size_t n_items, size_t item_bytes, size_t *offset)
{
    size_t bytes;
    return !krul_multiply_overflows(n_items, item_bytes, &bytes) &&
           !krul_add_overflows(*offset, bytes, offset);
}

krul_status
krul_share_measure(krul_dtype dtype, const int64_t shape[KRUL_VIEW_DIMS], int bits,
                   krul_share_layout *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t offset = 0, rows_kept = 0, rows_merged = 0, row_bytes = 0;
    bool fits = true;
    memset(out, 0, sizeof *out);
    out->bits = bits;
    out->element_bytes = krul_dtype_bytes(dtype);
    out->magnitude_bytes = dtype == KRUL_DTYPE_BF16 ? 2 : 4;
    out->n_tokens = (size_t)shape[2];
    out->head_dim = (size_t)shape[3];
    out->n_kept = out->n_tokens / 100 * KEPT_PERCENT + out->n_tokens % 100 * KEPT_PERCENT / 100;
    out->n_merged = out->n_tokens - out->n_kept;
    fits = fits && !krul_multiply_overflows((size_t)shape[0], (size_t)shape[1], &out->n_planes);
    fits = fits && !krul_multiply_overflows(out->n_planes, out->n_kept, &rows_kept);
    fits = fits && !krul_multiply_overflows(out->n_planes, out->n_merged, &rows_merged);
    fits = fits && !krul_multiply_overflows(out->head_dim, out->element_bytes, &row_bytes);
    fits = fits && out->n_tokens <= UINT32_MAX && take(out->n_kept, sizeof(uint32_t), &offset);
    for (int i = 0; i < 2; i++) {
        out->kept_offset[i] = offset;
        fits = fits && take(rows_kept, row_bytes, &offset);
    }
    for (int i = 0; i < 2; i++) {
        out->magnitudes_offset[i] = offset;
        fits = fits && take(rows_merged, out->magnitude_bytes, &offset);
    }
    out->directions_offset = offset;
    if (bits == 0) {
        fits = fits && take(out->n_merged, row_bytes, &out->direction_plane_bytes);
    }
    else {
        KRUL_TRY(krul_int_measure(KRUL_KV_VALUE, bits, (int64_t)out->n_merged, shape[3],
                                  &out->codes, err));
        out->direction_plane_bytes = out->codes.plane_bytes;
    }
    fits = fits && take(out->n_planes, out->direction_plane_bytes, &offset);
    out->n_bytes = offset;
    if (!fits) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "views[0] is (%lld, %lld, %lld, %lld): its payload does not fit in memory",
                         (long long)shape[0], (long long)shape[1], (long long)shape[2],
                         (long long)shape[3]);
    }
done:
    return status;
}

/* ---- encoding -------------------------------------------------------------------------------- */

/* What encoding needs beside its input: one allocation, cut into parts. */
typedef struct share_scratch {
    void *memory;
    double *angles; /* n_tokens, summed over planes */
    uint8_t *is_kept; /* n_tokens */
    float *rows[2]; /* head_dim each: a token of the lower and of the upper layer */
    float *units[2]; /* the same, of length one */
    float *direction; /* head_dim */
    uint8_t *narrowed; /* head_dim elements */
} share_scratch;

static krul_status
scratch_init(const krul_share_layout *layout, share_scratch *out, krul_error *err)
{
    size_t bytes = 0;
    bool fits = take(layout->n_tokens, sizeof(double), &bytes) &&
                take(layout->head_dim, 6 * sizeof(float), &bytes) &&
                take(layout->n_tokens, sizeof(uint8_t), &bytes);
    memset(out, 0, sizeof *out);
    out->memory = fits ? calloc(1, bytes + 1) : NULL;
    if (out->memory == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY,
                         "no memory to merge %zu tokens of head_dim %zu (%zu bytes)",
                         layout->n_tokens, layout->head_dim, bytes);
    }
    out->angles = out->memory;
    float *rows = (float *)(out->angles + layout->n_tokens);
    for (int i = 0; i < 2; i++) {
        out->rows[i] = rows + (size_t)i * layout->head_dim;
        out->units[i] = rows + (size_t)(2 + i) * layout->head_dim;
    }
    out->direction = rows + 4 * layout->head_dim;
    out->narrowed = (uint8_t *)(rows + 5 * layout->head_dim);
    out->is_kept = (uint8_t *)(rows + 6 * layout->head_dim);
    return KRUL_STATUS_OK;
}

/* A token's two vectors as one direction and two magnitudes; the direction is left in units. */
typedef struct share_token {
    double norms[2];
    double angle;
} share_token;

static const uint8_t *
row_of(const krul_view *view, int64_t batch, int64_t head, size_t token)
{
    const uint8_t *plane = krul_view_plane(view, batch, head);
    return plane + (int64_t)token * view->stride[2] * (int64_t)krul_dtype_bytes(view->dtype);
}

/* Read a token of both layers and compare. False when a value is not finite. The angle comes from
 * the difference and the sum of the unit vectors, which stays accurate near 0 and near pi; a zero
 * vector has no direction of its own and counts as angle 0, because any direction restores it. */
static bool
compare_token(const krul_codec_block *block, const krul_share_layout *layout, int64_t batch,
              int64_t head, size_t token, const share_scratch *scratch, share_token *out)
{
    const krul_backend *backend = block->backend;
    int64_t head_dim = (int64_t)layout->head_dim;
    double squares[2];
    double factors[2];
    for (int i = 0; i < 2; i++) {
        backend->widen(block->views[i].dtype, row_of(&block->views[i], batch, head, token),
                       head_dim, scratch->rows[i]);
    }
    backend->share_norms(scratch->rows[0], scratch->rows[1], head_dim, squares);
    for (int i = 0; i < 2; i++) {
        if (!isfinite(squares[i])) {
            return false;
        }
        out->norms[i] = sqrt(squares[i]);
        factors[i] = out->norms[i] > 0 ? 1 / out->norms[i] : 0;
    }
    backend->share_compare(scratch->rows[0], scratch->rows[1], head_dim, factors, scratch->units[0],
                           scratch->units[1], squares);
    bool is_zero = !(out->norms[0] > 0) || !(out->norms[1] > 0);
    out->angle = is_zero ? 0
                         : 2 * (double)atan2f(sqrtf((float)squares[0]), sqrtf((float)squares[1]));
    return true;
}

/* The direction between the unit vectors in scratch. */
static void
merge_token(const krul_codec_block *block, const krul_share_layout *layout,
            const share_token *token, const share_scratch *scratch)
{
    int64_t head_dim = (int64_t)layout->head_dim;
    double sine = sin(token->angle);
    double lower = 1 - upper_weight;
    double upper = upper_weight;
    if (!(token->norms[0] > 0) || !(token->norms[1] > 0)) {
        lower = token->norms[0] > 0 ? 1 : 0;
        upper = token->norms[1] > 0 ? 1 : 0;
    }
    else if (sine > smallest_sine) {
        lower = sin(lower * token->angle) / sine;
        upper = sin(upper * token->angle) / sine;
    }
    else if (token->angle > 1) {
        /* Nearly opposite: the arc between them is not determined. A straight line is, and is never
         * shorter than upper_weight - lower. */
        double lengths[2];
        float weights[2] = {(float)lower, (float)upper};
        block->backend->share_merge(scratch->units[0], scratch->units[1], head_dim, weights,
                                    scratch->direction);
        block->backend->share_norms(scratch->direction, scratch->direction, head_dim, lengths);
        lower /= sqrt(lengths[0]);
        upper /= sqrt(lengths[0]);
    }
    float weights[2] = {(float)lower, (float)upper};
    block->backend->share_merge(scratch->units[0], scratch->units[1], head_dim, weights,
                                scratch->direction);
}

/* Sum the angles of every token over batch and heads. */
static bool
sum_angles(const krul_codec_block *block, const krul_share_layout *layout, share_scratch *scratch)
{
    const int64_t *shape = block->views[0].shape;
    for (int64_t batch = 0; batch < shape[0]; batch++) {
        for (int64_t head = 0; head < shape[1]; head++) {
            for (size_t token = 0; token < layout->n_tokens; token++) {
                share_token compared;
                if (!compare_token(block, layout, batch, head, token, scratch, &compared)) {
                    return false;
                }
                scratch->angles[token] += compared.angle;
            }
        }
    }
    return true;
}

/* An angle and where it was found. */
typedef struct ranked_token {
    double angle;
    size_t position;
} ranked_token;

static int
compare_ranked(const void *left, const void *right)
{
    const ranked_token *first = left;
    const ranked_token *second = right;
    if (first->angle != second->angle) {
        return first->angle > second->angle ? -1 : 1;
    }
    return first->position < second->position ? -1 : first->position > second->position;
}

/* Mark the n_kept tokens with the largest angles, the first ones of equals, and write where. */
static krul_status
choose_kept(const krul_share_layout *layout, share_scratch *scratch, uint8_t *positions_out,
            krul_error *err)
{
    ranked_token *ranked = calloc(layout->n_tokens + 1, sizeof *ranked);
    if (ranked == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory to rank %zu tokens by angle",
                         layout->n_tokens);
    }
    for (size_t i = 0; i < layout->n_tokens; i++) {
        ranked[i] = (ranked_token){.angle = scratch->angles[i], .position = i};
    }
    qsort(ranked, layout->n_tokens, sizeof *ranked, compare_ranked);
    for (size_t i = 0; i < layout->n_kept; i++) {
        scratch->is_kept[ranked[i].position] = 1;
    }
    for (size_t i = 0; i < layout->n_tokens; i++) {
        if (scratch->is_kept[i]) {
            krul_store_u32(positions_out, (uint32_t)i);
            positions_out += sizeof(uint32_t);
        }
    }
    free(ranked);
    return KRUL_STATUS_OK;
}

static krul_plane
row_plane(const krul_codec_block *block, const krul_share_layout *layout, krul_dtype dtype)
{
    return (krul_plane){
        .dtype = dtype,
        .kv = KRUL_KV_VALUE,
        .bits = layout->bits,
        .is_streamed = dtype == block->views[0].dtype && krul_is_streamed(&block->views[0]),
        .n_tokens = 1,
        .head_dim = (int64_t)layout->head_dim,
        .token_stride = (int64_t)layout->head_dim,
    };
}

/* Write what one merged token needs; `index` counts merged tokens of a plane. False when the
 * restored values would not be finite. */
static bool
write_token(const krul_codec_block *block, const krul_share_layout *layout,
            const share_token *token, const share_scratch *scratch, size_t plane, size_t index,
            uint8_t *payload_out, double error_out[2])
{
    const krul_backend *backend = block->backend;
    krul_dtype dtype = block->views[0].dtype;
    int64_t head_dim = (int64_t)layout->head_dim;
    uint8_t *directions = payload_out + layout->directions_offset +
                          plane * layout->direction_plane_bytes;
    size_t groups_before = 0;
    uint8_t *codes = directions;
    if (layout->bits == 0) {
        directions += index * layout->head_dim * layout->element_bytes;
        backend->narrow(dtype, scratch->direction, head_dim, directions);
    }
    else {
        double ignored[2] = {0, 0};
        krul_plane plane_in = row_plane(block, layout, KRUL_DTYPE_F32);
        size_t groups = layout->codes.n_groups / layout->n_merged;
        size_t codes_bytes = (layout->codes.plane_bytes - layout->codes.codes_offset) /
                             layout->n_merged;
        groups_before = 2 * groups * index;
        codes += layout->codes.codes_offset + codes_bytes * index;
        if (!backend->int_encode(&plane_in, scratch->direction, directions + groups_before,
                                 directions + layout->codes.minima_offset + groups_before, codes,
                                 ignored)) {
            return false;
        }
    }
    krul_plane plane_out = row_plane(block, layout, dtype);
    plane_out.is_streamed = false;
    for (int i = 0; i < 2; i++) {
        uint8_t *magnitude = payload_out + layout->magnitudes_offset[i] +
                             (plane * layout->n_merged + index) * layout->magnitude_bytes;
        float norm = (float)token->norms[i];
        if (dtype == KRUL_DTYPE_BF16) {
            krul_store_u16(magnitude, krul_f32_to_bf16(norm));
            norm = krul_bf16_to_f32(krul_f32_to_bf16(norm));
        }
        else {
            krul_store_u32(magnitude, krul_f32_to_bits(norm));
        }
        if (layout->bits == 0) {
            backend->share_decode(&plane_out, directions, magnitude, scratch->narrowed);
        }
        else {
            backend->int_decode(&plane_out, directions + groups_before,
                                directions + layout->codes.minima_offset + groups_before, codes,
                                magnitude, scratch->narrowed);
        }
        double sums[2] = {0, 0};
        backend->widen(dtype, scratch->narrowed, head_dim, scratch->units[0]);
        backend->add_squares(scratch->rows[i], scratch->units[0], head_dim, sums);
        if (!isfinite(norm) || !isfinite(sums[0])) {
            return false;
        }
        error_out[0] += sums[0];
        error_out[1] += sums[1];
    }
    return true;
}

static void
keep_token(const krul_codec_block *block, const krul_share_layout *layout,
           const share_scratch *scratch, int64_t batch, int64_t head, size_t token, size_t row,
           uint8_t *payload_out, double error_out[2])
{
    size_t row_bytes = layout->head_dim * layout->element_bytes;
    for (int i = 0; i < 2; i++) {
        memcpy(payload_out + layout->kept_offset[i] + row * row_bytes,
               row_of(&block->views[i], batch, head, token), row_bytes);
        block->backend->add_squares(scratch->rows[i], scratch->rows[i], (int64_t)layout->head_dim,
                                    error_out);
    }
}

static krul_status
encode(const krul_codec_block *block, int bits, uint8_t *payload_out, size_t *n_bytes_out,
       bool *fits_out, double error_out[2], krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const int64_t *shape = block->views[0].shape;
    krul_share_layout layout;
    share_scratch scratch = {.memory = NULL};
    size_t plane = 0;
    bool fits = true;
    KRUL_TRY(krul_share_measure(block->views[0].dtype, block->views[0].shape, bits, &layout, err));
    *n_bytes_out = layout.n_bytes;
    *fits_out = true;
    if (layout.n_planes == 0 || layout.n_tokens == 0) {
        goto done;
    }
    KRUL_TRY(scratch_init(&layout, &scratch, err));
    *fits_out = false;
    if (!sum_angles(block, &layout, &scratch)) {
        goto done;
    }
    KRUL_TRY(choose_kept(&layout, &scratch, payload_out, err));
    for (int64_t batch = 0; batch < shape[0]; batch++) {
        for (int64_t head = 0; head < shape[1]; head++, plane++) {
            size_t n_kept = 0;
            for (size_t token = 0; token < layout.n_tokens && fits; token++) {
                share_token compared;
                fits = compare_token(block, &layout, batch, head, token, &scratch, &compared);
                if (scratch.is_kept[token]) {
                    keep_token(block, &layout, &scratch, batch, head, token,
                               plane * layout.n_kept + n_kept, payload_out, error_out);
                    n_kept++;
                    continue;
                }
                merge_token(block, &layout, &compared, &scratch);
                fits = fits && write_token(block, &layout, &compared, &scratch, plane,
                                           token - n_kept, payload_out, error_out);
            }
        }
    }
    *fits_out = fits;
done:
    free(scratch.memory);
    return status;
}

/* ---- decoding -------------------------------------------------------------------------------- */

krul_status
krul_share_check_positions(const krul_share_layout *layout, const char *name,
                           const uint8_t *positions, krul_error *err)
{
    int64_t previous = -1;
    for (size_t i = 0; i < layout->n_kept; i++) {
        int64_t position = krul_load_u32(positions + i * sizeof(uint32_t));
        if (position <= previous || position >= (int64_t)layout->n_tokens) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "payload of codec '%s' keeps token %lld after token %lld of %zu", name,
                             (long long)position, (long long)previous, layout->n_tokens);
        }
        previous = position;
    }
    return KRUL_STATUS_OK;
}

static krul_status
check_payload(const krul_share_layout *layout, const char *name, const uint8_t *payload,
              size_t payload_bytes, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (payload_bytes != layout->n_bytes) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "payload of codec '%s' has %zu bytes but the block's shape needs %zu",
                         name, payload_bytes, layout->n_bytes);
    }
    KRUL_TRY(krul_share_check_positions(layout, name, payload, err));
    for (size_t plane = 0; layout->bits != 0 && plane < layout->n_planes; plane++) {
        const uint8_t *codes = payload + layout->directions_offset +
                               plane * layout->direction_plane_bytes;
        if (!krul_int_is_sound(codes, &layout->codes)) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "payload of codec '%s' has a scale or minimum that no encoder writes, "
                             "in plane %zu",
                             name, plane);
        }
    }
done:
    return status;
}

/* Restore n_tokens merged tokens of one plane that follow one another, from the index-th. */
static void
restore_run(const krul_backend *backend, const krul_share_layout *layout, krul_plane *run,
            const uint8_t *directions, const uint8_t *magnitudes, size_t index, size_t n_tokens,
            uint8_t *out)
{
    run->n_tokens = (int64_t)n_tokens;
    magnitudes += index * layout->magnitude_bytes;
    if (layout->bits == 0) {
        directions += index * layout->head_dim * layout->element_bytes;
        backend->share_decode(run, directions, magnitudes, out);
    }
    else {
        size_t groups = layout->codes.n_groups / layout->n_merged;
        size_t codes_bytes = (layout->codes.plane_bytes - layout->codes.codes_offset) /
                             layout->n_merged;
        const uint8_t *scales = directions + 2 * groups * index;
        backend->int_decode(run, scales, scales + layout->codes.minima_offset,
                            directions + layout->codes.codes_offset + codes_bytes * index,
                            magnitudes, out);
    }
}

/* Restore one plane of both layers, run by run, so that a run's directions are read from memory
 * once and from the cache the second time. */
static void
restore_plane(const krul_codec_block *block, const krul_share_layout *layout,
              const uint8_t *payload, size_t plane, int64_t batch, int64_t head)
{
    size_t row_bytes = layout->head_dim * layout->element_bytes;
    const uint8_t *directions = payload + layout->directions_offset +
                                plane * layout->direction_plane_bytes;
    size_t token = 0;
    for (size_t kept = 0; kept <= layout->n_kept; kept++) {
        size_t end = kept < layout->n_kept ? krul_load_u32(payload + kept * sizeof(uint32_t))
                                           : layout->n_tokens;
        while (token < end) {
            size_t n_tokens = end - token < KRUL_GROUP ? end - token : KRUL_GROUP;
            for (int i = 0; i < 2; i++) {
                const krul_view *view = &block->views[i];
                if (view->data == NULL) {
                    continue;
                }
                krul_plane run = row_plane(block, layout, view->dtype);
                run.token_stride = view->stride[2];
                restore_run(block->backend, layout, &run, directions,
                            payload + layout->magnitudes_offset[i] +
                                plane * layout->n_merged * layout->magnitude_bytes,
                            token - kept, n_tokens, (uint8_t *)row_of(view, batch, head, token));
            }
            token += n_tokens;
        }
        for (int i = 0; i < 2 && kept < layout->n_kept; i++) {
            if (block->views[i].data != NULL) {
                memcpy((uint8_t *)row_of(&block->views[i], batch, head, token),
                       payload + layout->kept_offset[i] +
                           (plane * layout->n_kept + kept) * row_bytes,
                       row_bytes);
            }
        }
        token = end + 1;
    }
}

static krul_status
decode(const krul_codec_block *block, int bits, const char *name, const uint8_t *payload,
       size_t payload_bytes, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const int64_t *shape = block->views[0].shape;
    krul_share_layout layout;
    size_t plane = 0;
    KRUL_TRY(krul_share_measure(block->views[0].dtype, block->views[0].shape, bits, &layout, err));
    KRUL_TRY(check_payload(&layout, name, payload, payload_bytes, err));
    for (int64_t batch = 0; batch < shape[0]; batch++) {
        for (int64_t head = 0; head < shape[1]; head++) {
            restore_plane(block, &layout, payload, plane, batch, head);
            plane++;
        }
    }
    block->backend->end_stream();
done:
    return status;
}

/* ---- the table's entries --------------------------------------------------------------------- */

static krul_status
bound_of(const krul_codec_block *block, int bits, size_t *n_bytes_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_share_layout layout;
    KRUL_TRY(krul_share_measure(block->views[0].dtype, block->views[0].shape, bits, &layout, err));
    *n_bytes_out = layout.n_bytes;
done:
    return status;
}

static krul_status
share_bound(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err)
{
    return bound_of(block, 0, n_bytes_out, err);
}

static krul_status
share_encode(const krul_codec_block *block, uint8_t *payload_out, size_t capacity_bytes,
             size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    (void)capacity_bytes; /* compressor.c has compared it with the bound, and the size is fixed */
    return encode(block, 0, payload_out, n_bytes_out, fits_out, error_out, err);
}

static krul_status
share_decode(const krul_codec_block *block, const uint8_t *payload, size_t payload_bytes,
             krul_error *err)
{
    return decode(block, 0, "share", payload, payload_bytes, err);
}

static krul_status
share_int8_bound(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err)
{
    return bound_of(block, 8, n_bytes_out, err);
}

static krul_status
share_int8_encode(const krul_codec_block *block, uint8_t *payload_out, size_t capacity_bytes,
                  size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    (void)capacity_bytes; /* as in share_encode */
    return encode(block, 8, payload_out, n_bytes_out, fits_out, error_out, err);
}

static krul_status
share_int8_decode(const krul_codec_block *block, const uint8_t *payload, size_t payload_bytes,
                  krul_error *err)
{
    return decode(block, 8, "share+int8", payload, payload_bytes, err);
}

static krul_status
share_int4_bound(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err)
{
    return bound_of(block, 4, n_bytes_out, err);
}

static krul_status
share_int4_encode(const krul_codec_block *block, uint8_t *payload_out, size_t capacity_bytes,
                  size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    (void)capacity_bytes; /* as in share_encode */
    return encode(block, 4, payload_out, n_bytes_out, fits_out, error_out, err);
}

static krul_status
share_int4_decode(const krul_codec_block *block, const uint8_t *payload, size_t payload_bytes,
                  krul_error *err)
{
    return decode(block, 4, "share+int4", payload, payload_bytes, err);
}

const krul_codec_ops krul_codec_share = {
    .codec = KRUL_CODEC_SHARE,
    .name = "share",
    .n_layers = 2,
    .bound = share_bound,
    .encode = share_encode,
    .decode = share_decode,
};

const krul_codec_ops krul_codec_share_int8 = {
    .codec = KRUL_CODEC_SHARE_INT8,
    .name = "share+int8",
    .n_layers = 2,
    .bound = share_int8_bound,
    .encode = share_int8_encode,
    .decode = share_int8_decode,
};

const krul_codec_ops krul_codec_share_int4 = {
    .codec = KRUL_CODEC_SHARE_INT4,
    .name = "share+int4",
    .n_layers = 2,
    .bound = share_int4_bound,
    .encode = share_int4_encode,
    .decode = share_int4_decode,
};

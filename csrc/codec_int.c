/* codec_int.c - int8 and int4: asymmetric codes, with a scale and a minimum per group.
 *
 * K is quantised per channel over groups of 64 tokens, because some channels of K are large in
 * every token; V per token over groups of 64 channels. The payload has no header: its size follows
 * from the shape alone. One after the other, for every batch item and head: scales, minima (bf16),
 * codes; FORMAT.md, "Codec int8/int4". */
#include "codec_int.h"

#include "backend.h"
#include "compressor.h"
#include "internal.h"

krul_status
krul_int_measure(krul_kv kv, int bits, int64_t n_tokens, int64_t head_dim, krul_int_layout *out,
                 krul_error *err)
{
    size_t tokens = (size_t)n_tokens;
    size_t channels = (size_t)head_dim;
    size_t token_groups = tokens / KRUL_GROUP + (tokens % KRUL_GROUP != 0);
    size_t channel_groups = channels / KRUL_GROUP + (channels % KRUL_GROUP != 0);
    size_t n_groups, parameters, codes;
    *out = (krul_int_layout){.n_groups = 0};
    size_t row = bits == 8 ? channels : channels / 2 + channels % 2;
    bool overflows = kv == KRUL_KV_KEY ? krul_multiply_overflows(token_groups, channels, &n_groups)
                                       : krul_multiply_overflows(tokens, channel_groups, &n_groups);
    overflows = overflows || krul_multiply_overflows(n_groups, 4, &parameters);
    overflows = overflows || krul_multiply_overflows(tokens, row, &codes);
    overflows = overflows || krul_add_overflows(parameters, codes, &out->plane_bytes);
    if (overflows) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "n_tokens is %lld and head_dim %lld: their codes do not fit in memory",
                         (long long)n_tokens, (long long)head_dim);
    }
    out->n_groups = n_groups;
    out->minima_offset = parameters / 2;
    out->codes_offset = parameters;
    return KRUL_STATUS_OK;
}

bool
krul_int_is_sound(const uint8_t *plane, const krul_int_layout *layout)
{
    uint32_t is_bad = 0;
    const uint8_t *minima = plane + layout->minima_offset;
    for (size_t i = 0; i < layout->n_groups; i++) {
        is_bad |= (uint32_t)(krul_load_u16(plane + 2 * i) >= KRUL_INT_SCALE_END);
        is_bad |= (uint32_t)((krul_load_u16(minima + 2 * i) & 0x7fffu) >= 0x7f80u);
    }
    return is_bad == 0;
}

static krul_status
measure_block(const krul_codec_block *block, int bits, krul_int_layout *layout, size_t *n_bytes_out,
              krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const int64_t *shape = block->views[0].shape;
    KRUL_TRY(krul_int_measure(block->kv, bits, shape[2], shape[3], layout, err));
    size_t n_planes;
    if (krul_multiply_overflows((size_t)shape[0], (size_t)shape[1], &n_planes) ||
        krul_multiply_overflows(n_planes, layout->plane_bytes, n_bytes_out)) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "views[0] has %lld x %lld heads: their codes do not fit in memory",
                         (long long)shape[0], (long long)shape[1]);
    }
done:
    return status;
}

static krul_plane
plane_of(const krul_view *view, krul_kv kv, int bits)
{
    return (krul_plane){
        .dtype = view->dtype,
        .kv = kv,
        .bits = bits,
        .is_streamed = krul_is_streamed(view),
        .n_tokens = view->shape[2],
        .head_dim = view->shape[3],
        .token_stride = view->stride[2],
    };
}

static krul_status
encode(const krul_codec_block *block, int bits, uint8_t *payload_out, size_t *n_bytes_out,
       bool *fits_out, double error_out[2], krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_view *view = &block->views[0];
    krul_plane plane = plane_of(view, block->kv, bits);
    krul_int_layout layout;
    bool fits = true;
    KRUL_TRY(measure_block(block, bits, &layout, n_bytes_out, err));
    for (int64_t batch = 0; batch < view->shape[0] && fits; batch++) {
        for (int64_t head = 0; head < view->shape[1] && fits; head++) {
            fits = block->backend->int_encode(&plane, krul_view_plane(view, batch, head),
                                              payload_out, payload_out + layout.minima_offset,
                                              payload_out + layout.codes_offset, error_out);
            payload_out += layout.plane_bytes;
        }
    }
    *fits_out = fits;
done:
    return status;
}

static krul_status
decode(const krul_codec_block *block, int bits, const uint8_t *payload, size_t payload_bytes,
       krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_view *view = &block->views[0];
    krul_plane plane = plane_of(view, block->kv, bits);
    krul_int_layout layout;
    size_t n_bytes;
    KRUL_TRY(measure_block(block, bits, &layout, &n_bytes, err));
    if (payload_bytes != n_bytes) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "payload of codec 'int%d' has %zu bytes but the block's shape needs %zu",
                         bits, payload_bytes, n_bytes);
    }
    if (view->data == NULL) {
        return KRUL_STATUS_OK;
    }
    for (int64_t batch = 0; batch < view->shape[0]; batch++) {
        for (int64_t head = 0; head < view->shape[1]; head++) {
            if (!krul_int_is_sound(payload, &layout)) {
                return krul_fail(err, KRUL_STATUS_CORRUPT,
                                 "payload of codec 'int%d' has a scale or minimum that no encoder "
                                 "writes, in batch item %lld, head %lld",
                                 bits, (long long)batch, (long long)head);
            }
            block->backend->int_decode(&plane, payload, payload + layout.minima_offset,
                                       payload + layout.codes_offset, NULL,
                                       krul_view_plane(view, batch, head));
            payload += layout.plane_bytes;
        }
    }
    block->backend->end_stream();
done:
    return status;
}

static krul_status
int8_bound(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err)
{
    krul_int_layout layout;
    return measure_block(block, 8, &layout, n_bytes_out, err);
}

static krul_status
int8_encode(const krul_codec_block *block, uint8_t *payload_out, size_t capacity_bytes,
            size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    (void)capacity_bytes; /* compressor.c has compared it with the bound, and the size is fixed */
    return encode(block, 8, payload_out, n_bytes_out, fits_out, error_out, err);
}

static krul_status
int8_decode(const krul_codec_block *block, const uint8_t *payload, size_t payload_bytes,
            krul_error *err)
{
    return decode(block, 8, payload, payload_bytes, err);
}

static krul_status
int4_bound(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err)
{
    krul_int_layout layout;
    return measure_block(block, 4, &layout, n_bytes_out, err);
}

static krul_status
int4_encode(const krul_codec_block *block, uint8_t *payload_out, size_t capacity_bytes,
            size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    (void)capacity_bytes; /* as in int8_encode */
    return encode(block, 4, payload_out, n_bytes_out, fits_out, error_out, err);
}

static krul_status
int4_decode(const krul_codec_block *block, const uint8_t *payload, size_t payload_bytes,
            krul_error *err)
{
    return decode(block, 4, payload, payload_bytes, err);
}

const krul_codec_ops krul_codec_int8 = {
    .codec = KRUL_CODEC_INT8,
    .name = "int8",
    .n_layers = 1,
    .bound = int8_bound,
    .encode = int8_encode,
    .decode = int8_decode,
};

const krul_codec_ops krul_codec_int4 = {
    .codec = KRUL_CODEC_INT4,
    .name = "int4",
    .n_layers = 1,
    .bound = int4_bound,
    .encode = int4_encode,
    .decode = int4_decode,
};

/* codec_exact.c - bit for bit, any dtype: exponents entropy-coded, signs and mantissas kept.
 *
 * Signs and mantissas of keys and values are noise to any coder; exponents take under three bits.
 * What the exponents of a head's channels differ by is mostly a constant per channel, so that is
 * taken off first and one table serves all. Each view is a section of its own, since layers differ.
 * When coding does not pay, as for a few tokens, the elements are stored as they are. Decoding
 * joins a pair of chunks at a time, so that the exponents never leave the processor's cache. */
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "codec_exact.h"
#include "compressor.h"
#include "entropy.h"
#include "internal.h"

enum {
    OFFSETS_ROW_BYTES = 4096, /* a head's offsets are repeated to about this, for long runs */
    SQUARES_AT_ONCE = 512,
    CHUNKS_AT_ONCE = 2,
};

krul_status
krul_exact_measure(krul_dtype dtype, const int64_t shape[KRUL_VIEW_DIMS], krul_exact_sizes *out,
                   krul_error *err)
{
    out->element_bytes = krul_dtype_bytes(dtype);
    size_t n_planes, n_per_plane;
    if (out->element_bytes < 2) {
        return krul_fail(err, KRUL_STATUS_BAD_DTYPE, "dtype %d is not float32, float16 or bfloat16",
                         (int)dtype);
    }
    if (krul_multiply_overflows((size_t)shape[0], (size_t)shape[1], &n_planes) ||
        krul_multiply_overflows((size_t)shape[2], (size_t)shape[3], &n_per_plane) ||
        krul_multiply_overflows(n_planes, (size_t)shape[3], &out->n_offsets) ||
        krul_multiply_overflows(n_planes, n_per_plane, &out->n_elements) ||
        krul_multiply_overflows(out->n_elements, out->element_bytes, &out->raw_bytes) ||
        out->raw_bytes > SIZE_MAX / 4) {
        return krul_fail(
            err, KRUL_STATUS_BAD_SHAPE, "block of (%lld, %lld, %lld, %lld) elements is too large",
            (long long)shape[0], (long long)shape[1], (long long)shape[2], (long long)shape[3]);
    }
    out->kept_bytes = out->raw_bytes - out->n_elements;
    return KRUL_STATUS_OK;
}

static krul_status
exact_bound(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err)
{
    size_t n_bytes = 0;
    for (int i = 0; i < block->n_views; i++) {
        krul_exact_sizes sizes = {0};
        krul_status status = krul_exact_measure(block->views[i].dtype, block->views[i].shape,
                                                &sizes, err);
        if (status != KRUL_STATUS_OK) {
            return status;
        }
        n_bytes += KRUL_EXACT_HEADER_BYTES + sizes.raw_bytes;
    }
    *n_bytes_out = n_bytes;
    return KRUL_STATUS_OK;
}

/* A run of elements that lie side by side, and where it stands in the order batch, head, token,
 * channel. */
typedef struct exact_run {
    uint8_t *elements;
    int64_t plane; /* of batch items times heads */
    int64_t channel;
    int64_t n_elements;
} exact_run;

/* The longest run from element `at` on, of at most `limit` elements: a row, or all rows of a head
 * that follow one another. */
static exact_run
run_at(const krul_view *view, int64_t at, int64_t limit)
{
    int64_t n_heads = view->shape[1], n_tokens = view->shape[2], head_dim = view->shape[3];
    int64_t plane = at / (n_tokens * head_dim);
    int64_t in_plane = at % (n_tokens * head_dim);
    int64_t token = in_plane / head_dim;
    int64_t channel = in_plane % head_dim;
    int64_t element = plane / n_heads * view->stride[0] + plane % n_heads * view->stride[1] +
                      token * view->stride[2] + channel * view->stride[3];
    bool is_dense = view->stride[2] == head_dim;
    int64_t n_elements = is_dense ? n_tokens * head_dim - in_plane : head_dim - channel;
    return (exact_run){
        .elements = (uint8_t *)view->data + element * (int64_t)krul_dtype_bytes(view->dtype),
        .plane = plane,
        .channel = channel,
        .n_elements = krul_min_i64(n_elements, limit),
    };
}

/* ---- encoding ---- */

/* Add sum |x|^2 over the finite values. */
static void
add_energy(const krul_backend *backend, const krul_view *view, int64_t n_elements,
           double error_out[2])
{
    float values[SQUARES_AT_ONCE];
    for (int64_t at = 0; at < n_elements;) {
        exact_run run = run_at(view, at, krul_min_i64(n_elements - at, SQUARES_AT_ONCE));
        backend->widen(view->dtype, run.elements, run.n_elements, values);
        for (int64_t i = 0; i < run.n_elements; i++) {
            uint32_t bits;
            memcpy(&bits, &values[i], sizeof bits);
            bits = (bits & 0x7f800000u) == 0x7f800000u ? 0 : bits;
            memcpy(&values[i], &bits, sizeof bits);
        }
        backend->add_squares(values, values, run.n_elements, error_out);
        at += run.n_elements;
    }
}

/* The mean of each channel's coded bytes over a head's tokens. */
static void
mean_offsets(const uint8_t *coded, size_t n_tokens, size_t head_dim, uint8_t *offsets_out)
{
    enum { CHANNELS_AT_ONCE = 64 };
    for (size_t first = 0; first < head_dim; first += CHANNELS_AT_ONCE) {
        size_t n_channels = head_dim - first < CHANNELS_AT_ONCE ? head_dim - first
                                                                : CHANNELS_AT_ONCE;
        uint64_t sums[CHANNELS_AT_ONCE] = {0};
        for (size_t begin = 0; begin < n_tokens;) {
            /* 256 tokens fit 16-bit sums, which are quick. */
            size_t end = n_tokens - begin < 256 ? n_tokens : begin + 256;
            uint16_t parts[CHANNELS_AT_ONCE] = {0};
            for (; begin < end; begin++) {
                const uint8_t *row = coded + begin * head_dim + first;
                for (size_t channel = 0; channel < n_channels; channel++) {
                    parts[channel] = (uint16_t)(parts[channel] + row[channel]);
                }
            }
            for (size_t channel = 0; channel < n_channels; channel++) {
                sums[channel] += parts[channel];
            }
        }
        for (size_t channel = 0; channel < n_channels; channel++) {
            offsets_out[first + channel] = (uint8_t)((sums[channel] + n_tokens / 2) / n_tokens);
        }
    }
}

/* coded - offsets, modulo 256, for the rows of a head. */
static void
subtract_offsets(uint8_t *coded, const uint8_t *offsets, size_t n_tokens, size_t head_dim,
                 uint8_t *out)
{
    for (size_t token = 0; token < n_tokens; token++) {
        for (size_t channel = 0; channel < head_dim; channel++) {
            out[token * head_dim + channel] = (uint8_t)(coded[token * head_dim + channel] -
                                                        offsets[channel]);
        }
    }
}

static void
section_header_write(krul_exact_mode mode, size_t stream_bytes, uint8_t *out)
{
    krul_store_u64(out, (uint64_t)stream_bytes << 8 | (uint64_t)mode);
}

/* Write the section split, if that is smaller than raw; else *n_bytes_out is 0. */
static krul_status
encode_split(const krul_backend *backend, const krul_view *view, const krul_exact_sizes *sizes,
             uint8_t *out, size_t *n_bytes_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t n_elements = sizes->n_elements, n_offsets = sizes->n_offsets;
    size_t n_tokens = (size_t)view->shape[2], head_dim = (size_t)view->shape[3];
    uint8_t *kept = out + KRUL_EXACT_HEADER_BYTES;
    *n_bytes_out = 0;
    uint8_t *coded = malloc(2 * n_elements + n_offsets);
    if (coded == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu bytes of exponents",
                         2 * n_elements + n_offsets);
    }
    uint8_t *differences = coded + n_elements, *offsets = differences + n_elements;
    for (int64_t at = 0; at < (int64_t)n_elements;) {
        exact_run run = run_at(view, at, (int64_t)n_elements - at);
        backend->exact_split(view->dtype, run.elements, run.n_elements, coded + at,
                             kept + at * (int64_t)(sizes->element_bytes - 1));
        at += run.n_elements;
    }
    for (size_t plane = 0; plane * head_dim < n_offsets; plane++) {
        uint8_t *plane_coded = coded + plane * n_tokens * head_dim;
        uint8_t *plane_offsets = offsets + plane * head_dim;
        mean_offsets(plane_coded, n_tokens, head_dim, plane_offsets);
        subtract_offsets(plane_coded, plane_offsets, n_tokens, head_dim,
                         differences + plane * n_tokens * head_dim);
    }
    uint64_t counts[256], difference_counts[256];
    krul_entropy_count(coded, n_elements, counts);
    krul_entropy_count(differences, n_elements, difference_counts);
    bool has_offsets = krul_entropy_estimate(difference_counts) + n_offsets <
                       krul_entropy_estimate(counts);
    size_t overhead_bytes = has_offsets ? n_offsets : 0;
    size_t stream_bytes = 0;
    if (overhead_bytes < n_elements) {
        KRUL_TRY(krul_entropy_encode_counted(backend, has_offsets ? differences : coded, n_elements,
                                             has_offsets ? difference_counts : counts,
                                             kept + sizes->kept_bytes + overhead_bytes,
                                             n_elements - overhead_bytes - 1, &stream_bytes, err));
    }
    if (stream_bytes != 0) {
        if (has_offsets) {
            memcpy(kept + sizes->kept_bytes, offsets, n_offsets);
        }
        section_header_write(has_offsets ? KRUL_EXACT_SPLIT_WITH_OFFSETS : KRUL_EXACT_SPLIT,
                             stream_bytes, out);
        *n_bytes_out = KRUL_EXACT_HEADER_BYTES + sizes->kept_bytes + overhead_bytes + stream_bytes;
    }
done:
    free(coded);
    return status;
}

static krul_status
exact_encode(const krul_codec_block *block, uint8_t *payload_out, size_t capacity_bytes,
             size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t bound, n_bytes = 0;
    double sums[2] = {0, 0};
    KRUL_TRY(exact_bound(block, &bound, err));
    if (capacity_bytes < bound) {
        status = krul_fail(err, KRUL_STATUS_BAD_VALUE,
                           "capacity_bytes is %zu but the block may need %zu", capacity_bytes,
                           bound);
        goto done;
    }
    for (int i = 0; i < block->n_views; i++) {
        const krul_view *view = &block->views[i];
        uint8_t *out = payload_out + n_bytes;
        krul_exact_sizes sizes;
        size_t section_bytes = 0;
        KRUL_TRY(krul_exact_measure(view->dtype, view->shape, &sizes, err));
        add_energy(block->backend, view, (int64_t)sizes.n_elements, sums);
        if (sizes.n_elements > KRUL_ENTROPY_STATES_BYTES) {
            KRUL_TRY(encode_split(block->backend, view, &sizes, out, &section_bytes, err));
        }
        if (section_bytes == 0) {
            section_header_write(KRUL_EXACT_RAW, 0, out);
            section_bytes = KRUL_EXACT_HEADER_BYTES;
            for (int64_t at = 0; at < (int64_t)sizes.n_elements;) {
                exact_run run = run_at(view, at, (int64_t)sizes.n_elements - at);
                size_t run_bytes = (size_t)run.n_elements * sizes.element_bytes;
                memcpy(out + section_bytes, run.elements, run_bytes);
                section_bytes += run_bytes;
                at += run.n_elements;
            }
        }
        n_bytes += section_bytes;
    }
    *n_bytes_out = n_bytes;
    *fits_out = true;
    error_out[0] = 0;
    error_out[1] = sums[1];
done:
    return status;
}

/* ---- decoding ---- */

krul_status
krul_exact_read_section(const uint8_t *payload, size_t payload_bytes, const krul_exact_sizes *sizes,
                        krul_exact_section *out, krul_error *err)
{
    if (payload_bytes < KRUL_EXACT_HEADER_BYTES) {
        return krul_fail(err, KRUL_STATUS_CORRUPT, "exact block ends %zu bytes into a section",
                         payload_bytes);
    }
    uint64_t header = krul_load_u64(payload);
    int mode = (int)(header & 0xff);
    uint64_t stream_bytes = header >> 8;
    if (mode > KRUL_EXACT_SPLIT_WITH_OFFSETS || (mode == KRUL_EXACT_RAW && stream_bytes != 0)) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "exact block has a section of mode %d with a stream of %llu bytes", mode,
                         (unsigned long long)stream_bytes);
    }
    size_t n_offsets = mode == KRUL_EXACT_SPLIT_WITH_OFFSETS ? sizes->n_offsets : 0;
    size_t fixed_bytes = KRUL_EXACT_HEADER_BYTES + n_offsets +
                         (mode == KRUL_EXACT_RAW ? sizes->raw_bytes : sizes->kept_bytes);
    if (payload_bytes < fixed_bytes || stream_bytes > payload_bytes - fixed_bytes) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "exact block has %zu bytes left for a section of %zu and a stream of %llu",
                         payload_bytes, fixed_bytes, (unsigned long long)stream_bytes);
    }
    out->mode = (krul_exact_mode)mode;
    out->kept = payload + KRUL_EXACT_HEADER_BYTES;
    out->offsets = out->kept + sizes->kept_bytes;
    out->stream = payload + fixed_bytes;
    out->stream_bytes = (size_t)stream_bytes;
    out->n_bytes = fixed_bytes + (size_t)stream_bytes;
    return KRUL_STATUS_OK;
}

static void
decode_raw(const krul_view *view, const krul_exact_sizes *sizes, const uint8_t *elements)
{
    for (int64_t at = 0; at < (int64_t)sizes->n_elements;) {
        exact_run run = run_at(view, at, (int64_t)sizes->n_elements - at);
        memcpy(run.elements, elements + (size_t)at * sizes->element_bytes,
               (size_t)run.n_elements * sizes->element_bytes);
        at += run.n_elements;
    }
}

static krul_status
decode_split(const krul_backend *backend, const krul_view *view, const krul_exact_sizes *sizes,
             const krul_exact_section *section, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_entropy_reader reader;
    uint8_t *symbols = NULL;
    size_t n_elements = sizes->n_elements;
    bool is_streamed = krul_is_streamed(view);
    KRUL_TRY(
        krul_entropy_reader_init(&reader, section->stream, section->stream_bytes, n_elements, err));
    if (n_elements == 0) {
        goto done;
    }
    size_t head_dim = (size_t)view->shape[3];
    size_t n_repeats = head_dim < OFFSETS_ROW_BYTES ? OFFSETS_ROW_BYTES / head_dim : 1;
    size_t row_bytes = n_repeats * head_dim;
    size_t at_once = CHUNKS_AT_ONCE * reader.chunk_symbols;
    at_once = at_once < n_elements ? at_once : n_elements;
    symbols = malloc(at_once + row_bytes);
    if (symbols == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu bytes of exponents",
                           at_once + row_bytes);
        goto done;
    }
    uint8_t *offsets = symbols + at_once;
    memset(offsets, 0, row_bytes);
    int64_t plane = -1;
    size_t at = 0;
    for (size_t chunk = 0; chunk < reader.n_chunks; chunk += CHUNKS_AT_ONCE) {
        size_t n_chunks = reader.n_chunks - chunk < CHUNKS_AT_ONCE ? reader.n_chunks - chunk
                                                                   : CHUNKS_AT_ONCE;
        KRUL_TRY(krul_entropy_reader_read(&reader, backend, chunk, n_chunks, symbols, err));
        size_t n_now = n_elements - at < at_once ? n_elements - at : at_once;
        for (size_t done_now = 0; done_now < n_now;) {
            exact_run run = run_at(view, (int64_t)at, (int64_t)(n_now - done_now));
            if (run.plane != plane && section->mode == KRUL_EXACT_SPLIT_WITH_OFFSETS) {
                const uint8_t *row = section->offsets + (size_t)run.plane * head_dim;
                for (size_t i = 0; i < n_repeats; i++) {
                    memcpy(offsets + i * head_dim, row, head_dim);
                }
                plane = run.plane;
            }
            size_t channel = (size_t)run.channel;
            size_t n_joined = (size_t)run.n_elements;
            n_joined = n_joined < row_bytes - channel ? n_joined : row_bytes - channel;
            backend->exact_join(view->dtype, symbols + done_now, offsets + channel,
                                section->kept + at * (sizes->element_bytes - 1), (int64_t)n_joined,
                                is_streamed, run.elements);
            done_now += n_joined;
            at += n_joined;
        }
    }
done:
    free(symbols);
    return status;
}

static krul_status
exact_decode(const krul_codec_block *block, const uint8_t *payload, size_t payload_bytes,
             krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    for (int i = 0; i < block->n_views; i++) {
        const krul_view *view = &block->views[i];
        krul_exact_sizes sizes;
        krul_exact_section section;
        KRUL_TRY(krul_exact_measure(view->dtype, view->shape, &sizes, err));
        KRUL_TRY(krul_exact_read_section(payload, payload_bytes, &sizes, &section, err));
        if (view->data != NULL) {
            if (section.mode == KRUL_EXACT_RAW) {
                decode_raw(view, &sizes, section.kept);
            }
            else {
                KRUL_TRY(decode_split(block->backend, view, &sizes, &section, err));
            }
        }
        payload += section.n_bytes;
        payload_bytes -= section.n_bytes;
    }
    if (payload_bytes != 0) {
        status = krul_fail(err, KRUL_STATUS_CORRUPT,
                           "exact block has %zu bytes after its last section", payload_bytes);
    }
done:
    block->backend->end_stream();
    return status;
}

const krul_codec_ops krul_codec_exact = {
    .codec = KRUL_CODEC_EXACT,
    .name = "exact",
    .n_layers = 1,
    .bound = exact_bound,
    .encode = exact_encode,
    .decode = exact_decode,
};

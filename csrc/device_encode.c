/* device_encode.c - says where each part of a payload goes that a device is to write. */
#include "device_encode.h"

#include <string.h>

#include "backend.h"
#include "codec_exact.h"
#include "codec_share.h"
#include "entropy.h"
#include "internal.h"

static const char *const view_names[KRUL_COMPRESSOR_MAX_VIEWS] = {"views[0]", "views[1]"};

static size_t
align(size_t n_bytes)
{
    return (n_bytes + KRUL_DEVICE_ALIGNMENT - 1) & ~(size_t)(KRUL_DEVICE_ALIGNMENT - 1);
}

static bool
is_share(krul_codec codec)
{
    return krul_codec_n_layers(codec) == 2;
}

static int
bits_of(krul_codec codec)
{
    return codec == KRUL_CODEC_INT8 || codec == KRUL_CODEC_SHARE_INT8   ? 8
           : codec == KRUL_CODEC_INT4 || codec == KRUL_CODEC_SHARE_INT4 ? 4
                                                                        : 0;
}

bool
krul_device_encode_is_supported(krul_codec codec, krul_dtype dtype,
                                const int64_t shape[KRUL_VIEW_DIMS])
{
    int64_t n_elements = 1;
    for (int axis = 0; axis < KRUL_VIEW_DIMS; axis++) {
        if (shape[axis] < 1 || shape[axis] > KRUL_STORE_MAX_BLOCK_BYTES) {
            return false;
        }
        n_elements *= shape[axis];
        if (n_elements > KRUL_STORE_MAX_BLOCK_BYTES / 4) {
            return false;
        }
    }
    if (krul_dtype_bytes(dtype) == 0 || codec < KRUL_CODEC_EXACT || codec > KRUL_CODEC_SHARE_INT4) {
        return false;
    }
    return !is_share(codec) ||
           (shape[2] <= KRUL_DEVICE_SHARE_MAX_TOKENS && shape[3] <= KRUL_DEVICE_SHARE_MAX_HEAD_DIM);
}

/* Thread blocks that a source takes. */
static int64_t
n_units_of(const krul_device_source *source)
{
    const int64_t *shape = source->views[0].shape;
    int64_t n_planes = shape[0] * shape[1];
    if (is_share(source->codec)) {
        return (n_planes * shape[2] + KRUL_DEVICE_SHARE_ROWS - 1) / KRUL_DEVICE_SHARE_ROWS;
    }
    return n_planes * ((shape[2] + KRUL_DEVICE_TILE_TOKENS - 1) / KRUL_DEVICE_TILE_TOKENS);
}

size_t
krul_device_encode_bound(const krul_device_source *sources, int32_t n_sources)
{
    size_t n_bytes = 2 * KRUL_DEVICE_MAX_BATCHES * (size_t)KRUL_DEVICE_ALIGNMENT;
    for (int32_t i = 0; i < n_sources; i++) {
        n_bytes += sizeof(krul_device_descriptor) +
                   (size_t)n_units_of(&sources[i]) * sizeof(uint32_t);
    }
    return n_bytes;
}

static krul_status
check_source(const krul_device_source *source, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_view *first = &source->views[0];
    int n_views = is_share(source->codec) ? 2 : 1;
    if (source->kv != KRUL_KV_KEY && source->kv != KRUL_KV_VALUE) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "kv is %d but must be %d (key) or %d (value)",
                         (int)source->kv, (int)KRUL_KV_KEY, (int)KRUL_KV_VALUE);
    }
    if (source->payload_offset % KRUL_DEVICE_ALIGNMENT != 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "payload_offset is %llu but must divide by %d",
                         (unsigned long long)source->payload_offset, (int)KRUL_DEVICE_ALIGNMENT);
    }
    for (int i = 0; i < n_views; i++) {
        const krul_view *view = &source->views[i];
        KRUL_TRY(krul_view_check(view, view_names[i], err));
        if (view->dtype != first->dtype ||
            memcmp(view->shape, first->shape, sizeof view->shape) != 0) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "views[0] is (%lld, %lld, %lld, %lld) of %s but views[1] (%lld, %lld, "
                             "%lld, %lld) of %s",
                             (long long)first->shape[0], (long long)first->shape[1],
                             (long long)first->shape[2], (long long)first->shape[3],
                             krul_dtype_name(first->dtype), (long long)view->shape[0],
                             (long long)view->shape[1], (long long)view->shape[2],
                             (long long)view->shape[3], krul_dtype_name(view->dtype));
        }
    }
    if (!krul_device_encode_is_supported(source->codec, first->dtype, first->shape)) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "codec %d is not written by a device for (%lld, %lld, %lld, %lld)",
                         (int)source->codec, (long long)first->shape[0], (long long)first->shape[1],
                         (long long)first->shape[2], (long long)first->shape[3]);
    }
done:
    return status;
}

static krul_device_output
input_of(const krul_view *view)
{
    int64_t element_bytes = (int64_t)krul_dtype_bytes(view->dtype);
    return (krul_device_output){
        .address = (uint64_t)(uintptr_t)view->data,
        .batch_bytes = view->stride[0] * element_bytes,
        .head_bytes = view->stride[1] * element_bytes,
        .token_bytes = view->stride[2] * element_bytes,
    };
}

/* All but the units' numbers; payload_bytes_out is the source's. */
static krul_status
describe(const krul_device_source *source, krul_device_descriptor *out, uint64_t *payload_bytes_out,
         krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const int64_t *shape = source->views[0].shape;
    int bits = bits_of(source->codec);
    memset(out, 0, sizeof *out);
    out->outputs[0] = input_of(&source->views[0]);
    out->kv = (int32_t)source->kv;
    out->n_planes = (int32_t)(shape[0] * shape[1]);
    out->n_heads = (int32_t)shape[1];
    out->n_tokens = out->n_wanted = (int32_t)shape[2];
    out->head_dim = (int32_t)shape[3];
    out->n_tiles = (int32_t)((shape[2] + KRUL_DEVICE_TILE_TOKENS - 1) / KRUL_DEVICE_TILE_TOKENS);
    if (is_share(source->codec)) {
        krul_share_layout layout;
        KRUL_TRY(krul_share_measure(source->views[0].dtype, shape, bits, &layout, err));
        out->outputs[1] = input_of(&source->views[1]);
        out->n_kept = (int32_t)layout.n_kept;
        out->n_merged = (int32_t)layout.n_merged;
        out->data_offset = source->payload_offset + layout.directions_offset;
        out->plane_bytes = layout.direction_plane_bytes;
        out->minima_bytes = layout.codes.minima_offset;
        out->codes_bytes = layout.codes.codes_offset;
        for (int i = 0; i < KRUL_COMPRESSOR_MAX_VIEWS; i++) {
            out->kept_offset[i] = source->payload_offset + layout.kept_offset[i];
            out->magnitudes_offset[i] = source->payload_offset + layout.magnitudes_offset[i];
        }
        out->directory_offset = source->payload_offset; /* where the positions go */
        *payload_bytes_out = layout.n_bytes;
    }
    else if (source->codec == KRUL_CODEC_EXACT) {
        krul_exact_sizes sizes;
        KRUL_TRY(krul_exact_measure(source->views[0].dtype, shape, &sizes, err));
        out->data_offset = source->payload_offset;
        out->n_chunks = (int32_t)((sizes.n_elements - 1) >> KRUL_ENTROPY_CHUNK_BITS) + 1;
        *payload_bytes_out = KRUL_EXACT_HEADER_BYTES + sizes.raw_bytes;
    }
    else {
        krul_int_layout layout;
        KRUL_TRY(krul_int_measure(source->kv, bits, shape[2], shape[3], &layout, err));
        out->data_offset = source->payload_offset;
        out->plane_bytes = layout.plane_bytes;
        out->minima_bytes = layout.minima_offset;
        out->codes_bytes = layout.codes_offset;
        *payload_bytes_out = (uint64_t)out->n_planes * layout.plane_bytes;
    }
done:
    return status;
}

/* Take room in the workspace for what coding a block needs; it begins at *at. */
static size_t
take(size_t *at, size_t n_bytes)
{
    size_t offset = *at;
    *at = align(offset + n_bytes);
    return offset;
}

static void
place_scratch(krul_codec codec, krul_device_descriptor *about, size_t *workspace_bytes)
{
    size_t n_offsets = (size_t)about->n_planes * (size_t)about->head_dim;
    size_t n_tokens = (size_t)about->n_tokens, n_chunks = (size_t)about->n_chunks;
    if (is_share(codec)) { /* angles by plane, their sums, and who is kept */
        about->tiles_offset = take(workspace_bytes,
                                   ((size_t)about->n_planes + 1) * n_tokens * sizeof(double) +
                                       n_tokens * sizeof(uint32_t));
    }
    else if (codec == KRUL_CODEC_EXACT) { /* symbols without and with offsets; chunks */
        about->tiles_offset = take(workspace_bytes, KRUL_DEVICE_EXACT_STATE_BYTES);
        about->kept_offset[0] = take(workspace_bytes, n_offsets * n_tokens);
        about->kept_offset[1] = take(workspace_bytes, n_offsets * n_tokens);
        about->offsets_offset = take(workspace_bytes, n_offsets);
        about->directory_offset = take(workspace_bytes, n_chunks * sizeof(uint32_t));
        about->stream_offset = take(workspace_bytes, n_chunks * KRUL_DEVICE_EXACT_CHUNK_BYTES);
    }
}

/* One batch per codec and dtype that occurs. */
static int32_t
find_batch(krul_device_encode_batch *batches, int32_t *n_batches, const krul_device_source *source)
{
    krul_dtype dtype = source->views[0].dtype;
    for (int32_t i = 0; i < *n_batches; i++) {
        if (batches[i].codec == source->codec && batches[i].dtype == dtype) {
            return i;
        }
    }
    assert(*n_batches < KRUL_DEVICE_MAX_BATCHES);
    batches[*n_batches] = (krul_device_encode_batch){.codec = source->codec, .dtype = dtype};
    return (*n_batches)++;
}

krul_status
krul_device_encode_prepare(uint8_t *plan, size_t plan_bytes, const krul_device_source *sources,
                           int32_t n_sources, krul_device_encode_batch *batches_out,
                           int32_t *n_batches_out, uint64_t *payload_bytes_out,
                           size_t *used_bytes_out, size_t *workspace_bytes_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_device_encode_batch batches[KRUL_DEVICE_MAX_BATCHES];
    int32_t n_batches = 0;
    size_t at = 0, workspace_bytes = 0;
    if (n_sources < 0 || n_sources > KRUL_DEVICE_MAX_SOURCES) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "n_sources is %d but must be 0 to %d",
                         (int)n_sources, (int)KRUL_DEVICE_MAX_SOURCES);
    }
    for (int32_t i = 0; i < n_sources; i++) {
        krul_error failure = {.status = KRUL_STATUS_OK};
        status = check_source(&sources[i], &failure);
        if (status != KRUL_STATUS_OK) {
            return krul_fail(err, status, "sources[%d]: %s", (int)i, failure.message);
        }
        krul_device_encode_batch *batch = &batches[find_batch(batches, &n_batches, &sources[i])];
        int64_t n_units = n_units_of(&sources[i]);
        if (n_units > INT32_MAX - batch->n_units) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "sources have more than %d parts for one launch", (int)INT32_MAX);
        }
        batch->n_blocks++;
        batch->n_units += (int32_t)n_units;
    }
    for (int32_t i = 0; i < n_batches; i++) {
        batches[i].descriptors_offset = at;
        at = align(at + (size_t)batches[i].n_blocks * sizeof(krul_device_descriptor));
        batches[i].units_offset = at;
        at = align(at + (size_t)batches[i].n_units * sizeof(uint32_t));
        batches[i].workspace_offset = workspace_bytes;
        workspace_bytes = align(workspace_bytes + (size_t)batches[i].n_units * 2 * sizeof(double));
        batches[i].n_blocks = batches[i].n_units = 0; /* counted again below */
    }
    if (at > plan_bytes) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "plan_bytes is %zu but %d sources take %zu",
                         plan_bytes, (int)n_sources, at);
    }
    for (int32_t i = 0; i < n_sources; i++) {
        krul_device_descriptor about;
        krul_device_encode_batch *batch = &batches[find_batch(batches, &n_batches, &sources[i])];
        KRUL_TRY(describe(&sources[i], &about, &payload_bytes_out[i], err));
        about.index = i;
        about.batch = (int32_t)(batch - batches);
        about.first_unit = batch->n_units;
        about.n_units = (int32_t)n_units_of(&sources[i]);
        place_scratch(sources[i].codec, &about, &workspace_bytes);
        memcpy(plan + batch->descriptors_offset +
                   (size_t)batch->n_blocks * sizeof(krul_device_descriptor),
               &about, sizeof about);
        for (int32_t unit = 0; unit < about.n_units; unit++) {
            krul_store_u32(plan + batch->units_offset +
                               ((size_t)batch->n_units + (size_t)unit) * sizeof(uint32_t),
                           (uint32_t)batch->n_blocks);
        }
        batch->n_blocks++;
        batch->n_units += about.n_units;
        batch->head_dim = about.head_dim > batch->head_dim ? about.head_dim : batch->head_dim;
        batch->n_chunks = about.n_chunks > batch->n_chunks ? about.n_chunks : batch->n_chunks;
    }
    memcpy(batches_out, batches, (size_t)n_batches * sizeof *batches);
    *n_batches_out = n_batches;
    *used_bytes_out = at;
    *workspace_bytes_out = workspace_bytes;
done:
    return status;
}

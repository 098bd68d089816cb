/* device_decode.c - checks coded blocks in a chunk, and writes what the kernels must know of them.
 *
 * All that a kernel would have to trust is looked at here, once: lengths, positions of kept tokens,
 * tables and directories of entropy streams. The codes themselves are not read, they are what the
 * device is for. Behind the payloads stand, aligned: a descriptor per block (or view), tiles and
 * tables, and per batch a number for each thread block. Nothing is allocated. */
#include "device_decode.h"

#include <string.h>

#include "backend.h"
#include "codec_exact.h"
#include "codec_share.h"
#include "internal.h"

_Static_assert((int)KRUL_DEVICE_TILE_TOKENS == (int)KRUL_GROUP, "a tile of keys has one scale");
_Static_assert(sizeof(krul_device_descriptor) % 8 == 0, "they stand in a row");

enum {
    TILE_TOKENS = KRUL_DEVICE_TILE_TOKENS,
    WORD_BYTES = 16,
    N_VIEWS = KRUL_COMPRESSOR_MAX_VIEWS,
    TABLE_BYTES = 512,
    /* Kernels read whole words of 4 and so up to 3 bytes behind the last payload. */
    SLACK_BYTES = KRUL_DEVICE_ALIGNMENT,
};

static const char *const view_names[N_VIEWS] = {"views[0]", "views[1]"};

/* Where the next part goes; the chunk under work. */
typedef struct writer {
    uint8_t *chunk;
    size_t chunk_bytes;
    size_t payload_end; /* used_bytes at the start */
    size_t at;
    krul_device_batch *batches;
    int32_t n_batches;
    int32_t n_descriptors;
    size_t descriptors_offset;
} writer;

static size_t
align(size_t n_bytes)
{
    return (n_bytes + KRUL_DEVICE_ALIGNMENT - 1) & ~(size_t)(KRUL_DEVICE_ALIGNMENT - 1);
}

static int64_t
divide_up(int64_t numerator, int64_t denominator)
{
    return numerator / denominator + (numerator % denominator != 0);
}

static int
n_views_of(const krul_store_entry *entry)
{
    return entry->layer_upper >= 0 || entry->kv == KRUL_KV_BOTH ? 2 : 1;
}

static int
bits_of(krul_codec codec)
{
    switch (codec) {
        case KRUL_CODEC_INT8:
        case KRUL_CODEC_SHARE_INT8:
            return 8;
        case KRUL_CODEC_INT4:
        case KRUL_CODEC_SHARE_INT4:
            return 4;
        default:
            return 0;
    }
}

static bool
is_share(krul_codec codec)
{
    return krul_codec_n_layers(codec) == 2;
}

bool
krul_device_decode_is_supported(const krul_store_entry *entry)
{
    return entry->kind == KRUL_STORE_ENTRY_BLOCK && entry->codec >= KRUL_CODEC_EXACT &&
           entry->codec <= KRUL_CODEC_SHARE_INT4;
}

size_t
krul_device_decode_bound(const krul_device_block *blocks, int32_t n_blocks)
{
    size_t n_bytes = SLACK_BYTES + 2 * KRUL_DEVICE_ALIGNMENT;
    n_bytes += KRUL_DEVICE_MAX_BATCHES * (size_t)KRUL_DEVICE_ALIGNMENT;
    for (int32_t i = 0; i < n_blocks; i++) {
        const krul_store_entry *entry = blocks[i].entry;
        size_t n_planes = (size_t)entry->n_batch * (size_t)entry->n_heads;
        size_t n_tiles = (size_t)divide_up(entry->n_tokens, TILE_TOKENS);
        size_t n_elements = n_planes * (size_t)entry->n_tokens * (size_t)entry->head_dim;
        size_t n_units = N_VIEWS * n_planes * n_tiles;
        if (entry->codec == KRUL_CODEC_EXACT && !blocks[i].is_decoded) {
            size_t n_chunks = (n_elements >> KRUL_ENTROPY_MIN_CHUNK_BITS) + 1;
            size_t n_warps = N_VIEWS * (n_chunks / KRUL_DEVICE_WARPS + 1);
            n_units = n_units < n_warps ? n_warps : n_units;
            n_bytes += N_VIEWS * (size_t)TABLE_BYTES;
        }
        n_bytes += N_VIEWS * sizeof(krul_device_descriptor) + sizeof(uint32_t) * n_units;
        if (is_share(entry->codec)) {
            n_bytes += n_tiles * sizeof(krul_device_tile);
        }
    }
    return n_bytes;
}

/* Room for the next part. */
static krul_status
reserve(writer *to, size_t n_bytes, size_t *offset_out, krul_error *err)
{
    size_t end;
    if (krul_add_overflows(to->at, align(n_bytes), &end) || end > to->chunk_bytes) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "chunk_bytes is %zu but payloads and descriptors take at least %zu",
                         to->chunk_bytes, to->at + n_bytes);
    }
    *offset_out = to->at;
    to->at = end;
    return KRUL_STATUS_OK;
}

/* ---- one block --------------------------------------------------------------------------------- */

static krul_status
check_block(const writer *to, const krul_device_block *block, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    KRUL_TRY(krul_store_check_entry(entry, err));
    if (!block->is_decoded && !krul_device_decode_is_supported(entry)) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "codec %d of entry kind %d is not decoded on a device", (int)entry->codec,
                         (int)entry->kind);
    }
    if (entry->kind != KRUL_STORE_ENTRY_BLOCK) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "entry is of kind %d but must be %d (block)",
                         (int)entry->kind, (int)KRUL_STORE_ENTRY_BLOCK);
    }
    size_t payload_bytes = block->is_decoded ? 0 : (size_t)entry->payload_bytes;
    if (block->payload_offset % KRUL_DEVICE_ALIGNMENT != 0 ||
        block->payload_offset > to->payload_end ||
        payload_bytes > to->payload_end - block->payload_offset) {
        return krul_fail(
            err, KRUL_STATUS_BAD_VALUE,
            "payload_offset is %llu with %llu bytes but must be a multiple of %d inside "
            "the %zu bytes in use",
            (unsigned long long)block->payload_offset, (unsigned long long)entry->payload_bytes,
            (int)KRUL_DEVICE_ALIGNMENT, to->payload_end);
    }
    for (int i = 0; i < N_VIEWS; i++) {
        const krul_view *view = &block->views[i];
        if (view->data == NULL) {
            continue;
        }
        if (i >= n_views_of(entry)) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "%s is wanted of a block of %d",
                             view_names[i], n_views_of(entry));
        }
        KRUL_TRY(krul_view_check_output(view, view_names[i], err));
        if (view->dtype != entry->dtype) {
            return krul_fail(err, KRUL_STATUS_BAD_DTYPE, "%s is %s but the block %s", view_names[i],
                             krul_dtype_name(view->dtype), krul_dtype_name(entry->dtype));
        }
        if (view->shape[0] != entry->n_batch || view->shape[1] != entry->n_heads ||
            view->shape[2] < 1 || view->shape[2] > entry->n_tokens ||
            view->shape[3] != entry->head_dim) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "%s is (%lld, %lld, %lld, %lld) but the block (%d, %d, %lld, %d)",
                             view_names[i], (long long)view->shape[0], (long long)view->shape[1],
                             (long long)view->shape[2], (long long)view->shape[3],
                             (int)entry->n_batch, (int)entry->n_heads, (long long)entry->n_tokens,
                             (int)entry->head_dim);
        }
    }
    if (block->views[0].data != NULL && block->views[1].data != NULL) {
        if (block->views[0].shape[2] != block->views[1].shape[2]) {
            return krul_fail(
                err, KRUL_STATUS_BAD_SHAPE, "views[0] has %lld tokens but views[1] %lld",
                (long long)block->views[0].shape[2], (long long)block->views[1].shape[2]);
        }
        KRUL_TRY(krul_view_check_disjoint(&block->views[0], view_names[0], &block->views[1],
                                          view_names[1], err));
    }
done:
    return status;
}

static krul_device_output
output_of(const krul_view *view)
{
    krul_device_output out = {.address = 0};
    if (view->data == NULL) {
        return out;
    }
    int64_t element_bytes = (int64_t)krul_dtype_bytes(view->dtype);
    out.address = (uint64_t)(uintptr_t)view->data;
    out.batch_bytes = view->shape[0] > 1 ? view->stride[0] * element_bytes : 0;
    out.head_bytes = view->shape[1] > 1 ? view->stride[1] * element_bytes : 0;
    out.token_bytes = view->shape[2] > 1 ? view->stride[2] * element_bytes : 0;
    uint64_t all = out.address | (uint64_t)out.batch_bytes | (uint64_t)out.head_bytes |
                   (uint64_t)out.token_bytes | WORD_BYTES;
    out.store_bytes = (uint32_t)(all & (~all + 1));
    return out;
}

static int64_t
n_wanted_of(const krul_device_block *block)
{
    const krul_view *view = &block->views[block->views[0].data != NULL ? 0 : 1];
    return view->data != NULL ? view->shape[2] : 0;
}

/* Are rows made of whole 16-byte stores, and codes of as many bytes for each? */
static bool
is_wide(krul_codec codec, krul_dtype dtype, int32_t head_dim)
{
    int32_t n_values = WORD_BYTES / (int32_t)krul_dtype_bytes(dtype);
    int32_t both_nibbles = bits_of(codec) == 4 ? 2 * n_values : n_values;
    return head_dim % n_values == 0 && head_dim % KRUL_GROUP % both_nibbles == 0;
}

static krul_status
find_batch(writer *to, krul_codec codec, krul_dtype dtype, bool wide, int32_t *out, krul_error *err)
{
    bool has_dtype = codec != KRUL_DEVICE_CODEC_RAW;
    for (int32_t i = 0; i < to->n_batches; i++) {
        const krul_device_batch *batch = &to->batches[i];
        if (batch->codec == codec && batch->is_wide == wide &&
            (!has_dtype || batch->dtype == dtype)) {
            *out = i;
            return KRUL_STATUS_OK;
        }
    }
    if (to->n_batches == KRUL_DEVICE_MAX_BATCHES) { /* cannot be: there are no more kinds */
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "blocks are of more than %d kinds",
                         (int)KRUL_DEVICE_MAX_BATCHES);
    }
    *out = to->n_batches++;
    to->batches[*out] = (krul_device_batch){.codec = codec, .dtype = dtype, .is_wide = wide};
    return KRUL_STATUS_OK;
}

/* Enter a descriptor; it becomes a part of the batch's work. */
static krul_status
append(writer *to, const krul_device_descriptor *descriptor, krul_codec codec, krul_dtype dtype,
       bool wide, int64_t n_units, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_device_descriptor entered = *descriptor;
    KRUL_TRY(find_batch(to, codec, dtype, wide, &entered.batch, err));
    krul_device_batch *batch = &to->batches[entered.batch];
    if (n_units > INT32_MAX - batch->n_units) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "blocks have more than %d parts of %d tokens for one launch",
                         (int)INT32_MAX, (int)TILE_TOKENS);
    }
    entered.first_unit = batch->n_units;
    entered.n_units = (int32_t)n_units;
    batch->n_units += (int32_t)n_units;
    memcpy(to->chunk + to->descriptors_offset +
               (size_t)to->n_descriptors * sizeof(krul_device_descriptor),
           &entered, sizeof entered);
    to->n_descriptors++;
done:
    return status;
}

/* What is the same for all codecs. */
static krul_device_descriptor
describe(const krul_device_block *block)
{
    const krul_store_entry *entry = block->entry;
    int64_t n_wanted = n_wanted_of(block);
    return (krul_device_descriptor){
        .outputs = {output_of(&block->views[0]), output_of(&block->views[1])},
        .kv = (int32_t)entry->kv,
        .n_planes = entry->n_batch * entry->n_heads,
        .n_heads = entry->n_heads,
        .n_tokens = (int32_t)entry->n_tokens,
        .n_wanted = (int32_t)n_wanted,
        .head_dim = entry->head_dim,
        .n_tiles = (int32_t)divide_up(n_wanted, TILE_TOKENS),
        .data_offset = block->payload_offset,
    };
}

static int64_t
n_tile_units(const krul_device_block *block)
{
    const krul_store_entry *entry = block->entry;
    return (int64_t)entry->n_batch * entry->n_heads * divide_up(n_wanted_of(block), TILE_TOKENS);
}

/* Elements of one view that lie side by side from `offset`. */
static krul_status
prepare_raw(writer *to, const krul_device_block *block, int view, size_t offset, krul_error *err)
{
    const krul_store_entry *entry = block->entry;
    krul_device_descriptor descriptor = describe(block);
    size_t row_bytes = (size_t)entry->head_dim * krul_dtype_bytes(entry->dtype);
    descriptor.outputs[0] = descriptor.outputs[view];
    descriptor.outputs[1].address = 0;
    descriptor.data_offset = offset;
    descriptor.plane_bytes = (uint64_t)entry->n_tokens * row_bytes;
    descriptor.head_dim = (int32_t)(row_bytes / 2); /* in units of the narrowest store */
    return append(to, &descriptor, KRUL_DEVICE_CODEC_RAW, entry->dtype, row_bytes % WORD_BYTES == 0,
                  n_tile_units(block), err);
}

static krul_status
prepare_decoded(writer *to, const krul_device_block *block, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    size_t offset = (size_t)block->payload_offset;
    size_t view_bytes = (size_t)entry->n_batch * (size_t)entry->n_heads * (size_t)entry->n_tokens *
                        (size_t)entry->head_dim * krul_dtype_bytes(entry->dtype);
    for (int i = 0; i < N_VIEWS; i++) {
        if (block->views[i].data == NULL) {
            continue;
        }
        if (offset > to->payload_end || view_bytes > to->payload_end - offset) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "decoded elements of %s end at %zu but %zu bytes are in use",
                             view_names[i], offset + view_bytes, to->payload_end);
        }
        KRUL_TRY(prepare_raw(to, block, i, offset, err));
        offset = align(offset + view_bytes);
    }
done:
    return status;
}

static krul_status
prepare_int(writer *to, const krul_device_block *block, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    krul_device_descriptor descriptor = describe(block);
    krul_int_layout layout;
    KRUL_TRY(krul_int_measure(entry->kv, bits_of(entry->codec), entry->n_tokens, entry->head_dim,
                              &layout, err));
    uint64_t n_bytes = (uint64_t)entry->n_batch * (uint64_t)entry->n_heads * layout.plane_bytes;
    if (entry->payload_bytes != n_bytes) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "payload of codec '%s' has %llu bytes but the block's shape needs %llu",
                         krul_codec_name(entry->codec), (unsigned long long)entry->payload_bytes,
                         (unsigned long long)n_bytes);
    }
    descriptor.plane_bytes = layout.plane_bytes;
    descriptor.minima_bytes = layout.minima_offset;
    descriptor.codes_bytes = layout.codes_offset;
    KRUL_TRY(append(to, &descriptor, entry->codec, entry->dtype,
                    is_wide(entry->codec, entry->dtype, entry->head_dim), n_tile_units(block),
                    err));
done:
    return status;
}

/* Which tokens of each wanted tile are kept; the positions are known to ascend. */
static void
write_tiles(const krul_device_descriptor *descriptor, const uint8_t *positions, uint8_t *out)
{
    int32_t n_before = 0;
    for (int64_t i = 0; i < descriptor->n_tiles; i++) {
        krul_device_tile tile = {.n_kept_before = (uint32_t)n_before};
        int64_t first = i * TILE_TOKENS;
        while (n_before < descriptor->n_kept) {
            int64_t position = krul_load_u32(positions + 4 * (size_t)n_before);
            if (position >= first + TILE_TOKENS) {
                break;
            }
            tile.kept |= (uint64_t)1 << (position - first);
            n_before++;
        }
        memcpy(out + (size_t)i * sizeof tile, &tile, sizeof tile);
    }
}

static krul_status
prepare_share(writer *to, const krul_device_block *block, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    const int64_t shape[KRUL_VIEW_DIMS] = {entry->n_batch, entry->n_heads, entry->n_tokens,
                                           entry->head_dim};
    const char *name = krul_codec_name(entry->codec);
    const uint8_t *payload = to->chunk + block->payload_offset;
    krul_device_descriptor descriptor = describe(block);
    krul_share_layout layout;
    size_t tiles_offset;
    KRUL_TRY(krul_share_measure(entry->dtype, shape, bits_of(entry->codec), &layout, err));
    if (entry->payload_bytes != layout.n_bytes) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "payload of codec '%s' has %llu bytes but the block's shape needs %zu",
                         name, (unsigned long long)entry->payload_bytes, layout.n_bytes);
    }
    KRUL_TRY(krul_share_check_positions(&layout, name, payload, err));
    KRUL_TRY(
        reserve(to, (size_t)descriptor.n_tiles * sizeof(krul_device_tile), &tiles_offset, err));
    descriptor.n_kept = (int32_t)layout.n_kept;
    descriptor.n_merged = (int32_t)layout.n_merged;
    descriptor.data_offset = block->payload_offset + layout.directions_offset;
    descriptor.plane_bytes = layout.direction_plane_bytes;
    descriptor.minima_bytes = layout.codes.minima_offset;
    descriptor.codes_bytes = layout.codes.codes_offset;
    for (int i = 0; i < N_VIEWS; i++) {
        descriptor.kept_offset[i] = block->payload_offset + layout.kept_offset[i];
        descriptor.magnitudes_offset[i] = block->payload_offset + layout.magnitudes_offset[i];
    }
    descriptor.tiles_offset = tiles_offset;
    write_tiles(&descriptor, payload, to->chunk + tiles_offset);
    KRUL_TRY(append(to, &descriptor, entry->codec, entry->dtype,
                    is_wide(entry->codec, entry->dtype, entry->head_dim), n_tile_units(block),
                    err));
done:
    return status;
}

/* The section of one view that is split into exponents and the rest. */
static krul_status
prepare_split(writer *to, const krul_device_block *block, int view,
              const krul_exact_section *section, const krul_exact_sizes *sizes, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    krul_device_descriptor descriptor = describe(block);
    krul_entropy_reader reader;
    size_t table_offset;
    KRUL_TRY(krul_entropy_reader_init(&reader, section->stream, section->stream_bytes,
                                      sizes->n_elements, err));
    descriptor.outputs[0] = descriptor.outputs[view];
    descriptor.outputs[1].address = 0;
    descriptor.kept_offset[0] = (uint64_t)(section->kept - to->chunk);
    descriptor.stream_mode = (int32_t)reader.mode;
    while ((size_t)1 << descriptor.chunk_bits < reader.chunk_symbols) {
        descriptor.chunk_bits++;
    }
    descriptor.n_chunks = (int32_t)reader.n_chunks;
    descriptor.stream_offset = (uint64_t)(reader.bytes - to->chunk);
    if (section->mode == KRUL_EXACT_SPLIT_WITH_OFFSETS) {
        descriptor.offsets_offset = (uint64_t)(section->offsets - to->chunk);
    }
    if (reader.mode == KRUL_ENTROPY_CODED) {
        descriptor.directory_offset = (uint64_t)(reader.directory - to->chunk);
        KRUL_TRY(reserve(to, TABLE_BYTES, &table_offset, err));
        descriptor.table_offset = table_offset;
        memcpy(to->chunk + table_offset, reader.table.frequency, TABLE_BYTES);
    }
    KRUL_TRY(append(to, &descriptor, KRUL_CODEC_EXACT, entry->dtype, false,
                    divide_up((int64_t)reader.n_chunks, KRUL_DEVICE_WARPS), err));
done:
    return status;
}

static krul_status
prepare_exact(writer *to, const krul_device_block *block, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    const int64_t shape[KRUL_VIEW_DIMS] = {entry->n_batch, entry->n_heads, entry->n_tokens,
                                           entry->head_dim};
    const uint8_t *payload = to->chunk + block->payload_offset;
    size_t payload_bytes = (size_t)entry->payload_bytes;
    krul_exact_sizes sizes;
    KRUL_TRY(krul_exact_measure(entry->dtype, shape, &sizes, err));
    for (int i = 0; i < n_views_of(entry); i++) {
        krul_exact_section section;
        KRUL_TRY(krul_exact_read_section(payload, payload_bytes, &sizes, &section, err));
        if (block->views[i].data != NULL && section.mode == KRUL_EXACT_RAW) {
            KRUL_TRY(prepare_raw(to, block, i, (size_t)(section.kept - to->chunk), err));
        }
        else if (block->views[i].data != NULL) {
            KRUL_TRY(prepare_split(to, block, i, &section, &sizes, err));
        }
        payload += section.n_bytes;
        payload_bytes -= section.n_bytes;
    }
    if (payload_bytes != 0) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "exact block has %zu bytes after its last section", payload_bytes);
    }
done:
    return status;
}

static krul_status
prepare_block(writer *to, const krul_device_block *block, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    KRUL_TRY(check_block(to, block, err));
    if (n_wanted_of(block) == 0) {
        return KRUL_STATUS_OK;
    }
    if (block->is_decoded) {
        KRUL_TRY(prepare_decoded(to, block, err));
    }
    else if (block->entry->codec == KRUL_CODEC_EXACT) {
        KRUL_TRY(prepare_exact(to, block, err));
    }
    else if (is_share(block->entry->codec)) {
        KRUL_TRY(prepare_share(to, block, err));
    }
    else {
        KRUL_TRY(prepare_int(to, block, err));
    }
done:
    return status;
}

/* ---- all of them ------------------------------------------------------------------------------- */

/* Give every thread block of every batch its descriptor. */
static krul_status
write_units(writer *to, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    for (int32_t i = 0; i < to->n_batches; i++) {
        krul_device_batch *batch = &to->batches[i];
        size_t offset;
        KRUL_TRY(reserve(to, (size_t)batch->n_units * sizeof(uint32_t), &offset, err));
        batch->descriptors_offset = to->descriptors_offset;
        batch->units_offset = offset;
    }
    for (int32_t i = 0; i < to->n_descriptors; i++) {
        krul_device_descriptor descriptor;
        memcpy(&descriptor, to->chunk + to->descriptors_offset + (size_t)i * sizeof descriptor,
               sizeof descriptor);
        uint8_t *units = to->chunk + to->batches[descriptor.batch].units_offset +
                         (size_t)descriptor.first_unit * sizeof(uint32_t);
        for (int32_t unit = 0; unit < descriptor.n_units; unit++) {
            krul_store_u32(units + (size_t)unit * sizeof(uint32_t), (uint32_t)i);
        }
    }
done:
    return status;
}

krul_status
krul_device_decode_prepare(uint8_t *chunk, size_t chunk_bytes, size_t used_bytes,
                           const krul_device_block *blocks, int32_t n_blocks,
                           krul_device_batch *batches_out, int32_t *n_batches_out,
                           size_t *used_bytes_out, int32_t *bad_block_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_device_batch batches[KRUL_DEVICE_MAX_BATCHES];
    writer to = {
        .chunk = chunk,
        .chunk_bytes = chunk_bytes,
        .payload_end = used_bytes,
        .batches = batches,
    };
    if (used_bytes > chunk_bytes || chunk_bytes - used_bytes < 2 * SLACK_BYTES || n_blocks < 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "chunk_bytes is %zu with %zu in use for %d blocks, which leaves no room",
                         chunk_bytes, used_bytes, (int)n_blocks);
    }
    to.at = align(used_bytes) + SLACK_BYTES;
    KRUL_TRY(reserve(&to, N_VIEWS * (size_t)n_blocks * sizeof(krul_device_descriptor),
                     &to.descriptors_offset, err));
    for (int32_t i = 0; i < n_blocks; i++) {
        krul_error failure = {.status = KRUL_STATUS_OK};
        status = prepare_block(&to, &blocks[i], &failure);
        if (status != KRUL_STATUS_OK) {
            const krul_store_entry *entry = blocks[i].entry;
            if (bad_block_out != NULL) {
                *bad_block_out = i;
            }
            return krul_fail(err, status, "blocks[%d], layer %d, tokens from %lld: %s", (int)i,
                             (int)entry->layer_lower, (long long)entry->token_start,
                             failure.message);
        }
    }
    KRUL_TRY(write_units(&to, err));
    memcpy(batches_out, batches, (size_t)to.n_batches * sizeof *batches);
    *n_batches_out = to.n_batches;
    *used_bytes_out = to.at;
done:
    return status;
}

/* check_device.h - does what krul_device_decode_prepare wrote keep a kernel inside the chunk? */
#ifndef CHECK_DEVICE_H
#define CHECK_DEVICE_H

#include <string.h>

#include "device_decode.h"
#include "entropy.h"
#include "internal.h"

/* The chunk that a kernel would read. */
typedef struct checked_chunk {
    const uint8_t *bytes;
    size_t payload_end; /* what was there before */
    size_t used_bytes; /* and after */
} checked_chunk;

static inline bool
check_device_part(uint64_t offset, uint64_t n_bytes, uint64_t begin, uint64_t end)
{
    return offset >= begin && offset <= end && n_bytes <= end - offset;
}

static inline bool
check_device_int(const checked_chunk *chunk, const krul_device_descriptor *about, int bits,
                 uint64_t n_tokens, uint64_t n_groups)
{
    uint64_t row_bytes = bits == 8 ? (uint64_t)about->head_dim
                                   : ((uint64_t)about->head_dim + 1) / 2;
    return check_device_part(about->data_offset, (uint64_t)about->n_planes * about->plane_bytes, 0,
                             chunk->payload_end) &&
           check_device_part(0, 2 * n_groups, 0, about->minima_bytes) &&
           check_device_part(about->minima_bytes, 2 * n_groups, 0, about->codes_bytes) &&
           check_device_part(about->codes_bytes, n_tokens * row_bytes, 0, about->plane_bytes);
}

static inline bool
check_device_share(const checked_chunk *chunk, const krul_device_descriptor *about, int bits,
                   uint64_t element_bytes, bool is_bf16)
{
    uint64_t n_planes = (uint64_t)about->n_planes, head_dim = (uint64_t)about->head_dim;
    uint64_t n_kept = (uint64_t)about->n_kept, n_merged = (uint64_t)about->n_merged;
    bool is_sound = about->n_kept >= 0 && about->n_kept + about->n_merged == about->n_tokens;
    for (int i = 0; i < 2; i++) {
        is_sound &= check_device_part(about->kept_offset[i],
                                      n_planes * n_kept * head_dim * element_bytes, 0,
                                      chunk->payload_end);
        is_sound &= check_device_part(about->magnitudes_offset[i],
                                      n_planes * n_merged * (is_bf16 ? 2 : 4), 0,
                                      chunk->payload_end);
    }
    if (bits == 0) {
        is_sound &= about->plane_bytes == n_merged * head_dim * element_bytes;
        is_sound &= check_device_part(about->data_offset, n_planes * about->plane_bytes, 0,
                                      chunk->payload_end);
    }
    else {
        is_sound &= check_device_int(chunk, about, bits, n_merged,
                                     n_merged * ((head_dim + 63) / 64));
    }
    is_sound &= about->tiles_offset % KRUL_DEVICE_ALIGNMENT == 0 &&
                check_device_part(about->tiles_offset,
                                  (uint64_t)about->n_tiles * sizeof(krul_device_tile),
                                  chunk->payload_end, chunk->used_bytes);
    uint32_t n_before = 0;
    for (int64_t i = 0; is_sound && i < about->n_tiles; i++) {
        krul_device_tile tile;
        memcpy(&tile, chunk->bytes + about->tiles_offset + (size_t)i * sizeof tile, sizeof tile);
        int64_t n_here = krul_min_i64(64, about->n_tokens - 64 * i);
        is_sound &= tile.n_kept_before == n_before;
        is_sound &= n_here == 64 || tile.kept >> n_here == 0;
        n_before += (uint32_t)__builtin_popcountll(tile.kept);
    }
    /* Whole blocks name every kept token. */
    return is_sound && (about->n_wanted < about->n_tokens ? n_before <= (uint32_t)about->n_kept
                                                          : n_before == (uint32_t)about->n_kept);
}

static inline bool
check_device_exact(const checked_chunk *chunk, const krul_device_descriptor *about,
                   uint64_t element_bytes)
{
    uint64_t n_elements = (uint64_t)about->n_planes * (uint64_t)about->n_tokens *
                          (uint64_t)about->head_dim;
    uint64_t chunk_symbols = (uint64_t)1 << about->chunk_bits;
    uint64_t n_chunks = (n_elements + chunk_symbols - 1) / chunk_symbols;
    bool is_sound = about->chunk_bits >= KRUL_ENTROPY_MIN_CHUNK_BITS &&
                    about->chunk_bits <= KRUL_ENTROPY_MAX_CHUNK_BITS &&
                    (uint64_t)about->n_chunks == n_chunks;
    is_sound &= check_device_part(about->kept_offset[0], n_elements * (element_bytes - 1), 0,
                                  chunk->payload_end);
    if (about->offsets_offset != 0) {
        is_sound &= check_device_part(about->offsets_offset,
                                      (uint64_t)about->n_planes * (uint64_t)about->head_dim, 0,
                                      chunk->payload_end);
    }
    if (about->stream_mode != KRUL_ENTROPY_CODED) {
        return is_sound &&
               check_device_part(about->stream_offset,
                                 about->stream_mode == KRUL_ENTROPY_RAW ? n_elements : 1, 0,
                                 chunk->payload_end);
    }
    is_sound &= check_device_part(about->directory_offset, 4 * n_chunks, 0, chunk->payload_end);
    is_sound &= about->table_offset % 2 == 0 &&
                check_device_part(about->table_offset, 512, chunk->payload_end, chunk->used_bytes);
    uint32_t begin = 0, sum = 0;
    for (uint64_t i = 0; is_sound && i < n_chunks; i++) {
        uint32_t end = krul_load_u32(chunk->bytes + about->directory_offset + 4 * i);
        is_sound &= end >= begin && end - begin >= KRUL_ENTROPY_STATES_BYTES &&
                    check_device_part(about->stream_offset, end, 0, chunk->payload_end);
        begin = end;
    }
    for (uint64_t i = 0; is_sound && i < 256; i++) {
        sum += krul_load_u16(chunk->bytes + about->table_offset + 2 * i);
    }
    return is_sound && sum == KRUL_ENTROPY_N_SLOTS;
}

/* Everything that the batches' kernels would read lies where it should. */
static inline bool
check_device_batches(const checked_chunk *chunk, const krul_device_batch *batches,
                     int32_t n_batches)
{
    bool is_sound = true;
    for (int32_t i = 0; is_sound && i < n_batches; i++) {
        const krul_device_batch *batch = &batches[i];
        uint64_t element_bytes = krul_dtype_bytes(batch->dtype);
        is_sound &= batch->units_offset % KRUL_DEVICE_ALIGNMENT == 0 &&
                    batch->descriptors_offset % KRUL_DEVICE_ALIGNMENT == 0 && batch->n_units > 0 &&
                    check_device_part(batch->units_offset, 4 * (uint64_t)batch->n_units,
                                      chunk->payload_end, chunk->used_bytes);
        for (int32_t unit = 0; is_sound && unit < batch->n_units; unit++) {
            krul_device_descriptor about;
            uint64_t index = krul_load_u32(chunk->bytes + batch->units_offset + 4 * (size_t)unit);
            uint64_t offset = batch->descriptors_offset + index * sizeof about;
            if (!check_device_part(offset, sizeof about, chunk->payload_end, chunk->used_bytes)) {
                return false;
            }
            memcpy(&about, chunk->bytes + offset, sizeof about);
            int32_t n_per_plane = batch->codec == KRUL_CODEC_EXACT ? 1 : about.n_tiles;
            is_sound &= unit >= about.first_unit && unit - about.first_unit < about.n_units;
            is_sound &= about.batch == i && about.n_wanted >= 1 && about.n_wanted <= about.n_tokens;
            is_sound &= about.n_tiles == (about.n_wanted + 63) / 64;
            is_sound &= batch->codec == KRUL_CODEC_EXACT
                            ? about.n_units == (about.n_chunks + 3) / 4
                            : about.n_units == about.n_planes * n_per_plane;
            uint64_t n_tokens = (uint64_t)about.n_tokens, head_dim = (uint64_t)about.head_dim;
            uint64_t n_groups = about.kv == KRUL_KV_KEY ? (n_tokens + 63) / 64 * head_dim
                                                        : n_tokens * ((head_dim + 63) / 64);
            switch ((int)batch->codec) {
                case KRUL_DEVICE_CODEC_RAW:
                    is_sound &= about.plane_bytes == 2 * n_tokens * head_dim;
                    is_sound &= check_device_part(about.data_offset,
                                                  (uint64_t)about.n_planes * about.plane_bytes, 0,
                                                  chunk->payload_end);
                    break;
                case KRUL_CODEC_INT8:
                case KRUL_CODEC_INT4:
                    is_sound &= check_device_int(
                        chunk, &about, batch->codec == KRUL_CODEC_INT8 ? 8 : 4, n_tokens, n_groups);
                    break;
                case KRUL_CODEC_EXACT:
                    is_sound &= check_device_exact(chunk, &about, element_bytes);
                    break;
                default:
                    is_sound &= check_device_share(chunk, &about,
                                                   batch->codec == KRUL_CODEC_SHARE        ? 0
                                                   : batch->codec == KRUL_CODEC_SHARE_INT8 ? 8
                                                                                           : 4,
                                                   element_bytes, batch->dtype == KRUL_DTYPE_BF16);
            }
        }
    }
    return is_sound;
}

#endif /* CHECK_DEVICE_H */

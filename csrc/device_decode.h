/* device_decode.h - coded blocks made ready for the kernels of a device; internal, no CUDA.
 *
 * A chunk of pinned memory holds the payloads of some blocks. krul_device_decode_prepare checks them
 * and writes, behind them in the same chunk, what the kernels must know; one copy brings all of it to
 * the device, and one launch per batch decodes it there. */
#ifndef KRUL_DEVICE_DECODE_H
#define KRUL_DEVICE_DECODE_H

#include "krul.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    /* Seven codecs that a device knows, counting 0, by dtypes and by whether rows are wide. */
    KRUL_DEVICE_MAX_BATCHES = 7 * 3 * 2,
    KRUL_DEVICE_ALIGNMENT = 16, /* of payloads in a chunk, and of what is written behind them */
    KRUL_DEVICE_TILE_TOKENS = 64, /* what a thread block decodes: a group of keys */
    KRUL_DEVICE_WARPS = 4, /* of a thread block that decodes an entropy stream, a chunk each */
};

/* The codec of a batch that only moves elements. */
#define KRUL_DEVICE_CODEC_RAW ((krul_codec)0)

/* One block in a chunk of pinned memory, and where it shall be decoded to. */
typedef struct krul_device_block {
    const krul_store_entry *entry;
    uint64_t payload_offset; /* in the chunk; a multiple of KRUL_DEVICE_ALIGNMENT */
    /* At payload_offset stand not the payload but what it decodes to, for each wanted view n_batch x
     * n_heads x n_tokens x head_dim elements side by side; each view begins at the next multiple of
     * KRUL_DEVICE_ALIGNMENT. */
    bool is_decoded;
    /* On the device; data NULL: not wanted. May be the block's first tokens only. The second is of
     * layer_upper, or V of a block of both. */
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
} krul_device_block;

/* What one launch decodes. */
typedef struct krul_device_batch {
    krul_codec codec; /* or KRUL_DEVICE_CODEC_RAW */
    krul_dtype dtype; /* of any block, where codec is KRUL_DEVICE_CODEC_RAW: it moves bytes */
    bool is_wide; /* rows are made of 16-byte parts */
    int32_t n_units; /* thread blocks */
    uint64_t
        descriptors_offset; /* in the chunk: krul_device_descriptor, the same for all batches */
    uint64_t units_offset; /* n_units x u32: which descriptor a thread block works on */
} krul_device_batch;

/* ---- what kernels read ----------------------------------------------------------------------- */

/* Strides in bytes. */
typedef struct krul_device_output {
    uint64_t address; /* 0: not wanted */
    int64_t batch_bytes;
    int64_t head_bytes;
    int64_t token_bytes;
    uint32_t store_bytes; /* widest store that every row's address allows: 2, 4, 8 or 16 */
    uint32_t reserved;
} krul_device_output;

/* One block, or one view of it where a codec treats views apart (raw, exact). Offsets are from the
 * start of the chunk unless they are of a plane. */
typedef struct krul_device_descriptor {
    krul_device_output outputs[KRUL_COMPRESSOR_MAX_VIEWS];
    int32_t kv;
    int32_t n_planes; /* batch items times heads */
    int32_t n_heads;
    int32_t n_tokens; /* of the block */
    int32_t n_wanted; /* the first of them */
    int32_t head_dim;
    int32_t n_tiles; /* of a plane: KRUL_DEVICE_TILE_TOKENS wanted tokens, or fewer */
    int32_t first_unit; /* of the batch's */
    int32_t n_units;
    int32_t batch;

    /* int: planes of codes; share: directions; raw: elements */
    int32_t n_kept; /* share */
    int32_t n_merged;
    int32_t n_chunks; /* exact */
    int32_t reserved;
    uint64_t data_offset;
    uint64_t plane_bytes;
    uint64_t minima_bytes; /* int: where in a plane minima and codes begin */
    uint64_t codes_bytes;

    uint64_t kept_offset[KRUL_COMPRESSOR_MAX_VIEWS]; /* share: rows; exact: [0], kept bytes */
    uint64_t magnitudes_offset[KRUL_COMPRESSOR_MAX_VIEWS];
    uint64_t tiles_offset; /* share: krul_device_tile of each tile */

    int32_t stream_mode; /* exact: krul_entropy_mode */
    int32_t chunk_bits;
    uint64_t table_offset; /* 256 frequencies, u16 */
    uint64_t directory_offset; /* where chunks end; any byte */
    uint64_t stream_offset; /* of chunk 0, or of the symbols; any byte */
    uint64_t offsets_offset; /* u8 per plane and channel; 0: there are none */
} krul_device_descriptor;

/* Which tokens of a tile are kept in full. */
typedef struct krul_device_tile {
    uint64_t kept; /* bit i: the tile's token i */
    uint32_t n_kept_before;
    uint32_t reserved;
} krul_device_tile;

/* ---- on the host ----------------------------------------------------------------------------- */

/* Can the blocks of this entry be decoded on a device? If not, the CPU decodes them into the chunk
 * (is_decoded). */
bool krul_device_decode_is_supported(const krul_store_entry *entry);

/* Most bytes that krul_device_decode_prepare appends for these blocks, whose entries must be sound. */
size_t krul_device_decode_bound(const krul_device_block *blocks, int32_t n_blocks);

/* Check the payloads of blocks that lie in the first used_bytes of a chunk of chunk_bytes, and append
 * what the kernels read. Afterwards the first *used_bytes_out bytes are to be copied to the device
 * whole, to an address that is a multiple of KRUL_DEVICE_ALIGNMENT. batches_out holds
 * KRUL_DEVICE_MAX_BATCHES. Trusts nothing in the payloads: damage is KRUL_STATUS_CORRUPT, and
 * bad_block_out (NULL allowed) then says where, as it does for any other failure of one block. What
 * only a kernel can see - a scale that no encoder writes, a state of an entropy stream that does not
 * come out even - is for krul_cuda_decode's damage flag. On failure the chunk may be scribbled on
 * beyond used_bytes; nothing else is touched. */
krul_status krul_device_decode_prepare(uint8_t *chunk, size_t chunk_bytes, size_t used_bytes,
                                       const krul_device_block *blocks, int32_t n_blocks,
                                       krul_device_batch *batches_out, int32_t *n_batches_out,
                                       size_t *used_bytes_out, int32_t *bad_block_out,
                                       krul_error *err) KRUL_MUST_CHECK;

/* ---- on the device, in cuda/compressor.cu ------------------------------------------------------ */

/* Enqueue the decoding of one batch; chunk is its copy on the device. A kernel that meets damage sets
 * *damage_flag (on the device; the caller clears it) to 1, reads and writes nothing out of bounds, and
 * leaves what it likes in the outputs. Nothing is allocated. */
krul_status krul_cuda_decode(void *stream, const krul_device_batch *batch, const uint8_t *chunk,
                             uint32_t *damage_flag, krul_error *err) KRUL_MUST_CHECK;

#ifdef __cplusplus
}
#endif

#endif /* KRUL_DEVICE_DECODE_H */

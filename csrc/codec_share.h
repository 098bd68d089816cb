/* codec_share.h - payloads as codec_share.c lays them out, for who decodes them on a device. */
#ifndef KRUL_CODEC_SHARE_H
#define KRUL_CODEC_SHARE_H

#include "codec_int.h"

/* Where the parts stand. */
typedef struct krul_share_layout {
    int bits; /* of a direction's codes; 0 where directions are in the block's dtype */
    size_t element_bytes;
    size_t magnitude_bytes;
    size_t n_planes;
    size_t n_tokens;
    size_t head_dim;
    size_t n_kept;
    size_t n_merged;
    size_t kept_offset[2];
    size_t magnitudes_offset[2];
    size_t directions_offset;
    krul_int_layout codes; /* of one plane, when bits is not 0 */
    size_t direction_plane_bytes;
    size_t n_bytes;
} krul_share_layout;

/* The parts of a block of two layers of that shape; bits is 0 for codec `share`. */
krul_status krul_share_measure(krul_dtype dtype, const int64_t shape[KRUL_VIEW_DIMS], int bits,
                               krul_share_layout *out, krul_error *err) KRUL_MUST_CHECK;

/* Do the positions of the kept tokens ascend, and lie inside? `name` is the codec's. */
krul_status krul_share_check_positions(const krul_share_layout *layout, const char *name,
                                       const uint8_t *positions, krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_CODEC_SHARE_H */

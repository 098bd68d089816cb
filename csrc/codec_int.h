/* codec_int.h - integer codes as codec_int.c lays them out, for the codecs that hold them too. */
#ifndef KRUL_CODEC_INT_H
#define KRUL_CODEC_INT_H

#include "krul.h"

/* bf16 bits of 2^120: scales stay below, so that code * scale is exact and finite in f32. */
enum { KRUL_INT_SCALE_END = 0x7b80 };

/* Where the parts of one plane (n_tokens x head_dim) stand; scales come first. */
typedef struct krul_int_layout {
    size_t n_groups;
    size_t minima_offset;
    size_t codes_offset;
    size_t plane_bytes;
} krul_int_layout;

krul_status krul_int_measure(krul_kv kv, int bits, int64_t n_tokens, int64_t head_dim,
                             krul_int_layout *out, krul_error *err) KRUL_MUST_CHECK;

/* Are all scales and minima of a plane such that an encoder may have written them? */
bool krul_int_is_sound(const uint8_t *plane, const krul_int_layout *layout);

/* First element of one batch item and head. */
static inline void *
krul_view_plane(const krul_view *view, int64_t batch, int64_t head)
{
    int64_t offset = batch * view->stride[0] + head * view->stride[1];
    return (uint8_t *)view->data + offset * (int64_t)krul_dtype_bytes(view->dtype);
}

#endif /* KRUL_CODEC_INT_H */

/* compressor.h - what a codec is to the table in compressor.c; internal. */
#ifndef KRUL_COMPRESSOR_H
#define KRUL_COMPRESSOR_H

#include "krul.h"

/* A block as a codec sees it: checked views of one shape and dtype, n_batch x n_heads x n_tokens x
 * head_dim, rows along head_dim contiguous. */
typedef struct krul_codec_block {
    const krul_backend *backend;
    krul_kv kv;
    int n_views;
    const krul_view *views; /* when decoding, data NULL means: not wanted */
} krul_codec_block;

/* One codec. Each file codec_*.c defines one or more of these; compressor.c lists them. */
typedef struct krul_codec_ops {
    krul_codec codec;
    const char *name;
    int n_layers;

    /* Most payload bytes for a block of this shape. */
    krul_status (*bound)(const krul_codec_block *block, size_t *n_bytes_out, krul_error *err);

    /* Encode. *fits_out false (and nothing else promised) asks the caller to code the block `exact`:
     * a value is not finite or the range cannot be held. error_out is never NULL and receives
     * sum |x - decoded|^2 and sum |x|^2. */
    krul_status (*encode)(const krul_codec_block *block, uint8_t *payload_out,
                          size_t capacity_bytes, size_t *n_bytes_out, bool *fits_out,
                          double error_out[2], krul_error *err);

    /* Decode, trusting nothing in the payload. */
    krul_status (*decode)(const krul_codec_block *block, const uint8_t *payload,
                          size_t payload_bytes, krul_error *err);
} krul_codec_ops;

/* Can the codec be asked to code these views, on this type of device? */
krul_status krul_compressor_check(krul_codec codec, krul_kv kv, const krul_view *views, int n_views,
                                  krul_device_type device_type, krul_error *err) KRUL_MUST_CHECK;

extern const krul_codec_ops krul_codec_exact;
extern const krul_codec_ops krul_codec_int8;
extern const krul_codec_ops krul_codec_int4;
extern const krul_codec_ops krul_codec_share;
extern const krul_codec_ops krul_codec_share_int8;
extern const krul_codec_ops krul_codec_share_int4;
extern const krul_codec_ops krul_codec_predict; /* a name without functions */

/* A view's decoded bytes from which decoding writes past the caches, into memory, without reading
 * first what is there. A view is one block of many: a few blocks later its values would be in no
 * cache either, and memory is what decoding waits for. Whoever decodes so little and reads it at
 * once finds it in the cache. */
enum { KRUL_STREAM_FROM_BYTES = 64 * 1024 };

static inline bool
krul_is_streamed(const krul_view *view)
{
    size_t bytes = (size_t)krul_view_n_elements(view) * krul_dtype_bytes(view->dtype);
    return bytes >= KRUL_STREAM_FROM_BYTES;
}

#endif /* KRUL_COMPRESSOR_H */

/* device_encode.h - blocks that a device codes: int8, int4, share, share+int; internal, no CUDA.
 *
 * The payload of these codecs has a size that follows from the shape, so that all places are known
 * before a kernel runs. krul_device_encode_prepare writes what the kernels must know into host memory;
 * after a copy, krul_cuda_encode codes a batch. What does not fit the codec is coded on the CPU. */
#ifndef KRUL_DEVICE_ENCODE_H
#define KRUL_DEVICE_ENCODE_H

#include "device_decode.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    /* Share ranks the tokens of a block by comparing each with each, and its rows of directions are
     * held in shared memory. */
    KRUL_DEVICE_SHARE_MAX_TOKENS = 4096,
    KRUL_DEVICE_SHARE_MAX_HEAD_DIM = 512,
    KRUL_DEVICE_SHARE_ROWS = 16, /* of a thread block: eight lanes each */
};

/* One block to be coded, and where its payload goes. */
typedef struct krul_device_source {
    krul_codec codec;
    krul_kv kv;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS]; /* on the device; the second for share codecs only */
    uint64_t payload_offset; /* a multiple of KRUL_DEVICE_ALIGNMENT */
} krul_device_source;

/* What came of one block, on the device. The caller clears it before the first launch. */
typedef struct krul_device_result {
    uint32_t does_not_fit; /* 1: the payload is worth nothing, to be coded `exact` */
    uint32_t reserved;
    double error[2]; /* as krul_compressor_encode has it, added up in another order */
} krul_device_result;

/* What one call of krul_cuda_encode codes. */
typedef struct krul_device_encode_batch {
    krul_codec codec;
    krul_dtype dtype;
    int32_t n_blocks;
    int32_t n_units;
    int32_t head_dim; /* the largest */
    int32_t reserved;
    uint64_t descriptors_offset; /* n_blocks krul_device_descriptor: outputs are what is read */
    uint64_t units_offset; /* n_units x u32 */
    uint64_t workspace_offset; /* n_units x 2 doubles: the errors of each thread block */
} krul_device_encode_batch;

/* Can a device code this? */
bool krul_device_encode_is_supported(krul_codec codec, krul_dtype dtype,
                                     const int64_t shape[KRUL_VIEW_DIMS]);

/* Most bytes that krul_device_encode_prepare writes; the sources must be supported. */
size_t krul_device_encode_bound(const krul_device_source *sources, int32_t n_sources);

/* Check the sources and write descriptors into plan_bytes of host memory (16-byte aligned), of which
 * the first *used_bytes_out are to be copied to the device. payload_bytes_out receives n_sources
 * numbers. workspace_bytes_out is what krul_cuda_encode needs on the device, for all batches.
 * batches_out holds KRUL_DEVICE_MAX_BATCHES. */
krul_status krul_device_encode_prepare(uint8_t *plan, size_t plan_bytes,
                                       const krul_device_source *sources, int32_t n_sources,
                                       krul_device_encode_batch *batches_out,
                                       int32_t *n_batches_out, uint64_t *payload_bytes_out,
                                       size_t *used_bytes_out, size_t *workspace_bytes_out,
                                       krul_error *err) KRUL_MUST_CHECK;

/* ---- on the device, in cuda/compressor_encode.cu ------------------------------------------------ */

/* Enqueue the coding of one batch: plan is the copy of what prepare wrote, payloads where
 * payload_offset counts from, results n_sources of them. int8 and int4 give the CPU's bytes; share
 * does but for what atan2f and sin of the device's library round otherwise, which decodes as well. */
krul_status krul_cuda_encode(void *stream, const krul_device_encode_batch *batch,
                             const uint8_t *plan, uint8_t *payloads, uint8_t *workspace,
                             krul_device_result *results, krul_error *err) KRUL_MUST_CHECK;

#ifdef __cplusplus
}
#endif

#endif /* KRUL_DEVICE_ENCODE_H */

/* device.h - what a GPU offers: a table of functions that its module fills in.
 *
 * A device does later what it is told now: copies and decodings are enqueued on streams, each of
 * which is done in order, and events tell how far a stream is. Functions may be called from several
 * threads at once. KRUL_STATUS_DEVICE is the device's own failure, KRUL_STATUS_NO_MEMORY that there
 * is no room, which leaves the device as it was. No CUDA type appears here: streams and events are
 * pointers. */
#ifndef KRUL_DEVICE_H
#define KRUL_DEVICE_H

#include "device_decode.h"
#include "device_encode.h"
#include "device_estimator.h"
#include "device_predict.h"
#include "krul.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KRUL_DEVICE_ABI = 2 };

/* A device that was opened; what it holds is the table's affair. */
typedef struct krul_device krul_device;

typedef struct krul_device_ops {
    uint32_t abi;
    krul_device_type device_type;
    const char *name;

    /* Open one for any number of threads; after close nothing of it may be used. */
    krul_status (*open)(int32_t device_id, krul_device **out, krul_error *err);
    void (*close)(krul_device *device);

    /* Memory of the host that the device reaches by itself, and memory of the device, which nobody
     * else reaches. What is freed must not be in use by anything enqueued. */
    krul_status (*pinned_new)(krul_device *device, size_t n_bytes, void **out, krul_error *err);
    void (*pinned_free)(krul_device *device, void *memory);
    krul_status (*memory_new)(krul_device *device, size_t n_bytes, void **out, krul_error *err);
    void (*memory_free)(krul_device *device, void *memory);

    /* A stream of its own, which waits for no other. Functions below take those of others, too. */
    krul_status (*stream_new)(krul_device *device, void **out, krul_error *err);
    void (*stream_free)(krul_device *device, void *stream);
    krul_status (*stream_synchronize)(krul_device *device, void *stream, krul_error *err);

    /* An event stands for the place in a stream where it was recorded last, and for nothing before
     * it was. What is enqueued on a stream after stream_wait_event comes after the place for which
     * the event stands at that moment; recording it again later, or freeing it, changes nothing.
     * event_synchronize sleeps until that place is reached. */
    krul_status (*event_new)(krul_device *device, void **out, krul_error *err);
    void (*event_free)(krul_device *device, void *event);
    krul_status (*event_record)(krul_device *device, void *event, void *stream, krul_error *err);
    krul_status (*event_synchronize)(krul_device *device, void *event, krul_error *err);
    krul_status (*stream_wait_event)(krul_device *device, void *stream, void *event,
                                     krul_error *err);

    /* From memory of the host to the device, and back to pinned memory. What is not pinned is copied
     * more slowly, and must stay as it is until the copy is done. */
    krul_status (*copy_in)(krul_device *device, void *stream, void *to, const void *from,
                           size_t n_bytes, krul_error *err);
    krul_status (*copy_out)(krul_device *device, void *stream, void *to, const void *from,
                            size_t n_bytes, krul_error *err);

    /* What is done on the host, without the device. NULL: as device_decode.h says. */
    bool (*decode_is_supported)(const krul_store_entry *entry);
    size_t (*decode_bound)(const krul_device_block *blocks, int32_t n_blocks);
    krul_status (*decode_prepare)(uint8_t *chunk, size_t chunk_bytes, size_t used_bytes,
                                  const krul_device_block *blocks, int32_t n_blocks,
                                  krul_device_batch *batches_out, int32_t *n_batches_out,
                                  size_t *used_bytes_out, int32_t *bad_block_out, krul_error *err);

    /* Enqueue the decoding of one batch; chunk and damage_flag are memory of the device. What prepare
     * could not see sets *damage_flag. */
    krul_status (*decode)(krul_device *device, void *stream, const krul_device_batch *batch,
                          const uint8_t *chunk, uint32_t *damage_flag, krul_error *err);

    /* What products on a stream take, all of it; freed before the stream, for one thread at a time.
     * NULL, or KRUL_STATUS_UNSUPPORTED where a library is missing: the CPU decodes codec predict. */
    krul_status (*products_new)(krul_device *device, void *stream, void **out, krul_error *err);
    void (*products_free)(krul_device *device, void *products);

    /* What is done on the host, without the device. NULL: as device_predict.h says. */
    size_t (*predict_bound)(const krul_device_block *blocks, int32_t n_blocks);
    krul_status (*predict_prepare)(krul_device_chains *chains, uint8_t *chunk, size_t chunk_bytes,
                                   size_t used_bytes, const krul_device_block *blocks,
                                   int32_t n_blocks, krul_device_predict_batch *batches_out,
                                   int32_t *n_batches_out, size_t *used_bytes_out,
                                   int32_t *bad_block_out, krul_error *err);

    /* Enqueue the two steps of a batch, as device_predict.h has them; chunk, memory, scratch and
     * damage_flag are memory of the device. */
    krul_status (*predict_numbers)(krul_device *device, void *stream,
                                   const krul_device_chains *chains,
                                   const krul_device_predict_batch *batch, const uint8_t *chunk,
                                   uint8_t *scratch, uint32_t *damage_flag, krul_error *err);
    krul_status (*predict_rows)(krul_device *device, void *products,
                                const krul_device_chains *chains,
                                const krul_device_predict_batch *batch, const uint8_t *chunk,
                                uint8_t *memory, uint8_t *scratch, krul_error *err);

    /* Enqueue the coding of one batch, see krul_cuda_encode in device_encode.h: all but the batch is
     * memory of the device. */
    krul_status (*encode)(krul_device *device, void *stream, const krul_device_encode_batch *batch,
                          const uint8_t *plan, uint8_t *payloads, uint8_t *workspace,
                          krul_device_result *results, krul_error *err);

    /* Enqueue an observation, see krul_cuda_estimator_observe in device_estimator.h: the image is
     * pinned, the workspace and all sums but n_rows are memory of the device. */
    krul_status (*observe)(krul_device *device, void *stream,
                           const krul_device_observation *observation, const uint8_t *image,
                           uint8_t *workspace, krul_estimator_sums *sums, krul_error *err);
} krul_device_ops;

#ifdef __cplusplus
}
#endif

#endif /* KRUL_DEVICE_H */

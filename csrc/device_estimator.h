/* device_estimator.h - observing attention on a device: what the host makes ready; internal, no CUDA.
 *
 * Arguments are those of krul_estimator_observe, checked in the same way; queries and keys are on the
 * device, and so are the sums but n_rows. Everything else is on the host and small: it becomes one
 * *image*, copied to the beginning of the workspace. */
#ifndef KRUL_DEVICE_ESTIMATOR_H
#define KRUL_DEVICE_ESTIMATOR_H

#include "krul.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KRUL_DEVICE_LANES = 16, /* queries of a tile: rows, and heads that share a KV head */
    KRUL_DEVICE_KEYS_AT_ONCE = 8, /* of a matrix instruction; a tile has 1, 2 or 4 times that */
    KRUL_DEVICE_MAX_KEY_GROUPS = 4,
    KRUL_DEVICE_LAYERS_AT_ONCE = 4, /* distances of 4 x 4 layers are computed together */
    KRUL_DEVICE_MAX_GROUPS = 8, /* different numbers of heads in a model */
    /* Shared memory that every GPU from sm_80 on gives a thread block, less what is reserved. */
    KRUL_DEVICE_SHARED_BYTES = 96 << 10,
    /* Thread blocks that a long text is cut into at least where it can be; a constant, because the
     * order of additions follows from it. */
    KRUL_DEVICE_OBSERVE_BLOCKS = 512,
};

/* One observed layer as kernels see it. Places are bytes from the start of the image. */
typedef struct krul_device_observed {
    const void *queries;
    const void *keys;
    int64_t query_stride[3]; /* in elements */
    int64_t key_stride[3];
    uint64_t starts_at; /* n_batch x n_rows i32; 0: none */
    uint64_t sinks_at; /* n_heads f32; 0: none */
    int32_t query_dtype;
    int32_t key_dtype;
    int32_t head_dim;
    int32_t heads_per_kv;
    int32_t key_start;
    int32_t n_keys;
    int32_t layer;
    int32_t is_wide; /* may 16 bytes be read at once? */
    float scaling;
    float softcap;
} krul_device_observed;

/* Layers with one number of heads. Places are bytes from the start of the workspace. */
typedef struct krul_device_observe_group {
    int32_t n_members;
    int32_t n_heads;
    int32_t heads_at_once;
    int32_t n_blocks; /* tiles of lanes for one run of heads that share a KV head */
    int32_t n_lane_tiles; /* of a batch row */
    int32_t n_key_groups; /* of KRUL_DEVICE_KEYS_AT_ONCE, in a tile */
    int32_t n_key_tiles;
    int32_t n_key_blocks; /* thread blocks that share the key tiles */
    int32_t n_splits; /* and the tiles of lanes */
    int32_t n_layer_blocks; /* of 4 x 4 pairs of layers */
    size_t shared_bytes;
    uint64_t members_at; /* n_members x krul_device_observed, in the image */
    uint64_t rows_at; /* maximum and 1 / sum of every row */
    uint64_t distances_at; /* f64, of every thread block */
    uint64_t importance_at; /* f64, of every thread block */
    uint64_t received_at; /* f32, of every batch row and split */
} krul_device_observe_group;

typedef struct krul_device_observation {
    int32_t n_layers;
    int32_t n_batch;
    int32_t n_rows;
    int32_t n_keys_total;
    int32_t n_seen; /* keys that any row may see */
    int32_t n_groups;
    int64_t received_stride;
    double weight;
    double n_real_rows;
    uint64_t positions_at; /* n_batch x n_rows i32, -1 for padding, in the image */
    uint64_t real_at; /* n_batch x n_keys_total u8; 0: all are */
    uint64_t first_real_at; /* n_batch i32 */
    uint64_t classes_at; /* n_layers i32: the group of each layer, -1: not observed */
    size_t image_bytes;
    size_t workspace_bytes; /* the image included */
    krul_device_observe_group groups[KRUL_DEVICE_MAX_GROUPS];
} krul_device_observation;

/* Check the arguments and find sizes. KRUL_STATUS_UNSUPPORTED: too many layers of one kind for the
 * shared memory (about a hundred), or too many kinds. */
krul_status krul_device_observe_plan(const krul_estimator_layer *layers, int32_t n_layers,
                                     const int64_t *row_positions, int64_t n_rows,
                                     const uint8_t *key_is_real, int64_t n_keys_total,
                                     double weight, const krul_estimator_sums *sums,
                                     krul_device_observation *out, krul_error *err) KRUL_MUST_CHECK;

/* Write the image of an observation that was planned with the same arguments. */
void krul_device_observe_fill(const krul_device_observation *observation,
                              const krul_estimator_layer *layers, const int64_t *row_positions,
                              const uint8_t *key_is_real, uint8_t *image);

/* ---- on a GPU, cuda/estimator.cu --------------------------------------------------------------- */

/* Enqueue what krul_estimator_observe does. `image` was filled, is of pinned memory and stays as it
 * is until the stream has passed; the workspace is the device's, aligned to 256 bytes. Arrays of sums
 * are the device's, but n_rows, which is added to at once. Two runs give the same bits. */
krul_status krul_cuda_estimator_observe(const krul_device_observation *observation,
                                        const uint8_t *image, uint8_t *workspace,
                                        krul_estimator_sums *sums, void *stream,
                                        krul_error *err) KRUL_MUST_CHECK;

#ifdef __cplusplus
}
#endif

#endif /* KRUL_DEVICE_ESTIMATOR_H */

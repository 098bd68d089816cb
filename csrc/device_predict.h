/* device_predict.h - codec predict on a device: what the host makes ready for it; internal, no CUDA.
 *
 * A *profile* is what was learned of a model, laid out for one copy per array. *Chains* are the runs
 * of tokens of one conversation that are decoded side by side: their rows stand one below the other,
 * so that one matrix product serves all runs of a layer. What was decoded of a layer stays in one of
 * a few slots until the last layer that is predicted from it is done. *Preparing* blocks parses what
 * is small and irregular (header, classes, shifts, escapes), trusting nothing, and leaves the rest to
 * kernels, which meet nothing but states and words that may be anything. */
#ifndef KRUL_DEVICE_PREDICT_H
#define KRUL_DEVICE_PREDICT_H

#include "device_decode.h"
#include "krul.h"

#ifdef __cplusplus
extern "C" {
#endif

struct krul_cublas; /* cublas.h */

enum {
    /* Rows of a run are filled up to a multiple, so that a warp's stores stay within whole lines. */
    KRUL_DEVICE_ROWS_AT_ONCE = 32,
    /* Arrays begin at multiples, in bytes, as device memory itself does. */
    KRUL_DEVICE_MEMORY_ALIGNMENT = 256,
};

/* One layer as the device has it. Places are bytes from the start of the profile's memory. */
typedef struct krul_device_profile_layer {
    int32_t n_heads; /* 0: takes no part */
    int32_t head_dim;
    int32_t width;
    int32_t n_sources;
    int32_t sources[KRUL_PREDICT_MAX_SOURCES];
    int32_t rank;
    int32_t slot; /* of the chains' memory */
    bool is_source; /* of a later layer */
    const int16_t *levels; /* on the host: of the deviations */
    uint64_t mean_at;
    uint64_t backward_at;
    uint64_t maps_at; /* or left */
    uint64_t right_at;
} krul_device_profile_layer;

/* Immutable once made; one for each profile and device. */
typedef struct krul_device_profile {
    int32_t n_layers;
    int32_t n_tables;
    int32_t unit_table;
    int32_t n_slots;
    int32_t row_floats; /* of a decoded row of any layer: the largest width, in whole vectors */
    int32_t max_rank;
    uint64_t slots_at; /* n_tables x KRUL_ENTROPY_N_SLOTS u32, those of krul_entropy_slot */
    uint64_t frequencies_at; /* n_tables x 256 u16 */
    uint64_t n_bytes; /* of the profile's memory */
    krul_entropy_tables *tables; /* on the host */
    krul_device_profile_layer *layers;
    int16_t *levels;
    uint8_t *memory; /* on the device; whoever made it frees it */
} krul_device_profile;

/* Lay a profile out; its arrays are not touched. Positions in options are not looked at. */
krul_status krul_device_profile_new(const krul_predict_options *options, krul_device_profile **out,
                                    krul_error *err) KRUL_MUST_CHECK;

/* NULL is allowed. */
void krul_device_profile_free(krul_device_profile *profile);

/* One array to be copied to a place in device memory. */
typedef struct krul_device_copy {
    const void *from;
    uint64_t to;
    size_t n_bytes;
} krul_device_copy;

/* The index-th array of the options that the profile was made of; false when there are no more. */
bool krul_device_profile_copy(const krul_device_profile *profile,
                              const krul_predict_options *options, int32_t index,
                              krul_device_copy *out);

/* A run of tokens that was coded as one chain. */
typedef struct krul_device_run {
    int64_t token_start;
    int64_t n_tokens;
} krul_device_run;

/* Chains under way; for one thread at a time. */
typedef struct krul_device_chains krul_device_chains;

/* Runs ascend and do not overlap. Options say how keys are rotated, and are those of the profile;
 * they are borrowed until the rotation was copied. */
krul_status krul_device_chains_new(const krul_device_profile *profile,
                                   const krul_predict_options *options, const krul_device_run *runs,
                                   int32_t n_runs, krul_device_chains **out,
                                   krul_error *err) KRUL_MUST_CHECK;

/* NULL is allowed. */
void krul_device_chains_free(krul_device_chains *chains);

/* Device memory that the chains live in: cosines and sines, then n_slots x all rows. */
size_t krul_device_chains_bytes(const krul_device_chains *chains);

/* The index-th array of cosines or sines; false when there are no more. */
bool krul_device_chains_copy(const krul_device_chains *chains, int32_t index,
                             krul_device_copy *out);

/* What the kernels know of one block; places are bytes from the start of the chunk. */
typedef struct krul_device_predict_unit {
    uint64_t states_at; /* KRUL_ENTROPY_STATES_BYTES, then the words; of any alignment */
    uint64_t escapes_at;
    uint64_t classes_at; /* n_used u8 */
    uint64_t fineness_at; /* n_rows i8 */
    uint64_t shifts_at; /* n_rows i8 */
    uint32_t words_bytes;
    uint32_t n_escapes;
    uint32_t has_fineness; /* is one of them not 0? */
    uint32_t has_shifts; /* likewise */
    int32_t n_rows; /* n_batch x n_tokens */
    int32_t n_tokens;
    float factor; /* numbers are multiplied by it, and by what fineness makes of a row */
    int64_t row; /* of the batch */
    int64_t token; /* of the cosines */
    void *data[2]; /* K and V, NULL: not wanted */
    int64_t n_stored[2]; /* tokens */
    int64_t stride[2][3]; /* in elements: batch, head, token */
} krul_device_predict_unit;

/* Blocks of one layer whose rows follow one another: what one launch and one product decode. */
typedef struct krul_device_predict_batch {
    int32_t layer;
    int32_t n_blocks;
    int32_t n_used; /* components, at least 1: those behind are zeros in all blocks */
    int32_t n_pairs; /* 0: keys are not rotated */
    krul_rotary_convention convention;
    int32_t rotary_start;
    float step; /* of all blocks, or 1 where they differ and the numbers are multiplied instead */
    int64_t first_row; /* of the chains */
    int64_t n_rows; /* those that fill up included */
    int64_t max_rows; /* of a block */
    int64_t angles_per_batch; /* pairs from one batch row's cosines to the next one's, or 0 */
    uint64_t cos_at; /* in the chains' memory */
    uint64_t sin_at;
    uint64_t units_at; /* in the chunk */
    krul_dtype dtype[2]; /* of K and V; 0: none is wanted */
    int32_t vector[2]; /* elements that are stored at once */
} krul_device_predict_batch;

/* Most bytes that preparing these blocks writes behind them. */
size_t krul_device_predict_bound(const krul_device_block *blocks, int32_t n_blocks);

/* Check the payloads and write units, classes, fineness and shifts into the chunk, from used_bytes on. Blocks
 * stand layer by layer, within one by token; every source must have been prepared before, in this
 * call or an earlier one, and the work of all calls must be enqueued in their order. Fails as a
 * whole: then nothing counts as prepared. Views may hold a block's first tokens only. batches_out
 * holds n_blocks. A damaged payload is KRUL_STATUS_CORRUPT; bad_block_out (NULL allowed) then says
 * where, as it does for any other failure of one block. */
krul_status krul_device_predict_prepare(krul_device_chains *chains, uint8_t *chunk,
                                        size_t chunk_bytes, size_t used_bytes,
                                        const krul_device_block *blocks, int32_t n_blocks,
                                        krul_device_predict_batch *batches_out,
                                        int32_t *n_batches_out, size_t *used_bytes_out,
                                        int32_t *bad_block_out, krul_error *err) KRUL_MUST_CHECK;

/* Bytes of scratch that decoding a batch takes: its numbers, and the product of low rank. Nothing
 * of it is needed once the batch is decoded. */
size_t krul_device_predict_scratch(const krul_device_chains *chains,
                                   const krul_device_predict_batch *batch);

const krul_device_profile *krul_device_chains_profile(const krul_device_chains *chains);

/* Are the rows that products take rounded to bfloat16? */
bool krul_device_chains_are_rounded(const krul_device_chains *chains);

/* Where in the chains' memory a slot's rows begin. */
uint64_t krul_device_chains_slot(const krul_device_chains *chains, int32_t slot);

/* ---- on a GPU, cuda/predict.cu ----------------------------------------------------------------- */
/* Memory is the device's, aligned to KRUL_DEVICE_MEMORY_ALIGNMENT; the profile's and the chains' arrays
 * have been copied there. Streams are cudaStream_t. Nothing waits and nothing is allocated. */

/* Decode the numbers of a batch to scratch, of krul_device_predict_scratch. No other layer is needed,
 * so that this may run ahead, on a stream of its own: a batch is few warps and long. A stream that
 * does not come out even sets *damage_flag. */
krul_status krul_cuda_predict_numbers(const krul_device_chains *chains,
                                      const krul_device_predict_batch *batch, void *stream,
                                      const uint8_t *chunk, uint8_t *scratch, uint32_t *damage_flag,
                                      krul_error *err) KRUL_MUST_CHECK;

/* From numbers and sources to K and V, on the stream of cublas, after the batches of lower layers. */
krul_status krul_cuda_predict_rows(const krul_device_chains *chains,
                                   const krul_device_predict_batch *batch,
                                   struct krul_cublas *cublas, const uint8_t *chunk,
                                   uint8_t *memory, uint8_t *scratch,
                                   krul_error *err) KRUL_MUST_CHECK;

#ifdef __cplusplus
}
#endif

#endif /* KRUL_DEVICE_PREDICT_H */

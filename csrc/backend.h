/* backend.h - the table of operations that every instruction set, and later CUDA, fills in.
 *
 * Arguments are already checked when an operation is called; every entry is set in every table.
 * All tables give the same bits: operations fix the order of their additions (eight explicit lanes
 * where a sum is long) and the whole library is compiled without contraction to FMA. The estimator's
 * operations are the exception, and say so. */
#ifndef KRUL_BACKEND_H
#define KRUL_BACKEND_H

#include "entropy.h"
#include "krul.h"

enum { KRUL_BACKEND_ABI = 1 };

enum { KRUL_ESTIMATOR_LANES = 16, KRUL_ESTIMATOR_SCRATCH_KEYS = 8 };

/* How many values share one scale and one minimum, and are packed together: tokens of a channel for
 * K, channels of a token for V; the last group may be smaller. For K, scales and minima stand as
 * [group of tokens][channel], for V as [token][group of channels]. Codes are rows, one per token:
 * a byte per channel (8 bits), or for every KRUL_GROUP channels half as many bytes, rounded up, byte
 * i holding channel i in its low and channel i + n_bytes in its high nibble (4 bits). */
enum { KRUL_GROUP = 64 };

/* One batch item and head of a block: n_tokens rows of head_dim elements, token_stride elements
 * apart. Magnitudes are bf16 for a bf16 plane, else f32. */
typedef struct krul_plane {
    krul_dtype dtype;
    krul_kv kv;
    int bits; /* of a code, 8 or 4 */
    bool is_streamed; /* write past the caches where that can be done: the block is large */
    int64_t n_tokens;
    int64_t head_dim;
    int64_t token_stride;
} krul_plane;

/* Plain bytes in and out: no strides here, the codecs above hand over one contiguous row, or n rows
 * a fixed stride apart. */
struct krul_backend {
    uint32_t abi;
    const char *name;
    krul_device_type device_type;
    bool (*is_usable)(void);

    /* entropy.inc -------------------------------------------------------------------------- */

    /* Encode one chunk so that it ends at `end`; returns where it begins. There must be room for
     * the states and 2 bytes per symbol. See entropy.h. */
    uint8_t *(*entropy_encode_chunk)(const krul_entropy_encoder_symbol encoder[256],
                                     const uint8_t *symbols, size_t n_symbols, uint8_t *end);

    /* Decode chunks of interleaved rANS that share a table; slots are those of
     * krul_entropy_slot. Trusts nothing in the chunks: false on a damaged one, and then the
     * symbols may be partly written. */
    bool (*entropy_decode_chunks)(const uint32_t *slots, const krul_entropy_chunk *chunks,
                                  size_t n_chunks);

    /* Decode the values of a column stream, that of an escape as 128, and say whether there is one.
     * Trusts nothing in its bytes: false on a damaged one, and then the values may be partly
     * written. */
    bool (*entropy_decode_columns)(const krul_entropy_columns *columns, bool *has_escape_out);

    /* Split n elements of a dtype into the plane that is entropy-coded (one byte each) and the
     * plane that is kept (krul_dtype_bytes - 1 bytes each), and join them again, after adding a
     * byte to every coded one; streamed past the caches where that is asked for and the elements
     * lie so that it can be, see end_stream. */
    void (*exact_split)(krul_dtype dtype, const void *elements, int64_t n_elements,
                        uint8_t *coded_out, uint8_t *kept_out);
    void (*exact_join)(krul_dtype dtype, const uint8_t *coded, const uint8_t *offsets,
                       const uint8_t *kept, int64_t n_elements, bool is_streamed,
                       void *elements_out);

    /* compressor.inc ----------------------------------------------------------------------- */

    /* Widen and narrow (round to nearest even) a row. */
    void (*widen)(krul_dtype dtype, const void *elements, int64_t n_elements, float *out);
    void (*narrow)(krul_dtype dtype, const float *values, int64_t n_elements, void *out);

    /* Add sum |value - decoded|^2 and sum |value|^2 to sums[0] and sums[1], in eight lanes. */
    void (*add_squares)(const float *values, const float *decoded, int64_t n_elements,
                        double sums[2]);

    /* Quantise a plane; see KRUL_GROUP for the order of scales and minima (bf16) and of the codes.
     * False when a value is not finite or a group cannot be held; outputs are then undefined.
     * Adds to error_out as add_squares does. */
    bool (*int_encode)(const krul_plane *plane, const void *elements, uint8_t *scales_out,
                       uint8_t *minima_out, uint8_t *codes_out, double error_out[2]);

    /* minimum + code * scale, times the token's magnitude where magnitudes is not NULL. */
    void (*int_decode)(const krul_plane *plane, const uint8_t *scales, const uint8_t *minima,
                       const uint8_t *codes, const uint8_t *magnitudes, void *elements_out);

    /* Every row of directions (packed rows of the plane's dtype) times the token's magnitude. */
    void (*share_decode)(const krul_plane *plane, const uint8_t *directions,
                         const uint8_t *magnitudes, void *elements_out);

    /* Make what was written past the caches visible to other threads, once per block. */
    void (*end_stream)(void);

    /* |lower|^2 and |upper|^2 of one row each. */
    void (*share_norms)(const float *lower, const float *upper, int64_t head_dim,
                        double squares_out[2]);

    /* Scale both rows by their factors, to u and v; |u - v|^2 and |u + v|^2. */
    void (*share_compare)(const float *lower, const float *upper, int64_t head_dim,
                          const double factors[2], float *lower_out, float *upper_out,
                          double squares_out[2]);

    /* weights[0] * lower + weights[1] * upper. */
    void (*share_merge)(const float *lower, const float *upper, int64_t head_dim,
                        const float weights[2], float *out);

    /* estimator.inc ------------------------------------------------------------------------ */

    /* Scores and rows lie as n_keys x KRUL_ESTIMATOR_LANES, a lane being one query; lane_ arrays
     * hold KRUL_ESTIMATOR_LANES numbers. Dot products of keys (rows key_stride elements apart) with
     * queries (head_dim x lanes); widened is scratch for KRUL_ESTIMATOR_SCRATCH_KEYS keys. */
    void (*estimator_scores)(krul_dtype dtype, const void *keys, int64_t key_stride, int64_t n_keys,
                             int64_t head_dim, const float *queries, float *widened,
                             float *scores_out);
    /* Scale and cap scores of the keys at position and after, set those that a lane does not see
     * (outside [lane_first, lane_last], or key_is_real[k] is 0) to -inf, and raise lane_max. */
    void (*estimator_mask)(float *scores, int64_t n_keys, int32_t position,
                           const uint8_t *key_is_real, const int32_t *lane_first,
                           const int32_t *lane_last, float scaling, float softcap, float *lane_max);
    /* exp(score - lane_max), in place and added to lane_sum. */
    void (*estimator_exp)(float *scores, int64_t n_keys, const float *lane_max, float *lane_sum);
    /* Times lane_factor, in place; the sum over lanes is added to received[k]. */
    void (*estimator_scale)(float *scores, int64_t n_keys, const float *lane_factor,
                            float *received);
    /* Sum over lanes and keys at positions in [lane_first, lane_last]. */
    double (*estimator_mass)(const float *rows, int64_t n_keys, int32_t position,
                             const int32_t *lane_first, const int32_t *lane_last);
    /* distances[l * n_layers + u] += sum of squared differences, for l < u only. n_values is a
     * multiple of KRUL_ESTIMATOR_LANES. */
    void (*estimator_distances)(const float *rows, int64_t layer_stride, int32_t n_layers,
                                int64_t n_values, double *distances);
};

extern const krul_backend krul_backend_scalar;
#if defined(__x86_64__)
extern const krul_backend krul_backend_avx2;
extern const krul_backend krul_backend_avx512;
extern const krul_backend krul_backend_avx512_gather;
#elif defined(__aarch64__)
extern const krul_backend krul_backend_neon;
#endif

/* Has the processor AMX's tiles for bfloat16, which Intel's have as of Sapphire Rapids? Asked of the
 * processor, since older compilers have no name for it. */
bool krul_has_amx_bf16(void);

#endif /* KRUL_BACKEND_H */

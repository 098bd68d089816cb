/* SPDX-FileCopyrightText: the krul authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * krul.h - the C library of krul: everything it offers, and the only public header.
 *
 * Sections, in the order in which a conversation meets them: status, view, backend, pool, blas,
 * estimator, selector, entropy, compressor, predict, store, restore plan, restore. No Python, NumPy or CUDA
 * type appears here. The dimensions have the same names everywhere: n_layers, n_heads, n_kv_heads,
 * n_tokens, head_dim.
 *
 * Rules that hold for every function: a fallible function returns a krul_status and takes a
 * krul_error, which may be NULL, last. Outputs are untouched on failure unless said otherwise.
 * Nothing prints, exits, or reads the environment. Functions on distinct objects may run in
 * distinct threads at once.
 */
#ifndef KRUL_H
#define KRUL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KRUL_MUST_CHECK __attribute__((warn_unused_result))
#define KRUL_PRINTF(format_at, first_at) __attribute__((format(printf, format_at, first_at)))
#else
#define KRUL_MUST_CHECK
#define KRUL_PRINTF(format_at, first_at)
#endif

/* ---- status ---------------------------------------------------------------------------------- */

/* What went wrong. Values are pinned and append-only: they reach logs and other languages. */
typedef enum krul_status {
    KRUL_STATUS_OK = 0,
    KRUL_STATUS_NO_MEMORY = -1,
    KRUL_STATUS_BAD_SHAPE = -2,
    KRUL_STATUS_BAD_DTYPE = -3,
    KRUL_STATUS_BAD_VALUE = -4,
    KRUL_STATUS_BAD_FORMAT = -5, /* bytes that are not ours, or of a version not known here */
    KRUL_STATUS_CORRUPT = -6, /* bytes that were ours and are damaged */
    KRUL_STATUS_IO = -7, /* krul_error.code is errno */
    KRUL_STATUS_STORE_FULL = -8, /* no space, quota or file size limit; krul_error.code is errno */
    KRUL_STATUS_DEVICE = -9, /* krul_error.code is the device's own */
    KRUL_STATUS_UNSUPPORTED = -10,
    KRUL_STATUS_CANCELLED = -11,
} krul_status;

enum { KRUL_ERROR_MESSAGE_BYTES = 512 };

/* A failure in full. The message names the argument or file and gives both values. */
typedef struct krul_error {
    krul_status status;
    int code;
    char message[KRUL_ERROR_MESSAGE_BYTES];
} krul_error;

/* The name of a status, "BAD_SHAPE" for KRUL_STATUS_BAD_SHAPE; "UNKNOWN" for other numbers. */
const char *krul_status_name(krul_status status);

/* Fill err (NULL allowed) and return status, so that `return krul_fail(...)` is one line. */
krul_status krul_fail(krul_error *err, krul_status status, const char *format, ...)
    KRUL_PRINTF(3, 4);

/* The same for a failed system call: errno_value is kept in err->code and its words appended;
 * ENOSPC, EDQUOT and EFBIG become KRUL_STATUS_STORE_FULL, all else KRUL_STATUS_IO. */
krul_status krul_fail_errno(krul_error *err, int errno_value, const char *format, ...)
    KRUL_PRINTF(3, 4);

/* ---- view ------------------------------------------------------------------------------------ */

typedef enum krul_dtype {
    KRUL_DTYPE_F32 = 1,
    KRUL_DTYPE_F16 = 2,
    KRUL_DTYPE_BF16 = 3,
} krul_dtype;

typedef enum krul_device_type {
    KRUL_DEVICE_CPU = 1,
    KRUL_DEVICE_CUDA = 2,
} krul_device_type;

enum { KRUL_VIEW_DIMS = 4 };

/* Borrowed memory: n_batch x n_kv_heads x n_tokens x head_dim, strides in elements. Arrays of
 * fewer dimensions have leading ones. */
typedef struct krul_view {
    void *data;
    krul_dtype dtype;
    krul_device_type device_type;
    int32_t device_id;
    bool is_read_only;
    int64_t shape[KRUL_VIEW_DIMS];
    int64_t stride[KRUL_VIEW_DIMS];
} krul_view;

/* Bytes of one element, 0 for a number that is no dtype. */
size_t krul_dtype_bytes(krul_dtype dtype);

/* "float32", "float16", "bfloat16", or "unknown". */
const char *krul_dtype_name(krul_dtype dtype);

/* Is this a view that krul can work on: known dtype, CPU or CUDA, no negative extent, no stride
 * below zero, rows along head_dim contiguous, an element count and byte span that fit in 63 bits,
 * data aligned to its element and not NULL unless there are no elements. `name` is the argument's
 * name for the message. */
krul_status krul_view_check(const krul_view *view, const char *name,
                            krul_error *err) KRUL_MUST_CHECK;

/* The same, and fit to be written: not read-only, and no two indices reach one element. */
krul_status krul_view_check_output(const krul_view *view, const char *name,
                                   krul_error *err) KRUL_MUST_CHECK;

/* Number of elements; the view must have passed krul_view_check. */
int64_t krul_view_n_elements(const krul_view *view);

/* May the two share a byte? Judged by the spans from first to last element, so interleaved views
 * of one buffer count as overlapping. */
bool krul_view_overlaps(const krul_view *left, const krul_view *right);

/* Refuse an output that may share memory with an input. */
krul_status krul_view_check_disjoint(const krul_view *in, const char *in_name, const krul_view *out,
                                     const char *out_name, krul_error *err) KRUL_MUST_CHECK;

/* The tokens [token_start, token_start + n_tokens) of a view; the range must lie inside. */
krul_view krul_view_slice_tokens(const krul_view *view, int64_t token_start, int64_t n_tokens);

/* ---- backend --------------------------------------------------------------------------------- */

/* One table of operations per instruction set, best first; see backend.h for what is in it. */
typedef struct krul_backend krul_backend;

int krul_backend_count(void);

/* The index-th table, 0 <= index < krul_backend_count(). */
const krul_backend *krul_backend_at(int index);

const char *krul_backend_name(const krul_backend *backend);

/* Can this processor run it? */
bool krul_backend_is_usable(const krul_backend *backend);

/* The best usable table, or the one of that name; name NULL or "" means the best. A name that is
 * unknown or not usable here is an error, never another table. */
krul_status krul_backend_find(const char *name, const krul_backend **out,
                              krul_error *err) KRUL_MUST_CHECK;

/* ---- pool ------------------------------------------------------------------------------------ */

/* A fixed set of threads and a bounded queue of tasks. */
typedef struct krul_pool krul_pool;
typedef void (*krul_task)(void *argument);

enum { KRUL_POOL_MAX_THREADS = 256 };

/* Processors this process may run on, at least 1. */
int krul_pool_n_processors(void);

/* n_threads 0 means krul_pool_n_processors(); at most KRUL_POOL_MAX_THREADS. All signals are
 * blocked in the threads, so that Ctrl-C reaches the interpreter. */
krul_status krul_pool_new(int n_threads, size_t queue_capacity, krul_pool **out,
                          krul_error *err) KRUL_MUST_CHECK;

/* Queue a task; waits while the queue is full. */
void krul_pool_submit(krul_pool *pool, krul_task task, void *argument);

/* Wait until every task submitted so far has ended. */
void krul_pool_drain(krul_pool *pool);

/* Drain, end the threads, free. NULL is allowed. */
void krul_pool_free(krul_pool *pool);

/* Run task(arguments + i * argument_bytes) for i in [0, n_tasks) on n_threads (0: all
 * processors), the caller's thread among them, and return when all have ended. One thread starts
 * none. If threads cannot be started, the caller's does all the work. */
void krul_pool_for_each(int n_threads, krul_task task, void *arguments, size_t argument_bytes,
                        int64_t n_tasks);

/* ---- blas ------------------------------------------------------------------------------------ */
/* Matrix products by a library that is found at run time: nothing is linked, nothing written here
 * could match it. */

/* An open library whose products have been tried; immutable, for any number of threads. */
typedef struct krul_blas krul_blas;

/* Load a library (a path, or a name that the system's loader finds), or share the one that the
 * process has, find its float32 product under one of the known names, and compare a few small
 * products with plain loops. What cannot be loaded, has no such name or multiplies wrongly is
 * KRUL_STATUS_UNSUPPORTED with the reason. The library stays loaded for good. */
krul_status krul_blas_open(const char *path, krul_blas **out, krul_error *err) KRUL_MUST_CHECK;

/* No thread may be in a product. NULL is allowed. */
void krul_blas_close(krul_blas *blas);

/* The name under which the product was found. */
const char *krul_blas_symbol(const krul_blas *blas);

/* Does a product stay in the thread that asks for it? Where the library has no way to say so for one
 * thread alone, it uses as many threads as it uses for everybody. */
bool krul_blas_is_single_threaded(const krul_blas *blas);

/* C = alpha op(A) op(B) + beta C, row-major: op(A) is m x k, op(B) k x n, C m x n; rows begin ld
 * floats apart. Where trans_a, A is stored as k x m and op(A) is its transpose; B likewise. With
 * beta 0, C is not read. C must not overlap A or B. */
krul_status krul_blas_sgemm(const krul_blas *blas, bool trans_a, bool trans_b, int64_t m, int64_t n,
                            int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                            int64_t ldb, float beta, float *c, int64_t ldc,
                            krul_error *err) KRUL_MUST_CHECK;

/* Does the library multiply bfloat16, too, and right? */
bool krul_blas_has_bf16(const krul_blas *blas);

/* Is that worth it on this processor: has it tiles for it? Without them it may well be slower than
 * float32. */
bool krul_blas_is_bf16_fast(void);

/* The same of bfloat16, summed up in float32, which on a processor with tiles for it takes a third
 * of the time or less. KRUL_STATUS_UNSUPPORTED where krul_blas_has_bf16 says no. */
krul_status krul_blas_bf16_gemm(const krul_blas *blas, bool trans_a, bool trans_b, int64_t m,
                                int64_t n, int64_t k, float alpha, const uint16_t *a, int64_t lda,
                                const uint16_t *b, int64_t ldb, float beta, float *c, int64_t ldc,
                                krul_error *err) KRUL_MUST_CHECK;

/* ---- estimator ------------------------------------------------------------------------------- */
/* How alike do two layers attend, and to what? Krul section 4.1, token-wise heterogeneous: rows of
 * prompt tokens and of generated tokens are weighted apart and added. Positions count tokens of the
 * conversation, padding included. */

/* The sampled queries of one layer in one forward pass, with the keys they attend to. */
typedef struct krul_estimator_layer {
    krul_view queries; /* n_batch x n_heads x n_rows x head_dim, after rotary embedding; data NULL:
                        * not observed */
    krul_view keys; /* n_batch x n_kv_heads x n_keys x head_dim, after rotary embedding */
    float scaling; /* of the dot products, usually head_dim ** -0.5 */
    float softcap; /* tanh cap on the scores, 0 for none */
    const float *sinks; /* n_heads logits that take part in the softmax only, or NULL */
    const int64_t *row_starts; /* n_batch x n_rows positions, the first that each row sees (sliding
                                * windows, chunks), or NULL for 0 */
    int64_t key_start; /* position of keys[0]; above 0 for a sliding window's tail */
} krul_estimator_layer;

/* What observed rows add up to. All arrays are the caller's, added to, never cleared. */
typedef struct krul_estimator_sums {
    double *distances; /* n_layers x n_layers: sum of (A_a - A_b)^2 over heads, rows, keys */
    double *importance; /* n_layers x 2: sum over rows of the mean over heads of the attention mass
                         * on the first and on the last 10 % (at least one) of the row's keys */
    float *received; /* n_layers x received_stride: attention mass that each token received */
    int64_t received_stride;
    double *n_rows; /* one number: rows of all batch entries, times weight */
} krul_estimator_sums;

/* Compute the softmax rows of every layer for the same tokens, tile by tile, and add `weight` times
 * their sums. Row r is the query at row_positions[r] and sees keys up to and including that
 * position. key_is_real (n_batch x n_keys_total, or NULL) is the padding mask: other keys are not
 * seen and other rows are left out. Keys outside a window count as 0. Distances to layers that were
 * not observed, and between layers of different n_heads, become NaN; so does what non-finite
 * queries or keys touch. Products are float32, sums over tiles double; results do not depend on
 * n_threads (0: all processors). Scratch: tile_bytes for rows over all threads, and per thread
 * n_layers x (n_keys_total + 16 x head_dim) floats. */
krul_status krul_estimator_observe(const krul_backend *backend, const krul_estimator_layer *layers,
                                   int32_t n_layers, const int64_t *row_positions, int64_t n_rows,
                                   const uint8_t *key_is_real, int64_t n_keys_total, double weight,
                                   size_t tile_bytes, int n_threads, krul_estimator_sums *sums,
                                   krul_error *err) KRUL_MUST_CHECK;

/* ---- selector -------------------------------------------------------------------------------- */
/* Which layer pairs share their KV. Small, exact, deterministic; always on the host. */

typedef struct krul_selector_pair {
    int32_t lower;
    int32_t upper;
} krul_selector_pair;

/* Pairs needed so that sharing leaves at most `ratio` of the layers' bytes, each pair saving one
 * layer: ceil((1 - ratio) * n_layers), at most n_layers / 2. */
int32_t krul_selector_pair_count(int32_t n_layers, double ratio);

/* The paper's choice. The n_sensitive layers with the largest importance sum are left alone (ties:
 * the lower layer is the more sensitive); of the rest, pairs of one class in order of distance
 * (ties: nearer pair, then lower layer), each layer once, until n_pairs are found or none is left.
 * NaN distances are never paired. pairs_out holds n_pairs. */
krul_status krul_selector_choose_pairs(const double *distances, const double *importance,
                                       const int32_t *layer_class, int32_t n_layers,
                                       int32_t n_sensitive, int32_t n_pairs,
                                       krul_selector_pair *pairs_out, int32_t *n_pairs_out,
                                       krul_error *err) KRUL_MUST_CHECK;

/* The baseline, MiniCache: adjacent layers of one class from the middle upwards. */
krul_status krul_selector_fixed_pairs(const int32_t *layer_class, int32_t n_layers, int32_t n_pairs,
                                      krul_selector_pair *pairs_out, int32_t *n_pairs_out,
                                      krul_error *err) KRUL_MUST_CHECK;

/* ---- entropy --------------------------------------------------------------------------------- */
/* Interleaved rANS over bytes, static tables; the only entropy coder. FORMAT.md has the stream. */

enum { KRUL_ENTROPY_PROBABILITY_BITS = 12, KRUL_ENTROPY_N_LANES = 32 };

/* Frequencies of the 256 symbols, summing to 1 << KRUL_ENTROPY_PROBABILITY_BITS, each below that. */
typedef struct krul_entropy_table {
    uint16_t frequency[256];
} krul_entropy_table;

/* Quantise counts to a table in which every symbol that occurs has a frequency of at least 1. A
 * symbol that occurs alone leaves 1 to its neighbour. */
krul_status krul_entropy_table_build(const uint64_t counts[256], krul_entropy_table *out,
                                     krul_error *err) KRUL_MUST_CHECK;

/* Most bytes that encoding n_symbols can take, table included; 0 when that does not fit. */
size_t krul_entropy_bound(size_t n_symbols);

/* Self-contained stream: table, chunk directory, chunks. */
krul_status krul_entropy_encode(const krul_backend *backend, const uint8_t *symbols,
                                size_t n_symbols, uint8_t *out, size_t capacity_bytes,
                                size_t *n_bytes_out, krul_error *err) KRUL_MUST_CHECK;

/* Decode exactly n_symbols; any stream that does not hold exactly that many is refused. */
krul_status krul_entropy_decode(const krul_backend *backend, const uint8_t *stream, size_t n_bytes,
                                uint8_t *symbols_out, size_t n_symbols,
                                krul_error *err) KRUL_MUST_CHECK;

/* Several tables, made ready for both directions; immutable, for any number of threads. */
typedef struct krul_entropy_tables krul_entropy_tables;

enum { KRUL_ENTROPY_MAX_TABLES = 64, KRUL_ENTROPY_MAX_COLUMN_VALUES = 1 << 29 };

/* 1 to KRUL_ENTROPY_MAX_TABLES tables, each of which must sum to 1 << KRUL_ENTROPY_PROBABILITY_BITS
 * and give symbol 255, which stands for whatever has no frequency, one of at least 1. No frequency
 * may be the whole sum: it would not fit a slot. */
krul_status krul_entropy_tables_new(const krul_entropy_table *tables, int32_t n_tables,
                                    krul_entropy_tables **out, krul_error *err) KRUL_MUST_CHECK;

/* NULL is allowed. */
void krul_entropy_tables_free(krul_entropy_tables *tables);

/* Most bytes that encoding that many values can take; 0 for more than
 * KRUL_ENTROPY_MAX_COLUMN_VALUES or a negative number. */
size_t krul_entropy_columns_bound(int64_t n_columns, int64_t n_tokens);

/* Encode n_columns x n_tokens whole numbers, a column after the other. The value of a column c and a
 * token t is coded by table clamp(column_class[c] + token_shift[t], 0, n_tables - 1); token_shift
 * may be NULL, which is all zeros; a column of class 255 holds nothing but zeros and takes no
 * symbols. Neither array is in the stream. */
krul_status krul_entropy_encode_columns(const krul_entropy_tables *tables, const int32_t *values,
                                        int64_t n_columns, int64_t n_tokens,
                                        const uint8_t *column_class, const int8_t *token_shift,
                                        uint8_t *out, size_t capacity_bytes, size_t *n_bytes_out,
                                        krul_error *err) KRUL_MUST_CHECK;

/* The inverse, to float32, to which values beyond 2^24 are rounded; with the same tables, classes
 * and shifts. A stream that does not come out even is KRUL_STATUS_CORRUPT, and `out` may then be
 * partly written. */
krul_status krul_entropy_decode_columns(const krul_backend *backend,
                                        const krul_entropy_tables *tables, const uint8_t *stream,
                                        size_t n_bytes, int64_t n_columns, int64_t n_tokens,
                                        const uint8_t *column_class, const int8_t *token_shift,
                                        float *out, krul_error *err) KRUL_MUST_CHECK;

/* ---- compressor ------------------------------------------------------------------------------ */
/* One table of codecs. A block is a run of tokens of one tensor (K or V) of one layer, or of two
 * layers that share. Encoding and decoding a block are single-threaded; blocks run in parallel. */

/* Pinned: these numbers are in files. */
typedef enum krul_codec {
    KRUL_CODEC_EXACT = 1,
    KRUL_CODEC_INT8 = 2,
    KRUL_CODEC_INT4 = 3,
    KRUL_CODEC_SHARE = 4,
    KRUL_CODEC_SHARE_INT8 = 5,
    KRUL_CODEC_SHARE_INT4 = 6,
    KRUL_CODEC_PREDICT = 7, /* K and V of a layer in one block; see predict */
} krul_codec;

/* K is quantised per channel over groups of tokens, V per token over groups of channels. */
typedef enum krul_kv {
    KRUL_KV_KEY = 0,
    KRUL_KV_VALUE = 1,
    KRUL_KV_BOTH = 2, /* of codec predict, and of it alone */
} krul_kv;

enum {
    KRUL_COMPRESSOR_MAX_VIEWS = 2,
    KRUL_N_CODECS = 8, /* one more than the largest number */
};

/* "exact", "share+int4", ...; NULL for a number that is no codec. */
const char *krul_codec_name(krul_codec codec);

/* 1 for a codec of single layers, 2 for one of pairs, 0 for a number that is no codec. `exact`
 * takes one or two: a pair that fell back is two exact layers in one block. */
int krul_codec_n_layers(krul_codec codec);

/* Most payload bytes that encoding these views can take with any codec. */
krul_status krul_compressor_bound(const krul_view *views, int n_views, size_t *n_bytes_out,
                                  krul_error *err) KRUL_MUST_CHECK;

/* Encode a block. The views have one shape and dtype. If a value is not finite, or the codec cannot
 * hold the block's range, the block is coded `exact` and codec_out says so. error_out (NULL
 * allowed) receives sum |x - decoded|^2 and sum |x|^2 over all views, for finite values. */
krul_status krul_compressor_encode(const krul_backend *backend, krul_codec codec, krul_kv kv,
                                   const krul_view *views, int n_views, uint8_t *payload_out,
                                   size_t capacity_bytes, size_t *n_bytes_out,
                                   krul_codec *codec_out, double error_out[2],
                                   krul_error *err) KRUL_MUST_CHECK;

/* Decode a block into views of the shape and dtype it was encoded from. A view with data NULL is
 * skipped (its shape still counts): half of a pair can be had alone. Trusts nothing in the payload:
 * damage is KRUL_STATUS_CORRUPT, and then the outputs may be partly written. */
krul_status krul_compressor_decode(const krul_backend *backend, krul_codec codec, krul_kv kv,
                                   const uint8_t *payload, size_t payload_bytes,
                                   const krul_view *views, int n_views,
                                   krul_error *err) KRUL_MUST_CHECK;

/* ---- predict --------------------------------------------------------------------------------- */
/* Cross-layer predictive coding. K and V of a layer and a run of tokens are one block; the blocks of
 * a run are a chain: each layer is predicted from what was decoded of its sources, so a chain is
 * coded and decoded in the order of the layers. Distinct chains are independent. */

enum {
    KRUL_PREDICT_MAX_SOURCES = 2,
    KRUL_PREDICT_MAX_WIDTH = 1 << 15,
    KRUL_PREDICT_DIGEST_BYTES = 32,
    /* How much finer a token may be quantised than its block: its step is 2^(-fineness/3) steps. */
    KRUL_PREDICT_MIN_FINENESS = -6,
    KRUL_PREDICT_MAX_FINENESS = 12,
};

#define KRUL_PREDICT_MIN_STEP 1e-6f
#define KRUL_PREDICT_MAX_STEP 1e6f

/* Which numbers of a key are turned together. */
typedef enum krul_rotary_convention {
    KRUL_ROTARY_NONE = 0,
    KRUL_ROTARY_HALF = 1, /* i and i + n_pairs */
    KRUL_ROTARY_INTERLEAVED = 2, /* 2 i and 2 i + 1 */
} krul_rotary_convention;

/* How the keys of a layer were rotated. */
typedef struct krul_rotary {
    krul_rotary_convention convention;
    int32_t start; /* the first number of a head that is turned */
    int32_t n_pairs;
    bool is_per_batch; /* tables are n_batch x n_tokens x n_pairs, else n_tokens x n_pairs */
    const float *cos; /* of the tokens from krul_predict_options.token_start on */
    const float *sin;
} krul_rotary;

/* What the products of a conversation are of. Rounded factors are rounded by writer and reader, so
 * that both see the same sources; only how fast they are multiplied is each machine's own affair. */
typedef enum krul_predict_products {
    KRUL_PRODUCTS_F32 = 0,
    /* Of rows rounded to bfloat16 and matrices that hold no other numbers, in float32. */
    KRUL_PRODUCTS_ROUNDED = 1,
    /* The same by the library's product of bfloat16, from what each layer has in `narrow`. */
    KRUL_PRODUCTS_BF16 = 2,
} krul_predict_products;

/* The matrices of a layer in bfloat16, NULL where those in float32 are NULL. */
typedef struct krul_predict_narrow {
    const uint16_t *forward;
    const uint16_t *backward;
    const uint16_t *maps;
    const uint16_t *left;
    const uint16_t *right;
} krul_predict_narrow;

/* What a profile says of a layer; width is 2 n_heads head_dim: K of all heads before rotary
 * embedding, then V. Matrices are row-major and multiplied from the right. */
typedef struct krul_predict_layer {
    int32_t n_heads; /* 0: the layer takes no part, and nothing else is looked at */
    int32_t head_dim;
    int32_t n_sources;
    int32_t sources[KRUL_PREDICT_MAX_SOURCES];
    int32_t rank; /* above 0: left x right stands for maps */
    const float *mean; /* width */
    const float *deviation; /* width: expected of the coefficients; above 0 */
    const float *forward; /* width x width; NULL: only decoding */
    const float *backward; /* width x width */
    const float *maps; /* n_sources width x width */
    const float *left; /* n_sources width x rank */
    const float *right; /* rank x width */
    krul_rotary rotary;
    krul_predict_narrow narrow;
} krul_predict_layer;

/* All arrays but `tables` and `layers` themselves are borrowed until krul_predict_free. */
typedef struct krul_predict_options {
    const krul_blas *blas;
    krul_predict_products products;
    const krul_entropy_table *tables;
    int32_t n_tables;
    int32_t unit_table; /* for a standard deviation of one step; three tables to an octave */
    int32_t n_layers;
    const krul_predict_layer *layers;
    int64_t n_batch;
    int64_t token_start; /* the first token whose rotation is known */
    int64_t n_tokens;
    /* The same for two only where tables and layers are, but for the rotations; a device keeps what
     * it was given under it. All zeros: not known. */
    uint8_t digest[KRUL_PREDICT_DIGEST_BYTES];
} krul_predict_options;

/* A profile made ready for one conversation, and the chains that are under way. */
typedef struct krul_predict krul_predict;

krul_status krul_predict_new(const krul_predict_options *options, krul_predict **out,
                             krul_error *err) KRUL_MUST_CHECK;

/* No thread may be coding. NULL is allowed. */
void krul_predict_free(krul_predict *predict);

/* Most payload bytes of a block. */
krul_status krul_predict_bound(const krul_predict *predict, int32_t layer, int64_t n_tokens,
                               size_t *n_bytes_out, krul_error *err) KRUL_MUST_CHECK;

/* Encode the K (views[0]) and V of the tokens from token_start on, each token with its own fineness,
 * or all with 0 where `fineness` is NULL. *fits_out false: a value is not finite, too large for the
 * step, or would not come back finite; then the chain is broken and what follows in it must be coded
 * otherwise. error_out receives sum |x - decoded|^2 and sum |x|^2, before rotary embedding. One
 * thread may work on a chain at a time. */
krul_status krul_predict_encode(const krul_backend *backend, krul_predict *predict, int32_t layer,
                                int64_t token_start, const krul_view views[2], float step,
                                const int8_t *fineness, uint8_t *payload_out, size_t capacity_bytes,
                                size_t *n_bytes_out, bool *fits_out, double error_out[2],
                                krul_error *err) KRUL_MUST_CHECK;

/* Decode a block of n_tokens. A view with data NULL is not wanted; with both, the block is decoded
 * for those that are predicted from it. Trusts nothing in the payload: damage is
 * KRUL_STATUS_CORRUPT, a source that was not decoded before KRUL_STATUS_BAD_VALUE. */
krul_status krul_predict_decode(const krul_backend *backend, krul_predict *predict, int32_t layer,
                                int64_t token_start, int64_t n_tokens, const uint8_t *payload,
                                size_t payload_bytes, const krul_view views[2],
                                krul_error *err) KRUL_MUST_CHECK;

/* ---- store ----------------------------------------------------------------------------------- */
/* One container for every file: header, table of entries, payloads. FORMAT.md is the law. */

enum {
    KRUL_STORE_VERSION = 1,
    KRUL_STORE_HEADER_BYTES = 64,
    KRUL_STORE_ENTRY_BYTES = 64,
    KRUL_STORE_ALIGNMENT = 64,
    KRUL_STORE_MAX_ENTRIES = 1 << 20,
    KRUL_STORE_MAX_LAYERS = 1 << 16,
    KRUL_STORE_MAX_EXTENT = 1 << 16, /* of n_batch, n_heads and head_dim */
    KRUL_STORE_MAX_TOKENS = 1 << 30, /* of one conversation */
    KRUL_STORE_MAX_BLOCK_BYTES = 1 << 30, /* of one block when decoded */
    KRUL_STORE_MAX_META_BYTES = 1 << 26,
};

/* What a file is. */
typedef enum krul_store_kind {
    KRUL_STORE_MANIFEST = 1,
    KRUL_STORE_SEGMENT = 2,
} krul_store_kind;

/* What an entry's payload is. */
typedef enum krul_store_entry_kind {
    KRUL_STORE_ENTRY_BLOCK = 1, /* coded KV; every field of krul_store_entry is in use */
    KRUL_STORE_ENTRY_META = 2, /* JSON, UTF-8 */
    KRUL_STORE_ENTRY_TOKENS = 3, /* int64, n_batch x n_tokens */
    KRUL_STORE_ENTRY_MASK = 4, /* uint8, n_batch x n_tokens */
    KRUL_STORE_ENTRY_POSITIONS = 5, /* int64, n_batch x n_tokens */
    KRUL_STORE_ENTRY_BEHAVIOUR = 6, /* float32, sampled numbers of the probe prompt's KV */
} krul_store_entry_kind;

/* One row of the table, as parsed: every length already checked against the file. */
typedef struct krul_store_entry {
    krul_store_entry_kind kind;
    krul_codec codec; /* zero in all but blocks, as are all fields down to n_tokens */
    krul_kv kv;
    krul_dtype dtype;
    int32_t layer_lower;
    int32_t layer_upper; /* -1 for a block of one layer */
    int32_t n_batch;
    int32_t n_heads;
    int32_t head_dim;
    int64_t token_start; /* position in the conversation of the block's first token */
    int64_t n_tokens;
    uint64_t offset; /* of the payload, from the start of the file */
    uint64_t payload_bytes;
    uint32_t payload_crc32c;
} krul_store_entry;

/* A parsed file head. */
typedef struct krul_store_head {
    krul_store_kind kind;
    uint32_t version;
    uint64_t file_bytes;
    int32_t n_entries;
    krul_store_entry *entries; /* owned; krul_store_head_close frees it */
} krul_store_head;

/* CRC-32C (Castagnoli) of the bytes, continued from `crc` (0 to begin). */
uint32_t krul_store_crc32c(uint32_t crc, const void *bytes, size_t n_bytes);

/* Does a lone entry keep the rules of its kind? What it may not hold is KRUL_STATUS_BAD_VALUE. Its
 * place in a file is not looked at. */
krul_status krul_store_check_entry(const krul_store_entry *entry, krul_error *err) KRUL_MUST_CHECK;

/* Bytes of header and entry table for a file that begins with these KRUL_STORE_HEADER_BYTES. */
krul_status krul_store_head_bytes(const uint8_t *header, size_t n_bytes, size_t *n_bytes_out,
                                  krul_error *err) KRUL_MUST_CHECK;

/* Parse header and entry table. `bytes` holds at least those; file_bytes is the size of the file.
 * Trusts nothing. */
krul_status krul_store_parse(const uint8_t *bytes, size_t n_bytes, uint64_t file_bytes,
                             krul_store_head *out, krul_error *err) KRUL_MUST_CHECK;

/* Free what krul_store_parse allocated. */
void krul_store_head_close(krul_store_head *head);

/* Read and parse the head of an open file. What is no regular file is KRUL_STATUS_BAD_FORMAT. */
krul_status krul_store_read_head(int fd, krul_store_head *out, krul_error *err) KRUL_MUST_CHECK;

/* Read one payload and check its CRC. `out` holds entry->payload_bytes. */
krul_status krul_store_read_payload(int fd, const krul_store_entry *entry, uint8_t *out,
                                    krul_error *err) KRUL_MUST_CHECK;

/* Write a file so that its name holds either the old content or all of the new: a temporary file
 * in directory_fd, written, fsynced, renamed, the directory fsynced. Fills offset and
 * payload_crc32c of the entries. On failure the temporary file is removed and the old content
 * stands; only when the last step fails, the directory's fsync, does the name already hold the new
 * content, without a promise that it survives a power cut. file_bytes_out (NULL allowed) receives
 * the size of the file. A payload may be NULL where its entry has no bytes. */
krul_status krul_store_write(int directory_fd, const char *name, krul_store_kind kind,
                             krul_store_entry *entries, const uint8_t *const *payloads,
                             int32_t n_entries, uint64_t *file_bytes_out,
                             krul_error *err) KRUL_MUST_CHECK;

/* ---- restore plan ---------------------------------------------------------------------------- */
/* Which part of each layer to recompute while the rest is loaded. A pure function of costs.
 *
 * Of layer l the first n_l tokens are recomputed from their token ids and [n_l, n_tokens) is
 * loaded; then the prompt's pass runs over all layers. n_l never grows with depth, because a layer's
 * prefix needs the hidden states of the same prefix below. The model of time, all in seconds:
 *
 *   R_l    a layer's prefix: linear * n + quadratic * n^2 + overhead, 0 without tokens
 *   P_l    a layer of the prompt's pass, m tokens after N: linear * m + quadratic * ((N + m)^2 - N^2)
 *          + overhead, 0 without tokens
 *   f_l    part of a layer that is read: blocks are read whole, so those that end after n_l
 *   load_l read * f_l, or max(read, decode) * f_l where decoding overlaps reading. What a layer shares
 *          with a lower one p is read once: pair_read * f_p of it with layer p, and what only l needs,
 *          pair_read * (f_l - f_p), with layer l
 *   E_l    latency + load_0 + ... + load_l: one channel, layers in order, latency only before a load
 *   D      sum of decode * f_l where decoding takes the model's processors, else 0
 *
 * The first token is there after max(sum R + D + sum P, max over loaded l of E_l + P_l + P_(l+1) +
 * ...): layer l of the prompt's pass waits for layer l alone, and for everything recomputed. */

/* What the plans that compete look like. Pinned and append-only: the numbers reach logs. */
typedef enum krul_restore_shape {
    KRUL_RESTORE_SHAPE_AUTO = 0, /* the best of all below */
    KRUL_RESTORE_SHAPE_LOAD = 1, /* n_l is n_required */
    KRUL_RESTORE_SHAPE_RECOMPUTE = 2, /* n_l is as much as may be, and helps to be, recomputed */
    KRUL_RESTORE_SHAPE_UNIFORM = 3, /* one number for all layers */
    KRUL_RESTORE_SHAPE_PYRAMID = 4, /* the paper's: falls linearly with depth */
    KRUL_RESTORE_SHAPE_STEP = 5, /* one number for the first layers, a smaller one for the rest */
} krul_restore_shape;

/* What a restore is made of. Arrays have n_layers numbers and are borrowed; each cost is from 0 to
 * 10^12, which a stalled store may have. */
typedef struct krul_restore_costs {
    int32_t n_layers;
    int64_t n_tokens; /* of the history */
    int64_t n_prompt_tokens; /* new ones, may be 0 */
    int64_t granularity; /* n_l is a multiple of it, or n_tokens, or n_required */
    const double *linear_s_per_token; /* of a layer's forward pass */
    const double *quadratic_s_per_token2; /* of its attention */
    const double *overhead_s; /* of a layer in a pass, whatever its tokens */
    const double *read_s; /* of all n_tokens of a layer */
    const double *decode_s; /* likewise */
    const int32_t
        *partner; /* the lower layer that one shares blocks with, or -1; NULL: none does */
    const double *pair_read_s; /* of all these blocks, for the upper layer; not in its read_s */
    double latency_s; /* before the first load */
    bool decode_on_compute; /* decoding takes the processors that the model runs on */
    int64_t block_tokens; /* of a stored block; 0 and 1: any token can be read alone */
    int64_t first_block_tokens; /* of the first block where it is another, else 0 */
    const int64_t *n_required; /* tokens that are not stored, never growing with depth; NULL: 0 */
    int64_t n_recomputable; /* most tokens that may be recomputed: 0 to n_tokens */
} krul_restore_costs;

typedef struct krul_restore_plan {
    krul_restore_shape shape;
    int64_t *n_recomputed; /* n_layers; the caller's */
    double predicted_s; /* until the first token */
    double load_s; /* the same for KRUL_RESTORE_SHAPE_LOAD */
    double recompute_s; /* and for KRUL_RESTORE_SHAPE_RECOMPUTE */
    double bound_s; /* no n_recomputed at all is faster: the best of any real numbers, were no layer
                     * needed before the last and n_l free to grow with depth; of two layers that
                     * share blocks each pays for a part of them */
} krul_restore_plan;

typedef enum krul_restore_action {
    KRUL_RESTORE_ACTION_RECOMPUTE = 0,
    KRUL_RESTORE_ACTION_LOAD = 1,
    KRUL_RESTORE_ACTION_PROMPT = 2,
} krul_restore_action;

/* One thing to do, with the time that the model predicts. */
typedef struct krul_restore_plan_step {
    krul_restore_action action;
    int32_t layer;
    int64_t token_start;
    int64_t token_end;
    double start_s;
    double end_s;
    double deadline_s; /* the latest end that alone would not delay the first token */
} krul_restore_plan_step;

/* The predicted seconds of any n_recomputed that the costs allow. */
krul_status krul_restore_plan_predict(const krul_restore_costs *costs, const int64_t *n_recomputed,
                                      double *out, krul_error *err) KRUL_MUST_CHECK;

/* The best plan of a shape. AUTO is never predicted slower than LOAD or RECOMPUTE, but for the one
 * part in 10^9 by which a plan that recomputes more must be faster. Of the multiples of granularity
 * that end in one block only the least is a candidate: more would load the same. Up to 24 layers and
 * 24 candidates for a layer every plan of a shape is tried; beyond, token counts are found by
 * Fibonacci search, as if time were convex in them, which overheads and short histories disturb, and
 * STEP's first layers by looking at up to 64 splits. */
krul_status krul_restore_plan_choose(const krul_restore_costs *costs, krul_restore_shape shape,
                                     krul_restore_plan *out, krul_error *err) KRUL_MUST_CHECK;

/* Steps of any n_recomputed that the costs allow, by predicted start; loads in layer order, and no
 * step before one that it needs. steps_out holds 3 * n_layers. */
krul_status krul_restore_plan_steps(const krul_restore_costs *costs, const int64_t *n_recomputed,
                                    krul_restore_plan_step *steps_out, int64_t *n_steps_out,
                                    krul_error *err) KRUL_MUST_CHECK;

/* ---- device ---------------------------------------------------------------------------------- */
/* The way to a GPU, which its own module offers by a table; see device.h. */

typedef struct krul_device_ops krul_device_ops;

/* Memory and streams of devices, kept from one use to the next. */
typedef struct krul_device_pool krul_device_pool;

/* An event of a device, as its table knows events: a place in a stream. */
typedef struct krul_device_event {
    int32_t device_id;
    void *event;
} krul_device_event;

/* 0 stands for what is usual. */
typedef struct krul_device_pool_options {
    size_t chunk_bytes; /* of pinned memory, and of the device's, that are copied at once */
    int32_t n_chunks; /* of a restore and device */
    int32_t n_idle; /* most restores, and of each device most other users, whose memory is kept */
} krul_device_pool_options;

/* Takes no memory of any device yet. options NULL: all usual. */
krul_status krul_device_pool_new(const krul_device_ops *ops,
                                 const krul_device_pool_options *options, krul_device_pool **out,
                                 krul_error *err) KRUL_MUST_CHECK;

const krul_device_ops *krul_device_pool_ops(const krul_device_pool *pool);

/* Nothing may be under way that uses it, and no observer be left. NULL is allowed. */
void krul_device_pool_free(krul_device_pool *pool);

/* A block on a device that is to be coded there. */
typedef struct krul_device_job {
    krul_codec codec;
    krul_kv kv;
    int n_views;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    uint8_t *payload; /* of the host: room for what krul_compressor_bound says */
    size_t capacity_bytes;
    size_t payload_bytes; /* from here on results, as krul_compressor_encode has them */
    krul_codec codec_used;
    double error[2];
    krul_error failure; /* status OK: it was coded */
} krul_device_job;

/* Encode blocks on the devices that they are on, after these events, and return when that is done; the
 * payloads are those of krul_compressor_encode, but see device_encode.h for share. Jobs fail one by
 * one: KRUL_STATUS_UNSUPPORTED, KRUL_STATUS_NO_MEMORY and KRUL_STATUS_DEVICE say that the block is to
 * be coded on the CPU, anything else that it is wrong there, too. Where memory is short fewer blocks
 * are coded at a time. */
void krul_compressor_encode_on_device(krul_device_pool *pool, const krul_device_event *events,
                                      int32_t n_events, krul_device_job *jobs, int64_t n_jobs);

/* Sums of observed attention rows on a device, for layers that are there. */
typedef struct krul_observer krul_observer;

/* Takes no memory of the device yet; the pool must outlive it. */
krul_status krul_observer_new(krul_device_pool *pool, int32_t device_id, int32_t n_layers,
                              krul_observer **out, krul_error *err) KRUL_MUST_CHECK;

/* What krul_estimator_observe does, on the device, after these events; returns when it is done, so
 * that queries and keys may then go. Sums grow as needed. KRUL_STATUS_UNSUPPORTED and
 * KRUL_STATUS_NO_MEMORY leave the sums as they were. After KRUL_STATUS_DEVICE they may be lost: then
 * every later call fails, too. */
krul_status krul_observer_observe(krul_observer *observer, const krul_device_event *events,
                                  int32_t n_events, const krul_estimator_layer *layers,
                                  const int64_t *row_positions, int64_t n_rows,
                                  const uint8_t *key_is_real, int64_t n_keys_total, double weight,
                                  krul_error *err) KRUL_MUST_CHECK;

/* Add the sums to those of the host, which hold all tokens that were observed since, and begin again
 * with zero. Fails as krul_observer_observe does. */
krul_status krul_observer_read(krul_observer *observer, krul_estimator_sums *sums,
                               krul_error *err) KRUL_MUST_CHECK;

/* NULL is allowed. */
void krul_observer_free(krul_observer *observer);

/* ---- restore --------------------------------------------------------------------------------- */
/* Blocks are read, checked and decoded by threads in the order given; a layer can be waited for.
 *
 * Where views are on a device, many blocks are copied there in one piece and decoded by it. A thread
 * is done with such a step when it has enqueued that, on streams of the restore's own: what else uses
 * the views must be ordered against these. */

typedef struct krul_restore krul_restore;

/* One block on its way home. */
typedef struct krul_restore_step {
    int fd; /* borrowed; must stay open until krul_restore_free. -1: payload */
    const uint8_t *payload; /* used when fd is -1; borrowed likewise */
    krul_store_entry entry;
    krul_view
        views[KRUL_COMPRESSOR_MAX_VIEWS]; /* data NULL: not wanted; K and V of codec predict */
    krul_predict *predict; /* for codec predict, of its own for each restore; else NULL */
} krul_restore_step;

/* A machine that is made up. A restore on it reads and decodes nothing: the same code takes the same
 * steps in the same order, and only this clock moves. For one thread. */
typedef struct krul_restore_machine {
    double read_bytes_per_s; /* of the way to the store, which all threads share */
    double read_latency_s; /* from asking for a block to its first byte */
    double decode_bytes_per_s; /* of one thread, counted in decoded bytes */
    double now_s; /* the caller adds what it does itself; waiting adds what it takes */
} krul_restore_machine;

/* A stream of a device, as its table knows streams. */
typedef struct krul_device_stream {
    int32_t device_id;
    void *stream;
} krul_device_stream;

typedef struct krul_restore_options {
    int n_threads; /* 0: all processors */
    double max_bytes_per_s; /* that are read from files; 0: no limit */
    /* Whoever waits for layers computes on the very processors that decode, all of them, and both at
     * once would hold each other up: they take turns. See krul_restore_wait_for. */
    bool takes_turns;
    krul_restore_machine *machine; /* borrowed until krul_restore_free; NULL: this one */
    krul_device_pool *devices; /* for views that are on one; borrowed likewise; NULL: none are */
    const krul_device_stream *streams; /* whose work so far comes before anything is written */
    int32_t n_streams;
} krul_restore_options;

/* How a restore went, or goes. */
typedef struct krul_restore_counts {
    int64_t n_steps;
    int64_t n_steps_done; /* dropped ones too */
    uint64_t read_bytes;
    double read_s; /* summed over threads */
    double read_wall_s; /* while at least one thread was reading */
    double decode_s; /* summed over threads */
    double decode_s_by_codec[KRUL_N_CODECS]; /* the same; index is the codec's number */
    uint64_t decoded_bytes_by_codec[KRUL_N_CODECS];
    double elapsed_s; /* from the start until the last step ended, or until now */
} krul_restore_counts;

/* When a step was carried out, in seconds since the start; worker -1: not, or not yet. */
typedef struct krul_restore_trace {
    int32_t worker;
    double begin_s;
    double read_s; /* when it was read and checked */
    double turn_s; /* when what it is predicted from was there, and it was its turn */
    double end_s; /* when it was decoded */
} krul_restore_trace;

/* Start. Of codec predict, blocks of one predictor and token_start are a chain, and a block is taken
 * after those of lower layers in it; one whose views are all unwanted is decoded only while a later
 * one of its chain is wanted. A layer is complete when every step that writes to it has ended; layers without a step
 * are complete at once. Views must have the shape and dtype that their entry says, or hold only its
 * first tokens; they must be writable and stay alive until krul_restore_free. On a machine that is
 * made up views are never touched, only whether data is NULL counts. That no two steps write to one
 * place is the caller's promise. */
krul_status krul_restore_start(const krul_backend *backend, const krul_restore_step *steps,
                               int64_t n_steps, int32_t n_layers,
                               const krul_restore_options *options, krul_restore **out,
                               krul_error *err) KRUL_MUST_CHECK;

/* Wait for one layer; sleeps, never spins. On a device its blocks are then enqueued. Returns the failure of a step of this layer, or
 * KRUL_STATUS_CANCELLED. Other layers go on when one fails. */
krul_status krul_restore_wait(krul_restore *restore, int32_t layer,
                              krul_error *err) KRUL_MUST_CHECK;

/* The same, and what is enqueued on `stream` from now on, a stream of the layer's device, comes after
 * the layer's blocks; the host does not wait for them. For a layer that is on no device `stream` is
 * not looked at. Damage that only the device could see is told by krul_restore_join at the latest. */
krul_status krul_restore_wait_stream(krul_restore *restore, int32_t layer, void *stream,
                                     krul_error *err) KRUL_MUST_CHECK;

/* Sleep until the layer is complete, failed or cancelled, so that krul_restore_wait would return at
 * once, or until timeout_s has passed (0: only ask). Says which. True for a layer that is none.
 *
 * Where turns are taken, it also waits until what was read meanwhile is decoded, and for a second
 * after krul_restore_wait has returned, or until somebody waits again, blocks are read but not
 * decoded: then the processors are the caller's. */
bool krul_restore_wait_for(krul_restore *restore, int32_t layer, double timeout_s);

/* The caller writes the first n_tokens tokens of a layer itself: steps that hold nothing behind
 * them are dropped. When it returns no thread writes there, now or later, and nothing that does is
 * enqueued any more. What was enqueued before may still be under way on a device: krul_restore_lead
 * says to which stream of the caller's it comes first. */
void krul_restore_drop(krul_restore *restore, int32_t layer, int64_t n_tokens);

/* What is enqueued on `stream` from now on, a stream of that device, comes after all that this
 * restore has enqueued there so far; the host does not wait. Without steps on the device nothing
 * happens. */
krul_status krul_restore_lead(krul_restore *restore, int32_t device_id, void *stream,
                              krul_error *err) KRUL_MUST_CHECK;

/* Why blocks of codec predict are decoded by the CPU though their views are on a device; "" where
 * they are not. Known once the restore has started; borrowed from it. */
const char *krul_restore_predict_problem(const krul_restore *restore);

/* Take steps that have not begun in this order from now on: a permutation of n_steps indices. */
krul_status krul_restore_reorder(krul_restore *restore, const int64_t *order, int64_t n_steps,
                                 krul_error *err) KRUL_MUST_CHECK;

/* Change how many bytes are read per second; reads under way end as they began. */
void krul_restore_limit(krul_restore *restore, double max_bytes_per_s);

/* Steps not begun are dropped and waiters wake with KRUL_STATUS_CANCELLED. */
void krul_restore_cancel(krul_restore *restore);

/* Cancel, and wait until no thread and no device touches a view any more. A read that hangs is not
 * waited for: files and payloads are still in use. */
void krul_restore_abandon(krul_restore *restore);

/* Wait until no thread touches a view, a file or a payload any more, and no device a view. Layers
 * that failed or were cancelled stay so; krul_restore_wait then tells of all damage. */
void krul_restore_join(krul_restore *restore);

void krul_restore_read_counts(krul_restore *restore, krul_restore_counts *out);

/* One row for each step, in the order they were given. */
void krul_restore_read_trace(krul_restore *restore, krul_restore_trace *out);

/* Cancel, join the threads and wait for the devices, free. NULL is allowed. */
void krul_restore_free(krul_restore *restore);

#ifdef __cplusplus
}
#endif

#endif /* KRUL_H */

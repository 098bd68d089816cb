/* codec_predict.c - cross-layer predictive transform coding: K and V of a layer from earlier layers.
 *
 * Layers of a run of tokens form a chain: each is predicted from what was decoded of its sources, so
 * the encoder decodes as it goes and errors do not pile up. What a decoder computes in floating point
 * never decides what a symbol means. FORMAT.md has the payload and the products. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "codec_predict.h"
#include "compressor.h"
#include "entropy.h"
#include "internal.h"

enum {
    HEADER_BYTES = KRUL_PREDICT_HEADER_BYTES,
    N_SYMBOLS = 256,
    MAX_SHIFT = KRUL_PREDICT_MAX_SHIFT,
    N_SHIFTS = 2 * MAX_SHIFT + 1,
    SHIFT_FLOATS = 12, /* N_SHIFTS, filled up to whole vectors of four */
    MAX_RICE_BITS = 7,
    LEVELS_PER_OCTAVE = 3,
    N_LANES = 8, /* of partial sums */
    MIN_FINENESS = KRUL_PREDICT_MIN_FINENESS,
    MAX_FINENESS = KRUL_PREDICT_MAX_FINENESS,
    N_FINENESSES = MAX_FINENESS - MIN_FINENESS + 1,
};

/* Coefficients from here on are not coded: the step is absurdly fine for them. */
static const float MAX_COEFFICIENT = 8388608.0f;

/* Up to 2^22, a number is a whole one when 1.5 times 2^23 was added to it. */
static const float MAX_EASY = 4194304.0f, TO_WHOLE = 12582912.0f;

/* What was decoded of one layer, until its last user has read it. */
typedef struct chain_layer {
    void *decoded; /* n_rows x width, centred, before rotary embedding, as products take it */
    int32_t n_users_left;
} chain_layer;

typedef struct predict_chain {
    struct predict_chain *next;
    int64_t token_start;
    int64_t n_rows;
    chain_layer *layers;
    pthread_mutex_t lock; /* who codes a chain from two threads is told so, and breaks nothing */
} predict_chain;

struct krul_predict {
    const krul_blas *blas;
    krul_predict_products products;
    krul_entropy_table *frequencies; /* what the tables were made of */
    krul_entropy_tables *tables;
    float (*costs)[N_SYMBOLS]; /* bits of each symbol by table */
    /* The same by class, plus fineness, from MIN_FINENESS on, and shift; for encoding. */
    float (*shift_costs)[N_SYMBOLS][SHIFT_FLOATS];
    int32_t n_tables;
    int32_t unit_table;
    int32_t n_layers;
    krul_predict_layer *layers;
    int16_t **levels; /* of each layer's deviations, in one allocation */
    int32_t *n_users; /* layers that have this one as a source */
    int64_t n_batch;
    int64_t token_start;
    int64_t n_tokens;
    uint8_t digest[KRUL_PREDICT_DIGEST_BYTES];
    pthread_mutex_t lock; /* guards the list of chains, not what is in them */
    predict_chain *chains;
};

static int64_t
width_of(const krul_predict_layer *layer)
{
    return (int64_t)2 * layer->n_heads * layer->head_dim;
}

/* ---- making one ready -------------------------------------------------------------------------- */

static krul_status
check_layer(const krul_predict_options *options, int32_t index, krul_error *err)
{
    const krul_predict_layer *layer = &options->layers[index];
    if (layer->n_heads == 0) {
        return KRUL_STATUS_OK;
    }
    if (layer->n_heads < 0 || layer->n_heads > KRUL_STORE_MAX_EXTENT || layer->head_dim < 1 ||
        layer->head_dim > KRUL_STORE_MAX_EXTENT || width_of(layer) > KRUL_PREDICT_MAX_WIDTH) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "layer %d has %d heads of %d numbers, twice, but may be %d wide",
                         (int)index, (int)layer->n_heads, (int)layer->head_dim,
                         (int)KRUL_PREDICT_MAX_WIDTH);
    }
    if (layer->n_sources < 0 || layer->n_sources > KRUL_PREDICT_MAX_SOURCES) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer %d has %d sources but may have 0 to %d",
                         (int)index, (int)layer->n_sources, (int)KRUL_PREDICT_MAX_SOURCES);
    }
    for (int32_t i = 0; i < layer->n_sources; i++) {
        int32_t source = layer->sources[i];
        if (source < 0 || source >= index ||
            width_of(&options->layers[source]) != width_of(layer)) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "layer %d has the source %d, which is no earlier layer as wide",
                             (int)index, (int)source);
        }
    }
    bool has_maps = layer->rank > 0 ? layer->left != NULL && layer->right != NULL
                                    : layer->maps != NULL;
    if (layer->rank < 0 || layer->rank > KRUL_PREDICT_MAX_WIDTH || layer->mean == NULL ||
        layer->backward == NULL || layer->deviation == NULL ||
        (layer->n_sources > 0 && !has_maps)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer %d lacks an array, or has the rank %d",
                         (int)index, (int)layer->rank);
    }
    const krul_predict_narrow *narrow = &layer->narrow;
    bool has_narrow_maps = layer->rank > 0 ? narrow->left != NULL && narrow->right != NULL
                                           : narrow->maps != NULL;
    if (options->products == KRUL_PRODUCTS_BF16 &&
        (narrow->backward == NULL || (layer->forward != NULL && narrow->forward == NULL) ||
         (layer->n_sources > 0 && !has_narrow_maps))) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer %d lacks a matrix in bfloat16",
                         (int)index);
    }
    const krul_rotary *rotary = &layer->rotary;
    int64_t n_rotated = rotary->convention == KRUL_ROTARY_NONE ? 0 : 2 * (int64_t)rotary->n_pairs;
    if (rotary->convention < KRUL_ROTARY_NONE || rotary->convention > KRUL_ROTARY_INTERLEAVED ||
        rotary->start < 0 || n_rotated < 0 || rotary->start + n_rotated > layer->head_dim ||
        (n_rotated > 0 && (rotary->cos == NULL || rotary->sin == NULL))) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "layer %d: %lld numbers of %d are rotated from number %d on, by rule %d",
                         (int)index, (long long)n_rotated, (int)layer->head_dim, (int)rotary->start,
                         (int)rotary->convention);
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_predict_check_options(const krul_predict_options *options, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (options->n_layers < 1 || options->n_layers > KRUL_STORE_MAX_LAYERS ||
        options->n_batch < 1 || options->n_batch > KRUL_STORE_MAX_EXTENT ||
        options->token_start < 0 || options->n_tokens < 0 ||
        options->token_start > KRUL_STORE_MAX_TOKENS || options->n_tokens > KRUL_STORE_MAX_TOKENS) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "n_layers is %d, n_batch %lld, token_start %lld and n_tokens %lld",
                         (int)options->n_layers, (long long)options->n_batch,
                         (long long)options->token_start, (long long)options->n_tokens);
    }
    if (options->products < KRUL_PRODUCTS_F32 || options->products > KRUL_PRODUCTS_BF16) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "products is %d but must be from %d to %d",
                         (int)options->products, (int)KRUL_PRODUCTS_F32, (int)KRUL_PRODUCTS_BF16);
    }
    if (options->products == KRUL_PRODUCTS_BF16 &&
        (options->blas == NULL || !krul_blas_has_bf16(options->blas))) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "products of bfloat16 are asked for but the library has none");
    }
    if (options->unit_table < 0 || options->unit_table >= options->n_tables) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "unit_table is %d but there are %d tables",
                         (int)options->unit_table, (int)options->n_tables);
    }
    for (int32_t i = 0; i < options->n_layers; i++) {
        KRUL_TRY(check_layer(options, i, err));
    }
done:
    return status;
}

/* Bits that each symbol takes; what a table has not costs an escape and a byte or two. */
static void
fill_costs(const krul_entropy_table *table, float costs[N_SYMBOLS])
{
    const float whole = KRUL_ENTROPY_N_SLOTS;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        uint16_t frequency = table->frequency[symbol];
        bool is_escape = frequency == 0 || symbol == KRUL_ENTROPY_ESCAPE;
        float part = is_escape ? table->frequency[KRUL_ENTROPY_ESCAPE] : frequency;
        costs[symbol] = log2f(whole / part) + (is_escape ? 10.0f : 0.0f);
    }
}

/* The levels of every layer's deviations, one allocation that `levels[0]` begins. */
static bool
new_levels(krul_predict *predict, const krul_predict_options *options)
{
    size_t n_levels = 0;
    for (int32_t i = 0; i < options->n_layers; i++) {
        n_levels += options->layers[i].n_heads > 0 ? (size_t)width_of(&options->layers[i]) : 0;
    }
    predict->levels = calloc((size_t)options->n_layers, sizeof *predict->levels);
    int16_t *next = malloc((n_levels + 1) * sizeof *next);
    if (predict->levels == NULL || next == NULL) {
        free(next);
        return false;
    }
    for (int32_t i = 0; i < options->n_layers; i++) {
        const krul_predict_layer *layer = &options->layers[i];
        predict->levels[i] = next;
        for (int64_t k = 0; layer->n_heads > 0 && k < width_of(layer); k++) {
            *next++ = (int16_t)krul_predict_level_of(layer->deviation[k]);
        }
    }
    return true;
}

/* The table of this number, or the nearest. */
static int32_t
nearest_table(int32_t table, int32_t n_tables)
{
    return table < 0 ? 0 : table < n_tables ? table : n_tables - 1;
}

/* Bits of each symbol of a class under every shift, side by side: a value looks in one place. */
static void
fill_shift_costs(const krul_predict *predict, int32_t own_class,
                 float shift_costs[N_SYMBOLS][SHIFT_FLOATS])
{
    memset(shift_costs, 0, N_SYMBOLS * sizeof *shift_costs);
    for (int32_t shift = 0; shift < N_SHIFTS; shift++) {
        int32_t table = nearest_table(own_class + shift - MAX_SHIFT, predict->n_tables);
        for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
            shift_costs[symbol][shift] = predict->costs[table][symbol];
        }
    }
}

krul_status
krul_predict_new(const krul_predict_options *options, krul_predict **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_predict *made = NULL;
    KRUL_TRY(krul_predict_check_options(options, err));
    made = calloc(1, sizeof *made);
    if (made == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a predictor");
    }
    pthread_mutex_init(&made->lock, NULL);
    KRUL_TRY(krul_entropy_tables_new(options->tables, options->n_tables, &made->tables, err));
    size_t n_layers = (size_t)options->n_layers;
    bool is_encoding = false;
    for (size_t i = 0; i < n_layers; i++) {
        const krul_predict_layer *layer = &options->layers[i];
        is_encoding = is_encoding || (layer->n_heads > 0 && layer->forward != NULL);
    }
    made->frequencies = malloc((size_t)options->n_tables * sizeof *made->frequencies);
    made->costs = malloc((size_t)options->n_tables * sizeof *made->costs);
    made->layers = malloc(n_layers * sizeof *made->layers);
    made->n_users = calloc(n_layers, sizeof *made->n_users);
    if (is_encoding) {
        made->shift_costs = malloc((size_t)(options->n_tables + N_FINENESSES - 1) *
                                   sizeof *made->shift_costs);
    }
    if (made->frequencies == NULL || made->costs == NULL || made->layers == NULL ||
        made->n_users == NULL || !new_levels(made, options) ||
        (is_encoding && made->shift_costs == NULL)) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu layers", n_layers);
        goto done;
    }
    for (int32_t i = 0; i < options->n_tables; i++) {
        fill_costs(&options->tables[i], made->costs[i]);
    }
    made->n_tables = options->n_tables;
    for (int32_t i = 0; i < options->n_tables + N_FINENESSES - 1 && is_encoding; i++) {
        fill_shift_costs(made, i + MIN_FINENESS, made->shift_costs[i]);
    }
    memcpy(made->frequencies, options->tables,
           (size_t)options->n_tables * sizeof *made->frequencies);
    memcpy(made->digest, options->digest, sizeof made->digest);
    memcpy(made->layers, options->layers, n_layers * sizeof *made->layers);
    for (size_t i = 0; i < n_layers; i++) {
        for (int32_t k = 0; made->layers[i].n_heads > 0 && k < made->layers[i].n_sources; k++) {
            made->n_users[made->layers[i].sources[k]]++;
        }
    }
    made->blas = options->blas;
    made->products = options->products;
    made->unit_table = options->unit_table;
    made->n_layers = options->n_layers;
    made->n_batch = options->n_batch;
    made->token_start = options->token_start;
    made->n_tokens = options->n_tokens;
    *out = made;
    made = NULL;
done:
    krul_predict_free(made);
    return status;
}

static void
free_chain(krul_predict *predict, predict_chain *chain)
{
    for (int32_t i = 0; i < predict->n_layers; i++) {
        free(chain->layers[i].decoded);
    }
    free(chain->layers);
    pthread_mutex_destroy(&chain->lock);
    free(chain);
}

void
krul_predict_free(krul_predict *predict)
{
    if (predict == NULL) {
        return;
    }
    while (predict->chains != NULL) {
        predict_chain *chain = predict->chains;
        predict->chains = chain->next;
        free_chain(predict, chain);
    }
    pthread_mutex_destroy(&predict->lock);
    krul_entropy_tables_free(predict->tables);
    free(predict->frequencies);
    free(predict->costs);
    free(predict->shift_costs);
    free(predict->layers);
    if (predict->levels != NULL) {
        free(predict->levels[0]);
    }
    free(predict->levels);
    free(predict->n_users);
    free(predict);
}

krul_predict_options
krul_predict_options_of(const krul_predict *predict)
{
    krul_predict_options options = {
        .blas = predict->blas,
        .products = predict->products,
        .tables = predict->frequencies,
        .n_tables = predict->n_tables,
        .unit_table = predict->unit_table,
        .n_layers = predict->n_layers,
        .layers = predict->layers,
        .n_batch = predict->n_batch,
        .token_start = predict->token_start,
        .n_tokens = predict->n_tokens,
    };
    memcpy(options.digest, predict->digest, sizeof options.digest);
    return options;
}

/* ---- chains ------------------------------------------------------------------------------------ */

/* The chain of a run of tokens, begun if there is none; *out is written only if all is well. */
static krul_status
find_chain(krul_predict *predict, int64_t token_start, int64_t n_rows, predict_chain **out,
           krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    pthread_mutex_lock(&predict->lock);
    predict_chain *chain = predict->chains;
    while (chain != NULL && (chain->token_start != token_start || chain->n_rows != n_rows)) {
        chain = chain->next;
    }
    if (chain == NULL) {
        chain = calloc(1, sizeof *chain);
        if (chain != NULL) {
            chain->layers = calloc((size_t)predict->n_layers, sizeof *chain->layers);
        }
        if (chain == NULL || chain->layers == NULL) {
            free(chain);
            status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a chain of %d layers",
                               (int)predict->n_layers);
            goto done;
        }
        pthread_mutex_init(&chain->lock, NULL);
        chain->token_start = token_start;
        chain->n_rows = n_rows;
        chain->next = predict->chains;
        predict->chains = chain;
    }
    *out = chain;
done:
    pthread_mutex_unlock(&predict->lock);
    return status;
}

static float *
new_floats(int64_t rows, int64_t columns, krul_error *err)
{
    /* At most 2^30 bytes of 16-bit values are in a block, so that this fits 64 bits by far. */
    float *made = malloc((size_t)rows * (size_t)columns * sizeof *made);
    if (made == NULL) {
        (void)krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld x %lld numbers",
                        (long long)rows, (long long)columns);
    }
    return made;
}

/* ---- products ---- */

/* Round in place to what bfloat16 can hold. */
static void
round_values(const krul_backend *backend, float *values, int64_t n_values)
{
    enum { N_AT_ONCE = 1024 }; /* 6 KiB stay in the first cache */
    uint16_t narrow[N_AT_ONCE];
    for (int64_t at = 0; at < n_values; at += N_AT_ONCE) {
        int64_t n = krul_min_i64(n_values - at, N_AT_ONCE);
        backend->narrow(KRUL_DTYPE_BF16, values + at, n, narrow);
        backend->widen(KRUL_DTYPE_BF16, narrow, n, values + at);
    }
}

/* Values as products take them: themselves, rounded if need be, or in bfloat16, in memory that
 * *narrow_out then owns. */
static krul_status
operand_of(const krul_backend *backend, const krul_predict *predict, float *values, int64_t rows,
           int64_t columns, uint16_t **narrow_out, const void **out, krul_error *err)
{
    int64_t n_values = rows * columns;
    *out = values;
    if (predict->products == KRUL_PRODUCTS_ROUNDED) {
        round_values(backend, values, n_values);
    }
    else if (predict->products == KRUL_PRODUCTS_BF16) {
        *narrow_out = malloc((size_t)n_values * sizeof **narrow_out + 1);
        if (*narrow_out == NULL) {
            return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld x %lld numbers",
                             (long long)rows, (long long)columns);
        }
        backend->narrow(KRUL_DTYPE_BF16, values, n_values, *narrow_out);
        *out = *narrow_out;
    }
    return KRUL_STATUS_OK;
}

/* The block of rows of a matrix that begins with number `first`, in the form that products take. */
static const void *
matrix_of(const krul_predict *predict, const float *wide, const uint16_t *narrow, int64_t first)
{
    return predict->products == KRUL_PRODUCTS_BF16 ? (const void *)(narrow + first)
                                                   : (const void *)(wide + first);
}

/* krul_blas_sgemm with operands as `operand_of` and `matrix_of` give them, rows without gaps. */
static krul_status
multiply(const krul_predict *predict, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
         float alpha, const void *a, const void *b, float beta, float *c, krul_error *err)
{
    int64_t lda = trans_a ? m : k, ldb = trans_b ? k : n;
    if (predict->products == KRUL_PRODUCTS_BF16) {
        return krul_blas_bf16_gemm(predict->blas, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb,
                                   beta, c, n, err);
    }
    return krul_blas_sgemm(predict->blas, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c,
                           n, err);
}

/* The prediction of a layer from what was decoded of its sources, zeros where it has none. */
static krul_status
predict_rows(const krul_backend *backend, const krul_predict *predict, const predict_chain *chain,
             int32_t index, float *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_predict_layer *layer = &predict->layers[index];
    int64_t width = width_of(layer), n_rows = chain->n_rows;
    float *product = NULL;
    uint16_t *narrow = NULL;
    if (layer->n_sources == 0) {
        memset(out, 0, (size_t)n_rows * (size_t)width * sizeof *out);
        return KRUL_STATUS_OK;
    }
    for (int32_t i = 0; i < layer->n_sources; i++) {
        if (chain->layers[layer->sources[i]].decoded == NULL) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "layer %d, tokens from %lld: its source, layer %d, was not decoded",
                             (int)index, (long long)chain->token_start, (int)layer->sources[i]);
        }
    }
    bool is_low = layer->rank > 0;
    if (is_low) {
        product = new_floats(n_rows, layer->rank, err);
        if (product == NULL) {
            return KRUL_STATUS_NO_MEMORY;
        }
    }
    for (int32_t i = 0; i < layer->n_sources; i++) {
        int64_t n_columns = is_low ? layer->rank : width;
        const void *map = matrix_of(predict, is_low ? layer->left : layer->maps,
                                    is_low ? layer->narrow.left : layer->narrow.maps,
                                    i * width * n_columns);
        KRUL_TRY(multiply(predict, false, false, n_rows, n_columns, width, 1.0f,
                          chain->layers[layer->sources[i]].decoded, map, i > 0 ? 1.0f : 0.0f,
                          is_low ? product : out, err));
    }
    if (is_low) {
        const void *left;
        KRUL_TRY(operand_of(backend, predict, product, n_rows, layer->rank, &narrow, &left, err));
        const void *right = matrix_of(predict, layer->right, layer->narrow.right, 0);
        KRUL_TRY(multiply(predict, false, false, n_rows, width, layer->rank, 1.0f, left, right,
                          0.0f, out, err));
    }
done:
    free(narrow);
    free(product);
    return status;
}

/* A layer's rows are known: keep them while they have users, and let its sources go. What `decoded`
 * points to is taken over, or freed by the caller where this fails. */
static krul_status
settle(const krul_backend *backend, krul_predict *predict, predict_chain *chain, int32_t index,
       float **decoded, krul_error *err)
{
    const krul_predict_layer *layer = &predict->layers[index];
    chain_layer *own = &chain->layers[index];
    uint16_t *narrow = NULL;
    const void *operand;
    void *kept = NULL;
    if (predict->n_users[index] > 0) {
        krul_status status = operand_of(backend, predict, *decoded, chain->n_rows, width_of(layer),
                                        &narrow, &operand, err);
        if (status != KRUL_STATUS_OK) {
            return status;
        }
        kept = narrow;
        if (kept == NULL) { /* they are kept as they are */
            kept = *decoded;
            *decoded = NULL;
        }
    }
    for (int32_t i = 0; i < layer->n_sources; i++) {
        chain_layer *source = &chain->layers[layer->sources[i]];
        if (--source->n_users_left == 0) {
            free(source->decoded);
            source->decoded = NULL;
        }
    }
    free(own->decoded);
    own->decoded = kept;
    own->n_users_left = predict->n_users[index];
    return KRUL_STATUS_OK;
}

/* ---- between views and rows -------------------------------------------------------------------- */

/* Cosine and sine of the pairs of one token. */
static void
angles_of(const krul_predict *predict, const krul_rotary *rotary, int64_t batch, int64_t token,
          const float **cos_out, const float **sin_out)
{
    int64_t row = (rotary->is_per_batch ? batch * predict->n_tokens : 0) + token -
                  predict->token_start;
    *cos_out = rotary->cos + row * rotary->n_pairs;
    *sin_out = rotary->sin + row * rotary->n_pairs;
}

/* Turn the pairs of one head by the angle, or back. */
static void
turn(const krul_rotary *rotary, const float *cos, const float *sin, bool is_back, float *head)
{
    int32_t n_pairs = rotary->n_pairs;
    bool is_half = rotary->convention == KRUL_ROTARY_HALF;
    float *first = head + rotary->start;
    float *second = first + (is_half ? n_pairs : 1);
    int32_t spacing = is_half ? 1 : 2;
    for (int32_t i = 0; i < n_pairs; i++) {
        float c = cos[i], s = sin[i];
        float x = first[i * spacing], y = second[i * spacing];
        if (is_back) {
            float square = c * c + s * s;
            first[i * spacing] = (x * c + y * s) / square;
            second[i * spacing] = (y * c - x * s) / square;
        }
        else {
            first[i * spacing] = x * c - y * s;
            second[i * spacing] = y * c + x * s;
        }
    }
}

static uint8_t *
row_of(const krul_view *view, int64_t batch, int64_t head, int64_t token)
{
    int64_t at = batch * view->stride[0] + head * view->stride[1] + token * view->stride[2];
    return (uint8_t *)view->data + (size_t)at * krul_dtype_bytes(view->dtype);
}

/* Rows of K and V, keys turned back, minus the mean. */
static void
load_rows(const krul_backend *backend, const krul_predict *predict, const krul_predict_layer *layer,
          int64_t token_start, const krul_view views[2], float *rows)
{
    const krul_rotary *rotary = &layer->rotary;
    int64_t width = width_of(layer), head_dim = layer->head_dim;
    for (int64_t batch = 0; batch < views[0].shape[0]; batch++) {
        for (int64_t token = 0; token < views[0].shape[2]; token++, rows += width) {
            float *to = rows;
            const float *cos = NULL, *sin = NULL;
            if (rotary->convention != KRUL_ROTARY_NONE) {
                angles_of(predict, rotary, batch, token_start + token, &cos, &sin);
            }
            for (int kv = 0; kv < 2; kv++) {
                for (int64_t head = 0; head < layer->n_heads; head++, to += head_dim) {
                    backend->widen(views[kv].dtype, row_of(&views[kv], batch, head, token),
                                   head_dim, to);
                    if (kv == 0 && cos != NULL) {
                        turn(rotary, cos, sin, true, to);
                    }
                }
            }
            for (int64_t i = 0; i < width; i++) {
                rows[i] -= layer->mean[i];
            }
        }
    }
}

/* The inverse; rows are left as they are. A view without data is not wanted. */
static krul_status
store_rows(const krul_backend *backend, const krul_predict *predict,
           const krul_predict_layer *layer, int64_t token_start, const float *rows,
           const krul_view views[2], krul_error *err)
{
    const krul_rotary *rotary = &layer->rotary;
    int64_t width = width_of(layer), head_dim = layer->head_dim;
    const krul_view *shape = views[0].data != NULL ? &views[0] : &views[1];
    if (shape->data == NULL) {
        return KRUL_STATUS_OK;
    }
    float *head_row = new_floats(1, head_dim, err);
    if (head_row == NULL) {
        return KRUL_STATUS_NO_MEMORY;
    }
    for (int64_t batch = 0; batch < shape->shape[0]; batch++) {
        for (int64_t token = 0; token < shape->shape[2]; token++, rows += width) {
            const float *cos = NULL, *sin = NULL;
            if (rotary->convention != KRUL_ROTARY_NONE) {
                angles_of(predict, rotary, batch, token_start + token, &cos, &sin);
            }
            for (int kv = 0; kv < 2; kv++) {
                for (int64_t head = 0; views[kv].data != NULL && head < layer->n_heads; head++) {
                    int64_t at = (kv * layer->n_heads + head) * head_dim;
                    for (int64_t i = 0; i < head_dim; i++) {
                        head_row[i] = rows[at + i] + layer->mean[at + i];
                    }
                    if (kv == 0 && cos != NULL) {
                        turn(rotary, cos, sin, false, head_row);
                    }
                    backend->narrow(views[kv].dtype, head_row, head_dim,
                                    row_of(&views[kv], batch, head, token));
                }
            }
        }
    }
    free(head_row);
    return KRUL_STATUS_OK;
}

/* ---- side information -------------------------------------------------------------------------- */

/* 2^(-2/3) and 2^(-1/3). */
static const double thirds[LEVELS_PER_OCTAVE - 1] = {0.62996052494743658, 0.79370052598409974};

int32_t
krul_predict_level_of(float value)
{
    int exponent;
    double mantissa = frexp((double)value, &exponent); /* [0.5, 1) */
    int32_t level = LEVELS_PER_OCTAVE * (exponent - 1);
    for (int i = 0; i < LEVELS_PER_OCTAVE - 1; i++) {
        level += mantissa >= thirds[i];
    }
    return level;
}

float
krul_predict_row_step(int32_t fineness)
{
    int32_t octaves = fineness / LEVELS_PER_OCTAVE, rest = fineness % LEVELS_PER_OCTAVE;
    if (rest < 0) {
        octaves--;
        rest += LEVELS_PER_OCTAVE;
    }
    float part = rest == 0 ? 1.0f : (float)thirds[LEVELS_PER_OCTAVE - 1 - rest];
    return ldexpf(part, -octaves);
}

/* The class that a component is expected to have; -1 is a column of zeros. */
static int32_t
expected_class(int32_t level, int32_t step_level, int32_t unit_table, int32_t n_tables)
{
    return nearest_table(unit_table + level - step_level, n_tables);
}

static uint32_t
fold(int32_t value)
{
    return value >= 0 ? 2u * (uint32_t)value : 2u * (uint32_t)-value - 1;
}

static int32_t
unfold(uint32_t folded)
{
    return folded % 2 == 0 ? (int32_t)(folded / 2) : -(int32_t)(folded / 2) - 1;
}

/* Bits, the lowest of each byte first. */
typedef struct bit_writer {
    uint8_t *bytes;
    size_t n_bits;
} bit_writer;

static void
put_bit(bit_writer *writer, uint32_t bit)
{
    if (writer->n_bits % 8 == 0) {
        writer->bytes[writer->n_bits / 8] = 0;
    }
    writer->bytes[writer->n_bits / 8] |= (uint8_t)(bit << writer->n_bits % 8);
    writer->n_bits++;
}

/* Rice: the upper part in ones and a zero, then the lower rice_bits. */
static void
put_rice(bit_writer *writer, uint32_t value, int rice_bits)
{
    for (uint32_t i = 0; i < value >> rice_bits; i++) {
        put_bit(writer, 1);
    }
    put_bit(writer, 0);
    for (int i = 0; i < rice_bits; i++) {
        put_bit(writer, value >> i & 1);
    }
}

static int
best_rice_bits(const uint32_t *values, int64_t n_values)
{
    int best = 0;
    uint64_t best_bits = UINT64_MAX;
    for (int rice_bits = 0; rice_bits <= MAX_RICE_BITS; rice_bits++) {
        uint64_t n_bits = 0;
        for (int64_t i = 0; i < n_values; i++) {
            n_bits += (values[i] >> rice_bits) + 1u + (uint32_t)rice_bits;
        }
        if (n_bits < best_bits) {
            best_bits = n_bits;
            best = rice_bits;
        }
    }
    return best;
}

typedef struct bit_reader {
    const uint8_t *bytes;
    size_t n_bits;
    size_t at;
} bit_reader;

/* The bits that come next, the next of all lowest, at least 57 if there are so many; zeros above. */
static inline uint64_t
peek_bits(const bit_reader *reader, uint32_t *n_bits_out)
{
    size_t from = reader->at / 8, shift = reader->at % 8;
    size_t n_bytes = reader->n_bits / 8 - from;
    uint64_t window = 0;
    if (n_bytes >= sizeof window) {
        n_bytes = sizeof window;
        window = krul_load_u64(reader->bytes + from);
    }
    else {
        for (size_t i = 0; i < n_bytes; i++) {
            window |= (uint64_t)reader->bytes[from + i] << 8 * i;
        }
    }
    *n_bits_out = (uint32_t)(8 * n_bytes - (n_bytes > 0 ? shift : 0));
    return window >> shift;
}

/* False where the bits end, or the value is above `largest`. */
static inline bool
take_rice(bit_reader *reader, int rice_bits, uint32_t largest, uint32_t *out)
{
    uint32_t upper = 0, n_bits;
    for (;;) {
        uint64_t window = peek_bits(reader, &n_bits);
        uint32_t n_ones = ~window == 0 ? 64 : (uint32_t)__builtin_ctzll(~window);
        upper += n_ones;
        reader->at += n_ones;
        if (n_bits == 0 || upper > largest) {
            return false;
        }
        if (n_ones < n_bits) { /* the zero is there, too */
            reader->at++;
            break;
        }
    }
    uint32_t lower = (uint32_t)peek_bits(reader, &n_bits);
    if (n_bits < (uint32_t)rice_bits) {
        return false;
    }
    reader->at += (size_t)rice_bits;
    *out = upper << rice_bits | (lower & ((1u << rice_bits) - 1));
    return *out <= largest;
}

/* ---- encoder ----------------------------------------------------------------------------------- */

/* What one block is coded with, until it is written. */
typedef struct predict_coding {
    int64_t width;
    int64_t n_rows;
    float *coefficients; /* width x n_rows; after quantising, whole numbers */
    int32_t *values; /* the same as integers */
    uint8_t *classes; /* width */
    int8_t *fineness; /* n_rows */
    int8_t *shifts; /* n_rows, fineness included */
    float *row_steps; /* n_rows: parts of the step */
    bool is_plain; /* every fineness is 0 */
    uint32_t *folded; /* width, then twice n_rows */
    float *shift_bits; /* n_rows x SHIFT_FLOATS */
} predict_coding;

static void
free_coding(predict_coding *coding)
{
    free(coding->coefficients);
    free(coding->values);
    free(coding->classes);
    free(coding->fineness);
    free(coding->shifts);
    free(coding->row_steps);
    free(coding->folded);
    free(coding->shift_bits);
}

static bool
new_coding(predict_coding *coding, int64_t width, int64_t n_rows, bool is_encoding)
{
    size_t n_columns = (size_t)width, rows = (size_t)n_rows;
    memset(coding, 0, sizeof *coding);
    coding->width = width;
    coding->n_rows = n_rows;
    coding->coefficients = malloc(n_columns * rows * sizeof *coding->coefficients);
    coding->classes = malloc(n_columns);
    coding->fineness = malloc(rows);
    coding->shifts = malloc(rows);
    coding->row_steps = malloc(rows * sizeof *coding->row_steps);
    if (is_encoding) {
        coding->values = malloc(n_columns * rows * sizeof *coding->values);
        coding->folded = malloc((n_columns + 2 * rows) * sizeof *coding->folded);
        coding->shift_bits = malloc(rows * SHIFT_FLOATS * sizeof *coding->shift_bits);
    }
    return coding->coefficients != NULL && coding->classes != NULL && coding->fineness != NULL &&
           coding->shifts != NULL && coding->row_steps != NULL &&
           (!is_encoding ||
            (coding->values != NULL && coding->folded != NULL && coding->shift_bits != NULL));
}

/* Work out the rows' steps from their fineness. */
static void
fill_row_steps(predict_coding *coding)
{
    coding->is_plain = true;
    for (int64_t row = 0; row < coding->n_rows; row++) {
        coding->row_steps[row] = krul_predict_row_step(coding->fineness[row]);
        coding->is_plain = coding->is_plain && coding->fineness[row] == 0;
    }
}

/* Multiply the first columns of the numbers by the rows' steps. */
static void
scale_rows(predict_coding *coding, int64_t n_columns)
{
    float *numbers = coding->coefficients;
    for (int64_t column = 0; column < n_columns; column++, numbers += coding->n_rows) {
        for (int64_t row = 0; row < coding->n_rows; row++) {
            numbers[row] *= coding->row_steps[row];
        }
    }
}

/* Multiply by the rows' inverse steps and round; how many are not below `most`. Where that is
 * MAX_EASY, rounding is two additions, which every processor does vector by vector: between 2^23 and
 * 2^24 floats are whole numbers. */
static inline int32_t
round_column(float *restrict coefficients, const float *restrict inverse, int64_t n_rows,
             float most, int32_t *restrict values_out)
{
    int32_t n_large = 0;
    for (int64_t row = 0; row < n_rows; row++) {
        n_large += !(fabsf(coefficients[row] * inverse[row]) < most);
    }
    for (int64_t row = 0; n_large == 0 && row < n_rows; row++) {
        float scaled = coefficients[row] * inverse[row];
        float whole = most == MAX_EASY ? (scaled + TO_WHOLE) - TO_WHOLE : rintf(scaled);
        coefficients[row] = whole;
        values_out[row] = (int32_t)whole;
    }
    return n_large;
}

/* Divide by the rows' steps and round; false where a coefficient is not finite or absurdly large. */
static bool
quantise(predict_coding *coding, float step)
{
    float *inverse = coding->shift_bits; /* which is not in use yet */
    for (int64_t row = 0; row < coding->n_rows; row++) {
        inverse[row] = 1.0f / (step * coding->row_steps[row]);
    }
    int32_t n_bad = 0;
    for (int64_t column = 0; column < coding->width && n_bad == 0; column++) {
        float *coefficients = coding->coefficients + column * coding->n_rows;
        int32_t *values = coding->values + column * coding->n_rows;
        if (round_column(coefficients, inverse, coding->n_rows, MAX_EASY, values) != 0) {
            n_bad = round_column(coefficients, inverse, coding->n_rows, MAX_COEFFICIENT, values);
        }
    }
    return n_bad == 0;
}

static float
sum_of_lanes(const float sums[N_LANES])
{
    float sum = 0;
    for (int i = 0; i < N_LANES; i++) {
        sum += sums[i];
    }
    return sum;
}

/* How often a column has each symbol in rows of each fineness. */
typedef struct column_counts {
    int32_t of[N_FINENESSES][N_SYMBOLS];
    bool is_used[N_FINENESSES];
    int low[N_FINENESSES], high[N_FINENESSES]; /* symbols that occur lie between */
} column_counts;

/* Bits of a column under a class. */
static float
class_bits_of(const krul_predict *predict, const column_counts *counts, int32_t own_class)
{
    float n_bits = 0;
    for (int32_t i = 0; i < N_FINENESSES; i++) {
        if (counts->is_used[i]) {
            int32_t table = nearest_table(own_class + i + MIN_FINENESS, predict->n_tables);
            const float *costs = predict->costs[table];
            for (int symbol = counts->low[i]; symbol <= counts->high[i]; symbol++) {
                n_bits += (float)counts->of[i][symbol] * costs[symbol];
            }
        }
    }
    return n_bits;
}

/* The sum of a column's sizes, in several partial sums that one vector adds to. */
static float
size_of(const int32_t *values, const float *row_steps, int64_t n_rows)
{
    float sums[N_LANES] = {0};
    int64_t row = 0;
    for (; row + N_LANES <= n_rows; row += N_LANES) {
        for (int i = 0; i < N_LANES; i++) {
            sums[i] += fabsf((float)values[row + i]) * row_steps[row + i];
        }
    }
    for (; row < n_rows; row++) {
        sums[0] += fabsf((float)values[row]) * row_steps[row];
    }
    return sum_of_lanes(sums);
}

/* The class that codes a column in the fewest bits, KRUL_ENTROPY_NO_SYMBOLS for zeros: sought around
 * the expected one and the one that the numbers' mean size suggests, further upwards, where fewer
 * numbers are escapes. */
static uint8_t
choose_class(const krul_predict *predict, const predict_coding *coding, int64_t column,
             int32_t expected, column_counts *counts)
{
    const int32_t *values = coding->values + column * coding->n_rows;
    for (int32_t i = 0; i < N_FINENESSES; i++) {
        if (counts->is_used[i]) {
            memset(counts->of[i], 0, sizeof counts->of[i]);
            counts->low[i] = N_SYMBOLS - 1;
            counts->high[i] = 0;
        }
    }
    float sum = size_of(values, coding->row_steps, coding->n_rows);
    if (sum == 0) {
        return KRUL_ENTROPY_NO_SYMBOLS;
    }
    for (int64_t row = 0; row < coding->n_rows; row++) {
        int32_t own = coding->fineness[row] - MIN_FINENESS;
        int64_t symbol = (int64_t)values[row] + KRUL_ENTROPY_ZERO;
        if (symbol < 0 || symbol >= KRUL_ENTROPY_ESCAPE) {
            symbol = KRUL_ENTROPY_ESCAPE;
        }
        counts->of[own][symbol]++;
        counts->low[own] = symbol < counts->low[own] ? (int)symbol : counts->low[own];
        counts->high[own] = symbol > counts->high[own] ? (int)symbol : counts->high[own];
    }
    int32_t size_level = krul_predict_level_of(1.5f * sum / (float)coding->n_rows);
    int32_t suggested = nearest_table(predict->unit_table + size_level, predict->n_tables);
    int32_t low = expected < suggested ? expected : suggested;
    int32_t high = expected < suggested ? suggested : expected;
    int32_t first = nearest_table(low - LEVELS_PER_OCTAVE, predict->n_tables);
    int32_t last = nearest_table(high + 2 * LEVELS_PER_OCTAVE, predict->n_tables);
    int32_t best = expected;
    float best_bits = INFINITY;
    for (int32_t table = first; table <= last; table++) {
        float n_bits = class_bits_of(predict, counts, table);
        if (n_bits < best_bits) {
            best_bits = n_bits;
            best = table;
        }
    }
    return (uint8_t)best;
}

/* The class of every component. */
static void
choose_classes(const krul_predict *predict, int32_t index, float step, predict_coding *coding,
               column_counts *counts)
{
    int32_t step_level = krul_predict_level_of(step);
    memset(counts->is_used, 0, sizeof counts->is_used);
    for (int64_t row = 0; row < coding->n_rows; row++) {
        counts->is_used[coding->fineness[row] - MIN_FINENESS] = true;
    }
    for (int64_t i = 0; i < coding->width; i++) {
        int32_t expected = expected_class(predict->levels[index][i], step_level,
                                          predict->unit_table, predict->n_tables);
        coding->classes[i] = choose_class(predict, coding, i, expected, counts);
    }
}

/* Add SHIFT_FLOATS numbers, in vectors. */
static inline void
add_floats(float *restrict sums, const float *restrict more)
{
    for (int i = 0; i < SHIFT_FLOATS; i++) {
        sums[i] += more[i];
    }
}

/* For every row, how far its numbers lie above or below the classes of their components, beyond what
 * its fineness alone makes of them. */
static void
choose_shifts(const krul_predict *predict, predict_coding *coding)
{
    int64_t n_rows = coding->n_rows;
    memset(coding->shift_bits, 0, (size_t)n_rows * SHIFT_FLOATS * sizeof *coding->shift_bits);
    for (int64_t column = 0; column < coding->width; column++) {
        if (coding->classes[column] == KRUL_ENTROPY_NO_SYMBOLS) {
            continue;
        }
        const int32_t *values = coding->values + column * n_rows;
        int32_t lowest = coding->classes[column] - MIN_FINENESS;
        float *restrict n_bits = coding->shift_bits;
        for (int64_t row = 0; row < n_rows; row++, n_bits += SHIFT_FLOATS) {
            const float *costs = predict->shift_costs[lowest + coding->fineness[row]][0];
            uint32_t symbol = (uint32_t)values[row] + KRUL_ENTROPY_ZERO;
            symbol = symbol < KRUL_ENTROPY_ESCAPE ? symbol : KRUL_ENTROPY_ESCAPE;
            add_floats(n_bits, costs + symbol * SHIFT_FLOATS);
        }
    }
    for (int64_t row = 0; row < n_rows; row++) {
        float best_bits = INFINITY;
        for (int shift = 0; shift < N_SHIFTS; shift++) {
            /* What telling a shift costs is about its size in bits. */
            float n_bits = coding->shift_bits[row * SHIFT_FLOATS + shift] +
                           (float)abs(shift - MAX_SHIFT);
            if (n_bits < best_bits) {
                best_bits = n_bits;
                coding->shifts[row] = (int8_t)(coding->fineness[row] + shift - MAX_SHIFT);
            }
        }
    }
}

/* Header and side information; returns their bytes. */
static size_t
write_side(const krul_predict *predict, int32_t index, float step, predict_coding *coding,
           uint8_t *out)
{
    int32_t step_level = krul_predict_level_of(step);
    uint32_t *classes = coding->folded, *fineness = classes + coding->width;
    uint32_t *shifts = fineness + coding->n_rows;
    for (int64_t i = 0; i < coding->width; i++) {
        int32_t actual = coding->classes[i] == KRUL_ENTROPY_NO_SYMBOLS ? -1 : coding->classes[i];
        classes[i] = fold(actual - expected_class(predict->levels[index][i], step_level,
                                                  predict->unit_table, predict->n_tables));
    }
    for (int64_t i = 0; i < coding->n_rows; i++) {
        fineness[i] = fold(coding->fineness[i]);
        shifts[i] = fold(coding->shifts[i] - coding->fineness[i]);
    }
    int class_bits = best_rice_bits(classes, coding->width);
    int fineness_bits = best_rice_bits(fineness, coding->n_rows);
    int shift_bits = best_rice_bits(shifts, coding->n_rows);
    bit_writer writer = {.bytes = out + HEADER_BYTES};
    for (int64_t i = 0; i < coding->width; i++) {
        put_rice(&writer, classes[i], class_bits);
    }
    for (int64_t i = 0; i < coding->n_rows && !coding->is_plain; i++) {
        put_rice(&writer, fineness[i], fineness_bits);
    }
    for (int64_t i = 0; i < coding->n_rows; i++) {
        put_rice(&writer, shifts[i], shift_bits);
    }
    size_t side_bytes = (writer.n_bits + 7) / 8;
    uint32_t bits;
    memcpy(&bits, &step, sizeof bits);
    krul_store_u32(out, bits);
    krul_store_u32(out + 4, (uint32_t)side_bytes);
    out[8] = (uint8_t)class_bits;
    out[9] = (uint8_t)shift_bits;
    out[10] = coding->is_plain ? 0 : (uint8_t)(1 + fineness_bits);
    out[11] = 0;
    return HEADER_BYTES + side_bytes;
}

/* Most bits of a class: the largest folded number in ones, at rice_bits 0. */
static size_t
side_bound(int64_t width, int64_t n_rows)
{
    return HEADER_BYTES + (size_t)(width + 2 * n_rows) * (2 * KRUL_ENTROPY_MAX_TABLES + 2) / 8 + 1;
}

/* Is there a view, and does it fit the layer and the chain's tokens? */
static krul_status
check_views(const krul_predict *predict, int32_t index, int64_t token_start, int64_t n_tokens,
            const krul_view views[2], bool is_output, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    static const char *const names[2] = {"keys", "values"};
    if (index < 0 || index >= predict->n_layers || predict->layers[index].n_heads == 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "layer %d takes no part in this profile of %d layers", (int)index,
                         (int)predict->n_layers);
    }
    const krul_predict_layer *layer = &predict->layers[index];
    int64_t end;
    if (n_tokens < 1 || krul_add_overflows_i64(token_start, n_tokens, &end) ||
        token_start < predict->token_start || end > predict->token_start + predict->n_tokens) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%lld tokens from %lld are not within the %lld from %lld whose positions "
                         "are known",
                         (long long)n_tokens, (long long)token_start, (long long)predict->n_tokens,
                         (long long)predict->token_start);
    }
    int64_t n_values;
    if (krul_multiply_overflows_i64(predict->n_batch * n_tokens, width_of(layer), &n_values) ||
        n_values > KRUL_ENTROPY_MAX_COLUMN_VALUES) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%lld tokens of %lld rows are too many for a block of width %lld",
                         (long long)n_tokens, (long long)predict->n_batch,
                         (long long)width_of(layer));
    }
    for (int kv = 0; kv < 2; kv++) {
        const krul_view *view = &views[kv];
        if (is_output && view->data == NULL) {
            continue;
        }
        if (is_output) {
            KRUL_TRY(krul_view_check_output(view, names[kv], err));
        }
        else {
            KRUL_TRY(krul_view_check(view, names[kv], err));
        }
        if (view->device_type != KRUL_DEVICE_CPU) {
            return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                             "%s is on device type %d but codecs work on the CPU (%d) only",
                             names[kv], (int)view->device_type, (int)KRUL_DEVICE_CPU);
        }
        if (view->shape[0] != predict->n_batch || view->shape[1] != layer->n_heads ||
            view->shape[2] != n_tokens || view->shape[3] != layer->head_dim) {
            return krul_fail(
                err, KRUL_STATUS_BAD_SHAPE,
                "%s is (%lld, %lld, %lld, %lld) but layer %d needs (%lld, %d, %lld, %d)", names[kv],
                (long long)view->shape[0], (long long)view->shape[1], (long long)view->shape[2],
                (long long)view->shape[3], (int)index, (long long)predict->n_batch,
                (int)layer->n_heads, (long long)n_tokens, (int)layer->head_dim);
        }
    }
done:
    return status;
}

/* The largest number that may come back, far enough below the dtype's that rounding elsewhere cannot
 * take it over, rotated or not. */
static float
largest_decoded(krul_dtype dtype)
{
    return dtype == KRUL_DTYPE_F16 ? 45000.0f : 1e38f;
}

/* How much longer turning makes a pair at most, at least 1: models may scale cosine and sine. */
static float
largest_turn(const krul_predict *predict, const krul_rotary *rotary, int64_t token_start,
             int64_t n_tokens)
{
    float largest = 1;
    int64_t n_batch = rotary->is_per_batch ? predict->n_batch : 1;
    for (int64_t batch = 0; batch < n_batch && rotary->convention != KRUL_ROTARY_NONE; batch++) {
        const float *cos, *sin;
        angles_of(predict, rotary, batch, token_start, &cos, &sin);
        for (int64_t i = 0; i < n_tokens * rotary->n_pairs; i++) {
            float square = cos[i] * cos[i] + sin[i] * sin[i];
            largest = square > largest ? square : largest;
        }
    }
    return sqrtf(largest);
}

/* Add to sum |x - decoded|^2 and sum |x|^2 those of K or V of one row, and find what is largest of
 * what comes back, in several partial results that one vector holds. */
static void
measure_half(const float *exact, const float *decoded, const float *mean, int64_t width,
             float *largest, double error_out[2])
{
    float errors[N_LANES] = {0}, powers[N_LANES] = {0}, sizes[N_LANES] = {0};
    int64_t at = 0;
    for (; at + N_LANES <= width; at += N_LANES) {
        for (int i = 0; i < N_LANES; i++) {
            float difference = exact[at + i] - decoded[at + i];
            float value = exact[at + i] + mean[at + i];
            float size = fabsf(decoded[at + i] + mean[at + i]);
            errors[i] += difference * difference;
            powers[i] += value * value;
            sizes[i] = size > sizes[i] ? size : sizes[i];
        }
    }
    for (; at < width; at++) {
        float difference = exact[at] - decoded[at];
        float value = exact[at] + mean[at];
        float size = fabsf(decoded[at] + mean[at]);
        errors[0] += difference * difference;
        powers[0] += value * value;
        sizes[0] = size > sizes[0] ? size : sizes[0];
    }
    for (int i = 0; i < N_LANES; i++) {
        *largest = sizes[i] > *largest ? sizes[i] : *largest;
    }
    error_out[0] += (double)sum_of_lanes(errors);
    error_out[1] += (double)sum_of_lanes(powers);
}

/* Add errors up, and see that all that will come back is finite; limits are of K and of V. */
static bool
measure_rows(const krul_predict_layer *layer, const float *exact, const float *decoded,
             int64_t n_rows, const float limits[2], double error_out[2])
{
    int64_t width = width_of(layer);
    float largest[2] = {0, 0};
    for (int64_t row = 0; row < n_rows; row++, exact += width, decoded += width) {
        for (int kv = 0; kv < 2; kv++) {
            int64_t at = kv * width / 2;
            measure_half(exact + at, decoded + at, layer->mean + at, width / 2, &largest[kv],
                         error_out);
        }
    }
    return largest[0] < limits[0] && largest[1] < limits[1] && isfinite(error_out[0]) &&
           isfinite(error_out[1]);
}

krul_status
krul_predict_bound(const krul_predict *predict, int32_t layer, int64_t n_tokens,
                   size_t *n_bytes_out, krul_error *err)
{
    if (layer < 0 || layer >= predict->n_layers || predict->layers[layer].n_heads == 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "layer %d takes no part in this profile of %d layers", (int)layer,
                         (int)predict->n_layers);
    }
    int64_t width = width_of(&predict->layers[layer]);
    int64_t n_rows;
    size_t bound = n_tokens < 0 || krul_multiply_overflows_i64(predict->n_batch, n_tokens, &n_rows)
                       ? 0
                       : krul_entropy_columns_bound(width, n_rows);
    if (bound == 0) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "%lld tokens are too many for a block",
                         (long long)n_tokens);
    }
    *n_bytes_out = bound + side_bound(width, n_rows);
    return KRUL_STATUS_OK;
}

krul_status
krul_predict_encode(const krul_backend *backend, krul_predict *predict, int32_t index,
                    int64_t token_start, const krul_view views[2], float step,
                    const int8_t *fineness, uint8_t *payload_out, size_t capacity_bytes,
                    size_t *n_bytes_out, bool *fits_out, double error_out[2], krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    predict_coding coding = {0};
    predict_chain *chain = NULL;
    float *exact = NULL, *decoded = NULL, *residual = NULL;
    uint16_t *narrow = NULL, *narrow_coefficients = NULL;
    column_counts *counts = NULL;
    size_t bound, stream_bytes;
    int64_t n_tokens = views[0].shape[2];
    KRUL_TRY(check_views(predict, index, token_start, n_tokens, views, false, err));
    KRUL_TRY(krul_predict_bound(predict, index, n_tokens, &bound, err));
    const krul_predict_layer *layer = &predict->layers[index];
    int64_t width = width_of(layer), n_rows = predict->n_batch * n_tokens;
    if (layer->forward == NULL) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer %d has no forward basis", (int)index);
    }
    if (!(step >= KRUL_PREDICT_MIN_STEP && step <= KRUL_PREDICT_MAX_STEP)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step is %g but must be from %g to %g",
                         (double)step, (double)KRUL_PREDICT_MIN_STEP,
                         (double)KRUL_PREDICT_MAX_STEP);
    }
    for (int64_t i = 0; fineness != NULL && i < n_tokens; i++) {
        if (fineness[i] < MIN_FINENESS || fineness[i] > MAX_FINENESS) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "the fineness of token %lld is %d but must be from %d to %d",
                             (long long)(token_start + i), fineness[i], (int)MIN_FINENESS,
                             (int)MAX_FINENESS);
        }
    }
    if (capacity_bytes < bound) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "capacity_bytes is %zu but the block may need %zu", capacity_bytes, bound);
    }
    KRUL_TRY(find_chain(predict, token_start, n_rows, &chain, err));
    pthread_mutex_lock(&chain->lock);
    exact = new_floats(n_rows, width, err);
    decoded = new_floats(n_rows, width, err);
    residual = new_floats(n_rows, width, err);
    counts = malloc(sizeof *counts);
    if (exact == NULL || decoded == NULL || residual == NULL || counts == NULL ||
        !new_coding(&coding, width, n_rows, true)) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld x %lld numbers",
                           (long long)n_rows, (long long)width);
        goto done;
    }
    for (int64_t row = 0; row < n_rows; row++) {
        coding.fineness[row] = fineness == NULL ? 0 : fineness[row % n_tokens];
    }
    fill_row_steps(&coding);
    load_rows(backend, predict, layer, token_start, views, exact);
    KRUL_TRY(predict_rows(backend, predict, chain, index, decoded, err));
    for (int64_t i = 0; i < n_rows * width; i++) {
        residual[i] = exact[i] - decoded[i];
    }
    const void *wanted;
    KRUL_TRY(operand_of(backend, predict, residual, n_rows, width, &narrow, &wanted, err));
    KRUL_TRY(multiply(predict, true, true, width, n_rows, width, 1.0f,
                      matrix_of(predict, layer->forward, layer->narrow.forward, 0), wanted, 0.0f,
                      coding.coefficients, err));
    double error[2] = {0, 0};
    bool fits = quantise(&coding, step);
    if (fits) {
        const void *coefficients;
        if (!coding.is_plain) {
            scale_rows(&coding, width);
        }
        KRUL_TRY(operand_of(backend, predict, coding.coefficients, width, n_rows,
                            &narrow_coefficients, &coefficients, err));
        KRUL_TRY(multiply(predict, true, false, n_rows, width, width, step, coefficients,
                          matrix_of(predict, layer->backward, layer->narrow.backward, 0), 1.0f,
                          decoded, err));
        const float limits[2] = {
            largest_decoded(views[0].dtype) /
                largest_turn(predict, &layer->rotary, token_start, n_tokens),
            largest_decoded(views[1].dtype),
        };
        fits = measure_rows(layer, exact, decoded, n_rows, limits, error);
    }
    if (fits) {
        choose_classes(predict, index, step, &coding, counts);
        choose_shifts(predict, &coding);
        size_t side_bytes = write_side(predict, index, step, &coding, payload_out);
        KRUL_TRY(krul_entropy_encode_columns(
            predict->tables, coding.values, width, n_rows, coding.classes, coding.shifts,
            payload_out + side_bytes, capacity_bytes - side_bytes, &stream_bytes, err));
        KRUL_TRY(settle(backend, predict, chain, index, &decoded, err));
        *n_bytes_out = side_bytes + stream_bytes;
    }
    *fits_out = fits;
    error_out[0] = error[0];
    error_out[1] = error[1];
done:
    if (chain != NULL) {
        pthread_mutex_unlock(&chain->lock);
    }
    free_coding(&coding);
    free(counts);
    free(narrow);
    free(narrow_coefficients);
    free(exact);
    free(decoded);
    free(residual);
    return status;
}

/* ---- decoder ----------------------------------------------------------------------------------- */

krul_status
krul_predict_read_side(const int16_t *levels, int64_t width, int64_t n_rows, int32_t unit_table,
                       int32_t n_tables, const uint8_t *payload, size_t payload_bytes,
                       uint8_t *classes_out, int8_t *fineness_out, int8_t *shifts_out,
                       float *step_out, size_t *side_bytes_out, krul_error *err)
{
    if (payload_bytes < HEADER_BYTES) {
        return krul_fail(err, KRUL_STATUS_CORRUPT, "predict block has %zu bytes, its header %d",
                         payload_bytes, (int)HEADER_BYTES);
    }
    uint32_t bits = krul_load_u32(payload);
    size_t side_bytes = krul_load_u32(payload + 4);
    int class_bits = payload[8], shift_bits = payload[9], fineness_bits = payload[10] - 1;
    float step;
    memcpy(&step, &bits, sizeof step);
    if (!(step >= KRUL_PREDICT_MIN_STEP && step <= KRUL_PREDICT_MAX_STEP) ||
        side_bytes > payload_bytes - HEADER_BYTES || class_bits > MAX_RICE_BITS ||
        shift_bits > MAX_RICE_BITS || fineness_bits > MAX_RICE_BITS || payload[11] != 0) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "predict block of %zu bytes has a step of %g, %zu bytes of side "
                         "information in %d, %d and %d bits",
                         payload_bytes, (double)step, side_bytes, class_bits, shift_bits,
                         fineness_bits);
    }
    int32_t step_level = krul_predict_level_of(step);
    bit_reader reader = {.bytes = payload + HEADER_BYTES, .n_bits = 8 * side_bytes};
    for (int64_t i = 0; i < width; i++) {
        uint32_t folded;
        int32_t actual = -2;
        if (take_rice(&reader, class_bits, 2 * KRUL_ENTROPY_MAX_TABLES + 1, &folded)) {
            actual = unfold(folded) + expected_class(levels[i], step_level, unit_table, n_tables);
        }
        if (actual < -1 || actual >= n_tables) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "predict block: the class of component %lld is malformed",
                             (long long)i);
        }
        classes_out[i] = actual < 0 ? KRUL_ENTROPY_NO_SYMBOLS : (uint8_t)actual;
    }
    memset(fineness_out, 0, (size_t)n_rows);
    for (int64_t i = 0; i < n_rows && fineness_bits >= 0; i++) {
        uint32_t folded;
        int32_t fineness = MAX_FINENESS + 1;
        if (take_rice(&reader, fineness_bits, 2 * MAX_FINENESS, &folded)) {
            fineness = unfold(folded);
        }
        if (fineness < MIN_FINENESS || fineness > MAX_FINENESS) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "predict block: the fineness of token %lld is malformed",
                             (long long)i);
        }
        fineness_out[i] = (int8_t)fineness;
    }
    for (int64_t i = 0; i < n_rows; i++) {
        uint32_t folded;
        if (!take_rice(&reader, shift_bits, 2 * MAX_SHIFT, &folded)) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "predict block: the shift of token %lld is malformed", (long long)i);
        }
        shifts_out[i] = (int8_t)(fineness_out[i] + unfold(folded));
    }
    bool is_padding = reader.n_bits - reader.at < 8;
    while (is_padding && reader.at < reader.n_bits) {
        is_padding = (reader.bytes[reader.at / 8] >> reader.at % 8 & 1) == 0;
        reader.at++;
    }
    if (!is_padding) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "predict block: %zu bytes of side information are not used up",
                         side_bytes);
    }
    *step_out = step;
    *side_bytes_out = HEADER_BYTES + side_bytes;
    return KRUL_STATUS_OK;
}

krul_status
krul_predict_decode(const krul_backend *backend, krul_predict *predict, int32_t index,
                    int64_t token_start, int64_t n_tokens, const uint8_t *payload,
                    size_t payload_bytes, const krul_view views[2], krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    predict_coding coding = {0};
    predict_chain *chain = NULL;
    float *decoded = NULL;
    uint16_t *narrow = NULL;
    float step = 0;
    size_t side_bytes = 0;
    KRUL_TRY(check_views(predict, index, token_start, n_tokens, views, true, err));
    const krul_predict_layer *layer = &predict->layers[index];
    int64_t width = width_of(layer), n_rows = predict->n_batch * n_tokens;
    KRUL_TRY(find_chain(predict, token_start, n_rows, &chain, err));
    pthread_mutex_lock(&chain->lock);
    decoded = new_floats(n_rows, width, err);
    if (decoded == NULL || !new_coding(&coding, width, n_rows, false)) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld x %lld numbers",
                           (long long)n_rows, (long long)width);
        goto done;
    }
    KRUL_TRY(krul_predict_read_side(predict->levels[index], width, n_rows, predict->unit_table,
                                    predict->n_tables, payload, payload_bytes, coding.classes,
                                    coding.fineness, coding.shifts, &step, &side_bytes, err));
    fill_row_steps(&coding);
    KRUL_TRY(krul_entropy_decode_columns(backend, predict->tables, payload + side_bytes,
                                         payload_bytes - side_bytes, width, n_rows, coding.classes,
                                         coding.shifts, coding.coefficients, err));
    KRUL_TRY(predict_rows(backend, predict, chain, index, decoded, err));
    int64_t n_used = width; /* components behind the last that occurs are zeros */
    while (n_used > 0 && coding.classes[n_used - 1] == KRUL_ENTROPY_NO_SYMBOLS) {
        n_used--;
    }
    if (n_used > 0) {
        const void *coefficients;
        if (!coding.is_plain) {
            scale_rows(&coding, n_used);
        }
        KRUL_TRY(operand_of(backend, predict, coding.coefficients, n_used, n_rows, &narrow,
                            &coefficients, err));
        KRUL_TRY(multiply(predict, true, false, n_rows, width, n_used, step, coefficients,
                          matrix_of(predict, layer->backward, layer->narrow.backward, 0), 1.0f,
                          decoded, err));
    }
    KRUL_TRY(store_rows(backend, predict, layer, token_start, decoded, views, err));
    KRUL_TRY(settle(backend, predict, chain, index, &decoded, err));
done:
    if (chain != NULL) {
        pthread_mutex_unlock(&chain->lock);
    }
    free_coding(&coding);
    free(narrow);
    free(decoded);
    return status;
}

/* Its blocks need a profile and a chain: the functions above are the way in. */
const krul_codec_ops krul_codec_predict = {
    .codec = KRUL_CODEC_PREDICT,
    .name = "predict",
    .n_layers = 1,
};

/* test_predict.c - chains of codec predict: there and back, in threads, damaged, and restored.
 *
 * The profile is a small one whose basis is orthogonal, so that no number is off by more than what
 * rounding the coefficients allows; products come from a stub beside this program. */
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "codec_predict.h"
#include "dtype.h"
#include "fake_device.h"
#include "internal.h"

enum {
    N_LAYERS = 4,
    N_HEADS = 2,
    HEAD_DIM = 4,
    WIDTH = 2 * N_HEADS * HEAD_DIM,
    N_PAIRS = 2,
    N_CHAINS = 3,
    CHAIN_TOKENS = 37,
    N_TOKENS = N_CHAINS * CHAIN_TOKENS,
    N_TABLES = 8,
    N_VALUES = N_HEADS * N_TOKENS * HEAD_DIM,
    N_STEPS = N_LAYERS * N_CHAINS,
};

static const float step = 0.25f;

static const krul_backend *best;
static krul_blas *blas;
static krul_entropy_table tables[N_TABLES];
static float mean[WIDTH], deviation[WIDTH], basis[WIDTH * WIDTH], maps[2 * WIDTH * WIDTH];
static float left[2 * WIDTH * 3], right[3 * WIDTH];
static float cosines[N_TOKENS * N_PAIRS], sines[N_TOKENS * N_PAIRS];
static krul_predict_layer layers[N_LAYERS];
static float source[N_LAYERS][2][N_VALUES];
static float expected[N_LAYERS][2][N_VALUES]; /* what a single thread decodes */
static float target[N_LAYERS][2][N_VALUES];
static uint8_t *payloads[N_LAYERS][N_CHAINS]; /* allocated to the byte */
static size_t payload_bytes[N_LAYERS][N_CHAINS];

static float
next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / (float)(1 << 23) - 1.0f;
}

static void
make_profile(void)
{
    uint32_t state = 1;
    for (int table = 0; table < N_TABLES; table++) {
        int sum = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            int distance = abs(symbol - 127);
            int frequency = distance > 12 ? 0 : 800 / (1 + table) >> distance / (1 + table);
            tables[table].frequency[symbol] = (uint16_t)(symbol == 255 ? 16 : frequency);
            sum += tables[table].frequency[symbol];
        }
        tables[table].frequency[127] = (uint16_t)(tables[table].frequency[127] + 4096 - sum);
    }
    for (int i = 0; i < WIDTH; i++) {
        mean[i] = next_random(&state) * 3;
        deviation[i] = 2.0f / (float)(1 + i);
        for (int k = 0; k < WIDTH; k++) { /* a matrix of signs: its own inverse, but for a factor */
            basis[i * WIDTH + k] = __builtin_parity((unsigned)(i & k)) != 0 ? -0.25f : 0.25f;
        }
    }
    for (int i = 0; i < 2 * WIDTH * WIDTH; i++) {
        maps[i] = 0.1f * next_random(&state);
    }
    for (int i = 0; i < 2 * WIDTH * 3; i++) {
        left[i] = 0.2f * next_random(&state);
    }
    for (int i = 0; i < 3 * WIDTH; i++) {
        right[i] = 0.5f * next_random(&state);
    }
    for (int i = 0; i < N_TOKENS * N_PAIRS; i++) {
        float angle = (float)(i / N_PAIRS) * (i % N_PAIRS == 0 ? 1.0f : 0.01f);
        cosines[i] = cosf(angle);
        sines[i] = sinf(angle);
    }
    static const int32_t sources[N_LAYERS][3] = {{0}, {1, 0}, {2, 1, 0}, {1, 2}};
    for (int i = 0; i < N_LAYERS; i++) {
        layers[i] = (krul_predict_layer){
            .n_heads = N_HEADS,
            .head_dim = HEAD_DIM,
            .n_sources = sources[i][0],
            .sources = {sources[i][1], sources[i][2]},
            .rank = i == 3 ? 3 : 0,
            .mean = mean,
            .deviation = deviation,
            .forward = basis,
            .backward = basis,
            .maps = maps,
            .left = left,
            .right = right,
            .rotary = {.convention = i % 2 == 0 ? KRUL_ROTARY_HALF : KRUL_ROTARY_INTERLEAVED,
                       .n_pairs = N_PAIRS,
                       .cos = cosines,
                       .sin = sines},
        };
        for (int kv = 0; kv < 2; kv++) {
            for (int k = 0; k < N_VALUES; k++) {
                float size = k / HEAD_DIM % 11 == 3 ? 8.0f : 1.0f;
                source[i][kv][k] = size * next_random(&state) * next_random(&state);
            }
        }
    }
}

/* A stub library that lies beside this program. */
static krul_blas *
open_stub(const char *name)
{
    char path[PATH_MAX + 64];
    krul_error err = {0};
    krul_blas *opened = NULL;
    ssize_t n_bytes = readlink("/proc/self/exe", path, PATH_MAX - 1);
    path[n_bytes > 0 ? n_bytes : 0] = '\0';
    char *slash = strrchr(path, '/');
    CHECK(slash != NULL);
    if (slash != NULL) {
        snprintf(slash, 64, "/libstub_%s.so", name);
    }
    CHECK(krul_blas_open(path, &opened, &err) == KRUL_STATUS_OK);
    if (opened == NULL) {
        fprintf(stderr, "%s\n", err.message);
    }
    return opened;
}

static krul_predict_options
options_of(void)
{
    return (krul_predict_options){.blas = blas,
                                  .tables = tables,
                                  .n_tables = N_TABLES,
                                  .unit_table = 3,
                                  .n_layers = N_LAYERS,
                                  .layers = layers,
                                  .n_batch = 1,
                                  .n_tokens = N_TOKENS};
}

static krul_predict *
new_predict(void)
{
    krul_error err;
    krul_predict *made = NULL;
    krul_predict_options options = options_of();
    if (krul_predict_new(&options, &made, &err) != KRUL_STATUS_OK) {
        fprintf(stderr, "%s\n", err.message); /* nothing that follows makes sense */
        exit(1);
    }
    return made;
}

/* The tokens of one chain in an array of all. */
static krul_view
view_of(float *data, int chain, int64_t n_tokens)
{
    return (krul_view){.data = data + (ptrdiff_t)chain * CHAIN_TOKENS * HEAD_DIM,
                       .dtype = KRUL_DTYPE_F32,
                       .device_type = KRUL_DEVICE_CPU,
                       .shape = {1, N_HEADS, n_tokens, HEAD_DIM},
                       .stride = {N_VALUES, N_TOKENS * HEAD_DIM, HEAD_DIM, 1}};
}

/* Of the tokens of the second chain every fineness that there may be, of the others 0. */
static int8_t
fineness_of(int chain, int token)
{
    int n = KRUL_PREDICT_MAX_FINENESS - KRUL_PREDICT_MIN_FINENESS + 1;
    return (int8_t)(chain == 1 ? KRUL_PREDICT_MIN_FINENESS + token * 7 % n : 0);
}

/* Encode one chain into payloads of exactly their size. */
static krul_status
encode_chain(krul_predict *predict, int chain, uint8_t *made[N_LAYERS], size_t made_bytes[N_LAYERS])
{
    krul_status status = KRUL_STATUS_OK;
    krul_error err;
    int8_t fineness[CHAIN_TOKENS];
    for (int i = 0; i < CHAIN_TOKENS; i++) {
        fineness[i] = fineness_of(chain, i);
    }
    for (int32_t layer = 0; layer < N_LAYERS && status == KRUL_STATUS_OK; layer++) {
        size_t bound = 0;
        bool fits = false;
        double error[2];
        krul_view views[2] = {view_of(source[layer][0], chain, CHAIN_TOKENS),
                              view_of(source[layer][1], chain, CHAIN_TOKENS)};
        status = krul_predict_bound(predict, layer, CHAIN_TOKENS, &bound, &err);
        uint8_t *scratch = malloc(bound);
        if (status == KRUL_STATUS_OK) {
            status = krul_predict_encode(best, predict, layer, chain * CHAIN_TOKENS, views, step,
                                         chain == 0 ? NULL : fineness, scratch, bound,
                                         &made_bytes[layer], &fits, error, &err);
        }
        if (status != KRUL_STATUS_OK || !fits) {
            free(scratch);
            return KRUL_STATUS_BAD_VALUE;
        }
        made[layer] = malloc(made_bytes[layer]);
        memcpy(made[layer], scratch, made_bytes[layer]);
        free(scratch);
    }
    return status;
}

static krul_status
decode_block(const krul_backend *backend, krul_predict *predict, int layer, int chain,
             const uint8_t *payload, size_t n_bytes, float out[N_LAYERS][2][N_VALUES])
{
    krul_error err = {0};
    krul_view views[2] = {view_of(out[layer][0], chain, CHAIN_TOKENS),
                          view_of(out[layer][1], chain, CHAIN_TOKENS)};
    krul_status status = krul_predict_decode(backend, predict, layer, (int64_t)chain * CHAIN_TOKENS,
                                             CHAIN_TOKENS, payload, n_bytes, views, &err);
    CHECK(status == KRUL_STATUS_OK || (err.status == status && err.message[0] != '\0'));
    return status;
}

/* Every backend decodes to what is near the source, and all alike. */
static void
test_round_trip(void)
{
    krul_predict *predict = new_predict();
    for (int chain = 0; chain < N_CHAINS; chain++) {
        uint8_t *made[N_LAYERS] = {NULL};
        size_t made_bytes[N_LAYERS] = {0};
        CHECK(encode_chain(predict, chain, made, made_bytes) == KRUL_STATUS_OK);
        for (int layer = 0; layer < N_LAYERS; layer++) {
            payloads[layer][chain] = made[layer];
            payload_bytes[layer][chain] = made_bytes[layer];
        }
    }
    krul_predict_free(predict);
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        predict = new_predict();
        memset(target, 0, sizeof target);
        for (int step_index = 0; step_index < N_STEPS; step_index++) {
            int layer = step_index / N_CHAINS, chain = step_index % N_CHAINS;
            CHECK(decode_block(backend, predict, layer, chain, payloads[layer][chain],
                               payload_bytes[layer][chain], target) == KRUL_STATUS_OK);
        }
        krul_predict_free(predict);
        if (expected[0][0][0] == 0) {
            memcpy(expected, target, sizeof expected);
        }
        CHECK(memcmp(expected, target, sizeof expected) == 0);
    }
    /* Each coefficient is off by half a step of its token, a row of 16 by two steps at most, and its
     * numbers by no more than it, turned or not. */
    float largest = 0;
    double sum = 0;
    for (int i = 0; i < N_LAYERS * 2 * N_VALUES; i++) {
        int token = i / HEAD_DIM % N_TOKENS;
        float difference = fabsf((&source[0][0][0])[i] - (&expected[0][0][0])[i]);
        difference /= krul_predict_row_step(
            fineness_of(token / CHAIN_TOKENS, token % CHAIN_TOKENS));
        largest = difference > largest ? difference : largest;
        sum += (double)difference * (double)difference;
    }
    CHECK(largest <= 2 * step + 1e-5f);
    double mean_square = sum / (N_LAYERS * 2 * N_VALUES);
    CHECK(mean_square < 1.2 * (double)step * (double)step / 12 && mean_square > 1e-4);
}

/* Factors that were rounded give the same bits however they are multiplied: the libraries here add in
 * one order. */
static void
test_rounded(void)
{
    enum { N_MATRICES = 4 };
    const int sizes[N_MATRICES] = {WIDTH * WIDTH, 2 * WIDTH * WIDTH, 2 * WIDTH * 3, 3 * WIDTH};
    float *wide[N_MATRICES] = {basis, maps, left, right};
    float *kept[N_MATRICES];
    uint16_t *narrow[N_MATRICES];
    krul_predict_layer kept_layers[N_LAYERS];
    krul_error err;
    krul_blas *library = open_stub("bf16");
    memcpy(kept_layers, layers, sizeof layers);
    for (int i = 0; i < N_MATRICES; i++) {
        kept[i] = malloc((size_t)sizes[i] * sizeof(float));
        narrow[i] = malloc((size_t)sizes[i] * sizeof(uint16_t));
        memcpy(kept[i], wide[i], (size_t)sizes[i] * sizeof(float));
        for (int k = 0; k < sizes[i]; k++) {
            narrow[i][k] = krul_f32_to_bf16(wide[i][k]);
            wide[i][k] = krul_bf16_to_f32(narrow[i][k]);
        }
    }
    for (int i = 0; i < N_LAYERS; i++) {
        layers[i].narrow = (krul_predict_narrow){narrow[0], narrow[0], narrow[1], narrow[2],
                                                 narrow[3]};
    }
    krul_predict_options options = options_of();
    uint8_t *made[2][N_LAYERS] = {{NULL}};
    size_t made_bytes[2][N_LAYERS] = {{0}};
    float(*found)[2][N_VALUES] = calloc(3 * N_LAYERS, sizeof *found);
    for (int i = 0; i < 3; i++) { /* the last are read with rounding that is not theirs */
        krul_predict *predict = NULL;
        options.blas = i == 1 ? library : blas;
        options.products = i == 0   ? KRUL_PRODUCTS_ROUNDED
                           : i == 1 ? KRUL_PRODUCTS_BF16
                                    : KRUL_PRODUCTS_F32;
        CHECK(krul_predict_new(&options, &predict, &err) == KRUL_STATUS_OK);
        if (i < 2) {
            CHECK(encode_chain(predict, 1, made[i], made_bytes[i]) == KRUL_STATUS_OK);
        }
        for (int layer = 0; layer < N_LAYERS; layer++) {
            CHECK(decode_block(best, predict, layer, 1, made[0][layer], made_bytes[0][layer],
                               found + (ptrdiff_t)i * N_LAYERS) == KRUL_STATUS_OK);
        }
        krul_predict_free(predict);
    }
    for (int layer = 0; layer < N_LAYERS; layer++) {
        CHECK(made_bytes[0][layer] == made_bytes[1][layer] &&
              memcmp(made[0][layer], made[1][layer], made_bytes[0][layer]) == 0);
        free(made[0][layer]);
        free(made[1][layer]);
    }
    size_t n_bytes = N_LAYERS * sizeof *found;
    CHECK(memcmp(found, found + N_LAYERS, n_bytes) == 0);
    CHECK(memcmp(found, found + (ptrdiff_t)2 * N_LAYERS, n_bytes) != 0);
    free(found);
    krul_blas_close(library);
    for (int i = 0; i < N_MATRICES; i++) {
        memcpy(wide[i], kept[i], (size_t)sizes[i] * sizeof(float));
        free(kept[i]);
        free(narrow[i]);
    }
    memcpy(layers, kept_layers, sizeof layers);
}

/* Every truncation is refused, every changed byte refused or decoded; nothing else happens. */
static void
test_damage(void)
{
    size_t n_bytes = payload_bytes[0][0];
    uint8_t *damaged = malloc(n_bytes);
    int n_decoded = 0, n_refused = 0;
    krul_predict *predict = new_predict();
    for (size_t n_kept = 0; n_kept < n_bytes; n_kept++) {
        uint8_t *cut = malloc(n_kept + (n_kept == 0));
        memcpy(cut, payloads[0][0], n_kept);
        CHECK(decode_block(best, predict, 0, 0, cut, n_kept, target) == KRUL_STATUS_CORRUPT);
        free(cut);
    }
    memcpy(damaged, payloads[0][0], n_bytes);
    for (size_t at = 0; at < n_bytes; at++) {
        for (int bit = 0; bit < 8; bit++) {
            damaged[at] ^= (uint8_t)(1 << bit);
            krul_status status = decode_block(best, predict, 0, 0, damaged, n_bytes, target);
            n_decoded += status == KRUL_STATUS_OK;
            n_refused += status == KRUL_STATUS_CORRUPT;
            damaged[at] ^= (uint8_t)(1 << bit);
        }
    }
    /* Another step or another escape may stand there as well. */
    CHECK(n_decoded + n_refused == 8 * (int)n_bytes && n_decoded < (int)n_bytes && n_decoded > 0);
    /* After all that the chain begins anew. */
    for (int layer = 0; layer < N_LAYERS; layer++) {
        CHECK(decode_block(best, predict, layer, 0, payloads[layer][0], payload_bytes[layer][0],
                           target) == KRUL_STATUS_OK);
    }
    for (int i = 0; i < CHAIN_TOKENS * HEAD_DIM; i++) {
        CHECK(target[3][1][i] == expected[3][1][i]);
    }
    krul_predict_free(predict);
    free(damaged);
}

static void
test_arguments(void)
{
    krul_error err = {0};
    krul_predict *none = NULL;
    krul_predict_options options = options_of();
    options.unit_table = N_TABLES;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE && none == NULL);
    CHECK(strstr(err.message, "unit_table is 8") != NULL);
    options = options_of();
    options.n_batch = 0;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE);
    options = options_of();
    options.n_layers = 0;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE);
    options = options_of();
    options.products = (krul_predict_products)3;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "products is 3 but must be from 0 to 2") != NULL);
    krul_predict_layer kept = layers[2];
    layers[2].sources[1] = 2;
    options = options_of();
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "layer 2 has the source 2") != NULL);
    layers[2] = kept;
    layers[2].head_dim = 1 << 15;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_SHAPE);
    layers[2] = kept;
    layers[2].rotary.n_pairs = INT32_MAX;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE);
    layers[2] = kept;
    layers[2].maps = NULL;
    CHECK(krul_predict_new(&options, &none, &err) == KRUL_STATUS_BAD_VALUE && none == NULL);
    layers[2] = kept;

    krul_predict *predict = new_predict();
    CHECK(decode_block(best, predict, 1, 0, payloads[1][0], payload_bytes[1][0], target) ==
          KRUL_STATUS_BAD_VALUE);
    uint8_t bytes[16];
    size_t n_bytes = 0;
    bool fits = true;
    double error[2];
    krul_view views[2] = {view_of(source[0][0], 0, CHAIN_TOKENS),
                          view_of(source[0][1], 0, CHAIN_TOKENS)};
    CHECK(krul_predict_encode(best, predict, 0, 0, views, step, NULL, bytes, sizeof bytes, &n_bytes,
                              &fits, error, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "capacity_bytes is 16") != NULL);
    int8_t fineness[CHAIN_TOKENS] = {[3] = KRUL_PREDICT_MAX_FINENESS + 1};
    CHECK(krul_predict_encode(best, predict, 0, 0, views, step, fineness, bytes, sizeof bytes,
                              &n_bytes, &fits, error, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "the fineness of token 3 is 13") != NULL);
    CHECK(krul_predict_bound(predict, N_LAYERS, 1, &n_bytes, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_predict_bound(predict, 0, INT64_MAX, &n_bytes, &err) == KRUL_STATUS_BAD_SHAPE);
    CHECK(krul_predict_bound(predict, 0, -1, &n_bytes, &err) == KRUL_STATUS_BAD_SHAPE);
    CHECK(krul_predict_decode(best, predict, 0, INT64_MAX, 5, bytes, 0, views, &err) ==
          KRUL_STATUS_BAD_SHAPE);
    krul_predict_free(predict);
    krul_predict_free(NULL);
}

/* ---- threads ----------------------------------------------------------------------------------- */

typedef struct chain_task {
    krul_predict *predict;
    int chain;
    bool is_right;
} chain_task;

static void
code_chain(void *argument)
{
    chain_task *task = argument;
    uint8_t *made[N_LAYERS] = {NULL};
    size_t made_bytes[N_LAYERS] = {0};
    bool is_right = encode_chain(task->predict, task->chain, made, made_bytes) == KRUL_STATUS_OK;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        is_right = is_right && made_bytes[layer] == payload_bytes[layer][task->chain] &&
                   memcmp(made[layer], payloads[layer][task->chain], made_bytes[layer]) == 0;
        is_right = is_right &&
                   krul_predict_decode(
                       krul_backend_at(krul_backend_count() - 1), task->predict, layer,
                       (int64_t)task->chain * CHAIN_TOKENS, CHAIN_TOKENS, made[layer],
                       made_bytes[layer],
                       (const krul_view[2]){view_of(target[layer][0], task->chain, CHAIN_TOKENS),
                                            view_of(target[layer][1], task->chain, CHAIN_TOKENS)},
                       NULL) == KRUL_STATUS_OK;
        free(made[layer]);
    }
    task->is_right = is_right;
}

/* Chains coded at the same time are those that were coded one after the other. */
static void
test_chains_in_threads(void)
{
    for (int round = 0; round < 10; round++) {
        krul_predict *predict = new_predict();
        chain_task tasks[N_CHAINS];
        memset(target, 0, sizeof target);
        for (int i = 0; i < N_CHAINS; i++) {
            tasks[i] = (chain_task){.predict = predict, .chain = i};
        }
        krul_pool_for_each(3, code_chain, tasks, sizeof tasks[0], N_CHAINS);
        for (int i = 0; i < N_CHAINS; i++) {
            CHECK(tasks[i].is_right);
        }
        CHECK(memcmp(expected, target, sizeof expected) == 0);
        krul_predict_free(predict);
    }
}

/* ---- restores ---------------------------------------------------------------------------------- */

static void
make_steps(krul_predict *predict, krul_restore_step *steps)
{
    for (int i = 0; i < N_STEPS; i++) {
        int layer = i / N_CHAINS, chain = i % N_CHAINS;
        steps[i] = (krul_restore_step){
            .fd = -1,
            .payload = payloads[layer][chain],
            .entry = {.kind = KRUL_STORE_ENTRY_BLOCK,
                      .codec = KRUL_CODEC_PREDICT,
                      .kv = KRUL_KV_BOTH,
                      .dtype = KRUL_DTYPE_F32,
                      .layer_lower = layer,
                      .layer_upper = -1,
                      .n_batch = 1,
                      .n_heads = N_HEADS,
                      .head_dim = HEAD_DIM,
                      .token_start = chain * CHAIN_TOKENS,
                      .n_tokens = CHAIN_TOKENS,
                      .payload_bytes = payload_bytes[layer][chain]},
            .views = {view_of(target[layer][0], chain, CHAIN_TOKENS),
                      view_of(target[layer][1], chain, CHAIN_TOKENS)},
            .predict = predict,
        };
    }
}

/* The same from a file that has no name. */
static int
make_file_steps(krul_predict *predict, krul_restore_step *steps)
{
    char name[] = "/tmp/krul_test_predict_XXXXXX";
    int fd = mkstemp(name);
    uint64_t offset = 0;
    CHECK(fd >= 0);
    unlink(name);
    make_steps(predict, steps);
    for (int i = 0; i < N_STEPS; i++) {
        size_t n_bytes = (size_t)steps[i].entry.payload_bytes;
        CHECK(pwrite(fd, steps[i].payload, n_bytes, (off_t)offset) == (ssize_t)n_bytes);
        steps[i].entry.payload_crc32c = krul_store_crc32c(0, steps[i].payload, n_bytes);
        steps[i].entry.offset = offset;
        steps[i].payload = NULL;
        steps[i].fd = fd;
        offset += n_bytes;
    }
    return fd;
}

static krul_status
start(const krul_restore_step *steps, int n_steps, int n_threads, double max_bytes_per_s,
      krul_restore **out)
{
    krul_error err;
    krul_restore_options options = {.n_threads = n_threads, .max_bytes_per_s = max_bytes_per_s};
    return krul_restore_start(best, steps, n_steps, N_LAYERS, &options, out, &err);
}

/* Is what a chain was to write there, or are there still zeros? */
static bool
is_there(int layer, int chain, int64_t n_tokens, bool is_written)
{
    bool result = true;
    for (int kv = 0; kv < 2; kv++) {
        for (int head = 0; head < N_HEADS; head++) {
            ptrdiff_t at = ((ptrdiff_t)head * N_TOKENS + (ptrdiff_t)chain * CHAIN_TOKENS) *
                           HEAD_DIM;
            for (ptrdiff_t i = 0; i < n_tokens * HEAD_DIM; i++) {
                float wanted = is_written ? expected[layer][kv][at + i] : 0;
                result = result && target[layer][kv][at + i] == wanted;
            }
        }
    }
    return result;
}

static void
test_restore(void)
{
    krul_error err;
    for (int n_threads = 0; n_threads <= 4; n_threads++) {
        krul_predict *predict = new_predict();
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        int fd = -1;
        memset(target, 0, sizeof target);
        if (n_threads % 2 == 0) {
            make_steps(predict, steps);
        }
        else {
            fd = make_file_steps(predict, steps);
        }
        CHECK(start(steps, N_STEPS, n_threads, 0, &restore) == KRUL_STATUS_OK);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
            for (int chain = 0; chain < N_CHAINS; chain++) {
                CHECK(is_there(layer, chain, CHAIN_TOKENS, true));
            }
        }
        CHECK(memcmp(expected, target, sizeof expected) == 0);
        /* No block was decoded before the one of the same chain that it is predicted from. */
        krul_restore_trace traces[N_STEPS];
        krul_restore_counts counts;
        krul_restore_join(restore);
        krul_restore_read_trace(restore, traces);
        krul_restore_read_counts(restore, &counts);
        CHECK(counts.decoded_bytes_by_codec[KRUL_CODEC_PREDICT] == sizeof expected);
        for (int i = N_CHAINS; i < N_STEPS; i++) {
            CHECK(traces[i].end_s >= traces[i - N_CHAINS].end_s);
        }
        krul_restore_free(restore);
        krul_predict_free(predict);
        if (fd >= 0) {
            close(fd);
        }
    }
}

/* The first tokens of the last chain, and arrays of which only one is wanted. */
static void
test_fewer_tokens(void)
{
    krul_error err;
    krul_predict *predict = new_predict();
    krul_restore_step steps[N_STEPS];
    krul_restore *restore = NULL;
    memset(target, 0, sizeof target);
    make_steps(predict, steps);
    for (int i = 0; i < N_STEPS; i++) {
        if (i % N_CHAINS == N_CHAINS - 1) {
            steps[i].views[0].shape[2] = steps[i].views[1].shape[2] = 9;
        }
    }
    steps[0].views[1].data = NULL;
    CHECK(start(steps, N_STEPS, 2, 0, &restore) == KRUL_STATUS_OK);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        CHECK(is_there(layer, N_CHAINS - 1, 9, true));
        for (int kv = 0; kv < 2; kv++) {
            CHECK(target[layer][kv][((N_CHAINS - 1) * CHAIN_TOKENS + 9) * HEAD_DIM] == 0);
        }
    }
    CHECK(target[0][0][0] == expected[0][0][0] && target[0][1][0] == 0);
    CHECK(is_there(1, 0, CHAIN_TOKENS, true));
    krul_restore_free(restore);
    krul_predict_free(predict);
}

/* Layers that were dropped are decoded for those that are predicted from them, and not written; when
 * nobody is left who wants them they are not decoded. */
static void
test_drop(void)
{
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        krul_error err;
        krul_predict *predict = new_predict();
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        int fd = make_file_steps(predict, steps);
        memset(target, 0, sizeof target);
        /* Reading the first block takes until the limit is lifted. */
        CHECK(start(steps, N_STEPS, n_threads, 1e-3, &restore) == KRUL_STATUS_OK);
        krul_restore_drop(restore, 0, N_TOKENS);
        krul_restore_drop(restore, 1, N_TOKENS);
        krul_restore_drop(restore, 2, CHAIN_TOKENS); /* of its first chain */
        CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
        CHECK(krul_restore_wait(restore, 1, &err) == KRUL_STATUS_OK);
        krul_restore_free(restore);
        krul_predict_free(predict);

        /* The same without a read that holds it up: steps that want nothing from the start. */
        predict = new_predict();
        for (int i = 0; i < N_STEPS; i++) {
            steps[i].predict = predict;
            bool is_dropped = i / N_CHAINS < 2 || i % N_CHAINS == 0;
            if (i / N_CHAINS < 3 && is_dropped) {
                steps[i].views[0].data = steps[i].views[1].data = NULL;
            }
            if (i % N_CHAINS == 1 && i / N_CHAINS == 3) { /* wanted by nobody: the end of a chain */
                steps[i].views[0].data = steps[i].views[1].data = NULL;
            }
        }
        CHECK(start(steps, N_STEPS, n_threads, 0, &restore) == KRUL_STATUS_OK);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        }
        krul_restore_join(restore);
        for (int i = 0; i < N_STEPS; i++) {
            bool is_written = steps[i].views[0].data != NULL;
            CHECK(is_there(i / N_CHAINS, i % N_CHAINS, CHAIN_TOKENS, is_written));
        }
        krul_restore_trace traces[N_STEPS];
        krul_restore_counts counts;
        krul_restore_read_trace(restore, traces);
        krul_restore_read_counts(restore, &counts);
        CHECK(counts.n_steps_done == N_STEPS);
        for (int i = 0; i < N_STEPS; i++) {
            CHECK((traces[i].worker < 0) == (i == 3 * N_CHAINS + 1));
        }
        krul_restore_free(restore);
        krul_predict_free(predict);
        close(fd);
    }
}

/* Drop early layers while blocks of them are being read and the later ones wait. */
static void
test_drop_under_way(void)
{
    unsigned seed = 3;
    int n_untouched = 0;
    for (int round = 0; round < 100; round++) {
        krul_error err;
        krul_predict *predict = new_predict();
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        int fd = make_file_steps(predict, steps);
        memset(target, 0, sizeof target);
        CHECK(start(steps, N_STEPS, 2, 2e6, &restore) == KRUL_STATUS_OK);
        if (rand_r(&seed) % 2 == 0) {
            usleep((useconds_t)(rand_r(&seed) % 300));
        }
        for (int32_t layer = 0; layer < 3; layer++) {
            krul_restore_drop(restore, layer, (int64_t)(1 + rand_r(&seed) % 3) * CHAIN_TOKENS);
        }
        for (int32_t layer = N_LAYERS - 1; layer >= 0; layer--) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        }
        for (int i = 0; i < N_STEPS; i++) {
            int layer = i / N_CHAINS, chain = i % N_CHAINS;
            bool is_written = is_there(layer, chain, CHAIN_TOKENS, true);
            bool is_untouched = is_there(layer, chain, CHAIN_TOKENS, false);
            CHECK(is_written || (layer < 3 && is_untouched));
            n_untouched += is_untouched;
        }
        krul_restore_free(restore);
        krul_predict_free(predict);
        close(fd);
    }
    CHECK(n_untouched > 50);
}

/* A block that is damaged costs its layer and the later ones, and of them its own chain only. */
static void
test_damaged_block(bool is_file)
{
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        krul_error err;
        krul_predict *predict = new_predict();
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        int fd = -1;
        const int damaged = 1 * N_CHAINS + 1; /* layer 1, chain 1 */
        uint8_t *spoilt = malloc(payload_bytes[1][1]);
        memset(target, 0, sizeof target);
        memcpy(spoilt, payloads[1][1], payload_bytes[1][1]);
        spoilt[10] ^= 1; /* must be zero */
        if (is_file) {
            fd = make_file_steps(predict, steps);
            CHECK(pwrite(fd, spoilt, payload_bytes[1][1], (off_t)steps[damaged].entry.offset) > 0);
        }
        else {
            make_steps(predict, steps);
            steps[damaged].payload = spoilt;
        }
        CHECK(start(steps, N_STEPS, n_threads, 0, &restore) == KRUL_STATUS_OK);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            krul_status wanted = layer == 0 ? KRUL_STATUS_OK : KRUL_STATUS_CORRUPT;
            err.message[0] = '\0';
            CHECK(krul_restore_wait(restore, layer, &err) == wanted);
            CHECK(layer < 2 || strstr(err.message, "tokens from 37: layer ") != NULL);
        }
        krul_restore_join(restore);
        for (int i = 0; i < N_STEPS; i++) {
            int layer = i / N_CHAINS, chain = i % N_CHAINS;
            CHECK(is_there(layer, chain, CHAIN_TOKENS, layer == 0 || chain != 1));
        }
        krul_restore_free(restore);
        krul_predict_free(predict);
        free(spoilt);
        if (fd >= 0) {
            close(fd);
        }
    }
}

static void
test_cancel(void)
{
    unsigned seed = 1;
    int n_cancelled = 0;
    for (int round = 0; round < 100; round++) {
        krul_error err;
        krul_predict *predict = new_predict();
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        make_steps(predict, steps);
        memset(target, 0, sizeof target);
        CHECK(start(steps, N_STEPS, 1 + round % 3, 0, &restore) == KRUL_STATUS_OK);
        usleep((useconds_t)(rand_r(&seed) % 400));
        if (round % 2 == 0) {
            krul_restore_cancel(restore);
            krul_restore_join(restore);
        }
        else {
            krul_restore_abandon(restore); /* from here on no view is written */
        }
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            krul_status status = krul_restore_wait(restore, layer, &err);
            CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_CANCELLED);
            n_cancelled += status == KRUL_STATUS_CANCELLED;
            for (int chain = 0; chain < N_CHAINS; chain++) {
                bool is_written = is_there(layer, chain, CHAIN_TOKENS, true);
                CHECK(is_written ||
                      (status != KRUL_STATUS_OK && is_there(layer, chain, CHAIN_TOKENS, false)));
            }
        }
        krul_restore_free(restore);
        krul_predict_free(predict);
    }
    CHECK(n_cancelled > 10);
}

static void
test_refused_steps(void)
{
    krul_predict *predict = new_predict(), *other = new_predict();
    krul_restore_step steps[N_STEPS], two[2];
    krul_restore *restore = NULL;
    make_steps(predict, steps);
    two[0] = steps[N_CHAINS]; /* the lower layer is taken first wherever it stands */
    two[1] = steps[0];
    CHECK(start(two, 2, 1, 0, &restore) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 1, NULL) == KRUL_STATUS_OK);
    krul_restore_free(restore);
    restore = NULL;
    krul_predict_free(predict);
    predict = new_predict();
    make_steps(predict, steps);
    two[0] = steps[0];
    two[1] = steps[0]; /* twice the same */
    CHECK(start(two, 2, 1, 0, &restore) == KRUL_STATUS_BAD_VALUE);
    two[1] = steps[N_CHAINS];
    two[1].entry.n_tokens--;
    two[1].views[0].data = two[1].views[1].data = NULL;
    CHECK(start(two, 2, 1, 0, &restore) == KRUL_STATUS_BAD_VALUE);
    two[1] = steps[N_CHAINS];
    two[1].predict = NULL;
    CHECK(start(two, 2, 1, 0, &restore) == KRUL_STATUS_BAD_VALUE);
    two[1] = steps[N_CHAINS];
    two[1].views[1].shape[3]++;
    CHECK(start(two, 2, 1, 0, &restore) == KRUL_STATUS_BAD_SHAPE);
    CHECK(restore == NULL);
    /* A chain that lacks its beginning is one that does not decode, not one that hangs. */
    two[0] = steps[N_CHAINS];
    two[1] = steps[2 * N_CHAINS];
    CHECK(start(two, 2, 2, 0, &restore) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, NULL) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 1, NULL) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_restore_wait(restore, 2, NULL) == KRUL_STATUS_BAD_VALUE);
    krul_restore_free(restore);
    krul_predict_free(predict);
    krul_predict_free(other);
}

/* ---- restores onto a device --------------------------------------------------------------------- */

/* The layers' memory on a device, a pool, and all that a restore needs. */
typedef struct place {
    krul_device *device;
    void *memory;
    krul_device_pool *pool;
    krul_predict *predict;
    krul_restore_step steps[N_STEPS];
    int fd;
} place;

static void
open_place(place *at, const krul_device_ops *ops, size_t chunk_bytes, int32_t n_chunks)
{
    krul_device_pool_options sizes = {.chunk_bytes = chunk_bytes, .n_chunks = n_chunks};
    *at = (place){.predict = new_predict(), .fd = -1};
    if (fake_ops.open(0, &at->device, NULL) != KRUL_STATUS_OK ||
        fake_ops.memory_new(at->device, sizeof target, &at->memory, NULL) != KRUL_STATUS_OK ||
        krul_device_pool_new(ops, &sizes, &at->pool, NULL) != KRUL_STATUS_OK) {
        abort(); /* nothing that follows makes sense */
    }
    memset(fake_real(at->memory), 0, sizeof target);
}

static void
close_place(place *at)
{
    krul_device_pool_free(at->pool);
    fake_ops.memory_free(at->device, at->memory);
    fake_ops.close(at->device);
    krul_predict_free(at->predict);
    if (at->fd >= 0) {
        close(at->fd);
    }
    CHECK(fake_is_empty());
    fake_free_predictors();
}

/* Steps that write there, from memory or a file. */
static void
aim(place *at, bool is_file)
{
    if (is_file) {
        at->fd = make_file_steps(at->predict, at->steps);
    }
    else {
        make_steps(at->predict, at->steps);
    }
    for (int i = 0; i < 2 * N_STEPS; i++) {
        krul_view *view = &at->steps[i / 2].views[i % 2];
        uintptr_t offset = (uintptr_t)view->data - (uintptr_t)target;
        view->data = (void *)((uintptr_t)at->memory + offset);
        view->device_type = KRUL_DEVICE_CUDA;
    }
}

static krul_status
start_there(place *at, int n_threads, double max_bytes_per_s, krul_restore **out, krul_error *err)
{
    krul_restore_options options = {
        .n_threads = n_threads, .devices = at->pool, .max_bytes_per_s = max_bytes_per_s};
    *out = NULL;
    return krul_restore_start(best, at->steps, N_STEPS, N_LAYERS, &options, out, err);
}

/* As is_there, of what has come to the device. */
static bool
has_come(const place *at, int layer, int chain, int64_t n_tokens, bool is_written)
{
    memcpy(target, fake_real(at->memory), sizeof target);
    return is_there(layer, chain, n_tokens, is_written);
}

static void
check_whole(const place *at)
{
    CHECK(memcmp(expected, fake_real(at->memory), sizeof expected) == 0);
}

/* Whatever the size and number of chunks and threads, the device or where it cannot the CPU decodes
 * all to the same bytes, those of layer 0 for the others' sake alone, and of some the first tokens. */
static void
test_device_restore(void)
{
    krul_error err;
    fake.max_delay_us = 50;
    for (int round = 0; round < 48; round++) {
        place at;
        krul_restore *restore = NULL;
        bool is_on_cpu = round % 6 == 5, is_dropped = round % 4 == 1, is_cut = round % 4 == 2;
        fake.has_no_products = is_on_cpu;
        atomic_store(&fake.n_predicted, 0);
        open_place(&at, &fake_ops, (size_t)1 << (13 + round % 4), 1 + round / 4 % 4);
        aim(&at, round % 3 == 0);
        for (int i = 0; i < 2 * N_STEPS && is_dropped; i++) {
            if (i < 2 * N_CHAINS) {
                at.steps[i / 2].views[i % 2].data = NULL;
            }
        }
        for (int i = 0; i < N_STEPS && is_cut; i++) {
            if (i % N_CHAINS == 1) {
                at.steps[i].views[0].shape[2] = 11;
                at.steps[i].views[1].shape[2] = 11;
            }
        }
        CHECK(start_there(&at, 1 + round % 5, 0, &restore, &err) == KRUL_STATUS_OK);
        const char *problem = krul_restore_predict_problem(restore);
        CHECK((strstr(problem, "no library") != NULL) == is_on_cpu);
        CHECK(is_on_cpu || problem[0] == '\0');
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        }
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
            for (int chain = 0; chain < N_CHAINS; chain++) {
                int64_t n_tokens = is_cut && chain == 1 ? 11 : CHAIN_TOKENS;
                bool is_written = layer > 0 || !is_dropped;
                CHECK(has_come(&at, layer, chain, n_tokens, is_written));
            }
        }
        CHECK(atomic_load(&fake.n_predicted) == (is_on_cpu ? 0 : N_STEPS));
        krul_restore_free(restore);
        close_place(&at);
    }
    fake_calm();
}

/* Where the CPU decodes: the first layer's blocks come slowly from a file; what is predicted from them
 * is in memory already, and is in the hands of other threads long before. */
static void
test_device_chains_wait(void)
{
    krul_error err;
    place at;
    krul_restore *restore = NULL;
    double n_slow = 0;
    fake.has_no_products = true;
    open_place(&at, &fake_ops, 1 << 14, 2);
    aim(&at, true);
    for (int i = 0; i < N_STEPS; i++) {
        if (i < N_CHAINS) {
            n_slow += (double)at.steps[i].entry.payload_bytes;
        }
        else {
            at.steps[i].fd = -1;
            at.steps[i].payload = payloads[i / N_CHAINS][i % N_CHAINS];
        }
    }
    CHECK(start_there(&at, N_STEPS, n_slow / 0.2, &restore, &err) == KRUL_STATUS_OK);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
    }
    krul_restore_join(restore);
    check_whole(&at);
    krul_restore_free(restore);
    close_place(&at);
    fake_calm();
}

/* A profile is copied once for all restores that name it, the last few are kept, and one without a
 * name for its restore alone. */
static void
test_device_keeps_profiles(void)
{
    krul_error err;
    place at;
    krul_restore *restore = NULL;
    long n_before = 0;
    open_place(&at, &fake_ops, 1 << 16, 2);
    static const uint8_t names[] = {0, 0, 1, 1, 1, 2, 1, 3, 2, 1, 0};
    static const int n_kept[] = {0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2};
    static const bool is_copied[] = {1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1};
    for (size_t i = 0; i < sizeof names; i++) {
        krul_predict_options options = options_of();
        options.digest[7] = names[i];
        krul_predict_free(at.predict);
        CHECK(krul_predict_new(&options, &at.predict, &err) == KRUL_STATUS_OK);
        aim(&at, false);
        memset(fake_real(at.memory), 0, sizeof target);
        atomic_store(&fake.copied_bytes, 0);
        CHECK(start_there(&at, 2, 0, &restore, &err) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        check_whole(&at);
        krul_restore_free(restore);
        CHECK((atomic_load(&fake.copied_bytes) > N_TABLES * 4096 * 4) == is_copied[i]);
        n_before = i == 0 ? atomic_load(&fake.n_memory) : n_before;
        CHECK(atomic_load(&fake.n_memory) == n_before + n_kept[i]);
    }
    /* Where there is no other room, what nobody uses goes: the next finds only its own. */
    krul_predict_options options = options_of();
    options.digest[7] = 9;
    krul_predict_free(at.predict);
    CHECK(krul_predict_new(&options, &at.predict, &err) == KRUL_STATUS_OK);
    aim(&at, false);
    fake.memory_limit = atomic_load(&fake.memory_bytes) + 100000;
    CHECK(start_there(&at, 2, 0, &restore, &err) == KRUL_STATUS_OK);
    CHECK(krul_restore_predict_problem(restore)[0] == '\0');
    krul_restore_free(restore);
    CHECK(atomic_load(&fake.n_memory) == n_before + 1);
    close_place(&at);
    fake_calm();
}

/* A block that is damaged costs its chain from there on; what only the device sees, all that may be
 * predicted from it. Either way the next restore is well. */
static void
test_device_damage(void)
{
    for (int round = 0; round < 36; round++) {
        krul_error err;
        place at;
        krul_restore *restore = NULL;
        const int bad = round % N_STEPS;
        int bad_layer = bad / N_CHAINS, bad_chain = bad % N_CHAINS;
        size_t n_bytes = payload_bytes[bad_layer][bad_chain];
        uint8_t *spoilt = malloc(n_bytes);
        fake.max_delay_us = round % 2 * 50;
        memcpy(spoilt, payloads[bad_layer][bad_chain], n_bytes);
        spoilt[10] ^= 1; /* must be zero */
        open_place(&at, &fake_ops, (size_t)1 << (13 + round % 4), 1 + round % 3);
        aim(&at, round % 4 == 0);
        if (at.fd >= 0) {
            CHECK(pwrite(at.fd, spoilt, n_bytes, (off_t)at.steps[bad].entry.offset) > 0);
        }
        else {
            at.steps[bad].payload = spoilt;
        }
        CHECK(start_there(&at, 1 + round % 3, 0, &restore, &err) == KRUL_STATUS_OK);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            krul_status wanted = layer < bad_layer ? KRUL_STATUS_OK : KRUL_STATUS_CORRUPT;
            err.message[0] = '\0';
            CHECK(krul_restore_wait(restore, layer, &err) == wanted);
            CHECK(layer <= bad_layer || strstr(err.message, "predicted from, failed") != NULL);
        }
        krul_restore_join(restore);
        for (int i = 0; i < N_STEPS; i++) {
            int layer = i / N_CHAINS, chain = i % N_CHAINS;
            CHECK(
                has_come(&at, layer, chain, CHAIN_TOKENS, layer < bad_layer || chain != bad_chain));
        }
        krul_restore_free(restore);

        memset(fake_real(at.memory), 0, sizeof target);
        aim(&at, false);
        atomic_store(&fake.works_until_damage, round % 3);
        CHECK(start_there(&at, 2, 0, &restore, &err) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        int first_corrupt = N_LAYERS;
        for (int32_t layer = N_LAYERS - 1; layer >= 0; layer--) {
            krul_status status = krul_restore_wait(restore, layer, &err);
            CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT);
            first_corrupt = status == KRUL_STATUS_CORRUPT ? layer : first_corrupt;
        }
        CHECK(first_corrupt < N_LAYERS);
        for (int32_t layer = first_corrupt; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_CORRUPT);
        }
        krul_restore_free(restore);
        fake_calm();

        memset(fake_real(at.memory), 0, sizeof target);
        aim(&at, false);
        CHECK(start_there(&at, 2, 0, &restore, &err) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        check_whole(&at);
        krul_restore_free(restore);
        close_place(&at);
        free(spoilt);
    }
}

/* Every call that can fail does, once, then for good, then while a stream carries it out: a layer is
 * whole or says DEVICE, and the next restore of the same pool is well. */
static void
test_device_faults(void)
{
    int n_failed = 0, n_whole = 0, n_on_cpu = 0;
    for (int kind = 0; kind < 3; kind++) {
        bool is_over = false;
        for (int at_call = 0; !is_over; at_call++) {
            krul_error err = {.status = KRUL_STATUS_OK};
            place at;
            krul_restore *restore = NULL;
            open_place(&at, &fake_ops, 1 << 14, 2);
            aim(&at, false);
            fake.is_dead = kind == 1;
            atomic_store(kind < 2 ? &fake.calls_until_failure : &fake.works_until_failure, at_call);
            krul_status status = start_there(&at, 2, 0, &restore, &err);
            CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_DEVICE);
            if (status == KRUL_STATUS_OK) {
                n_on_cpu += krul_restore_predict_problem(restore)[0] != '\0';
                krul_restore_join(restore);
                for (int32_t layer = 0; layer < N_LAYERS; layer++) {
                    status = krul_restore_wait(restore, layer, &err);
                    CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_DEVICE);
                    for (int chain = 0; chain < N_CHAINS && status == KRUL_STATUS_OK; chain++) {
                        CHECK(has_come(&at, layer, chain, CHAIN_TOKENS, true));
                    }
                    n_whole += status == KRUL_STATUS_OK;
                }
            }
            krul_restore_free(restore);
            is_over = atomic_load(&fake.n_failed) == 0;
            n_failed += !is_over;
            fake_calm();
            CHECK(start_there(&at, 2, 0, &restore, &err) == KRUL_STATUS_OK);
            CHECK(krul_restore_predict_problem(restore)[0] == '\0');
            krul_restore_join(restore);
            check_whole(&at);
            krul_restore_free(restore);
            close_place(&at);
        }
    }
    CHECK(n_failed > 100 && n_whole > 100 && n_on_cpu > 40);
}

/* The less memory, the sooner the CPU decodes; no byte differs. */
static void
test_device_out_of_memory(void)
{
    int n_on_cpu = 0, n_on_device = 0, n_refused = 0;
    for (size_t limit = 1 << 14; limit < 1 << 21; limit += limit / 8) {
        krul_error err;
        place at;
        krul_restore *restore = NULL;
        open_place(&at, &fake_ops, 1 << 14, 2);
        aim(&at, false);
        fake.memory_limit = sizeof target + limit;
        krul_status status = start_there(&at, 2, 0, &restore, &err);
        CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_DEVICE);
        n_refused += status != KRUL_STATUS_OK;
        if (status == KRUL_STATUS_OK) {
            bool is_on_cpu = krul_restore_predict_problem(restore)[0] != '\0';
            n_on_cpu += is_on_cpu;
            n_on_device += !is_on_cpu;
            krul_restore_join(restore);
            check_whole(&at);
        }
        krul_restore_free(restore);
        close_place(&at);
        fake_calm();
    }
    CHECK(n_on_cpu > 5 && n_on_device > 5 && n_refused > 0);
}

/* Dropped, put into another order, cancelled and abandoned while it is under way: a block is whole or
 * untouched, and those that were not dropped are whole where nobody cancelled. */
static void
test_device_meddled_with(void)
{
    unsigned seed = 5;
    int n_untouched = 0, n_cancelled = 0;
    fake.max_delay_us = 60;
    for (int round = 0; round < 120; round++) {
        krul_error err;
        place at;
        krul_restore *restore = NULL;
        int64_t order[N_STEPS], n_dropped[N_LAYERS] = {0};
        bool is_cancelled = false;
        open_place(&at, &fake_ops, (size_t)1 << (13 + round % 4), 1 + round % 3);
        aim(&at, round % 2 == 0);
        CHECK(start_there(&at, 1 + round % 4, round % 2 == 0 ? 2e6 : 0, &restore, &err) ==
              KRUL_STATUS_OK);
        for (int i = 0; i < 4; i++) {
            int kind = rand_r(&seed) % 8;
            if (kind < 3) {
                int32_t layer = rand_r(&seed) % N_LAYERS;
                int64_t n = (int64_t)(1 + rand_r(&seed) % N_CHAINS) * CHAIN_TOKENS;
                krul_restore_drop(restore, layer, n);
                n_dropped[layer] = krul_max_i64(n_dropped[layer], n);
            }
            else if (kind < 5) {
                for (int64_t k = 0; k < N_STEPS; k++) {
                    order[k] = (k * 5 + round) % N_STEPS;
                }
                CHECK(krul_restore_reorder(restore, order, N_STEPS, &err) == KRUL_STATUS_OK);
            }
            else if (kind < 7) {
                usleep((useconds_t)(rand_r(&seed) % 600));
            }
            else if (round % 3 == 0) {
                is_cancelled = true;
                krul_restore_abandon(restore);
                memcpy(target, fake_real(at.memory), sizeof target);
                usleep(300);
                CHECK(memcmp(target, fake_real(at.memory), sizeof target) == 0);
            }
        }
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            krul_status status = krul_restore_wait(restore, layer, &err);
            CHECK(status == KRUL_STATUS_OK || (is_cancelled && status == KRUL_STATUS_CANCELLED));
            n_cancelled += status == KRUL_STATUS_CANCELLED;
            for (int chain = 0; chain < N_CHAINS; chain++) {
                bool is_whole = has_come(&at, layer, chain, CHAIN_TOKENS, true);
                bool is_untouched = has_come(&at, layer, chain, CHAIN_TOKENS, false);
                bool is_dropped = (chain + 1) * CHAIN_TOKENS <= n_dropped[layer];
                CHECK(is_whole || (is_untouched && (is_dropped || status != KRUL_STATUS_OK)));
                n_untouched += is_untouched;
            }
        }
        krul_restore_free(restore);
        close_place(&at);
    }
    CHECK(n_untouched > 50 && n_cancelled > 10);
    fake_calm();
}

/* What a device cannot do alone the CPU does, and says why: chains over two devices, or onto the CPU, a
 * device without codec predict. Blocks that lack what they are predicted from fail as on the CPU. */
static void
test_device_refusals(void)
{
    krul_error err;
    place at;
    krul_restore *restore = NULL;
    open_place(&at, &fake_ops, 1 << 15, 2);
    aim(&at, false);
    atomic_store(&fake.n_predicted, 0);
    for (int i = 0; i < 2 * N_STEPS; i++) {
        at.steps[i / 2].views[i % 2].device_id = i / 2 >= 2 * N_CHAINS;
    }
    CHECK(start_there(&at, 3, 0, &restore, &err) == KRUL_STATUS_OK);
    CHECK(strstr(krul_restore_predict_problem(restore), "several devices") != NULL);
    krul_restore_join(restore);
    check_whole(&at);
    krul_restore_free(restore);

    aim(&at, false);
    memset(fake_real(at.memory), 0, sizeof target);
    for (int i = 0; i < 2 * N_CHAINS; i++) { /* layer 0 */
        krul_view *view = &at.steps[i / 2].views[i % 2];
        view->data = fake_real(view->data);
        view->device_type = KRUL_DEVICE_CPU;
    }
    CHECK(start_there(&at, 3, 0, &restore, &err) == KRUL_STATUS_OK);
    CHECK(strstr(krul_restore_predict_problem(restore), "several devices") != NULL);
    krul_restore_join(restore);
    check_whole(&at);
    krul_restore_free(restore);
    CHECK(atomic_load(&fake.n_predicted) == 0);

    aim(&at, false);
    for (int i = 0; i < N_CHAINS; i++) { /* layer 1 in place of layer 0, which then is missing */
        at.steps[i] = at.steps[i + N_CHAINS];
        at.steps[i + N_CHAINS] = at.steps[i + 2 * N_CHAINS];
        at.steps[i + 2 * N_CHAINS] = at.steps[i + 3 * N_CHAINS];
    }
    krul_restore_options options = {.n_threads = 2, .devices = at.pool};
    CHECK(krul_restore_start(best, at.steps, 3 * N_CHAINS, N_LAYERS, &options, &restore, &err) ==
          KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
    for (int32_t layer = 1; layer < N_LAYERS; layer++) {
        CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_BAD_VALUE);
    }
    CHECK(strstr(err.message, "layer 3, tokens from ") != NULL);
    krul_restore_free(restore);
    close_place(&at);

    krul_device_ops without = fake_ops;
    without.products_new = NULL;
    open_place(&at, &without, 1 << 15, 2);
    aim(&at, false);
    CHECK(start_there(&at, 2, 0, &restore, &err) == KRUL_STATUS_OK);
    CHECK(strstr(krul_restore_predict_problem(restore), "fake has no way") != NULL);
    krul_restore_join(restore);
    check_whole(&at);
    krul_restore_free(restore);
    close_place(&at);
}

int
main(void)
{
    blas = open_stub("cblas");
    if (blas == NULL) {
        return check_finish();
    }
    best = check_best_backend();
    make_profile();
    test_round_trip();
    test_damage();
    test_rounded();
    test_arguments();
    test_chains_in_threads();
    test_restore();
    test_fewer_tokens();
    test_drop();
    test_drop_under_way();
    test_damaged_block(false);
    test_damaged_block(true);
    test_cancel();
    test_refused_steps();
    krul_predict_options options = options_of();
    fake.predict_options = &options;
    test_device_restore();
    test_device_chains_wait();
    test_device_keeps_profiles();
    test_device_damage();
    test_device_faults();
    test_device_out_of_memory();
    test_device_meddled_with();
    test_device_refusals();
    for (int i = 0; i < N_STEPS; i++) {
        free(payloads[i / N_CHAINS][i % N_CHAINS]);
    }
    krul_blas_close(blas);
    return check_finish();
}

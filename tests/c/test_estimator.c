/* test_estimator.c - attention rows against a plain double-precision softmax, on every table. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "check.h"
#include "dtype.h"
#include "internal.h"

enum {
    N_LAYERS = 3,
    N_BATCH = 2,
    N_HEADS = 6,
    N_KV_HEADS = 2,
    N_ROWS = 7,
    N_KEYS = 83,
    HEAD_DIM = 20,
    WINDOW = 9,
    STRIDE = N_KEYS + 5, /* of received: what lies beyond the keys must stay as it was */
};

static float queries[N_LAYERS][N_BATCH][N_HEADS][N_ROWS][HEAD_DIM];
static float keys[N_LAYERS][N_BATCH][N_KV_HEADS][N_KEYS][HEAD_DIM];
static uint16_t half_queries[N_LAYERS][N_BATCH][N_HEADS][N_ROWS][HEAD_DIM];
static uint16_t half_keys[N_LAYERS][N_BATCH][N_KV_HEADS][N_KEYS][HEAD_DIM];
static uint8_t key_is_real[N_BATCH][N_KEYS];
static float sinks[N_HEADS];
static int64_t positions[N_ROWS];
static int64_t row_starts[N_BATCH][N_ROWS];
static double expected_rows[N_LAYERS][N_BATCH][N_HEADS][N_ROWS][N_KEYS];

typedef struct result {
    double distances[N_LAYERS * N_LAYERS];
    double importance[N_LAYERS * 2];
    float received[N_LAYERS * STRIDE];
    double n_rows;
} result;

static float
next_random(void)
{
    static uint32_t state = 2463534242u;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return (float)state / 4294967296.0f * 4 - 2;
}

static void
fill(krul_dtype dtype)
{
    float *wide[2] = {&queries[0][0][0][0][0], &keys[0][0][0][0][0]};
    uint16_t *narrow[2] = {&half_queries[0][0][0][0][0], &half_keys[0][0][0][0][0]};
    size_t counts[2] = {sizeof queries / sizeof(float), sizeof keys / sizeof(float)};
    for (int t = 0; t < 2; t++) {
        for (size_t i = 0; i < counts[t]; i++) {
            float value = next_random();
            if (dtype == KRUL_DTYPE_F16) {
                narrow[t][i] = krul_f32_to_f16(value);
                value = krul_f16_to_f32(narrow[t][i]);
            }
            else if (dtype == KRUL_DTYPE_BF16) {
                narrow[t][i] = krul_f32_to_bf16(value);
                value = krul_bf16_to_f32(narrow[t][i]);
            }
            wide[t][i] = value;
        }
    }
    memset(key_is_real, 1, sizeof key_is_real);
    memset(key_is_real[1], 0, 11);
    for (int64_t r = 0; r < N_ROWS; r++) {
        positions[r] = r * (N_KEYS - 1) / (N_ROWS - 1);
        for (int64_t b = 0; b < N_BATCH; b++) {
            row_starts[b][r] = krul_max_i64(0, positions[r] - WINDOW + 1);
        }
    }
    for (int64_t h = 0; h < N_HEADS; h++) {
        sinks[h] = next_random();
    }
}

static krul_view
view_of(void *data, krul_dtype dtype, int64_t n_heads, int64_t n_tokens)
{
    return (krul_view){
        .data = data,
        .dtype = dtype,
        .device_type = KRUL_DEVICE_CPU,
        .is_read_only = true,
        .shape = {N_BATCH, n_heads, n_tokens, HEAD_DIM},
        .stride = {n_heads * n_tokens * HEAD_DIM, n_tokens * HEAD_DIM, HEAD_DIM, 1},
    };
}

/* Layer 0 is plain, layer 1 has a soft cap and sinks, layer 2 a window. */
static void
describe(krul_dtype dtype, krul_estimator_layer *layers)
{
    for (int l = 0; l < N_LAYERS; l++) {
        bool is_wide = dtype == KRUL_DTYPE_F32;
        void *query_data = is_wide ? (void *)queries[l] : (void *)half_queries[l];
        void *key_data = is_wide ? (void *)keys[l] : (void *)half_keys[l];
        layers[l] = (krul_estimator_layer){
            .queries = view_of(query_data, dtype, N_HEADS, N_ROWS),
            .keys = view_of(key_data, dtype, N_KV_HEADS, N_KEYS),
            .scaling = 0.4f,
            .softcap = l == 1 ? 1.5f : 0,
            .sinks = l == 1 ? sinks : NULL,
            .row_starts = l == 2 ? &row_starts[0][0] : NULL,
        };
    }
}

static bool
is_seen(int l, int b, int r, int k)
{
    return key_is_real[b][k] != 0 && key_is_real[b][positions[r]] != 0 && k <= positions[r] &&
           (l != 2 || k >= row_starts[b][r]);
}

static void
expect_rows(void)
{
    for (int l = 0; l < N_LAYERS; l++) {
        for (int b = 0; b < N_BATCH; b++) {
            for (int h = 0; h < N_HEADS; h++) {
                for (int r = 0; r < N_ROWS; r++) {
                    double *row = expected_rows[l][b][h][r];
                    double total = l == 1 ? exp((double)sinks[h]) : 0;
                    for (int k = 0; k < N_KEYS; k++) {
                        double score = 0;
                        for (int d = 0; d < HEAD_DIM; d++) {
                            score += (double)queries[l][b][h][r][d] *
                                     (double)keys[l][b][h / (N_HEADS / N_KV_HEADS)][k][d];
                        }
                        score *= (double)0.4f;
                        score = l == 1 ? 1.5 * tanh(score / 1.5) : score;
                        row[k] = is_seen(l, b, r, k) ? exp(score) : 0;
                        total += row[k];
                    }
                    for (int k = 0; k < N_KEYS; k++) {
                        row[k] = total > 0 ? row[k] / total : 0;
                    }
                }
            }
        }
    }
}

static krul_status
observe(const krul_backend *backend, krul_dtype dtype, size_t tile_bytes, int n_threads,
        result *out, krul_error *err)
{
    krul_estimator_layer layers[N_LAYERS];
    describe(dtype, layers);
    krul_estimator_sums sums = {out->distances, out->importance, out->received, STRIDE,
                                &out->n_rows};
    return krul_estimator_observe(backend, layers, N_LAYERS, positions, N_ROWS, &key_is_real[0][0],
                                  N_KEYS, 2.0, tile_bytes, n_threads, &sums, err);
}

static bool
is_near(double got, double expected, double scale)
{
    return fabs(got - expected) <= 4e-6 * scale;
}

static void
check_result(const result *got)
{
    int n_real_rows = 0;
    for (int b = 0; b < N_BATCH; b++) {
        for (int r = 0; r < N_ROWS; r++) {
            n_real_rows += key_is_real[b][positions[r]];
        }
    }
    CHECK(fabs(got->n_rows - 2.0 * n_real_rows) < 1e-9);
    for (int l = 0; l < N_LAYERS; l++) {
        double ends[2] = {0, 0};
        for (int u = 0; u < N_LAYERS; u++) {
            double squared = 0;
            for (size_t i = 0; i < sizeof expected_rows[0] / sizeof(double); i++) {
                double difference = ((double *)expected_rows[l])[i] -
                                    ((double *)expected_rows[u])[i];
                squared += difference * difference;
            }
            CHECK(is_near(got->distances[l * N_LAYERS + u], 2 * squared, 2 * squared + 1));
        }
        for (int k = 0; k < STRIDE; k++) {
            double mass = 0;
            for (int b = 0; k < N_KEYS && b < N_BATCH; b++) {
                for (int h = 0; h < N_HEADS; h++) {
                    for (int r = 0; r < N_ROWS; r++) {
                        mass += expected_rows[l][b][h][r][k];
                        int64_t first = b == 1 ? 11 : 0;
                        int64_t n_tenth = krul_max_i64(1, (positions[r] - first + 1) / 10);
                        double part = expected_rows[l][b][h][r][k] / (double)N_HEADS;
                        ends[0] += k >= first && k < first + n_tenth ? part : 0;
                        ends[1] += k > positions[r] - n_tenth ? part : 0;
                    }
                }
            }
            CHECK(is_near((double)got->received[l * STRIDE + k], 2 * mass, 2 * mass + 1));
        }
        CHECK(is_near(got->importance[l * 2], 2 * ends[0], 20));
        CHECK(is_near(got->importance[l * 2 + 1], 2 * ends[1], 20));
    }
}

static void
test_every_table(void)
{
    const krul_dtype dtypes[] = {KRUL_DTYPE_F32, KRUL_DTYPE_F16, KRUL_DTYPE_BF16};
    for (size_t t = 0; t < KRUL_LENGTH(dtypes); t++) {
        fill(dtypes[t]);
        expect_rows();
        for (int i = 0; i < krul_backend_count(); i++) {
            const krul_backend *backend = krul_backend_at(i);
            if (!krul_backend_is_usable(backend)) {
                continue;
            }
            for (int n_threads = 1; n_threads <= 3; n_threads++) {
                krul_error err;
                result whole = {0}, chunked = {0};
                CHECK(observe(backend, dtypes[t], 1 << 24, n_threads, &whole, &err) ==
                      KRUL_STATUS_OK);
                check_result(&whole);
                CHECK(observe(backend, dtypes[t], 0, n_threads, &chunked, &err) == KRUL_STATUS_OK);
                check_result(&chunked);
            }
        }
    }
}

static void
test_threads_change_nothing(void)
{
    krul_error err;
    result one = {0}, three = {0};
    fill(KRUL_DTYPE_BF16);
    CHECK(observe(check_best_backend(), KRUL_DTYPE_BF16, 1 << 24, 1, &one, &err) == KRUL_STATUS_OK);
    CHECK(observe(check_best_backend(), KRUL_DTYPE_BF16, 1 << 24, 3, &three, &err) ==
          KRUL_STATUS_OK);
    CHECK(memcmp(&one, &three, sizeof one) == 0);
}

/* A call that must fail with that status and leave the sums alone. */
static void
check_refused(const krul_estimator_layer *layers, int32_t n_layers, int64_t n_rows, int64_t n_keys,
              double weight, int64_t stride, krul_status wanted)
{
    krul_error err;
    result out = {0};
    krul_estimator_sums sums = {out.distances, out.importance, out.received, stride, &out.n_rows};
    CHECK(krul_estimator_observe(krul_backend_at(krul_backend_count() - 1), layers, n_layers,
                                 positions, n_rows, NULL, n_keys, weight, 0, 1, &sums,
                                 &err) == wanted);
    CHECK(err.status == wanted && err.message[0] != '\0');
    result zero = {0};
    CHECK(memcmp(&out, &zero, sizeof out) == 0);
}

static void
test_refusals(void)
{
    krul_estimator_layer good[N_LAYERS], layers[N_LAYERS];
    fill(KRUL_DTYPE_F32);
    describe(KRUL_DTYPE_F32, good);
    check_refused(good, 0, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);
    check_refused(good, N_LAYERS, -1, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);
    check_refused(good, N_LAYERS, N_ROWS, INT64_MAX, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);
    check_refused(good, N_LAYERS, N_ROWS, N_KEYS - 1, 1, STRIDE, KRUL_STATUS_BAD_VALUE);
    check_refused(good, N_LAYERS, N_ROWS, N_KEYS, 1, N_KEYS - 1, KRUL_STATUS_BAD_SHAPE);
    check_refused(good, N_LAYERS, N_ROWS, N_KEYS, -1, STRIDE, KRUL_STATUS_BAD_VALUE);
    check_refused(good, N_LAYERS, N_ROWS, N_KEYS, (double)NAN, STRIDE, KRUL_STATUS_BAD_VALUE);
    check_refused(good, N_LAYERS, N_ROWS - 1, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);

    memcpy(layers, good, sizeof good);
    layers[1].keys.shape[1] = 5;
    check_refused(layers, N_LAYERS, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);
    memcpy(layers, good, sizeof good);
    layers[2].queries.shape[3] = HEAD_DIM - 1;
    check_refused(layers, N_LAYERS, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);
    memcpy(layers, good, sizeof good);
    layers[0].keys.device_type = KRUL_DEVICE_CUDA;
    check_refused(layers, N_LAYERS, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_UNSUPPORTED);
    memcpy(layers, good, sizeof good);
    layers[0].key_start = 1;
    check_refused(layers, N_LAYERS, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_SHAPE);
    memcpy(layers, good, sizeof good);
    layers[1].softcap = -1;
    check_refused(layers, N_LAYERS, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_VALUE);
    memcpy(layers, good, sizeof good);
    row_starts[1][0] = 3;
    check_refused(layers, N_LAYERS, N_ROWS, N_KEYS, 1, STRIDE, KRUL_STATUS_BAD_VALUE);
}

static void
test_nothing_observed(void)
{
    krul_error err;
    result out = {0};
    krul_estimator_layer layers[N_LAYERS];
    memset(layers, 0, sizeof layers);
    krul_estimator_sums sums = {out.distances, out.importance, out.received, STRIDE, &out.n_rows};
    CHECK(krul_estimator_observe(check_best_backend(), layers, N_LAYERS, positions, 0, NULL, 0, 1,
                                 0, 1, &sums, &err) == KRUL_STATUS_OK);
    for (int i = 0; i < N_LAYERS * N_LAYERS; i++) {
        CHECK(isnan(out.distances[i]));
    }
    CHECK(out.n_rows == 0);
}

int
main(void)
{
    test_every_table();
    test_threads_change_nothing();
    test_refusals();
    test_nothing_observed();
    return check_finish();
}

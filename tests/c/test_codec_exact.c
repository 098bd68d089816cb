/* test_codec_exact.c - every bit back, from any strides, and damaged blocks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/compressor.h"
#include "check.h"

/* Test data: what the elements are. */
typedef enum content { NORMAL, ANY_BITS, ZEROS, N_CONTENTS } content;

static uint32_t random_state = 1;

static uint32_t
next_random(void)
{
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

static uint32_t
any_bits(void)
{
    return next_random() << 16 ^ next_random();
}

/* Roughly normal, with a scale of its own for every channel. */
static float
normal(int64_t channel)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += (float)next_random() / 0x1p24f - 0.5f;
    }
    return ldexpf(sum, (int)(channel * 7 % 5) - 2);
}

static void
fill(content kind, krul_dtype dtype, int64_t head_dim, int64_t n_elements, uint8_t *out)
{
    for (int64_t i = 0; i < n_elements; i++) {
        float value = kind == NORMAL ? normal(i % head_dim) : 0.0f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        bits = kind == ANY_BITS ? any_bits() : bits;
        if (dtype == KRUL_DTYPE_F32) {
            memcpy(out + 4 * i, &bits, 4);
        }
        else {
            /* As f16 these are other numbers, with the same shape of distribution. */
            uint16_t half = (uint16_t)(bits >> 16);
            memcpy(out + 2 * i, &half, 2);
        }
    }
}

/* n_batch x n_heads x n_tokens x head_dim elements in memory that has room for more tokens. */
static krul_view
make_view(uint8_t *data, krul_dtype dtype, const int64_t shape[4], bool is_token_major)
{
    krul_view view = {.data = data, .dtype = dtype, .device_type = KRUL_DEVICE_CPU};
    memcpy(view.shape, shape, sizeof view.shape);
    view.stride[3] = 1;
    view.stride[2] = is_token_major ? shape[1] * shape[3] + 3 : shape[3];
    view.stride[1] = is_token_major ? shape[3] : (shape[2] + 2) * shape[3];
    view.stride[0] = (shape[2] + 2) * (shape[1] * shape[3] + 3);
    return view;
}

static size_t
span_bytes(krul_dtype dtype, const int64_t shape[4])
{
    return (size_t)(shape[0] * (shape[2] + 2) * (shape[1] * shape[3] + 3)) *
           krul_dtype_bytes(dtype);
}

static uint8_t *
element_at(const krul_view *view, int64_t index)
{
    int64_t channel = index % view->shape[3];
    int64_t token = index / view->shape[3] % view->shape[2];
    int64_t head = index / view->shape[3] / view->shape[2] % view->shape[1];
    int64_t batch = index / view->shape[3] / view->shape[2] / view->shape[1];
    int64_t at = batch * view->stride[0] + head * view->stride[1] + token * view->stride[2] +
                 channel;
    return (uint8_t *)view->data + at * (int64_t)krul_dtype_bytes(view->dtype);
}

/* Encode two views together; decode both, then the second alone. */
static void
test_round_trip(const krul_backend *backend, krul_dtype dtype, content kind, const int64_t shape[4],
                bool is_token_major)
{
    krul_error err;
    size_t n_bytes_span = span_bytes(dtype, shape), element_bytes = krul_dtype_bytes(dtype);
    int64_t n_elements = shape[0] * shape[1] * shape[2] * shape[3];
    uint8_t *memory[4];
    krul_view views[4];
    for (int i = 0; i < 4; i++) {
        memory[i] = malloc(n_bytes_span + 1);
        memset(memory[i], 0x5a, n_bytes_span + 1);
        views[i] = make_view(memory[i], dtype, shape, is_token_major);
    }
    uint8_t *elements = malloc((size_t)n_elements * element_bytes + 1);
    for (int i = 0; i < 2; i++) {
        fill(kind, dtype, shape[3], n_elements, elements);
        for (int64_t at = 0; at < n_elements; at++) {
            memcpy(element_at(&views[i], at), elements + at * (int64_t)element_bytes,
                   element_bytes);
        }
    }
    krul_codec_block block = {.backend = backend, .n_views = 2, .views = views};
    size_t bound = 0, n_bytes = 0;
    bool fits = false;
    double sums[2] = {-1, -1};
    CHECK(krul_codec_exact.bound(&block, &bound, &err) == KRUL_STATUS_OK);
    CHECK(bound == 2 * (8 + (size_t)n_elements * element_bytes));
    uint8_t *payload = malloc(bound);
    CHECK(krul_codec_exact.encode(&block, payload, bound - 1, &n_bytes, &fits, sums, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(krul_codec_exact.encode(&block, payload, bound, &n_bytes, &fits, sums, &err) ==
          KRUL_STATUS_OK);
    CHECK(fits && n_bytes <= bound && sums[0] == 0 && isfinite(sums[1]));
    CHECK(kind != ZEROS || sums[1] == 0);
    CHECK(kind != NORMAL || n_elements < 5000 || n_bytes < bound - bound / 8);
    uint8_t *exact_payload = malloc(n_bytes);
    memcpy(exact_payload, payload, n_bytes);

    krul_codec_block out = {.backend = backend, .n_views = 2, .views = views + 2};
    CHECK(krul_codec_exact.decode(&out, exact_payload, n_bytes, &err) == KRUL_STATUS_OK);
    /* Whole spans: what lies between the rows must be as it was. */
    CHECK(memcmp(memory[0], memory[2], n_bytes_span + 1) == 0);
    CHECK(memcmp(memory[1], memory[3], n_bytes_span + 1) == 0);

    memset(memory[2], 0x5a, n_bytes_span);
    memset(memory[3], 0x5a, n_bytes_span);
    views[2].data = NULL;
    CHECK(krul_codec_exact.decode(&out, exact_payload, n_bytes, &err) == KRUL_STATUS_OK);
    CHECK(memcmp(memory[1], memory[3], n_bytes_span + 1) == 0);
    views[2].data = memory[2];

    bool is_refused = true;
    size_t step = n_bytes < 1000 ? 1 : n_bytes / 17;
    for (size_t n_kept = 0; n_kept < n_bytes; n_kept += step) {
        uint8_t *cut = malloc(n_kept + (n_kept == 0));
        memcpy(cut, payload, n_kept);
        is_refused &= krul_codec_exact.decode(&out, cut, n_kept, &err) == KRUL_STATUS_CORRUPT;
        free(cut);
    }
    CHECK(is_refused);
    bool is_known = true;
    for (size_t at = 0; at < n_bytes; at += step) {
        uint8_t kept = exact_payload[at];
        exact_payload[at] = (uint8_t)(kept ^ 1 << next_random() % 8);
        krul_status status = krul_codec_exact.decode(&out, exact_payload, n_bytes, &err);
        is_known &= status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT;
        exact_payload[at] = kept;
    }
    CHECK(is_known);
    free(exact_payload);
    free(payload);
    free(elements);
    for (int i = 0; i < 4; i++) {
        free(memory[i]);
    }
}

/* What the second sum is, and that infinities and NaN do not reach it. */
static void
test_energy(void)
{
    krul_error err;
    float values[6] = {1, -2, INFINITY, 3, NAN, -0.0f};
    krul_view view = {
        .data = values, .dtype = KRUL_DTYPE_F32, .shape = {1, 1, 3, 2}, .stride = {6, 6, 2, 1}};
    krul_codec_block block = {
        .backend = krul_backend_at(krul_backend_count() - 1), .n_views = 1, .views = &view};
    uint8_t payload[8 + sizeof values];
    size_t n_bytes = 0;
    bool fits = false;
    double sums[2];
    CHECK(krul_codec_exact.encode(&block, payload, sizeof payload, &n_bytes, &fits, sums, &err) ==
          KRUL_STATUS_OK);
    CHECK(n_bytes == sizeof payload && sums[0] == 0 && sums[1] == 14);
}

int
main(void)
{
    static const int64_t shapes[][4] = {
        {1, 1, 0, 64},   {1, 1, 1, 1},   {1, 3, 4, 64},   {2, 3, 33, 5},
        {1, 2, 257, 32}, {2, 2, 64, 80}, {1, 3, 600, 64}, {1, 1, 3, 20000},
    };
    static const krul_dtype dtypes[] = {KRUL_DTYPE_F32, KRUL_DTYPE_F16, KRUL_DTYPE_BF16};
    for (int at = 0; at < krul_backend_count(); at++) {
        const krul_backend *backend = krul_backend_at(at);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        for (size_t shape = 0; shape < sizeof shapes / sizeof shapes[0]; shape++) {
            for (int dtype = 0; dtype < 3; dtype++) {
                for (int kind = 0; kind < N_CONTENTS; kind++) {
                    test_round_trip(backend, dtypes[dtype], (content)kind, shapes[shape],
                                    (shape + (size_t)kind) % 2 == 0);
                }
            }
        }
    }
    test_energy();
    return check_finish();
}

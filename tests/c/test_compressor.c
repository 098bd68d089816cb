/* test_compressor.c - codecs from C: round trips, agreement of the backends, damage, refusals. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "check.h"
#include "dtype.h"
#include "internal.h"

enum { GUARD_BYTES = 64 };
static const uint8_t guard_byte = 0xa5;

static const krul_dtype dtypes[] = {KRUL_DTYPE_F32, KRUL_DTYPE_F16, KRUL_DTYPE_BF16};
static const krul_codec codecs[] = {KRUL_CODEC_EXACT, KRUL_CODEC_INT8,       KRUL_CODEC_INT4,
                                    KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4};

static uint64_t random_state = 88172645463325252u;

static uint32_t
random_u32(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}

static float
random_f32(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += (float)(random_u32() >> 8) * 0x1p-24f - 0.5f;
    }
    return sum;
}

/* Memory of exactly the size asked for, so that the sanitizer sees every step beyond it. */
static void *
allocate(size_t n_bytes)
{
    void *memory = malloc(n_bytes > 0 ? n_bytes : 1);
    if (memory == NULL) {
        abort();
    }
    return memory;
}

static const krul_backend *
backend_named(const char *name)
{
    const krul_backend *backend = NULL;
    CHECK(krul_backend_find(name, &backend, NULL) == KRUL_STATUS_OK);
    return backend;
}

/* A dense view of two heads in memory of its own, filled with random values. */
static krul_view
view_new(krul_dtype dtype, int64_t n_tokens, int64_t head_dim)
{
    krul_view view = {
        .dtype = dtype,
        .device_type = KRUL_DEVICE_CPU,
        .shape = {1, 2, n_tokens, head_dim},
        .stride = {2 * n_tokens * head_dim, n_tokens * head_dim, head_dim, 1},
    };
    size_t n_elements = (size_t)(2 * n_tokens * head_dim);
    float *values = allocate(n_elements * sizeof *values);
    view.data = allocate(n_elements * krul_dtype_bytes(dtype));
    for (size_t i = 0; i < n_elements; i++) {
        values[i] = 3 * random_f32() + (i % 3 == 0 ? 1.5f : 0.0f);
    }
    backend_named("scalar")->narrow(dtype, values, (int64_t)n_elements, view.data);
    free(values);
    return view;
}

static size_t
view_bytes(const krul_view *view)
{
    return (size_t)krul_view_n_elements(view) * krul_dtype_bytes(view->dtype);
}

/* sum |x|^2 of a view, and sum |x - y|^2 of two. */
static void
sum_squares(const krul_view *view, const krul_view *other, double sums[2])
{
    int64_t n_elements = krul_view_n_elements(view);
    float *left = allocate((size_t)n_elements * sizeof *left);
    float *right = allocate((size_t)n_elements * sizeof *right);
    backend_named("scalar")->widen(view->dtype, view->data, n_elements, left);
    backend_named("scalar")->widen(other->dtype, other->data, n_elements, right);
    for (int64_t i = 0; i < n_elements; i++) {
        double error = (double)left[i] - (double)right[i];
        sums[0] += error * error;
        sums[1] += (double)left[i] * (double)left[i];
    }
    free(left);
    free(right);
}

/* One block through every backend: the same payload, the same values, the error that was claimed,
 * nothing written beside the output; then each half alone. */
static void
check_round_trip(krul_codec codec, krul_kv kv, krul_dtype dtype, int64_t n_tokens, int64_t head_dim,
                 double tolerance)
{
    int n_views = krul_codec_n_layers(codec);
    krul_view views[2] = {view_new(dtype, n_tokens, head_dim), view_new(dtype, n_tokens, head_dim)};
    size_t bytes = view_bytes(&views[0]);
    size_t capacity = 0;
    size_t first_bytes = 0;
    uint8_t *first_payload = NULL;
    uint8_t *first_values[2] = {NULL, NULL};
    CHECK(krul_compressor_bound(views, n_views, &capacity, NULL) == KRUL_STATUS_OK);
    for (int index = 0; index < krul_backend_count(); index++) {
        const krul_backend *backend = krul_backend_at(index);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        uint8_t *payload = allocate(capacity);
        size_t n_bytes = 0;
        krul_codec used = KRUL_CODEC_EXACT;
        double claimed[2] = {-1, -1};
        double sums[2] = {0, 0};
        CHECK(krul_compressor_encode(backend, codec, kv, views, n_views, payload, capacity,
                                     &n_bytes, &used, claimed, NULL) == KRUL_STATUS_OK);
        CHECK(used == codec);
        uint8_t *exact = allocate(n_bytes);
        memcpy(exact, payload, n_bytes);
        free(payload);
        krul_view outs[2] = {views[0], views[1]};
        uint8_t *memory[2];
        for (int i = 0; i < n_views; i++) {
            memory[i] = allocate(bytes + 2 * GUARD_BYTES);
            memset(memory[i], guard_byte, bytes + 2 * GUARD_BYTES);
            outs[i].data = memory[i] + GUARD_BYTES;
        }
        CHECK(krul_compressor_decode(backend, used, kv, exact, n_bytes, outs, n_views, NULL) ==
              KRUL_STATUS_OK);
        for (int i = 0; i < n_views; i++) {
            for (int j = 0; j < GUARD_BYTES; j++) {
                CHECK(memory[i][j] == guard_byte &&
                      memory[i][GUARD_BYTES + bytes + (size_t)j] == guard_byte);
            }
            sum_squares(&views[i], &outs[i], sums);
            if (first_values[i] == NULL) {
                first_values[i] = allocate(bytes);
                memcpy(first_values[i], outs[i].data, bytes);
            }
            CHECK(memcmp(first_values[i], outs[i].data, bytes) == 0);
        }
        CHECK(fabs(claimed[0] - sums[0]) <= 1e-9 * sums[0]);
        CHECK(fabs(claimed[1] - sums[1]) <= 1e-9 * sums[1]);
        CHECK(sums[0] <= tolerance * sums[1]);
        for (int i = 0; i < n_views; i++) {
            krul_view only[2] = {outs[0], outs[1]};
            memset(outs[i].data, 0, bytes);
            only[1 - i].data = NULL;
            CHECK(krul_compressor_decode(backend, used, kv, exact, n_bytes, only, n_views, NULL) ==
                  KRUL_STATUS_OK);
            CHECK(memcmp(first_values[i], outs[i].data, bytes) == 0);
        }
        if (first_payload == NULL) {
            first_payload = exact;
            first_bytes = n_bytes;
        }
        CHECK(n_bytes == first_bytes && memcmp(exact, first_payload, n_bytes) == 0);
        if (exact != first_payload) {
            free(exact);
        }
        for (int i = 0; i < n_views; i++) {
            free(memory[i]);
        }
    }
    free(first_payload);
    for (int i = 0; i < 2; i++) {
        free(first_values[i]);
        free(views[i].data);
    }
}

static void
test_round_trips(void)
{
    static const int64_t n_tokens[] = {1, 2, 31, 64, 65, 130};
    static const int64_t head_dims[] = {1, 3, 64, 80, 129};
    for (size_t c = 0; c < KRUL_LENGTH(codecs); c++) {
        for (size_t d = 0; d < KRUL_LENGTH(dtypes); d++) {
            for (size_t n = 0; n < KRUL_LENGTH(n_tokens); n++) {
                for (size_t h = 0; h < KRUL_LENGTH(head_dims); h++) {
                    /* Share merges unrelated layers here: at worst, both are lost. */
                    double tolerance = codecs[c] == KRUL_CODEC_EXACT  ? 0
                                       : codecs[c] == KRUL_CODEC_INT8 ? 1e-3
                                       : codecs[c] == KRUL_CODEC_INT4 ? 2e-2
                                                                      : 4;
                    check_round_trip(codecs[c], n % 2 == 0 ? KRUL_KV_KEY : KRUL_KV_VALUE, dtypes[d],
                                     n_tokens[n], head_dims[h], tolerance);
                }
            }
        }
        check_round_trip(codecs[c], KRUL_KV_VALUE, KRUL_DTYPE_BF16, 2100, 128, 4);
        check_round_trip(codecs[c], KRUL_KV_KEY, KRUL_DTYPE_F32, 1100, 128, 4);
    }
}

/* Widening and narrowing agree with dtype.h for every 16-bit pattern, and around every tie. */
static void
test_rows(void)
{
    enum { N_ELEMENTS = 65536 };
    uint16_t *bits = allocate(N_ELEMENTS * sizeof *bits);
    uint16_t *narrowed = allocate(N_ELEMENTS * sizeof *narrowed);
    float *values = allocate(N_ELEMENTS * sizeof *values);
    for (int index = 0; index < krul_backend_count(); index++) {
        const krul_backend *backend = krul_backend_at(index);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        for (int is_bf16 = 0; is_bf16 < 2; is_bf16++) {
            krul_dtype dtype = is_bf16 ? KRUL_DTYPE_BF16 : KRUL_DTYPE_F16;
            for (uint32_t i = 0; i < N_ELEMENTS; i++) {
                bits[i] = (uint16_t)i;
            }
            backend->widen(dtype, bits, N_ELEMENTS, values);
            for (uint32_t i = 0; i < N_ELEMENTS; i++) {
                float wanted = is_bf16 ? krul_bf16_to_f32((uint16_t)i)
                                       : krul_f16_to_f32((uint16_t)i);
                CHECK(krul_f32_to_bits(values[i]) == krul_f32_to_bits(wanted));
            }
            for (int shift = -1; shift <= 1; shift++) {
                for (uint32_t i = 0; i < N_ELEMENTS; i++) {
                    uint32_t tie = krul_f32_to_bits(values[i]) + (is_bf16 ? 0x8000u : 0x1000u);
                    values[i] = krul_bits_to_f32(tie + (uint32_t)shift);
                }
                backend->narrow(dtype, values, N_ELEMENTS, narrowed);
                for (uint32_t i = 0; i < N_ELEMENTS; i++) {
                    uint16_t wanted = is_bf16 ? krul_f32_to_bf16(values[i])
                                              : krul_f32_to_f16(values[i]);
                    CHECK(narrowed[i] == wanted);
                }
                backend->widen(dtype, bits, N_ELEMENTS, values);
            }
        }
    }
    free(bits);
    free(narrowed);
    free(values);
}

static void
set_f32(krul_view *view, int64_t index, float value)
{
    uint8_t *element = (uint8_t *)view->data + (size_t)index * krul_dtype_bytes(view->dtype);
    backend_named("scalar")->narrow(view->dtype, &value, 1, element);
}

static krul_codec
codec_used(krul_codec codec, krul_kv kv, const krul_view *views)
{
    int n_views = krul_codec_n_layers(codec);
    size_t capacity = 0;
    size_t n_bytes = 0;
    krul_codec used = codec;
    CHECK(krul_compressor_bound(views, n_views, &capacity, NULL) == KRUL_STATUS_OK);
    uint8_t *payload = allocate(capacity);
    CHECK(krul_compressor_encode(backend_named(NULL), codec, kv, views, n_views, payload, capacity,
                                 &n_bytes, &used, NULL, NULL) == KRUL_STATUS_OK);
    free(payload);
    return used;
}

static void
test_fall_backs(void)
{
    static const float values[] = {NAN, INFINITY, -INFINITY};
    for (size_t c = 1; c < KRUL_LENGTH(codecs); c++) {
        for (size_t d = 0; d < KRUL_LENGTH(dtypes); d++) {
            krul_view views[2] = {view_new(dtypes[d], 66, 67), view_new(dtypes[d], 66, 67)};
            int last = krul_codec_n_layers(codecs[c]) - 1;
            CHECK(codec_used(codecs[c], KRUL_KV_KEY, views) == codecs[c]);
            for (size_t v = 0; v < KRUL_LENGTH(values); v++) {
                int64_t at = (int64_t)random_u32() % krul_view_n_elements(views);
                set_f32(&views[last], at, values[v]);
                CHECK(codec_used(codecs[c], KRUL_KV_KEY, views) == KRUL_CODEC_EXACT);
                CHECK(codec_used(codecs[c], KRUL_KV_VALUE, views) == KRUL_CODEC_EXACT);
                set_f32(&views[last], at, 1);
            }
            /* The two ends of the dtype in one group: their distance has no scale. */
            float huge = dtypes[d] == KRUL_DTYPE_F16 ? 65504.0f : 0x1.fep127f;
            set_f32(&views[last], 0, huge);
            set_f32(&views[last], 1, -huge);
            set_f32(&views[last], 67, -huge);
            if (last == 0) {
                CHECK(codec_used(codecs[c], KRUL_KV_KEY, views) == KRUL_CODEC_EXACT);
                CHECK(codec_used(codecs[c], KRUL_KV_VALUE, views) == KRUL_CODEC_EXACT);
            }
            free(views[0].data);
            free(views[1].data);
        }
    }
}

/* Every length but the right one is refused; any byte may be anything. Each payload has memory of
 * its own size, so that the sanitizer sees a step beyond it. */
static void
test_damage(void)
{
    for (size_t c = 1; c < KRUL_LENGTH(codecs); c++) {
        int n_views = krul_codec_n_layers(codecs[c]);
        krul_view views[2] = {view_new(KRUL_DTYPE_BF16, 45, 13), view_new(KRUL_DTYPE_BF16, 45, 13)};
        krul_view outs[2] = {view_new(KRUL_DTYPE_BF16, 45, 13), view_new(KRUL_DTYPE_BF16, 45, 13)};
        size_t capacity = 0;
        size_t n_bytes = 0;
        krul_codec used;
        krul_error err;
        CHECK(krul_compressor_bound(views, n_views, &capacity, NULL) == KRUL_STATUS_OK);
        uint8_t *payload = allocate(capacity);
        CHECK(krul_compressor_encode(backend_named(NULL), codecs[c], KRUL_KV_VALUE, views, n_views,
                                     payload, capacity, &n_bytes, &used, NULL,
                                     NULL) == KRUL_STATUS_OK);
        for (size_t length = 0; length < n_bytes + 3; length++) {
            uint8_t *part = allocate(length);
            memcpy(part, payload, length < n_bytes ? length : n_bytes);
            krul_status status = krul_compressor_decode(backend_named(NULL), used, KRUL_KV_VALUE,
                                                        part, length, outs, n_views, &err);
            CHECK(status == (length == n_bytes ? KRUL_STATUS_OK : KRUL_STATUS_CORRUPT));
            free(part);
        }
        for (int round = 0; round < 3000; round++) {
            uint8_t *damaged = allocate(n_bytes);
            memcpy(damaged, payload, n_bytes);
            for (uint32_t i = 0; i <= random_u32() % 4; i++) {
                damaged[random_u32() % (round % 2 == 0 ? 16 : (uint32_t)n_bytes)] = (uint8_t)
                    random_u32();
            }
            const krul_backend *backend = krul_backend_at(round % krul_backend_count());
            if (krul_backend_is_usable(backend)) {
                krul_status status = krul_compressor_decode(backend, used, KRUL_KV_VALUE, damaged,
                                                            n_bytes, outs, n_views, &err);
                CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT);
            }
            free(damaged);
        }
        free(payload);
        for (int i = 0; i < 2; i++) {
            free(views[i].data);
            free(outs[i].data);
        }
    }
}

/* Encode and decode once with these arguments and expect this refusal from both. */
static void
check_refused(krul_codec codec, krul_kv kv, const krul_view *views, int n_views, krul_status wanted,
              const char *words)
{
    static uint8_t payload[1 << 16];
    size_t n_bytes = 77;
    krul_codec used = KRUL_CODEC_INT8;
    double sums[2] = {7, 7};
    krul_error err = {.status = KRUL_STATUS_OK};
    krul_status status = krul_compressor_encode(backend_named(NULL), codec, kv, views, n_views,
                                                payload, sizeof payload, &n_bytes, &used, sums,
                                                &err);
    CHECK(status == wanted && err.status == wanted && strstr(err.message, words) != NULL);
    CHECK(n_bytes == 77 && used == KRUL_CODEC_INT8 && sums[0] == 7 && sums[1] == 7);
    status = krul_compressor_decode(backend_named(NULL), codec, kv, payload, sizeof payload, views,
                                    n_views, &err);
    CHECK(status == wanted && err.status == wanted && strstr(err.message, words) != NULL);
    CHECK(krul_compressor_decode(backend_named(NULL), codec, kv, payload, sizeof payload, views,
                                 n_views, NULL) == wanted);
}

static void
test_refusals(void)
{
    krul_view views[3] = {view_new(KRUL_DTYPE_F32, 5, 6), view_new(KRUL_DTYPE_F32, 5, 6)};
    krul_view bad[2];
    const krul_kv key = KRUL_KV_KEY;
    check_refused((krul_codec)0, key, views, 1, KRUL_STATUS_BAD_VALUE, "codec is 0");
    check_refused((krul_codec)8, key, views, 1, KRUL_STATUS_BAD_VALUE, "codec is 8");
    check_refused(KRUL_CODEC_PREDICT, key, views, 1, KRUL_STATUS_BAD_VALUE, "chains of layers");
    check_refused(KRUL_CODEC_INT8, (krul_kv)3, views, 1, KRUL_STATUS_BAD_VALUE, "kv is 3");
    check_refused(KRUL_CODEC_EXACT, key, views, 0, KRUL_STATUS_BAD_VALUE, "n_views is 0");
    check_refused(KRUL_CODEC_EXACT, key, views, 3, KRUL_STATUS_BAD_VALUE, "n_views is 3");
    check_refused(KRUL_CODEC_INT4, key, views, 2, KRUL_STATUS_BAD_SHAPE, "takes 1 view but got 2");
    check_refused(KRUL_CODEC_SHARE, key, views, 1, KRUL_STATUS_BAD_SHAPE,
                  "takes 2 views but got 1");
    memcpy(bad, views, sizeof bad);
    bad[1].dtype = KRUL_DTYPE_BF16;
    check_refused(KRUL_CODEC_SHARE, key, bad, 2, KRUL_STATUS_BAD_DTYPE, "is bfloat16");
    memcpy(bad, views, sizeof bad);
    bad[1].shape[2] = 4;
    check_refused(KRUL_CODEC_SHARE, key, bad, 2, KRUL_STATUS_BAD_SHAPE, "(1, 2, 4, 6)");
    memcpy(bad, views, sizeof bad);
    bad[0].device_type = KRUL_DEVICE_CUDA;
    check_refused(KRUL_CODEC_INT8, key, bad, 1, KRUL_STATUS_UNSUPPORTED, "device type 2");
    memcpy(bad, views, sizeof bad);
    bad[0].stride[3] = 2;
    bad[0].shape[3] = 3;
    check_refused(KRUL_CODEC_INT8, key, bad, 1, KRUL_STATUS_BAD_SHAPE, "views[0]");

    uint8_t payload[1024];
    size_t n_bytes = 0;
    krul_codec used;
    krul_error err;
    CHECK(krul_compressor_encode(backend_named(NULL), KRUL_CODEC_INT8, key, views, 1, payload, 10,
                                 &n_bytes, &used, NULL, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "capacity_bytes is 10") != NULL);
    CHECK(krul_compressor_encode(backend_named(NULL), KRUL_CODEC_INT8, key, views, 1, views[0].data,
                                 200, &n_bytes, &used, NULL, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "shares memory with views[0]") != NULL);
    CHECK(krul_compressor_decode(backend_named(NULL), KRUL_CODEC_INT8, key,
                                 (const uint8_t *)views[0].data + 8, 84, views, 1,
                                 &err) == KRUL_STATUS_BAD_VALUE);
    bad[0] = bad[1] = views[0];
    CHECK(krul_compressor_decode(backend_named(NULL), KRUL_CODEC_SHARE, key, payload, 84, bad, 2,
                                 &err) == KRUL_STATUS_BAD_VALUE);
    bad[0].is_read_only = true;
    CHECK(krul_compressor_decode(backend_named(NULL), KRUL_CODEC_INT8, key, payload, 84, bad, 1,
                                 &err) != KRUL_STATUS_OK);
    CHECK(krul_codec_name((krul_codec)9) == NULL && krul_codec_n_layers((krul_codec)9) == 0);
    CHECK(strcmp(krul_codec_name(KRUL_CODEC_SHARE_INT4), "share+int4") == 0);
    free(views[0].data);
    free(views[1].data);
}

/* Shapes whose sizes do not fit are refused before anything is touched. */
static void
test_overflow(void)
{
    static float one;
    krul_view views[2];
    for (int i = 0; i < 2; i++) {
        views[i] = (krul_view){
            .data = &one,
            .dtype = KRUL_DTYPE_F32,
            .device_type = KRUL_DEVICE_CPU,
            .shape = {1, 1, (int64_t)1 << 62, 1},
            .stride = {0, 0, 0, 1},
        };
    }
    size_t n_bytes = 5;
    CHECK(krul_compressor_bound(views, 1, &n_bytes, NULL) == KRUL_STATUS_BAD_SHAPE);
    CHECK(krul_compressor_bound(views, 2, &n_bytes, NULL) == KRUL_STATUS_BAD_SHAPE);
    CHECK(n_bytes == 5);
}

int
main(void)
{
    test_rows();
    test_round_trips();
    test_fall_backs();
    test_damage();
    test_refusals();
    test_overflow();
    return check_finish();
}

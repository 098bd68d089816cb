/* test_cuda_save.cpp - blocks encoded and attention observed through cuda/device.cu, on the CPU.
 *
 * The emulator does what it is told at once, so this is about bytes and bookkeeping, not about order:
 * that is the affair of tests/c/test_compressor_device.c and test_estimator_device.c. */
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "device.h"
#include "krul.h"

extern "C" {
#include "backend.h"
}

extern "C" const krul_device_ops *krul_cuda_ops(void);

namespace {

const krul_codec codecs[] = {KRUL_CODEC_EXACT, KRUL_CODEC_INT8,       KRUL_CODEC_INT4,
                             KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4};

std::vector<uint8_t>
random_bytes(krul_dtype dtype, size_t n_values)
{
    static uint32_t state = 9;
    std::vector<float> values(n_values);
    for (float &value : values) {
        state = state * 1664525u + 1013904223u;
        value = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    std::vector<uint8_t> bytes(n_values * krul_dtype_bytes(dtype));
    check_best_backend()->narrow(dtype, values.data(), (int64_t)n_values, bytes.data());
    return bytes;
}

krul_view
view_of(std::vector<uint8_t> &bytes, krul_dtype dtype, int64_t n_batch, int64_t n_heads,
        int64_t n_tokens, int64_t head_dim, krul_device_type device)
{
    krul_view out = {};
    out.data = bytes.data();
    out.dtype = dtype;
    out.device_type = device;
    int64_t shape[] = {n_batch, n_heads, n_tokens, head_dim};
    int64_t stride[] = {n_heads * n_tokens * head_dim, n_tokens * head_dim, head_dim, 1};
    memcpy(out.shape, shape, sizeof shape);
    memcpy(out.stride, stride, sizeof stride);
    return out;
}

/* Every codec, exact of two layers, and what only exact can hold. */
void
test_encode(krul_device_pool *pool, krul_dtype dtype, int64_t head_dim)
{
    enum { N_TENSORS = 3, N_JOBS = 16 };
    const int64_t n_tokens = 77, n_heads = 2;
    std::vector<uint8_t> tensors[N_TENSORS];
    for (auto &tensor : tensors) {
        tensor = random_bytes(dtype, (size_t)(n_heads * n_tokens * head_dim));
    }
    const float infinite = INFINITY;
    check_best_backend()->narrow(dtype, &infinite, 1, tensors[2].data());
    std::vector<krul_device_job> jobs(N_JOBS);
    std::vector<std::vector<uint8_t>> rooms(N_JOBS);
    auto take_views = [&](int i, krul_view *views, krul_device_type device) {
        for (int k = 0; k < 2; k++) {
            views[k] = view_of(tensors[i >= 12 ? 2 * (1 - k) : k], dtype, 1, n_heads, n_tokens,
                               head_dim, device);
        }
    };
    for (int i = 0; i < N_JOBS; i++) {
        krul_device_job &job = jobs[(size_t)i];
        krul_view views[2];
        job.codec = i == 12 ? KRUL_CODEC_EXACT : codecs[i % 6];
        job.kv = (krul_kv)(i / 6 % 2);
        job.n_views = i == 12 ? 2 : krul_codec_n_layers(job.codec);
        take_views(i, job.views, KRUL_DEVICE_CUDA);
        take_views(i, views, KRUL_DEVICE_CPU);
        CHECK(krul_compressor_bound(views, job.n_views, &job.capacity_bytes, nullptr) ==
              KRUL_STATUS_OK);
        rooms[(size_t)i].resize(job.capacity_bytes);
        job.payload = rooms[(size_t)i].data();
    }
    krul_compressor_encode_on_device(pool, nullptr, 0, jobs.data(), N_JOBS);
    int n_exact = 0;
    for (int i = 0; i < N_JOBS; i++) {
        const krul_device_job &job = jobs[(size_t)i];
        krul_view views[2];
        size_t n_bytes = 0;
        krul_codec used = job.codec;
        double error[2] = {0, 0};
        std::vector<uint8_t> payload(job.capacity_bytes);
        take_views(i, views, KRUL_DEVICE_CPU);
        CHECK(krul_compressor_encode(check_best_backend(), job.codec, job.kv, views, job.n_views,
                                     payload.data(), payload.size(), &n_bytes, &used, error,
                                     nullptr) == KRUL_STATUS_OK);
        bool is_same = job.failure.status == KRUL_STATUS_OK && job.codec_used == used &&
                       job.payload_bytes == n_bytes &&
                       memcmp(job.payload, payload.data(), n_bytes) == 0;
        for (int k = 0; k < 2 && i < 12; k++) {
            is_same = is_same && std::fabs(job.error[k] - error[k]) <= 1e-11 * error[k];
        }
        CHECK(is_same);
        n_exact += used != job.codec;
        if (!is_same) {
            fprintf(stderr, "job %d, codec %d (used %d): %zu and %zu bytes: %s\n", i, job.codec,
                    job.codec_used, job.payload_bytes, n_bytes, job.failure.message);
        }
    }
    CHECK(n_exact > 2);
}

/* The host's sums of a device are the CPU's, within what float32 may be off by. */
void
test_observe(krul_device_pool *pool)
{
    enum { N_LAYERS = 3, N_HEADS = 4, N_KV_HEADS = 2, N_ROWS = 3, HEAD_DIM = 16, MAX_KEYS = 1300 };
    struct sums {
        double distances[N_LAYERS * N_LAYERS], importance[N_LAYERS * 2], n_rows;
        std::vector<float> received = std::vector<float>(N_LAYERS * MAX_KEYS);

        krul_estimator_sums c()
        {
            return {distances, importance, received.data(), MAX_KEYS, &n_rows};
        }
    } here = {}, there = {};
    krul_observer *observer = nullptr;
    krul_error err = {};
    CHECK(krul_observer_new(pool, 0, N_LAYERS, &observer, &err) == KRUL_STATUS_OK);
    for (int64_t n_keys : {50, 1300, 90}) {
        std::vector<uint8_t> queries[N_LAYERS], keys[N_LAYERS];
        krul_estimator_layer layers[N_LAYERS] = {};
        int64_t positions[N_ROWS] = {0, n_keys / 2, n_keys - 1};
        for (int l = 0; l < N_LAYERS; l++) {
            queries[l] = random_bytes(KRUL_DTYPE_F32, N_HEADS * N_ROWS * HEAD_DIM);
            keys[l] = random_bytes(KRUL_DTYPE_F32, (size_t)(N_KV_HEADS * n_keys * HEAD_DIM));
        }
        for (krul_device_type device : {KRUL_DEVICE_CPU, KRUL_DEVICE_CUDA}) {
            for (int l = 0; l < N_LAYERS; l++) {
                layers[l].queries = view_of(queries[l], KRUL_DTYPE_F32, 1, N_HEADS, N_ROWS,
                                            HEAD_DIM, device);
                layers[l].keys = view_of(keys[l], KRUL_DTYPE_F32, 1, N_KV_HEADS, n_keys, HEAD_DIM,
                                         device);
                layers[l].scaling = 0.3f;
            }
            krul_estimator_sums sums = here.c();
            CHECK(
                (device == KRUL_DEVICE_CPU
                     ? krul_estimator_observe(check_best_backend(), layers, N_LAYERS, positions,
                                              N_ROWS, nullptr, n_keys, 2.5, 1 << 20, 1, &sums, &err)
                     : krul_observer_observe(observer, nullptr, 0, layers, positions, N_ROWS,
                                             nullptr, n_keys, 2.5, &err)) == KRUL_STATUS_OK);
        }
    }
    krul_estimator_sums sums = there.c();
    CHECK(krul_observer_read(observer, &sums, &err) == KRUL_STATUS_OK);
    CHECK(krul_observer_read(observer, &sums, &err) == KRUL_STATUS_OK); /* zero by now */
    CHECK(here.n_rows == there.n_rows && there.n_rows == 3 * 2.5 * N_ROWS);
    auto are_near = [](double one, double other) {
        return std::fabs(one - other) <= 1e-4 * std::fabs(one) + 1e-9;
    };
    bool are_same = here.distances[1] > 0;
    for (int i = 0; i < N_LAYERS * N_LAYERS; i++) {
        are_same = are_same && are_near(here.distances[i], there.distances[i]);
    }
    for (int i = 0; i < N_LAYERS * 2; i++) {
        are_same = are_same && are_near(here.importance[i], there.importance[i]);
    }
    for (size_t i = 0; i < here.received.size(); i++) {
        are_same = are_same && are_near((double)here.received[i], (double)there.received[i]);
    }
    CHECK(are_same);
    krul_observer_free(observer);
}

} // namespace

int
main()
{
    krul_device_pool *pool = nullptr;
    CHECK(krul_device_pool_new(krul_cuda_ops(), nullptr, &pool, nullptr) == KRUL_STATUS_OK);
    test_encode(pool, KRUL_DTYPE_F32, 64);
    test_encode(pool, KRUL_DTYPE_BF16, 128);
    test_encode(pool, KRUL_DTYPE_F16, 33);
    test_observe(pool);
    krul_device_pool_free(pool);
    return check_finish();
}

/* test_cuda_restore.cpp - a whole restore through cuda/device.cu and the kernels, on the CPU.
 *
 * The emulator does what it is told at once, so this is about bytes and bookkeeping, not about order:
 * what streams and events are for is tests/c/test_restore_device.c's affair. */
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "device.h"
#include "krul.h"

extern "C" const krul_device_ops *krul_cuda_ops(void);

namespace {

enum { N_LAYERS = 7, N_HEADS = 3, BLOCK_TOKENS = 70, N_BLOCKS = 3 };

const krul_codec codecs[] = {KRUL_CODEC_INT8,  KRUL_CODEC_INT4,       KRUL_CODEC_EXACT,
                             KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT4, KRUL_CODEC_SHARE_INT8};

/* K and V of all layers, on the host or the device: each layer's K, then its V. */
struct memory {
    std::vector<uint8_t> bytes;
    size_t tensor_bytes;
    krul_dtype dtype;
    int64_t n_tokens;
    int64_t head_dim;

    memory(krul_dtype type, int64_t tokens, int64_t dim)
        : tensor_bytes((size_t)N_HEADS * (size_t)(tokens * dim) * krul_dtype_bytes(type)),
          dtype(type), n_tokens(tokens), head_dim(dim)
    {
        bytes.assign(2 * N_LAYERS * tensor_bytes, 0);
    }

    krul_view view(int layer, int kv, int64_t start, int64_t count, krul_device_type device)
    {
        krul_view out = {};
        out.data = bytes.data() + (size_t)(2 * layer + kv) * tensor_bytes +
                   (size_t)(start * head_dim) * krul_dtype_bytes(dtype);
        out.dtype = dtype;
        out.device_type = device;
        int64_t shape[] = {1, N_HEADS, count, head_dim};
        int64_t stride[] = {n_tokens * head_dim * N_HEADS, n_tokens * head_dim, head_dim, 1};
        memcpy(out.shape, shape, sizeof shape);
        memcpy(out.stride, stride, sizeof stride);
        return out;
    }
};

struct block {
    std::vector<uint8_t> payload;
    krul_store_entry entry;
};

void
fill(memory *source)
{
    uint32_t state = 5;
    size_t element_bytes = krul_dtype_bytes(source->dtype);
    for (size_t i = 0; i < source->bytes.size() / element_bytes; i++) {
        state = state * 1664525u + 1013904223u;
        float value = (float)(state >> 8) / 8388608.0f - 1.0f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (element_bytes == 2) { /* a number of either 16-bit dtype that is no NaN */
            uint16_t half = (uint16_t)(bits >> 16 & 0xBFFF);
            memcpy(&source->bytes[2 * i], &half, 2);
        }
        else {
            memcpy(&source->bytes[4 * i], &bits, 4);
        }
    }
}

/* Layers 0 to 2 alone; 3 and 4, then 5 and 6 in pairs, each with a codec of its own. */
std::vector<block>
encode(memory *source, memory *expected, krul_codec pair_codec)
{
    std::vector<block> blocks;
    for (int layer = 0; layer < N_LAYERS; layer += layer < 3 ? 1 : 2) {
        int n_views = layer < 3 ? 1 : 2;
        krul_codec codec = layer < 3    ? codecs[layer]
                           : layer == 3 ? pair_codec
                                        : KRUL_CODEC_SHARE_INT8;
        for (int i = 0; i < 2 * N_BLOCKS; i++) {
            int kv = i % 2;
            int64_t start = i / 2 * BLOCK_TOKENS;
            int64_t count = std::min<int64_t>(source->n_tokens - start, BLOCK_TOKENS);
            krul_view in[2] = {source->view(layer, kv, start, count, KRUL_DEVICE_CPU), {}};
            krul_view out[2] = {expected->view(layer, kv, start, count, KRUL_DEVICE_CPU), {}};
            if (n_views == 2) {
                in[1] = source->view(layer + 1, kv, start, count, KRUL_DEVICE_CPU);
                out[1] = expected->view(layer + 1, kv, start, count, KRUL_DEVICE_CPU);
            }
            size_t bound = 0, n_bytes = 0;
            block made = {};
            CHECK(krul_compressor_bound(in, n_views, &bound, nullptr) == KRUL_STATUS_OK);
            made.payload.resize(bound);
            krul_codec used = codec;
            CHECK(krul_compressor_encode(check_best_backend(), codec, (krul_kv)kv, in, n_views,
                                         made.payload.data(), bound, &n_bytes, &used, nullptr,
                                         nullptr) == KRUL_STATUS_OK);
            made.payload.resize(n_bytes);
            made.payload.shrink_to_fit();
            CHECK(krul_compressor_decode(check_best_backend(), used, (krul_kv)kv,
                                         made.payload.data(), n_bytes, out, n_views,
                                         nullptr) == KRUL_STATUS_OK);
            made.entry.kind = KRUL_STORE_ENTRY_BLOCK;
            made.entry.codec = used;
            made.entry.kv = (krul_kv)kv;
            made.entry.dtype = source->dtype;
            made.entry.layer_lower = layer;
            made.entry.layer_upper = n_views == 2 ? layer + 1 : -1;
            made.entry.n_batch = 1;
            made.entry.n_heads = N_HEADS;
            made.entry.head_dim = (int32_t)source->head_dim;
            made.entry.token_start = start;
            made.entry.n_tokens = count;
            made.entry.payload_bytes = n_bytes;
            blocks.push_back(made);
        }
    }
    return blocks;
}

void
test(krul_dtype dtype, int64_t head_dim, krul_codec pair_codec, size_t chunk_bytes)
{
    const int64_t n_tokens = 2 * BLOCK_TOKENS + 33;
    memory source(dtype, n_tokens, head_dim), expected(dtype, n_tokens, head_dim);
    memory target(dtype, n_tokens, head_dim);
    fill(&source);
    std::vector<block> blocks = encode(&source, &expected, pair_codec);
    std::vector<krul_restore_step> steps;
    for (block &each : blocks) {
        krul_restore_step step = {};
        const krul_store_entry &entry = each.entry;
        step.fd = -1;
        step.payload = each.payload.data();
        step.entry = entry;
        step.views[0] = target.view(entry.layer_lower, (int)entry.kv, entry.token_start,
                                    entry.n_tokens, KRUL_DEVICE_CUDA);
        if (entry.layer_upper >= 0) {
            step.views[1] = target.view(entry.layer_upper, (int)entry.kv, entry.token_start,
                                        entry.n_tokens, KRUL_DEVICE_CUDA);
        }
        steps.push_back(step);
    }
    krul_device_pool *pool = nullptr;
    krul_device_pool_options sizes = {};
    sizes.chunk_bytes = chunk_bytes;
    CHECK(krul_device_pool_new(krul_cuda_ops(), &sizes, &pool, nullptr) == KRUL_STATUS_OK);
    krul_restore *restore = nullptr;
    krul_restore_options options = {};
    options.n_threads = 2;
    options.devices = pool;
    krul_error err = {};
    CHECK(krul_restore_start(check_best_backend(), steps.data(), (int64_t)steps.size(), N_LAYERS,
                             &options, &restore, &err) == KRUL_STATUS_OK);
    if (restore == nullptr) {
        fprintf(stderr, "%s\n", err.message);
        return;
    }
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        if (krul_restore_wait_stream(restore, layer, nullptr, &err) != KRUL_STATUS_OK) {
            fprintf(stderr, "%s\n", err.message);
            CHECK(!"a layer failed");
        }
    }
    krul_restore_join(restore);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        size_t at = 2 * (size_t)layer * target.tensor_bytes;
        CHECK(memcmp(&target.bytes[at], &expected.bytes[at], 2 * target.tensor_bytes) == 0);
    }
    krul_restore_free(restore);
    krul_device_pool_free(pool);
}

} // namespace

int
main()
{
    test(KRUL_DTYPE_F32, 64, KRUL_CODEC_SHARE, 0);
    test(KRUL_DTYPE_BF16, 128, KRUL_CODEC_SHARE_INT4, 1);
    test(KRUL_DTYPE_F16, 80, KRUL_CODEC_SHARE, 100000);
    test(KRUL_DTYPE_BF16, 7, KRUL_CODEC_SHARE_INT4, 0);
    return check_finish();
}

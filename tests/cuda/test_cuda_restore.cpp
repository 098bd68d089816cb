/* test_cuda_restore.cpp - a whole restore through cuda/device.cu and the kernels, on the CPU.
 *
 * The emulator does what it is told at once, so this is about bytes and bookkeeping, not about order:
 * what streams and events are for is tests/c/test_restore_device.c's affair. */
#include <dlfcn.h>

#include "check_predict.h"
#include "device.h"

extern "C" const krul_device_ops *krul_cuda_ops(void);

namespace {

enum { N_ALL_LAYERS = 7, N_HEADS = 3, BLOCK_TOKENS = 70, N_BLOCKS = 3 };

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
        bytes.assign(2 * N_ALL_LAYERS * tensor_bytes, 0);
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
    for (int layer = 0; layer < N_ALL_LAYERS; layer += layer < 3 ? 1 : 2) {
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
    CHECK(krul_restore_start(check_best_backend(), steps.data(), (int64_t)steps.size(),
                             N_ALL_LAYERS, &options, &restore, &err) == KRUL_STATUS_OK);
    if (restore == nullptr) {
        fprintf(stderr, "%s\n", err.message);
        return;
    }
    for (int32_t layer = 0; layer < N_ALL_LAYERS; layer++) {
        if (krul_restore_wait_stream(restore, layer, nullptr, &err) != KRUL_STATUS_OK) {
            fprintf(stderr, "%s\n", err.message);
            CHECK(!"a layer failed");
        }
    }
    krul_restore_join(restore);
    for (int32_t layer = 0; layer < N_ALL_LAYERS; layer++) {
        CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        size_t at = 2 * (size_t)layer * target.tensor_bytes;
        CHECK(memcmp(&target.bytes[at], &expected.bytes[at], 2 * target.tensor_bytes) == 0);
    }
    krul_restore_free(restore);
    krul_device_pool_free(pool);
}

/* Whole restores of codec predict, of the tokens of each run that `room` allows; a damaged state in
 * one block, which only a kernel sees, costs its layer and those above. Without cuBLAS the CPU decodes. */
void
test_predict(const geometry &of, size_t chunk_bytes, int64_t room, bool has_cublas, bool is_damaged)
{
    fixture made(of);
    krul_error err = {};
    krul_predict *predict = made.new_predict();
    std::vector<tensor> decoded;
    for (int i = 0; i < 2 * N_LAYERS; i++) {
        decoded.emplace_back(of, N_TOKENS);
    }
    if (is_damaged) {
        std::vector<uint8_t> &payload = made.payloads[1][1];
        size_t side_bytes = static_cast<size_t>(payload[4] + payload[5] * 256);
        payload[KRUL_PREDICT_HEADER_BYTES + side_bytes + KRUL_ENTROPY_COLUMNS_HEADER_BYTES] ^= 1;
    }
    std::vector<krul_restore_step> steps;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (int run = 0; run < N_RUNS && layer != 2; run++) {
            krul_restore_step step = {};
            int64_t token = runs[run].token_start - TOKEN_START;
            int64_t n = std::min(runs[run].n_tokens, room);
            step.fd = -1;
            step.payload = made.payloads[layer][run].data();
            step.entry = made.entries[layer][run];
            step.predict = predict;
            for (size_t kv = 0; kv < 2; kv++) {
                tensor &to = decoded[2 * static_cast<size_t>(layer) + kv];
                step.views[kv] = to.view(token, n, KRUL_DEVICE_CUDA);
            }
            steps.push_back(step);
        }
    }
    krul_device_pool *pool = nullptr;
    krul_device_pool_options sizes = {};
    sizes.chunk_bytes = chunk_bytes;
    CHECK(krul_device_pool_new(krul_cuda_ops(), &sizes, &pool, nullptr) == KRUL_STATUS_OK);
    for (int round = 0; round < 2; round++) { /* the second with what was kept of the first */
        krul_restore *restore = nullptr;
        krul_restore_options options = {};
        options.n_threads = 3;
        options.devices = pool;
        CHECK(krul_restore_start(best, steps.data(), static_cast<int64_t>(steps.size()), N_LAYERS,
                                 &options, &restore, &err) == KRUL_STATUS_OK);
        const char *problem = krul_restore_predict_problem(restore);
        CHECK(has_cublas ? problem[0] == '\0' : std::strstr(problem, "cuBLAS cannot") != nullptr);
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            krul_status status = krul_restore_wait(restore, layer, &err);
            CHECK(is_damaged && layer != 2 ? status == KRUL_STATUS_CORRUPT || layer == 0
                                           : status == KRUL_STATUS_OK);
        }
        krul_restore_free(restore);
        for (int run = 0; run < N_RUNS && room >= N_TOKENS && !is_damaged; run++) {
            (void)check_run(made, run, 0, decoded);
        }
    }
    krul_device_pool_free(pool);
    krul_predict_free(predict);
    bool is_untouched = true, is_same = true;
    for (size_t i = 0; i < decoded.size(); i++) {
        is_same = is_same && decoded[i].bytes == made.expected[i].bytes;
        for (int64_t k = 0; k < decoded[i].shape[0] * decoded[i].stride[0]; k++) {
            int64_t token = k % decoded[i].stride[1] / decoded[i].stride[2] + TOKEN_START;
            for (const krul_device_run &run : runs) {
                bool is_behind = token >= run.token_start + room &&
                                 token < run.token_start + run.n_tokens;
                is_untouched = is_untouched && (!is_behind || decoded[i].get(k) == 0);
            }
        }
    }
    CHECK(is_untouched && (has_cublas || is_same));
}

void
test_predicts()
{
    const geometry wide = {"wide", 2,     64,    1, KRUL_DTYPE_BF16, KRUL_ROTARY_HALF, 0,
                           32,     false, false, 0};
    const geometry odd = {"odd", 3,    7,    2, KRUL_DTYPE_F16, KRUL_ROTARY_INTERLEAVED, 1,
                          3,     true, true, 2};
    std::string path = beside("libstub_cblas.so"), cublas = beside("libstub_cublas_13.so");
    krul_error err = {};
    best = check_best_backend();
    CHECK(krul_blas_open(path.c_str(), &blas, &err) == KRUL_STATUS_OK);
    bool has_real = dlopen("libcublas.so.13", RTLD_NOW) != nullptr ||
                    dlopen("libcublas.so.12", RTLD_NOW) != nullptr;
    if (blas == nullptr || has_real) { /* which would be found in place of the stub */
        fprintf(stderr, "codec predict is not restored: %s\n",
                blas == nullptr ? err.message : "cuBLAS is here");
        return;
    }
    test_predict(wide, 0, N_TOKENS, false, false);
    /* Looked for by its name, it is the one that is there. */
    CHECK(dlopen(cublas.c_str(), RTLD_NOW) != nullptr);
    test_predict(wide, 0, N_TOKENS, true, false);
    test_predict(wide, 1, N_TOKENS, true, false);
    test_predict(odd, 30000, N_TOKENS, true, false);
    test_predict(odd, 0, 9, true, false);
    test_predict(wide, 0, N_TOKENS, true, true);
    krul_blas_close(blas);
}

} // namespace

int
main()
{
    test(KRUL_DTYPE_F32, 64, KRUL_CODEC_SHARE, 0);
    test(KRUL_DTYPE_BF16, 128, KRUL_CODEC_SHARE_INT4, 1);
    test(KRUL_DTYPE_F16, 80, KRUL_CODEC_SHARE, 100000);
    test(KRUL_DTYPE_BF16, 7, KRUL_CODEC_SHARE_INT4, 0);
    test_predicts();
    return check_finish();
}

/* test_cuda_predict.cpp - codec predict on a GPU or an emulated one against the CPU's and a float64 reference.
 *
 * Numbers of the column streams must be those that the CPU decodes; K and V must be within the bound of
 * check_predict.h. Products come from stubs beside this program; on a GPU those of the device come
 * from cuBLAS. */
#include "emulate.h"

#include <dlfcn.h>

#include "check_predict.h"
#include "cublas.h"

namespace {

krul_cublas_table products;
void (*stub_fail_after)(int n_calls);
int (*stub_n_handles)();

/* ---- the device -------------------------------------------------------------------------------- */

template <typename T> struct aligned {
    T *data;

    explicit aligned(size_t n_bytes) : data(static_cast<T *>(emulate::allocate(n_bytes, 256)))
    {
        std::memset(static_cast<void *>(data), 0xff, n_bytes); /* NaN */
    }
    ~aligned()
    {
        emulate::release(data);
    }
    aligned(const aligned &) = delete;
    aligned &operator=(const aligned &) = delete;
};

/* A profile with its arrays in the device's memory, which a machine frees. */
krul_device_profile *
new_profile(const krul_predict_options &options)
{
    krul_error err = {};
    krul_device_profile *made = nullptr;
    krul_device_copy copy;
    CHECK(krul_device_profile_new(&options, &made, &err) == KRUL_STATUS_OK);
    size_t n_bytes = (static_cast<size_t>(made->n_bytes) + 255) / 256 * 256;
    made->memory = static_cast<uint8_t *>(emulate::allocate(n_bytes, 256));
    std::memset(made->memory, 0xff, n_bytes);
    for (int32_t i = 0; krul_device_profile_copy(made, &options, i, &copy); i++) {
        if (copy.n_bytes > 0) {
            std::memcpy(made->memory + copy.to, copy.from, copy.n_bytes);
        }
    }
    return made;
}

/* Chains on the emulated device, and what is decoded there. */
struct machine {
    const fixture &made;
    krul_device_profile *profile = nullptr;
    krul_device_chains *chains = nullptr;
    krul_cublas *cublas = nullptr;
    uint8_t *memory = nullptr;
    std::vector<tensor> decoded;
    std::vector<uint32_t> damage = {0}; /* one, where kernels can write */
    int n_batches = 0;
    int32_t bad_block = -1; /* of the last call */

    explicit machine(const fixture &from, krul_cublas_math math = KRUL_CUBLAS_FLOAT32) : made(from)
    {
        krul_error err = {};
        krul_device_copy copy;
        profile = new_profile(made.options);
        CHECK(krul_device_chains_new(profile, &made.options, runs, N_RUNS, &chains, &err) ==
              KRUL_STATUS_OK);
        size_t n_bytes = krul_device_chains_bytes(chains);
        memory = static_cast<uint8_t *>(emulate::allocate(n_bytes, 256));
        std::memset(memory, 0xff, n_bytes);
        for (int32_t i = 0; krul_device_chains_copy(chains, i, &copy); i++) {
            std::memcpy(memory + copy.to, copy.from, copy.n_bytes);
        }
        CHECK(krul_cublas_new(&products, nullptr, nullptr, 0, math, &cublas, &err) ==
              KRUL_STATUS_OK);
        for (int i = 0; i < 2 * N_LAYERS; i++) {
            decoded.emplace_back(made.of, N_TOKENS);
        }
    }
    ~machine()
    {
        krul_cublas_free(cublas);
        krul_device_chains_free(chains);
        emulate::release(profile->memory);
        krul_device_profile_free(profile);
        emulate::release(memory);
    }
    machine(const machine &) = delete;
    machine &operator=(const machine &) = delete;

    krul_device_block block_of(int layer, int run)
    {
        int64_t token = runs[run].token_start - TOKEN_START, n = runs[run].n_tokens;
        krul_device_block block = {};
        block.entry = &made.entries[layer][run];
        block.views[0] = decoded[2 * layer].view(token, n, KRUL_DEVICE_CUDA);
        block.views[1] = decoded[2 * layer + 1].view(token, n, KRUL_DEVICE_CUDA);
        return block;
    }

    /* Lay payloads into a chunk of exactly the size that is needed, prepare, and decode. */
    krul_status decode(std::vector<krul_device_block> blocks, krul_error *err,
                       const std::vector<uint8_t> *payload = nullptr)
    {
        size_t used = 0;
        for (krul_device_block &block : blocks) {
            block.payload_offset = used;
            used = (used + block.entry->payload_bytes + 15) / 16 * 16;
        }
        int32_t n_blocks = static_cast<int32_t>(blocks.size());
        size_t capacity = used + krul_device_predict_bound(blocks.data(), n_blocks);
        capacity = (capacity + 15) / 16 * 16;
        uint8_t *chunk = static_cast<uint8_t *>(emulate::allocate(capacity));
        std::memset(chunk, 0xff, capacity);
        for (const krul_device_block &block : blocks) {
            int layer = std::min(block.entry->layer_lower, N_LAYERS - 1), run = 0;
            while (runs[run].token_start != block.entry->token_start) {
                run++;
            }
            const std::vector<uint8_t> &from = payload != nullptr ? *payload
                                                                  : made.payloads[layer][run];
            size_t n_bytes = std::min<size_t>(from.size(), block.entry->payload_bytes);
            std::copy_n(from.begin(), n_bytes, chunk + block.payload_offset);
        }
        std::vector<krul_device_predict_batch> batches(blocks.size());
        int32_t n = -1;
        size_t end = 0;
        bad_block = -1;
        krul_status status = krul_device_predict_prepare(chains, chunk, capacity, used,
                                                         blocks.data(), n_blocks, batches.data(),
                                                         &n, &end, &bad_block, err);
        CHECK(status == KRUL_STATUS_OK ? n >= 0 && end >= used && end <= capacity
                                       : n == -1 && end == 0);
        for (int32_t i = 0; i < n && status == KRUL_STATUS_OK; i++) {
            size_t n_bytes = krul_device_predict_scratch(chains, &batches[i]);
            aligned<uint8_t> scratch(n_bytes);
            status = krul_cuda_predict_numbers(chains, &batches[i], nullptr, chunk, scratch.data,
                                               damage.data(), err);
            CHECK(status == KRUL_STATUS_OK && cudaDeviceSynchronize() == cudaSuccess);
            check_numbers(batches[i], chunk, reinterpret_cast<const float *>(scratch.data),
                          payload == nullptr);
            status = krul_cuda_predict_rows(chains, &batches[i], cublas, chunk, memory,
                                            scratch.data, err);
            CHECK(cudaDeviceSynchronize() == cudaSuccess); /* before scratch goes */
            n_batches++;
        }
        CHECK(cudaDeviceSynchronize() == cudaSuccess);
        emulate::release(chunk);
        return status;
    }

    void check_numbers(const krul_device_predict_batch &batch, const uint8_t *chunk,
                       const float *numbers, bool is_whole)
    {
        const krul_device_predict_unit *units = reinterpret_cast<const krul_device_predict_unit *>(
            chunk + batch.units_at);
        bool is_same = true;
        for (int32_t i = 0; i < batch.n_blocks && is_whole; i++) {
            int run = 0;
            while (runs[run].token_start != units[i].token + TOKEN_START) {
                run++;
            }
            const std::vector<float> &wanted = made.numbers[batch.layer][run];
            for (int column = 0; column < made.width; column++) {
                for (int row = 0; row < units[i].n_rows; row++) {
                    float number = wanted[static_cast<size_t>(column * units[i].n_rows + row)];
                    float got = column < batch.n_used
                                    ? numbers[column * batch.n_rows + units[i].row + row]
                                    : 0;
                    is_same = is_same && got == number * units[i].factor;
                }
            }
        }
        CHECK(is_same);
    }
};

const geometry geometries[] = {
    {"head_dim 64, half", 2, 64, 1, KRUL_DTYPE_BF16, KRUL_ROTARY_HALF, 0, 32, false, false, 0},
    {"head_dim 80, part", 1, 80, 1, KRUL_DTYPE_F16, KRUL_ROTARY_HALF, 0, 16, false, false, 0},
    {"head_dim 96, two rows", 1, 96, 2, KRUL_DTYPE_F32, KRUL_ROTARY_HALF, 0, 48, true, false, 4},
    {"head_dim 128, interleaved", 1, 128, 1, KRUL_DTYPE_BF16, KRUL_ROTARY_INTERLEAVED, 64, 32,
     false, false, 8},
    {"odd", 3, 7, 2, KRUL_DTYPE_F16, KRUL_ROTARY_INTERLEAVED, 1, 3, false, true, 0},
    {"odd, half", 2, 13, 1, KRUL_DTYPE_BF16, KRUL_ROTARY_HALF, 3, 5, false, false, 2},
    {"4 bytes at once", 2, 10, 2, KRUL_DTYPE_BF16, KRUL_ROTARY_HALF, 2, 4, true, true, 0},
    {"4 bytes, interleaved", 2, 12, 1, KRUL_DTYPE_F16, KRUL_ROTARY_INTERLEAVED, 4, 4, false, false,
     2},
    {"pairs of half a vector", 1, 16, 1, KRUL_DTYPE_BF16, KRUL_ROTARY_HALF, 0, 4, false, false, 0},
    {"not rotated", 2, 16, 1, KRUL_DTYPE_F32, KRUL_ROTARY_NONE, 0, 1, false, false, 1},
    {"head_dim 256, half", 1, 256, 1, KRUL_DTYPE_F16, KRUL_ROTARY_HALF, 0, 128, false, false, 4},
};

/* Every layer in one call; then a layer at a time; then runs in another order, some of them late.
 * All give the same bytes, and those are right. */
void
test_geometries()
{
    for (const geometry &of : geometries) {
        fixture made(of);
        krul_error err = {};
        int n_failed_before = check_n_failed;
        machine whole(made);
        std::vector<krul_device_block> all;
        for (int layer = 0; layer < N_LAYERS; layer++) {
            for (int run = 0; run < N_RUNS && layer != 2; run++) {
                all.push_back(whole.block_of(layer, run));
            }
        }
        CHECK(whole.decode(all, &err) == KRUL_STATUS_OK);
        CHECK(whole.damage[0] == 0);
        CHECK(whole.n_batches == 4); /* one product and one launch for all runs of a layer */
        double part = 0, host_part = 0;
        for (int run = 0; run < N_RUNS; run++) {
            part = std::max(part, check_run(made, run, 0, whole.decoded));
            host_part = std::max(host_part, check_run(made, run, 0, made.expected));
        }

        machine apart(made);
        emulate::order = 1;
        const int order[] = {2, 0, 1};
        for (int layer = 0; layer < N_LAYERS; layer++) {
            for (int run = 0; run < 2 && layer != 2; run++) {
                CHECK(apart.decode({apart.block_of(layer, order[run])}, &err) == KRUL_STATUS_OK);
            }
        }
        for (int layer = 0; layer < N_LAYERS; layer++) {
            if (layer != 2) {
                CHECK(apart.decode({apart.block_of(layer, order[2])}, &err) == KRUL_STATUS_OK);
            }
        }
        emulate::order = 0;
        CHECK(apart.damage[0] == 0);
        for (int i = 0; i < 2 * N_LAYERS; i++) {
            CHECK(of.has_two_steps || whole.decoded[i].bytes == apart.decoded[i].bytes);
        }
        for (int run = 0; run < N_RUNS; run++) {
            (void)check_run(made, run, 0, apart.decoded);
        }
        if (check_n_failed != n_failed_before) {
            std::fprintf(stderr, "geometry %s: %g and on the CPU %g of the bound\n", of.name, part,
                         host_part);
        }
    }
}

/* Products of fewer bits are worse, by no more than their factors' rounding says. */
void
test_math()
{
    fixture made(geometries[0]);
    const krul_cublas_math maths[] = {KRUL_CUBLAS_TF32, KRUL_CUBLAS_BF16};
    const double units[] = {std::ldexp(1.0, -11), std::ldexp(1.0, -8)};
    for (int i = 0; i < 2; i++) {
        krul_error err = {};
        machine device(made, maths[i]);
        for (int layer = 0; layer < N_LAYERS; layer++) {
            for (int run = 0; run < N_RUNS && layer != 2; run++) {
                CHECK(device.decode({device.block_of(layer, run)}, &err) == KRUL_STATUS_OK);
            }
        }
        for (int run = 0; run < N_RUNS; run++) {
            CHECK(check_run(made, run, units[i], device.decoded) > 0);
        }
    }
}

/* What is rounded is rounded as the CPU does it: numbers exactly, rows but where float32's sums fall
 * on two sides of a bound, which is far less than rounding itself does. */
void
test_rounded()
{
    for (const geometry &of : geometries) {
        fixture made(of, KRUL_PRODUCTS_ROUNDED);
        krul_error err = {};
        machine device(made);
        for (int layer = 0; layer < N_LAYERS; layer++) {
            for (int run = 0; run < N_RUNS && layer != 2; run++) {
                CHECK(device.decode({device.block_of(layer, run)}, &err) == KRUL_STATUS_OK);
            }
        }
        for (int run = 0; run < N_RUNS; run++) {
            (void)check_run(made, run, std::ldexp(1.0, -8), device.decoded);
            (void)check_run(made, run, std::ldexp(1.0, -8), made.expected);
        }
        if (of.dtype != KRUL_DTYPE_F32) { /* which is no finer */
            continue;
        }
        /* The same payloads with unrounded rows show what rounding does. */
        fixture unrounded(of, KRUL_PRODUCTS_ROUNDED);
        unrounded.options.products = KRUL_PRODUCTS_F32;
        machine other(unrounded);
        double off = 0, rounding = 0;
        for (int layer = 0; layer < N_LAYERS; layer++) {
            for (int run = 0; run < N_RUNS && layer != 2; run++) {
                krul_device_block block = other.block_of(layer, run);
                size_t n_bytes = block.entry->payload_bytes;
                CHECK(n_bytes == made.entries[layer][run].payload_bytes);
                CHECK(other.decode({block}, &err, &made.payloads[layer][run]) == KRUL_STATUS_OK);
            }
            for (int kv = 0; kv < 2 && layer != 2; kv++) {
                const tensor &got = device.decoded[2 * layer + kv];
                const tensor &wanted = made.expected[2 * layer + kv];
                const tensor &free = other.decoded[2 * layer + kv];
                for (int64_t i = 0; i < got.shape[0] * got.stride[0]; i++) {
                    double value = wanted.get(i);
                    off += (got.get(i) - value) * (got.get(i) - value);
                    rounding += (free.get(i) - value) * (free.get(i) - value);
                }
            }
        }
        CHECK(rounding > 0 && off < 0.01 * rounding);
    }
}

/* Views that are not wanted, and such that hold the first tokens only. */
void
test_parts()
{
    fixture made(geometries[2]);
    krul_error err = {};
    machine device(made);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        std::vector<krul_device_block> blocks;
        for (int run = 0; run < N_RUNS && layer != 2; run++) {
            krul_device_block block = device.block_of(layer, run);
            if (run == 0) {
                block.views[0].data = nullptr;
            }
            if (run == 1) {
                block.views[0].data = block.views[1].data = nullptr;
            }
            if (run == 2) {
                block.views[0].shape[2] = 0;
                block.views[1].shape[2] = 4;
            }
            blocks.push_back(block);
        }
        CHECK(layer == 2 || device.decode(blocks, &err) == KRUL_STATUS_OK);
    }
    /* What is written is as if all had been, and nothing else is. */
    machine all(made);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (int run = 0; run < N_RUNS && layer != 2; run++) {
            CHECK(all.decode({all.block_of(layer, run)}, &err) == KRUL_STATUS_OK);
        }
    }
    bool is_right = true;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (int kv = 0; kv < 2; kv++) {
            const tensor &got = device.decoded[2 * layer + kv];
            const tensor &wanted = all.decoded[2 * layer + kv];
            for (int64_t i = 0; i < got.shape[0] * got.stride[0]; i++) {
                int64_t token = i % got.stride[1] / got.stride[2] + TOKEN_START;
                bool is_written = kv == 1 && (token < 42 || (token >= 80 && token < 84));
                is_right = is_right && got.get(i) == (is_written ? wanted.get(i) : 0);
            }
        }
    }
    CHECK(is_right);
}

/* Every truncation and every changed bit is found by the host or a kernel exactly where the CPU finds
 * it, and nothing is read or written out of bounds. */
void
test_damage()
{
    fixture made({"small", 1, 6, 1, KRUL_DTYPE_F32, KRUL_ROTARY_HALF, 0, 3, false, false, 0});
    std::vector<uint8_t> payload = made.payloads[0][0];
    int n_by_host = 0, n_by_kernel = 0, n_sound = 0;
    auto try_payload = [&](size_t n_bytes) {
        krul_error err = {};
        machine device(made);
        krul_predict *predict = made.new_predict();
        tensor on_cpu[2] = {tensor(made.of, N_TOKENS), tensor(made.of, N_TOKENS)};
        krul_view views[2] = {on_cpu[0].view(0, runs[0].n_tokens, KRUL_DEVICE_CPU),
                              on_cpu[1].view(0, runs[0].n_tokens, KRUL_DEVICE_CPU)};
        std::vector<uint8_t> exact(payload.begin(),
                                   payload.begin() + static_cast<ptrdiff_t>(n_bytes));
        krul_status wanted = krul_predict_decode(best, predict, 0, runs[0].token_start,
                                                 runs[0].n_tokens, exact.data(), n_bytes, views,
                                                 &err);
        krul_store_entry entry = made.entries[0][0];
        entry.payload_bytes = n_bytes;
        krul_device_block block = device.block_of(0, 0);
        block.entry = &entry;
        krul_status status = device.decode({block}, &err, &exact);
        CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT);
        CHECK((wanted == KRUL_STATUS_OK) == (status == KRUL_STATUS_OK && device.damage[0] == 0));
        n_by_host += status != KRUL_STATUS_OK;
        n_by_kernel += status == KRUL_STATUS_OK && device.damage[0] != 0;
        n_sound += wanted == KRUL_STATUS_OK;
        CHECK(status == KRUL_STATUS_OK || (device.bad_block == 0 && err.message[0] != '\0'));
        krul_predict_free(predict);
    };
    for (size_t n_bytes = 0; n_bytes < payload.size(); n_bytes++) {
        try_payload(n_bytes);
    }
    CHECK(n_by_host == static_cast<int>(payload.size()));
    for (size_t at = 0; at < payload.size(); at++) {
        for (int bit = 0; bit < 8; bit++) {
            payload[at] ^= static_cast<uint8_t>(1 << bit);
            try_payload(payload.size());
            payload[at] ^= static_cast<uint8_t>(1 << bit);
        }
    }
    CHECK(n_by_kernel > 100 && n_sound > 0); /* another step, another escape */

    /* A word too many: all states come out even, and it is left over. */
    n_by_kernel = 0;
    size_t stream = KRUL_PREDICT_HEADER_BYTES + static_cast<size_t>(payload[4] + payload[5] * 256);
    size_t n_words_bytes = static_cast<size_t>(payload[stream + 4] + payload[stream + 5] * 256);
    size_t behind = stream + KRUL_ENTROPY_COLUMNS_HEADER_BYTES + KRUL_ENTROPY_STATES_BYTES +
                    n_words_bytes;
    payload.insert(payload.begin() + static_cast<ptrdiff_t>(behind), 2, 0x55);
    n_words_bytes += 2;
    payload[stream + 4] = static_cast<uint8_t>(n_words_bytes);
    payload[stream + 5] = static_cast<uint8_t>(n_words_bytes >> 8);
    try_payload(payload.size());
    CHECK(n_by_kernel == 1);
}

/* What the caller gets wrong is said, and leaves the chains as they were. */
void
test_arguments()
{
    fixture made(geometries[4]);
    krul_error err = {};
    machine device(made);
    auto refuse = [&](std::vector<krul_device_block> blocks, krul_status wanted,
                      const char *words) {
        err = {};
        krul_status status = device.decode(blocks, &err);
        CHECK(status == wanted && std::strstr(err.message, words) != nullptr);
        if (status != wanted || std::strstr(err.message, words) == nullptr) {
            std::fprintf(stderr, "%d, not %d: %s\n", status, wanted, err.message);
        }
    };
    krul_device_block block = device.block_of(1, 0);
    refuse({block}, KRUL_STATUS_BAD_VALUE, "its source, layer 0, was not decoded");
    refuse({device.block_of(0, 0), device.block_of(1, 1)}, KRUL_STATUS_BAD_VALUE,
           "layer 0, was not");
    refuse({device.block_of(0, 0), device.block_of(0, 0)}, KRUL_STATUS_BAD_VALUE,
           "layer 0 was prepared before");
    CHECK(device.bad_block == 1);
    krul_store_entry entry = made.entries[0][0];
    block = device.block_of(0, 0);
    block.entry = &entry;
    entry.codec = KRUL_CODEC_INT8;
    refuse({block}, KRUL_STATUS_BAD_VALUE, "coded of codec 2");
    entry = made.entries[0][0];
    block.is_decoded = true;
    refuse({block}, KRUL_STATUS_BAD_VALUE, "decoded of codec 7");
    block.is_decoded = false;
    entry = made.entries[0][0];
    entry.layer_lower = 2;
    refuse({block}, KRUL_STATUS_BAD_VALUE, "layer 2 takes no part");
    entry.layer_lower = N_LAYERS;
    refuse({block}, KRUL_STATUS_BAD_VALUE, "layer 5 takes no part");
    entry = made.entries[0][0];
    entry.n_heads = 1;
    refuse({block}, KRUL_STATUS_BAD_SHAPE, "(2, 1, 7)");
    entry = made.entries[0][0];
    entry.n_tokens--;
    refuse({block}, KRUL_STATUS_BAD_SHAPE, "no run is 36 tokens from 5 on");
    entry = made.entries[0][0];
    block.views[1].device_type = KRUL_DEVICE_CPU;
    refuse({block}, KRUL_STATUS_UNSUPPORTED, "values are on device type 1");
    block = device.block_of(0, 0);
    block.views[0].shape[2] = 38;
    refuse({block}, KRUL_STATUS_BAD_SHAPE, "keys are (2, 3, 38, 7)");
    block = device.block_of(0, 0);
    block.views[0].is_read_only = true;
    refuse({block}, KRUL_STATUS_BAD_VALUE, "keys");

    /* None of that counted. */
    CHECK(device.decode({device.block_of(0, 0), device.block_of(1, 0)}, &err) == KRUL_STATUS_OK);

    /* A chunk that is too small for what comes behind the payloads, or for the payload. */
    block = device.block_of(3, 0);
    size_t n_bytes = (block.entry->payload_bytes + 15) / 16 * 16;
    size_t bound = krul_device_predict_bound(&block, 1);
    aligned<uint8_t> chunk(n_bytes + bound);
    std::memcpy(chunk.data, made.payloads[3][0].data(), made.payloads[3][0].size());
    krul_device_predict_batch batch;
    int32_t n_batches = -1;
    size_t end = 0;
    for (size_t room : {size_t(0), bound / 2, bound - 20}) {
        CHECK(krul_device_predict_prepare(device.chains, chunk.data, n_bytes + room, n_bytes,
                                          &block, 1, &batch, &n_batches, &end, nullptr,
                                          &err) == KRUL_STATUS_BAD_VALUE);
    }
    block.payload_offset = n_bytes + bound;
    CHECK(krul_device_predict_prepare(device.chains, chunk.data, n_bytes + bound, n_bytes, &block,
                                      1, &batch, &n_batches, &end, nullptr,
                                      &err) == KRUL_STATUS_BAD_VALUE);
    block.payload_offset = 0;
    CHECK(krul_device_predict_prepare(device.chains, chunk.data, n_bytes + bound, n_bytes, &block,
                                      1, &batch, &n_batches, &end, nullptr,
                                      &err) == KRUL_STATUS_OK);
    CHECK(n_batches == 1 && batch.layer == 3);

    /* Profiles and chains. */
    krul_device_profile *profile = nullptr;
    krul_device_chains *chains = nullptr;
    krul_predict_options options = made.options;
    options.n_layers = 0;
    CHECK(krul_device_profile_new(&options, &profile, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(profile == nullptr);
    options.n_layers = N_LAYERS - 1;
    CHECK(krul_device_chains_new(device.profile, &options, runs, N_RUNS, &chains, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(std::strstr(err.message, "4 layers, the profile 5") != nullptr);
    const krul_device_run wrong[][2] = {{{5, 10}, {14, 3}},
                                        {{4, 3}, {7, 1}},
                                        {{5, 0}, {7, 1}},
                                        {{5, 10}, {15, 81}},
                                        {{5, INT64_MAX}, {0, 1}}};
    for (const auto &pair : wrong) {
        CHECK(krul_device_chains_new(device.profile, &made.options, pair, 2, &chains, &err) ==
              KRUL_STATUS_BAD_SHAPE);
    }
    CHECK(krul_device_chains_new(device.profile, &made.options, runs, 0, &chains, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(chains == nullptr);
    krul_device_profile_free(nullptr);
    krul_device_chains_free(nullptr);
    /* Layers 0, 1 and 3 are needed at once, then 0 is free: three slots for five layers. */
    CHECK(device.profile->n_slots == 3 && device.profile->layers[4].slot == 0);
}

/* ---- cuBLAS ------------------------------------------------------------------------------------ */

void
test_cublas()
{
    krul_error err = {};
    krul_cublas_table table = {};
    const char *none[] = {"libkrul_no_such_thing.so"};
    CHECK(krul_cublas_open(none, 1, &table, &err) == KRUL_STATUS_UNSUPPORTED);
    CHECK(std::strstr(err.message, "cuBLAS cannot be loaded") != nullptr &&
          std::strstr(err.message, none[0]) != nullptr);
    CHECK(krul_cublas_open(none, 0, &table, &err) == KRUL_STATUS_UNSUPPORTED);
    std::string lacking = beside("libstub_cublas_lacking.so");
    const char *names[] = {none[0], lacking.c_str()};
    CHECK(krul_cublas_open(names, 2, &table, &err) == KRUL_STATUS_UNSUPPORTED);
    CHECK(std::strstr(err.message, "has no function cublasGemmEx") != nullptr);
    CHECK(table.create == nullptr);

    const krul_cublas_table *found = nullptr; /* there may be one here, or not */
    krul_status status = krul_cublas_find(&found, &err);
    CHECK(status == KRUL_STATUS_OK
              ? found != nullptr
              : status == KRUL_STATUS_UNSUPPORTED && found == nullptr &&
                    std::strstr(err.message, "loaded as libcublas.so.13") != nullptr);

    krul_cublas *cublas = nullptr;
    aligned<uint8_t> workspace(512);
    CHECK(krul_cublas_new(&products, nullptr, nullptr, 0, static_cast<krul_cublas_math>(3), &cublas,
                          &err) == KRUL_STATUS_BAD_VALUE);
    int n_handles = stub_n_handles();
    for (int i = 0; i < 3; i++) { /* create, stream, workspace */
        stub_fail_after(i);
        CHECK(krul_cublas_new(&products, nullptr, workspace.data, 512, KRUL_CUBLAS_FLOAT32, &cublas,
                              &err) == KRUL_STATUS_DEVICE);
        CHECK(cublas == nullptr && err.code != 0 && stub_n_handles() == n_handles);
    }
    CHECK(std::strstr(err.message,
                      "libstub_cublas.so: cublasSetWorkspace failed: CUBLAS_STATUS_INVALID_VALUE "
                      "(7)") != nullptr);
    stub_fail_after(-1);
    CHECK(krul_cublas_new(&products, nullptr, workspace.data, 512, KRUL_CUBLAS_FLOAT32, &cublas,
                          &err) == KRUL_STATUS_OK);
    const float a[] = {1, 2, 3, 4, 5, 6}, b[] = {7, 8, 9}; /* 2 x 3 and 3 x 1, by columns */
    float c[] = {1, 1};
    CHECK(krul_cublas_multiply(cublas, false, false, 2, 1, 3, 2, a, 2, b, 3, 1, c, 2, &err) ==
          KRUL_STATUS_OK);
    CHECK(c[0] == 2 * (7 + 24 + 45) + 1 && c[1] == 2 * (14 + 32 + 54) + 1);
    CHECK(krul_cublas_multiply(cublas, false, false, INT64_C(1) << 31, 1, 3, 1, a, 2, b, 3, 0, c, 2,
                               &err) == KRUL_STATUS_BAD_SHAPE);
    CHECK(krul_cublas_multiply(cublas, false, false, 2, 1, 3, 1, a, 1, b, 3, 0, c, 2, &err) ==
          KRUL_STATUS_DEVICE);
    CHECK(std::strstr(err.message, "cublasGemmEx failed") != nullptr && err.code == 7);
    krul_cublas_free(cublas);
    krul_cublas_free(nullptr);
    CHECK(stub_n_handles() == n_handles);

    /* A product that fails ends the batch with its error. */
    fixture made(geometries[4]);
    machine device(made);
    CHECK(device.decode({device.block_of(0, 0)}, &err) == KRUL_STATUS_OK);
    for (int i = 0; i < 2; i++) {
        machine failing(made);
        CHECK(failing.decode({failing.block_of(0, 0)}, &err) == KRUL_STATUS_OK);
        stub_fail_after(i);
        CHECK(failing.decode({failing.block_of(1, 0)}, &err) == KRUL_STATUS_DEVICE);
        stub_fail_after(-1);
    }
}

#ifdef KRUL_ON_GPU

/* The library that a program finds; its numbers and its faults are no stub's. */
void
open_cublas(krul_error *err)
{
    const krul_cublas_table *found = nullptr;
    CHECK(krul_cublas_find(&found, err) == KRUL_STATUS_OK);
    if (found != nullptr) {
        products = *found;
    }
}

#else

void
open_cublas(krul_error *err)
{
    std::string path = beside("libstub_cublas.so");
    const char *name = path.c_str();
    CHECK(krul_cublas_open(&name, 1, &products, err) == KRUL_STATUS_OK);
    std::snprintf(products.library, sizeof products.library, "libstub_cublas.so");
    void *library = dlopen(name, RTLD_NOW);
    void *found[] = {dlsym(library, "stub_cublas_fail_after"),
                     dlsym(library, "stub_cublas_n_handles")};
    std::memcpy(&stub_fail_after, &found[0], sizeof found[0]);
    std::memcpy(&stub_n_handles, &found[1], sizeof found[1]);
}

#endif

} // namespace

int
main()
{
    krul_error err = {};
    std::string path = beside("libstub_cblas.so");
    best = check_best_backend();
    CHECK(krul_blas_open(path.c_str(), &blas, &err) == KRUL_STATUS_OK);
    open_cublas(&err);
    if (blas == nullptr || products.gemm == nullptr) {
        std::fprintf(stderr, "%s\n", err.message);
        return check_finish();
    }
    test_geometries();
    test_math();
    test_rounded();
    test_parts();
    test_damage();
    test_arguments();
    if (stub_fail_after != nullptr) {
        test_cublas();
    }
    krul_blas_close(blas);
    return check_finish();
}

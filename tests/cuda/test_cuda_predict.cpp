/* test_cuda_predict.cpp - codec predict on a GPU or an emulated one against the CPU's and a float64 reference.
 *
 * Numbers of the column streams must be those that the CPU decodes. K and V, of the CPU and of the
 * GPU, must be within the reference's bound of what float32 sums of any order may be off by, and half a
 * unit in the last place of the cache's dtype for rounding. Products come from stubs beside this
 * program; on a GPU those of the device come from cuBLAS. */
#include "emulate.h"

#include <climits>
#include <dlfcn.h>
#include <string>
#include <unistd.h>

#include "check.h"
#include "cublas.h"
#include "device_predict.h"

extern "C" {
#include "codec_predict.h"
#include "dtype.h"
#include "entropy.h"
}

namespace {

constexpr int N_LAYERS = 5; /* layer 2 takes no part */
constexpr int N_TABLES = 8;
constexpr int N_RUNS = 3;
constexpr int TOKEN_START = 5;
constexpr int N_TOKENS = 90;
const krul_device_run runs[N_RUNS] = {{5, 37}, {42, 32}, {80, 15}};

struct geometry {
    const char *name;
    int n_heads;
    int head_dim;
    int n_batch;
    krul_dtype dtype;
    krul_rotary_convention convention;
    int start;
    int n_pairs;
    bool is_per_batch;
    bool has_two_steps;
    int padding; /* elements between the tokens of a cache */
};

std::string
beside(const char *name)
{
    char path[PATH_MAX];
    ssize_t n_bytes = readlink("/proc/self/exe", path, sizeof path - 1);
    std::string found(path, n_bytes > 0 ? static_cast<size_t>(n_bytes) : 0);
    return found.substr(0, found.rfind('/') + 1) + name;
}

const krul_backend *best;
krul_blas *blas;
krul_cublas_table products;
void (*stub_fail_after)(int n_calls);
int (*stub_n_handles)();

float
next_random(uint32_t &state)
{
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
}

/* A cache of all tokens of one layer's K or V. */
struct tensor {
    krul_dtype dtype;
    std::vector<uint8_t> bytes;
    int64_t shape[4];
    int64_t stride[4];

    tensor(const geometry &of, int n_tokens) : dtype(of.dtype)
    {
        int64_t row = of.head_dim + of.padding;
        int64_t sizes[4] = {of.n_batch, of.n_heads, n_tokens, of.head_dim};
        int64_t strides[4] = {of.n_heads * n_tokens * row, n_tokens * row, row, 1};
        std::memcpy(shape, sizes, sizeof sizes);
        std::memcpy(stride, strides, sizeof strides);
        bytes.resize(static_cast<size_t>(of.n_batch * of.n_heads * n_tokens * row) *
                     krul_dtype_bytes(dtype));
    }

    int64_t at(int64_t batch, int64_t head, int64_t token, int64_t i) const
    {
        return batch * stride[0] + head * stride[1] + token * stride[2] + i;
    }

    float get(int64_t index) const
    {
        if (dtype == KRUL_DTYPE_F32) {
            float value;
            std::memcpy(&value, &bytes[static_cast<size_t>(index) * 4], 4);
            return value;
        }
        uint16_t bits;
        std::memcpy(&bits, &bytes[static_cast<size_t>(index) * 2], 2);
        return dtype == KRUL_DTYPE_F16 ? krul_f16_to_f32(bits) : krul_bf16_to_f32(bits);
    }

    void set(int64_t index, float value)
    {
        if (dtype == KRUL_DTYPE_F32) {
            std::memcpy(&bytes[static_cast<size_t>(index) * 4], &value, 4);
            return;
        }
        uint16_t bits = dtype == KRUL_DTYPE_F16 ? krul_f32_to_f16(value) : krul_f32_to_bf16(value);
        std::memcpy(&bytes[static_cast<size_t>(index) * 2], &bits, 2);
    }

    krul_view view(int64_t token, int64_t n_tokens, krul_device_type device)
    {
        krul_view out = {};
        out.data = bytes.data() + static_cast<size_t>(at(0, 0, token, 0)) * krul_dtype_bytes(dtype);
        out.dtype = dtype;
        out.device_type = device;
        std::memcpy(out.shape, shape, sizeof shape);
        std::memcpy(out.stride, stride, sizeof stride);
        out.shape[2] = n_tokens;
        return out;
    }
};

/* One unit in the last place at this size. */
double
unit_of(krul_dtype dtype, double value)
{
    int exponent;
    std::frexp(value, &exponent);
    return dtype == KRUL_DTYPE_F32   ? std::ldexp(1.0, std::max(exponent - 24, -149))
           : dtype == KRUL_DTYPE_F16 ? std::ldexp(1.0, std::max(exponent - 11, -24))
                                     : std::ldexp(1.0, std::max(exponent - 8, -133));
}

/* A profile, coded blocks, and what the CPU makes of them. */
struct fixture {
    geometry of;
    int width;
    krul_entropy_table tables[N_TABLES];
    std::vector<float> mean, deviation, basis, maps, left, right, cosines, sines;
    krul_predict_layer layers[N_LAYERS];
    krul_predict_options options;
    std::vector<uint8_t> payloads[N_LAYERS][N_RUNS];
    krul_store_entry entries[N_LAYERS][N_RUNS];
    std::vector<tensor> expected; /* layer x 2 */
    std::vector<float> numbers[N_LAYERS][N_RUNS]; /* width x rows */

    explicit fixture(const geometry &wanted) : of(wanted), width(2 * of.n_heads * of.head_dim)
    {
        make_profile();
        encode();
        decode();
    }

    void make_profile()
    {
        uint32_t state = 1;
        size_t n = static_cast<size_t>(width);
        for (int table = 0; table < N_TABLES; table++) {
            int sum = 0;
            for (int symbol = 0; symbol < 256; symbol++) {
                int distance = std::abs(symbol - 127);
                int frequency = distance > 12 ? 0 : 800 / (1 + table) >> distance / (1 + table);
                tables[table].frequency[symbol] = static_cast<uint16_t>(symbol == 255 ? 16
                                                                                      : frequency);
                sum += tables[table].frequency[symbol];
            }
            tables[table].frequency[127] = static_cast<uint16_t>(tables[table].frequency[127] +
                                                                 4096 - sum);
        }
        mean.resize(n);
        deviation.resize(n);
        basis.resize(n * n);
        maps.resize(2 * n * n);
        left.resize(2 * n * 3);
        right.resize(3 * n);
        /* A reflection: its own inverse. */
        std::vector<float> axis(n);
        float square = 0;
        for (size_t i = 0; i < n; i++) {
            mean[i] = next_random(state) * 3;
            deviation[i] = 2.0f / static_cast<float>(1 + i % 64);
            axis[i] = next_random(state);
            square += axis[i] * axis[i];
        }
        for (size_t i = 0; i < n * n; i++) {
            basis[i] = (i % n == i / n ? 1.0f : 0.0f) - 2 / square * axis[i % n] * axis[i / n];
        }
        for (float &value : maps) {
            value = 1.2f / std::sqrt(static_cast<float>(n)) * next_random(state);
        }
        for (float &value : left) {
            value = 0.7f / std::sqrt(static_cast<float>(n)) * next_random(state);
        }
        for (float &value : right) {
            value = 0.5f * next_random(state);
        }
        int n_angles = (of.is_per_batch ? of.n_batch : 1) * N_TOKENS * of.n_pairs;
        for (int i = 0; i < n_angles; i++) {
            float angle = static_cast<float>(i / of.n_pairs) /
                          static_cast<float>(1 + i % of.n_pairs);
            cosines.push_back(1.1f * std::cos(angle));
            sines.push_back(1.1f * std::sin(angle));
        }
        const int32_t sources[N_LAYERS][3] = {
            {0, 0, 0}, {1, 0, 0}, {0, 0, 0}, {2, 1, 0}, {2, 1, 3}};
        std::memset(layers, 0, sizeof layers);
        for (int i = 0; i < N_LAYERS; i++) {
            if (i == 2) {
                continue;
            }
            krul_predict_layer &layer = layers[i];
            layer.n_heads = of.n_heads;
            layer.head_dim = of.head_dim;
            layer.n_sources = sources[i][0];
            layer.sources[0] = sources[i][1];
            layer.sources[1] = sources[i][2];
            layer.rank = i == 4 ? 3 : 0;
            layer.mean = mean.data();
            layer.deviation = deviation.data();
            layer.forward = layer.backward = basis.data();
            layer.maps = maps.data();
            layer.left = left.data();
            layer.right = right.data();
            layer.rotary.convention = of.convention;
            layer.rotary.start = of.start;
            layer.rotary.n_pairs = of.convention == KRUL_ROTARY_NONE ? 0 : of.n_pairs;
            layer.rotary.is_per_batch = of.is_per_batch;
            layer.rotary.cos = cosines.data();
            layer.rotary.sin = sines.data();
        }
        options = {};
        options.blas = blas;
        options.tables = tables;
        options.n_tables = N_TABLES;
        options.unit_table = 3;
        options.n_layers = N_LAYERS;
        options.layers = layers;
        options.n_batch = of.n_batch;
        options.token_start = TOKEN_START;
        options.n_tokens = N_TOKENS;
    }

    krul_predict *new_predict()
    {
        krul_error err = {};
        krul_predict *made = nullptr;
        if (krul_predict_new(&options, &made, &err) != KRUL_STATUS_OK) {
            std::fprintf(stderr, "%s\n", err.message);
            std::exit(1);
        }
        return made;
    }

    void encode()
    {
        uint32_t state = 7;
        krul_predict *predict = new_predict();
        for (int layer = 0; layer < N_LAYERS; layer++) {
            tensor source[2] = {tensor(of, N_TOKENS), tensor(of, N_TOKENS)};
            for (tensor &one : source) {
                for (int64_t i = 0;
                     i < of.n_batch * of.n_heads * N_TOKENS * (of.head_dim + of.padding); i++) {
                    float size = i / of.head_dim % 11 == 3 ? 8.0f : 1.0f;
                    one.set(i, size * next_random(state) * next_random(state));
                }
            }
            for (int run = 0; run < N_RUNS && layer != 2; run++) {
                krul_error err = {};
                size_t bound = 0, n_bytes = 0;
                bool fits = false;
                double error[2];
                int64_t token = runs[run].token_start - TOKEN_START, n = runs[run].n_tokens;
                krul_view views[2] = {source[0].view(token, n, KRUL_DEVICE_CPU),
                                      source[1].view(token, n, KRUL_DEVICE_CPU)};
                float step = of.has_two_steps && run == 1 ? 0.3f : 0.25f;
                CHECK(krul_predict_bound(predict, layer, n, &bound, &err) == KRUL_STATUS_OK);
                std::vector<uint8_t> payload(bound);
                CHECK(krul_predict_encode(best, predict, layer, runs[run].token_start, views, step,
                                          payload.data(), bound, &n_bytes, &fits, error,
                                          &err) == KRUL_STATUS_OK &&
                      fits);
                payload.resize(n_bytes);
                payloads[layer][run] = payload;
                krul_store_entry &entry = entries[layer][run];
                entry = {};
                entry.kind = KRUL_STORE_ENTRY_BLOCK;
                entry.codec = KRUL_CODEC_PREDICT;
                entry.kv = KRUL_KV_BOTH;
                entry.dtype = of.dtype;
                entry.layer_lower = layer;
                entry.layer_upper = -1;
                entry.n_batch = of.n_batch;
                entry.n_heads = of.n_heads;
                entry.head_dim = of.head_dim;
                entry.token_start = runs[run].token_start;
                entry.n_tokens = n;
                entry.payload_bytes = n_bytes;
            }
        }
        krul_predict_free(predict);
    }

    void decode()
    {
        krul_predict *predict = new_predict();
        krul_entropy_tables *made = nullptr;
        CHECK(krul_entropy_tables_new(tables, N_TABLES, &made, nullptr) == KRUL_STATUS_OK);
        for (int i = 0; i < 2 * N_LAYERS; i++) {
            expected.emplace_back(of, N_TOKENS);
        }
        std::vector<int16_t> levels;
        for (float value : deviation) {
            levels.push_back(static_cast<int16_t>(krul_predict_level_of(value)));
        }
        for (int layer = 0; layer < N_LAYERS; layer++) {
            for (int run = 0; run < N_RUNS && layer != 2; run++) {
                krul_error err = {};
                const std::vector<uint8_t> &payload = payloads[layer][run];
                int64_t token = runs[run].token_start - TOKEN_START, n = runs[run].n_tokens;
                krul_view views[2] = {expected[2 * layer].view(token, n, KRUL_DEVICE_CPU),
                                      expected[2 * layer + 1].view(token, n, KRUL_DEVICE_CPU)};
                CHECK(krul_predict_decode(best, predict, layer, runs[run].token_start, n,
                                          payload.data(), payload.size(), views,
                                          &err) == KRUL_STATUS_OK);
                int64_t n_rows = of.n_batch * n;
                std::vector<uint8_t> classes(static_cast<size_t>(width));
                std::vector<int8_t> shifts(static_cast<size_t>(n_rows));
                float step;
                size_t side;
                numbers[layer][run].resize(static_cast<size_t>(width * n_rows));
                CHECK(krul_predict_read_side(levels.data(), width, n_rows, 3, N_TABLES,
                                             payload.data(), payload.size(), classes.data(),
                                             shifts.data(), &step, &side, &err) == KRUL_STATUS_OK);
                CHECK(krul_entropy_decode_columns(
                          best, made, payload.data() + side, payload.size() - side, width, n_rows,
                          classes.data(), shifts.data(), numbers[layer][run].data(),
                          &err) == KRUL_STATUS_OK);
            }
        }
        krul_entropy_tables_free(made);
        krul_predict_free(predict);
    }
};

/* ---- the reference ----------------------------------------------------------------------------- */

struct matrix {
    std::vector<double> value, error; /* n_rows x width: exact, and how far float32 may be off */
};

/* out += in times factor (n_in x n_out), with the error that factors rounded to `unit` and sums of
 * n_terms float32 make; sizes is the sum of |products|. */
void
add_product(const matrix &in, const float *factor, int n_rows, int n_in, int n_out, double unit,
            matrix &out, std::vector<double> &sizes)
{
    for (int row = 0; row < n_rows; row++) {
        for (int i = 0; i < n_in; i++) {
            double value = in.value[static_cast<size_t>(row * n_in + i)];
            double error = in.error[static_cast<size_t>(row * n_in + i)];
            for (int k = 0; k < n_out; k++) {
                size_t to = static_cast<size_t>(row * n_out + k);
                double by = static_cast<double>(factor[static_cast<size_t>(i) * n_out + k]);
                double size = (std::abs(value) + error) * std::abs(by);
                out.value[to] += value * by;
                out.error[to] += error * std::abs(by) + size * (2 * unit + unit * unit);
                sizes[to] += size;
            }
        }
    }
}

void
add_rounding(matrix &out, std::vector<double> &sizes, int n_terms)
{
    double unit = n_terms * std::ldexp(1.0, -24);
    for (size_t i = 0; i < sizes.size(); i++) {
        out.error[i] += sizes[i] * unit / (1 - unit);
        sizes[i] = 0;
    }
}

/* Compare decoded K and V of a run with the reference, whose bound is for factors rounded to `unit`
 * (0: not rounded). Returns the largest part of the bound that was used. */
double
check_run(const fixture &made, int run, double unit, const std::vector<tensor> &decoded)
{
    const geometry &of = made.of;
    int width = made.width, n_tokens = static_cast<int>(runs[run].n_tokens);
    int n_rows = of.n_batch * n_tokens;
    double largest = 0;
    std::vector<matrix> rows(N_LAYERS);
    for (int l = 0; l < N_LAYERS; l++) {
        if (l == 2) {
            continue;
        }
        const krul_predict_layer &layer = made.layers[l];
        float step;
        std::memcpy(&step, made.payloads[l][run].data(), sizeof step);
        size_t n = static_cast<size_t>(n_rows * width);
        matrix &out = rows[l];
        out = {std::vector<double>(n), std::vector<double>(n)};
        std::vector<double> sizes(n);
        if (layer.rank > 0) {
            size_t n_low = static_cast<size_t>(n_rows * layer.rank);
            matrix low = {std::vector<double>(n_low), std::vector<double>(n_low)};
            std::vector<double> low_sizes(n_low);
            for (int s = 0; s < layer.n_sources; s++) {
                add_product(rows[layer.sources[s]], layer.left + s * width * layer.rank, n_rows,
                            width, layer.rank, unit, low, low_sizes);
            }
            add_rounding(low, low_sizes, layer.n_sources * (width + 2));
            add_product(low, layer.right, n_rows, layer.rank, width, unit, out, sizes);
        }
        else {
            for (int s = 0; s < layer.n_sources; s++) {
                add_product(rows[layer.sources[s]], layer.maps + s * width * width, n_rows, width,
                            width, unit, out, sizes);
            }
        }
        matrix scaled = {std::vector<double>(n), std::vector<double>(n)};
        for (int row = 0; row < n_rows; row++) {
            for (int i = 0; i < width; i++) {
                double number = static_cast<double>(
                    made.numbers[l][run][static_cast<size_t>(i * n_rows + row)]);
                scaled.value[static_cast<size_t>(row * width + i)] = static_cast<double>(step) *
                                                                     number;
            }
        }
        add_product(scaled, layer.backward, n_rows, width, width, unit, out, sizes);
        add_rounding(out, sizes, (layer.n_sources + 1) * (width + 4));
        /* Mean, rotation, narrowing: at most 6 roundings more. */
        const double u = 6 * std::ldexp(1.0, -24);
        for (int row = 0; row < n_rows; row++) {
            int batch = row / n_tokens, token = row % n_tokens;
            int64_t place = runs[run].token_start - TOKEN_START + token;
            for (int i = 0; i < width; i++) {
                int kv = i / (width / 2), head = i / of.head_dim % of.n_heads, d = i % of.head_dim;
                auto with_mean = [&](int at, double &value, double &error) {
                    size_t from = static_cast<size_t>(row * width + at);
                    value = out.value[from] +
                            static_cast<double>(made.mean[static_cast<size_t>(at)]);
                    error = out.error[from] + u * (std::abs(value) + out.error[from]);
                };
                double value, error;
                with_mean(i, value, error);
                int in_part = d - of.start;
                if (kv == 0 && of.convention != KRUL_ROTARY_NONE && in_part >= 0 &&
                    in_part < 2 * of.n_pairs) {
                    bool is_half = of.convention == KRUL_ROTARY_HALF;
                    bool is_first = is_half ? in_part < of.n_pairs : in_part % 2 == 0;
                    int pair = is_half ? in_part % of.n_pairs : in_part / 2;
                    int distance = is_half ? of.n_pairs : 1;
                    double other, other_error;
                    with_mean(is_first ? i + distance : i - distance, other, other_error);
                    int64_t row_of_angles = (of.is_per_batch ? batch * N_TOKENS : 0) + place;
                    size_t angle = static_cast<size_t>(row_of_angles * of.n_pairs + pair);
                    double c = static_cast<double>(made.cosines[angle]);
                    double s = static_cast<double>(made.sines[angle]);
                    double size = std::abs(value * c) + std::abs(other * s);
                    value = value * c + (is_first ? -1 : 1) * other * s;
                    error = error * std::abs(c) + other_error * std::abs(s);
                    error += u * (size + error);
                }
                error += unit_of(of.dtype, std::abs(value) + error) / 2;
                const tensor &got = decoded[static_cast<size_t>(2 * l + kv)];
                double found = static_cast<double>(got.get(got.at(batch, head, place, d)));
                largest = std::max(largest, std::abs(found - value) / error);
            }
        }
    }
    CHECK(largest <= 1);
    return largest;
}

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
        CHECK(krul_cuda_profile_new(&made.options, nullptr, &profile, &err) == KRUL_STATUS_OK);
        CHECK(krul_device_chains_new(profile, &made.options, runs, N_RUNS, &chains, &err) ==
              KRUL_STATUS_OK);
        size_t n_bytes = krul_device_chains_bytes(chains);
        memory = static_cast<uint8_t *>(emulate::allocate(n_bytes, 256));
        std::memset(memory, 0xff, n_bytes);
        CHECK(krul_cuda_chains_begin(chains, nullptr, memory, &err) == KRUL_STATUS_OK);
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
        krul_cuda_profile_free(profile);
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
        if (status == KRUL_STATUS_CORRUPT) {
            CHECK(std::strstr(err.message, "layer 0, tokens from 5: ") == err.message);
        }
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
    krul_cuda_profile_free(nullptr);
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
    test_parts();
    test_damage();
    test_arguments();
    if (stub_fail_after != nullptr) {
        test_cublas();
    }
    krul_blas_close(blas);
    return check_finish();
}

/* check_predict.h - a profile, blocks that codec predict coded with it, and what they must come to.
 *
 * K and V, of the CPU and of a GPU, must be within the reference's bound of what float32 sums of any
 * order may be off by, and half a unit in the last place of the cache's dtype for rounding. */
#ifndef CHECK_PREDICT_H
#define CHECK_PREDICT_H

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

#include "check.h"
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
    std::vector<float> numbers[N_LAYERS][N_RUNS]; /* width x rows, times the rows' steps */

    explicit fixture(const geometry &wanted, krul_predict_products products = KRUL_PRODUCTS_F32)
        : of(wanted), width(2 * of.n_heads * of.head_dim)
    {
        make_profile();
        options.products = products;
        if (products != KRUL_PRODUCTS_F32) {
            for (std::vector<float> *matrix : {&basis, &maps, &left, &right}) {
                for (float &value : *matrix) {
                    value = krul_bf16_to_f32(krul_f32_to_bf16(value));
                }
            }
        }
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
                std::vector<int8_t> fineness;
                for (int64_t i = 0; i < n; i++) { /* every one that there may be */
                    fineness.push_back(static_cast<int8_t>(KRUL_PREDICT_MIN_FINENESS + i * 7 % 19));
                }
                CHECK(krul_predict_encode(best, predict, layer, runs[run].token_start, views, step,
                                          run == 0 ? nullptr : fineness.data(), payload.data(),
                                          bound, &n_bytes, &fits, error, &err) == KRUL_STATUS_OK &&
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
                std::vector<int8_t> fineness(static_cast<size_t>(n_rows));
                std::vector<int8_t> shifts(static_cast<size_t>(n_rows));
                float step;
                size_t side;
                numbers[layer][run].resize(static_cast<size_t>(width * n_rows));
                CHECK(krul_predict_read_side(levels.data(), width, n_rows, 3, N_TABLES,
                                             payload.data(), payload.size(), classes.data(),
                                             fineness.data(), shifts.data(), &step, &side,
                                             &err) == KRUL_STATUS_OK);
                CHECK(krul_entropy_decode_columns(
                          best, made, payload.data() + side, payload.size() - side, width, n_rows,
                          classes.data(), shifts.data(), numbers[layer][run].data(),
                          &err) == KRUL_STATUS_OK);
                for (size_t i = 0; i < numbers[layer][run].size(); i++) {
                    float &number = numbers[layer][run][i];
                    number *= krul_predict_row_step(fineness[i % static_cast<size_t>(n_rows)]);
                    if (options.products != KRUL_PRODUCTS_F32) {
                        number = krul_bf16_to_f32(krul_f32_to_bf16(number));
                    }
                }
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
        add_rounding(out, sizes, (layer.n_sources + 1) * (width + 5));
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

} // namespace

#endif /* CHECK_PREDICT_H */

/* test_cuda_estimator.cpp - attention rows on an emulated GPU against the CPU's and a float64 softmax.
 *
 * Both must be within what float32 may be off by. A score is a sum of head_dim products: it is off by
 * head_dim + 2 roundings of the sum of their sizes. An exponential is then off by as much relative to
 * itself, twice because of the divisor, and by the roundings of its argument and of the divisor's sum.
 * What is added up from rows is off by the sum of that. */
#include "emulate.h"

#include "check.h"
#include "device_estimator.h"

extern "C" {
#include "dtype.h"
}

namespace {

const double unit = std::ldexp(1.0, -24);

float
next_random()
{
    static uint32_t state = 2463534242u;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return static_cast<float>(state) / 4294967296.0f * 4 - 2;
}

struct tensor {
    krul_dtype dtype;
    int64_t shape[4], stride[4];
    std::vector<uint8_t> bytes;
    int64_t skipped; /* elements before the first, so that it is not aligned */

    tensor(krul_dtype of, int64_t n_batch, int64_t n_heads, int64_t n_tokens, int64_t head_dim,
           int64_t skipped_in)
        : dtype(of), shape{n_batch, n_heads, n_tokens, head_dim},
          stride{n_heads * n_tokens * head_dim, n_tokens * head_dim, head_dim, 1},
          bytes(static_cast<size_t>(n_batch * n_heads * n_tokens * head_dim + skipped_in) *
                krul_dtype_bytes(of)),
          skipped(skipped_in)
    {
        for (int64_t i = 0; i < n_batch * n_heads * n_tokens * head_dim; i++) {
            set(i, next_random());
        }
    }

    uint8_t *at(int64_t index)
    {
        return bytes.data() + static_cast<size_t>(skipped + index) * krul_dtype_bytes(dtype);
    }

    void set(int64_t index, float value)
    {
        uint16_t bits = dtype == KRUL_DTYPE_F16 ? krul_f32_to_f16(value) : krul_f32_to_bf16(value);
        if (dtype == KRUL_DTYPE_F32) {
            std::memcpy(at(index), &value, sizeof value);
        }
        else {
            std::memcpy(at(index), &bits, sizeof bits);
        }
    }

    double get(int64_t batch, int64_t head, int64_t token, int64_t i)
    {
        int64_t index = batch * stride[0] + head * stride[1] + token * stride[2] + i;
        float value;
        uint16_t bits;
        if (dtype == KRUL_DTYPE_F32) {
            std::memcpy(&value, at(index), sizeof value);
            return static_cast<double>(value);
        }
        std::memcpy(&bits, at(index), sizeof bits);
        return static_cast<double>(dtype == KRUL_DTYPE_F16 ? krul_f16_to_f32(bits)
                                                           : krul_bf16_to_f32(bits));
    }

    krul_view view(krul_device_type device)
    {
        krul_view out = {};
        out.data = at(0);
        out.dtype = dtype;
        out.device_type = device;
        out.is_read_only = true;
        std::memcpy(out.shape, shape, sizeof shape);
        std::memcpy(out.stride, stride, sizeof stride);
        return out;
    }
};

struct geometry {
    const char *name;
    int n_layers;
    int n_batch;
    int n_heads;
    int n_kv_heads;
    int head_dim;
    int n_rows;
    int n_keys;
    krul_dtype query_dtype;
    krul_dtype key_dtype;
    int skipped;
};

/* Layer 0 is plain, 1 has a soft cap and sinks, 2 a window and, where there is one row, keys from some
 * position on, 3 is not observed, 4 has other heads, 5 lacks the last keys, the rest are plain. */
struct fixture {
    geometry of;
    std::vector<tensor> queries, keys;
    std::vector<std::vector<float>> sinks;
    std::vector<uint8_t> is_real;
    std::vector<int64_t> positions, starts;
    std::vector<int> n_heads, key_start;

    explicit fixture(const geometry &wanted) : of(wanted)
    {
        int window = std::max(1, of.n_keys / 5);
        for (int r = 0; r < of.n_rows; r++) {
            positions.push_back(of.n_rows == 1 ? of.n_keys - 1
                                               : r * (of.n_keys - 1) / (of.n_rows - 1));
        }
        is_real.assign(static_cast<size_t>(of.n_batch * of.n_keys), 1);
        for (int b = 0; b < of.n_batch; b++) {
            for (int k = 0; b > 0 && k < of.n_keys / 7; k++) {
                is_real[static_cast<size_t>(b * of.n_keys + k)] = 0;
            }
            if (b > 0 && of.n_rows > 2) { /* a hole, and one of the rows is in it */
                int64_t hole = b * of.n_keys + positions[static_cast<size_t>(of.n_rows / 2)];
                is_real[static_cast<size_t>(hole)] = 0;
            }
            for (int64_t position : positions) {
                starts.push_back(std::max<int64_t>(0, position - window + 1));
            }
        }
        for (int l = 0; l < of.n_layers; l++) {
            int heads = l == 4 ? 2 * of.n_heads : of.n_heads;
            int kv_heads = l == 4 ? of.n_heads : of.n_kv_heads;
            int start = l == 2 && of.n_rows == 1 ? of.n_keys - window : 0;
            n_heads.push_back(heads);
            key_start.push_back(start);
            int n_keys = l == 5 ? of.n_keys - of.n_keys / 8 : of.n_keys - start;
            queries.emplace_back(of.query_dtype, of.n_batch, heads, of.n_rows, of.head_dim,
                                 of.skipped);
            keys.emplace_back(of.key_dtype, of.n_batch, kv_heads, n_keys, of.head_dim, of.skipped);
            sinks.emplace_back();
            for (int h = 0; h < heads; h++) {
                sinks.back().push_back(next_random());
            }
        }
    }

    std::vector<krul_estimator_layer> layers(krul_device_type device)
    {
        std::vector<krul_estimator_layer> out(static_cast<size_t>(of.n_layers));
        for (int l = 0; l < of.n_layers; l++) {
            krul_estimator_layer &layer = out[static_cast<size_t>(l)];
            layer = {};
            if (l == 3) {
                continue;
            }
            layer.queries = queries[static_cast<size_t>(l)].view(device);
            layer.keys = keys[static_cast<size_t>(l)].view(device);
            layer.scaling = scaling();
            layer.softcap = l == 1 ? 1.5f : 0.0f;
            layer.sinks = l == 1 ? sinks[1].data() : nullptr;
            layer.row_starts = l == 2 ? starts.data() : nullptr;
            layer.key_start = key_start[static_cast<size_t>(l)];
        }
        return out;
    }

    float scaling() const
    {
        return 2.0f / std::sqrt(static_cast<float>(of.head_dim));
    }
};

struct result {
    std::vector<double> distances, importance;
    std::vector<float> received;
    double n_rows = 0;
    int64_t stride;

    explicit result(const geometry &of)
        : distances(static_cast<size_t>(of.n_layers * of.n_layers), 0.25),
          importance(static_cast<size_t>(2 * of.n_layers), 0.5),
          received(static_cast<size_t>(of.n_layers * (of.n_keys + 3)), 0.125f),
          stride(of.n_keys + 3)
    {
    }

    krul_estimator_sums sums()
    {
        return {distances.data(), importance.data(), received.data(), stride, &n_rows};
    }
};

bool
is_same(const result &left, const result &right)
{
    return std::memcmp(left.distances.data(), right.distances.data(),
                       left.distances.size() * sizeof(double)) == 0 &&
           left.importance == right.importance && left.received == right.received &&
           left.n_rows == right.n_rows;
}

constexpr double weight = 2.0;

/* With a workspace of exactly the size that is asked for, full of NaN. n_key_blocks and n_splits are
 * lowered to these unless 0. */
void
observe(fixture &made, int n_key_blocks, int n_splits, result *out)
{
    krul_error err = {};
    std::vector<krul_estimator_layer> layers = made.layers(KRUL_DEVICE_CUDA);
    krul_estimator_sums sums = out->sums();
    krul_device_observation plan;
    krul_status status = krul_device_observe_plan(
        layers.data(), made.of.n_layers, made.positions.data(), made.of.n_rows, made.is_real.data(),
        made.of.n_keys, weight, &sums, &plan, &err);
    CHECK(status == KRUL_STATUS_OK);
    if (status != KRUL_STATUS_OK) {
        std::fprintf(stderr, "%s\n", err.message);
        return;
    }
    for (int i = 0; i < plan.n_groups; i++) {
        krul_device_observe_group &group = plan.groups[i];
        CHECK(group.shared_bytes <= KRUL_DEVICE_SHARED_BYTES);
        group.n_key_blocks = n_key_blocks > 0 ? std::min(n_key_blocks, group.n_key_blocks)
                                              : group.n_key_blocks;
        group.n_splits = n_splits > 0 ? std::min(n_splits, group.n_splits) : group.n_splits;
    }
    uint8_t *image = static_cast<uint8_t *>(emulate::allocate(plan.image_bytes, 256));
    uint8_t *workspace = static_cast<uint8_t *>(emulate::allocate(plan.workspace_bytes, 256));
    std::memset(workspace, 0xff, plan.workspace_bytes);
    krul_device_observe_fill(&plan, layers.data(), made.positions.data(), made.is_real.data(),
                             image);
    CHECK(krul_cuda_estimator_observe(&plan, image, workspace, &sums, nullptr, &err) ==
          KRUL_STATUS_OK);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    emulate::release(image);
    emulate::release(workspace);
}

/* ---- the reference ----------------------------------------------------------------------------- */

struct row_set { /* of one layer: n_batch x n_heads x n_rows x n_keys */
    std::vector<double> value, error;
};

row_set
attend(fixture &made, int l)
{
    const geometry &of = made.of;
    std::vector<krul_estimator_layer> layers = made.layers(KRUL_DEVICE_CPU);
    const krul_estimator_layer &layer = layers[static_cast<size_t>(l)];
    tensor &queries = made.queries[static_cast<size_t>(l)],
           &keys = made.keys[static_cast<size_t>(l)];
    int heads = made.n_heads[static_cast<size_t>(l)],
        start = made.key_start[static_cast<size_t>(l)];
    int shared = heads / static_cast<int>(keys.shape[1]);
    double scaling = static_cast<double>(layer.scaling),
           softcap = static_cast<double>(layer.softcap);
    row_set out;
    for (int b = 0; b < of.n_batch; b++) {
        const uint8_t *real = &made.is_real[static_cast<size_t>(b * of.n_keys)];
        for (int h = 0; h < heads; h++) {
            for (int r = 0; r < of.n_rows; r++) {
                int64_t position = made.positions[static_cast<size_t>(r)];
                int64_t first = l == 2 ? made.starts[static_cast<size_t>(b * of.n_rows + r)] : 0;
                std::vector<double> powers(static_cast<size_t>(of.n_keys));
                double highest = layer.sinks != nullptr ? static_cast<double>(layer.sinks[h])
                                                        : -INFINITY;
                double lowest = INFINITY, off = 0;
                std::vector<double> scores(static_cast<size_t>(of.n_keys), -INFINITY);
                for (int64_t k = first; k <= position && real[position] != 0; k++) {
                    if (real[k] == 0 || k < start || k - start >= keys.shape[2]) {
                        continue;
                    }
                    double score = 0, size = 0;
                    for (int d = 0; d < of.head_dim; d++) {
                        double product = queries.get(b, h, r, d) *
                                         keys.get(b, h / shared, k - start, d);
                        score += product;
                        size += std::abs(product);
                    }
                    score *= scaling;
                    double own = (of.head_dim + 2) * unit * size * std::abs(scaling);
                    if (softcap > 0) {
                        score = softcap * std::tanh(score / softcap);
                        own += 16 * unit * softcap; /* the cap's own arithmetic */
                    }
                    scores[static_cast<size_t>(k)] = score;
                    highest = std::max(highest, score);
                    lowest = std::min(lowest, score);
                    off = std::max(off, own);
                }
                double total = layer.sinks != nullptr
                                   ? std::exp(static_cast<double>(layer.sinks[h]) - highest)
                                   : 0;
                for (double &score : scores) {
                    score = std::isinf(score) ? 0 : std::exp(score - highest);
                    total += score;
                }
                /* The argument is at most this large; an exponential is off by 8 roundings at most. */
                double spread = std::isinf(lowest) ? 0 : highest - lowest;
                double relative = 2 * (off + unit * (spread + 8)) + (of.n_keys + 8) * unit;
                for (double score : scores) {
                    out.value.push_back(total > 0 ? score / total : 0);
                    out.error.push_back(out.value.back() * relative);
                }
            }
        }
    }
    return out;
}

bool
is_within(double got, double wanted, double error, double &largest)
{
    double part = std::abs(got - wanted) / (error + 1e-30);
    largest = std::max(largest, part);
    return part <= 1;
}

/* Returns the largest part of the bound that was used. */
double
check_result(fixture &made, const std::vector<row_set> &rows, const result &got)
{
    const geometry &of = made.of;
    double largest = 0, n_real_rows = 0;
    bool are_distances_right = true, is_mass_right = true, are_ends_right = true;
    for (int b = 0; b < of.n_batch; b++) {
        for (int64_t position : made.positions) {
            n_real_rows += made.is_real[static_cast<size_t>(b * of.n_keys + position)];
        }
    }
    CHECK(got.n_rows == weight * n_real_rows);
    for (int l = 0; l < of.n_layers; l++) {
        const row_set &own = rows[static_cast<size_t>(l)];
        for (int u = 0; u < of.n_layers; u++) {
            double found = got.distances[static_cast<size_t>(l * of.n_layers + u)];
            if (l == 3 || u == 3 || (l == 4) != (u == 4)) {
                are_distances_right = are_distances_right && std::isnan(found);
                continue;
            }
            const row_set &other = rows[static_cast<size_t>(u)];
            double squared = 0, error = 0;
            for (size_t i = 0; i < own.value.size(); i++) {
                double difference = own.value[i] - other.value[i];
                double off = l == u ? 0 : own.error[i] + other.error[i];
                squared += difference * difference;
                error += 2 * std::abs(difference) * off + off * off;
            }
            error += squared * 64 * unit; /* float32 sums of 32 squares, and of 32 of these */
            are_distances_right = is_within(found, 0.25 + weight * squared, weight * error + 1e-15,
                                            largest) &&
                                  are_distances_right;
        }
        for (int64_t k = 0; k < got.stride && l != 3; k++) {
            double mass = 0, error = 0;
            for (size_t i = 0;
                 k < of.n_keys && i < own.value.size() / static_cast<size_t>(of.n_keys); i++) {
                mass += own.value[i * static_cast<size_t>(of.n_keys) + static_cast<size_t>(k)];
                error += own.error[i * static_cast<size_t>(of.n_keys) + static_cast<size_t>(k)];
            }
            int n_terms = of.n_batch * made.n_heads[static_cast<size_t>(l)] * of.n_rows;
            error += (mass + 0.125) * (n_terms + 4) * unit;
            is_mass_right = is_within(static_cast<double>(
                                          got.received[static_cast<size_t>(l * got.stride + k)]),
                                      0.125 + weight * mass, weight * error, largest) &&
                            is_mass_right;
        }
        double ends[2] = {0, 0}, errors[2] = {1e-15, 1e-15};
        int heads = made.n_heads[static_cast<size_t>(l)];
        for (int b = 0; b < of.n_batch && l != 3; b++) {
            const uint8_t *real = &made.is_real[static_cast<size_t>(b * of.n_keys)];
            int64_t first = 0;
            while (real[first] == 0) {
                first++;
            }
            for (int h = 0; h < heads; h++) {
                for (int r = 0; r < of.n_rows; r++) {
                    int64_t position = made.positions[static_cast<size_t>(r)];
                    int64_t n_tenth = std::max<int64_t>(1, (position - first + 1) / 10);
                    for (int64_t k = 0; k < of.n_keys; k++) {
                        size_t i = static_cast<size_t>(
                            ((b * heads + h) * of.n_rows + r) * of.n_keys + k);
                        bool is_in[2] = {k >= first && k<first + n_tenth, k> position - n_tenth};
                        for (int end = 0; end < 2; end++) {
                            ends[end] += is_in[end] ? own.value[i] / heads : 0;
                            errors[end] += is_in[end] ? own.error[i] / heads : 0;
                        }
                    }
                }
            }
        }
        for (int end = 0; end < 2; end++) {
            errors[end] += ends[end] * (of.n_keys + 32) * unit;
            are_ends_right = is_within(got.importance[static_cast<size_t>(2 * l + end)],
                                       0.5 + weight * ends[end], weight * errors[end], largest) &&
                             are_ends_right;
        }
    }
    CHECK(are_distances_right);
    CHECK(is_mass_right);
    CHECK(are_ends_right);
    return largest;
}

const geometry geometries[] = {
    {"bf16, 64", 6, 2, 4, 2, 64, 7, 83, KRUL_DTYPE_BF16, KRUL_DTYPE_BF16, 0},
    {"f16, 80, each head its own", 3, 1, 3, 3, 80, 19, 70, KRUL_DTYPE_F16, KRUL_DTYPE_F16, 0},
    {"f32, 96", 5, 1, 4, 2, 96, 5, 51, KRUL_DTYPE_F32, KRUL_DTYPE_F32, 0},
    {"bf16, 128, one for all", 3, 1, 8, 1, 128, 3, 40, KRUL_DTYPE_BF16, KRUL_DTYPE_BF16, 0},
    {"f16, odd", 5, 2, 3, 1, 13, 6, 45, KRUL_DTYPE_F16, KRUL_DTYPE_F16, 0},
    {"f32, odd", 3, 2, 6, 2, 7, 6, 45, KRUL_DTYPE_F32, KRUL_DTYPE_F32, 0},
    {"bf16, not aligned", 2, 1, 2, 1, 32, 4, 33, KRUL_DTYPE_BF16, KRUL_DTYPE_BF16, 1},
    {"two dtypes", 3, 1, 4, 2, 24, 4, 37, KRUL_DTYPE_F32, KRUL_DTYPE_BF16, 0},
    {"one row", 5, 2, 4, 2, 32, 1, 61, KRUL_DTYPE_BF16, KRUL_DTYPE_BF16, 0},
    {"one key", 2, 1, 2, 2, 16, 1, 1, KRUL_DTYPE_F16, KRUL_DTYPE_F16, 0},
    {"nine alike, eight warps", 11, 1, 4, 2, 16, 4, 37, KRUL_DTYPE_BF16, KRUL_DTYPE_BF16, 0},
    {"many layers", 43, 1, 2, 1, 8, 3, 37, KRUL_DTYPE_F32, KRUL_DTYPE_F32, 0},
    {"very many layers", 90, 1, 2, 1, 8, 2, 21, KRUL_DTYPE_F32, KRUL_DTYPE_F32, 0},
};

/* Right, and the same bits whatever order threads run in; nearly the same however work is cut. */
void
test_geometries()
{
    for (const geometry &of : geometries) {
        fixture made(of);
        int n_failed_before = check_n_failed;
        std::vector<row_set> rows;
        for (int l = 0; l < of.n_layers; l++) {
            rows.push_back(l == 3 ? row_set() : attend(made, l));
        }
        result on_cpu(of), first(of), second(of), third(of), cut(of);
        krul_error err = {};
        krul_estimator_sums sums = on_cpu.sums();
        std::vector<krul_estimator_layer> layers = made.layers(KRUL_DEVICE_CPU);
        CHECK(krul_estimator_observe(check_best_backend(), layers.data(), of.n_layers,
                                     made.positions.data(), of.n_rows, made.is_real.data(),
                                     of.n_keys, weight, 1 << 20, 1, &sums, &err) == KRUL_STATUS_OK);
        observe(made, 0, 0, &first);
        double part = check_result(made, rows, first);
        double cpu_part = check_result(made, rows, on_cpu);
        emulate::order = 1;
        observe(made, 0, 0, &second);
        emulate::order = 5;
        observe(made, 2, 0, &third);
        observe(made, 1, 2, &cut);
        emulate::order = 0;
        CHECK(is_same(first, second));
        (void)check_result(made, rows, third);
        (void)check_result(made, rows, cut);
        if (check_n_failed != n_failed_before) {
            std::fprintf(stderr, "%s: %g and on the CPU %g of the bound\n", of.name, part,
                         cpu_part);
        }
    }
}

/* A key that is not finite spoils what sees it, and nothing else. */
void
test_not_finite()
{
    fixture made({"", 3, 1, 2, 1, 16, 4, 40, KRUL_DTYPE_BF16, KRUL_DTYPE_BF16, 0});
    made.keys[0].set(20 * 16 + 3, NAN);
    result got(made.of);
    observe(made, 0, 0, &got);
    CHECK(std::isnan(got.distances[1]) && std::isnan(got.distances[3]));
    CHECK(!std::isnan(got.distances[5]) && !std::isnan(got.importance[2]));
    CHECK(std::isnan(static_cast<double>(got.received[10]))); /* of layer 0 */
    CHECK(!std::isnan(static_cast<double>(got.received[static_cast<size_t>(got.stride) + 10])));
}

void
test_refusals()
{
    fixture made(geometries[0]);
    krul_error err = {};
    result got(made.of);
    krul_estimator_sums sums = got.sums();
    krul_device_observation plan = {};
    auto refuse = [&](const std::vector<krul_estimator_layer> &layers, krul_status wanted,
                      const char *words) {
        krul_status status = krul_device_observe_plan(
            layers.data(), static_cast<int32_t>(layers.size()), made.positions.data(),
            made.of.n_rows, made.is_real.data(), made.of.n_keys, weight, &sums, &plan, &err);
        CHECK(status == wanted && std::strstr(err.message, words) != nullptr);
        CHECK(plan.workspace_bytes == 0);
    };
    refuse(made.layers(KRUL_DEVICE_CPU), KRUL_STATUS_UNSUPPORTED, "layer 0 is on device type 1");
    std::vector<krul_estimator_layer> layers = made.layers(KRUL_DEVICE_CUDA);
    layers[1].softcap = -1;
    refuse(layers, KRUL_STATUS_BAD_VALUE, "softcap");
    layers = made.layers(KRUL_DEVICE_CUDA);
    layers[2].keys.shape[3]--;
    refuse(layers, KRUL_STATUS_BAD_SHAPE, "layer 2: queries are");
    layers = std::vector<krul_estimator_layer>(150, made.layers(KRUL_DEVICE_CUDA)[0]);
    refuse(layers, KRUL_STATUS_UNSUPPORTED, "150 layers need");
    for (size_t l = 0; l < layers.size(); l++) {
        layers[l].queries.shape[1] = layers[l].keys.shape[1] * static_cast<int64_t>(1 + l % 9);
    }
    layers.resize(9);
    refuse(layers, KRUL_STATUS_UNSUPPORTED, "more than 8 different numbers of heads");
}

/* Nothing observed: every distance is unknown, and nothing else changes. */
void
test_nothing()
{
    fixture made(geometries[0]);
    krul_error err = {};
    result got(made.of), before(made.of);
    krul_estimator_sums sums = got.sums();
    std::vector<krul_estimator_layer> layers(static_cast<size_t>(made.of.n_layers));
    krul_device_observation plan = {};
    CHECK(krul_device_observe_plan(layers.data(), made.of.n_layers, nullptr, 0, nullptr,
                                   made.of.n_keys, weight, &sums, &plan, &err) == KRUL_STATUS_OK);
    std::vector<uint8_t> image(plan.image_bytes), workspace(plan.workspace_bytes);
    krul_device_observe_fill(&plan, layers.data(), nullptr, nullptr, image.data());
    CHECK(krul_cuda_estimator_observe(&plan, image.data(), workspace.data(), &sums, nullptr,
                                      &err) == KRUL_STATUS_OK);
    for (double distance : got.distances) {
        CHECK(std::isnan(distance));
    }
    CHECK(got.importance == before.importance && got.received == before.received);
    CHECK(got.n_rows == 0);
}

} // namespace

int
main()
{
    test_geometries();
    test_not_finite();
    test_refusals();
    test_nothing();
    return check_finish();
}

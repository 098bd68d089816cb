/* test_cuda_encode.cpp - the encoding kernels against the CPU's codecs, byte for byte.
 *
 * The emulator has the CPU's own atan2f and sin, so that share is the same as well; a GPU has others,
 * so that there its payloads are as close to what was coded as the CPU's. */
#include "emulate.h"

#include "check.h"
#include "device_encode.h"

extern "C" {
#include "backend.h"
#include "dtype.h"
}

namespace {

constexpr uint8_t guard = 0xd7;

const krul_backend *const backend = check_best_backend();
const krul_dtype dtypes[] = {KRUL_DTYPE_F32, KRUL_DTYPE_F16, KRUL_DTYPE_BF16};
const krul_codec codecs[] = {KRUL_CODEC_EXACT, KRUL_CODEC_INT8,       KRUL_CODEC_INT4,
                             KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4};

enum class content { normal, zeros, alike, opposite };

/* A block to be coded, in memory with gaps. */
struct input {
    std::vector<float> values[2];
    std::vector<uint8_t> bytes[2];
    krul_device_source source;
};

float
value_of(content kind, std::mt19937 &random, size_t at, int which, float lower)
{
    std::normal_distribution<float> normal;
    float value = normal(random) * (at % 7 == 2 ? 9.0f : 1.0f) + 0.3f;
    switch (kind) {
        case content::zeros: /* of both signs, and little else */
            return random() % 4 != 0 ? (random() % 2 == 0 ? 0.0f : -0.0f) : value;
        case content::alike:
            return which == 0 ? value : lower * 1.5f;
        case content::opposite:
            return which == 0 ? value : -lower;
        default:
            return which == 0 ? value : lower + 0.4f * value;
    }
}

input
make(krul_codec codec, krul_kv kv, krul_dtype dtype, int64_t n_tokens, int64_t head_dim,
     content kind, int64_t row_gap)
{
    input out;
    const int64_t n_batch = 2, n_heads = 3, row = head_dim + row_gap;
    size_t n_elements = static_cast<size_t>(n_batch * n_heads * n_tokens * row);
    std::mt19937 random(static_cast<unsigned>(n_tokens * 1000 + head_dim));
    out.source = {};
    out.source.codec = codec;
    out.source.kv = kv;
    for (int i = 0; i < 2; i++) {
        out.values[i].resize(n_elements);
        for (size_t j = 0; j < n_elements; j++) {
            bool is_zero_row = j / static_cast<size_t>(row) % 11 == static_cast<size_t>(3 + i);
            float value = value_of(kind, random, j, i, out.values[0][j]);
            out.values[i][j] = is_zero_row ? 0.0f : value;
        }
        out.bytes[i].resize(n_elements * krul_dtype_bytes(dtype));
        backend->narrow(dtype, out.values[i].data(), static_cast<int64_t>(n_elements),
                        out.bytes[i].data());
        krul_view &view = out.source.views[i];
        view.dtype = dtype;
        view.device_type = KRUL_DEVICE_CPU;
        const int64_t shape[] = {n_batch, n_heads, n_tokens, head_dim};
        const int64_t stride[] = {n_heads * n_tokens * row, n_tokens * row, row, 1};
        std::copy(shape, shape + 4, view.shape);
        std::copy(stride, stride + 4, view.stride);
    }
    return out;
}

/* What the device made of some inputs. */
struct coded {
    std::vector<std::vector<uint8_t>> payloads;
    std::vector<krul_device_result> results;
};

coded
encode(std::vector<input> &inputs, unsigned order)
{
    std::vector<krul_device_source> sources;
    std::vector<uint64_t> payload_bytes(inputs.size());
    uint64_t at = 0;
    for (input &one : inputs) {
        for (int i = 0; i < 2; i++) {
            one.source.views[i].data = one.bytes[i].data();
        }
        one.source.payload_offset = at;
        size_t capacity = 0;
        CHECK(krul_compressor_bound(one.source.views, krul_codec_n_layers(one.source.codec),
                                    &capacity, nullptr) == KRUL_STATUS_OK);
        at += (capacity + 16 + 15) / 16 * 16;
        sources.push_back(one.source);
    }
    int32_t n_sources = static_cast<int32_t>(sources.size()), n_batches = 0;
    std::vector<krul_device_encode_batch> batches(KRUL_DEVICE_MAX_BATCHES);
    size_t bound = krul_device_encode_bound(sources.data(), n_sources), used = 0, workspace = 0;
    std::vector<uint8_t> plan(bound), payloads(at, guard);
    krul_error err = {};
    CHECK(krul_device_encode_prepare(plan.data(), bound, sources.data(), n_sources, batches.data(),
                                     &n_batches, payload_bytes.data(), &used, &workspace,
                                     &err) == KRUL_STATUS_OK);
    CHECK(used <= bound);
    CHECK(krul_device_encode_prepare(plan.data(), used - 1, sources.data(), n_sources,
                                     batches.data(), &n_batches, payload_bytes.data(), &used,
                                     &workspace, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_device_encode_prepare(plan.data(), used, sources.data(), n_sources, batches.data(),
                                     &n_batches, payload_bytes.data(), &used, &workspace,
                                     &err) == KRUL_STATUS_OK);
    uint8_t *scratch = static_cast<uint8_t *>(emulate::allocate(workspace));
    std::memset(scratch, 0x5a, workspace);
    coded out;
    out.results.resize(inputs.size());
    emulate::order = order;
    for (int32_t i = 0; i < n_batches; i++) {
        CHECK(krul_cuda_encode(nullptr, &batches[static_cast<size_t>(i)], plan.data(),
                               payloads.data(), scratch, out.results.data(),
                               &err) == KRUL_STATUS_OK);
    }
    emulate::order = 0;
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    emulate::release(scratch);
    bool is_guarded = true;
    uint64_t end = 0;
    for (size_t i = 0; i < inputs.size(); i++) {
        uint64_t begin = inputs[i].source.payload_offset;
        is_guarded &= std::all_of(payloads.data() + end, payloads.data() + begin,
                                  [](uint8_t byte) { return byte == guard; });
        end = begin + payload_bytes[i];
        if (inputs[i].source.codec ==
            KRUL_CODEC_EXACT) { /* which takes less, and may use the rest */
            CHECK(out.results[i].payload_bytes <= payload_bytes[i]);
            out.payloads.emplace_back(payloads.data() + begin,
                                      payloads.data() + begin + out.results[i].payload_bytes);
            continue;
        }
        out.payloads.emplace_back(payloads.data() + begin, payloads.data() + end);
    }
    CHECK(is_guarded && std::all_of(payloads.data() + end, payloads.data() + at,
                                    [](uint8_t byte) { return byte == guard; }));
    return out;
}

/* Is what a device made of a pair sound, and no further from it than what the CPU made? */
bool
is_as_close(const krul_device_source &source, const std::vector<uint8_t> &payload,
            const double wanted[2], const double got[2])
{
    krul_view views[2] = {source.views[0], source.views[1]};
    std::vector<uint8_t> decoded[2];
    bool is_close = true;
    for (int i = 0; i < 2; i++) {
        size_t n_elements = static_cast<size_t>(views[i].shape[0] * views[i].stride[0]);
        decoded[i].resize(n_elements * krul_dtype_bytes(views[i].dtype));
        views[i].data = decoded[i].data();
        is_close = is_close && std::fabs(got[i] - wanted[i]) <= 1e-3 * wanted[i] + 1e-30;
    }
    return is_close && krul_compressor_decode(backend, source.codec, source.kv, payload.data(),
                                              payload.size(), views, 2, nullptr) == KRUL_STATUS_OK;
}

#ifdef KRUL_ON_GPU
constexpr bool has_own_sine = true;
#else
constexpr bool has_own_sine = false;
#endif

/* All of them at once, and one by one on the CPU. */
void
check_inputs(std::vector<input> &inputs, unsigned order)
{
    coded device = encode(inputs, order);
    for (size_t i = 0; i < inputs.size(); i++) {
        const krul_device_source &source = inputs[i].source;
        krul_view views[2] = {source.views[0], source.views[1]};
        int n_views = krul_codec_n_layers(source.codec);
        size_t capacity = 0, n_bytes = 0;
        krul_codec used = source.codec;
        double error[2];
        CHECK(krul_compressor_bound(views, n_views, &capacity, nullptr) == KRUL_STATUS_OK);
        std::vector<uint8_t> payload(capacity);
        CHECK(krul_compressor_encode(backend, source.codec, source.kv, views, n_views,
                                     payload.data(), capacity, &n_bytes, &used, error,
                                     nullptr) == KRUL_STATUS_OK);
        payload.resize(n_bytes);
        const krul_device_result &result = device.results[i];
        bool is_same;
        if (used != source.codec) {
            is_same = result.does_not_fit == 1;
        }
        else if (has_own_sine && source.codec != KRUL_CODEC_EXACT && n_views == 2) {
            is_same = result.does_not_fit == 0 && device.payloads[i].size() == payload.size() &&
                      is_as_close(source, device.payloads[i], error, result.error);
        }
        else {
            is_same = result.does_not_fit == 0 && device.payloads[i] == payload &&
                      std::fabs(result.error[0] - error[0]) <= 1e-11 * error[0] &&
                      std::fabs(result.error[1] - error[1]) <= 1e-11 * error[1];
        }
        CHECK(is_same);
        if (!is_same) {
            size_t at = 0;
            while (at < n_bytes && at < device.payloads[i].size() &&
                   payload[at] == device.payloads[i][at]) {
                at++;
            }
            std::fprintf(stderr,
                         "  codec %d (used %d), kv %d, dtype %d, %lld tokens of %lld: byte %zu of "
                         "%zu, fits %u, errors %g %g, %g %g\n",
                         source.codec, used, source.kv, views[0].dtype,
                         static_cast<long long>(views[0].shape[2]),
                         static_cast<long long>(views[0].shape[3]), at, n_bytes,
                         result.does_not_fit, result.error[0], error[0], result.error[1], error[1]);
        }
    }
}

void
test_every_codec()
{
    const int64_t head_dims[] = {64, 80, 96, 128, 256, 1, 3, 33, 72};
    const int64_t n_tokens[] = {1, 20, 64, 65, 130};
    const content contents[] = {content::normal, content::zeros, content::alike, content::opposite};
    unsigned turn = 0, order = 0;
    for (int64_t head_dim : head_dims) {
        for (krul_dtype dtype : dtypes) {
            std::vector<input> inputs;
            for (krul_codec codec : codecs) {
                for (int kv = 0; kv < 2; kv++) {
                    int64_t tokens = n_tokens[head_dim > 128 ? turn % 2 : turn % 5];
                    inputs.push_back(make(codec, static_cast<krul_kv>(kv), dtype, tokens, head_dim,
                                          contents[turn / 5 % 4], turn % 3 == 0 ? 5 : 0));
                    turn++;
                }
            }
            check_inputs(inputs, order++ % 4);
        }
    }
}

/* One value that a codec cannot hold, anywhere, turns its own block down and no other. */
void
test_what_does_not_fit()
{
    const float bad[] = {NAN, INFINITY, -INFINITY, 3.39e38f};
    unsigned turn = 0, order = 0;
    for (krul_codec codec : codecs) {
        for (krul_dtype dtype : dtypes) {
            std::vector<input> inputs;
            for (float value : bad) { /* all of which exact takes */
                input one = make(codec, static_cast<krul_kv>(turn % 2), dtype, 70, 40,
                                 content::normal, 0);
                int which = krul_codec_n_layers(codec) == 2 ? static_cast<int>(turn / 2 % 2) : 0;
                size_t at = turn * 977 % one.values[which].size();
                backend->narrow(dtype, &value, 1,
                                one.bytes[which].data() + at * krul_dtype_bytes(dtype));
                inputs.push_back(one);
                inputs.push_back(make(codec, KRUL_KV_VALUE, dtype, 5, 40, content::normal, 0));
                turn++;
            }
            check_inputs(inputs, order++ % 4);
        }
    }
}

/* Numbers that fit, whose restored ones would not: codes of a direction reach a little beyond 1. */
void
test_what_would_overflow()
{
    std::vector<input> inputs;
    for (krul_codec codec : {KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4}) {
        input one = make(codec, KRUL_KV_KEY, KRUL_DTYPE_F16, 5, 16, content::normal, 0);
        for (int i = 0; i < 2; i++) {
            for (size_t j = 0; j < one.values[i].size(); j++) {
                float value = j % 16 == 0 ? 65504.0f : 0.0f;
                backend->narrow(KRUL_DTYPE_F16, &value, 1, one.bytes[i].data() + 2 * j);
            }
        }
        inputs.push_back(one);
    }
    check_inputs(inputs, 0);
    coded device = encode(inputs, 1);
    CHECK(device.results[0].does_not_fit == 0 && device.results[2].does_not_fit == 1);
}

/* Chunks, several of them; streams of one symbol; elements that no coder makes smaller. */
void
test_exact_streams()
{
    for (krul_dtype dtype : dtypes) {
        std::vector<input> inputs;
        inputs.push_back(make(KRUL_CODEC_EXACT, KRUL_KV_KEY, dtype, 130, 128, content::normal, 0));
        input constant = make(KRUL_CODEC_EXACT, KRUL_KV_KEY, dtype, 20, 16, content::normal, 0);
        std::fill(constant.bytes[0].begin(), constant.bytes[0].end(), 0);
        inputs.push_back(constant);
        input noise = make(KRUL_CODEC_EXACT, KRUL_KV_KEY, dtype, 20, 16, content::normal, 3);
        std::mt19937 random(9);
        std::generate(noise.bytes[0].begin(), noise.bytes[0].end(),
                      [&] { return static_cast<uint8_t>(random()); });
        inputs.push_back(noise);
        input few = make(KRUL_CODEC_EXACT, KRUL_KV_KEY, dtype, 9, 4, content::normal, 0);
        inputs.push_back(few);
        input steps = make(KRUL_CODEC_EXACT, KRUL_KV_KEY, dtype, 30, 32, content::normal, 0);
        for (size_t i = 0; i < steps.values[0].size(); i++) { /* a constant for every channel */
            float value = std::ldexp(1.0f, static_cast<int>(i % 32) - 10);
            backend->narrow(dtype, &value, 1, steps.bytes[0].data() + i * krul_dtype_bytes(dtype));
        }
        inputs.push_back(steps);
        check_inputs(inputs, 1);
    }
}

void
test_two_runs_are_the_same()
{
    for (krul_codec codec : codecs) {
        std::vector<input> inputs;
        inputs.push_back(make(codec, KRUL_KV_KEY, KRUL_DTYPE_BF16, 200, 48, content::normal, 0));
        coded first = encode(inputs, 0);
        for (unsigned order = 1; order < 4; order++) {
            coded next = encode(inputs, order);
            CHECK(next.payloads == first.payloads);
            CHECK(std::memcmp(&next.results[0], &first.results[0], sizeof next.results[0]) == 0);
        }
    }
}

void
check_refused(const krul_device_source &source, krul_status status, const char *words)
{
    std::vector<uint8_t> plan(1 << 16);
    krul_device_encode_batch batches[KRUL_DEVICE_MAX_BATCHES];
    int32_t n_batches = -1;
    uint64_t payload_bytes = 0;
    size_t used = 0, workspace = 0;
    krul_error err = {};
    CHECK(krul_device_encode_prepare(plan.data(), plan.size(), &source, 1, batches, &n_batches,
                                     &payload_bytes, &used, &workspace, &err) == status);
    CHECK(err.status == status && std::strstr(err.message, words) != nullptr && n_batches == -1);
}

void
test_arguments()
{
    input one = make(KRUL_CODEC_SHARE, KRUL_KV_KEY, KRUL_DTYPE_F32, 8, 8, content::normal, 0);
    for (int i = 0; i < 2; i++) {
        one.source.views[i].data = one.bytes[i].data();
    }
    krul_device_source source = one.source;
    source.payload_offset = 8;
    check_refused(source, KRUL_STATUS_BAD_VALUE, "sources[0]: payload_offset is 8");
    source = one.source;
    source.kv = KRUL_KV_BOTH;
    check_refused(source, KRUL_STATUS_BAD_VALUE, "kv is 2");
    source = one.source;
    source.views[1].shape[2] = 7;
    check_refused(source, KRUL_STATUS_BAD_SHAPE, "views[1] (2, 3, 7, 8)");
    source = one.source;
    source.views[0].data = nullptr;
    check_refused(source, KRUL_STATUS_BAD_VALUE, "views[0]");
    source = one.source;
    source.codec = KRUL_CODEC_PREDICT;
    check_refused(source, KRUL_STATUS_UNSUPPORTED, "codec 7 is not written");
    source = one.source;
    for (krul_view &view : source.views) {
        view.shape[2] = KRUL_DEVICE_SHARE_MAX_TOKENS + 1;
    }
    check_refused(source, KRUL_STATUS_UNSUPPORTED, "codec 4 is not written");
    source = one.source;
    for (krul_view &view : source.views) {
        view.shape[0] = 0;
    }
    check_refused(source, KRUL_STATUS_UNSUPPORTED, "(0, 3, 8, 8)");
}

} // namespace

int
main()
{
    test_every_codec();
    test_what_does_not_fit();
    test_what_would_overflow();
    test_exact_streams();
    test_two_runs_are_the_same();
    test_arguments();
    return check_finish();
}

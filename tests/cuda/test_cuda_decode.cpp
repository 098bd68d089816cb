/* test_cuda_decode.cpp - the decoding kernels against the CPU's codecs, bit for bit.
 *
 * Every block is coded by the CPU, laid into a chunk among others, made ready by
 * krul_device_decode_prepare and decoded by the kernels into views with gaps and guards. */
#include "emulate.h"

#include <string>

#include "check.h"
#include "device_decode.h"

extern "C" {
#include "backend.h"
#include "dtype.h"
}

namespace {

constexpr uint8_t guard = 0xd7;

const krul_dtype dtypes[] = {KRUL_DTYPE_F32, KRUL_DTYPE_F16, KRUL_DTYPE_BF16};
const krul_codec codecs[] = {KRUL_CODEC_EXACT, KRUL_CODEC_INT8,       KRUL_CODEC_INT4,
                             KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4};

const krul_backend *const backend = check_best_backend();

/* Memory that begins at an odd multiple of an element, if that is asked for, with guards about it. */
struct buffer {
    std::vector<uint8_t> bytes;
    size_t begin;

    explicit buffer(size_t n_bytes, size_t shift = 0)
        : bytes(n_bytes + 160, guard), begin(64 + shift)
    {
        begin += (16 - (reinterpret_cast<uintptr_t>(bytes.data()) + 64) % 16) % 16;
    }
    uint8_t *data()
    {
        return bytes.data() + begin;
    }
};

/* How an output lies in memory. */
struct layout {
    const char *name;
    int64_t row_gap; /* elements between rows */
    bool is_token_first; /* n_batch x n_tokens x n_heads, as a model's own cache may have it */
    int64_t shift; /* elements that the first one is off a 16-byte boundary */
};

const layout layouts[] = {
    {"packed", 0, false, 0},  {"gaps of 16 bytes", 8, false, 0}, {"tokens first", 0, true, 0},
    {"shifted", 0, false, 1}, {"odd gaps", 3, false, 2},
};

struct shape4 {
    int64_t n_batch, n_heads, n_tokens, head_dim;
};

krul_view
view_in(buffer &memory, krul_dtype dtype, const shape4 &shape, const layout &as, int64_t n_tokens)
{
    int64_t row = shape.head_dim + as.row_gap;
    krul_view view = {};
    view.data = memory.data();
    view.dtype = dtype;
    view.device_type = KRUL_DEVICE_CPU;
    view.shape[0] = shape.n_batch;
    view.shape[1] = shape.n_heads;
    view.shape[2] = n_tokens;
    view.shape[3] = shape.head_dim;
    view.stride[0] = shape.n_heads * shape.n_tokens * row;
    view.stride[1] = as.is_token_first ? row : shape.n_tokens * row;
    view.stride[2] = as.is_token_first ? shape.n_heads * row : row;
    view.stride[3] = 1;
    return view;
}

size_t
bytes_of(krul_dtype dtype, const shape4 &shape, const layout &as)
{
    return static_cast<size_t>(shape.n_batch * shape.n_heads * shape.n_tokens *
                               (shape.head_dim + as.row_gap)) *
           krul_dtype_bytes(dtype);
}

/* Values with a large channel here and there, like keys; rows of zeros too. */
void
fill(uint8_t *out, krul_dtype dtype, const shape4 &shape, int seed)
{
    std::mt19937 random(static_cast<unsigned>(seed));
    std::normal_distribution<float> normal;
    int64_t n_rows = shape.n_batch * shape.n_heads * shape.n_tokens;
    std::vector<float> row(static_cast<size_t>(shape.head_dim));
    for (int64_t i = 0; i < n_rows; i++) {
        for (size_t j = 0; j < row.size(); j++) {
            row[j] = i % 17 == 3 ? 0.0f : normal(random) * (j % 7 == 2 ? 9.0f : 1.0f) + 0.3f;
        }
        backend->narrow(dtype, row.data(), shape.head_dim, out);
        out += row.size() * krul_dtype_bytes(dtype);
    }
}

/* One block, coded. */
struct coded {
    krul_store_entry entry;
    std::vector<uint8_t> payload;
    std::vector<uint8_t> decoded[2]; /* by the CPU, packed */
    int n_views;
    shape4 shape;
};

coded
encode(krul_codec codec, krul_kv kv, krul_dtype dtype, const shape4 &shape, bool is_pair)
{
    const layout &packed = layouts[0];
    coded out;
    int n_layers = codec == KRUL_CODEC_EXACT ? (is_pair ? 2 : 1) : krul_codec_n_layers(codec);
    size_t n_bytes = bytes_of(dtype, shape, packed), capacity = 0, payload_bytes = 0;
    buffer memory[2] = {buffer(n_bytes), buffer(n_bytes)};
    krul_view views[2];
    for (int i = 0; i < 2; i++) {
        fill(memory[i].data(), dtype, shape, 1 + i / 2);
        views[i] = view_in(memory[i], dtype, shape, packed, shape.n_tokens);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(n_bytes); i += 37) { /* the second a bit apart */
        memory[1].data()[i / 2 * 2] ^= static_cast<uint8_t>(i % 5);
    }
    CHECK(krul_compressor_bound(views, n_layers, &capacity, nullptr) == KRUL_STATUS_OK);
    out.payload.resize(capacity);
    krul_codec used = codec;
    CHECK(krul_compressor_encode(backend, codec, kv, views, n_layers, out.payload.data(), capacity,
                                 &payload_bytes, &used, nullptr, nullptr) == KRUL_STATUS_OK);
    CHECK(used == codec);
    out.payload.resize(payload_bytes);
    out.shape = shape;
    out.n_views = n_layers;
    out.entry = {};
    out.entry.kind = KRUL_STORE_ENTRY_BLOCK;
    out.entry.codec = used;
    out.entry.kv = kv;
    out.entry.dtype = dtype;
    out.entry.layer_lower = 3;
    out.entry.layer_upper = n_layers == 2 ? 5 : -1;
    out.entry.n_batch = static_cast<int32_t>(shape.n_batch);
    out.entry.n_heads = static_cast<int32_t>(shape.n_heads);
    out.entry.head_dim = static_cast<int32_t>(shape.head_dim);
    out.entry.n_tokens = shape.n_tokens;
    out.entry.payload_bytes = payload_bytes;
    for (int i = 0; i < n_layers; i++) {
        views[i] = view_in(memory[i], dtype, shape, packed, shape.n_tokens);
    }
    CHECK(krul_compressor_decode(backend, used, kv, out.payload.data(), payload_bytes, views,
                                 n_layers, nullptr) == KRUL_STATUS_OK);
    for (int i = 0; i < n_layers; i++) {
        out.decoded[i].assign(memory[i].data(), memory[i].data() + n_bytes);
    }
    return out;
}

/* A chunk as the pipeline fills one; exactly as large as prepare says, so that a sanitizer sees a byte
 * too far. */
struct chunk {
    std::vector<uint8_t> host;
    std::vector<krul_device_block> blocks;
    std::vector<krul_device_batch> batches;
    std::vector<uint32_t> damage = {0}; /* one, where kernels can write */

    void add(const krul_store_entry *entry, const uint8_t *payload, size_t payload_bytes,
             bool is_decoded, const krul_view *views)
    {
        host.resize((host.size() + 15) / 16 * 16, 0x5a);
        krul_device_block block = {};
        block.entry = entry;
        block.payload_offset = host.size();
        block.is_decoded = is_decoded;
        block.views[0] = views[0];
        block.views[1] = views[1];
        blocks.push_back(block);
        host.insert(host.end(), payload, payload + payload_bytes);
    }

    krul_status decode(krul_error *err)
    {
        size_t used = host.size();
        int32_t n_blocks = static_cast<int32_t>(blocks.size()), n_batches = -1, bad = -1;
        size_t capacity = used + krul_device_decode_bound(blocks.data(), n_blocks);
        host.resize(capacity, 0x5a);
        batches.resize(KRUL_DEVICE_MAX_BATCHES);
        krul_status status = krul_device_decode_prepare(host.data(), capacity, used, blocks.data(),
                                                        n_blocks, batches.data(), &n_batches, &used,
                                                        &bad, err);
        if (status != KRUL_STATUS_OK) {
            CHECK(n_batches == -1);
            return status;
        }
        batches.resize(static_cast<size_t>(n_batches));
        uint8_t *device = static_cast<uint8_t *>(emulate::allocate(used));
        std::memcpy(device, host.data(), used);
        for (const krul_device_batch &batch : batches) {
            status = status == KRUL_STATUS_OK
                         ? krul_cuda_decode(nullptr, &batch, device, damage.data(), err)
                         : status;
        }
        CHECK(cudaDeviceSynchronize() == cudaSuccess);
        emulate::release(device);
        return status;
    }
};

bool
are_same(const uint8_t *left, const uint8_t *right, size_t n_bytes, krul_dtype dtype)
{
    size_t item_bytes = krul_dtype_bytes(dtype);
    for (size_t i = 0; i < n_bytes; i += item_bytes) {
        float values[2];
        if (std::memcmp(left + i, right + i, item_bytes) == 0) {
            continue;
        }
        backend->widen(dtype, left + i, 1, &values[0]);
        backend->widen(dtype, right + i, 1, &values[1]);
        if (values[0] == values[0] || values[1] == values[1]) {
            return false;
        }
    }
    return true;
}

/* Were exactly the wanted tokens written, and rightly? */
bool
is_right(buffer &memory, const krul_view &view, const coded &block, int which, const layout &as)
{
    size_t element_bytes = krul_dtype_bytes(view.dtype);
    size_t row_bytes = static_cast<size_t>(block.shape.head_dim) * element_bytes;
    std::vector<uint8_t> expected(memory.bytes.size(), guard);
    const uint8_t *from = block.decoded[which].data();
    (void)as;
    for (int64_t batch = 0; batch < block.shape.n_batch; batch++) {
        for (int64_t head = 0; head < block.shape.n_heads; head++) {
            for (int64_t token = 0; token < block.shape.n_tokens; token++) {
                int64_t at = batch * view.stride[0] + head * view.stride[1] +
                             token * view.stride[2];
                if (token < view.shape[2]) {
                    std::memcpy(expected.data() + memory.begin +
                                    static_cast<size_t>(at) * element_bytes,
                                from, row_bytes);
                }
                from += row_bytes;
            }
        }
    }
    size_t before = memory.begin / element_bytes * element_bytes; /* a multiple, for are_same */
    size_t first = memory.begin - before;
    size_t n = (memory.bytes.size() - first) / element_bytes * element_bytes;
    return std::memcmp(memory.bytes.data(), expected.data(), first) == 0 &&
           are_same(memory.bytes.data() + first, expected.data() + first, n, view.dtype);
}

/* Decode blocks of one shape in all layouts, whole and in part, in one chunk. */
void
check_blocks(const std::vector<coded> &blocks, krul_dtype dtype, unsigned order)
{
    struct job {
        const coded *block;
        const layout *as;
        buffer memory[2];
        krul_view views[2];
    };
    std::vector<job> jobs;
    int turn = 0;
    for (const coded &block : blocks) {
        for (const layout &as : layouts) {
            size_t n_bytes = bytes_of(dtype, block.shape, as);
            size_t shift = static_cast<size_t>(as.shift) * krul_dtype_bytes(dtype);
            jobs.push_back({&block, &as, {buffer(n_bytes, shift), buffer(n_bytes, shift)}, {}});
        }
    }
    chunk all;
    for (job &one : jobs) {
        const coded &block = *one.block;
        turn++;
        int64_t n_wanted = turn % 3 == 0 ? (block.shape.n_tokens + 1) / 2 : block.shape.n_tokens;
        for (int i = 0; i < 2; i++) {
            one.views[i] = view_in(one.memory[i], dtype, block.shape, *one.as, n_wanted);
        }
        if (block.n_views == 1) {
            one.views[1].data = nullptr;
        }
        else if (turn % 4 < 2) { /* one half only */
            one.views[turn % 4].data = nullptr;
        }
        if (turn % 5 == 0) { /* decoded already */
            std::vector<uint8_t> elements;
            for (int i = 0; i < block.n_views; i++) {
                if (one.views[i].data != nullptr) {
                    elements.resize((elements.size() + 15) / 16 * 16);
                    elements.insert(elements.end(), block.decoded[i].begin(),
                                    block.decoded[i].end());
                }
            }
            all.add(&block.entry, elements.data(), elements.size(), true, one.views);
        }
        else {
            all.add(&block.entry, block.payload.data(), block.payload.size(), false, one.views);
        }
    }
    krul_error err = {};
    emulate::order = order;
    CHECK(all.decode(&err) == KRUL_STATUS_OK);
    emulate::order = 0;
    CHECK(all.damage[0] == 0);
    CHECK(all.batches.size() >= 1);
    for (job &one : jobs) {
        for (int i = 0; i < 2; i++) {
            bool is_wanted = one.views[i].data != nullptr;
            coded untouched = *one.block;
            bool right = is_wanted
                             ? is_right(one.memory[i], one.views[i], *one.block, i, *one.as)
                             : std::all_of(one.memory[i].bytes.begin(), one.memory[i].bytes.end(),
                                           [](uint8_t byte) { return byte == guard; });
            CHECK(right);
            if (!right) {
                const krul_store_entry &entry = one.block->entry;
                std::fprintf(stderr,
                             "  codec %d, kv %d, dtype %d, %lld tokens of %d, view %d, %s\n",
                             entry.codec, entry.kv, dtype, static_cast<long long>(entry.n_tokens),
                             entry.head_dim, i, one.as->name);
            }
        }
    }
}

void
test_every_codec()
{
    const int64_t head_dims[] = {64, 80, 96, 128, 256, 1, 3, 33, 72, 8, 36};
    const int64_t n_tokens[] = {1, 20, 64, 65, 130};
    unsigned order = 0;
    for (int64_t head_dim : head_dims) {
        for (krul_dtype dtype : dtypes) {
            std::vector<coded> blocks;
            for (krul_codec codec : codecs) {
                for (size_t i = 0; i < 2; i++) {
                    size_t which = (order + 3 * i + static_cast<size_t>(codec)) % 5;
                    shape4 shape = {1 + static_cast<int64_t>(order % 2), 2, n_tokens[which],
                                    head_dim};
                    blocks.push_back(encode(codec, i == 0 ? KRUL_KV_KEY : KRUL_KV_VALUE, dtype,
                                            shape, order % 2 == 0));
                }
            }
            check_blocks(blocks, dtype, order % 4);
            order++;
        }
    }
}

/* Rows of more 16-byte parts than a thread block has threads. */
void
test_long_rows()
{
    for (krul_codec codec : codecs) {
        std::vector<coded> blocks;
        blocks.push_back(encode(codec, KRUL_KV_KEY, KRUL_DTYPE_F32, {1, 1, 21, 640}, true));
        check_blocks(blocks, KRUL_DTYPE_F32, 1);
    }
}

/* Entropy chunks of all lengths, and enough of them for several thread blocks. */
void
test_exact_chunks()
{
    for (krul_dtype dtype : dtypes) {
        std::vector<coded> blocks;
        blocks.push_back(encode(KRUL_CODEC_EXACT, KRUL_KV_KEY, dtype, {2, 3, 200, 128}, false));
        check_blocks(blocks, dtype, 2);
    }
}

/* What prepare says of a chunk of one block, and what the kernels say of it. */
struct verdict {
    krul_status status;
    bool is_damage_seen;
};

verdict
judge(const coded &block, const std::vector<uint8_t> &payload, bool *is_outside_written)
{
    const layout &as = layouts[0];
    size_t n_bytes = bytes_of(block.entry.dtype, block.shape, as);
    buffer memory[2] = {buffer(n_bytes), buffer(n_bytes)};
    krul_view views[2];
    for (int i = 0; i < 2; i++) {
        views[i] = view_in(memory[i], block.entry.dtype, block.shape, as, block.shape.n_tokens);
    }
    if (block.n_views == 1) {
        views[1].data = nullptr;
    }
    krul_store_entry entry = block.entry;
    entry.payload_bytes = payload.size();
    chunk one;
    one.add(&entry, payload.data(), payload.size(), false, views);
    krul_error err = {};
    verdict out;
    out.status = one.decode(&err);
    out.is_damage_seen = one.damage[0] != 0;
    for (int i = 0; i < 2; i++) {
        for (size_t j = 0; j < memory[i].bytes.size(); j++) {
            bool is_inside = views[i].data != nullptr && j >= memory[i].begin &&
                             j < memory[i].begin + n_bytes;
            *is_outside_written |= !is_inside && memory[i].bytes[j] != guard;
        }
    }
    return out;
}

/* Any bit may flip: prepare or the kernels see it, or the CPU decodes it too. Never is a byte read or
 * written that is not the block's. */
void
test_damage()
{
    for (krul_codec codec : codecs) {
        for (krul_dtype dtype : dtypes) {
            shape4 shape = {1, 1, 33, codec == KRUL_CODEC_EXACT ? 24 : 8};
            coded block = encode(codec, KRUL_KV_VALUE, dtype, shape, false);
            bool is_outside_written = false;
            int n_missed = 0, n_false = 0, n_found = 0;
            size_t step = codec == KRUL_CODEC_EXACT ? 5 : 3; /* of all bits, to save time */
            for (size_t bit = 0; bit < 8 * block.payload.size(); bit += step) {
                std::vector<uint8_t> payload = block.payload;
                payload[bit / 8] = static_cast<uint8_t>(payload[bit / 8] ^ 1u << bit % 8);
                verdict found = judge(block, payload, &is_outside_written);
                CHECK(found.status == KRUL_STATUS_OK || found.status == KRUL_STATUS_CORRUPT);
                std::vector<uint8_t> out[2] = {block.decoded[0], block.decoded[0]};
                krul_view views[2] = {};
                for (int i = 0; i < block.n_views; i++) {
                    buffer unused(0);
                    views[i] = view_in(unused, dtype, shape, layouts[0], shape.n_tokens);
                    views[i].data = out[i].data();
                }
                bool is_refused = krul_compressor_decode(backend, codec, KRUL_KV_VALUE,
                                                         payload.data(), payload.size(), views,
                                                         block.n_views, nullptr) != KRUL_STATUS_OK;
                bool is_seen = found.status != KRUL_STATUS_OK || found.is_damage_seen;
                n_missed += is_refused && !is_seen;
                n_false += !is_refused && is_seen;
                n_found += is_seen;
            }
            CHECK(n_missed == 0);
            CHECK(n_false == 0);
            CHECK(!is_outside_written);
            CHECK(n_found > 0 || codec == KRUL_CODEC_EXACT || codec == KRUL_CODEC_SHARE);
        }
    }
}

/* Scales and minima that no encoder writes, and the last ones that one may. */
void
test_unsound_parameters()
{
    const struct {
        bool is_scale;
        uint16_t bits;
        bool is_sound;
    } cases[] = {{true, 0x7b7f, true},   {true, 0x7b80, false},  {true, 0x8000, false},
                 {true, 0x7fff, false},  {false, 0x7f7f, true},  {false, 0xff7f, true},
                 {false, 0x7f80, false}, {false, 0xff80, false}, {false, 0xffff, false}};
    for (krul_codec codec : {KRUL_CODEC_INT8, KRUL_CODEC_INT4}) {
        for (int kv = 0; kv < 2; kv++) {
            for (int64_t head_dim : {16, 7}) {
                shape4 shape = {1, 1, 70, head_dim};
                coded block = encode(codec, static_cast<krul_kv>(kv), KRUL_DTYPE_BF16, shape,
                                     false);
                size_t n_groups = static_cast<size_t>(kv == 0 ? 2 * head_dim : 70);
                for (const auto &one : cases) {
                    for (size_t group : {size_t{0}, n_groups - 1}) {
                        std::vector<uint8_t> payload = block.payload;
                        size_t at = 2 * (group + (one.is_scale ? 0 : n_groups));
                        payload[at] = static_cast<uint8_t>(one.bits);
                        payload[at + 1] = static_cast<uint8_t>(one.bits >> 8);
                        bool is_outside_written = false;
                        verdict found = judge(block, payload, &is_outside_written);
                        CHECK(found.status == KRUL_STATUS_OK && !is_outside_written);
                        CHECK(found.is_damage_seen == !one.is_sound);
                    }
                }
            }
        }
    }
}

/* A chunk of an entropy stream with a word too many or too few. */
void
test_words_left()
{
    shape4 shape = {1, 1, 60, 32};
    coded block = encode(KRUL_CODEC_EXACT, KRUL_KV_KEY, KRUL_DTYPE_BF16, shape, false);
    bool has_offsets = block.payload[0] == 2;
    CHECK(block.payload[0] != 0);
    size_t stream = 8 + 60 * 32 + (has_offsets ? 32 : 0);
    size_t directory = stream + 12 + block.payload[stream + 2] + 256u * block.payload[stream + 3];
    auto add = [](std::vector<uint8_t> &payload, size_t at, int change) {
        uint32_t number = payload[at] + 256u * payload[at + 1] + static_cast<uint32_t>(change);
        payload[at] = static_cast<uint8_t>(number);
        payload[at + 1] = static_cast<uint8_t>(number >> 8);
    };
    for (int change : {2, 64, 200, -2, -20}) {
        std::vector<uint8_t> payload = block.payload;
        payload.resize(payload.size() + static_cast<size_t>(static_cast<int64_t>(change)), 0);
        add(payload, 1, change);
        add(payload, directory, change);
        bool is_outside_written = false;
        verdict found = judge(block, payload, &is_outside_written);
        CHECK(found.status == KRUL_STATUS_OK && !is_outside_written);
        CHECK(found.is_damage_seen);
    }
    bool is_outside_written = false;
    CHECK(!judge(block, block.payload, &is_outside_written).is_damage_seen);
}

void
test_no_blocks()
{
    chunk empty;
    krul_error err = {};
    CHECK(empty.decode(&err) == KRUL_STATUS_OK);
    CHECK(empty.batches.empty());
}

} // namespace

/* "quick": without what takes a sanitizer of GPUs too long. */
int
main(int argc, char **argv)
{
    bool is_quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
    test_no_blocks();
    test_every_codec();
    test_long_rows();
    test_exact_chunks();
    if (!is_quick) {
        test_damage();
    }
    test_unsound_parameters();
    test_words_left();
    return check_finish();
}

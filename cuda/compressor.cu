/* compressor.cu - decodes blocks of the store on the device: int8, int4, share, share+int, raw.
 *
 * One launch decodes all blocks of a batch, K and V, straight into strided views. A thread block
 * takes a tile: up to 64 tokens of one batch item and head. The work is bound by memory - a bf16
 * value costs 2 bytes out and 0.5 to 1 in - so what matters is that every store is 16 bytes of 512
 * contiguous ones per warp, that enough loads are under way, and that a value takes few instructions:
 *
 * - A thread keeps to one 16-byte part of the rows (8 values of 2 bytes, 4 of 4) and steps down the
 *   tile. For K its scales and minima, one per channel, are read once per tile and stay in
 *   registers; nothing goes through shared memory and there is no barrier.
 * - Codes become floats by one byte permutation and one subtraction instead of a conversion, which
 *   runs at a quarter of the rate: 2^23 + code is the word 0x4b0000xx. Then one fused multiply-add,
 *   exact in its product as FORMAT.md says, and half a conversion: 4 to 5 instructions a value.
 * - Four rows' codes are loaded before the first is decoded. With 128 threads to a block and some 50
 *   registers to a thread a multiprocessor holds ten blocks, which have about 40 KB of loads under
 *   way; latency times bandwidth is half of that.
 * - Stores are marked as streaming, they are read by a later kernel; loads go by the read-only path,
 *   since neighbouring lanes read the two nibbles of one byte, and parts of payloads begin anywhere.
 *
 * Rows that are no multiple of 16 bytes (head_dim 1, 3, 33, ...) take one kernel for all codecs that
 * works value by value. Integer and shared codes give the same bits as the CPU, but for which NaN. */
#include "compressor.cuh"

#include "codec_int.h"

namespace {

enum {
    N_THREADS = 128,
    TILE_TOKENS = KRUL_DEVICE_TILE_TOKENS,
    GROUP = 64, /* channels that share a scale, and whose nibbles share 32 bytes */
    AT_ONCE = 4, /* rows of codes that a thread loads before it decodes any */
    SHARE_AT_ONCE = 2,
};

static_assert((int)TILE_TOKENS == (int)GROUP, "a tile of keys has one scale per channel");

/* ---- a tile ------------------------------------------------------------------------------------ */

/* What a thread block works on. */
struct tile {
    const krul_device_descriptor *block;
    int32_t plane;
    int32_t index; /* in the plane */
    int32_t first_token;
    int32_t n_tokens; /* wanted, of the tile */
    uint8_t *outputs[KRUL_COMPRESSOR_MAX_VIEWS]; /* the tile's first token; NULL: not wanted */
};

static __device__ __forceinline__ tile
tile_of(const krul_decode_arguments &arguments)
{
    tile out;
    out.block = arguments.descriptors + arguments.units[blockIdx.x];
    int32_t unit = (int32_t)blockIdx.x - out.block->first_unit;
    out.plane = unit / out.block->n_tiles;
    out.index = unit - out.plane * out.block->n_tiles;
    out.first_token = out.index * TILE_TOKENS;
    out.n_tokens = min((int32_t)TILE_TOKENS, out.block->n_wanted - out.first_token);
    int32_t batch = out.plane / out.block->n_heads;
    int32_t head = out.plane - batch * out.block->n_heads;
#pragma unroll
    for (int i = 0; i < KRUL_COMPRESSOR_MAX_VIEWS; i++) {
        const krul_device_output &output = out.block->outputs[i];
        int64_t offset = batch * output.batch_bytes + head * output.head_bytes +
                         out.first_token * output.token_bytes;
        out.outputs[i] = output.address == 0 ? nullptr : (uint8_t *)output.address + offset;
    }
    return out;
}

/* Which part of a row, and which rows of a tile, a thread works on: as many rows side by side as the
 * threads are enough for. Rows of more parts than threads take several turns. */
struct share_of_tile {
    int32_t part;
    int32_t part_step;
    int32_t row;
    int32_t row_step;
};

static __device__ __forceinline__ share_of_tile
share_of(int32_t n_parts)
{
    share_of_tile out;
    out.part_step = min(n_parts, (int32_t)N_THREADS);
    out.row_step = N_THREADS / out.part_step;
    out.row = (int32_t)threadIdx.x / out.part_step;
    out.part = (int32_t)threadIdx.x - out.row * out.part_step;
    if (out.row >= out.row_step) { /* threads left over */
        out.part = n_parts;
    }
    return out;
}

/* ---- codes ------------------------------------------------------------------------------------- */

/* The codes of one part of a row: where they begin in the row, and which nibble of their bytes. */
struct code_place {
    int32_t offset;
    uint32_t shift;
};

template <int bits, int n_values>
static __device__ __forceinline__ code_place
place_of(int32_t part, int32_t head_dim)
{
    code_place out = {part * n_values, 0};
    if (bits == 4) {
        int32_t group = part * n_values / GROUP;
        int32_t channel = part * n_values % GROUP;
        int32_t half = min((int32_t)GROUP, head_dim - group * GROUP) / 2;
        out.shift = channel < half ? 0 : 4;
        out.offset = group * (GROUP / 2) + (channel < half ? channel : channel - half);
    }
    return out;
}

/* Codes as floats. */
template <int bits, int n_words>
static __device__ __forceinline__ void
unpack(const uint32_t (&words)[n_words], uint32_t shift, float *out)
{
#pragma unroll
    for (int i = 0; i < n_words; i++) {
        uint32_t word = bits == 8 ? words[i] : words[i] >> shift & 0x0f0f0f0fu;
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
            uint32_t number = __byte_perm(word, 0x4b000000u, 0x7540u + (unsigned)byte);
            out[4 * i + byte] = __fsub_rn(__uint_as_float(number), 8388608.0f);
        }
    }
}

static __device__ __forceinline__ bool
is_unsound(uint32_t scale_bits, uint32_t minimum_bits)
{
    return scale_bits >= KRUL_INT_SCALE_END || (minimum_bits & 0x7fffu) >= 0x7f80u;
}

static __device__ __forceinline__ float
bf16_at(const uint8_t *address)
{
    return __uint_as_float(krul_load_u16_at(address) << 16);
}

static __device__ __forceinline__ int32_t
code_row_bytes(int bits, int32_t head_dim)
{
    return bits == 8 ? head_dim : (head_dim + 1) / 2;
}

/* K: a scale and a minimum per channel for the whole tile. */
template <krul_dtype dtype, int bits>
static __device__ __forceinline__ void
decode_keys(const krul_decode_arguments &arguments, const tile &here)
{
    enum { N_VALUES = 16 / sizeof(typename krul_element<dtype>::bits), N_WORDS = N_VALUES / 4 };
    const krul_device_descriptor *block = here.block;
    int32_t head_dim = block->head_dim;
    int32_t row_bytes = code_row_bytes(bits, head_dim);
    int64_t token_bytes = block->outputs[0].token_bytes;
    uint32_t store_bytes = block->outputs[0].store_bytes;
    const uint8_t *plane = arguments.chunk + block->data_offset + here.plane * block->plane_bytes;
    const uint8_t *scales = plane + 2 * (int64_t)here.index * head_dim;
    const uint8_t *codes = plane + block->codes_bytes + (int64_t)here.first_token * row_bytes;
    share_of_tile mine = share_of(head_dim / N_VALUES);
    for (int32_t part = mine.part; part < head_dim / N_VALUES; part += mine.part_step) {
        code_place place = place_of<bits, N_VALUES>(part, head_dim);
        uint32_t scale_words[N_VALUES / 2], minimum_words[N_VALUES / 2];
        float scale[N_VALUES], minimum[N_VALUES];
        krul_load_words(scales + 2 * part * N_VALUES, scale_words);
        krul_load_words(scales + block->minima_bytes + 2 * part * N_VALUES, minimum_words);
        bool is_bad = false;
#pragma unroll
        for (int i = 0; i < N_VALUES / 2; i++) {
            is_bad |= is_unsound(scale_words[i] & 0xffffu, minimum_words[i] & 0xffffu);
            is_bad |= is_unsound(scale_words[i] >> 16, minimum_words[i] >> 16);
        }
        if (is_bad) {
            krul_report_damage(arguments.damage_flag);
        }
        krul_widen_words<KRUL_DTYPE_BF16>(scale_words, scale);
        krul_widen_words<KRUL_DTYPE_BF16>(minimum_words, minimum);
        const uint8_t *code = codes + place.offset;
        uint8_t *out = here.outputs[0] + 16 * (int64_t)part;
        for (int32_t row = mine.row; row < here.n_tokens; row += AT_ONCE * mine.row_step) {
            uint32_t words[AT_ONCE][N_WORDS];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at < here.n_tokens) {
                    krul_load_words(code + at * row_bytes, words[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at < here.n_tokens) {
                    float values[N_VALUES];
                    uint32_t narrowed[4];
                    unpack<bits>(words[i], place.shift, values);
#pragma unroll
                    for (int j = 0; j < N_VALUES; j++) {
                        values[j] = __fmaf_rn(values[j], scale[j], minimum[j]);
                    }
                    krul_narrow_words<dtype>(values, narrowed);
                    krul_store_16_bytes(out + at * token_bytes, store_bytes, narrowed);
                }
            }
        }
    }
}

/* V: a scale and a minimum per token and 64 channels. */
template <krul_dtype dtype, int bits>
static __device__ __forceinline__ void
decode_values(const krul_decode_arguments &arguments, const tile &here)
{
    enum { N_VALUES = 16 / sizeof(typename krul_element<dtype>::bits), N_WORDS = N_VALUES / 4 };
    const krul_device_descriptor *block = here.block;
    int32_t head_dim = block->head_dim;
    int32_t row_bytes = code_row_bytes(bits, head_dim);
    int32_t n_groups = (head_dim + GROUP - 1) / GROUP;
    int64_t token_bytes = block->outputs[0].token_bytes;
    uint32_t store_bytes = block->outputs[0].store_bytes;
    const uint8_t *plane = arguments.chunk + block->data_offset + here.plane * block->plane_bytes;
    const uint8_t *scales = plane + 2 * (int64_t)here.first_token * n_groups;
    const uint8_t *codes = plane + block->codes_bytes + (int64_t)here.first_token * row_bytes;
    share_of_tile mine = share_of(head_dim / N_VALUES);
    for (int32_t part = mine.part; part < head_dim / N_VALUES; part += mine.part_step) {
        code_place place = place_of<bits, N_VALUES>(part, head_dim);
        const uint8_t *scale_at = scales + 2 * (part * N_VALUES / GROUP);
        const uint8_t *code = codes + place.offset;
        uint8_t *out = here.outputs[0] + 16 * (int64_t)part;
        for (int32_t row = mine.row; row < here.n_tokens; row += AT_ONCE * mine.row_step) {
            uint32_t words[AT_ONCE][N_WORDS];
            uint32_t scale[AT_ONCE], minimum[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at < here.n_tokens) {
                    krul_load_words(code + at * row_bytes, words[i]);
                    scale[i] = krul_load_u16_at(scale_at + 2 * at * n_groups);
                    minimum[i] = krul_load_u16_at(scale_at + block->minima_bytes +
                                                  2 * at * n_groups);
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at < here.n_tokens) {
                    float values[N_VALUES];
                    uint32_t narrowed[4];
                    if (is_unsound(scale[i], minimum[i])) {
                        krul_report_damage(arguments.damage_flag);
                    }
                    unpack<bits>(words[i], place.shift, values);
#pragma unroll
                    for (int j = 0; j < N_VALUES; j++) {
                        values[j] = __fmaf_rn(values[j], __uint_as_float(scale[i] << 16),
                                              __uint_as_float(minimum[i] << 16));
                    }
                    krul_narrow_words<dtype>(values, narrowed);
                    krul_store_16_bytes(out + at * token_bytes, store_bytes, narrowed);
                }
            }
        }
    }
}

template <krul_dtype dtype, int bits>
__global__ void
__launch_bounds__(N_THREADS) int_kernel(krul_decode_arguments arguments)
{
    tile here = tile_of(arguments);
    if (here.block->kv == KRUL_KV_KEY) { /* the same for the whole thread block */
        decode_keys<dtype, bits>(arguments, here);
    }
    else {
        decode_values<dtype, bits>(arguments, here);
    }
}

/* ---- share ------------------------------------------------------------------------------------- */

/* Where a token stands in the payload: its place among the kept or among the merged ones. */
struct token_place {
    bool is_kept;
    int32_t index; /* in all planes */
};

static __device__ __forceinline__ token_place
place_of_token(const krul_device_descriptor *block, const tile &here, uint64_t kept,
               uint32_t n_kept_before, int32_t row)
{
    uint64_t below = kept & (((uint64_t)1 << row) - 1);
    int32_t n_below = (int32_t)n_kept_before + __popcll(below);
    token_place out;
    out.is_kept = (kept >> row & 1) != 0;
    out.index = out.is_kept ? here.plane * block->n_kept + n_below
                            : here.plane * block->n_merged + here.first_token + row - n_below;
    return out;
}

template <krul_dtype dtype>
static __device__ __forceinline__ float
magnitude_at(const uint8_t *magnitudes, int32_t index)
{
    return dtype == KRUL_DTYPE_BF16 ? bf16_at(magnitudes + 2 * (int64_t)index)
                                    : krul_load_f32_at(magnitudes + 4 * (int64_t)index);
}

/* Both layers from one read of the directions. bits 0: they are of the block's dtype. */
template <krul_dtype dtype, int bits>
__global__ void
__launch_bounds__(N_THREADS) share_kernel(krul_decode_arguments arguments)
{
    enum {
        N_VALUES = 16 / sizeof(typename krul_element<dtype>::bits),
        N_WORDS = bits == 0 ? 4 : N_VALUES / 4,
    };
    tile here = tile_of(arguments);
    const krul_device_descriptor *block = here.block;
    const uint8_t *chunk = arguments.chunk;
    uint4 found = __ldg((const uint4 *)(chunk + block->tiles_offset) + here.index);
    uint64_t kept = (uint64_t)found.y << 32 | found.x;
    int32_t head_dim = block->head_dim;
    int32_t n_groups = (head_dim + GROUP - 1) / GROUP;
    int32_t row_bytes = bits == 0 ? head_dim * (16 / N_VALUES) : code_row_bytes(bits, head_dim);
    int32_t merged_before = here.plane * block->n_merged;
    const uint8_t *plane = chunk + block->data_offset + here.plane * block->plane_bytes;
    const uint8_t *codes = bits == 0 ? plane : plane + block->codes_bytes;
    share_of_tile mine = share_of(head_dim / N_VALUES);
    for (int32_t part = mine.part; part < head_dim / N_VALUES; part += mine.part_step) {
        code_place place = {16 * part, 0};
        if (bits != 0) {
            place = place_of<bits, N_VALUES>(part, head_dim);
        }
        const uint8_t *scales = plane + 2 * (part * N_VALUES / GROUP);
        for (int32_t row = mine.row; row < here.n_tokens; row += SHARE_AT_ONCE * mine.row_step) {
            token_place token[SHARE_AT_ONCE];
            uint32_t words[SHARE_AT_ONCE][N_WORDS];
            uint32_t scale[SHARE_AT_ONCE], minimum[SHARE_AT_ONCE];
            float magnitude[SHARE_AT_ONCE][KRUL_COMPRESSOR_MAX_VIEWS];
#pragma unroll
            for (int i = 0; i < SHARE_AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at >= here.n_tokens) {
                    continue;
                }
                token[i] = place_of_token(block, here, kept, found.z, at);
                if (token[i].is_kept) {
                    continue;
                }
                int64_t in_plane = token[i].index - merged_before;
                krul_load_words(codes + in_plane * row_bytes + place.offset, words[i]);
                if (bits != 0) {
                    scale[i] = krul_load_u16_at(scales + 2 * in_plane * n_groups);
                    minimum[i] = krul_load_u16_at(scales + block->minima_bytes +
                                                  2 * in_plane * n_groups);
                }
#pragma unroll
                for (int j = 0; j < KRUL_COMPRESSOR_MAX_VIEWS; j++) {
                    magnitude[i][j] = magnitude_at<dtype>(chunk + block->magnitudes_offset[j],
                                                          token[i].index);
                }
            }
#pragma unroll
            for (int i = 0; i < SHARE_AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at >= here.n_tokens) {
                    continue;
                }
                float direction[N_VALUES];
                if (!token[i].is_kept && bits == 0) {
                    krul_widen_words<dtype>(words[i], direction);
                }
                else if (!token[i].is_kept) {
                    if (is_unsound(scale[i], minimum[i])) {
                        krul_report_damage(arguments.damage_flag);
                    }
                    unpack<bits>(words[i], place.shift, direction);
#pragma unroll
                    for (int k = 0; k < N_VALUES; k++) {
                        direction[k] = __fmaf_rn(direction[k], __uint_as_float(scale[i] << 16),
                                                 __uint_as_float(minimum[i] << 16));
                    }
                }
#pragma unroll
                for (int j = 0; j < KRUL_COMPRESSOR_MAX_VIEWS; j++) {
                    if (here.outputs[j] == nullptr) {
                        continue;
                    }
                    uint32_t narrowed[4];
                    if (token[i].is_kept) {
                        krul_load_words(chunk + block->kept_offset[j] +
                                            (int64_t)token[i].index * head_dim * (16 / N_VALUES) +
                                            16 * part,
                                        narrowed);
                    }
                    else {
                        float values[N_VALUES];
#pragma unroll
                        for (int k = 0; k < N_VALUES; k++) {
                            values[k] = __fmul_rn(direction[k], magnitude[i][j]);
                        }
                        krul_narrow_words<dtype>(values, narrowed);
                    }
                    krul_store_16_bytes(here.outputs[j] + at * block->outputs[j].token_bytes +
                                            16 * (int64_t)part,
                                        block->outputs[j].store_bytes, narrowed);
                }
            }
        }
    }
}

/* ---- raw --------------------------------------------------------------------------------------- */

/* Rows of whole 16-byte parts; head_dim counts pairs of bytes. */
__global__ void
__launch_bounds__(N_THREADS) raw_kernel(krul_decode_arguments arguments)
{
    tile here = tile_of(arguments);
    const krul_device_descriptor *block = here.block;
    int64_t row_bytes = 2 * (int64_t)block->head_dim;
    int64_t token_bytes = block->outputs[0].token_bytes;
    uint32_t store_bytes = block->outputs[0].store_bytes;
    const uint8_t *rows = arguments.chunk + block->data_offset + here.plane * block->plane_bytes +
                          here.first_token * row_bytes;
    int32_t n_parts = block->head_dim / 8;
    share_of_tile mine = share_of(n_parts);
    for (int32_t part = mine.part; part < n_parts; part += mine.part_step) {
        for (int32_t row = mine.row; row < here.n_tokens; row += AT_ONCE * mine.row_step) {
            uint32_t words[AT_ONCE][4];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at < here.n_tokens) {
                    krul_load_words(rows + at * row_bytes + 16 * (int64_t)part, words[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int32_t at = row + i * mine.row_step;
                if (at < here.n_tokens) {
                    krul_store_16_bytes(here.outputs[0] + at * token_bytes + 16 * (int64_t)part,
                                        store_bytes, words[i]);
                }
            }
        }
    }
}

/* ---- value by value ---------------------------------------------------------------------------- */

/* Planes of an odd number of bytes, and what follows an entropy stream, begin anywhere. */
static __device__ __forceinline__ uint32_t
u16_at(const uint8_t *address)
{
    return __ldg(address) | (uint32_t)__ldg(address + 1) << 8;
}

static __device__ __forceinline__ float
widen_at(krul_dtype dtype, const uint8_t *elements, int64_t index)
{
    if (dtype == KRUL_DTYPE_F32) {
        return krul_load_f32_at(elements + 4 * index);
    }
    uint32_t bits = krul_load_u16_at(elements + 2 * index);
    return dtype == KRUL_DTYPE_F16 ? krul_widen_f16(bits) : __uint_as_float(bits << 16);
}

static __device__ __forceinline__ void
narrow_at(krul_dtype dtype, float value, uint8_t *out)
{
    if (dtype == KRUL_DTYPE_F32) {
        *(float *)out = value;
    }
    else {
        *(uint16_t *)out = dtype == KRUL_DTYPE_F16 ? krul_narrow<KRUL_DTYPE_F16>(value)
                                                   : krul_narrow<KRUL_DTYPE_BF16>(value);
    }
}

/* minimum + code * scale. `token` and `parameter_row` count in the plane: for V both are the token,
 * for K the second is the group of tokens. */
static __device__ __forceinline__ float
coded_value(const krul_decode_arguments &arguments, const krul_device_descriptor *block,
            const uint8_t *plane, int bits, int64_t token, int64_t parameter, int32_t channel)
{
    int32_t group = channel / GROUP, in_group = channel % GROUP;
    int32_t half = (min((int32_t)GROUP, block->head_dim - group * GROUP) + 1) / 2;
    const uint8_t *row = plane + block->codes_bytes + token * code_row_bytes(bits, block->head_dim);
    uint32_t code;
    if (bits == 8) {
        code = __ldg(row + channel);
    }
    else {
        bool is_low = in_group < half;
        code = __ldg(row + group * (GROUP / 2) + (is_low ? in_group : in_group - half));
        code = is_low ? code & 15u : code >> 4;
    }
    uint32_t scale = u16_at(plane + 2 * parameter);
    uint32_t minimum = u16_at(plane + block->minima_bytes + 2 * parameter);
    if (is_unsound(scale, minimum)) {
        krul_report_damage(arguments.damage_flag);
    }
    return __fmaf_rn((float)code, __uint_as_float(scale << 16), __uint_as_float(minimum << 16));
}

/* Any codec of this file, any row. */
__global__ void
__launch_bounds__(N_THREADS)
    narrow_kernel(krul_decode_arguments arguments, krul_codec codec, krul_dtype dtype)
{
    tile here = tile_of(arguments);
    const krul_device_descriptor *block = here.block;
    const uint8_t *chunk = arguments.chunk;
    const uint8_t *plane = chunk + block->data_offset + here.plane * block->plane_bytes;
    int32_t head_dim = block->head_dim;
    int32_t n_groups = (head_dim + GROUP - 1) / GROUP;
    bool is_raw = codec == KRUL_DEVICE_CODEC_RAW;
    bool is_int = codec == KRUL_CODEC_INT8 || codec == KRUL_CODEC_INT4;
    int bits = codec == KRUL_CODEC_INT8 || codec == KRUL_CODEC_SHARE_INT8   ? 8
               : codec == KRUL_CODEC_INT4 || codec == KRUL_CODEC_SHARE_INT4 ? 4
                                                                            : 0;
    int32_t element_bytes = !is_raw && dtype == KRUL_DTYPE_F32 ? 4 : 2;
    uint64_t kept = 0;
    uint32_t n_kept_before = 0;
    if (!is_raw && !is_int) {
        uint4 found = __ldg((const uint4 *)(chunk + block->tiles_offset) + here.index);
        kept = (uint64_t)found.y << 32 | found.x;
        n_kept_before = found.z;
    }
    for (int64_t i = threadIdx.x; i < (int64_t)here.n_tokens * head_dim; i += N_THREADS) {
        int32_t row = (int32_t)(i / head_dim);
        int32_t channel = (int32_t)(i - (int64_t)row * head_dim);
        int64_t token = here.first_token + row;
        int64_t in_row = (int64_t)channel * element_bytes;
        if (is_raw) {
            uint8_t *out = here.outputs[0] + row * block->outputs[0].token_bytes + in_row;
            *(uint16_t *)out = (uint16_t)u16_at(plane + 2 * (token * head_dim + channel));
            continue;
        }
        if (is_int) {
            int64_t parameter = block->kv == KRUL_KV_KEY ? (int64_t)here.index * head_dim + channel
                                                         : token * n_groups + channel / GROUP;
            narrow_at(dtype, coded_value(arguments, block, plane, bits, token, parameter, channel),
                      here.outputs[0] + row * block->outputs[0].token_bytes + in_row);
            continue;
        }
        token_place place = place_of_token(block, here, kept, n_kept_before, row);
        int64_t merged = place.index - (int64_t)here.plane * block->n_merged;
        float direction = 0.0f;
        if (!place.is_kept && bits == 0) {
            direction = widen_at(dtype, plane, merged * head_dim + channel);
        }
        else if (!place.is_kept) {
            direction = coded_value(arguments, block, plane, bits, merged,
                                    merged * n_groups + channel / GROUP, channel);
        }
        for (int j = 0; j < KRUL_COMPRESSOR_MAX_VIEWS; j++) {
            uint8_t *out = here.outputs[j];
            if (out == nullptr) {
                continue;
            }
            out += row * block->outputs[j].token_bytes + in_row;
            if (place.is_kept) { /* bits, not numbers: a NaN stays the one it is */
                const uint8_t *in = chunk + block->kept_offset[j] +
                                    ((int64_t)place.index * head_dim + channel) * element_bytes;
                for (int32_t half = 0; half < element_bytes; half += 2) {
                    *(uint16_t *)(out + half) = (uint16_t)krul_load_u16_at(in + half);
                }
            }
            else {
                const uint8_t *magnitudes = chunk + block->magnitudes_offset[j];
                float magnitude = dtype == KRUL_DTYPE_BF16
                                      ? magnitude_at<KRUL_DTYPE_BF16>(magnitudes, place.index)
                                      : magnitude_at<KRUL_DTYPE_F32>(magnitudes, place.index);
                narrow_at(dtype, __fmul_rn(direction, magnitude), out);
            }
        }
    }
}

/* ---- launching --------------------------------------------------------------------------------- */

typedef void (*decode_kernel)(krul_decode_arguments);

template <krul_dtype dtype>
decode_kernel
kernel_for(krul_codec codec)
{
    switch (codec) {
        case KRUL_CODEC_INT8:
            return int_kernel<dtype, 8>;
        case KRUL_CODEC_INT4:
            return int_kernel<dtype, 4>;
        case KRUL_CODEC_SHARE:
            return share_kernel<dtype, 0>;
        case KRUL_CODEC_SHARE_INT8:
            return share_kernel<dtype, 8>;
        case KRUL_CODEC_SHARE_INT4:
            return share_kernel<dtype, 4>;
        default:
            return raw_kernel;
    }
}

decode_kernel
kernel_of(krul_codec codec, krul_dtype dtype)
{
    switch (dtype) {
        case KRUL_DTYPE_F32:
            return kernel_for<KRUL_DTYPE_F32>(codec);
        case KRUL_DTYPE_F16:
            return kernel_for<KRUL_DTYPE_F16>(codec);
        default:
            return kernel_for<KRUL_DTYPE_BF16>(codec);
    }
}

} // namespace

extern "C" krul_status
krul_cuda_decode(void *stream, const krul_device_batch *batch, const uint8_t *chunk,
                 uint32_t *damage_flag, krul_error *err)
{
    krul_decode_arguments arguments = {
        chunk,
        (const krul_device_descriptor *)(chunk + batch->descriptors_offset),
        (const uint32_t *)(chunk + batch->units_offset),
        damage_flag,
    };
    if (batch->n_units == 0) {
        return KRUL_STATUS_OK;
    }
    if (batch->codec == KRUL_CODEC_EXACT) {
        krul_launch_exact_decode(stream, batch, &arguments);
    }
    else if (batch->is_wide) {
        decode_kernel kernel = kernel_of(batch->codec, batch->dtype);
        KRUL_LAUNCH(kernel, (unsigned)batch->n_units, N_THREADS, 0, stream, arguments);
    }
    else {
        KRUL_LAUNCH(narrow_kernel, (unsigned)batch->n_units, N_THREADS, 0, stream, arguments,
                    batch->codec, batch->dtype);
    }
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        krul_status status = krul_fail(
            err, KRUL_STATUS_DEVICE, "launching the decoding of codec %d for %d thread blocks: %s",
            (int)batch->codec, (int)batch->n_units, cudaGetErrorString(error));
        if (err != nullptr) {
            err->code = (int)error;
        }
        return status;
    }
    return KRUL_STATUS_OK;
}

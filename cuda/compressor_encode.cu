/* compressor_encode.cu - codes blocks on the device: int8, int4, share, share+int; exact is apart.
 *
 * Every group's range, scale and code is computed by the CPU's operations in the CPU's order - even
 * which of two zeros is the minimum - so that int8 and int4 give the same bytes. Saving is no hurry: it
 * runs beside decoding, and what counts is that little of the device is taken. So a tile is read twice,
 * the second time from the cache, and nothing but sums of errors goes through shared memory. Those
 * are added in a fixed order, thread block by thread block: two runs give the same number. */
#include "compressor.cuh"

#include "codec_int.h"

namespace {

enum {
    N_THREADS = 128,
    TILE_TOKENS = KRUL_DEVICE_TILE_TOKENS,
    GROUP = 64,
    GROUP_LANES = 16, /* that reduce a group of V, as on the CPU */
    ROW_LANES = 8, /* that add up a row, as on the CPU */
    N_ROWS = KRUL_DEVICE_SHARE_ROWS,
};

#define ALL_LANES 0xffffffffu
#define UPPER_WEIGHT 0.6
#define SMALLEST_SINE 1e-3

static_assert((int)N_ROWS * (int)ROW_LANES == (int)N_THREADS, "a row takes eight lanes");

/* ---- numbers ----------------------------------------------------------------------------------- */

template <krul_dtype dtype>
static __device__ __forceinline__ float
read(const uint8_t *row, int32_t channel)
{
    return krul_widen<dtype>(((const typename krul_element<dtype>::bits *)row)[channel]);
}

/* Through the dtype and back. */
template <krul_dtype dtype>
static __device__ __forceinline__ float
rounded(float value)
{
    return krul_widen<dtype>(krul_narrow<dtype>(value));
}

static __device__ __forceinline__ void
store_u16(uint8_t *out, uint32_t bits)
{
    out[0] = (uint8_t)bits; /* planes may begin at odd bytes */
    out[1] = (uint8_t)(bits >> 8);
}

static __device__ __forceinline__ uint32_t
magnitude_bits(float value)
{
    return __float_as_uint(value) & 0x7fffffffu;
}

/* A group's range, while it is looked for. */
struct range {
    float least, greatest;
    uint32_t largest; /* magnitude: tells what is not finite */
};

static __device__ __forceinline__ range
range_of(float value)
{
    return {value, value, magnitude_bits(value)};
}

/* Of equals the first stays. */
static __device__ __forceinline__ void
widen_range(range *out, float low, float high, uint32_t largest)
{
    out->least = low < out->least ? low : out->least;
    out->greatest = high > out->greatest ? high : out->greatest;
    out->largest = largest > out->largest ? largest : out->largest;
}

/* Scale and minimum as they are stored; false when the group cannot be held. */
template <krul_dtype dtype>
static __device__ __forceinline__ bool
fit(const range &group, float top, float *scale_out, float *minimum_out)
{
    float limit = dtype == KRUL_DTYPE_F16 ? 65504.0f : __uint_as_float(0x7f7f0000u);
    float scale = rounded<KRUL_DTYPE_BF16>(__fdiv_rn(__fsub_rn(group.greatest, group.least), top));
    float minimum = rounded<KRUL_DTYPE_BF16>(group.least);
    *scale_out = scale;
    *minimum_out = minimum;
    return group.largest < 0x7f800000u && scale < __uint_as_float(0x7b800000u) &&
           minimum >= -limit && minimum <= limit &&
           __fadd_rn(minimum, __fmul_rn(top, scale)) <= limit;
}

/* Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even. */
static __device__ __forceinline__ uint32_t
quantise(float value, float scale, float minimum, float top)
{
    float code = __fdiv_rn(__fsub_rn(value, minimum), scale > 0.0f ? scale : 1.0f);
    code = code > 0.0f ? code : 0.0f;
    code = code < top ? code : top;
    return (uint32_t)__fsub_rn(__fadd_rn(code, 12582912.0f), 12582912.0f);
}

/* Add a value's squared error, and its square. */
static __device__ __forceinline__ void
add_error(float value, float decoded, double sums[2])
{
    double error = (double)value - (double)decoded;
    sums[0] += error * error;
    sums[1] += (double)value * (double)value;
}

static __device__ __forceinline__ const uint8_t *
plane_of(const krul_device_descriptor *block, int view, int32_t plane)
{
    const krul_device_output &input = block->outputs[view];
    int32_t batch = plane / block->n_heads;
    int32_t head = plane - batch * block->n_heads;
    return (const uint8_t *)input.address + batch * input.batch_bytes + head * input.head_bytes;
}

/* ---- int --------------------------------------------------------------------------------------- */

/* A byte of a row of codes: which channels it holds. */
struct code_channels {
    int32_t low;
    int32_t high; /* -1: there is none */
};

template <int bits>
static __device__ __forceinline__ code_channels
channels_of(int32_t byte, int32_t head_dim)
{
    if (bits == 8) {
        return {byte, -1};
    }
    int32_t first = byte / (GROUP / 2) * GROUP;
    int32_t width = min((int32_t)GROUP, head_dim - first);
    int32_t half = (width + 1) / 2;
    int32_t low = first + byte % (GROUP / 2);
    return {low, low + half < first + width ? low + half : -1};
}

/* K: a thread takes a byte's channels down the tile, first their ranges, then their codes. */
template <krul_dtype dtype, int bits>
static __device__ __forceinline__ bool
encode_keys(const krul_device_descriptor *block, const uint8_t *rows, int32_t n_tokens,
            int32_t tile, uint8_t *plane_out, double sums[2])
{
    const float top = bits == 8 ? 255.0f : 15.0f;
    int32_t head_dim = block->head_dim;
    int32_t row_bytes = bits == 8 ? head_dim : (head_dim + 1) / 2;
    int64_t token_bytes = block->outputs[0].token_bytes;
    uint8_t *scales = plane_out + 2 * (int64_t)tile * head_dim;
    uint8_t *codes = plane_out + block->codes_bytes + (int64_t)tile * TILE_TOKENS * row_bytes;
    bool fits = true;
    for (int32_t byte = (int32_t)threadIdx.x; byte < row_bytes; byte += N_THREADS) {
        code_channels channels = channels_of<bits>(byte, head_dim);
        int32_t channel[2] = {channels.low, channels.high < 0 ? channels.low : channels.high};
        float scale[2], minimum[2];
#pragma unroll
        for (int i = 0; i < (bits == 8 ? 1 : 2); i++) {
            range group = range_of(read<dtype>(rows, channel[i]));
            for (int32_t token = 1; token < n_tokens; token++) {
                float value = read<dtype>(rows + token * token_bytes, channel[i]);
                widen_range(&group, value, value, magnitude_bits(value));
            }
            fits &= fit<dtype>(group, top, &scale[i], &minimum[i]);
            store_u16(scales + 2 * channel[i], krul_narrow<KRUL_DTYPE_BF16>(scale[i]));
            store_u16(scales + block->minima_bytes + 2 * channel[i],
                      krul_narrow<KRUL_DTYPE_BF16>(minimum[i]));
        }
        for (int32_t token = 0; token < n_tokens; token++) {
            const uint8_t *row = rows + token * token_bytes;
            float value = read<dtype>(row, channel[0]);
            uint32_t code = quantise(value, scale[0], minimum[0], top);
            add_error(value, rounded<dtype>(__fmaf_rn((float)code, scale[0], minimum[0])), sums);
            if (bits == 4 && channels.high >= 0) {
                float upper = read<dtype>(row, channel[1]);
                uint32_t high = quantise(upper, scale[1], minimum[1], top);
                add_error(upper, rounded<dtype>(__fmaf_rn((float)high, scale[1], minimum[1])),
                          sums);
                code |= high << 4;
            }
            codes[(int64_t)token * row_bytes + byte] = (uint8_t)code;
        }
    }
    return fits;
}

/* V: sixteen lanes take 64 channels of a token, each every sixteenth, and then halve. */
template <krul_dtype dtype, int bits>
static __device__ __forceinline__ bool
encode_values(const krul_device_descriptor *block, const uint8_t *rows, int32_t n_tokens,
              int32_t tile, uint8_t *plane_out, double sums[2])
{
    const float top = bits == 8 ? 255.0f : 15.0f;
    int32_t head_dim = block->head_dim;
    int32_t n_groups = (head_dim + GROUP - 1) / GROUP;
    int32_t row_bytes = bits == 8 ? head_dim : (head_dim + 1) / 2;
    int32_t lane = (int32_t)threadIdx.x % GROUP_LANES;
    int64_t n_items = (int64_t)n_tokens * n_groups;
    bool fits = true;
    for (int64_t first = 0; first < n_items; first += N_THREADS / GROUP_LANES) {
        int64_t item = first + (int32_t)threadIdx.x / GROUP_LANES;
        bool is_active = item < n_items;
        item = is_active ? item : n_items - 1; /* the lanes must stay together */
        int32_t token = (int32_t)(item / n_groups);
        int32_t channel = (int32_t)(item - (int64_t)token * n_groups) * GROUP;
        int32_t width = min((int32_t)GROUP, head_dim - channel);
        const uint8_t *row = rows + token * block->outputs[0].token_bytes;
        range group = range_of(read<dtype>(row, channel + (lane < width ? lane : 0)));
#pragma unroll
        for (int i = GROUP_LANES; i < GROUP; i += GROUP_LANES) {
            float value = read<dtype>(row, channel + (i + lane < width ? i + lane : 0));
            widen_range(&group, value, value, magnitude_bits(value));
        }
#pragma unroll
        for (int half = GROUP_LANES / 2; half > 0; half /= 2) {
            float low = __shfl_down_sync(ALL_LANES, group.least, half, GROUP_LANES);
            float high = __shfl_down_sync(ALL_LANES, group.greatest, half, GROUP_LANES);
            uint32_t largest = __shfl_down_sync(ALL_LANES, group.largest, half, GROUP_LANES);
            if (lane < half) {
                widen_range(&group, low, high, largest);
            }
        }
        group.least = __shfl_sync(ALL_LANES, group.least, 0, GROUP_LANES);
        group.greatest = __shfl_sync(ALL_LANES, group.greatest, 0, GROUP_LANES);
        group.largest = __shfl_sync(ALL_LANES, group.largest, 0, GROUP_LANES);
        float scale, minimum;
        fits &= fit<dtype>(group, top, &scale, &minimum);
        if (!is_active) {
            continue;
        }
        int64_t in_plane = (int64_t)tile * TILE_TOKENS + token;
        int64_t parameter = 2 * (in_plane * n_groups + channel / GROUP);
        if (lane == 0) {
            store_u16(plane_out + parameter, krul_narrow<KRUL_DTYPE_BF16>(scale));
            store_u16(plane_out + block->minima_bytes + parameter,
                      krul_narrow<KRUL_DTYPE_BF16>(minimum));
        }
        uint8_t *codes = plane_out + block->codes_bytes + in_plane * row_bytes +
                         channel / (bits == 8 ? 1 : 2);
        int32_t n_bytes = bits == 8 ? width : (width + 1) / 2;
        for (int32_t byte = lane; byte < n_bytes; byte += GROUP_LANES) {
            float value = read<dtype>(row, channel + byte);
            uint32_t code = quantise(value, scale, minimum, top);
            add_error(value, rounded<dtype>(__fmaf_rn((float)code, scale, minimum)), sums);
            if (bits == 4 && byte + n_bytes < width) {
                float upper = read<dtype>(row, channel + byte + n_bytes);
                uint32_t high = quantise(upper, scale, minimum, top);
                add_error(upper, rounded<dtype>(__fmaf_rn((float)high, scale, minimum)), sums);
                code |= high << 4;
            }
            codes[byte] = (uint8_t)code;
        }
    }
    return fits;
}

template <krul_dtype dtype, int bits>
__global__ void
__launch_bounds__(N_THREADS) int_encode_kernel(krul_encode_arguments arguments)
{
    const krul_device_descriptor *block = arguments.descriptors + arguments.units[blockIdx.x];
    int32_t unit = (int32_t)blockIdx.x - block->first_unit;
    int32_t plane = unit / block->n_tiles;
    int32_t tile = unit - plane * block->n_tiles;
    int32_t n_tokens = min((int32_t)TILE_TOKENS, block->n_tokens - tile * TILE_TOKENS);
    const uint8_t *rows = plane_of(block, 0, plane) +
                          (int64_t)tile * TILE_TOKENS * block->outputs[0].token_bytes;
    uint8_t *plane_out = arguments.payloads + block->data_offset + plane * block->plane_bytes;
    double sums[2] = {0, 0};
    bool fits = block->kv == KRUL_KV_KEY
                    ? encode_keys<dtype, bits>(block, rows, n_tokens, tile, plane_out, sums)
                    : encode_values<dtype, bits>(block, rows, n_tokens, tile, plane_out, sums);
    if (!fits) {
        *(volatile uint32_t *)&arguments.results[block->index].does_not_fit = 1;
    }
    krul_write_errors(sums, arguments.errors + 2 * (int64_t)blockIdx.x);
}

/* ---- share ------------------------------------------------------------------------------------- */

/* Scratch of one block: the angle of every plane and token, their sums, who is kept. */
struct share_scratch {
    double *angles;
    double *totals;
    uint32_t *kept; /* twice the number of kept tokens before, plus 1 if kept itself */
};

static __device__ __forceinline__ share_scratch
scratch_of(const krul_encode_arguments &arguments, const krul_device_descriptor *block)
{
    share_scratch out;
    out.angles = (double *)(arguments.workspace + block->tiles_offset);
    out.totals = out.angles + (int64_t)block->n_planes * block->n_tokens;
    out.kept = (uint32_t *)(out.totals + block->n_tokens);
    return out;
}

/* The lanes that work on one row, and what they found. */
struct row_of_two {
    const uint8_t *rows[2];
    double norms[2];
    double factors[2];
    double angle;
    bool is_finite;
};

static __device__ __forceinline__ uint32_t
row_lanes()
{
    return 0xffu << threadIdx.x % 32 / ROW_LANES * ROW_LANES;
}

/* Lane after lane, as the CPU adds them. */
static __device__ __forceinline__ double
fold(double sum)
{
    double total = 0;
#pragma unroll
    for (int lane = 0; lane < ROW_LANES; lane++) {
        total = __dadd_rn(total, __shfl_sync(row_lanes(), sum, lane, ROW_LANES));
    }
    return total;
}

static __device__ __forceinline__ float
unit_value(float value, double factor)
{
    return (float)__dmul_rn((double)value, factor);
}

template <krul_dtype dtype>
static __device__ __forceinline__ row_of_two
compare_rows(const krul_device_descriptor *block, int32_t plane, int32_t token)
{
    row_of_two out;
    int32_t lane = (int32_t)threadIdx.x % ROW_LANES;
    int32_t head_dim = block->head_dim;
    double sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        out.rows[i] = plane_of(block, i, plane) + token * block->outputs[i].token_bytes;
        for (int32_t j = lane; j < head_dim; j += ROW_LANES) {
            double value = (double)read<dtype>(out.rows[i], j);
            sums[i] = __dadd_rn(sums[i], __dmul_rn(value, value));
        }
    }
    out.is_finite = true;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        double square = fold(sums[i]);
        out.is_finite &= isfinite(square);
        out.norms[i] = __dsqrt_rn(square);
        out.factors[i] = out.norms[i] > 0 ? __ddiv_rn(1.0, out.norms[i]) : 0.0;
    }
    double apart = 0, along = 0;
    for (int32_t j = lane; j < head_dim; j += ROW_LANES) {
        double lower = (double)unit_value(read<dtype>(out.rows[0], j), out.factors[0]);
        double upper = (double)unit_value(read<dtype>(out.rows[1], j), out.factors[1]);
        double difference = __dsub_rn(lower, upper), sum = __dadd_rn(lower, upper);
        apart = __dadd_rn(apart, __dmul_rn(difference, difference));
        along = __dadd_rn(along, __dmul_rn(sum, sum));
    }
    apart = fold(apart);
    along = fold(along);
    bool is_zero = !(out.norms[0] > 0) || !(out.norms[1] > 0);
    out.angle = is_zero ? 0.0
                        : 2.0 * (double)atan2f(__fsqrt_rn((float)apart), __fsqrt_rn((float)along));
    return out;
}

/* Step 1: the angle of every plane and token. */
template <krul_dtype dtype>
__global__ void
__launch_bounds__(N_THREADS) share_angles_kernel(krul_encode_arguments arguments)
{
    const krul_device_descriptor *block = arguments.descriptors + arguments.units[blockIdx.x];
    int32_t item = ((int32_t)blockIdx.x - block->first_unit) * N_ROWS +
                   (int32_t)threadIdx.x / ROW_LANES;
    if (item >= block->n_planes * block->n_tokens) { /* all lanes of a row */
        return;
    }
    int32_t plane = item / block->n_tokens;
    row_of_two row = compare_rows<dtype>(block, plane, item - plane * block->n_tokens);
    if (!row.is_finite) {
        *(volatile uint32_t *)&arguments.results[block->index].does_not_fit = 1;
    }
    if (threadIdx.x % ROW_LANES == 0) {
        scratch_of(arguments, block).angles[item] = row.angle;
    }
}

/* Step 2, a thread block per block: the tokens with the largest sums of angles, the first of equals.
 * Each is compared with each: at most 4,096, and 512 by custom. */
__global__ void
__launch_bounds__(N_THREADS) share_choose_kernel(krul_encode_arguments arguments)
{
    KRUL_SHARED(uint32_t, n_kept_of_warp);
    const krul_device_descriptor *block = arguments.descriptors + blockIdx.x;
    share_scratch scratch = scratch_of(arguments, block);
    int32_t n_tokens = block->n_tokens;
    for (int32_t token = (int32_t)threadIdx.x; token < n_tokens; token += N_THREADS) {
        double total = 0;
        for (int32_t plane = 0; plane < block->n_planes; plane++) {
            total = __dadd_rn(total, scratch.angles[(int64_t)plane * n_tokens + token]);
        }
        scratch.totals[token] = total;
    }
    __syncthreads();
    uint32_t n_before = 0;
    uint8_t *positions = arguments.payloads + block->directory_offset;
    for (int32_t first = 0; first < n_tokens; first += N_THREADS) {
        int32_t token = first + (int32_t)threadIdx.x;
        int32_t rank = block->n_kept;
        if (token < n_tokens) {
            double own = scratch.totals[token];
            rank = 0;
            for (int32_t other = 0; other < n_tokens; other++) {
                double total = scratch.totals[other];
                rank += total > own || (total == own && other < token);
            }
        }
        bool is_kept = rank < block->n_kept;
        uint32_t kept = __ballot_sync(ALL_LANES, is_kept);
        if (threadIdx.x % 32 == 0) {
            n_kept_of_warp[threadIdx.x / 32] = (uint32_t)__popc(kept);
        }
        __syncthreads();
        uint32_t index = n_before + (uint32_t)__popc(kept & ((1u << threadIdx.x % 32) - 1));
        for (uint32_t warp = 0; warp < N_THREADS / 32; warp++) {
            index += warp < threadIdx.x / 32 ? n_kept_of_warp[warp] : 0;
            n_before += n_kept_of_warp[warp];
        }
        if (token < n_tokens) {
            scratch.kept[token] = 2 * index + (is_kept ? 1 : 0);
        }
        if (is_kept) {
            *((uint32_t *)positions + index) = (uint32_t)token;
        }
        __syncthreads();
    }
}

/* The two weights of the direction between the unit vectors. */
template <krul_dtype dtype>
static __device__ __forceinline__ void
merge_weights(const row_of_two &row, int32_t head_dim, float weights[2])
{
    double sine = sin(row.angle);
    double lower = 1 - UPPER_WEIGHT, upper = UPPER_WEIGHT;
    if (!(row.norms[0] > 0) || !(row.norms[1] > 0)) {
        lower = row.norms[0] > 0 ? 1 : 0;
        upper = row.norms[1] > 0 ? 1 : 0;
    }
    else if (sine > SMALLEST_SINE) {
        lower = __ddiv_rn(sin(__dmul_rn(lower, row.angle)), sine);
        upper = __ddiv_rn(sin(__dmul_rn(upper, row.angle)), sine);
    }
    else if (row.angle > 1) { /* nearly opposite: a straight line, brought to length one */
        double sum = 0;
        for (int32_t j = (int32_t)threadIdx.x % ROW_LANES; j < head_dim; j += ROW_LANES) {
            float value = __fadd_rn(
                __fmul_rn((float)lower, unit_value(read<dtype>(row.rows[0], j), row.factors[0])),
                __fmul_rn((float)upper, unit_value(read<dtype>(row.rows[1], j), row.factors[1])));
            sum = __dadd_rn(sum, __dmul_rn((double)value, (double)value));
        }
        double length = __dsqrt_rn(fold(sum));
        lower = __ddiv_rn(lower, length);
        upper = __ddiv_rn(upper, length);
    }
    weights[0] = (float)lower;
    weights[1] = (float)upper;
}

/* Quantise 64 channels of a direction in shared memory, and leave there what they decode to. Eight
 * lanes do what sixteen do on the CPU. */
template <int bits>
static __device__ __forceinline__ bool
encode_direction(float *values, int32_t width, uint8_t *scale_out, uint8_t *minimum_out,
                 uint8_t *codes_out)
{
    const float top = bits == 8 ? 255.0f : 15.0f;
    int32_t lane = (int32_t)threadIdx.x % ROW_LANES;
    range both[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int32_t own = lane + i * ROW_LANES;
        both[i] = range_of(values[own < width ? own : 0]);
        for (int32_t at = own + GROUP_LANES; at < GROUP; at += GROUP_LANES) {
            float value = values[at < width ? at : 0];
            widen_range(&both[i], value, value, magnitude_bits(value));
        }
    }
    range group = both[0];
    widen_range(&group, both[1].least, both[1].greatest, both[1].largest);
#pragma unroll
    for (int half = ROW_LANES / 2; half > 0; half /= 2) {
        float low = __shfl_down_sync(row_lanes(), group.least, half, ROW_LANES);
        float high = __shfl_down_sync(row_lanes(), group.greatest, half, ROW_LANES);
        uint32_t largest = __shfl_down_sync(row_lanes(), group.largest, half, ROW_LANES);
        if (lane < half) {
            widen_range(&group, low, high, largest);
        }
    }
    group.least = __shfl_sync(row_lanes(), group.least, 0, ROW_LANES);
    group.greatest = __shfl_sync(row_lanes(), group.greatest, 0, ROW_LANES);
    group.largest = __shfl_sync(row_lanes(), group.largest, 0, ROW_LANES);
    float scale, minimum;
    bool fits = fit<KRUL_DTYPE_F32>(group, top, &scale, &minimum);
    if (lane == 0) {
        store_u16(scale_out, krul_narrow<KRUL_DTYPE_BF16>(scale));
        store_u16(minimum_out, krul_narrow<KRUL_DTYPE_BF16>(minimum));
    }
    int32_t n_bytes = bits == 8 ? width : (width + 1) / 2;
    for (int32_t byte = lane; byte < n_bytes; byte += ROW_LANES) {
        uint32_t code = quantise(values[byte], scale, minimum, top);
        values[byte] = __fmaf_rn((float)code, scale, minimum);
        if (bits == 4 && byte + n_bytes < width) {
            uint32_t high = quantise(values[byte + n_bytes], scale, minimum, top);
            values[byte + n_bytes] = __fmaf_rn((float)high, scale, minimum);
            code |= high << 4;
        }
        codes_out[byte] = (uint8_t)code;
    }
    return fits;
}

/* One merged row: its direction, its magnitudes, its errors. False when it does not fit. */
template <krul_dtype dtype, int bits>
static __device__ __forceinline__ bool
encode_merged(const krul_encode_arguments &arguments, const krul_device_descriptor *block,
              const row_of_two &row, int32_t plane, int32_t index, float *direction, double sums[2])
{
    typedef typename krul_element<dtype>::bits element;
    int32_t lane = (int32_t)threadIdx.x % ROW_LANES;
    int32_t head_dim = block->head_dim;
    int32_t n_groups = (head_dim + GROUP - 1) / GROUP;
    uint8_t *plane_out = arguments.payloads + block->data_offset + plane * block->plane_bytes;
    float weights[2];
    bool fits = true;
    merge_weights<dtype>(row, head_dim, weights);
    for (int32_t j = lane; j < head_dim; j += ROW_LANES) {
        direction[j] = __fadd_rn(
            __fmul_rn(weights[0], unit_value(read<dtype>(row.rows[0], j), row.factors[0])),
            __fmul_rn(weights[1], unit_value(read<dtype>(row.rows[1], j), row.factors[1])));
    }
    __syncwarp(row_lanes());
    if (bits == 0) {
        element *out = (element *)plane_out + (int64_t)index * head_dim;
        for (int32_t j = lane; j < head_dim; j += ROW_LANES) {
            out[j] = krul_narrow<dtype>(direction[j]);
            direction[j] = krul_widen<dtype>(out[j]);
        }
    }
    else {
        int32_t row_bytes = bits == 8 ? head_dim : (head_dim + 1) / 2;
        uint8_t *codes = plane_out + block->codes_bytes + (int64_t)index * row_bytes;
        for (int32_t group = 0; group < n_groups; group++) {
            uint8_t *scale = plane_out + 2 * ((int64_t)index * n_groups + group);
            fits &= encode_direction < bits == 0
                        ? 8
                        : bits > (direction + group * GROUP,
                                  min((int32_t)GROUP, head_dim - group * GROUP), scale,
                                  scale + block->minima_bytes,
                                  codes + group * (bits == 8 ? GROUP : GROUP / 2));
        }
    }
    __syncwarp(row_lanes());
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int64_t at = (int64_t)plane * block->n_merged + index;
        uint8_t *out = arguments.payloads + block->magnitudes_offset[i] +
                       at * (dtype == KRUL_DTYPE_BF16 ? 2 : 4);
        float norm = (float)row.norms[i];
        norm = dtype == KRUL_DTYPE_BF16 ? rounded<KRUL_DTYPE_BF16>(norm) : norm;
        fits &= isfinite(norm);
        if (lane == 0 && dtype == KRUL_DTYPE_BF16) {
            store_u16(out, krul_narrow<KRUL_DTYPE_BF16>(norm));
        }
        else if (lane == 0) {
            store_u16(out, __float_as_uint(norm) & 0xffffu);
            store_u16(out + 2, __float_as_uint(norm) >> 16);
        }
        for (int32_t j = lane; j < head_dim; j += ROW_LANES) {
            float decoded = rounded<dtype>(__fmul_rn(direction[j], norm));
            fits &= isfinite(decoded);
            add_error(read<dtype>(row.rows[i], j), decoded, sums);
        }
    }
    return fits;
}

/* Step 3: what is kept and what is merged. */
template <krul_dtype dtype, int bits>
__global__ void
__launch_bounds__(N_THREADS) share_encode_kernel(krul_encode_arguments arguments)
{
    typedef typename krul_element<dtype>::bits element;
    KRUL_SHARED(float, directions);
    const krul_device_descriptor *block = arguments.descriptors + arguments.units[blockIdx.x];
    int32_t in_block = (int32_t)threadIdx.x / ROW_LANES;
    int32_t item = ((int32_t)blockIdx.x - block->first_unit) * N_ROWS + in_block;
    int32_t lane = (int32_t)threadIdx.x % ROW_LANES;
    int32_t head_dim = block->head_dim;
    double sums[2] = {0, 0};
    if (item < block->n_planes * block->n_tokens) { /* the same for all lanes of a row */
        int32_t plane = item / block->n_tokens;
        int32_t token = item - plane * block->n_tokens;
        uint32_t kept = scratch_of(arguments, block).kept[token];
        row_of_two row = compare_rows<dtype>(block, plane, token);
        bool fits = row.is_finite;
        if (kept % 2 != 0) {
            int64_t at = (int64_t)plane * block->n_kept + kept / 2;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                element *out = (element *)(arguments.payloads + block->kept_offset[i]) +
                               at * head_dim;
                for (int32_t j = lane; j < head_dim; j += ROW_LANES) {
                    out[j] = ((const element *)row.rows[i])[j];
                    float value = read<dtype>(row.rows[i], j);
                    add_error(value, value, sums);
                }
            }
        }
        else {
            int32_t index = token - (int32_t)(kept / 2);
            fits &= encode_merged<dtype, bits>(arguments, block, row, plane, index,
                                               directions + in_block * head_dim, sums);
        }
        if (!fits) {
            *(volatile uint32_t *)&arguments.results[block->index].does_not_fit = 1;
        }
    }
    krul_write_errors(sums, arguments.errors + 2 * (int64_t)blockIdx.x);
}

/* ---- the end ----------------------------------------------------------------------------------- */

/* A warp per block adds up what its thread blocks found. */
__global__ void __launch_bounds__(32) sum_errors_kernel(krul_encode_arguments arguments)
{
    const krul_device_descriptor *block = arguments.descriptors + blockIdx.x;
    double sums[2] = {0, 0};
    for (int32_t unit = (int32_t)threadIdx.x; unit < block->n_units; unit += 32) {
        const double *errors = arguments.errors + 2 * ((int64_t)block->first_unit + unit);
        sums[0] += errors[0];
        sums[1] += errors[1];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], step);
        sums[1] += __shfl_xor_sync(ALL_LANES, sums[1], step);
    }
    if (threadIdx.x == 0) {
        arguments.results[block->index].error[0] = sums[0];
        arguments.results[block->index].error[1] = sums[1];
    }
}

typedef void (*encode_kernel)(krul_encode_arguments);

template <krul_dtype dtype>
encode_kernel
kernel_for(krul_codec codec)
{
    switch (codec) {
        case KRUL_CODEC_INT8:
            return int_encode_kernel<dtype, 8>;
        case KRUL_CODEC_INT4:
            return int_encode_kernel<dtype, 4>;
        case KRUL_CODEC_SHARE:
            return share_encode_kernel<dtype, 0>;
        case KRUL_CODEC_SHARE_INT8:
            return share_encode_kernel<dtype, 8>;
        default:
            return share_encode_kernel<dtype, 4>;
    }
}

template <krul_dtype dtype>
void
launch(void *stream, const krul_device_encode_batch *batch, const krul_encode_arguments &arguments)
{
    encode_kernel kernel = kernel_for<dtype>(batch->codec);
    unsigned n_units = (unsigned)batch->n_units, n_blocks = (unsigned)batch->n_blocks;
    size_t shared_bytes = N_THREADS / 32 * 2 * sizeof(double);
    if (batch->codec >= KRUL_CODEC_SHARE) {
        size_t rows_bytes = N_ROWS * (size_t)batch->head_dim * sizeof(float);
        encode_kernel angles = share_angles_kernel<dtype>;
        KRUL_LAUNCH(angles, n_units, N_THREADS, 0, stream, arguments);
        KRUL_LAUNCH(share_choose_kernel, n_blocks, N_THREADS, shared_bytes, stream, arguments);
        shared_bytes = rows_bytes > shared_bytes ? rows_bytes : shared_bytes;
    }
    KRUL_LAUNCH(kernel, n_units, N_THREADS, shared_bytes, stream, arguments);
    KRUL_LAUNCH(sum_errors_kernel, n_blocks, 32, 0, stream, arguments);
}

} // namespace

extern "C" krul_status
krul_cuda_encode(void *stream, const krul_device_encode_batch *batch, const uint8_t *plan,
                 uint8_t *payloads, uint8_t *workspace, krul_device_result *results,
                 krul_error *err)
{
    krul_encode_arguments arguments = {
        (const krul_device_descriptor *)(plan + batch->descriptors_offset),
        (const uint32_t *)(plan + batch->units_offset),
        payloads,
        workspace,
        (double *)(workspace + batch->workspace_offset),
        results,
    };
    if (batch->codec == KRUL_CODEC_EXACT) {
        krul_launch_exact_encode(stream, batch, &arguments);
        KRUL_LAUNCH(sum_errors_kernel, (unsigned)batch->n_blocks, 32, 0, stream, arguments);
    }
    else if (batch->dtype == KRUL_DTYPE_F32) {
        launch<KRUL_DTYPE_F32>(stream, batch, arguments);
    }
    else if (batch->dtype == KRUL_DTYPE_F16) {
        launch<KRUL_DTYPE_F16>(stream, batch, arguments);
    }
    else {
        launch<KRUL_DTYPE_BF16>(stream, batch, arguments);
    }
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        krul_status status = krul_fail(
            err, KRUL_STATUS_DEVICE, "launching the coding of %d blocks by codec %d: %s",
            (int)batch->n_blocks, (int)batch->codec, cudaGetErrorString(error));
        if (err != nullptr) {
            err->code = (int)error;
        }
        return status;
    }
    return KRUL_STATUS_OK;
}

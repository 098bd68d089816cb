/* predict.cu - decoding codec predict on a GPU: numbers, products, K and V.
 *
 * Three steps for a layer and all runs of tokens that are at hand:
 *
 *  1. A warp decodes the column stream of a block: a state is a lane. What limits it is latency, from
 *     state to slot to state, some hundred cycles for 32 numbers; warps are all it takes to hide that,
 *     and blocks of several layers do not wait for one another. So thread blocks are one warp each,
 *     and spread over the whole GPU. Slots are looked up in global memory: neighbouring columns use
 *     neighbouring tables, so that the 16 KiB of the few in use stay in the L1 cache, while all tables
 *     of a profile (34 x 16 KiB) would not fit the shared memory of any GPU. Numbers are stored by
 *     columns, as they come: 32 rows of a column are one line of 128 bytes.
 *  2. Products, of all runs of the layer at once. Dequantising is the product's factor and adding the
 *     prediction is its beta, so that neither costs a pass over memory. Rows of floats stay on the
 *     device until the last layer that is predicted from them.
 *  3. Adding the mean, rotating keys, rounding to the cache's dtype and storing are one pass: it reads
 *     4 bytes of a number and writes 2, and is bound by memory. Threads follow the rows, so that loads
 *     are whole lines, and store 16 bytes each where the cache's strides allow it. */

#include "cublas.h"
#include "device.cuh"
#include "device_predict.h"
#include "entropy.h"

enum {
    WARP = 32,
    WINDOW_WORDS = 2 * WARP, /* 16-bit words that a warp holds in one register each */
    STORE_THREADS = 256,
};

static const uint32_t ALL_LANES = 0xffffffffu;

/* ---- numbers ----------------------------------------------------------------------------------- */

/* Words of a stream that begins at any byte; what lies behind the end reads as 0. */
struct word_source {
    const uint32_t *words; /* the stream's first byte is in the first of these */
    uint32_t n_words;
    uint32_t skipped_bits;
};

/* Two of the WINDOW_WORDS 16-bit words of a window, the lane's own. */
static __device__ __forceinline__ uint32_t
load_window(const word_source &source, uint32_t window)
{
    uint32_t at = window * WARP + threadIdx.x;
    uint32_t low = at < source.n_words ? __ldg(source.words + at) : 0;
    uint32_t high = at + 1 < source.n_words && source.skipped_bits != 0
                        ? __ldg(source.words + at + 1)
                        : 0;
    return __funnelshift_r(low, high, source.skipped_bits);
}

/* The next escape; the host has seen that it is well-formed. All lanes read the same bytes. */
static __device__ __forceinline__ int32_t
read_escape(const uint8_t *&escapes)
{
    uint32_t folded = 0;
    for (uint32_t i = 0; i < 5; i++) {
        uint32_t byte = *escapes++;
        folded |= (byte & 0x7fu) << 7 * i;
        if (byte < 0x80u) {
            break;
        }
    }
    return (int32_t)(folded >> 1 ^ (0u - (folded & 1u)));
}

/* 2^(-fineness/3), the very float that krul_predict_row_step returns. */
static __device__ __forceinline__ float
row_step(int32_t fineness)
{
    const int32_t above = 3 * 8; /* so that what is divided is not negative */
    int32_t octaves = (fineness + above) / 3 - 8;
    int32_t rest = fineness - 3 * octaves;
    float part = rest == 0 ? 1.0f : rest == 1 ? 0.79370052598409974f : 0.62996052494743658f;
    return part * __int_as_float((127 - octaves) << 23);
}

static __device__ __forceinline__ float
round_to_bf16(float value)
{
    return __uint_as_float((uint32_t)krul_narrow<KRUL_DTYPE_BF16>(value) << 16);
}

static __global__ void
__launch_bounds__(WARP)
    decode_numbers(const uint8_t *chunk, const krul_device_predict_unit *units, int32_t n_used,
                   int64_t row_stride, const uint32_t *slots, const uint16_t *frequencies,
                   int32_t n_tables, bool is_rounded, float *numbers, uint32_t *damage_flag)
{
    const krul_device_predict_unit &unit = units[blockIdx.x];
    const uint32_t lane = threadIdx.x;
    const uint32_t lower_lanes = (1u << lane) - 1;
    const uint8_t *classes = chunk + unit.classes_at;
    const int8_t *fineness = (const int8_t *)chunk + unit.fineness_at;
    const int8_t *shifts = (const int8_t *)chunk + unit.shifts_at;
    const uint8_t *escapes = chunk + unit.escapes_at;
    const uint8_t *first_word = chunk + unit.states_at + KRUL_ENTROPY_STATES_BYTES;
    const uint32_t n_rows = (uint32_t)unit.n_rows;
    const bool has_fineness = unit.has_fineness != 0, has_shifts = unit.has_shifts != 0;
    const float factor = unit.factor;
    uint32_t skipped = (uint32_t)(uintptr_t)first_word & 3u;
    const word_source source = {(const uint32_t *)(first_word - skipped),
                                (skipped + unit.words_bytes + 3) / 4, 8 * skipped};
    uint32_t state_words[1];
    krul_load_words<1>(chunk + unit.states_at + 4 * lane, state_words);
    uint32_t state = state_words[0];

    /* The window after the next is on its way while these are in use. */
    uint32_t window = load_window(source, 0), next_window = load_window(source, 1);
    uint32_t n_windows = 2, position = 0, n_taken = 0, n_escapes = 0;
    bool is_damaged = false;
    const int32_t first_shift = has_shifts && lane < n_rows ? shifts[lane] : 0;
    uint32_t next_class = classes[0];
    float *out = numbers + unit.row + lane;
    for (int32_t column = 0; column < n_used; column++, out += row_stride) {
        const uint32_t column_class = next_class;
        next_class = column + 1 < n_used ? classes[column + 1] : 0;
        if (column_class == KRUL_ENTROPY_NO_SYMBOLS) {
            for (uint32_t row = 0; row < n_rows; row += WARP) {
                out[row] = 0.0f;
            }
            continue;
        }
        int32_t shift = first_shift;
        for (uint32_t row = 0; row < n_rows; row += WARP) {
            const bool is_active = row + lane < n_rows;
            int32_t table = (int32_t)column_class + shift;
            table = min(max(table, 0), n_tables - 1);
            shift = has_shifts && row + WARP + lane < n_rows ? shifts[row + WARP + lane] : 0;
            uint32_t slot = __ldg(slots + (table << KRUL_ENTROPY_PROBABILITY_BITS) +
                                  (state & (KRUL_ENTROPY_N_SLOTS - 1)));
            uint32_t symbol = slot & 0xffu;
            uint32_t after = (slot >> 20) * (state >> KRUL_ENTROPY_PROBABILITY_BITS) +
                             (slot >> 8 & (KRUL_ENTROPY_N_SLOTS - 1));
            bool is_low = is_active && after < KRUL_ENTROPY_STATE_FLOOR;
            uint32_t takers = __ballot_sync(ALL_LANES, is_low);
            uint32_t at = position + (uint32_t)__popc(takers & lower_lanes);
            uint32_t pair = __shfl_sync(ALL_LANES, window, (int)(at >> 1 & 31));
            position += (uint32_t)__popc(takers);
            if (position > WINDOW_WORDS) {
                uint32_t other = __shfl_sync(ALL_LANES, next_window, (int)(at >> 1 & 31));
                pair = at >= WINDOW_WORDS ? other : pair;
            }
            uint32_t word = (at & 1) != 0 ? pair >> 16 : pair & 0xffffu;
            state = is_low ? after << 16 | word : is_active ? after : state;
            n_taken += (uint32_t)__popc(takers);
            if (position >= WINDOW_WORDS) {
                position -= WINDOW_WORDS;
                window = next_window;
                next_window = load_window(source, n_windows++);
            }
            float value = (float)((int32_t)symbol - KRUL_ENTROPY_ZERO);
            uint32_t marks = __ballot_sync(ALL_LANES, is_active && symbol == KRUL_ENTROPY_ESCAPE);
            while (marks != 0) { /* seldom */
                int marked = __ffs((int)marks) - 1;
                marks &= marks - 1;
                if (n_escapes == unit.n_escapes) {
                    is_damaged = true;
                    break;
                }
                n_escapes++;
                int32_t number = read_escape(escapes);
                int32_t own_table = __shfl_sync(ALL_LANES, table, marked);
                uint32_t named = (uint32_t)number + KRUL_ENTROPY_ZERO;
                is_damaged |= named < KRUL_ENTROPY_ESCAPE &&
                              frequencies[own_table * 256 + (int32_t)named] != 0;
                value = (int)lane == marked ? (float)number : value;
            }
            if (has_fineness && is_active) {
                value *= row_step(fineness[row + lane]);
            }
            value = is_rounded ? round_to_bf16(value) : value;
            /* Rows that fill up are zeros in every layer. */
            out[row] = is_active ? value * factor : 0.0f;
        }
    }
    is_damaged |= state != KRUL_ENTROPY_STATE_FLOOR || n_taken != unit.words_bytes / 2 ||
                  n_escapes != unit.n_escapes;
    if (__any_sync(ALL_LANES, is_damaged) && lane == 0) {
        *damage_flag = 1;
    }
}

/* ---- K and V ----------------------------------------------------------------------------------- */

/* How a layer's rows become keys and values. */
struct row_layout {
    const float *rows; /* the batch's first */
    const float *mean;
    const float *cos;
    const float *sin;
    int64_t row_floats;
    int64_t angles_per_batch;
    int32_t n_heads;
    int32_t head_dim;
    int32_t convention;
    int32_t rotary_start;
    int32_t n_pairs;
    int32_t first_kv;
};

template <int n>
static __device__ __forceinline__ void
load_floats(const float *from, float (&out)[n])
{
    if constexpr (n % 4 == 0) {
#pragma unroll
        for (int i = 0; i < n; i += 4) {
            float4 part = __ldg((const float4 *)(from + i));
            out[i] = part.x;
            out[i + 1] = part.y;
            out[i + 2] = part.z;
            out[i + 3] = part.w;
        }
    }
    else {
#pragma unroll
        for (int i = 0; i < n; i++) {
            out[i] = __ldg(from + i);
        }
    }
}

/* Numbers of a row with their mean. */
template <int n>
static __device__ __forceinline__ void
load_centred(const float *row, const float *mean, float (&out)[n])
{
    float offset[n];
    load_floats(row, out);
    load_floats(mean, offset);
#pragma unroll
    for (int i = 0; i < n; i++) {
        out[i] += offset[i];
    }
}

/* Turn the numbers from place `at` of a head on; the head's row and mean begin at these. */
template <int n>
static __device__ __forceinline__ void
turn(const row_layout &layout, const float *head, const float *head_mean, int64_t angles,
     int32_t at, float (&values)[n])
{
    int32_t in_part = at - layout.rotary_start;
    if (in_part < 0 || in_part >= 2 * layout.n_pairs) {
        return;
    }
    float partner[n], cosine[n], sine[n];
    if (layout.convention == KRUL_ROTARY_HALF) {
        bool is_first = in_part < layout.n_pairs;
        int32_t distance = is_first ? layout.n_pairs : -layout.n_pairs;
        int32_t pair = is_first ? in_part : in_part - layout.n_pairs;
        load_centred(head + at + distance, head_mean + at + distance, partner);
        load_floats(layout.cos + angles + pair, cosine);
        load_floats(layout.sin + angles + pair, sine);
#pragma unroll
        for (int i = 0; i < n; i++) {
            values[i] = values[i] * cosine[i] + (is_first ? -partner[i] : partner[i]) * sine[i];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < n; i++) {
        bool is_first = (in_part + i) % 2 == 0;
        int32_t other = is_first ? 1 : -1;
        cosine[i] = __ldg(layout.cos + angles + (in_part + i) / 2);
        sine[i] = __ldg(layout.sin + angles + (in_part + i) / 2);
        partner[i] = __ldg(head + at + i + other) + __ldg(head_mean + at + i + other);
        partner[i] = is_first ? -partner[i] : partner[i];
    }
#pragma unroll
    for (int i = 0; i < n; i++) {
        values[i] = values[i] * cosine[i] + partner[i] * sine[i];
    }
}

template <krul_dtype dtype, int n>
static __device__ __forceinline__ void
store_elements(void *data, int64_t at, const float (&values)[n])
{
    typedef typename krul_element<dtype>::bits bits;
    constexpr int n_words = n * (int)sizeof(bits) / 4;
    bits *to = (bits *)data + at;
    if constexpr (n_words == 0) {
        *to = krul_narrow<dtype>(values[0]);
    }
    else {
        uint32_t words[n_words];
        krul_narrow_words<dtype>(values, words);
        if constexpr (n_words == 4) {
            *(uint4 *)(void *)to = make_uint4(words[0], words[1], words[2], words[3]);
        }
        else {
            static_assert(n_words == 1, "16 bytes, 4 bytes or an element");
            *(uint32_t *)(void *)to = words[0];
        }
    }
}

/* A thread is n numbers of one head; blockIdx.y is the block, blockIdx.z K or V. */
template <krul_dtype dtype, int n>
static __global__ void
__launch_bounds__(STORE_THREADS)
    store_rows(const krul_device_predict_unit *units, row_layout layout)
{
    const krul_device_predict_unit &unit = units[blockIdx.y];
    const int32_t kv = layout.first_kv + (int32_t)blockIdx.z;
    if (unit.data[kv] == NULL) {
        return;
    }
    /* A block has at most 2^29 numbers. */
    uint32_t per_head = (uint32_t)layout.head_dim / n;
    uint32_t per_row = (uint32_t)layout.n_heads * per_head;
    uint32_t index = blockIdx.x * STORE_THREADS + threadIdx.x;
    uint32_t row = index / per_row, in_row = index % per_row;
    if (row >= (uint32_t)unit.n_rows) {
        return;
    }
    uint32_t batch = row / (uint32_t)unit.n_tokens, token = row % (uint32_t)unit.n_tokens;
    if (token >= unit.n_stored[kv]) {
        return;
    }
    uint32_t head = in_row / per_head;
    int32_t at = (int32_t)(in_row % per_head) * n;
    int64_t head_at = ((int64_t)kv * layout.n_heads + head) * layout.head_dim;
    const float *head_row = layout.rows + (unit.row + row) * layout.row_floats + head_at;
    const float *head_mean = layout.mean + head_at;
    float values[n];
    load_centred(head_row + at, head_mean + at, values);
    if (kv == 0 && layout.convention != KRUL_ROTARY_NONE) {
        int64_t angles = batch * layout.angles_per_batch + (unit.token + token) * layout.n_pairs;
        turn(layout, head_row, head_mean, angles, at, values);
    }
    const int64_t *stride = unit.stride[kv];
    store_elements<dtype>(unit.data[kv],
                          batch * stride[0] + head * stride[1] + token * stride[2] + at, values);
}

typedef void store_kernel(const krul_device_predict_unit *units, row_layout layout);

/* The kernel that stores so many elements of a dtype at once, as krul_device_predict_prepare chooses
 * them. */
static store_kernel *
choose_store(krul_dtype dtype, int32_t n)
{
    switch (dtype) {
        case KRUL_DTYPE_F32:
            return n == 4 ? store_rows<KRUL_DTYPE_F32, 4> : store_rows<KRUL_DTYPE_F32, 1>;
        case KRUL_DTYPE_F16:
            return n == 8   ? store_rows<KRUL_DTYPE_F16, 8>
                   : n == 2 ? store_rows<KRUL_DTYPE_F16, 2>
                            : store_rows<KRUL_DTYPE_F16, 1>;
        default:
            return n == 8   ? store_rows<KRUL_DTYPE_BF16, 8>
                   : n == 2 ? store_rows<KRUL_DTYPE_BF16, 2>
                            : store_rows<KRUL_DTYPE_BF16, 1>;
    }
}

/* ---- rounding ---------------------------------------------------------------------------------- */

/* Round rows in place to what bfloat16 can hold; a row is a whole number of vectors. */
static __global__ void
__launch_bounds__(STORE_THREADS) round_rows(float *rows, int64_t n_vectors)
{
    int64_t at = (int64_t)blockIdx.x * STORE_THREADS + threadIdx.x;
    if (at < n_vectors) {
        float4 values = ((const float4 *)(const void *)rows)[at];
        values.x = round_to_bf16(values.x);
        values.y = round_to_bf16(values.y);
        values.z = round_to_bf16(values.z);
        values.w = round_to_bf16(values.w);
        ((float4 *)(void *)rows)[at] = values;
    }
}

static krul_status
launch_round_rows(float *rows, int64_t n_floats, void *stream, krul_error *err)
{
    int64_t n_vectors = n_floats / 4;
    KRUL_LAUNCH(round_rows, dim3((unsigned)((n_vectors + STORE_THREADS - 1) / STORE_THREADS)),
                dim3(STORE_THREADS), 0, stream, rows, n_vectors);
    return krul_cuda_check(cudaGetLastError(), "round_rows", err);
}

/* ---- on the host ------------------------------------------------------------------------------- */

extern "C" krul_status
krul_cuda_predict_numbers(const krul_device_chains *chains, const krul_device_predict_batch *batch,
                          void *stream, const uint8_t *chunk, uint8_t *scratch,
                          uint32_t *damage_flag, krul_error *err)
{
    const krul_device_profile *profile = krul_device_chains_profile(chains);
    const uint8_t *memory = profile->memory;
    KRUL_LAUNCH(decode_numbers, dim3((unsigned)batch->n_blocks), dim3(WARP), 0, stream, chunk,
                (const krul_device_predict_unit *)(const void *)(chunk + batch->units_at),
                batch->n_used, batch->n_rows, (const uint32_t *)(memory + profile->slots_at),
                (const uint16_t *)(memory + profile->frequencies_at), profile->n_tables,
                krul_device_chains_are_rounded(chains), (float *)(void *)scratch, damage_flag);
    return krul_cuda_check(cudaGetLastError(), "decode_numbers", err);
}

/* Rows of a layer that belong to a batch. */
static float *
rows_of(const krul_device_chains *chains, const krul_device_predict_batch *batch, uint8_t *memory,
        int32_t layer)
{
    const krul_device_profile *profile = krul_device_chains_profile(chains);
    float *slot = (float *)(void *)(memory +
                                    krul_device_chains_slot(chains, profile->layers[layer].slot));
    return slot + batch->first_row * profile->row_floats;
}

/* The products. All matrices here are row-major, which cuBLAS reads as their transposes: Z' = M' Y'
 * for Z = Y M. Only the numbers, which lie by columns, are transposed. */
static krul_status
multiply(const krul_device_chains *chains, const krul_device_predict_batch *batch,
         krul_cublas *cublas, uint8_t *memory, uint8_t *scratch, krul_error *err)
{
    const krul_device_profile *profile = krul_device_chains_profile(chains);
    const krul_device_profile_layer *layer = &profile->layers[batch->layer];
    int64_t width = layer->width, stride = profile->row_floats, n_rows = batch->n_rows;
    int64_t n_columns = layer->rank > 0 ? layer->rank : width;
    const float *maps = (const float *)(const void *)(profile->memory + layer->maps_at);
    const float *numbers = (const float *)(const void *)scratch;
    float *out = rows_of(chains, batch, memory, batch->layer);
    float *sum = layer->rank > 0 ? (float *)(void *)scratch + n_rows * batch->n_used : out;
    int64_t sum_stride = layer->rank > 0 ? layer->rank : stride;
    krul_status status = KRUL_STATUS_OK;
    for (int32_t i = 0; i < layer->n_sources && status == KRUL_STATUS_OK; i++) {
        status = krul_cublas_multiply(cublas, false, false, n_columns, n_rows, width, 1.0f,
                                      maps + i * width * n_columns, n_columns,
                                      rows_of(chains, batch, memory, layer->sources[i]), stride,
                                      i > 0 ? 1.0f : 0.0f, sum, sum_stride, err);
    }
    if (status == KRUL_STATUS_OK && layer->n_sources > 0 && layer->rank > 0) {
        const float *right = (const float *)(const void *)(profile->memory + layer->right_at);
        if (krul_device_chains_are_rounded(chains)) {
            status = launch_round_rows(sum, n_rows * layer->rank, krul_cublas_stream(cublas), err);
        }
        status = status != KRUL_STATUS_OK
                     ? status
                     : krul_cublas_multiply(cublas, false, false, width, n_rows, layer->rank, 1.0f,
                                            right, width, sum, sum_stride, 0.0f, out, stride, err);
    }
    if (status == KRUL_STATUS_OK) {
        const float *backward = (const float *)(const void *)(profile->memory + layer->backward_at);
        status = krul_cublas_multiply(cublas, false, true, width, n_rows, batch->n_used,
                                      batch->step, backward, width, numbers, n_rows,
                                      layer->n_sources > 0 ? 1.0f : 0.0f, out, stride, err);
    }
    return status;
}

extern "C" krul_status
krul_cuda_predict_rows(const krul_device_chains *chains, const krul_device_predict_batch *batch,
                       krul_cublas *cublas, const uint8_t *chunk, uint8_t *memory, uint8_t *scratch,
                       krul_error *err)
{
    const krul_device_profile *profile = krul_device_chains_profile(chains);
    const krul_device_profile_layer *layer = &profile->layers[batch->layer];
    const krul_device_predict_unit
        *units = (const krul_device_predict_unit *)(const void *)(chunk + batch->units_at);
    krul_status status = multiply(chains, batch, cublas, memory, scratch, err);
    row_layout layout = {};
    layout.rows = rows_of(chains, batch, memory, batch->layer);
    layout.mean = (const float *)(const void *)(profile->memory + layer->mean_at);
    layout.cos = (const float *)(const void *)(memory + batch->cos_at);
    layout.sin = (const float *)(const void *)(memory + batch->sin_at);
    layout.row_floats = profile->row_floats;
    layout.angles_per_batch = batch->angles_per_batch;
    layout.n_heads = layer->n_heads;
    layout.head_dim = layer->head_dim;
    layout.convention = batch->convention;
    layout.rotary_start = batch->rotary_start;
    layout.n_pairs = batch->n_pairs;
    /* K and V are one launch where they are alike. */
    bool is_one = batch->dtype[0] == batch->dtype[1] && batch->vector[0] == batch->vector[1];
    for (int kv = 0; kv < (is_one ? 1 : 2) && status == KRUL_STATUS_OK; kv++) {
        if (batch->dtype[kv] == 0) {
            continue;
        }
        int64_t n_threads = batch->max_rows * (layer->width / 2 / batch->vector[kv]);
        dim3 grid((unsigned)((n_threads + STORE_THREADS - 1) / STORE_THREADS),
                  (unsigned)batch->n_blocks, is_one ? 2u : 1u);
        layout.first_kv = kv;
        KRUL_LAUNCH(choose_store(batch->dtype[kv], batch->vector[kv]), grid, dim3(STORE_THREADS), 0,
                    krul_cublas_stream(cublas), units, layout);
        status = krul_cuda_check(cudaGetLastError(), "store_rows", err);
    }
    /* K and V had more; layers that are predicted from these have not. */
    if (status == KRUL_STATUS_OK && layer->is_source && krul_device_chains_are_rounded(chains)) {
        status = launch_round_rows(rows_of(chains, batch, memory, batch->layer),
                                   batch->n_rows * profile->row_floats, krul_cublas_stream(cublas),
                                   err);
    }
    return status;
}

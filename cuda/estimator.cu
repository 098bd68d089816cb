/* estimator.cu - attention rows of sampled queries on a GPU, and their distances across layers.
 *
 * Nothing of queries x keys is ever in memory. A *tile* is 16 queries (rows, and heads that share a KV
 * head) times 8, 16 or 32 keys, the rows and columns of matrix instructions, and one warp's registers.
 *
 *  1. attend_rows: a warp for every 16 queries of every layer runs over their keys and leaves two
 *     numbers of each row: the maximum, and 1 over the sum of the exponentials above it. That is the
 *     logarithm of the sum in two parts, which added would lose bits.
 *  2. compare_rows: a thread block for every tile of keys computes the scores again, of all layers,
 *     which is cheaper than having kept them, and has with 1. the rows themselves, for one tile of all
 *     layers in shared memory: 2 KiB a layer. There the warps compare 4 x 4 layers at a time, so that
 *     each number that is read serves four differences. Mass that tokens receive, and mass on the first
 *     and last tenth, are added up on the way.
 *  3. add_sums: what the thread blocks found, in one order whatever the GPU: results are the same bits
 *     in every run. No addition is atomic.
 *
 * Scores of f16 and bf16 come from tensor cores: products of two such numbers are exact in float32, so
 * that only the order of additions is theirs. Queries and keys go from memory to registers without
 * shared memory between: a sum over head_dim may be taken in any order, so each thread's part of a
 * fragment can be 16 bytes side by side. Other dtypes, and f16 with bf16, are multiplied in float32 by
 * the same threads in the same layout. Warps that work at the same time share keys (16 queries of one
 * KV head after the other) or tokens (all layers of one tile), and find them in the L1 and L2 caches. */
#include "device.cuh"
#include "device_estimator.h"

enum {
    WARP = 32,
    N_WARPS = 8, /* of a thread block that compares */
    N_ROW_WARPS = 4, /* of one that attends: 64 queries, of as few KV heads as may be */
    LANES = KRUL_DEVICE_LANES,
    GROUP_KEYS = KRUL_DEVICE_KEYS_AT_ONCE,
    ROW_KEY_GROUPS = 4,
    STEP = 32, /* of head_dim: two matrix instructions, and 16 bytes of each thread */
    PAIRS = KRUL_DEVICE_LAYERS_AT_ONCE * KRUL_DEVICE_LAYERS_AT_ONCE,
    ADD_THREADS = 128,
};

static const uint32_t ALL_LANES = 0xffffffffu;

#ifndef KRUL_EMULATE

/* c += a b: 16 x 16 times 16 x 8. A thread 4 g + t holds of a the words (row g, numbers 2 t and
 * 2 t + 1), (row g + 8, the same), (row g, 2 t + 8 and on), (row g + 8, the same), of b (column g,
 * numbers 2 t and on), (column g, 2 t + 8 and on), of c (row g, columns 2 t and 2 t + 1), (row g + 8,
 * the same). */
static __device__ __forceinline__ void
krul_multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
}

static __device__ __forceinline__ void
krul_multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
}

#endif

/* One group of layers at work. */
struct observe_arguments {
    const uint8_t *image;
    uint8_t *workspace;
    const krul_device_observed *members;
    const int32_t *positions;
    const uint8_t *real; /* or NULL */
    const int32_t *first_real;
    int32_t n_batch;
    int32_t n_rows;
    int32_t n_keys_total;
    int32_t n_seen;
    krul_device_observe_group group;
};

/* The two queries of a tile that a thread works on: rows g and g + 8. */
struct lane_rows {
    int32_t first[2]; /* position that each sees first */
    int32_t last[2]; /* and last, its own; -1: none */
    int32_t row[2];
    int32_t head[2];
    int32_t first_head;
    int32_t kv_head; /* of all of them */
};

static __device__ __forceinline__ int32_t
warp_min(int32_t value)
{
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
        value = min(value, __shfl_xor_sync(ALL_LANES, value, bits));
    }
    return value;
}

static __device__ __forceinline__ int32_t
warp_max(int32_t value)
{
    return -warp_min(-value);
}

static __device__ __forceinline__ float
warp_sum(float value)
{
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, bits);
    }
    return value;
}

/* What a tile's queries are, whatever the layer. */
static __device__ __forceinline__ lane_rows
find_rows(const observe_arguments &arguments, int32_t batch, int32_t lane_tile)
{
    const krul_device_observe_group &group = arguments.group;
    int32_t block = lane_tile % group.n_blocks, run = lane_tile / group.n_blocks;
    lane_rows out;
    out.first_head = run * group.heads_at_once;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int32_t index = block * LANES + (int32_t)(threadIdx.x % WARP / 4) + 8 * i;
        int32_t row = index / group.heads_at_once;
        bool is_row = row < arguments.n_rows;
        out.row[i] = is_row ? row : 0; /* what is not there is read as what is */
        out.head[i] = out.first_head + index % group.heads_at_once;
        out.last[i] = is_row ? arguments.positions[batch * arguments.n_rows + row] : -1;
        out.first[i] = 0;
    }
    return out;
}

/* And what they see in this one. */
static __device__ __forceinline__ void
find_starts(const observe_arguments &arguments, const krul_device_observed &layer, int32_t batch,
            lane_rows &rows)
{
    const int32_t *starts = (const int32_t *)(const void *)(arguments.image + layer.starts_at) +
                            batch * arguments.n_rows;
    rows.kv_head = rows.first_head / layer.heads_per_kv;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int32_t start = layer.starts_at != 0 ? starts[rows.row[i]] : 0;
        rows.first[i] = max(start, arguments.first_real[batch]);
    }
}

/* ---- scores ------------------------------------------------------------------------------------ */

/* Eight elements of 16 bits, zeros from `end` on. */
static __device__ __forceinline__ void
load_eight(const uint16_t *row, int32_t at, int32_t end, bool is_wide, uint32_t (&out)[4])
{
    if (is_wide) {
        uint4 all = at < end ? __ldg((const uint4 *)(const void *)(row + at))
                             : make_uint4(0, 0, 0, 0);
        out[0] = all.x;
        out[1] = all.y;
        out[2] = all.z;
        out[3] = all.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t low = at + 2 * i < end ? __ldg(row + at + 2 * i) : 0;
        uint32_t high = at + 2 * i + 1 < end ? __ldg(row + at + 2 * i + 1) : 0;
        out[i] = high << 16 | low;
    }
}

/* Four elements of any dtype, zeros from `end` on. */
static __device__ __forceinline__ void
load_four(const void *row, int32_t dtype, int32_t at, int32_t end, bool is_wide, float (&out)[4])
{
    if (is_wide && dtype == KRUL_DTYPE_F32) {
        float4 all = __ldg((const float4 *)((const float *)row + at));
        out[0] = all.x;
        out[1] = all.y;
        out[2] = all.z;
        out[3] = all.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (at + i >= end) {
            out[i] = 0.0f;
        }
        else if (dtype == KRUL_DTYPE_F32) {
            out[i] = __ldg((const float *)row + at + i);
        }
        else {
            uint16_t bits = __ldg((const uint16_t *)row + at + i);
            out[i] = dtype == KRUL_DTYPE_F16 ? krul_widen<KRUL_DTYPE_F16>(bits)
                                             : krul_widen<KRUL_DTYPE_BF16>(bits);
        }
    }
}

static __device__ __forceinline__ const uint8_t *
element_at(const void *data, int32_t dtype, int64_t index)
{
    return (const uint8_t *)data + index * (dtype == KRUL_DTYPE_F32 ? 4 : 2);
}

/* Dot products by tensor cores; keys are the KV head's, `first_key` on, none beyond the last. */
template <bool is_bf16, int n_groups>
static __device__ __forceinline__ void
multiply_tile(const krul_device_observed &layer, const uint8_t *const (&queries)[2],
              const uint8_t *keys, int32_t first_key, float (&scores)[n_groups][4])
{
    const int32_t group = (int32_t)(threadIdx.x % WARP / 4), part = (int32_t)(threadIdx.x % 4);
    const bool is_wide = layer.is_wide != 0;
    const uint16_t *key_rows[n_groups];
#pragma unroll
    for (int j = 0; j < n_groups; j++) {
        int32_t key = min(max(first_key + GROUP_KEYS * j + group, 0), layer.n_keys - 1);
        key_rows[j] = (const uint16_t *)(const void *)keys + key * layer.key_stride[2];
    }
    for (int32_t at = 8 * part; at - 8 * part < layer.head_dim; at += STEP) {
        uint32_t upper[4], lower[4];
        load_eight((const uint16_t *)(const void *)queries[0], at, layer.head_dim, is_wide, upper);
        load_eight((const uint16_t *)(const void *)queries[1], at, layer.head_dim, is_wide, lower);
        const uint32_t first[4] = {upper[0], lower[0], upper[1], lower[1]};
        const uint32_t second[4] = {upper[2], lower[2], upper[3], lower[3]};
#pragma unroll
        for (int j = 0; j < n_groups; j++) {
            uint32_t key[4];
            load_eight(key_rows[j], at, layer.head_dim, is_wide, key);
            if (is_bf16) {
                krul_multiply_bf16(scores[j], first, key[0], key[1]);
                krul_multiply_bf16(scores[j], second, key[2], key[3]);
            }
            else {
                krul_multiply_f16(scores[j], first, key[0], key[1]);
                krul_multiply_f16(scores[j], second, key[2], key[3]);
            }
        }
    }
}

/* The same in float32, every thread for itself. */
template <int n_groups>
static __device__ __forceinline__ void
multiply_plain(const krul_device_observed &layer, const uint8_t *const (&queries)[2],
               const uint8_t *keys, int32_t first_key, float (&scores)[n_groups][4])
{
    const bool is_wide = layer.is_wide != 0;
    for (int32_t at = 0; at < layer.head_dim; at += 4) {
        float upper[4], lower[4];
        load_four(queries[0], layer.query_dtype, at, layer.head_dim, is_wide, upper);
        load_four(queries[1], layer.query_dtype, at, layer.head_dim, is_wide, lower);
#pragma unroll
        for (int j = 0; j < n_groups; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int32_t key = first_key + GROUP_KEYS * j + 2 * (int32_t)(threadIdx.x % 4) + i;
                key = min(max(key, 0), layer.n_keys - 1);
                float own[4];
                load_four(element_at(keys, layer.key_dtype, key * layer.key_stride[2]),
                          layer.key_dtype, at, layer.head_dim, is_wide, own);
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    scores[j][i] += upper[d] * own[d];
                    scores[j][2 + i] += lower[d] * own[d];
                }
            }
        }
    }
}

/* tanh(x) = (1 - y) / (1 + y) with y = exp(-2 x), for x >= 0 */
static __device__ __forceinline__ float
cap(float score, float softcap)
{
    float y = expf(-fabsf(score) * (2 / softcap));
    return copysignf(softcap * ((1 - y) / (1 + y)), score);
}

/* Scores of one tile, -inf where a query does not see a key. scores[j][i] is of row g (i < 2) or g + 8
 * and of key 8 j + 2 t + i % 2, as matrix instructions have it. */
template <int n_groups>
static __device__ __forceinline__ void
score_tile(const observe_arguments &arguments, const krul_device_observed &layer, int32_t batch,
           const lane_rows &rows, int32_t position, float (&scores)[n_groups][4])
{
    const uint8_t *queries[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        queries[i] = element_at(layer.queries, layer.query_dtype,
                                batch * layer.query_stride[0] +
                                    rows.head[i] * layer.query_stride[1] +
                                    rows.row[i] * layer.query_stride[2]);
    }
    const uint8_t *keys = element_at(layer.keys, layer.key_dtype,
                                     batch * layer.key_stride[0] +
                                         rows.kv_head * layer.key_stride[1]);
    int32_t first_key = position - layer.key_start;
#pragma unroll
    for (int j = 0; j < n_groups; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[j][i] = 0.0f;
        }
    }
    if (layer.query_dtype != layer.key_dtype || layer.key_dtype == KRUL_DTYPE_F32) {
        multiply_plain(layer, queries, keys, first_key, scores);
    }
    else if (layer.key_dtype == KRUL_DTYPE_BF16) {
        multiply_tile<true>(layer, queries, keys, first_key, scores);
    }
    else {
        multiply_tile<false>(layer, queries, keys, first_key, scores);
    }
    const uint8_t *real = arguments.real;
    if (real != NULL) {
        real += (int64_t)batch * arguments.n_keys_total;
    }
#pragma unroll
    for (int j = 0; j < n_groups; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int32_t here = position + GROUP_KEYS * j + 2 * (int32_t)(threadIdx.x % 4) + i % 2;
            float score = scores[j][i] * layer.scaling;
            score = layer.softcap > 0 ? cap(score, layer.softcap) : score;
            bool is_seen = here >= rows.first[i / 2] && here <= rows.last[i / 2] &&
                           here >= layer.key_start && here - layer.key_start < layer.n_keys;
            is_seen = is_seen && (real == NULL || real[here] != 0);
            scores[j][i] = is_seen ? score : -INFINITY;
        }
    }
}

/* Positions [from, to) of a layer that any query of a tile sees; the same for all lanes. */
static __device__ __forceinline__ void
find_range(const krul_device_observed &layer, const lane_rows &rows, int32_t *from_out,
           int32_t *to_out)
{
    int32_t from = INT32_MAX, to = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (rows.last[i] >= 0) {
            from = min(from, rows.first[i]);
            to = max(to, rows.last[i] + 1);
        }
    }
    *from_out = max(warp_min(from), layer.key_start);
    *to_out = min(warp_max(to), layer.key_start + layer.n_keys);
}

/* exp(value - highest), where highest is no smaller; a row that sees nothing has -inf and -inf. */
static __device__ __forceinline__ float
power_of(float value, float highest)
{
    return expf(value - (highest == -INFINITY ? 0.0f : highest));
}

/* ---- 1. rows ----------------------------------------------------------------------------------- */

static __global__ void
__launch_bounds__(N_ROW_WARPS *WARP) attend_rows(observe_arguments arguments)
{
    const krul_device_observe_group &group = arguments.group;
    const int32_t lane_tile = (int32_t)(blockIdx.x * N_ROW_WARPS + threadIdx.x / WARP);
    const int32_t batch = (int32_t)blockIdx.z;
    if (lane_tile >= group.n_lane_tiles) { /* a warp as a whole */
        return;
    }
    const krul_device_observed &layer = arguments.members[blockIdx.y];
    lane_rows rows = find_rows(arguments, batch, lane_tile);
    find_starts(arguments, layer, batch, rows);
    const uint32_t part = threadIdx.x % 4;
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    if (layer.sinks_at != 0 && part == 0) { /* one of the four threads of a row */
        const float *sinks = (const float *)(const void *)(arguments.image + layer.sinks_at);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = sinks[rows.head[i]];
            sum[i] = 1.0f;
        }
    }
    int32_t from, to;
    find_range(layer, rows, &from, &to);
    for (int32_t position = from; position < to; position += ROW_KEY_GROUPS * GROUP_KEYS) {
        float scores[ROW_KEY_GROUPS][4];
        score_tile<ROW_KEY_GROUPS>(arguments, layer, batch, rows, position, scores);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float before = highest[i];
#pragma unroll
            for (int j = 0; j < ROW_KEY_GROUPS; j++) {
                highest[i] = fmaxf(highest[i], fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
            }
            if (highest[i] != before && sum[i] != 0.0f) {
                sum[i] *= power_of(before, highest[i]);
            }
#pragma unroll
            for (int j = 0; j < ROW_KEY_GROUPS; j++) { /* NaN is no maximum but shows here */
                sum[i] += power_of(scores[j][2 * i], highest[i]);
                sum[i] += power_of(scores[j][2 * i + 1], highest[i]);
            }
        }
    }
#pragma unroll
    for (int bits = 1; bits < 4; bits *= 2) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float other = __shfl_xor_sync(ALL_LANES, highest[i], bits);
            float other_sum = __shfl_xor_sync(ALL_LANES, sum[i], bits);
            float both = fmaxf(highest[i], other);
            float own = sum[i] != 0.0f ? sum[i] * power_of(highest[i], both) : 0.0f;
            float others = other_sum != 0.0f ? other_sum * power_of(other, both) : 0.0f;
            highest[i] = both;
            sum[i] = own + others; /* the same in both: a sum of two has no order */
        }
    }
    if (part == 0) {
        int64_t at = ((int64_t)blockIdx.y * arguments.n_batch + batch) * group.n_lane_tiles +
                     lane_tile;
        float2 *out = (float2 *)(void *)(arguments.workspace + group.rows_at) + at * LANES +
                      threadIdx.x % WARP / 4;
        out[0] = make_float2(highest[0], sum[0] == 0.0f ? 0.0f : 1.0f / sum[0]);
        out[8] = make_float2(highest[1], sum[1] == 0.0f ? 0.0f : 1.0f / sum[1]);
    }
}

/* ---- 2. comparing ------------------------------------------------------------------------------ */

/* Shared memory of a thread block, in the order in which it lies there. */
struct compare_memory {
    double *distances; /* n_layer_blocks x PAIRS */
    double *importance; /* n_members x 2 */
    float *received; /* n_members x keys */
    float *rows; /* n_members x LANES x keys, in any order that is the same for all layers */
};

/* One layer's part of a tile: the rows, to shared memory, and what they add up to. */
template <int n_groups>
static __device__ __forceinline__ void
attend_tile(const observe_arguments &arguments, const compare_memory &memory, int32_t member,
            int32_t batch, int32_t lane_tile, int32_t position, lane_rows rows)
{
    const krul_device_observe_group &group = arguments.group;
    const krul_device_observed &layer = arguments.members[member];
    const uint32_t lane = threadIdx.x % WARP;
    float *out = memory.rows + (int64_t)member * LANES * GROUP_KEYS * n_groups;
    int32_t from, to;
    find_starts(arguments, layer, batch, rows);
    find_range(layer, rows, &from, &to);
    float parts[n_groups][4];
    if (position >= to || position + n_groups * GROUP_KEYS <= from) {
#pragma unroll
        for (int i = 0; i < 4 * n_groups; i++) {
            out[WARP * i + lane] = 0.0f;
        }
        return;
    }
    score_tile<n_groups>(arguments, layer, batch, rows, position, parts);
    int64_t at = ((int64_t)member * arguments.n_batch + batch) * group.n_lane_tiles + lane_tile;
    const float2 *found = (const float2 *)(const void *)(arguments.workspace + group.rows_at) +
                          at * LANES + lane / 4;
    const float2 row_sums[2] = {found[0], found[8]};
    float mass[2] = {0.0f, 0.0f};
    bool is_at_end = false;
    int32_t early_last[2], late_first[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int32_t first_real = arguments.first_real[batch], last = rows.last[i];
        int32_t n_tenth = max(1, (last - first_real + 1) / 10);
        early_last[i] = last < 0 ? -1 : first_real + n_tenth - 1;
        late_first[i] = last < 0 ? INT32_MAX : last - n_tenth + 1;
        is_at_end = is_at_end || position <= early_last[i] ||
                    position + n_groups * GROUP_KEYS > late_first[i];
    }
#pragma unroll
    for (int j = 0; j < n_groups; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) { /* what is not seen is 0, be the row what it may */
            float power = power_of(parts[j][i], row_sums[i / 2].x);
            parts[j][i] = parts[j][i] == -INFINITY ? 0.0f : power * row_sums[i / 2].y;
            out[WARP * (4 * j + i) + lane] = parts[j][i];
        }
    }
    if (__any_sync(ALL_LANES, is_at_end)) {
#pragma unroll
        for (int j = 0; j < n_groups; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int32_t here = position + GROUP_KEYS * j + 2 * (int32_t)(lane % 4) + i % 2;
                bool is_early = here >= arguments.first_real[batch] && here <= early_last[i / 2];
                bool is_late = here >= late_first[i / 2] && here <= rows.last[i / 2];
                mass[0] += is_early ? parts[j][i] : 0.0f;
                mass[1] += is_late ? parts[j][i] : 0.0f;
            }
        }
        mass[0] = warp_sum(mass[0]);
        mass[1] = warp_sum(mass[1]);
        if (lane == 0) { /* this warp's layer alone */
            memory.importance[2 * member] += (double)mass[0];
            memory.importance[2 * member + 1] += (double)mass[1];
        }
    }
#pragma unroll
    for (int j = 0; j < n_groups; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = parts[j][i] + parts[j][2 + i];
#pragma unroll
            for (int bits = 4; bits < WARP; bits *= 2) {
                sum += __shfl_xor_sync(ALL_LANES, sum, bits);
            }
            if (lane < 4) {
                memory.received[member * GROUP_KEYS * n_groups + GROUP_KEYS * j + 2 * lane + i] +=
                    sum;
            }
        }
    }
}

/* Of 2 n_half sums a lane gives half to the lane 2 n_half away, and adds what it gets to the others. */
template <int n_half>
static __device__ __forceinline__ void
give_half(float (&sums)[PAIRS])
{
    const bool is_upper = (threadIdx.x & (2 * n_half)) != 0;
#pragma unroll
    for (int i = 0; i < n_half; i++) {
        float given = is_upper ? sums[i] : sums[n_half + i];
        float kept = is_upper ? sums[n_half + i] : sums[i];
        sums[i] = kept + __shfl_xor_sync(ALL_LANES, given, 2 * n_half);
    }
}

/* Squared differences of 4 x 4 layers over a tile, added to their sums. The sixteen sums of a lane
 * become one as they are added across lanes: half of them are given away at each step. */
template <int n_groups>
static __device__ __forceinline__ void
compare_layers(const compare_memory &memory, int32_t n_members, int32_t lower, int32_t upper,
               double *out)
{
    const int32_t n_values = LANES * GROUP_KEYS * n_groups, n = KRUL_DEVICE_LAYERS_AT_ONCE;
    const uint32_t lane = threadIdx.x % WARP;
    const float *lower_rows[n], *upper_rows[n];
#pragma unroll
    for (int i = 0; i < n; i++) { /* past the end: the last layer again */
        lower_rows[i] = memory.rows + min(n * lower + i, n_members - 1) * n_values + lane;
        upper_rows[i] = memory.rows + min(n * upper + i, n_members - 1) * n_values + lane;
    }
    float sums[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        sums[i] = 0.0f;
    }
    for (int32_t at = 0; at < n_values; at += WARP) {
        float left[n], right[n];
#pragma unroll
        for (int i = 0; i < n; i++) {
            left[i] = lower_rows[i][at];
            right[i] = upper_rows[i][at];
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float difference = left[i / n] - right[i % n];
            sums[i] += difference * difference;
        }
    }
    give_half<PAIRS / 2>(sums);
    give_half<PAIRS / 4>(sums);
    give_half<PAIRS / 8>(sums);
    give_half<PAIRS / 16>(sums);
    sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], 1);
    if (lane % 2 == 0) {
        out[lane / 2] += (double)sums[0]; /* the upper bits of the lane told which sum was kept */
    }
}

template <int n_groups>
static __global__ void
__launch_bounds__(N_WARPS *WARP) compare_rows(observe_arguments arguments)
{
    const krul_device_observe_group &group = arguments.group;
    const int32_t n_members = group.n_members, n_keys = GROUP_KEYS * n_groups;
    const int32_t batch = (int32_t)blockIdx.z, split = (int32_t)blockIdx.y;
    const int32_t warp = (int32_t)(threadIdx.x / WARP);
    KRUL_SHARED(double, shared);
    compare_memory memory;
    memory.distances = shared;
    memory.importance = memory.distances + group.n_layer_blocks * PAIRS;
    memory.received = (float *)(void *)(memory.importance + 2 * n_members);
    memory.rows = memory.received + n_members * n_keys;
    const int32_t n_doubles = group.n_layer_blocks * PAIRS + 2 * n_members;
    for (int32_t i = (int32_t)threadIdx.x; i < n_doubles; i += N_WARPS * WARP) {
        shared[i] = 0.0;
    }
    const int32_t first_tile = (int32_t)((int64_t)group.n_lane_tiles * split / group.n_splits);
    const int32_t end_tile = (int32_t)((int64_t)group.n_lane_tiles * (split + 1) / group.n_splits);
    for (int32_t key_tile = (int32_t)blockIdx.x; key_tile < group.n_key_tiles;
         key_tile += group.n_key_blocks) {
        const int32_t position = key_tile * n_keys;
        for (int32_t i = (int32_t)threadIdx.x; i < n_members * n_keys; i += N_WARPS * WARP) {
            memory.received[i] = 0.0f;
        }
        __syncthreads();
        for (int32_t lane_tile = first_tile; lane_tile < end_tile; lane_tile++) {
            /* Queries before the keys see none of them; every thread finds the same. */
            const lane_rows rows = find_rows(arguments, batch, lane_tile);
            if (warp_max(max(rows.last[0], rows.last[1])) < position) {
                continue;
            }
            for (int32_t member = warp; member < n_members; member += N_WARPS) {
                attend_tile<n_groups>(arguments, memory, member, batch, lane_tile, position, rows);
            }
            __syncthreads();
            int32_t index = 0;
            for (int32_t lower = 0; lower * KRUL_DEVICE_LAYERS_AT_ONCE < n_members; lower++) {
                for (int32_t upper = lower; upper * KRUL_DEVICE_LAYERS_AT_ONCE < n_members;
                     upper++, index++) {
                    if (index % N_WARPS == warp) {
                        compare_layers<n_groups>(memory, n_members, lower, upper,
                                                 memory.distances + index * PAIRS);
                    }
                }
            }
            __syncthreads();
        }
        float *received = (float *)(void *)(arguments.workspace + group.received_at) +
                          ((int64_t)batch * group.n_splits + split) * n_members * arguments.n_seen;
        for (int32_t i = (int32_t)threadIdx.x; i < n_members * n_keys; i += N_WARPS * WARP) {
            int32_t key = position + i % n_keys;
            if (key < arguments.n_seen) {
                received[(int64_t)(i / n_keys) * arguments.n_seen + key] = memory.received[i];
            }
        } /* no barrier: the thread that read a number here is the one that sets it to 0 above */
    }
    const int64_t block = ((int64_t)batch * group.n_splits + split) * group.n_key_blocks +
                          blockIdx.x;
    const int32_t n_distances = group.n_layer_blocks * PAIRS;
    double *distances = (double *)(void *)(arguments.workspace + group.distances_at) +
                        block * n_distances;
    double *importance = (double *)(void *)(arguments.workspace + group.importance_at) +
                         block * 2 * n_members;
    for (int32_t i = (int32_t)threadIdx.x; i < n_doubles; i += N_WARPS * WARP) {
        (i < n_distances ? distances[i] : importance[i - n_distances]) = shared[i];
    }
}

/* ---- 3. sums ----------------------------------------------------------------------------------- */

/* The caller's sums, on the device. */
struct device_sums {
    double *distances;
    double *importance;
    float *received;
    int64_t received_stride;
    double weight;
    int32_t n_layers;
};

static __device__ __forceinline__ double
add_parts(const double *parts, int64_t n_parts, int64_t stride)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n_parts; i++) {
        sum += parts[i * stride];
    }
    return sum;
}

/* A thread is one number: of n_members x n_members distances, of 2 n_members masses, of n_members x
 * n_seen received. */
static __global__ void
__launch_bounds__(ADD_THREADS) add_sums(observe_arguments arguments, device_sums sums)
{
    const krul_device_observe_group &group = arguments.group;
    const int32_t n = KRUL_DEVICE_LAYERS_AT_ONCE;
    const int64_t n_members = group.n_members, n_pairs = n_members * n_members;
    const int64_t n_slices = (int64_t)arguments.n_batch * group.n_splits;
    const int64_t n_blocks = n_slices * group.n_key_blocks;
    const int32_t n_distances = group.n_layer_blocks * PAIRS;
    int64_t index = (int64_t)blockIdx.x * ADD_THREADS + threadIdx.x;
    if (index < n_pairs) {
        int32_t lower = (int32_t)(index / n_members), upper = (int32_t)(index % n_members);
        if (lower < upper) {
            int32_t n_layer_rows = (group.n_members + n - 1) / n, row = lower / n;
            int32_t block = row * n_layer_rows - row * (row - 1) / 2 + upper / n - row;
            const double *parts = (const double *)(const void *)(arguments.workspace +
                                                                 group.distances_at);
            double squared = sums.weight *
                             add_parts(parts + block * PAIRS + lower % n * n + upper % n, n_blocks,
                                       n_distances);
            int64_t first = arguments.members[lower].layer, second = arguments.members[upper].layer;
            sums.distances[first * sums.n_layers + second] += squared;
            sums.distances[second * sums.n_layers + first] += squared;
        }
        return;
    }
    index -= n_pairs;
    if (index < 2 * n_members) {
        const double *parts = (const double *)(const void *)(arguments.workspace +
                                                             group.importance_at);
        double mass = add_parts(parts + index, n_blocks, 2 * n_members);
        sums.importance[2 * (int64_t)arguments.members[index / 2].layer + index % 2] +=
            sums.weight * mass / group.n_heads;
        return;
    }
    index -= 2 * n_members;
    if (index < n_members * arguments.n_seen) {
        const float *parts = (const float *)(const void *)(arguments.workspace +
                                                           group.received_at) +
                             index;
        double mass = 0.0;
        for (int64_t i = 0; i < n_slices; i++) {
            mass += (double)parts[i * n_members * arguments.n_seen];
        }
        int64_t layer = arguments.members[index / arguments.n_seen].layer;
        sums.received[layer * sums.received_stride + index % arguments.n_seen] +=
            (float)(sums.weight * mass);
    }
}

/* Distances of layers that share no rows are NaN. */
static __global__ void
__launch_bounds__(ADD_THREADS)
    mark_unknown(const int32_t *classes, int32_t n_layers, double *distances)
{
    int64_t index = (int64_t)blockIdx.x * ADD_THREADS + threadIdx.x;
    if (index < (int64_t)n_layers * n_layers) {
        int32_t lower = classes[index / n_layers], upper = classes[index % n_layers];
        if (lower < 0 || lower != upper) {
            distances[index] = (double)NAN;
        }
    }
}

/* ---- on the host ------------------------------------------------------------------------------- */

typedef void compare_kernel(observe_arguments arguments);

static unsigned
blocks_of(int64_t n_threads)
{
    return (unsigned)((n_threads + ADD_THREADS - 1) / ADD_THREADS);
}

static krul_status
observe_group(const observe_arguments &arguments, const device_sums &sums, void *stream,
              krul_error *err)
{
    const krul_device_observe_group &group = arguments.group;
    unsigned n_batch = (unsigned)arguments.n_batch;
    dim3 row_grid((unsigned)((group.n_lane_tiles + N_ROW_WARPS - 1) / N_ROW_WARPS),
                  (unsigned)group.n_members, n_batch);
    dim3 grid((unsigned)group.n_key_blocks, (unsigned)group.n_splits, n_batch);
    compare_kernel *compare = group.n_key_groups == 4   ? compare_rows<4>
                              : group.n_key_groups == 2 ? compare_rows<2>
                                                        : compare_rows<1>;
    krul_status status = krul_cuda_check(
        cudaFuncSetAttribute(compare, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)group.shared_bytes),
        "cudaFuncSetAttribute", err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    KRUL_LAUNCH(attend_rows, row_grid, dim3(N_ROW_WARPS * WARP), 0, stream, arguments);
    KRUL_LAUNCH(compare, grid, dim3(N_WARPS * WARP), group.shared_bytes, stream, arguments);
    int64_t n_numbers = (int64_t)group.n_members * (group.n_members + 2 + arguments.n_seen);
    KRUL_LAUNCH(add_sums, dim3(blocks_of(n_numbers)), dim3(ADD_THREADS), 0, stream, arguments,
                sums);
    return krul_cuda_check(cudaGetLastError(), "observing attention", err);
}

extern "C" krul_status
krul_cuda_estimator_observe(const krul_device_observation *observation, const uint8_t *image,
                            uint8_t *workspace, krul_estimator_sums *sums, void *stream,
                            krul_error *err)
{
    krul_status status = krul_cuda_check(cudaMemcpyAsync(workspace, image, observation->image_bytes,
                                                         cudaMemcpyHostToDevice,
                                                         (cudaStream_t)stream),
                                         "cudaMemcpyAsync", err);
    device_sums out = {};
    out.distances = sums->distances;
    out.importance = sums->importance;
    out.received = sums->received;
    out.received_stride = observation->received_stride;
    out.weight = observation->weight;
    out.n_layers = observation->n_layers;
    observe_arguments arguments = {};
    arguments.image = workspace;
    arguments.workspace = workspace;
    arguments.positions = (const int32_t *)(const void *)(workspace + observation->positions_at);
    arguments.real = observation->real_at != 0 ? workspace + observation->real_at : NULL;
    arguments.first_real = (const int32_t *)(const void *)(workspace + observation->first_real_at);
    arguments.n_batch = observation->n_batch;
    arguments.n_rows = observation->n_rows;
    arguments.n_keys_total = observation->n_keys_total;
    arguments.n_seen = observation->n_seen;
    for (int32_t i = 0; i < observation->n_groups && status == KRUL_STATUS_OK; i++) {
        arguments.group = observation->groups[i];
        arguments.members =
            (const krul_device_observed *)(const void *)(workspace + arguments.group.members_at);
        status = observe_group(arguments, out, stream, err);
    }
    if (status == KRUL_STATUS_OK) {
        int64_t n_pairs = (int64_t)observation->n_layers * observation->n_layers;
        KRUL_LAUNCH(mark_unknown, dim3(blocks_of(n_pairs)), dim3(ADD_THREADS), 0, stream,
                    (const int32_t *)(const void *)(workspace + observation->classes_at),
                    observation->n_layers, out.distances);
        status = krul_cuda_check(cudaGetLastError(), "mark_unknown", err);
    }
    if (status == KRUL_STATUS_OK) {
        *sums->n_rows += observation->weight * observation->n_real_rows;
    }
    return status;
}

/* entropy_encode.cu - codes blocks of one layer as codec exact: the CPU's bytes.
 *
 * Six launches, each a pass over a batch: split into exponents and the rest; offsets per channel;
 * counts with and without offsets; tables, and whether coding pays; chunks, backwards, a warp to each,
 * every lane a state; where the chunks go, and moving them there. Only the tables are serial, some
 * ten thousand steps of one thread per block, and nobody waits for them: saving runs beside decoding. */
#include "compressor.cuh"

extern "C" {
#include "codec_exact.h"
#include "entropy.h"
}

namespace {

enum {
    N_THREADS = 128,
    N_WARPS = N_THREADS / 32,
    TILE_TOKENS = KRUL_DEVICE_TILE_TOKENS,
    N_SYMBOLS = 256,
    WHOLE = 1 << KRUL_ENTROPY_PROBABILITY_BITS,
    MAX_FREQUENCY = WHOLE - 1,
    LOG_FRACTION_BITS = 8,
    CHUNK_SYMBOLS = 1 << KRUL_ENTROPY_CHUNK_BITS,
    CHUNK_BYTES = KRUL_DEVICE_EXACT_CHUNK_BYTES,
};

#define ALL_LANES 0xffffffffu

/* What is known of a block while it is coded. */
struct exact_state {
    uint32_t counts[2][N_SYMBOLS]; /* of the coded bytes; of their differences from the offsets */
    krul_entropy_encoder_symbol encoder[N_SYMBOLS];
    uint16_t frequency[2][N_SYMBOLS];
    uint8_t table[KRUL_ENTROPY_MAX_TABLE_BYTES];
    uint32_t is_split;
    uint32_t has_offsets;
    int32_t stream_mode;
    uint32_t table_bytes;
    uint32_t constant;
    uint32_t capacity_bytes;
    uint32_t n_sized; /* bytes of all chunks */
};

static_assert(sizeof(exact_state) <= KRUL_DEVICE_EXACT_STATE_BYTES, "the host leaves room for it");
static_assert((int)CHUNK_BYTES == KRUL_ENTROPY_STATES_BYTES + 2 * (int)CHUNK_SYMBOLS,
              "a symbol sheds at most a word");

/* A block, and its scratch. */
struct exact_block {
    const krul_device_descriptor *about;
    exact_state *state;
    uint8_t *symbols[2]; /* coded bytes, differences */
    uint8_t *offsets;
    uint32_t *sizes; /* of chunks, then where they end */
    uint8_t *chunks;
    uint8_t *payload;
    uint32_t n_elements;
    uint32_t n_offsets;
};

static __device__ __forceinline__ exact_block
block_at(const krul_encode_arguments &arguments, uint32_t index)
{
    exact_block out;
    const krul_device_descriptor *about = arguments.descriptors + index;
    out.about = about;
    out.state = (exact_state *)(arguments.workspace + about->tiles_offset);
    out.symbols[0] = arguments.workspace + about->kept_offset[0];
    out.symbols[1] = arguments.workspace + about->kept_offset[1];
    out.offsets = arguments.workspace + about->offsets_offset;
    out.sizes = (uint32_t *)(arguments.workspace + about->directory_offset);
    out.chunks = arguments.workspace + about->stream_offset;
    out.payload = arguments.payloads + about->data_offset;
    out.n_offsets = (uint32_t)(about->n_planes * about->head_dim);
    out.n_elements = out.n_offsets * (uint32_t)about->n_tokens;
    return out;
}

/* The tile of a thread block, as elements in the order batch, head, token, channel. */
struct exact_tile {
    exact_block block;
    int32_t plane;
    int32_t first_token;
    int32_t n_tokens;
    const uint8_t *rows; /* of the view */
};

static __device__ __forceinline__ exact_tile
tile_at(const krul_encode_arguments &arguments)
{
    exact_tile out;
    out.block = block_at(arguments, arguments.units[blockIdx.x]);
    const krul_device_descriptor *about = out.block.about;
    const krul_device_output &input = about->outputs[0];
    int32_t unit = (int32_t)blockIdx.x - about->first_unit;
    out.plane = unit / about->n_tiles;
    out.first_token = (unit - out.plane * about->n_tiles) * TILE_TOKENS;
    out.n_tokens = min((int32_t)TILE_TOKENS, about->n_tokens - out.first_token);
    int32_t batch = out.plane / about->n_heads;
    int32_t head = out.plane - batch * about->n_heads;
    out.rows = (const uint8_t *)input.address + batch * input.batch_bytes +
               head * input.head_bytes + out.first_token * input.token_bytes;
    return out;
}

/* ---- passes over the elements ------------------------------------------------------------------ */

/* The eight bits below the sign, and the rest; and the energy of what is finite. */
template <krul_dtype dtype>
__global__ void
__launch_bounds__(N_THREADS) split_kernel(krul_encode_arguments arguments)
{
    typedef typename krul_element<dtype>::bits element;
    exact_tile tile = tile_at(arguments);
    int32_t head_dim = tile.block.about->head_dim;
    uint8_t *kept = tile.block.payload + KRUL_EXACT_HEADER_BYTES;
    uint32_t first = ((uint32_t)tile.plane * (uint32_t)tile.block.about->n_tokens +
                      (uint32_t)tile.first_token) *
                     (uint32_t)head_dim;
    double sums[2] = {0, 0};
    for (int32_t i = (int32_t)threadIdx.x; i < tile.n_tokens * head_dim; i += N_THREADS) {
        int32_t token = i / head_dim;
        const element *row = (const element *)(tile.rows +
                                               token * tile.block.about->outputs[0].token_bytes);
        element bits = row[i - token * head_dim];
        uint32_t at = first + (uint32_t)i;
        if (dtype == KRUL_DTYPE_F32) {
            uint32_t word = (uint32_t)bits;
            uint32_t rest = (word >> 31) << 23 | (word & 0x7fffffu);
            tile.block.symbols[0][at] = (uint8_t)(word >> 23);
            uint8_t *out = kept + 3 * (int64_t)at;
            out[0] = (uint8_t)rest;
            out[1] = (uint8_t)(rest >> 8);
            out[2] = (uint8_t)(rest >> 16);
        }
        else {
            uint32_t word = (uint32_t)bits;
            tile.block.symbols[0][at] = (uint8_t)(word >> 7);
            kept[at] = (uint8_t)((word >> 15) << 7 | (word & 0x7fu));
        }
        double value = (double)krul_widen<dtype>(bits);
        sums[1] += isfinite(value) ? value * value : 0.0;
    }
    krul_write_errors(sums, arguments.errors + 2 * (int64_t)blockIdx.x);
}

/* The rounded mean of each channel's coded bytes, by the first tile of a plane. */
__global__ void
__launch_bounds__(N_THREADS) offsets_kernel(krul_encode_arguments arguments)
{
    exact_tile tile = tile_at(arguments);
    const krul_device_descriptor *about = tile.block.about;
    uint32_t n_tokens = (uint32_t)about->n_tokens, head_dim = (uint32_t)about->head_dim;
    if (tile.first_token != 0) {
        return;
    }
    if (tile.plane == 0) {
        for (uint32_t i = threadIdx.x; i < 2 * N_SYMBOLS; i += N_THREADS) {
            tile.block.state->counts[i / N_SYMBOLS][i % N_SYMBOLS] = 0;
        }
    }
    const uint8_t *coded = tile.block.symbols[0] + (uint32_t)tile.plane * n_tokens * head_dim;
    for (uint32_t channel = threadIdx.x; channel < head_dim; channel += N_THREADS) {
        uint64_t sum = 0;
        for (uint32_t token = 0; token < n_tokens; token++) {
            sum += coded[token * head_dim + channel];
        }
        tile.block.offsets[(uint32_t)tile.plane * head_dim + channel] = (uint8_t)((sum +
                                                                                   n_tokens / 2) /
                                                                                  n_tokens);
    }
}

__global__ void
__launch_bounds__(N_THREADS) count_kernel(krul_encode_arguments arguments)
{
    KRUL_SHARED(uint32_t, counts);
    exact_tile tile = tile_at(arguments);
    int32_t head_dim = tile.block.about->head_dim;
    const uint8_t *offsets = tile.block.offsets + (int64_t)tile.plane * head_dim;
    uint32_t first = ((uint32_t)tile.plane * (uint32_t)tile.block.about->n_tokens +
                      (uint32_t)tile.first_token) *
                     (uint32_t)head_dim;
    for (uint32_t i = threadIdx.x; i < 2 * N_SYMBOLS; i += N_THREADS) {
        counts[i] = 0;
    }
    __syncthreads();
    for (int32_t i = (int32_t)threadIdx.x; i < tile.n_tokens * head_dim; i += N_THREADS) {
        uint32_t coded = tile.block.symbols[0][first + (uint32_t)i];
        uint32_t difference = (coded - offsets[i % head_dim]) & 0xffu;
        tile.block.symbols[1][first + (uint32_t)i] = (uint8_t)difference;
        atomicAdd(&counts[coded], 1u);
        atomicAdd(&counts[N_SYMBOLS + difference], 1u);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2 * N_SYMBOLS; i += N_THREADS) {
        if (counts[i] != 0) {
            atomicAdd(&tile.block.state->counts[i / N_SYMBOLS][i % N_SYMBOLS], counts[i]);
        }
    }
}

/* ---- tables: entropy.c's, by one thread --------------------------------------------------------- */

/* Change one frequency by one so that the coded size grows least, or shrinks most. */
static __device__ void
adjust_one(const uint32_t *counts, bool is_increase, uint16_t *frequency)
{
    int best = -1;
    uint64_t best_weight = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        uint32_t twice = 2u * frequency[symbol];
        uint64_t weight = is_increase ? twice + 1 : twice - 1;
        bool is_allowed = is_increase ? counts[symbol] != 0 && frequency[symbol] < MAX_FREQUENCY
                                      : frequency[symbol] > 1;
        if (!is_allowed) {
            continue;
        }
        uint64_t here = counts[symbol] * best_weight;
        uint64_t there = best < 0 ? 0 : counts[best] * weight;
        if (best < 0 || (is_increase ? there < here : here < there)) {
            best = symbol;
            best_weight = weight;
        }
    }
    frequency[best] = (uint16_t)(is_increase ? frequency[best] + 1 : frequency[best] - 1);
}

/* Returns how many symbols occur; last_out is the last of them. */
static __device__ int
build_table(const uint32_t *counts, uint32_t total, uint16_t *frequency, uint32_t *last_out)
{
    int n_distinct = 0;
    int32_t sum = 0;
    for (uint32_t symbol = 0; symbol < N_SYMBOLS; symbol++) {
        frequency[symbol] = 0;
        if (counts[symbol] != 0) {
            n_distinct++;
            *last_out = symbol;
        }
    }
    if (n_distinct == 1) {
        frequency[*last_out] = MAX_FREQUENCY;
        frequency[*last_out ^ 1] = 1;
        return 1;
    }
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        if (counts[symbol] == 0) {
            continue;
        }
        uint64_t share = ((uint64_t)counts[symbol] * WHOLE + total / 2) / total;
        share = share == 0 ? 1 : share;
        frequency[symbol] = (uint16_t)(share > MAX_FREQUENCY ? (uint64_t)MAX_FREQUENCY : share);
        sum += frequency[symbol];
    }
    for (; sum != WHOLE; sum += sum < WHOLE ? 1 : -1) {
        adjust_one(counts, sum < WHOLE, frequency);
    }
    return n_distinct;
}

static __device__ uint32_t
log2_fixed(uint32_t value)
{
    uint32_t whole = 31u - (uint32_t)__clz((int)value);
    uint32_t result = whole;
    uint64_t mantissa = (uint64_t)value << (31 - whole);
    for (int i = 0; i < LOG_FRACTION_BITS; i++) {
        mantissa = mantissa * mantissa >> 31;
        uint32_t bit = (uint32_t)(mantissa >> 32);
        mantissa >>= bit;
        result = result << 1 | bit;
    }
    return result;
}

static __device__ uint64_t
estimate_bytes(const uint32_t *counts, const uint16_t *frequency, uint32_t n_symbols)
{
    uint64_t cost = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        if (counts[symbol] != 0) {
            uint32_t bits = (KRUL_ENTROPY_PROBABILITY_BITS << LOG_FRACTION_BITS) -
                            log2_fixed(frequency[symbol]);
            cost += (uint64_t)counts[symbol] * bits;
        }
    }
    uint64_t n_chunks = (n_symbols >> KRUL_ENTROPY_CHUNK_BITS) + 1;
    return (cost >> (LOG_FRACTION_BITS + 3)) + n_chunks * (KRUL_ENTROPY_STATES_BYTES + 4) +
           KRUL_ENTROPY_HEADER_BYTES;
}

static __device__ uint32_t
write_table(const uint16_t *frequencies, uint8_t *out)
{
    int first = 0, last = N_SYMBOLS - 1;
    uint32_t n_bytes = 2;
    while (frequencies[first] == 0) {
        first++;
    }
    while (frequencies[last] == 0) {
        last--;
    }
    out[0] = (uint8_t)first;
    out[1] = (uint8_t)last;
    for (int symbol = first; symbol <= last; symbol++) {
        uint32_t frequency = frequencies[symbol];
        if (frequency >= 128) {
            out[n_bytes++] = (uint8_t)(0x80u | frequency >> 8);
        }
        out[n_bytes++] = (uint8_t)frequency;
    }
    if (n_bytes % 2 != 0) {
        out[n_bytes++] = 0;
    }
    return n_bytes;
}

/* A thread per block: with offsets or without, and does coding pay? */
__global__ void __launch_bounds__(32)
    tables_kernel(krul_encode_arguments arguments, int32_t n_blocks)
{
    int32_t index = (int32_t)(blockIdx.x * blockDim.x + threadIdx.x);
    if (index >= n_blocks) {
        return;
    }
    exact_block block = block_at(arguments, (uint32_t)index);
    exact_state *state = block.state;
    uint64_t estimates[2];
    uint32_t last[2] = {0, 0};
    int n_distinct[2];
    state->is_split = 0;
    state->n_sized = 0;
    if (block.n_elements <= KRUL_ENTROPY_STATES_BYTES) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        n_distinct[i] = build_table(state->counts[i], block.n_elements, state->frequency[i],
                                    &last[i]);
        estimates[i] = estimate_bytes(state->counts[i], state->frequency[i], block.n_elements);
    }
    int chosen = estimates[1] + block.n_offsets < estimates[0] ? 1 : 0;
    uint32_t overhead = chosen == 1 ? block.n_offsets : 0;
    state->has_offsets = (uint32_t)chosen;
    if (overhead >= block.n_elements) {
        return;
    }
    state->capacity_bytes = block.n_elements - overhead - 1;
    if (n_distinct[chosen] == 1) {
        state->stream_mode = KRUL_ENTROPY_CONSTANT;
        state->constant = last[chosen];
        state->is_split = state->capacity_bytes > KRUL_ENTROPY_HEADER_BYTES;
        return;
    }
    if (estimates[chosen] > state->capacity_bytes) {
        return;
    }
    state->stream_mode = KRUL_ENTROPY_CODED;
    state->table_bytes = write_table(state->frequency[chosen], state->table);
    uint32_t start = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        uint32_t frequency = state->frequency[chosen][symbol];
        krul_entropy_encoder_symbol made;
        made.reciprocal = frequency == 0
                              ? 0
                              : ((uint64_t)1 << KRUL_ENTROPY_RECIPROCAL_BITS) / frequency + 1;
        made.limit = frequency << 20;
        made.complement = (uint16_t)(WHOLE - frequency);
        made.start = (uint16_t)start;
        state->encoder[symbol] = made;
        start += frequency;
    }
    state->is_split = KRUL_ENTROPY_HEADER_BYTES + state->table_bytes +
                          4 * (uint32_t)block.about->n_chunks <=
                      state->capacity_bytes;
}

/* ---- chunks ------------------------------------------------------------------------------------ */

/* A warp per chunk, last symbol first; a chunk ends where its room ends. */
__global__ void
__launch_bounds__(N_THREADS) chunks_kernel(krul_encode_arguments arguments)
{
    exact_block block = block_at(arguments, blockIdx.y);
    const exact_state *state = block.state;
    uint32_t lane = threadIdx.x % 32;
    uint32_t index = blockIdx.x * N_WARPS + threadIdx.x / 32;
    if (index >= (uint32_t)block.about->n_chunks || state->is_split == 0 ||
        state->stream_mode != KRUL_ENTROPY_CODED) {
        return;
    }
    uint32_t first = index << KRUL_ENTROPY_CHUNK_BITS;
    uint32_t n_here = min((uint32_t)CHUNK_SYMBOLS, block.n_elements - first);
    const uint8_t *symbols = block.symbols[state->has_offsets] + first;
    uint16_t *words = (uint16_t *)(block.chunks + (int64_t)(index + 1) * CHUNK_BYTES);
    uint32_t coder = KRUL_ENTROPY_STATE_FLOOR;
    for (uint32_t round = (n_here + 31) / 32; round-- > 0;) {
        uint32_t at = 32 * round + lane;
        bool is_active = at < n_here;
        krul_entropy_encoder_symbol symbol = state->encoder[is_active ? symbols[at] : 0];
        bool is_high = is_active && coder >= symbol.limit;
        uint32_t shedding = __ballot_sync(ALL_LANES, is_high);
        words -= __popc(shedding);
        if (is_high) {
            words[__popc(shedding & ((1u << lane) - 1))] = (uint16_t)coder;
            coder >>= 16;
        }
        if (is_active) {
            uint32_t quotient = (uint32_t)((coder * symbol.reciprocal) >>
                                           KRUL_ENTROPY_RECIPROCAL_BITS);
            coder += symbol.start + quotient * symbol.complement;
        }
    }
    words -= KRUL_ENTROPY_STATES_BYTES / 2;
    words[2 * lane] = (uint16_t)coder;
    words[2 * lane + 1] = (uint16_t)(coder >> 16);
    if (lane == 0) {
        const uint8_t *end = block.chunks + (int64_t)(index + 1) * CHUNK_BYTES;
        block.sizes[index] = (uint32_t)(end - (const uint8_t *)words);
    }
}

static __device__ void
store_bytes(uint8_t *out, uint64_t value, int n_bytes)
{
    for (int i = 0; i < n_bytes; i++) {
        out[i] = (uint8_t)(value >> 8 * i);
    }
}

/* A thread per block: where chunks end, whether they fit, and all headers. */
__global__ void __launch_bounds__(32)
    headers_kernel(krul_encode_arguments arguments, int32_t n_blocks, uint32_t element_bytes)
{
    int32_t index = (int32_t)(blockIdx.x * blockDim.x + threadIdx.x);
    if (index >= n_blocks) {
        return;
    }
    exact_block block = block_at(arguments, (uint32_t)index);
    exact_state *state = block.state;
    uint32_t n_chunks = (uint32_t)block.about->n_chunks;
    uint64_t kept_bytes = (uint64_t)block.n_elements * (element_bytes - 1);
    uint32_t overhead = state->has_offsets != 0 ? block.n_offsets : 0;
    uint32_t fixed_bytes = KRUL_ENTROPY_HEADER_BYTES + 1;
    krul_device_result *result = &arguments.results[block.about->index];
    uint32_t sum = 0;
    if (state->is_split != 0 && state->stream_mode == KRUL_ENTROPY_CODED) {
        fixed_bytes = KRUL_ENTROPY_HEADER_BYTES + state->table_bytes + 4 * n_chunks;
        for (uint32_t i = 0; i < n_chunks; i++) {
            sum += block.sizes[i];
            block.sizes[i] = sum;
        }
        state->is_split = sum <= state->capacity_bytes - fixed_bytes;
    }
    if (state->is_split == 0) {
        store_bytes(block.payload, KRUL_EXACT_RAW, KRUL_EXACT_HEADER_BYTES);
        result->payload_bytes = KRUL_EXACT_HEADER_BYTES +
                                (uint64_t)block.n_elements * element_bytes;
        return;
    }
    uint64_t mode = state->has_offsets != 0 ? KRUL_EXACT_SPLIT_WITH_OFFSETS : KRUL_EXACT_SPLIT;
    uint64_t stream_bytes = (uint64_t)fixed_bytes + sum;
    uint8_t *stream = block.payload + KRUL_EXACT_HEADER_BYTES + kept_bytes + overhead;
    bool is_coded = state->stream_mode == KRUL_ENTROPY_CODED;
    store_bytes(block.payload, stream_bytes << 8 | mode, KRUL_EXACT_HEADER_BYTES);
    stream[0] = (uint8_t)state->stream_mode;
    stream[1] = (uint8_t)KRUL_ENTROPY_CHUNK_BITS;
    store_bytes(stream + 2, is_coded ? state->table_bytes : 0, 2);
    store_bytes(stream + 4, block.n_elements, 8);
    stream += KRUL_ENTROPY_HEADER_BYTES;
    if (is_coded) {
        for (uint32_t i = 0; i < state->table_bytes; i++) {
            stream[i] = state->table[i];
        }
        for (uint32_t i = 0; i < n_chunks; i++) {
            store_bytes(stream + state->table_bytes + 4 * i, block.sizes[i], 4);
        }
    }
    else {
        stream[0] = (uint8_t)state->constant;
    }
    for (uint32_t i = 0; i < overhead; i++) {
        block.payload[KRUL_EXACT_HEADER_BYTES + kept_bytes + i] = block.offsets[i];
    }
    result->payload_bytes = KRUL_EXACT_HEADER_BYTES + kept_bytes + overhead + stream_bytes;
}

/* A warp per chunk: to where it belongs, which begins at any byte. */
__global__ void
__launch_bounds__(N_THREADS) move_kernel(krul_encode_arguments arguments, uint32_t element_bytes)
{
    exact_block block = block_at(arguments, blockIdx.y);
    const exact_state *state = block.state;
    uint32_t index = blockIdx.x * N_WARPS + threadIdx.x / 32;
    if (index >= (uint32_t)block.about->n_chunks || state->is_split == 0 ||
        state->stream_mode != KRUL_ENTROPY_CODED) {
        return;
    }
    uint32_t begin = index == 0 ? 0 : block.sizes[index - 1];
    uint32_t n_bytes = block.sizes[index] - begin;
    const uint8_t *from = block.chunks + (int64_t)(index + 1) * CHUNK_BYTES - n_bytes;
    uint8_t *to = block.payload + KRUL_EXACT_HEADER_BYTES +
                  (uint64_t)block.n_elements * (element_bytes - 1) +
                  (state->has_offsets != 0 ? block.n_offsets : 0) + KRUL_ENTROPY_HEADER_BYTES +
                  state->table_bytes + 4 * (uint32_t)block.about->n_chunks + begin;
    for (uint32_t i = threadIdx.x % 32; i < n_bytes; i += 32) {
        to[i] = from[i];
    }
}

/* What coding does not make smaller: the elements as they are. */
template <krul_dtype dtype>
__global__ void
__launch_bounds__(N_THREADS) raw_kernel(krul_encode_arguments arguments)
{
    typedef typename krul_element<dtype>::bits element;
    exact_tile tile = tile_at(arguments);
    if (tile.block.state->is_split != 0) { /* the same for the whole thread block */
        return;
    }
    int32_t head_dim = tile.block.about->head_dim;
    int64_t first = ((int64_t)tile.plane * tile.block.about->n_tokens + tile.first_token) *
                    head_dim;
    element *out = (element *)(tile.block.payload + KRUL_EXACT_HEADER_BYTES) + first;
    for (int32_t i = (int32_t)threadIdx.x; i < tile.n_tokens * head_dim; i += N_THREADS) {
        int32_t token = i / head_dim;
        const element *row = (const element *)(tile.rows +
                                               token * tile.block.about->outputs[0].token_bytes);
        out[i] = row[i - token * head_dim];
    }
}

template <krul_dtype dtype>
void
launch(void *stream, const krul_device_encode_batch *batch, const krul_encode_arguments &arguments)
{
    void (*split)(krul_encode_arguments) = split_kernel<dtype>;
    void (*raw)(krul_encode_arguments) = raw_kernel<dtype>;
    unsigned n_units = (unsigned)batch->n_units;
    unsigned n_warps = ((unsigned)batch->n_blocks + 31) / 32;
    uint32_t element_bytes = (uint32_t)sizeof(typename krul_element<dtype>::bits);
    size_t sums_bytes = N_WARPS * 2 * sizeof(double);
    dim3 by_chunk(((unsigned)batch->n_chunks + N_WARPS - 1) / N_WARPS, (unsigned)batch->n_blocks);
    KRUL_LAUNCH(split, n_units, N_THREADS, sums_bytes, stream, arguments);
    KRUL_LAUNCH(offsets_kernel, n_units, N_THREADS, 0, stream, arguments);
    KRUL_LAUNCH(count_kernel, n_units, N_THREADS, 2 * N_SYMBOLS * sizeof(uint32_t), stream,
                arguments);
    KRUL_LAUNCH(tables_kernel, n_warps, 32, 0, stream, arguments, batch->n_blocks);
    KRUL_LAUNCH(chunks_kernel, by_chunk, N_THREADS, 0, stream, arguments);
    KRUL_LAUNCH(headers_kernel, n_warps, 32, 0, stream, arguments, batch->n_blocks, element_bytes);
    KRUL_LAUNCH(move_kernel, by_chunk, N_THREADS, 0, stream, arguments, element_bytes);
    KRUL_LAUNCH(raw, n_units, N_THREADS, 0, stream, arguments);
}

} // namespace

void
krul_launch_exact_encode(void *stream, const krul_device_encode_batch *batch,
                         const krul_encode_arguments *arguments)
{
    if (batch->dtype == KRUL_DTYPE_F32) {
        launch<KRUL_DTYPE_F32>(stream, batch, *arguments);
    }
    else if (batch->dtype == KRUL_DTYPE_F16) {
        launch<KRUL_DTYPE_F16>(stream, batch, *arguments);
    }
    else {
        launch<KRUL_DTYPE_BF16>(stream, batch, *arguments);
    }
}

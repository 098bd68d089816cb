/* entropy.cu - codec exact on the device: interleaved rANS, a warp to a chunk, joined as it decodes.
 *
 * A chunk's 32 states are a warp's lanes: a ballot says which of them need a word, a count of the
 * lower ones which word each takes. A round is a chain - look a slot up in shared memory, multiply,
 * compare, ballot, fetch the word - of some 100 cycles, and a chunk of 2^15 symbols is 1,024 rounds,
 * so that one chunk takes about 65 microseconds however fast the memory is; throughput comes from
 * chunks side by side. 16 KB of table per thread block of four warps lets a multiprocessor hold a
 * dozen blocks, more than a batch of common size has chunks for.
 *
 * Words come from registers: the warp holds 64 of them, and the next 64 are under way long before
 * they are needed, so that the chain never waits for memory. Exponents never reach memory: each
 * round's 32 symbols are joined with the bytes that were kept, which are loaded four rounds ahead,
 * and written where they belong, 64 or 128 contiguous bytes to a warp. */
#include "compressor.cuh"

extern "C" {
#include "entropy.h"
}

namespace {

enum {
    N_WARPS = KRUL_DEVICE_WARPS,
    N_THREADS = 32 * N_WARPS,
    N_SLOTS = KRUL_ENTROPY_N_SLOTS,
    N_SYMBOLS = 256,
    SHARED_BYTES = 4 * (N_SLOTS + N_SYMBOLS + N_WARPS),
    WINDOW_WORDS = 64, /* 16-bit words that a warp holds, two to a lane */
    ROUNDS_AT_ONCE = 4,
    STATE_FLOOR = KRUL_ENTROPY_STATE_FLOOR,
};

#define ALL_LANES 0xffffffffu

/* ---- the table --------------------------------------------------------------------------------- */

/* The slots of a table, by all threads of the block. starts and sums are scratch. Sums are known to be
 * 4096. */
static __device__ __forceinline__ void
build_slots(const uint16_t *frequencies, uint32_t *slots, uint32_t *starts, uint32_t *sums)
{
    static_assert((int)N_SYMBOLS == 2 * (int)N_THREADS, "a thread takes two symbols");
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t first = __ldg(frequencies + 2 * threadIdx.x);
    uint32_t second = __ldg(frequencies + 2 * threadIdx.x + 1);
    uint32_t sum = first + second;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
        uint32_t below = __shfl_up_sync(ALL_LANES, sum, step);
        sum += lane >= step ? below : 0;
    }
    if (lane == 31) {
        sums[warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (unsigned i = 0; i < N_WARPS; i++) {
        sum += i < warp ? sums[i] : 0;
    }
    starts[2 * threadIdx.x] = sum - second - first;
    starts[2 * threadIdx.x + 1] = sum - second;
    __syncthreads();
    for (uint32_t slot = threadIdx.x; slot < N_SLOTS; slot += N_THREADS) {
        uint32_t symbol = 0; /* the last one that starts here or before */
#pragma unroll
        for (uint32_t step = N_SYMBOLS / 2; step > 0; step /= 2) {
            symbol += starts[symbol + step] <= slot ? step : 0;
        }
        uint32_t end = symbol + 1 < N_SYMBOLS ? starts[symbol + 1] : (uint32_t)N_SLOTS;
        slots[slot] = (end - starts[symbol]) << 20 | (slot - starts[symbol]) << 8 | symbol;
    }
    __syncthreads();
}

/* ---- a chunk ----------------------------------------------------------------------------------- */

/* The words of a chunk, as a warp reads them. Beyond their end there are zeros. */
struct word_stream {
    const uint8_t *bytes;
    int32_t n_bytes;
    int32_t next_byte; /* of the window after `ahead` */
    uint32_t here, ahead; /* this lane's two words of the window, and of the next one */
    int32_t position; /* in the window */
    int32_t n_taken;
};

static __device__ __forceinline__ uint32_t
load_window(word_stream *stream)
{
    int32_t at = stream->next_byte + 4 * (int32_t)(threadIdx.x % 32);
    uint32_t word[1] = {0};
    stream->next_byte += 2 * WINDOW_WORDS;
    if (at < stream->n_bytes) {
        krul_load_words(stream->bytes + at, word);
    }
    return word[0];
}

static __device__ __forceinline__ void
open_words(word_stream *stream, const uint8_t *bytes, int32_t n_bytes)
{
    stream->bytes = bytes;
    stream->n_bytes = n_bytes;
    stream->next_byte = 0;
    stream->position = 0;
    stream->n_taken = 0;
    stream->here = load_window(stream);
    stream->ahead = load_window(stream);
}

/* The next words, for the lanes that take one. */
static __device__ __forceinline__ uint32_t
take_words(word_stream *stream, bool is_taking)
{
    uint32_t taking = __ballot_sync(ALL_LANES, is_taking);
    uint32_t below = taking & ((1u << threadIdx.x % 32) - 1);
    int32_t n_words = __popc(taking);
    int32_t at = stream->position + __popc(below);
    uint32_t pair = __shfl_sync(ALL_LANES, stream->here, at / 2 % 32);
    stream->position += n_words;
    stream->n_taken += n_words;
    if (stream->position >= WINDOW_WORDS) { /* the same for all lanes; once in a dozen rounds */
        uint32_t next = __shfl_sync(ALL_LANES, stream->ahead, at / 2 % 32);
        pair = at >= WINDOW_WORDS ? next : pair;
        stream->position -= WINDOW_WORDS;
        stream->here = stream->ahead;
        stream->ahead = load_window(stream);
    }
    return at % 2 != 0 ? pair >> 16 : pair & 0xffffu;
}

/* Where a lane's next element stands, in the order batch, head, token, channel. */
struct element_place {
    int32_t plane;
    int32_t token;
    int32_t channel;
    uint8_t *plane_out;
    const uint8_t *offsets; /* of the plane; NULL: there are none */
};

static __device__ __forceinline__ void
enter_plane(const krul_device_descriptor *block, const uint8_t *chunk, element_place *place)
{
    const krul_device_output &output = block->outputs[0];
    int32_t batch = place->plane / block->n_heads;
    int32_t head = place->plane - batch * block->n_heads;
    place->plane_out = (uint8_t *)output.address + batch * output.batch_bytes +
                       head * output.head_bytes;
    place->offsets = block->offsets_offset == 0
                         ? nullptr
                         : chunk + block->offsets_offset + (int64_t)place->plane * block->head_dim;
}

static __device__ __forceinline__ element_place
place_of(const krul_device_descriptor *block, const uint8_t *chunk, int64_t element)
{
    element_place out;
    int64_t row = element / block->head_dim;
    out.channel = (int32_t)(element - row * block->head_dim);
    out.plane = (int32_t)(row / block->n_tokens);
    out.token = (int32_t)(row - (int64_t)out.plane * block->n_tokens);
    enter_plane(block, chunk, &out);
    return out;
}

/* A lane's elements are 32 apart. */
static __device__ __forceinline__ void
step(const krul_device_descriptor *block, const uint8_t *chunk, element_place *place)
{
    place->channel += 32;
    while (place->channel >= block->head_dim) {
        place->channel -= block->head_dim;
        place->token++;
        if (place->token == block->n_tokens) {
            place->token = 0;
            place->plane++;
            enter_plane(block, chunk, place);
        }
    }
}

/* What was kept of an element, at any byte. */
template <krul_dtype dtype>
static __device__ __forceinline__ uint32_t
load_kept(const uint8_t *kept, int64_t element)
{
    if (dtype == KRUL_DTYPE_F32) {
        const uint8_t *bytes = kept + 3 * element;
        return __ldg(bytes) | (uint32_t)__ldg(bytes + 1) << 8 | (uint32_t)__ldg(bytes + 2) << 16;
    }
    return __ldg(kept + element);
}

/* Eight bits below the sign, and the rest, whose top bit is the sign. */
template <krul_dtype dtype>
static __device__ __forceinline__ void
join(uint32_t coded, uint32_t kept, int32_t channel, uint8_t *row)
{
    if (dtype == KRUL_DTYPE_F32) {
        __stcs((uint32_t *)row + channel,
               (kept & 0x800000u) << 8 | coded << 23 | (kept & 0x7fffffu));
    }
    else {
        __stcs((uint16_t *)row + channel,
               (uint16_t)((kept & 0x80u) << 8 | coded << 7 | (kept & 0x7fu)));
    }
}

/* One chunk by one warp. Where the stream is not coded, symbols stand there, or are all the same. */
template <krul_dtype dtype, bool is_coded>
static __device__ __forceinline__ void
decode_chunk(const krul_decode_arguments &arguments, const krul_device_descriptor *block,
             const uint32_t *slots, int32_t index)
{
    const uint8_t *chunk = arguments.chunk;
    const uint8_t *kept = chunk + block->kept_offset[0];
    const uint8_t *bytes = chunk + block->stream_offset;
    int32_t lane = (int32_t)(threadIdx.x % 32);
    int64_t first = (int64_t)index << block->chunk_bits;
    int64_t n_elements = (int64_t)block->n_planes * block->n_tokens * block->head_dim;
    int32_t n_here = (int32_t)min((int64_t)1 << block->chunk_bits, n_elements - first);
    uint32_t state = STATE_FLOOR;
    word_stream words;
    if (is_coded) {
        uint32_t ends[1] = {0}, begin[1] = {0}, states[1];
        const uint8_t *directory = chunk + block->directory_offset;
        krul_load_words(directory + 4 * (int64_t)index, ends);
        if (index > 0) {
            krul_load_words(directory + 4 * (int64_t)(index - 1), begin);
        }
        krul_load_words(bytes + begin[0] + 4 * lane, states);
        state = states[0];
        if (state < STATE_FLOOR) {
            krul_report_damage(arguments.damage_flag);
        }
        open_words(&words, bytes + begin[0] + KRUL_ENTROPY_STATES_BYTES,
                   (int32_t)(ends[0] - begin[0]) - KRUL_ENTROPY_STATES_BYTES);
    }
    element_place place = place_of(block, chunk, min(first + lane, n_elements - 1));
    int64_t token_bytes = block->outputs[0].token_bytes;
    for (int32_t begin = 0; begin < n_here; begin += 32 * ROUNDS_AT_ONCE) {
        uint32_t kept_here[ROUNDS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < ROUNDS_AT_ONCE; i++) {
            int32_t at = begin + 32 * i + lane;
            kept_here[i] = at < n_here ? load_kept<dtype>(kept, first + at) : 0;
        }
#pragma unroll
        for (int i = 0; i < ROUNDS_AT_ONCE; i++) {
            int32_t at = begin + 32 * i + lane;
            bool is_active = at < n_here;
            uint32_t symbol = 0;
            if (begin + 32 * i >= n_here) { /* the same for all lanes */
                break;
            }
            if (is_coded) {
                uint32_t slot = slots[state % N_SLOTS];
                uint32_t next = (slot >> 20) * (state / N_SLOTS) + (slot >> 8) % N_SLOTS;
                state = is_active ? next : state;
                symbol = slot & 0xffu;
                bool is_low = is_active && state < STATE_FLOOR;
                uint32_t word = take_words(&words, is_low);
                state = is_low ? state << 16 | word : state;
            }
            else if (is_active) {
                symbol = __ldg(block->stream_mode == KRUL_ENTROPY_RAW ? bytes + first + at : bytes);
            }
            if (is_active) {
                uint32_t offset = place.offsets == nullptr ? 0
                                                           : __ldg(place.offsets + place.channel);
                if (place.token < block->n_wanted) {
                    join<dtype>((symbol + offset) & 0xffu, kept_here[i], place.channel,
                                place.plane_out + place.token * token_bytes);
                }
                if (at + 32 < n_here) {
                    step(block, chunk, &place);
                }
            }
        }
    }
    if (is_coded) {
        bool is_even = state == STATE_FLOOR && 2 * words.n_taken == words.n_bytes;
        if (!__all_sync(ALL_LANES, is_even) && lane == 0) {
            krul_report_damage(arguments.damage_flag);
        }
    }
}

template <krul_dtype dtype>
__global__ void
__launch_bounds__(N_THREADS) exact_kernel(krul_decode_arguments arguments)
{
    KRUL_SHARED(uint32_t, slots);
    uint32_t *starts = slots + N_SLOTS;
    uint32_t *sums = starts + N_SYMBOLS;
    const krul_device_descriptor *block = arguments.descriptors + arguments.units[blockIdx.x];
    int32_t index = ((int32_t)blockIdx.x - block->first_unit) * N_WARPS + (int32_t)threadIdx.x / 32;
    bool is_coded = block->stream_mode == KRUL_ENTROPY_CODED;
    if (is_coded) {
        build_slots((const uint16_t *)(arguments.chunk + block->table_offset), slots, starts, sums);
    }
    if (index >= block->n_chunks) { /* a whole warp; no barrier follows */
        return;
    }
    if (is_coded) {
        decode_chunk<dtype, true>(arguments, block, slots, index);
    }
    else {
        decode_chunk<dtype, false>(arguments, block, slots, index);
    }
}

} // namespace

void
krul_launch_exact_decode(void *stream, const krul_device_batch *batch,
                         const krul_decode_arguments *arguments)
{
    void (*kernel)(krul_decode_arguments) = exact_kernel<KRUL_DTYPE_BF16>;
    if (batch->dtype == KRUL_DTYPE_F32) {
        kernel = exact_kernel<KRUL_DTYPE_F32>;
    }
    else if (batch->dtype == KRUL_DTYPE_F16) {
        kernel = exact_kernel<KRUL_DTYPE_F16>;
    }
    KRUL_LAUNCH(kernel, (unsigned)batch->n_units, N_THREADS, SHARED_BYTES, stream, *arguments);
}

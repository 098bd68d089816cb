/* test_emulate.cpp - the emulator itself, and the conversions of device.cuh against csrc/dtype.h. */
#include "emulate.h"

#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "device.cuh"

extern "C" {
#include "dtype.h"
}

namespace {

/* Sum of 0 to n - 1 by shuffles and shared memory. */
__global__ void
sum_kernel(int n, unsigned *out)
{
    KRUL_SHARED(unsigned, parts);
    unsigned thread = threadIdx.x;
    unsigned value = (int)thread < n ? thread : 0;
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, step);
    }
    if (thread % 32 == 0) {
        parts[thread / 32] = value;
    }
    __syncthreads();
    if (thread == 0) {
        unsigned sum = 0;
        for (unsigned i = 0; i < (blockDim.x + 31) / 32; i++) {
            sum += parts[i];
        }
        out[blockIdx.x] = sum;
    }
}

/* Threads write, others read: wrong without the barrier in at least one order. */
template <bool has_barrier>
__global__ void
reverse_kernel(int *out)
{
    KRUL_SHARED(int, values);
    int i = (int)threadIdx.x, n = (int)blockDim.x;
    values[i] = i + 1;
    if (has_barrier) {
        __syncthreads();
    }
    out[i] = values[n - 1 - i];
}

/* Halves of a warp on their own, each lane of them a different number of times. */
__global__ void
halves_kernel(unsigned *out)
{
    unsigned lane = threadIdx.x;
    unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    unsigned sum = 0;
    for (int i = 0; i < (lane < 16 ? 3 : 5); i++) {
        sum += (unsigned)__popc(__ballot_sync(mask, lane % 2 == 0));
    }
    out[lane] = sum + __reduce_max_sync(mask, lane);
}

__global__ void
atomic_kernel(unsigned *counter)
{
    atomicAdd(counter, 1u);
    if (__syncthreads_count(threadIdx.x < 3) != 30 || __syncthreads_or(0) != 0 ||
        __syncthreads_and(1) != 1) {
        atomicOr(counter, 0x80000000u);
    }
}

__global__ void
missed_barrier_kernel(int n)
{
    if ((int)threadIdx.x < n) {
        __syncthreads();
    }
}

__global__ void
missed_lane_kernel(int n)
{
    if ((int)threadIdx.x < n) {
        __shfl_sync(0xffffffffu, 1, 0);
    }
}

__global__ void
outside_kernel(int n)
{
    __shfl_sync(1u << n, 1, 0);
}

void
test_threads()
{
    for (unsigned order = 0; order < 6; order++) {
        emulate::order = order;
        unsigned sums[3] = {0, 0, 0};
        KRUL_LAUNCH(sum_kernel, 3, 256, 8 * sizeof(unsigned), nullptr, 200, sums);
        CHECK(cudaGetLastError() == cudaSuccess);
        CHECK(sums[0] == 19900 && sums[1] == 19900 && sums[2] == 19900);
        KRUL_LAUNCH(sum_kernel, 1, 64, 2 * sizeof(unsigned), nullptr, 40, sums);
        CHECK(sums[0] == 780);
        int reversed[100];
        KRUL_LAUNCH(reverse_kernel<true>, 1, 100, sizeof reversed, nullptr, reversed);
        for (int i = 0; i < 100; i++) {
            CHECK(reversed[i] == 100 - i);
        }
        unsigned halves[32];
        KRUL_LAUNCH(halves_kernel, 1, 32, 0, nullptr, halves);
        for (unsigned i = 0; i < 32; i++) {
            CHECK(halves[i] == (i < 16 ? 3 * 8 + 15u : 5 * 8 + 31u));
        }
        unsigned counter = 0;
        KRUL_LAUNCH(atomic_kernel, dim3(2, 3), dim3(4, 5, 2), 0, nullptr, &counter);
        CHECK(counter == 240);
    }
    emulate::order = 0;
}

/* Each warp reads what its neighbour wrote; without the second barrier one that is ahead may have
 * written again. Threads that take turns at warp operations never are. */
template <bool has_barrier>
__global__ void
neighbour_kernel(int *out)
{
    KRUL_SHARED(int, shared);
    unsigned warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    for (int i = 0; i < 3; i++) {
        int value = __shfl_sync(0xffffffffu, i, 0);
        if (threadIdx.x % 32 == 0) {
            shared[warp] = value;
        }
        __syncthreads();
        out[3 * threadIdx.x + (unsigned)i] = shared[(warp + 1) % n_warps];
        if (has_barrier) {
            __syncthreads();
        }
    }
}

bool
are_neighbours_seen(void (*kernel)(int *), unsigned order)
{
    int seen[3 * 128];
    emulate::order = order;
    KRUL_LAUNCH(kernel, 1, 128, 4 * sizeof(int), nullptr, seen);
    emulate::order = 0;
    for (int i = 0; i < 3 * 128; i++) {
        if (seen[i] != i % 3) {
            return false;
        }
    }
    return true;
}

void
test_running_ahead()
{
    for (unsigned order : {3u, 5u, 7u}) {
        CHECK(are_neighbours_seen(neighbour_kernel<true>, order));
        CHECK(!are_neighbours_seen(neighbour_kernel<false>, order));
    }
    for (unsigned order = 0; order < 3; order++) {
        CHECK(are_neighbours_seen(neighbour_kernel<true>, order));
    }
}

/* A missing barrier is seen, as numbers that are wrong in some order. */
void
test_race_is_seen()
{
    bool is_wrong = false;
    for (emulate::order = 0; emulate::order < 3; emulate::order++) {
        int reversed[100];
        KRUL_LAUNCH(reverse_kernel<false>, 1, 100, sizeof reversed, nullptr, reversed);
        for (int i = 0; i < 100; i++) {
            is_wrong = is_wrong || reversed[i] != 100 - i;
        }
    }
    emulate::order = 0;
    CHECK(is_wrong);
}

template <typename Kernel>
bool
dies(Kernel kernel, int argument)
{
    std::fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
        std::fclose(stderr);
        KRUL_LAUNCH(kernel, 1, 32, 0, nullptr, argument);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

void
test_misuse_ends_the_program()
{
    CHECK(!dies(missed_barrier_kernel, 32));
    CHECK(dies(missed_barrier_kernel, 31));
    CHECK(!dies(missed_lane_kernel, 32));
    CHECK(dies(missed_lane_kernel, 7));
    CHECK(dies(outside_kernel, 3));
}

void
test_launches_are_checked()
{
    unsigned out = 7;
    KRUL_LAUNCH(sum_kernel, 0, 32, 4, nullptr, 1, &out);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    KRUL_LAUNCH(sum_kernel, 1, 1025, 4, nullptr, 1, &out);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(out == 7);
}

/* ---- device.cuh ---- */

bool
is_nan16(uint32_t bits, uint32_t infinity)
{
    return (bits & 0x7fffu) > infinity;
}

void
test_widening()
{
    int n_wrong = 0;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        uint32_t half = krul_f32_to_bits(krul_f16_to_f32((uint16_t)bits));
        uint32_t brain = krul_f32_to_bits(krul_bf16_to_f32((uint16_t)bits));
        n_wrong += __float_as_uint(krul_widen<KRUL_DTYPE_F16>((uint16_t)bits)) != half;
        n_wrong += __float_as_uint(krul_widen<KRUL_DTYPE_BF16>((uint16_t)bits)) != brain;
        float pair[2];
        uint32_t word[1] = {bits << 16 | (bits ^ 0x1234u)};
        krul_widen_words<KRUL_DTYPE_F16>(word, pair);
        n_wrong += __float_as_uint(pair[1]) != half;
        krul_widen_words<KRUL_DTYPE_BF16>(word, pair);
        n_wrong += __float_as_uint(pair[1]) != brain;
    }
    CHECK(n_wrong == 0);
}

/* Every exponent with mantissas about each place where rounding turns, and all else at random. */
void
test_narrowing()
{
    std::mt19937 random(1);
    int n_wrong = 0;
    for (uint32_t i = 0; i < 2000000; i++) {
        uint32_t bits = random();
        if (i % 2 == 0) {
            uint32_t place = 1u << random() % 23;
            bits = (bits & 0xff800000u) |
                   ((random() & ~(2 * place - 1) & 0x7fffffu) + place + random() % 3 - 1);
        }
        float value = __uint_as_float(bits);
        uint32_t half = krul_narrow<KRUL_DTYPE_F16>(value);
        uint32_t brain = krul_narrow<KRUL_DTYPE_BF16>(value);
        if (value != value) {
            n_wrong += half != 0x7fff || brain != 0x7fff;
            n_wrong += !is_nan16(krul_f32_to_f16(value), 0x7c00);
            n_wrong += !is_nan16(krul_f32_to_bf16(value), 0x7f80);
        }
        else {
            n_wrong += half != krul_f32_to_f16(value);
            n_wrong += brain != krul_f32_to_bf16(value);
        }
    }
    CHECK(n_wrong == 0);
    float pair[2] = {1.0f, -2.0f};
    uint32_t word[1];
    krul_narrow_words<KRUL_DTYPE_BF16>(pair, word);
    CHECK(word[0] == 0xc0003f80u);
    krul_narrow_words<KRUL_DTYPE_F16>(pair, word);
    CHECK(word[0] == 0xc0003c00u);
}

void
test_wide_access()
{
    alignas(16) uint8_t bytes[64], out[64];
    for (int i = 0; i < 64; i++) {
        bytes[i] = (uint8_t)(i * 37 + 11);
    }
    for (int at = 0; at < 32; at++) {
        uint32_t one[1], two[2], four[4];
        krul_load_words(bytes + at, one);
        krul_load_words(bytes + at, two);
        krul_load_words(bytes + at, four);
        CHECK(std::memcmp(one, bytes + at, 4) == 0);
        CHECK(std::memcmp(two, bytes + at, 8) == 0);
        CHECK(std::memcmp(four, bytes + at, 16) == 0);
    }
    for (uint32_t store_bytes = 2; store_bytes <= 16; store_bytes *= 2) {
        uint32_t four[4];
        std::memset(out, 0xee, sizeof out);
        std::memcpy(four, bytes + 5, 16);
        krul_store_16_bytes(out + 16 + store_bytes % 16, store_bytes, four);
        CHECK(std::memcmp(out + 16 + store_bytes % 16, bytes + 5, 16) == 0);
        CHECK(out[15 + store_bytes % 16] == 0xee && out[32 + store_bytes % 16] == 0xee);
    }
}

} // namespace

int
main()
{
    test_threads();
    test_race_is_seen();
    test_running_ahead();
    test_misuse_ends_the_program();
    test_launches_are_checked();
    test_widening();
    test_narrowing();
    test_wide_access();
    return check_finish();
}

/* emulate.h - runs CUDA kernels on a CPU, thread by thread, so that they can be tested without a GPU.
 *
 * Included before a .cu file that is compiled as plain C++17. A thread block runs with a fiber per
 * thread; a fiber goes on until it meets a barrier or a warp operation that others have not reached.
 * Threads can be run forwards, backwards, shuffled, or a warp as far ahead as it gets (emulate::order):
 * a result that depends on it is a missing barrier. What hardware would answer with undefined behaviour ends the program with a
 * message: barriers that not all threads reach, lanes outside their mask, a deadlock. Shared memory
 * is an allocation of its own, filled with 0xa5 before each block, so that a sanitizer sees its end.
 * One thread block at a time, in one thread of the process. Streams and events do everything at once. */
#ifndef EMULATE_H
#define EMULATE_H

#ifdef KRUL_ON_GPU
#include "on_gpu.h"
#else

#define KRUL_EMULATE 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATE_ASAN 1
#endif
#endif
#if defined(EMULATE_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

/* ---- words of the language ------------------------------------------------------------------- */

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static /* what one block leaves there, the next one finds */
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

/* Dynamic shared memory under a name. */
#define KRUL_SHARED(type, name)                                                                    \
    type *name = static_cast<type *>(static_cast<void *>(emulate::shared.data))

#define KRUL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    emulate::launch(#kernel, (grid), (block), (shared_bytes), (stream), (kernel), __VA_ARGS__)

#define EMULATE_VECTOR2(name, type, bytes)                                                         \
    struct alignas(bytes) name {                                                                   \
        type x, y;                                                                                 \
    };                                                                                             \
    inline name make_##name(type x, type y)                                                        \
    {                                                                                              \
        return {x, y};                                                                             \
    }
#define EMULATE_VECTOR4(name, type, bytes)                                                         \
    struct alignas(bytes) name {                                                                   \
        type x, y, z, w;                                                                           \
    };                                                                                             \
    inline name make_##name(type x, type y, type z, type w)                                        \
    {                                                                                              \
        return {x, y, z, w};                                                                       \
    }
EMULATE_VECTOR2(uchar2, unsigned char, 2)
EMULATE_VECTOR2(ushort2, unsigned short, 4)
EMULATE_VECTOR2(uint2, unsigned, 8)
EMULATE_VECTOR2(int2, int, 8)
EMULATE_VECTOR2(float2, float, 8)
EMULATE_VECTOR2(double2, double, 16)
EMULATE_VECTOR2(ulonglong2, unsigned long long, 16)
EMULATE_VECTOR4(uchar4, unsigned char, 4)
EMULATE_VECTOR4(ushort4, unsigned short, 8)
EMULATE_VECTOR4(uint4, unsigned, 16)
EMULATE_VECTOR4(int4, int, 16)
EMULATE_VECTOR4(float4, float, 16)

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_in = 1, unsigned y_in = 1, unsigned z_in = 1) : x(x_in), y(y_in), z(z_in) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/* ---- the runtime, as far as it is used ------------------------------------------------------- */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorUnknown = 999,
};
using cudaStream_t = struct CUstream_st *;
using cudaEvent_t = struct CUevent_st *;
enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
    int maxThreadsPerBlock;
};
enum {
    cudaStreamDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventDefault = 0,
    cudaEventBlockingSync = 1,
    cudaEventDisableTiming = 2,
    cudaHostAllocDefault = 0,
    cudaHostAllocPortable = 1,
};

namespace emulate {

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t
note(cudaError_t error)
{
    last_error = error == cudaSuccess ? last_error : error;
    return error;
}

} // namespace emulate

inline cudaError_t
cudaGetLastError()
{
    return std::exchange(emulate::last_error, cudaSuccess);
}

inline cudaError_t
cudaPeekAtLastError()
{
    return emulate::last_error;
}

inline const char *
cudaGetErrorName(cudaError_t error)
{
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorEmulated";
}

inline const char *
cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error" : "an emulated error";
}

template <typename kernel_type>
cudaError_t
cudaFuncGetAttributes(cudaFuncAttributes *out, kernel_type)
{
    out->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}

inline cudaError_t
cudaMalloc(void **out, size_t n_bytes)
{
    *out = std::aligned_alloc(256, (n_bytes + 255) / 256 * 256);
    return *out == nullptr ? emulate::note(cudaErrorMemoryAllocation) : cudaSuccess;
}

inline cudaError_t
cudaFree(void *memory)
{
    std::free(memory);
    return cudaSuccess;
}

inline cudaError_t
cudaHostAlloc(void **out, size_t n_bytes, unsigned)
{
    return cudaMalloc(out, n_bytes);
}

inline cudaError_t
cudaFreeHost(void *memory)
{
    return cudaFree(memory);
}

inline cudaError_t
cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, cudaMemcpyKind, cudaStream_t = nullptr)
{
    std::memmove(to, from, n_bytes);
    return cudaSuccess;
}

inline cudaError_t
cudaMemsetAsync(void *to, int value, size_t n_bytes, cudaStream_t = nullptr)
{
    std::memset(to, value, n_bytes);
    return cudaSuccess;
}

inline cudaError_t
cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = static_cast<cudaStream_t>(std::calloc(1, 1));
    return *out == nullptr ? emulate::note(cudaErrorMemoryAllocation) : cudaSuccess;
}

inline cudaError_t
cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(out, flags);
}

inline cudaError_t
cudaDeviceGetStreamPriorityRange(int *least_out, int *greatest_out)
{
    *least_out = 0;
    *greatest_out = -5;
    return cudaSuccess;
}

inline cudaError_t
cudaStreamDestroy(cudaStream_t stream)
{
    std::free(stream);
    return cudaSuccess;
}

inline cudaError_t
cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}

inline cudaError_t
cudaStreamQuery(cudaStream_t)
{
    return cudaSuccess;
}

inline cudaError_t
cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0)
{
    return cudaSuccess;
}

inline cudaError_t
cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = static_cast<cudaEvent_t>(std::calloc(1, 1));
    return *out == nullptr ? emulate::note(cudaErrorMemoryAllocation) : cudaSuccess;
}

inline cudaError_t
cudaEventDestroy(cudaEvent_t event)
{
    std::free(event);
    return cudaSuccess;
}

inline cudaError_t
cudaEventRecord(cudaEvent_t, cudaStream_t = nullptr)
{
    return cudaSuccess;
}

inline cudaError_t
cudaEventQuery(cudaEvent_t)
{
    return cudaSuccess;
}

inline cudaError_t
cudaEventSynchronize(cudaEvent_t)
{
    return cudaSuccess;
}

inline cudaError_t
cudaEventElapsedTime(float *out, cudaEvent_t, cudaEvent_t)
{
    *out = 0.0f;
    return cudaSuccess;
}

inline cudaError_t
cudaGetDeviceCount(int *out)
{
    *out = 1;
    return cudaSuccess;
}

inline cudaError_t
cudaGetDevice(int *out)
{
    *out = 0;
    return cudaSuccess;
}

inline cudaError_t
cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : emulate::note(cudaErrorInvalidDevice);
}

inline cudaError_t
cudaDeviceSynchronize()
{
    return cudaSuccess;
}

template <typename Kernel>
inline cudaError_t
cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int)
{
    return cudaSuccess;
}

/* ---- threads --------------------------------------------------------------------------------- */

namespace emulate {

/* Memory for kernels, of exactly so many bytes where no more than 16 is asked of its address. */
inline void *
allocate(size_t n_bytes, size_t alignment = 16)
{
    return alignment <= 16
               ? std::malloc(n_bytes)
               : std::aligned_alloc(alignment, (n_bytes + alignment - 1) / alignment * alignment);
}

inline void
release(void *memory)
{
    std::free(memory);
}

/* In which order the threads of a block, and the blocks, run: 0 forwards, 1 backwards, else shuffled
 * with this seed. Threads go on by turns, from one barrier or warp operation to the next; where the
 * order is odd and above 1 a warp instead goes as far as it can before the next has a turn, so that it
 * meets what the others have not done yet. Every order is higher by EMULATE_ORDER of the environment. */
inline unsigned order = 0;

inline unsigned
order_now()
{
    static const char *const more = std::getenv("EMULATE_ORDER");
    return order + (more == nullptr ? 0 : static_cast<unsigned>(std::atoi(more)));
}

inline const char *kernel_name = "no kernel";

[[noreturn]] inline void
die(const char *what)
{
    std::fprintf(stderr, "emulate: %s: block (%u, %u, %u), thread (%u, %u, %u): %s\n", kernel_name,
                 blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    std::abort();
}

/* Dynamic shared memory of the block that runs. */
struct shared_memory {
    uint8_t *data = nullptr;
};
inline shared_memory shared;

constexpr size_t stack_bytes = 256 * 1024;

#if defined(__x86_64__)
/* swapcontext asks the kernel about signals each time, which takes longer than all else here. Keep
 * what a function must keep, and go on where the other stack was left. */
__attribute__((naked, noinline)) static void
switch_stack(void **, void *)
{
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

/* A stack that one thread after another runs on. */
struct fiber {
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    uint8_t *stack = nullptr;
    void *fake_stack = nullptr;
};

enum class waits { for_nothing, for_block, for_warp };

struct thread {
    uint3 index;
    fiber *on = nullptr; /* NULL before it starts and after its end */
    bool is_done = false;
    waits waiting = waits::for_nothing;
};

/* A warp operation that some lanes have reached. Two sets of values, in turns: a lane may be at the
 * next operation before another has read this one's. */
struct meeting {
    uint32_t mask = 0;
    uint32_t arrived = 0;
    int kind = 0;
    unsigned n_held = 0;
    uint64_t values[2][32];
};

struct warp {
    std::deque<meeting> meetings; /* one for each mask; lanes may hold on to its values */
};

struct machine {
    std::vector<thread> threads;
    std::vector<warp> warps;
    std::vector<unsigned> sequence;
    std::vector<std::unique_ptr<fiber>> all;
    std::vector<fiber *> idle;
    const std::function<void()> *body = nullptr;
    fiber scheduler;
    const void *scheduler_bottom = nullptr;
    size_t scheduler_bytes = 0;
    unsigned at = 0; /* in the sequence */
    unsigned n_done = 0;
    unsigned n_at_barrier = 0;
    unsigned n_barriers = 0;
    int barrier_values[2][3]; /* number, and, or of what was brought to a barrier, in turns */
    std::mt19937 random;
};
inline machine the;

inline thread &
current()
{
    return the.threads[the.sequence[the.at]];
}

inline void
switch_to(fiber &from, fiber &to, bool is_to_scheduler)
{
#if defined(EMULATE_ASAN)
    const void *bottom = is_to_scheduler ? the.scheduler_bottom : to.stack;
    size_t bytes = is_to_scheduler ? the.scheduler_bytes : stack_bytes;
    __sanitizer_start_switch_fiber(&from.fake_stack, bottom, bytes);
#else
    (void)is_to_scheduler;
#endif
#if defined(__x86_64__)
    switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(EMULATE_ASAN)
    const void *old_bottom;
    size_t old_bytes;
    __sanitizer_finish_switch_fiber(from.fake_stack, &old_bottom, &old_bytes);
    if (!is_to_scheduler) { /* back in the scheduler */
        (void)old_bottom;
    }
#endif
}

/* Threads that never wait run one after another on one stack, without a switch. */
inline void
fiber_main()
{
#if defined(EMULATE_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &the.scheduler_bottom, &the.scheduler_bytes);
#endif
    for (;;) {
        (*the.body)();
        thread &ended = current();
        fiber *self = ended.on;
        ended.on = nullptr;
        ended.is_done = true;
        the.n_done++;
        unsigned next = the.at + 1;
        if (next < the.sequence.size() && the.threads[the.sequence[next]].on == nullptr &&
            !the.threads[the.sequence[next]].is_done) {
            the.at = next;
            current().on = self;
            threadIdx = current().index;
            continue;
        }
        the.idle.push_back(self);
        switch_to(*self, the.scheduler, true);
    }
}

/* Let a fiber begin with fiber_main; apart, since getcontext is one of those that return twice. */
inline void
prepare(fiber *made)
{
#if defined(__x86_64__)
    void **top = static_cast<void **>(static_cast<void *>(made->stack + stack_bytes));
    top[-1] = nullptr; /* where fiber_main would return to */
    top[-2] = reinterpret_cast<void *>(fiber_main);
    std::fill(top - 8, top - 2, nullptr); /* registers */
    made->stack_pointer = top - 8;
#else
    if (getcontext(&made->context) != 0) {
        die("no context for a thread");
    }
    made->context.uc_stack.ss_sp = made->stack;
    made->context.uc_stack.ss_size = stack_bytes;
    made->context.uc_link = nullptr;
    makecontext(&made->context, fiber_main, 0);
#endif
}

inline fiber *
take_fiber()
{
    if (!the.idle.empty()) {
        fiber *again = the.idle.back();
        the.idle.pop_back();
        return again;
    }
    the.all.push_back(std::make_unique<fiber>());
    fiber *made = the.all.back().get();
    void *stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
    if (stack == MAP_FAILED) {
        die("no memory for a thread");
    }
    made->stack = static_cast<uint8_t *>(stack);
    prepare(made);
    return made;
}

inline void
wait(waits what)
{
    thread &self = current();
    self.waiting = what;
    switch_to(*self.on, the.scheduler, true);
}

/* Lets the others go on from a barrier or a warp operation. */
inline void
wake(unsigned first, unsigned n, uint32_t mask, waits what)
{
    for (unsigned i = 0; i < n; i++) {
        if ((mask >> i % 32 & 1) != 0 && the.threads[first + i].waiting == what) {
            the.threads[first + i].waiting = waits::for_nothing;
        }
    }
}

inline bool
does_run_ahead()
{
    return order_now() > 1 && order_now() % 2 == 1;
}

inline void
arrange(std::vector<unsigned> &sequence)
{
    for (unsigned i = 0; i < sequence.size(); i++) {
        sequence[i] = i;
    }
    if (order_now() == 1) {
        std::reverse(sequence.begin(), sequence.end());
    }
    else if (order_now() > 1) {
        std::shuffle(sequence.begin(), sequence.end(), the.random);
    }
}

/* The same for threads, whose warps stay together where they run ahead. */
inline void
arrange_threads(std::vector<unsigned> &sequence)
{
    arrange(sequence);
    if (does_run_ahead()) {
        std::vector<unsigned> place((sequence.size() + 31) / 32);
        arrange(place);
        std::stable_sort(sequence.begin(), sequence.end(), [&](unsigned left, unsigned right) {
            return place[left / 32] < place[right / 32];
        });
    }
}

/* Give a turn to those of a part of the sequence that can go on; false when none of them can. */
inline bool
take_turns(unsigned begin, unsigned end)
{
    bool has_run = false;
    for (the.at = begin; the.at < end; the.at++) {
        thread &next = current();
        if (next.is_done || next.waiting != waits::for_nothing) {
            continue;
        }
        has_run = true;
        if (next.on == nullptr) {
            next.on = take_fiber();
        }
        threadIdx = next.index;
        switch_to(the.scheduler, *next.on, false);
    }
    return has_run;
}

/* Let each warp go as far as it can, one after another; false when none of them can go on. */
inline bool
run_ahead()
{
    bool has_run = false;
    unsigned n_threads = static_cast<unsigned>(the.sequence.size());
    for (unsigned begin = 0, end; begin < n_threads; begin = end) {
        for (end = begin + 1; end < n_threads; end++) {
            if (the.sequence[end] / 32 != the.sequence[begin] / 32) {
                break;
            }
        }
        while (take_turns(begin, end)) {
            has_run = true;
        }
    }
    return has_run;
}

inline void
run_block(const std::function<void()> &body, size_t shared_bytes)
{
    unsigned n_threads = blockDim.x * blockDim.y * blockDim.z;
    the.body = &body;
    the.threads.assign(n_threads, thread());
    the.warps.assign((n_threads + 31) / 32, warp());
    the.sequence.resize(n_threads);
    arrange_threads(the.sequence);
    the.n_done = 0;
    the.n_at_barrier = 0;
    the.n_barriers = 0;
    std::memset(the.barrier_values, 0, sizeof the.barrier_values);
    the.barrier_values[0][1] = the.barrier_values[1][1] = 1;
    for (unsigned i = 0; i < n_threads; i++) {
        the.threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y,
                                i / blockDim.x / blockDim.y};
    }
    std::vector<uint8_t> memory(shared_bytes, 0xa5);
    shared.data = memory.data();
    while (the.n_done < n_threads) {
        bool has_run = does_run_ahead() ? run_ahead() : take_turns(0, n_threads);
        if (!has_run) {
            for (the.at = 0; current().waiting == waits::for_nothing; the.at++) {
            }
            threadIdx = current().index;
            die(current().waiting == waits::for_block
                    ? "waits at a barrier that others never reach"
                    : "waits in a warp operation that other lanes never reach");
        }
    }
    shared.data = nullptr;
}

template <typename... Parameters, typename... Arguments>
inline void
launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes, void *,
       void (*kernel)(Parameters...), Arguments... arguments)
{
    uint64_t n_threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    uint64_t n_blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    if (n_threads == 0 || n_threads > 1024 || n_blocks == 0 || grid.x > 0x7fffffffu ||
        grid.y > 65535 || grid.z > 65535 || block.z > 64 || shared_bytes > 227 * 1024) {
        note(cudaErrorInvalidConfiguration);
        return;
    }
    kernel_name = name;
    gridDim = grid;
    blockDim = block;
    the.random.seed(order_now());
    std::function<void()> body = [&] { kernel(arguments...); };
    std::vector<unsigned> blocks(n_blocks);
    arrange(blocks);
    for (unsigned i : blocks) {
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        run_block(body, shared_bytes);
    }
}

inline unsigned
linear_thread()
{
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

inline unsigned
lane()
{
    return linear_thread() % 32;
}

/* Which lanes a thread's warp has; the last warp may be smaller. */
inline uint32_t
lanes_there()
{
    unsigned first = linear_thread() / 32 * 32;
    unsigned n = static_cast<unsigned>(the.threads.size()) - first;
    return n >= 32 ? ~0u : (1u << n) - 1;
}

/* Meet the lanes of the mask and see what each of them brought. */
inline const uint64_t *
meet(uint32_t mask, int kind, uint64_t value)
{
    mask &= lanes_there();
    if ((mask >> lane() & 1) == 0) {
        die("is in a warp operation whose mask leaves it out");
    }
    unsigned first = linear_thread() / 32 * 32;
    std::deque<meeting> &meetings = the.warps[first / 32].meetings;
    auto found = std::find_if(meetings.begin(), meetings.end(),
                              [mask](const meeting &other) { return other.mask == mask; });
    if (found == meetings.end()) {
        meetings.emplace_back();
        found = meetings.end() - 1;
    }
    meeting &at = *found;
    if (at.arrived != 0 && at.kind != kind) {
        die("meets lanes that are in another warp operation");
    }
    uint64_t *values = at.values[at.n_held % 2];
    at.mask = mask;
    at.kind = kind;
    at.arrived |= 1u << lane();
    values[lane()] = value;
    if (at.arrived == mask) {
        at.arrived = 0;
        at.n_held++;
        wake(first, std::min<unsigned>(32, static_cast<unsigned>(the.threads.size()) - first), mask,
             waits::for_warp);
    }
    else {
        wait(waits::for_warp);
    }
    return values;
}

template <typename T>
inline uint64_t
to_bits(T value)
{
    static_assert(sizeof value <= 8, "a warp exchanges at most 8 bytes per lane");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
inline T
from_bits(uint64_t bits)
{
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/* Counts how many, whether all and whether any of the block's threads brought a true value. */
inline const int *
barrier(int value)
{
    int *values = the.barrier_values[the.n_barriers % 2];
    if (the.n_at_barrier == 0) {
        values[0] = 0;
        values[1] = 1;
        values[2] = 0;
    }
    values[0] += value != 0;
    values[1] &= value != 0;
    values[2] |= value != 0;
    the.n_at_barrier++;
    if (the.n_at_barrier == the.threads.size()) {
        the.n_at_barrier = 0;
        the.n_barriers++;
        wake(0, static_cast<unsigned>(the.threads.size()), ~0u, waits::for_block);
    }
    else {
        wait(waits::for_block);
    }
    return values;
}

enum { SYNC, BALLOT, SHUFFLE, REDUCE };

} // namespace emulate

inline void
__syncthreads()
{
    emulate::barrier(0);
}

inline int
__syncthreads_count(int value)
{
    return emulate::barrier(value)[0];
}

inline int
__syncthreads_and(int value)
{
    return emulate::barrier(value)[1];
}

inline int
__syncthreads_or(int value)
{
    return emulate::barrier(value)[2];
}

inline void
__threadfence()
{
}

inline void
__threadfence_block()
{
}

inline void
__syncwarp(unsigned mask = 0xffffffffu)
{
    emulate::meet(mask, emulate::SYNC, 0);
}

inline unsigned
__ballot_sync(unsigned mask, int value)
{
    const uint64_t *values = emulate::meet(mask, emulate::BALLOT, value != 0);
    unsigned out = 0;
    for (unsigned i = 0; i < 32; i++) {
        out |= (mask >> i & 1) != 0 && (emulate::lanes_there() >> i & 1) != 0 && values[i] != 0
                   ? 1u << i
                   : 0u;
    }
    return out;
}

inline int
__any_sync(unsigned mask, int value)
{
    return __ballot_sync(mask, value) != 0;
}

inline int
__all_sync(unsigned mask, int value)
{
    return __ballot_sync(mask, value) == (mask & emulate::lanes_there());
}

namespace emulate {

/* A lane outside the mask, or outside the warp, has nothing to give: the caller keeps its own, and
 * may not rely on more. */
template <typename T>
inline T
shuffle(unsigned mask, T value, unsigned source, bool is_inside)
{
    const uint64_t *values = meet(mask, SHUFFLE, to_bits(value));
    if (!is_inside) {
        return value;
    }
    if ((mask & lanes_there()) >> source % 32 == 0 || (mask >> source % 32 & 1) == 0) {
        die("takes a value from a lane outside the mask");
    }
    return from_bits<T>(values[source % 32]);
}

} // namespace emulate

template <typename T>
inline T
__shfl_sync(unsigned mask, T value, int source, int width = 32)
{
    unsigned base = emulate::lane() / width * width;
    return emulate::shuffle(mask, value, base + static_cast<unsigned>(source) % width, true);
}

template <typename T>
inline T
__shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    unsigned in_part = emulate::lane() % width;
    return emulate::shuffle(mask, value, emulate::lane() - delta, in_part >= delta);
}

template <typename T>
inline T
__shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    unsigned in_part = emulate::lane() % width;
    return emulate::shuffle(mask, value, emulate::lane() + delta,
                            in_part + delta < static_cast<unsigned>(width));
}

template <typename T>
inline T
__shfl_xor_sync(unsigned mask, T value, int bits, int width = 32)
{
    unsigned source = emulate::lane() ^ static_cast<unsigned>(bits);
    return emulate::shuffle(mask, value, source, source / width == emulate::lane() / width);
}

#define EMULATE_REDUCE(name, type, expression)                                                     \
    inline type name(unsigned mask, type value)                                                    \
    {                                                                                              \
        const uint64_t *values = emulate::meet(mask, emulate::REDUCE, emulate::to_bits(value));    \
        mask &= emulate::lanes_there();                                                            \
        type left = emulate::from_bits<type>(values[__builtin_ctz(mask)]);                         \
        for (unsigned i = static_cast<unsigned>(__builtin_ctz(mask)) + 1; i < 32; i++) {           \
            if ((mask >> i & 1) != 0) {                                                            \
                type right = emulate::from_bits<type>(values[i]);                                  \
                left = expression;                                                                 \
            }                                                                                      \
        }                                                                                          \
        return left;                                                                               \
    }
EMULATE_REDUCE(__reduce_add_sync, unsigned, left + right)
EMULATE_REDUCE(__reduce_min_sync, unsigned, std::min(left, right))
EMULATE_REDUCE(__reduce_max_sync, unsigned, std::max(left, right))
EMULATE_REDUCE(__reduce_or_sync, unsigned, left | right)
EMULATE_REDUCE(__reduce_and_sync, unsigned, left &right)

/* ---- memory ---------------------------------------------------------------------------------- */

#define EMULATE_ATOMIC(name, expression)                                                           \
    template <typename T> inline T name(T *address, T value)                                       \
    {                                                                                              \
        T old = *address;                                                                          \
        *address = (expression);                                                                   \
        return old;                                                                                \
    }
EMULATE_ATOMIC(atomicAdd, static_cast<T>(old + value))
EMULATE_ATOMIC(atomicSub, static_cast<T>(old - value))
EMULATE_ATOMIC(atomicOr, old | value)
EMULATE_ATOMIC(atomicAnd, old &value)
EMULATE_ATOMIC(atomicMin, std::min(old, value))
EMULATE_ATOMIC(atomicMax, std::max(old, value))
EMULATE_ATOMIC(atomicExch, value)

template <typename T>
inline T
atomicCAS(T *address, T expected, T value)
{
    T old = *address;
    *address = old == expected ? value : old;
    return old;
}

#define EMULATE_LOAD(name)                                                                         \
    template <typename T> inline T name(const T *address)                                          \
    {                                                                                              \
        return *address;                                                                           \
    }
EMULATE_LOAD(__ldg)
EMULATE_LOAD(__ldca)
EMULATE_LOAD(__ldcg)
EMULATE_LOAD(__ldcs)
EMULATE_LOAD(__ldlu)
EMULATE_LOAD(__ldcv)

#define EMULATE_STORE(name)                                                                        \
    template <typename T> inline void name(T *address, T value)                                    \
    {                                                                                              \
        *address = value;                                                                          \
    }
EMULATE_STORE(__stwb)
EMULATE_STORE(__stcg)
EMULATE_STORE(__stcs)
EMULATE_STORE(__stwt)

/* ---- arithmetic ------------------------------------------------------------------------------ */

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline int
__popc(unsigned value)
{
    return __builtin_popcount(value);
}

inline int
__popcll(unsigned long long value)
{
    return __builtin_popcountll(value);
}

inline int
__clz(int value)
{
    return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}

inline int
__clzll(long long value)
{
    return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

inline int
__ffs(int value)
{
    return __builtin_ffs(value);
}

inline int
__ffsll(long long value)
{
    return __builtin_ffsll(value);
}

inline unsigned
__float_as_uint(float value)
{
    return static_cast<unsigned>(emulate::to_bits(value));
}

inline int
__float_as_int(float value)
{
    return static_cast<int>(__float_as_uint(value));
}

inline float
__uint_as_float(unsigned bits)
{
    return emulate::from_bits<float>(bits);
}

inline float
__int_as_float(int bits)
{
    return __uint_as_float(static_cast<unsigned>(bits));
}

inline unsigned
__byte_perm(unsigned low, unsigned high, unsigned selector)
{
    uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned choice = selector >> 4 * i;
        unsigned byte = static_cast<unsigned>(both >> 8 * (choice & 7)) & 0xff;
        if ((choice & 8) != 0) {
            byte = (byte & 0x80) != 0 ? 0xff : 0;
        }
        out |= byte << 8 * i;
    }
    return out;
}

inline unsigned
__funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

inline unsigned
__funnelshift_l(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}

inline unsigned
__umulhi(unsigned left, unsigned right)
{
    return static_cast<unsigned>(static_cast<uint64_t>(left) * right >> 32);
}

inline unsigned long long
__umul64hi(unsigned long long left, unsigned long long right)
{
    __extension__ typedef unsigned __int128 wide;
    return static_cast<unsigned long long>(static_cast<wide>(left) * right >> 64);
}

/* The compiler must not fuse these: -ffp-contract=off. */
#define EMULATE_ROUNDED(type, letter)                                                              \
    inline type __##letter##add_rn(type left, type right)                                          \
    {                                                                                              \
        return left + right;                                                                       \
    }                                                                                              \
    inline type __##letter##sub_rn(type left, type right)                                          \
    {                                                                                              \
        return left - right;                                                                       \
    }                                                                                              \
    inline type __##letter##mul_rn(type left, type right)                                          \
    {                                                                                              \
        return left * right;                                                                       \
    }                                                                                              \
    inline type __##letter##div_rn(type left, type right)                                          \
    {                                                                                              \
        return left / right;                                                                       \
    }                                                                                              \
    inline type __##letter##sqrt_rn(type value)                                                    \
    {                                                                                              \
        return std::sqrt(value);                                                                   \
    }
EMULATE_ROUNDED(float, f)
EMULATE_ROUNDED(double, d)

inline float
__fmaf_rn(float left, float right, float added)
{
    return std::fma(left, right, added);
}

inline double
__fma_rn(double left, double right, double added)
{
    return std::fma(left, right, added);
}

inline int
__float2int_rn(float value)
{
    return static_cast<int>(std::nearbyint(value));
}

inline float
__expf(float value)
{
    return std::exp(value);
}

/* ---- the instructions that device.cuh names -------------------------------------------------- */

namespace emulate {

/* As hardware rounds: to nearest, ties to even; every NaN becomes 0x7fff. */
inline uint32_t
round_bf16(float value)
{
    uint32_t bits = __float_as_uint(value);
    if (value != value) {
        return 0x7fff;
    }
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline uint32_t
round_f16(float value)
{
    uint32_t bits = __float_as_uint(value);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (value != value) {
        return 0x7fff;
    }
    if (magnitude >= 0x477ff000u) { /* rounds to beyond 65504 */
        return sign | 0x7c00u;
    }
    if (magnitude < 0x38800000u) { /* subnormal: units of 2^-24 */
        return sign |
               static_cast<uint32_t>(std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24)));
    }
    return sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13) - (112u << 10));
}

inline float
widen_f16(uint32_t bits)
{
    uint32_t sign = (bits & 0x8000u) << 16;
    uint32_t exponent = bits >> 10 & 0x1fu;
    uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0x1f) {
        return __uint_as_float(mantissa != 0 ? sign | 0x7fc00000u | mantissa << 13
                                             : sign | 0x7f800000u);
    }
    float magnitude = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa | 0x400u),
                                 exponent == 0 ? -24 : static_cast<int>(exponent) - 25);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

} // namespace emulate

inline uint32_t
krul_narrow_bf16x2(float low, float high)
{
    return emulate::round_bf16(low) | emulate::round_bf16(high) << 16;
}

inline uint32_t
krul_narrow_f16x2(float low, float high)
{
    return emulate::round_f16(low) | emulate::round_f16(high) << 16;
}

inline float
krul_widen_f16(uint32_t bits)
{
    return emulate::widen_f16(bits & 0xffffu);
}

#endif /* KRUL_ON_GPU */
#endif /* EMULATE_H */

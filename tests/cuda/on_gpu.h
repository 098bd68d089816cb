/* on_gpu.h - lets the emulator's tests run on a real GPU: what they allocate is there for both.
 *
 * emulate.h is this where KRUL_ON_GPU is defined. The tests hand kernels the memory of their vectors,
 * so operator new is managed memory here; what lies on the stack no kernel can reach. Blocks from 1 KiB
 * on are allocations of their own, kept by size for the next, so that compute-sanitizer sees their
 * ends; smaller ones share some. Everything is given back when the process ends. */
#ifndef ON_GPU_H
#define ON_GPU_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

namespace emulate {

inline unsigned order = 0; /* a GPU has its own */

/* What precedes each allocation; as long as its alignment. */
struct header {
    header *next;
    size_t n_bytes;
    size_t unused[30];
};
static_assert(sizeof(header) == 256, "alignment of what is behind it");

constexpr size_t own_bytes = 1024, shared_bytes = size_t{1} << 20, n_sizes = 4096;

/* The header may lie in memory of its own: free allocations, by a hash of their size. */
struct heap {
    std::mutex lock;
    header *idle[n_sizes];
    uint8_t *begin, *end; /* what is left of the shared one */
};

inline heap &
the_heap()
{
    static heap made = {};
    return made;
}

inline uint8_t *
managed(size_t n_bytes)
{
    void *memory = nullptr;
    cudaError_t error = cudaMallocManaged(&memory, n_bytes);
    if (error != cudaSuccess) {
        std::fprintf(stderr, "cudaMallocManaged of %zu bytes: %s\n", n_bytes,
                     cudaGetErrorString(error));
        std::abort();
    }
    return static_cast<uint8_t *>(memory);
}

/* Memory for CPU and GPU, at a multiple of 256 bytes whatever is asked. */
inline void *
allocate(size_t n_bytes, size_t = 16)
{
    heap &from = the_heap();
    std::lock_guard<std::mutex> guard(from.lock);
    size_t wanted = n_bytes < own_bytes ? (n_bytes + 255) / 256 * 256 : n_bytes;
    wanted = std::max<size_t>(wanted, 256);
    for (header **at = &from.idle[wanted % n_sizes]; *at != nullptr; at = &(*at)->next) {
        if ((*at)->n_bytes == wanted) {
            header *found = *at;
            *at = found->next;
            return found + 1;
        }
    }
    size_t whole = sizeof(header) + wanted;
    uint8_t *memory;
    if (wanted >= own_bytes) {
        memory = managed(whole);
    }
    else {
        if (from.begin == nullptr || static_cast<size_t>(from.end - from.begin) < whole) {
            from.begin = managed(shared_bytes);
            from.end = from.begin + shared_bytes;
        }
        memory = from.begin;
        from.begin += whole;
    }
    header *made = reinterpret_cast<header *>(memory);
    made->n_bytes = wanted;
    return made + 1;
}

inline void
release(void *memory)
{
    if (memory == nullptr) {
        return;
    }
    heap &to = the_heap();
    std::lock_guard<std::mutex> guard(to.lock);
    header *given = static_cast<header *>(memory) - 1;
    header **first = &to.idle[given->n_bytes % n_sizes];
    given->next = *first;
    *first = given;
}

} // namespace emulate

/* Each test is one file, so that these are defined once. */
void *
operator new(size_t n_bytes)
{
    return emulate::allocate(n_bytes);
}

void *
operator new[](size_t n_bytes)
{
    return emulate::allocate(n_bytes);
}

void
operator delete(void *memory) noexcept
{
    emulate::release(memory);
}

void
operator delete[](void *memory) noexcept
{
    emulate::release(memory);
}

void
operator delete(void *memory, size_t) noexcept
{
    emulate::release(memory);
}

void
operator delete[](void *memory, size_t) noexcept
{
    emulate::release(memory);
}

#endif /* ON_GPU_H */

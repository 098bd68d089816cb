/* device.cuh - what the kernels share: launching, wide loads and stores, f16 and bf16.
 *
 * The CPU tests compile the .cu files as plain C++ with tests/cuda/emulate.h before them, which
 * defines KRUL_EMULATE and stands for the CUDA headers. So no kernel is launched with <<<>>>, and
 * instructions that C++ has no word for are named here, in one place. */
#ifndef KRUL_DEVICE_CUH
#define KRUL_DEVICE_CUH

#include <stddef.h>
#include <stdint.h>

#ifndef KRUL_EMULATE
#include <cuda_runtime.h>
#endif

#include "krul.h"

/* ---- launching ------------------------------------------------------------------------------- */

#ifndef KRUL_EMULATE

/* Launch a kernel, named or a pointer to one; cudaGetLastError tells whether that went well. */
#define KRUL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    (kernel)<<<(grid), (block), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)

/* The launch's dynamic shared memory under a name; once per kernel, 16-byte aligned. */
#define KRUL_SHARED(type, name)                                                                    \
    extern __shared__ uint4 krul_shared_memory[];                                                  \
    type *name = (type *)krul_shared_memory

/* ---- instructions ---------------------------------------------------------------------------- */

/* Two floats to bf16 or f16, low one in the low half. Rounds to nearest even as csrc/dtype.h does;
 * NaN becomes 0x7fff, the only NaN that arithmetic on the device has. */
static __device__ __forceinline__ uint32_t
krul_narrow_bf16x2(float low, float high)
{
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

static __device__ __forceinline__ uint32_t
krul_narrow_f16x2(float low, float high)
{
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

/* The f16 in the low half; exact. */
static __device__ __forceinline__ float
krul_widen_f16(uint32_t bits)
{
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"((uint16_t)bits));
    return out;
}

#endif /* KRUL_EMULATE */

/* ---- errors ---------------------------------------------------------------------------------- */

/* What a call of the runtime answered, as a status; `call` is for the message. */
static inline krul_status
krul_cuda_check(cudaError_t code, const char *call, krul_error *err)
{
    if (code == cudaSuccess) {
        return KRUL_STATUS_OK;
    }
    krul_status status = krul_fail(
        err, code == cudaErrorMemoryAllocation ? KRUL_STATUS_NO_MEMORY : KRUL_STATUS_DEVICE,
        "%s failed: %s: %s", call, cudaGetErrorName(code), cudaGetErrorString(code));
    if (err != NULL) {
        err->code = (int)code;
    }
    return status;
}

/* ---- numbers --------------------------------------------------------------------------------- */

/* The dtypes as types, for templates: how they lie in memory. */
template <krul_dtype dtype> struct krul_element;
template <> struct krul_element<KRUL_DTYPE_F32> {
    typedef uint32_t bits;
};
template <> struct krul_element<KRUL_DTYPE_F16> {
    typedef uint16_t bits;
};
template <> struct krul_element<KRUL_DTYPE_BF16> {
    typedef uint16_t bits;
};

template <krul_dtype dtype>
static __device__ __forceinline__ float
krul_widen(typename krul_element<dtype>::bits bits)
{
    if (dtype == KRUL_DTYPE_F32) {
        return __uint_as_float((uint32_t)bits);
    }
    return dtype == KRUL_DTYPE_F16 ? krul_widen_f16((uint32_t)bits)
                                   : __uint_as_float((uint32_t)bits << 16);
}

template <krul_dtype dtype>
static __device__ __forceinline__ typename krul_element<dtype>::bits
krul_narrow(float value)
{
    typedef typename krul_element<dtype>::bits bits;
    if (dtype == KRUL_DTYPE_F32) {
        return (bits)__float_as_uint(value);
    }
    return (bits)(dtype == KRUL_DTYPE_F16 ? krul_narrow_f16x2(value, 0.0f)
                                          : krul_narrow_bf16x2(value, 0.0f));
}

/* Words of 32 bits that hold elements, to floats and back: 32 / n_bits of them to a word. */
template <krul_dtype dtype, int n_words>
static __device__ __forceinline__ void
krul_widen_words(const uint32_t (&words)[n_words], float *out)
{
#pragma unroll
    for (int i = 0; i < n_words; i++) {
        if (dtype == KRUL_DTYPE_F32) {
            out[i] = __uint_as_float(words[i]);
        }
        else if (dtype == KRUL_DTYPE_F16) {
            out[2 * i] = krul_widen_f16(words[i] & 0xffffu);
            out[2 * i + 1] = krul_widen_f16(words[i] >> 16);
        }
        else {
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

template <krul_dtype dtype, int n_words>
static __device__ __forceinline__ void
krul_narrow_words(const float *values, uint32_t (&words)[n_words])
{
#pragma unroll
    for (int i = 0; i < n_words; i++) {
        if (dtype == KRUL_DTYPE_F32) {
            words[i] = __float_as_uint(values[i]);
        }
        else if (dtype == KRUL_DTYPE_F16) {
            words[i] = krul_narrow_f16x2(values[2 * i], values[2 * i + 1]);
        }
        else {
            words[i] = krul_narrow_bf16x2(values[2 * i], values[2 * i + 1]);
        }
    }
}

/* ---- wide loads and stores ------------------------------------------------------------------- */

/* Read n_words words (1, 2 or 4) that begin at any byte, by way of the read-only cache. Payloads
 * have parts that begin anywhere; all threads of a block read parts with one alignment, so that the
 * branches do not diverge. Where the address is no multiple of 4 the words around it are read, up to
 * 3 bytes before and 3 after: both must be readable. */
template <int n_words>
static __device__ __forceinline__ void
krul_load_words(const uint8_t *address, uint32_t (&out)[n_words])
{
    uint32_t low_bits = (uint32_t)(uintptr_t)address;
    if (n_words == 4 && (low_bits & 15u) == 0) {
        uint4 all = __ldg((const uint4 *)address);
        out[0] = all.x;
        out[n_words > 1 ? 1 : 0] = all.y;
        out[n_words > 2 ? 2 : 0] = all.z;
        out[n_words > 3 ? 3 : 0] = all.w;
    }
    else if (n_words == 2 && (low_bits & 7u) == 0) {
        uint2 all = __ldg((const uint2 *)address);
        out[0] = all.x;
        out[n_words > 1 ? 1 : 0] = all.y;
    }
    else if ((low_bits & 3u) == 0) {
#pragma unroll
        for (int i = 0; i < n_words; i++) {
            out[i] = __ldg((const uint32_t *)address + i);
        }
    }
    else {
        const uint32_t *words = (const uint32_t *)(address - (low_bits & 3u));
        uint32_t low = __ldg(words);
#pragma unroll
        for (int i = 0; i < n_words; i++) {
            uint32_t high = __ldg(words + i + 1);
            out[i] = __funnelshift_r(low, high, 8u * (low_bits & 3u));
            low = high;
        }
    }
}

static __device__ __forceinline__ uint32_t
krul_load_u16_at(const uint8_t *address)
{
    return __ldg((const uint16_t *)address);
}

/* A number that may begin at any even address. */
static __device__ __forceinline__ float
krul_load_f32_at(const uint8_t *address)
{
    return __uint_as_float(krul_load_u16_at(address) | krul_load_u16_at(address + 2) << 16);
}

/* Write 16 bytes that nobody reads soon: in one store where the address allows that (store_bytes,
 * the same for a whole launch or block), else in as few as may be. */
static __device__ __forceinline__ void
krul_store_16_bytes(uint8_t *address, uint32_t store_bytes, const uint32_t (&words)[4])
{
    if (store_bytes >= 16) {
        __stcs((uint4 *)address, make_uint4(words[0], words[1], words[2], words[3]));
    }
    else if (store_bytes == 8) {
        __stcs((uint2 *)address, make_uint2(words[0], words[1]));
        __stcs((uint2 *)address + 1, make_uint2(words[2], words[3]));
    }
    else if (store_bytes == 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            __stcs((uint32_t *)address + i, words[i]);
        }
    }
    else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            __stcs((uint16_t *)address + 2 * i, (uint16_t)words[i]);
            __stcs((uint16_t *)address + 2 * i + 1, (uint16_t)(words[i] >> 16));
        }
    }
}

#endif /* KRUL_DEVICE_CUH */

/* compressor.cuh - what the kernels of codecs share: how they are called, and sums of errors. */
#ifndef KRUL_COMPRESSOR_CUH
#define KRUL_COMPRESSOR_CUH

#include "device.cuh"
#include "device_encode.h"

/* What every decoding kernel is given: the chunk, and in it the units of its batch. */
struct krul_decode_arguments {
    const uint8_t *chunk;
    const krul_device_descriptor *descriptors;
    const uint32_t *units;
    uint32_t *damage_flag;
};

/* Damage is met so rarely that many threads may write the same. */
static __device__ __forceinline__ void
krul_report_damage(uint32_t *damage_flag)
{
    *(volatile uint32_t *)damage_flag = 1;
}

/* Launch the decoding of a batch of codec exact; in entropy.cu. */
void krul_launch_exact_decode(void *stream, const krul_device_batch *batch,
                              const krul_decode_arguments *arguments);

/* What every encoding kernel is given; see krul_cuda_encode. */
struct krul_encode_arguments {
    const krul_device_descriptor *descriptors;
    const uint32_t *units;
    uint8_t *payloads;
    uint8_t *workspace;
    double *errors; /* of each unit, two */
    krul_device_result *results;
};

/* The errors of a thread block, written by its first thread; shared memory holds two doubles a warp. */
static __device__ __forceinline__ void
krul_write_errors(double sums[2], double *out)
{
    KRUL_SHARED(double, parts);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], step);
        sums[1] += __shfl_xor_sync(0xffffffffu, sums[1], step);
    }
    __syncthreads(); /* whatever shared memory held before is done with */
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32 * 2] = sums[0];
        parts[threadIdx.x / 32 * 2 + 1] = sums[1];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < (int)blockDim.x / 32; warp++) {
            sums[0] += parts[2 * warp];
            sums[1] += parts[2 * warp + 1];
        }
        out[0] = sums[0];
        out[1] = sums[1];
    }
}

/* Launch the coding of a batch by codec exact; in entropy_encode.cu. */
void krul_launch_exact_encode(void *stream, const krul_device_encode_batch *batch,
                              const krul_encode_arguments *arguments);

#endif /* KRUL_COMPRESSOR_CUH */

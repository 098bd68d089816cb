/* compressor.cuh - what the decoding kernels of compressor.cu and entropy.cu share. */
#ifndef KRUL_COMPRESSOR_CUH
#define KRUL_COMPRESSOR_CUH

#include "device.cuh"
#include "device_decode.h"

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

#endif /* KRUL_COMPRESSOR_CUH */

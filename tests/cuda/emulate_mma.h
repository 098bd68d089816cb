/* emulate_mma.h - the matrix instructions of estimator.cu, by shuffles, as the PTX manual lays them out.
 *
 * mma.m16n8k16: of the 16 x 16 factor a thread 4 g + t holds rows g and g + 8, numbers 2 t, 2 t + 1,
 * 2 t + 8 and 2 t + 9; of the 16 x 8 factor column g and the same numbers; of the sums rows g and
 * g + 8, columns 2 t and 2 t + 1. Sums are float32, in the order of the numbers. */
#ifndef EMULATE_MMA_H
#define EMULATE_MMA_H

#include "emulate.h"

namespace emulate {

inline float
half_of(uint32_t word, int half, bool is_bf16)
{
    uint32_t bits = half == 0 ? word & 0xffffu : word >> 16;
    return is_bf16 ? __uint_as_float(bits << 16) : widen_f16(bits);
}

inline void
multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high, bool is_bf16)
{
    constexpr unsigned all = 0xffffffffu;
    int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
    uint64_t factors[2] = {a[0] | static_cast<uint64_t>(a[1]) << 32,
                           a[2] | static_cast<uint64_t>(a[3]) << 32};
    uint64_t column = low | static_cast<uint64_t>(high) << 32;
    uint64_t rows[4][2], columns[2][4];
    for (int part = 0; part < 4; part++) { /* whose numbers are 2 part and on */
        for (int i = 0; i < 2; i++) {
            rows[part][i] = __shfl_sync(all, factors[i], 4 * g + part);
            columns[i][part] = __shfl_sync(all, column, 4 * (2 * t + i) + part);
        }
    }
    for (int number = 0; number < 16; number++) {
        int part = number % 8 / 2, upper = number / 8, half = number % 2;
        for (int i = 0; i < 4; i++) {
            uint64_t pair = rows[part][upper]; /* rows g and g + 8 */
            uint32_t left = static_cast<uint32_t>(i < 2 ? pair : pair >> 32);
            uint64_t numbers = columns[i % 2][part];
            uint32_t right = static_cast<uint32_t>(upper == 0 ? numbers : numbers >> 32);
            c[i] += half_of(left, half, is_bf16) * half_of(right, half, is_bf16);
        }
    }
}

} // namespace emulate

inline void
krul_multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high)
{
    emulate::multiply(c, a, low, high, true);
}

inline void
krul_multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t low, uint32_t high)
{
    emulate::multiply(c, a, low, high, false);
}

#endif /* EMULATE_MMA_H */

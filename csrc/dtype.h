/* dtype.h - f16 and bf16 to and from f32, one element at a time.
 *
 * Rounding is to nearest, ties to even; NaN stays NaN, quiet. The kernels use these for what is left
 * over after the vectors, so both must agree to the bit (tested for all 65,536 values). */
#ifndef KRUL_DTYPE_H
#define KRUL_DTYPE_H

#include <stdint.h>
#include <string.h>

static inline uint32_t
krul_f32_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float
krul_bits_to_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float
krul_bf16_to_f32(uint16_t bits)
{
    return krul_bits_to_f32((uint32_t)bits << 16);
}

static inline uint16_t
krul_f32_to_bf16(float value)
{
    uint32_t bits = krul_f32_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x0040u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float
krul_f16_to_f32(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
    uint32_t exponent = bits >> 10 & 0x1fu;
    uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 0x1f) { /* infinity and NaN; a signalling NaN becomes quiet, as hardware does */
        uint32_t quiet = mantissa != 0 ? 0x00400000u : 0;
        return krul_bits_to_f32(sign | 0x7f800000u | quiet | mantissa << 13);
    }
    if (exponent == 0) { /* zero and subnormals: mantissa * 2^-24 is exact in f32 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return krul_bits_to_f32(sign | krul_f32_to_bits(magnitude));
    }
    return krul_bits_to_f32(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t
krul_f32_to_f16(float value)
{
    uint32_t bits = krul_f32_to_bits(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    }
    if (magnitude >= 0x477ff000u) { /* rounds to beyond 65504 */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) { /* subnormal: adding 0.5 leaves the rounded integer below */
        float shifted = krul_bits_to_f32(magnitude) + 0.5f;
        return (uint16_t)(sign | (krul_f32_to_bits(shifted) - krul_f32_to_bits(0.5f)));
    }
    uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

#endif /* KRUL_DTYPE_H */

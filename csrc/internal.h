/* internal.h - what the library's own files share: control flow and checked arithmetic. */
#ifndef KRUL_INTERNAL_H
#define KRUL_INTERNAL_H

#include <assert.h>

#include "krul.h"

/* Inside a function with a local `status` and a label `done`: stop at the first failure. */
#define KRUL_TRY(expression)                                                                       \
    do {                                                                                           \
        status = (expression);                                                                     \
        if (status != KRUL_STATUS_OK) {                                                            \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#define KRUL_LENGTH(array) (sizeof(array) / sizeof((array)[0]))

static inline int64_t
krul_min_i64(int64_t left, int64_t right)
{
    return left < right ? left : right;
}

static inline int64_t
krul_max_i64(int64_t left, int64_t right)
{
    return left > right ? left : right;
}

/* Did the product or sum not fit? The results are written in either case. */
static inline bool
krul_multiply_overflows(size_t left, size_t right, size_t *out)
{
    return __builtin_mul_overflow(left, right, out);
}

static inline bool
krul_add_overflows(size_t left, size_t right, size_t *out)
{
    return __builtin_add_overflow(left, right, out);
}

static inline bool
krul_multiply_overflows_i64(int64_t left, int64_t right, int64_t *out)
{
    return __builtin_mul_overflow(left, right, out);
}

static inline bool
krul_add_overflows_i64(int64_t left, int64_t right, int64_t *out)
{
    return __builtin_add_overflow(left, right, out);
}

/* Files are little-endian and fields may be unaligned: read and write them byte by byte. Compilers
 * turn these into single moves. */
static inline uint16_t
krul_load_u16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] | (uint16_t)bytes[1] << 8);
}

static inline uint32_t
krul_load_u32(const uint8_t *bytes)
{
    return (uint32_t)krul_load_u16(bytes) | (uint32_t)krul_load_u16(bytes + 2) << 16;
}

static inline uint64_t
krul_load_u64(const uint8_t *bytes)
{
    return (uint64_t)krul_load_u32(bytes) | (uint64_t)krul_load_u32(bytes + 4) << 32;
}

static inline void
krul_store_u16(uint8_t *bytes, uint16_t value)
{
    bytes[0] = (uint8_t)value;
    bytes[1] = (uint8_t)(value >> 8);
}

static inline void
krul_store_u32(uint8_t *bytes, uint32_t value)
{
    krul_store_u16(bytes, (uint16_t)value);
    krul_store_u16(bytes + 2, (uint16_t)(value >> 16));
}

static inline void
krul_store_u64(uint8_t *bytes, uint64_t value)
{
    krul_store_u32(bytes, (uint32_t)value);
    krul_store_u32(bytes + 4, (uint32_t)(value >> 32));
}

#endif /* KRUL_INTERNAL_H */

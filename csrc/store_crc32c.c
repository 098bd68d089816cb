/* store_crc32c.c - CRC-32C (Castagnoli), the checksum of every byte in a store.
 *
 * The x86 instruction takes three cycles but can start every cycle, so three stretches of a buffer
 * are summed side by side and then joined: a CRC is linear, so "the first stretch followed by that
 * many zero bytes" is four look-ups. Where there is no such instruction, eight tables take eight
 * bytes per step.
 *
 * Where 64 bytes can be multiplied at once without carries (AVX-512, VPCLMULQDQ), a buffer is folded
 * first: 256 bytes, as a polynomial, times x to the power of how far they are shifted, modulo the
 * CRC's, and added to the 256 that follow, have the same CRC as all 512; see Gopal et al., "Fast CRC
 * Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009. */
#include <pthread.h>
#include <string.h>

#include "store.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    POLYNOMIAL = (int)0x82f63b78u, /* bits reversed, as the CRC is */
    N_SLICES = 8,
    LONG_STRETCH_BYTES = 4096, /* powers of two: see build_shift */
    SHORT_STRETCH_BYTES = 256,
    FOLDED_BYTES = 256, /* four registers */
};

/* slices[k][b]: the CRC of byte b followed by k zero bytes. */
static uint32_t slices[N_SLICES][256];

/* shift[i][b]: what byte b at place i of a CRC becomes when a stretch of zero bytes follows. */
typedef struct shift_table {
    uint32_t shift[4][256];
} shift_table;

static shift_table long_shift;
static shift_table short_shift;
static bool has_instruction;
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

/* Multiply a 32 x 32 matrix over GF(2), one word per column, by a vector. */
static uint32_t
multiply_vector(const uint32_t matrix[32], uint32_t vector)
{
    uint32_t sum = 0;
    for (int bit = 0; bit < 32; bit++) {
        if ((vector >> bit & 1u) != 0) {
            sum ^= matrix[bit];
        }
    }
    return sum;
}

/* n_bytes must be a power of two: one zero byte is a matrix, and squaring it doubles the bytes. */
static void
build_shift(size_t n_bytes, shift_table *out)
{
    uint32_t matrix[32];
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        matrix[bit] = crc >> 8 ^ slices[0][crc & 0xffu];
    }
    for (size_t done = 1; done < n_bytes; done *= 2) {
        uint32_t squared[32];
        for (int bit = 0; bit < 32; bit++) {
            squared[bit] = multiply_vector(matrix, matrix[bit]);
        }
        memcpy(matrix, squared, sizeof matrix);
    }
    for (uint32_t place = 0; place < 4; place++) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            out->shift[place][byte] = multiply_vector(matrix, byte << 8 * place);
        }
    }
}

#if defined(__x86_64__)

static bool can_fold;

/* What the halves of 16 bytes are multiplied by to be shifted over FOLDED_BYTES: the low half stands
 * for the powers of x above the high one's, because bits are reversed. */
static uint64_t low_factor, high_factor;

/* x to a power, modulo the CRC's polynomial; bits reversed, and one place up, because the product of
 * two reversed polynomials comes out one place down. */
static uint64_t
power_of_x(int exponent)
{
    uint32_t power = 0x80000000u;
    for (int i = 0; i < exponent; i++) {
        power = (power & 1u) != 0 ? power >> 1 ^ (uint32_t)POLYNOMIAL : power >> 1;
    }
    return (uint64_t)power << 1;
}

#endif

static void
build_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc & 1u) != 0 ? crc >> 1 ^ (uint32_t)POLYNOMIAL : crc >> 1;
        }
        slices[0][byte] = crc;
    }
    for (int slice = 1; slice < N_SLICES; slice++) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t crc = slices[slice - 1][byte];
            slices[slice][byte] = crc >> 8 ^ slices[0][crc & 0xffu];
        }
    }
    build_shift(LONG_STRETCH_BYTES, &long_shift);
    build_shift(SHORT_STRETCH_BYTES, &short_shift);
#if defined(__x86_64__)
    __builtin_cpu_init();
    has_instruction = __builtin_cpu_supports("sse4.2") != 0;
    can_fold = has_instruction && __builtin_cpu_supports("avx512f") != 0 &&
               __builtin_cpu_supports("pclmul") != 0 && __builtin_cpu_supports("vpclmulqdq") != 0;
    low_factor = power_of_x(8 * FOLDED_BYTES + 32);
    high_factor = power_of_x(8 * FOLDED_BYTES - 32);
#endif
}

static void
need_tables(void)
{
    /* Fails only for an invalid once object. */
    (void)pthread_once(&tables_once, build_tables);
}

uint32_t
krul_store_crc32c_by_table(uint32_t crc, const void *bytes, size_t n_bytes)
{
    need_tables();
    const uint8_t *next = bytes;
    uint32_t state = ~crc;
    for (; n_bytes >= 8; n_bytes -= 8, next += 8) {
        uint32_t low = state ^ krul_load_u32(next);
        uint32_t high = krul_load_u32(next + 4);
        state = slices[7][low & 0xffu] ^ slices[6][low >> 8 & 0xffu] ^
                slices[5][low >> 16 & 0xffu] ^ slices[4][low >> 24] ^ slices[3][high & 0xffu] ^
                slices[2][high >> 8 & 0xffu] ^ slices[1][high >> 16 & 0xffu] ^
                slices[0][high >> 24];
    }
    for (; n_bytes > 0; n_bytes--, next++) {
        state = state >> 8 ^ slices[0][(state ^ *next) & 0xffu];
    }
    return ~state;
}

bool
krul_store_crc32c_has_instruction(void)
{
    need_tables();
    return has_instruction;
}

#if defined(__x86_64__)

static uint32_t
apply_shift(const shift_table *table, uint64_t state)
{
    return table->shift[0][state & 0xffu] ^ table->shift[1][state >> 8 & 0xffu] ^
           table->shift[2][state >> 16 & 0xffu] ^ table->shift[3][state >> 24 & 0xffu];
}

/* Take as many triples of stretches as there are; the rest is left to the caller. */
__attribute__((target("sse4.2"))) static uint64_t
sum_triples(uint64_t state, const uint8_t **next, size_t *n_bytes, size_t stretch_bytes,
            const shift_table *table)
{
    const uint8_t *at = *next;
    size_t left = *n_bytes;
    while (left >= 3 * stretch_bytes) {
        uint64_t second = 0;
        uint64_t third = 0;
        for (size_t i = 0; i < stretch_bytes; i += 8) {
            state = _mm_crc32_u64(state, krul_load_u64(at + i));
            second = _mm_crc32_u64(second, krul_load_u64(at + stretch_bytes + i));
            third = _mm_crc32_u64(third, krul_load_u64(at + 2 * stretch_bytes + i));
        }
        state = apply_shift(table, state) ^ second;
        state = apply_shift(table, state) ^ third;
        at += 3 * stretch_bytes;
        left -= 3 * stretch_bytes;
    }
    *next = at;
    *n_bytes = left;
    return state;
}

__attribute__((target("sse4.2"))) static uint32_t
sum_by_instruction(uint32_t crc, const uint8_t *next, size_t n_bytes)
{
    uint64_t state = (uint32_t)~crc;
    state = sum_triples(state, &next, &n_bytes, LONG_STRETCH_BYTES, &long_shift);
    state = sum_triples(state, &next, &n_bytes, SHORT_STRETCH_BYTES, &short_shift);
    for (; n_bytes >= 8; n_bytes -= 8, next += 8) {
        state = _mm_crc32_u64(state, krul_load_u64(next));
    }
    uint32_t narrow = (uint32_t)state;
    for (; n_bytes > 0; n_bytes--, next++) {
        narrow = _mm_crc32_u8(narrow, *next);
    }
    return ~narrow;
}

#define FOLDING __attribute__((target("sse4.2,pclmul,avx512f,vpclmulqdq")))

FOLDING static inline __m512i
fold(__m512i value, __m512i factors, __m512i next)
{
    __m512i low = _mm512_clmulepi64_epi128(value, factors, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(value, factors, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96); /* the sum of all three */
}

/* At least FOLDED_BYTES. */
FOLDING static uint32_t
sum_by_folding(uint32_t crc, const uint8_t *next, size_t n_bytes)
{
    __m512i parts[4];
    for (int i = 0; i < 4; i++) {
        parts[i] = _mm512_loadu_si512(next + 64 * i);
    }
    __m128i state = _mm_cvtsi32_si128((int)~crc);
    parts[0] = _mm512_xor_si512(parts[0], _mm512_zextsi128_si512(state));
    next += FOLDED_BYTES;
    n_bytes -= FOLDED_BYTES;
    const __m512i factors = _mm512_broadcast_i32x4(
        _mm_set_epi64x((long long)high_factor, (long long)low_factor));
    for (; n_bytes >= FOLDED_BYTES; n_bytes -= FOLDED_BYTES, next += FOLDED_BYTES) {
        for (int i = 0; i < 4; i++) {
            parts[i] = fold(parts[i], factors, _mm512_loadu_si512(next + 64 * i));
        }
    }
    /* The checksum so far is in what was folded, which stands for all before it. */
    uint8_t folded[FOLDED_BYTES];
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(folded + 64 * i, parts[i]);
    }
    return sum_by_instruction(sum_by_instruction(UINT32_MAX, folded, FOLDED_BYTES), next, n_bytes);
}

#undef FOLDING

#endif

uint32_t
krul_store_crc32c_by_instruction(uint32_t crc, const void *bytes, size_t n_bytes)
{
#if defined(__x86_64__)
    if (krul_store_crc32c_has_instruction()) {
        return sum_by_instruction(crc, bytes, n_bytes);
    }
#endif
    return krul_store_crc32c_by_table(crc, bytes, n_bytes);
}

uint32_t
krul_store_crc32c(uint32_t crc, const void *bytes, size_t n_bytes)
{
#if defined(__x86_64__)
    need_tables();
    if (can_fold && n_bytes >= FOLDED_BYTES) {
        return sum_by_folding(crc, bytes, n_bytes);
    }
#endif
    return krul_store_crc32c_by_instruction(crc, bytes, n_bytes);
}

/* cpu_avx512.c - the CPU operations for x86-64 with AVX-512 as of Ice Lake and Zen 4. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu_avx512.h"

KRUL_CPU_TARGET_BEGIN(KRUL_CPU_AVX512_TARGET)

#define KRUL_CPU_AVX512 1
#define KRUL_CPU_TABLE krul_backend_avx512
#define KRUL_CPU_NAME "avx512"
#define KRUL_CPU_IS_USABLE KRUL_CPU_AVX512_IS_USABLE

#include "cpu_ops.inc"

KRUL_CPU_TARGET_END
#else
typedef int krul_cpu_avx512_is_not_built; /* ISO C wants a declaration in every file */
#endif

/* cpu_avx512_gather.c - the same as cpu_avx512.c for processors with quick gather instructions, which
 * are Intel's as of Sapphire Rapids: it was the first with AMX, and by that is told. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu_avx512.h"

KRUL_CPU_TARGET_BEGIN(KRUL_CPU_AVX512_TARGET)

#define KRUL_CPU_AVX512 1
#define KRUL_CPU_GATHER 1
#define KRUL_CPU_TABLE krul_backend_avx512_gather
#define KRUL_CPU_NAME "avx512_gather"
#define KRUL_CPU_IS_USABLE (KRUL_CPU_AVX512_IS_USABLE && krul_has_amx_bf16())

#include "cpu_ops.inc"

KRUL_CPU_TARGET_END
#else
typedef int krul_cpu_avx512_gather_is_not_built; /* ISO C wants a declaration in every file */
#endif

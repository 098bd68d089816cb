/* cpu_avx512_gather.c - the same as cpu_avx512.c for processors with quick gather instructions, which
 * are Intel's as of Sapphire Rapids: it was the first with AMX, and by that is told. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu_target.h"

KRUL_CPU_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,"
                      "avx512vbmi2" KRUL_CPU_WIDE)

#define KRUL_CPU_AVX512 1
#define KRUL_CPU_GATHER 1
#define KRUL_CPU_TABLE krul_backend_avx512_gather
#define KRUL_CPU_NAME "avx512_gather"
#define KRUL_CPU_IS_USABLE                                                                         \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                    \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&                   \
     __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&              \
     __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&                            \
     __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("amx-bf16"))

#include "cpu_ops.inc"

KRUL_CPU_TARGET_END
#else
typedef int krul_cpu_avx512_gather_is_not_built; /* ISO C wants a declaration in every file */
#endif

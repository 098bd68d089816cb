/* cpu_avx2.c - the CPU operations for x86-64 with AVX2, FMA, F16C and BMI2. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu_target.h"

KRUL_CPU_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2")

#define KRUL_CPU_AVX2 1
#define KRUL_CPU_TABLE krul_backend_avx2
#define KRUL_CPU_NAME "avx2"
#define KRUL_CPU_IS_USABLE                                                                         \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&                            \
     __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))

#include "cpu_ops.inc"

KRUL_CPU_TARGET_END
#else
typedef int krul_cpu_avx2_is_not_built; /* ISO C wants a declaration in every file */
#endif

/* cpu_avx512.h - what the files for AVX-512 are compiled for, and where they run. */
#ifndef KRUL_CPU_AVX512_H
#define KRUL_CPU_AVX512_H

#include "cpu_target.h"

#define KRUL_CPU_AVX512_TARGET                                                                     \
    "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,"                        \
    "avx512vbmi2" KRUL_CPU_WIDE

#define KRUL_CPU_AVX512_IS_USABLE                                                                  \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                    \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&                   \
     __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&              \
     __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&                            \
     __builtin_cpu_supports("bmi2"))

#endif /* KRUL_CPU_AVX512_H */

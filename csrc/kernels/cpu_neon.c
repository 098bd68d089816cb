/* cpu_neon.c - the CPU operations for 64-bit Arm, where NEON is always there. */
#if defined(__aarch64__)
#define KRUL_CPU_NEON 1
#define KRUL_CPU_TABLE krul_backend_neon
#define KRUL_CPU_NAME "neon"
#define KRUL_CPU_IS_USABLE true

#include "cpu_ops.inc"
#else
typedef int krul_cpu_neon_is_not_built; /* ISO C wants a declaration in every file */
#endif

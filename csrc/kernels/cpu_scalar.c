/* cpu_scalar.c - the CPU operations for any processor. */
#define KRUL_CPU_SCALAR 1
#define KRUL_CPU_TABLE krul_backend_scalar
#define KRUL_CPU_NAME "scalar"
#define KRUL_CPU_IS_USABLE true

#include "cpu_ops.inc"

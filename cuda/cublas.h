/* cublas.h - matrix products on a GPU by cuBLAS, which is found at run time; plain C.
 *
 * No header of cuBLAS is needed to build, and no library to import: the five functions are declared
 * here, with the numbers of their enums, which are the same from cuBLAS 11 on. */
#ifndef KRUL_CUBLAS_H
#define KRUL_CUBLAS_H

#include "krul.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The functions of cuBLAS that are used; all return a cublasStatus_t, 0 for success. Tests put their
 * own here. */
typedef struct krul_cublas_table {
    int (*create)(void **handle_out);
    int (*destroy)(void *handle);
    int (*set_stream)(void *handle, void *stream);
    int (*set_workspace)(void *handle, void *workspace, size_t workspace_bytes);
    /* Column-major: C = alpha op(A) op(B) + beta C. */
    int (*gemm)(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
                const void *a, int a_type, int lda, const void *b, int b_type, int ldb,
                const void *beta, void *c, int c_type, int ldc, int compute_type, int algorithm);
    const char *(*status_name)(int status); /* NULL: has none */
    char library[64]; /* the name under which it was found */
} krul_cublas_table;

/* How exact products are. Factors and sums are float32 in memory; what differs is to how many bits
 * the factors are rounded before they are multiplied. Sums are always float32. Numbers of codec
 * predict are whole, and their step is the product's alpha: TF32 holds them exactly up to 2048, so that
 * a coefficient of n steps is off by the rounding of the basis alone, 2^-12 n of a step at most, where
 * quantising was off by half a step. */
typedef enum krul_cublas_math {
    KRUL_CUBLAS_FLOAT32 = 0, /* 24 bits: what FORMAT.md promises */
    KRUL_CUBLAS_TF32 = 1, /* 11 bits, on tensor cores: several times faster */
    KRUL_CUBLAS_BF16 = 2, /* 8 bits, faster still */
} krul_cublas_math;

/* The numbers that cuBLAS gives its enums. */
enum {
    KRUL_CUBLAS_OP_N = 0,
    KRUL_CUBLAS_OP_T = 1,
    KRUL_CUBLAS_R_32F = 0,
    KRUL_CUBLAS_COMPUTE_32F = 68,
    KRUL_CUBLAS_COMPUTE_32F_FAST_16BF = 75,
    KRUL_CUBLAS_COMPUTE_32F_FAST_TF32 = 77,
    KRUL_CUBLAS_GEMM_DEFAULT = -1,
    /* What cuBLAS asks for on the largest GPUs, so that no algorithm is ruled out. */
    KRUL_CUBLAS_WORKSPACE_BYTES = 32 << 20,
};

/* A handle of cuBLAS for one stream of one device; for one thread at a time. */
typedef struct krul_cublas krul_cublas;

/* Open one of the named libraries: the first that the process has loaded, else the first that can be
 * loaded. What has none of these, or lacks a function, is KRUL_STATUS_UNSUPPORTED with the reason. */
krul_status krul_cublas_open(const char *const *names, int n_names, krul_cublas_table *out,
                             krul_error *err) KRUL_MUST_CHECK;

/* The cuBLAS of this process, found once and kept for good: version 13, then 12. */
krul_status krul_cublas_find(const krul_cublas_table **out, krul_error *err) KRUL_MUST_CHECK;

/* A handle for a stream of the current device. Both the workspace (device memory, of 256-byte
 * alignment; NULL with 0 bytes: cuBLAS's own) and the table are borrowed until krul_cublas_free. With
 * a workspace of its own nothing is allocated later, and results are the same in every run. */
krul_status krul_cublas_new(const krul_cublas_table *table, void *stream, void *workspace,
                            size_t workspace_bytes, krul_cublas_math math, krul_cublas **out,
                            krul_error *err) KRUL_MUST_CHECK;

/* NULL is allowed. */
void krul_cublas_free(krul_cublas *cublas);

/* Enqueue C = alpha op(A) op(B) + beta C, column-major, float32: op(A) is m x k, op(B) k x n. With
 * beta 0, C is not read. */
krul_status krul_cublas_multiply(krul_cublas *cublas, bool trans_a, bool trans_b, int64_t m,
                                 int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                                 const float *b, int64_t ldb, float beta, float *c, int64_t ldc,
                                 krul_error *err) KRUL_MUST_CHECK;

/* The stream that products are enqueued on. */
void *krul_cublas_stream(const krul_cublas *cublas);

#ifdef __cplusplus
}
#endif

#endif /* KRUL_CUBLAS_H */

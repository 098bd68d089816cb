/* stub_cublas.c - a library that looks like cuBLAS and multiplies on the CPU, with plain loops.
 *
 * Factors are rounded as the compute type says, sums are float32. Leading dimensions are checked as
 * cuBLAS checks them. With STUB_LACKS_GEMM there is no product. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    ALLOC_FAILED = 3,
    INVALID_VALUE = 7,
    OP_N = 0,
    R_32F = 0,
    COMPUTE_32F = 68,
    COMPUTE_32F_FAST_16BF = 75,
    COMPUTE_32F_FAST_TF32 = 77,
};

typedef struct stub_handle {
    void *stream;
    void *workspace;
    size_t workspace_bytes;
} stub_handle;

int cublasCreate_v2(void **handle_out);
int cublasDestroy_v2(void *handle);
int cublasSetStream_v2(void *handle, void *stream);
int cublasSetWorkspace_v2(void *handle, void *workspace, size_t n_bytes);
int cublasGemmEx(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
                 const void *a, int a_type, int lda, const void *b, int b_type, int ldb,
                 const void *beta, void *c, int c_type, int ldc, int compute_type, int algorithm);
const char *cublasGetStatusName(int status);
void stub_cublas_fail_after(int n_calls);
int stub_cublas_n_products(void);
int stub_cublas_n_handles(void);

static int n_calls_left = -1, n_products, n_handles;

/* The call after that many fails; -1: none does. */
void
stub_cublas_fail_after(int n_calls)
{
    n_calls_left = n_calls;
}

int
stub_cublas_n_products(void)
{
    return n_products;
}

/* That are open. */
int
stub_cublas_n_handles(void)
{
    return n_handles;
}

static int
is_failing(void)
{
    return n_calls_left >= 0 && n_calls_left-- == 0;
}

int
cublasCreate_v2(void **handle_out)
{
    if (is_failing()) {
        return NOT_INITIALIZED;
    }
    *handle_out = calloc(1, sizeof(stub_handle));
    n_handles += *handle_out != NULL;
    return *handle_out != NULL ? SUCCESS : ALLOC_FAILED;
}

int
cublasDestroy_v2(void *handle)
{
    n_handles--;
    free(handle);
    return SUCCESS;
}

int
cublasSetStream_v2(void *handle, void *stream)
{
    if (is_failing()) {
        return NOT_INITIALIZED;
    }
    *(stub_handle *)handle = (stub_handle){.stream = stream}; /* the workspace is gone, too */
    return SUCCESS;
}

int
cublasSetWorkspace_v2(void *handle, void *workspace, size_t n_bytes)
{
    stub_handle *own = handle;
    if (is_failing() || (uintptr_t)workspace % 256 != 0) {
        return INVALID_VALUE;
    }
    own->workspace = workspace;
    own->workspace_bytes = n_bytes;
    return SUCCESS;
}

const char *
cublasGetStatusName(int status)
{
    return status == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_OTHER";
}

#ifndef STUB_LACKS_GEMM

/* To so many bits of mantissa, the hidden one counted; to nearest, ties to even. */
static float
round_to(float value, int n_bits)
{
    uint32_t bits;
    int n_dropped = 24 - n_bits;
    memcpy(&bits, &value, sizeof bits);
    if (n_dropped == 0 || !isfinite(value)) {
        return value;
    }
    bits += (1u << (n_dropped - 1)) - 1 + (bits >> n_dropped & 1);
    bits &= ~((1u << n_dropped) - 1);
    memcpy(&value, &bits, sizeof value);
    return value;
}

int
cublasGemmEx(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
             const void *a, int a_type, int lda, const void *b, int b_type, int ldb,
             const void *beta, void *c, int c_type, int ldc, int compute_type, int algorithm)
{
    const float *left = a, *right = b;
    float *out = c;
    int n_bits = compute_type == COMPUTE_32F             ? 24
                 : compute_type == COMPUTE_32F_FAST_TF32 ? 11
                 : compute_type == COMPUTE_32F_FAST_16BF ? 8
                                                         : 0;
    if (is_failing() || handle == NULL || n_bits == 0 || a_type != R_32F || b_type != R_32F ||
        c_type != R_32F || algorithm != -1 || m < 0 || n < 0 || k < 0 ||
        lda < (trans_a == OP_N ? m : k) || ldb < (trans_b == OP_N ? k : n) || ldc < m || lda < 1 ||
        ldb < 1 || ldc < 1) {
        return INVALID_VALUE;
    }
    n_products++;
    float *column = malloc((size_t)(m > 0 ? m : 1) * sizeof *column);
    if (column == NULL) {
        return ALLOC_FAILED;
    }
    for (ptrdiff_t j = 0; j < n; j++) {
        memset(column, 0, (size_t)m * sizeof *column);
        for (ptrdiff_t i = 0; i < k; i++) {
            float factor = round_to(trans_b == OP_N ? right[j * ldb + i] : right[i * ldb + j],
                                    n_bits);
            for (ptrdiff_t row = 0; row < m; row++) {
                column[row] += factor *
                               round_to(trans_a == OP_N ? left[i * lda + row] : left[row * lda + i],
                                        n_bits);
            }
        }
        for (ptrdiff_t row = 0; row < m; row++) {
            float *there = &out[j * ldc + row];
            float before = *(const float *)beta == 0 ? 0 : *(const float *)beta * *there;
            *there = *(const float *)alpha * column[row] + before;
        }
    }
    free(column);
    return SUCCESS;
}

#endif

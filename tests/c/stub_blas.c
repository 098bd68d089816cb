/* stub_blas.c - a library for test_blas.c: a product of plain loops, right or wrong in one way.
 *
 * run.sh builds it once for every row of `stubs` there. STUB_CBLAS or STUB_FORTRAN is the symbol's
 * name, STUB_INTEGER the type of its sizes. */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

int stub_blas_most_threads(void);
int stub_blas_n_calls(void);
int MKL_Set_Num_Threads_Local(int n_threads);

static atomic_int n_calls, most_threads;

#if defined(STUB_COUNTS_THREADS)
static _Thread_local int own_threads;

int
MKL_Set_Num_Threads_Local(int n_threads)
{
    int before = own_threads;
    own_threads = n_threads;
    return before;
}
#else
enum { own_threads = 0 };
#endif

/* The most threads that a product was allowed, 0 counting as "as many as there are": 1000. */
int
stub_blas_most_threads(void)
{
    return atomic_load(&most_threads);
}

int
stub_blas_n_calls(void)
{
    return atomic_load(&n_calls);
}

#if defined(STUB_INTEGER)
/* Row-major. */
static void
multiply(int trans_a, int trans_b, STUB_INTEGER m, STUB_INTEGER n, STUB_INTEGER k, float alpha,
         const float *a, STUB_INTEGER lda, const float *b, STUB_INTEGER ldb, float beta, float *c,
         STUB_INTEGER ldc)
{
    int allowed = own_threads == 0 ? 1000 : own_threads;
    int seen = atomic_load(&most_threads);
    while (allowed > seen && !atomic_compare_exchange_weak(&most_threads, &seen, allowed)) {
    }
    atomic_fetch_add(&n_calls, 1);
#if defined(STUB_IGNORES_BETA)
    beta = 0;
#elif defined(STUB_MIXED_UP)
    trans_a = !trans_a;
#endif
    for (STUB_INTEGER row = 0; row < m; row++) {
        for (STUB_INTEGER column = 0; column < n; column++) {
            float sum = 0;
            for (STUB_INTEGER i = 0; i < k; i++) {
                sum += (trans_a ? a[i * lda + row] : a[row * lda + i]) *
                       (trans_b ? b[column * ldb + i] : b[i * ldb + column]);
            }
            float *there = &c[row * ldc + column];
#if defined(STUB_READS_C)
            *there = alpha * sum + beta * *there;
#else
            *there = alpha * sum + (beta != 0 ? beta * *there : 0);
#endif
        }
#if defined(STUB_WRITES_BESIDE)
        c[row * ldc + n] = 0;
#endif
    }
}
#endif

#if defined(STUB_CBLAS)
void STUB_CBLAS(int order, int trans_a, int trans_b, STUB_INTEGER m, STUB_INTEGER n, STUB_INTEGER k,
                float alpha, const float *a, STUB_INTEGER lda, const float *b, STUB_INTEGER ldb,
                float beta, float *c, STUB_INTEGER ldc);

void
STUB_CBLAS(int order, int trans_a, int trans_b, STUB_INTEGER m, STUB_INTEGER n, STUB_INTEGER k,
           float alpha, const float *a, STUB_INTEGER lda, const float *b, STUB_INTEGER ldb,
           float beta, float *c, STUB_INTEGER ldc)
{
    if (order == 101) {
        multiply(trans_a == 112, trans_b == 112, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    }
}
#elif defined(STUB_FORTRAN)
void STUB_FORTRAN(const char *trans_a, const char *trans_b, const STUB_INTEGER *m,
                  const STUB_INTEGER *n, const STUB_INTEGER *k, const float *alpha, const float *a,
                  const STUB_INTEGER *lda, const float *b, const STUB_INTEGER *ldb,
                  const float *beta, float *c, const STUB_INTEGER *ldc);

/* Columns read as rows are the transpose: C' = B' A'. */
void
STUB_FORTRAN(const char *trans_a, const char *trans_b, const STUB_INTEGER *m, const STUB_INTEGER *n,
             const STUB_INTEGER *k, const float *alpha, const float *a, const STUB_INTEGER *lda,
             const float *b, const STUB_INTEGER *ldb, const float *beta, float *c,
             const STUB_INTEGER *ldc)
{
    multiply(*trans_b == 'T', *trans_a == 'T', *n, *m, *k, *alpha, b, *ldb, a, *lda, *beta, c,
             *ldc);
}
#endif

#if defined(STUB_BF16)
/* MKL's; STUB_BF16 is what every sum begins with: 0, or it is wrong. */
void cblas_gemm_bf16bf16f32(int order, int trans_a, int trans_b, STUB_INTEGER m, STUB_INTEGER n,
                            STUB_INTEGER k, float alpha, const uint16_t *a, STUB_INTEGER lda,
                            const uint16_t *b, STUB_INTEGER ldb, float beta, float *c,
                            STUB_INTEGER ldc);

static float
widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void
cblas_gemm_bf16bf16f32(int order, int trans_a, int trans_b, STUB_INTEGER m, STUB_INTEGER n,
                       STUB_INTEGER k, float alpha, const uint16_t *a, STUB_INTEGER lda,
                       const uint16_t *b, STUB_INTEGER ldb, float beta, float *c, STUB_INTEGER ldc)
{
    (void)order;
    for (STUB_INTEGER row = 0; row < m; row++) {
        for (STUB_INTEGER column = 0; column < n; column++) {
            float sum = STUB_BF16;
            for (STUB_INTEGER i = 0; i < k; i++) {
                sum += widened(trans_a == 112 ? a[i * lda + row] : a[row * lda + i]) *
                       widened(trans_b == 112 ? b[column * ldb + i] : b[i * ldb + column]);
            }
            float *there = &c[row * ldc + column];
            *there = alpha * sum + (beta != 0 ? beta * *there : 0);
        }
    }
}
#endif

/* blas.c - the matrix product found at run time.
 *
 * Every process that runs a model has a good BLAS in it: MKL inside torch, OpenBLAS beside NumPy.
 * They differ in how the product is spelled, in whether sizes are 32 or 64 bits wide, and in
 * whether they are passed by value (cblas) or by pointer (Fortran). The width need not be known to
 * call one safely: sizes are kept below 2^31 unless the name promises 64 bits, and are passed as 64
 * bits, of which a callee that wants 32 reads the lower half, be it from a register, from a slot of
 * the stack or, on a little-endian machine, through a pointer. Whether that holds, and whether the
 * product is right at all, is tried out before a library is used. */
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "internal.h"

enum { CBLAS_ROW_MAJOR = 101, CBLAS_NO_TRANS = 111, CBLAS_TRANS = 112 };

typedef void cblas_function(int order, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k,
                            float alpha, const float *a, int64_t lda, const float *b, int64_t ldb,
                            float beta, float *c, int64_t ldc);

/* Column-major. The last two are the lengths of the first two, which gfortran's callees may read and
 * others do not miss. */
typedef void fortran_function(const char *trans_a, const char *trans_b, const int64_t *m,
                              const int64_t *n, const int64_t *k, const float *alpha,
                              const float *a, const int64_t *lda, const float *b,
                              const int64_t *ldb, const float *beta, float *c, const int64_t *ldc,
                              size_t trans_a_length, size_t trans_b_length);

typedef void bf16_function(int order, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k,
                           float alpha, const uint16_t *a, int64_t lda, const uint16_t *b,
                           int64_t ldb, float beta, float *c, int64_t ldc);

/* Sets the calling thread's own count and returns what it was, 0 for none. OpenBLAS has a function
 * that is named alike, but as built for NumPy it changes the count of the whole process, NumPy's
 * own products included: not used. */
typedef int set_threads_function(int n_threads);

typedef struct spelling {
    const char *symbol;
    bool is_cblas;
    bool is_64_bit;
} spelling;

/* 64 bits first: a library that has both is asked by the name that says so. */
static const spelling spellings[] = {
    {"scipy_cblas_sgemm64_", true, true}, /* OpenBLAS in NumPy's and SciPy's wheels */
    {"cblas_sgemm64_", true, true}, /* OpenBLAS with SYMBOLSUFFIX=64_ */
    {"cblas_sgemm_64", true, true}, /* MKL, the reference */
    {"sgemm_64_", false, true}, /* MKL, also inside torch; OpenBLAS, the reference */
    {"SGEMM_64", false, true},
    {"scipy_cblas_sgemm", true, false},
    {"cblas_sgemm", true, false},
    {"sgemm_", false, false},
    {"sgemm", false, false},
};

struct krul_blas {
    void *library;
    const spelling *spelled;
    cblas_function *cblas; /* one of these two, as spelled->is_cblas says */
    fortran_function *fortran;
    bf16_function *bf16; /* NULL: there is none, or it is wrong */
    set_threads_function *set_threads; /* NULL: there is none */
};

/* Row-major; the sizes are checked. */
static void
multiply(const krul_blas *blas, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
         float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
         float *c, int64_t ldc)
{
    int n_threads = blas->set_threads != NULL ? blas->set_threads(1) : 0;
    if (blas->spelled->is_cblas) {
        blas->cblas(CBLAS_ROW_MAJOR, trans_a ? CBLAS_TRANS : CBLAS_NO_TRANS,
                    trans_b ? CBLAS_TRANS : CBLAS_NO_TRANS, m, n, k, alpha, a, lda, b, ldb, beta, c,
                    ldc);
    }
    else {
        /* Rows read as columns are the transpose: C' = B' A'. */
        blas->fortran(trans_b ? "T" : "N", trans_a ? "T" : "N", &n, &m, &k, &alpha, b, &ldb, a,
                      &lda, &beta, c, &ldc, 1, 1);
    }
    if (blas->set_threads != NULL) {
        (void)blas->set_threads(n_threads);
    }
}

static void
multiply_bf16(const krul_blas *blas, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
              float alpha, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb,
              float beta, float *c, int64_t ldc)
{
    int n_threads = blas->set_threads != NULL ? blas->set_threads(1) : 0;
    blas->bf16(CBLAS_ROW_MAJOR, trans_a ? CBLAS_TRANS : CBLAS_NO_TRANS,
               trans_b ? CBLAS_TRANS : CBLAS_NO_TRANS, m, n, k, alpha, a, lda, b, ldb, beta, c,
               ldc);
    if (blas->set_threads != NULL) {
        (void)blas->set_threads(n_threads);
    }
}

/* ---- the trial ---- */

/* Sizes of which no two are alike in one product, so that mixed-up arguments show. */
static const int trial_sizes[][3] = {{3, 5, 2}, {1, 4, 3}, {6, 1, 5}, {4, 3, 0}, {33, 70, 41}};
static const float trial_factors[][2] = {{1, 0}, {0.5f, -2}, {-1, 1}};

enum { TRIAL_MOST = 70, TRIAL_STRIDE = TRIAL_MOST + 3, TRIAL_FLOATS = TRIAL_MOST * TRIAL_STRIDE };

typedef struct trial_matrices {
    float a[TRIAL_FLOATS];
    float b[TRIAL_FLOATS];
    float c[TRIAL_FLOATS];
    float expected[TRIAL_FLOATS];
    uint16_t a_bf16[TRIAL_FLOATS];
    uint16_t b_bf16[TRIAL_FLOATS];
} trial_matrices;

/* Whole numbers from -8 to 8: bfloat16 has them all, and no sum of a trial's products needs more bits
 * than float32 has, so that every order of additions gives the same. */
static float
trial_value(int index, int seed)
{
    return (float)((index * 7 + index / 5 * 3 + seed) % 17 - 8);
}

/* Exact for numbers of few bits: the upper half. */
static uint16_t
upper_half(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* One product against plain loops, to the last bit, and nothing written beside C. */
static bool
try_product(const krul_blas *blas, trial_matrices *trial, const int sizes[3],
            const float factors[2], bool trans_a, bool trans_b, bool is_bf16)
{
    const int m = sizes[0], n = sizes[1], k = sizes[2];
    const int lda = (trans_a ? m : k) + 1, ldb = (trans_b ? k : n) + 2, ldc = n + 3;
    for (int i = 0; i < TRIAL_FLOATS; i++) {
        trial->a[i] = trial_value(i, 1);
        trial->b[i] = trial_value(i, 2);
        trial->expected[i] = trial_value(i, 3);
        trial->a_bf16[i] = upper_half(trial->a[i]);
        trial->b_bf16[i] = upper_half(trial->b[i]);
    }
    memcpy(trial->c, trial->expected, sizeof trial->c);
    for (int row = 0; row < m; row++) {
        for (int column = 0; column < n; column++) {
            float sum = 0;
            for (int i = 0; i < k; i++) {
                float left = trans_a ? trial->a[i * lda + row] : trial->a[row * lda + i];
                float right = trans_b ? trial->b[column * ldb + i] : trial->b[i * ldb + column];
                sum += left * right;
            }
            float *there = &trial->expected[row * ldc + column];
            bool is_read = factors[1] != 0;
            *there = factors[0] * sum + (is_read ? factors[1] * *there : 0);
            if (!is_read) {
                trial->c[row * ldc + column] = NAN; /* must not be looked at */
            }
        }
    }
    if (is_bf16) {
        multiply_bf16(blas, trans_a, trans_b, m, n, k, factors[0], trial->a_bf16, lda,
                      trial->b_bf16, ldb, factors[1], trial->c, ldc);
    }
    else {
        multiply(blas, trans_a, trans_b, m, n, k, factors[0], trial->a, lda, trial->b, ldb,
                 factors[1], trial->c, ldc);
    }
    for (int i = 0; i < TRIAL_FLOATS; i++) {
        if (!(trial->c[i] == trial->expected[i])) { /* NaN is unequal; -0 is 0 */
            return false;
        }
    }
    return true;
}

static krul_status
try_products(const krul_blas *blas, const char *path, bool is_bf16, krul_error *err)
{
    trial_matrices *trial = malloc(sizeof *trial);
    krul_status status = KRUL_STATUS_OK;
    if (trial == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu bytes of trial matrices",
                         sizeof *trial);
    }
    for (size_t i = 0; i < KRUL_LENGTH(trial_sizes) && status == KRUL_STATUS_OK; i++) {
        for (size_t j = 0; j < 4 * KRUL_LENGTH(trial_factors); j++) {
            bool trans_a = (j & 1) != 0, trans_b = (j & 2) != 0;
            const float *factors = trial_factors[j / 4];
            if (!try_product(blas, trial, trial_sizes[i], factors, trans_a, trans_b, is_bf16)) {
                status = krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                                   "%s of %.300s gives a wrong product of %d x %d x %d (trans_a "
                                   "%d, trans_b %d, alpha %g, beta %g)",
                                   blas->spelled->symbol, path, trial_sizes[i][0],
                                   trial_sizes[i][1], trial_sizes[i][2], (int)trans_a, (int)trans_b,
                                   (double)factors[0], (double)factors[1]);
                break;
            }
        }
    }
    free(trial);
    return status;
}

/* ---- open, close ---- */

/* What a symbol is bound to, as bytes: ISO C has no conversion from an object's pointer to a
 * function's. */
static bool
look_up(void *library, const char *symbol, void *function_out)
{
    void *address = dlsym(library, symbol);
    memcpy(function_out, &address, sizeof address);
    return address != NULL;
}

/* Are two symbols of one file? A library is searched with all that it depends on. */
static bool
are_together(void *library, const char *left, const char *right)
{
    Dl_info left_info, right_info;
    void *left_address = dlsym(library, left), *right_address = dlsym(library, right);
    return left_address != NULL && right_address != NULL && dladdr(left_address, &left_info) != 0 &&
           dladdr(right_address, &right_info) != 0 && left_info.dli_fbase == right_info.dli_fbase;
}

/* Find the products, and how to keep them to one thread. */
static bool
bind(krul_blas *blas)
{
    static const char set_threads_symbol[] = "MKL_Set_Num_Threads_Local";
    static const char bf16_symbol[] = "cblas_gemm_bf16bf16f32"; /* MKL, also inside torch */
    for (size_t i = 0; i < KRUL_LENGTH(spellings); i++) {
        const spelling *spelled = &spellings[i];
        void *function_out = spelled->is_cblas ? (void *)&blas->cblas : (void *)&blas->fortran;
        if (look_up(blas->library, spelled->symbol, function_out)) {
            blas->spelled = spelled;
            if (are_together(blas->library, spelled->symbol, set_threads_symbol)) {
                (void)look_up(blas->library, set_threads_symbol, &blas->set_threads);
            }
            if (are_together(blas->library, spelled->symbol, bf16_symbol)) {
                (void)look_up(blas->library, bf16_symbol, &blas->bf16);
            }
            return true;
        }
    }
    return false;
}

krul_status
krul_blas_open(const char *path, krul_blas **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_blas *blas = calloc(1, sizeof *blas);
    if (blas == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu bytes of blas",
                         sizeof *blas);
    }
    /* A BLAS has threads, and memory for each thread that ever called it: it is never unloaded.
     * The one that is in the process already, if there is, is the one to share. */
    blas->library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE | RTLD_NOLOAD);
    if (blas->library == NULL) {
        (void)dlerror();
        blas->library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    }
    if (blas->library == NULL) {
        const char *reason = dlerror();
        status = krul_fail(err, KRUL_STATUS_UNSUPPORTED, "%.200s cannot be loaded: %.250s", path,
                           reason != NULL ? reason : "no reason given");
        goto done;
    }
    if (!bind(blas)) {
        status = krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                           "%.300s has no matrix product: none of cblas_sgemm, sgemm_ and their "
                           "64-bit spellings",
                           path);
        goto done;
    }
    KRUL_TRY(try_products(blas, path, false, err));
    if (blas->bf16 != NULL) {
        krul_error reason;
        krul_status tried = try_products(blas, path, true, &reason);
        if (tried != KRUL_STATUS_OK) {
            blas->bf16 = NULL;
        }
    }
    *out = blas;
    blas = NULL;
done:
    krul_blas_close(blas);
    return status;
}

void
krul_blas_close(krul_blas *blas)
{
    if (blas != NULL) {
        if (blas->library != NULL) {
            (void)dlclose(blas->library);
        }
        free(blas);
    }
}

const char *
krul_blas_symbol(const krul_blas *blas)
{
    return blas->spelled->symbol;
}

bool
krul_blas_is_single_threaded(const krul_blas *blas)
{
    return blas->set_threads != NULL;
}

/* ---- the product ---- */

/* Does a matrix of so many stored rows and columns fit its stride, memory, and the library? */
static krul_status
check_matrix(const char *name, int64_t n_rows, int64_t n_columns, int64_t stride, int64_t most,
             krul_error *err)
{
    size_t n_floats, n_bytes;
    if (stride < krul_max_i64(n_columns, 1) || stride > most) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "ld%s is %lld but must be from %lld, the columns of %s, to %lld", name,
                         (long long)stride, (long long)krul_max_i64(n_columns, 1), name,
                         (long long)most);
    }
    if (krul_multiply_overflows((size_t)n_rows, (size_t)stride, &n_floats) ||
        krul_multiply_overflows(n_floats, sizeof(float), &n_bytes) || n_bytes > PTRDIFF_MAX) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%s has %lld rows of %lld floats, more than memory can hold", name,
                         (long long)n_rows, (long long)stride);
    }
    return KRUL_STATUS_OK;
}

/* Do all three? Of numbers of 4 bytes: of those of 2, as many fit all the more. */
static krul_status
check_product(const krul_blas *blas, int64_t most, bool trans_a, bool trans_b, int64_t m, int64_t n,
              int64_t k, int64_t lda, int64_t ldb, int64_t ldc, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (m < 0 || n < 0 || k < 0 || m > most || n > most || k > most) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "m is %lld, n %lld and k %lld but %s takes 0 to %lld", (long long)m,
                         (long long)n, (long long)k, blas->spelled->symbol, (long long)most);
    }
    KRUL_TRY(check_matrix("a", trans_a ? k : m, trans_a ? m : k, lda, most, err));
    KRUL_TRY(check_matrix("b", trans_b ? n : k, trans_b ? k : n, ldb, most, err));
    KRUL_TRY(check_matrix("c", m, n, ldc, most, err));
done:
    return status;
}

krul_status
krul_blas_sgemm(const krul_blas *blas, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
                float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                float *c, int64_t ldc, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int64_t most = blas->spelled->is_64_bit ? INT64_MAX : INT32_MAX;
    KRUL_TRY(check_product(blas, most, trans_a, trans_b, m, n, k, lda, ldb, ldc, err));
    if (m > 0 && n > 0) {
        multiply(blas, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    }
done:
    return status;
}

bool
krul_blas_is_bf16_fast(void)
{
    return krul_has_amx_bf16();
}

bool
krul_blas_has_bf16(const krul_blas *blas)
{
    return blas->bf16 != NULL;
}

krul_status
krul_blas_bf16_gemm(const krul_blas *blas, bool trans_a, bool trans_b, int64_t m, int64_t n,
                    int64_t k, float alpha, const uint16_t *a, int64_t lda, const uint16_t *b,
                    int64_t ldb, float beta, float *c, int64_t ldc, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (blas->bf16 == NULL) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "the library of %s has no products of bfloat16", blas->spelled->symbol);
    }
    KRUL_TRY(check_product(blas, INT32_MAX, trans_a, trans_b, m, n, k, lda, ldb, ldc, err));
    if (m > 0 && n > 0) {
        multiply_bf16(blas, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    }
done:
    return status;
}

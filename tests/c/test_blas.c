/* test_blas.c - libraries that multiply rightly, wrongly or not at all, and products from many
 * threads. The libraries are stubs that run.sh builds and puts beside this program. */
#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../csrc/krul.h"
#include "check.h"

static char directory[PATH_MAX];

static const char *
path_of(const char *stub)
{
    static char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/libstub_%s.so", directory, stub);
    return path;
}

/* Does a stub of a known spelling serve, and is the symbol the expected one? */
static void
test_serves(const char *stub, const char *symbol, bool is_single_threaded)
{
    krul_error err = {0};
    krul_blas *blas = NULL;
    krul_status status = krul_blas_open(path_of(stub), &blas, &err);
    CHECK(status == KRUL_STATUS_OK);
    if (status != KRUL_STATUS_OK) {
        fprintf(stderr, "%s: %s\n", stub, err.message);
        return;
    }
    CHECK(strcmp(krul_blas_symbol(blas), symbol) == 0);
    CHECK(krul_blas_is_single_threaded(blas) == is_single_threaded);
    /* 2 x 3 times 3 x 2, in rows that are further apart than they are long. */
    const float a[] = {1, 2, 3, 99, 4, 5, 6, 99}, b[] = {1, 0, 99, 0, 1, 99, 1, 1, 99};
    float c[] = {10, 20, -1, 30, 40, -1};
    const float expected[] = {2 * 4 + 5, 2 * 5 + 10, -1, 2 * 10 + 15, 2 * 11 + 20, -1};
    CHECK(krul_blas_sgemm(blas, false, false, 2, 2, 3, 2, a, 4, b, 3, 0.5f, c, 3, &err) ==
          KRUL_STATUS_OK);
    CHECK(memcmp(c, expected, sizeof c) == 0);
    /* The same numbers read as 4 x 2 and 2 x 3, both transposed: 2 x 4 does not meet 3 x 2. */
    float transposed[] = {0, 0, 0, 0};
    const float a_t[] = {1, 4, 2, 5, 3, 6}, b_t[] = {1, 0, 1, 0, 1, 1};
    CHECK(krul_blas_sgemm(blas, true, true, 2, 2, 3, 1, a_t, 2, b_t, 3, 0, transposed, 2, &err) ==
          KRUL_STATUS_OK);
    CHECK(transposed[0] == 4 && transposed[1] == 5 && transposed[2] == 10 && transposed[3] == 11);
    krul_blas_close(blas);
}

/* Products of bfloat16: only where the library has them and they are right. */
static void
test_bf16(const char *stub, bool is_there)
{
    krul_error err = {0};
    krul_blas *blas = NULL;
    CHECK(krul_blas_open(path_of(stub), &blas, &err) == KRUL_STATUS_OK);
    if (blas == NULL) {
        return;
    }
    CHECK(krul_blas_has_bf16(blas) == is_there);
    /* (1 2) times its column (3 4): 0x3f80 is 1, 0x4000 2, 0x4040 3, 0x4080 4. */
    const uint16_t a[] = {0x3f80, 0x4000}, b[] = {0x4040, 0x4080};
    float c = 10;
    krul_status status = krul_blas_bf16_gemm(blas, false, false, 1, 1, 2, 2, a, 2, b, 1, 0.5f, &c,
                                             1, &err);
    CHECK(status == (is_there ? KRUL_STATUS_OK : KRUL_STATUS_UNSUPPORTED));
    CHECK(c == (is_there ? 27 : 10));
    if (is_there) {
        CHECK(krul_blas_bf16_gemm(blas, false, false, 1, 1, 2, 2, a, 1, b, 1, 0, &c, 1, &err) ==
                  KRUL_STATUS_BAD_SHAPE &&
              strstr(err.message, "lda is 1") != NULL);
        CHECK(krul_blas_bf16_gemm(blas, false, false, 0, 1, 2, 2, NULL, 2, b, 1, 0, NULL, 1,
                                  &err) == KRUL_STATUS_OK);
    }
    else {
        CHECK(strstr(err.message, "bfloat16") != NULL);
    }
    krul_blas_close(blas);
}

static void
test_refused(const char *stub, const char *words)
{
    krul_error err = {0};
    krul_blas *blas = NULL;
    CHECK(krul_blas_open(path_of(stub), &blas, &err) == KRUL_STATUS_UNSUPPORTED);
    CHECK(blas == NULL && strstr(err.message, words) != NULL && strstr(err.message, stub) != NULL);
}

/* Every way to be wrong, one row each; none may reach the library. */
static void
test_arguments(void)
{
    static const struct {
        int64_t m, n, k, lda, ldb, ldc;
        const char *words;
    } rows[] = {
        {-1, 2, 3, 3, 2, 2, "m is -1"},
        {2, -1, 3, 3, 2, 2, "n -1"},
        {2, 2, -3, 3, 2, 2, "k -3"},
        {2, 2, 3, 2, 2, 2, "lda is 2 but must be from 3"},
        {2, 2, 3, 3, 1, 2, "ldb is 1 but must be from 2"},
        {2, 2, 3, 3, 2, 1, "ldc is 1 but must be from 2"},
        {2, 2, 0, 0, 2, 2, "lda is 0 but must be from 1"},
        {(int64_t)1 << 31, 2, 3, 3, 2, 2, "m is 2147483648"},
        {2, 2, 3, (int64_t)1 << 31, 2, 2, "lda is 2147483648"},
    };
    krul_error err = {0};
    krul_blas *blas = NULL;
    const float a[6] = {0}, b[6] = {0};
    float c[4] = {0};
    CHECK(krul_blas_open(path_of("cblas"), &blas, &err) == KRUL_STATUS_OK);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        CHECK(krul_blas_sgemm(blas, false, false, rows[i].m, rows[i].n, rows[i].k, 1, a,
                              rows[i].lda, b, rows[i].ldb, 0, c, rows[i].ldc,
                              &err) == KRUL_STATUS_BAD_SHAPE);
        CHECK(strstr(err.message, rows[i].words) != NULL);
    }
    CHECK(krul_blas_sgemm(blas, false, false, 0, 2, 3, 1, NULL, 3, b, 2, 0, NULL, 2, &err) ==
          KRUL_STATUS_OK);
    krul_blas_close(blas);
    /* What 64 bits can hold must still fit memory. */
    CHECK(krul_blas_open(path_of("fortran_64"), &blas, &err) == KRUL_STATUS_OK);
    CHECK(krul_blas_sgemm(blas, false, false, (int64_t)1 << 32, 1, 1, 1, a, (int64_t)1 << 32, b, 1,
                          0, c, 1, &err) == KRUL_STATUS_BAD_SHAPE);
    CHECK(strstr(err.message, "more than memory can hold") != NULL);
    krul_blas_close(blas);
    krul_blas_close(NULL);
}

enum { N_TASKS = 64, SIDE = 24 };

typedef struct product {
    const krul_blas *blas;
    int index;
    bool is_right;
} product;

static void
run_product(void *argument)
{
    product *task = argument;
    float a[SIDE * SIDE], b[SIDE * SIDE], c[SIDE * SIDE];
    for (int i = 0; i < SIDE * SIDE; i++) {
        a[i] = i % (SIDE + 1) == 0 ? (float)(task->index + 1) : 0; /* a multiple of the identity */
        b[i] = (float)(i % 29);
    }
    task->is_right = krul_blas_sgemm(task->blas, false, false, SIDE, SIDE, SIDE, 1, a, SIDE, b,
                                     SIDE, 0, c, SIDE, NULL) == KRUL_STATUS_OK;
    for (int i = 0; i < SIDE * SIDE; i++) {
        task->is_right &= c[i] == (float)(task->index + 1) * b[i];
    }
}

/* Products from four threads at once are right, and each keeps to its own thread. */
static void
test_threads(void)
{
    krul_error err = {0};
    krul_blas *blas = NULL;
    CHECK(krul_blas_open(path_of("counts"), &blas, &err) == KRUL_STATUS_OK);
    product tasks[N_TASKS];
    for (int i = 0; i < N_TASKS; i++) {
        tasks[i] = (product){.blas = blas, .index = i};
    }
    krul_pool_for_each(4, run_product, tasks, sizeof tasks[0], N_TASKS);
    int n_right = 0;
    for (int i = 0; i < N_TASKS; i++) {
        n_right += tasks[i].is_right;
    }
    CHECK(n_right == N_TASKS);
    void *library = dlopen(path_of("counts"), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    CHECK(library != NULL);
    int (*most_threads)(void), (*n_calls)(void), (*set_threads)(int);
    *(void **)&most_threads = dlsym(library, "stub_blas_most_threads");
    *(void **)&n_calls = dlsym(library, "stub_blas_n_calls");
    *(void **)&set_threads = dlsym(library, "MKL_Set_Num_Threads_Local");
    CHECK(n_calls() >= N_TASKS && most_threads() == 1);
    /* The caller's own count is as it was. */
    CHECK(set_threads(7) == 0);
    run_product(&tasks[0]);
    CHECK(set_threads(0) == 7 && most_threads() == 1);
    dlclose(library);
    krul_blas_close(blas);
}

typedef struct opening {
    const char *path;
    bool is_open;
} opening;

static void
open_and_close(void *argument)
{
    opening *task = argument;
    krul_blas *blas = NULL;
    task->is_open = krul_blas_open(task->path, &blas, NULL) == KRUL_STATUS_OK;
    krul_blas_close(blas);
}

/* Several threads open one library at once. */
static void
test_open_at_once(void)
{
    opening tasks[16];
    for (int i = 0; i < 16; i++) {
        tasks[i].path = path_of("counts");
    }
    krul_pool_for_each(4, open_and_close, tasks, sizeof tasks[0], 16);
    for (int i = 0; i < 16; i++) {
        CHECK(tasks[i].is_open);
    }
}

int
main(void)
{
    ssize_t n_bytes = readlink("/proc/self/exe", directory, sizeof directory - 1);
    char *slash = n_bytes > 0 ? strrchr(directory, '/') : NULL;
    CHECK(slash != NULL);
    if (slash != NULL) {
        *slash = '\0';
    }
    test_serves("cblas", "cblas_sgemm", false);
    test_serves("cblas_64", "scipy_cblas_sgemm64_", false);
    test_serves("fortran", "sgemm_", false);
    test_serves("fortran_64", "sgemm_64_", false);
    test_serves("counts", "SGEMM_64", true);
    /* A name that does not say so, with sizes of 64 bits, by value and by pointer. */
    test_serves("cblas_wide", "cblas_sgemm", false);
    test_serves("fortran_wide", "sgemm_", false);
    test_bf16("bf16", true);
    test_bf16("bf16_wrong", false);
    test_bf16("cblas", false);
    test_refused("none", "has no matrix product");
    test_refused("absent", "cannot be loaded");
    test_refused("ignores_beta", "wrong product");
    test_refused("reads_c", "wrong product");
    test_refused("writes_beside", "wrong product");
    test_refused("mixed_up", "wrong product");
    test_arguments();
    test_threads();
    test_open_at_once();
    return check_finish();
}

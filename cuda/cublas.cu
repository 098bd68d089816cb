/* cublas.cu - cuBLAS, found at run time and asked for float32 products.
 *
 * torch has cuBLAS in the process already: that one is taken, so that there are not two. Nothing is
 * linked, so that an import works without it, and a missing library or function is a message. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublas.h"

struct krul_cublas {
    const krul_cublas_table *table;
    void *handle;
    void *stream;
    int compute_type;
};

/* A pointer to a function out of one to an object, as dlsym is meant to be used. */
static bool
find_function(void *library, const char *symbol, void *function_out)
{
    void *found = dlsym(library, symbol);
    memcpy(function_out, &found, sizeof found);
    return found != NULL;
}

static krul_status
fill_table(void *library, const char *name, krul_cublas_table *out, krul_error *err)
{
    krul_cublas_table table;
    memset(&table, 0, sizeof table);
    const struct {
        const char *symbol;
        void *function_out;
    } wanted[] = {
        {"cublasCreate_v2", &table.create},
        {"cublasDestroy_v2", &table.destroy},
        {"cublasSetStream_v2", &table.set_stream},
        {"cublasSetWorkspace_v2", &table.set_workspace},
        {"cublasGemmEx", &table.gemm},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        if (!find_function(library, wanted[i].symbol, wanted[i].function_out)) {
            return krul_fail(err, KRUL_STATUS_UNSUPPORTED, "%s has no function %s", name,
                             wanted[i].symbol);
        }
    }
    (void)find_function(library, "cublasGetStatusName", &table.status_name);
    (void)snprintf(table.library, sizeof table.library, "%s", name);
    *out = table;
    return KRUL_STATUS_OK;
}

extern "C" krul_status
krul_cublas_open(const char *const *names, int n_names, krul_cublas_table *out, krul_error *err)
{
    void *library = NULL;
    const char *name = NULL;
    const int modes[] = {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW};
    for (int i = 0; i < 2 * n_names && library == NULL; i++) {
        name = names[i % n_names];
        library = dlopen(name, modes[i / n_names]);
    }
    if (library == NULL) {
        const char *reason = dlerror();
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "cuBLAS cannot be loaded as %s or another: %s",
                         n_names > 0 ? names[0] : "nothing", reason != NULL ? reason : "unknown");
    }
    krul_status status = fill_table(library, name, out, err);
    if (status != KRUL_STATUS_OK) {
        (void)dlclose(library);
    }
    return status; /* else it stays loaded for good, as its functions are */
}

extern "C" krul_status
krul_cublas_find(const krul_cublas_table **out, krul_error *err)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static krul_cublas_table table;
    static bool is_found;
    static const char *const names[] = {"libcublas.so.13", "libcublas.so.12"};
    krul_status status = KRUL_STATUS_OK;
    pthread_mutex_lock(&lock);
    if (!is_found) { /* what is missing may be there the next time */
        status = krul_cublas_open(names, 2, &table, err);
        is_found = status == KRUL_STATUS_OK;
    }
    pthread_mutex_unlock(&lock);
    if (status == KRUL_STATUS_OK) {
        *out = &table;
    }
    return status;
}

static krul_status
fail_call(const krul_cublas_table *table, int code, const char *call, krul_error *err)
{
    const char *name = table->status_name != NULL ? table->status_name(code) : NULL;
    krul_status status = krul_fail(err, KRUL_STATUS_DEVICE, "%s: %s failed: %s (%d)",
                                   table->library, call, name != NULL ? name : "status", code);
    if (err != NULL) {
        err->code = code;
    }
    return status;
}

extern "C" krul_status
krul_cublas_new(const krul_cublas_table *table, void *stream, void *workspace,
                size_t workspace_bytes, krul_cublas_math math, krul_cublas **out, krul_error *err)
{
    static const int compute_types[] = {KRUL_CUBLAS_COMPUTE_32F, KRUL_CUBLAS_COMPUTE_32F_FAST_TF32,
                                        KRUL_CUBLAS_COMPUTE_32F_FAST_16BF};
    if (math < KRUL_CUBLAS_FLOAT32 || math > KRUL_CUBLAS_BF16) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "math is %d but must be 0 to %d", (int)math,
                         (int)KRUL_CUBLAS_BF16);
    }
    krul_cublas *made = (krul_cublas *)calloc(1, sizeof *made);
    if (made == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a handle of cuBLAS");
    }
    made->table = table;
    made->stream = stream;
    made->compute_type = compute_types[math];
    const char *call = "cublasCreate";
    int code = table->create(&made->handle);
    if (code != 0) {
        made->handle = NULL;
    }
    else {
        /* The stream first: setting it takes the workspace away again. */
        call = "cublasSetStream";
        code = table->set_stream(made->handle, stream);
        if (code == 0 && workspace != NULL) {
            call = "cublasSetWorkspace";
            code = table->set_workspace(made->handle, workspace, workspace_bytes);
        }
    }
    if (code != 0) {
        krul_status status = fail_call(table, code, call, err);
        krul_cublas_free(made);
        return status;
    }
    *out = made;
    return KRUL_STATUS_OK;
}

extern "C" void
krul_cublas_free(krul_cublas *cublas)
{
    if (cublas != NULL) {
        if (cublas->handle != NULL) {
            (void)cublas->table->destroy(cublas->handle);
        }
        free(cublas);
    }
}

extern "C" krul_status
krul_cublas_multiply(krul_cublas *cublas, bool trans_a, bool trans_b, int64_t m, int64_t n,
                     int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                     int64_t ldb, float beta, float *c, int64_t ldc, krul_error *err)
{
    const int64_t sizes[] = {m, n, k, lda, ldb, ldc};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (sizes[i] < 0 || sizes[i] > INT32_MAX) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "a product of %lld x %lld x %lld with rows of %lld, %lld, %lld",
                             (long long)m, (long long)n, (long long)k, (long long)lda,
                             (long long)ldb, (long long)ldc);
        }
    }
    int code = cublas->table->gemm(cublas->handle, trans_a ? KRUL_CUBLAS_OP_T : KRUL_CUBLAS_OP_N,
                                   trans_b ? KRUL_CUBLAS_OP_T : KRUL_CUBLAS_OP_N, (int)m, (int)n,
                                   (int)k, &alpha, a, KRUL_CUBLAS_R_32F, (int)lda, b,
                                   KRUL_CUBLAS_R_32F, (int)ldb, &beta, c, KRUL_CUBLAS_R_32F,
                                   (int)ldc, cublas->compute_type, KRUL_CUBLAS_GEMM_DEFAULT);
    return code == 0 ? KRUL_STATUS_OK : fail_call(cublas->table, code, "cublasGemmEx", err);
}

extern "C" void *
krul_cublas_stream(const krul_cublas *cublas)
{
    return cublas->stream;
}

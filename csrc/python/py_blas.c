/* py_blas.c - matrix products by a library found at run time; an open library is a capsule. */
#include "py_krul.h"

static const char capsule_name[] = "krul.blas";

const krul_blas *
py_krul_blas(PyObject *capsule)
{
    return PyCapsule_GetPointer(capsule, capsule_name);
}

static void
close_capsule(PyObject *capsule)
{
    krul_blas_close(PyCapsule_GetPointer(capsule, capsule_name));
}

PyDoc_STRVAR(blas_open_doc,
             "blas_open($module, path, /)\n--\n\n"
             "Load a library, try its products; returns it as a capsule.\n\n"
             "Raises NotImplementedError with the reason if it does not serve. The GIL is released.");

static PyObject *
blas_open(PyObject *module, PyObject *args)
{
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:blas_open", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    const char *text = PyBytes_AS_STRING(path);
    krul_blas *blas = NULL;
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_blas_open(text, &blas, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(py_krul_state_of(module), &err);
    }
    PyObject *capsule = PyCapsule_New(blas, capsule_name, close_capsule);
    if (capsule == NULL) {
        krul_blas_close(blas);
    }
    return capsule;
}

PyDoc_STRVAR(blas_about_doc,
             "blas_about($module, blas, /)\n--\n\n"
             "(name of its product, does a product stay in its thread, are there products of\n"
             "bfloat16, would they be worth it here).");

static PyObject *
blas_about(PyObject *Py_UNUSED(module), PyObject *capsule)
{
    const krul_blas *blas = py_krul_blas(capsule);
    return blas == NULL ? NULL
                        : Py_BuildValue("(sNNN)", krul_blas_symbol(blas),
                                        PyBool_FromLong(krul_blas_is_single_threaded(blas)),
                                        PyBool_FromLong(krul_blas_has_bf16(blas)),
                                        PyBool_FromLong(krul_blas_is_bf16_fast()));
}

/* A matrix of a dtype on the CPU, and how far its rows are apart; with no dtype, of float32 or
 * bfloat16. */
static int
borrow_matrix(py_krul_state *state, PyObject *object, const char *name, bool is_output,
              krul_dtype dtype, py_krul_borrowed *out, int64_t *stride_out)
{
    krul_error err;
    if (py_krul_borrow(state, object, name, is_output, out) != 0) {
        return -1;
    }
    const krul_view *view = &out->view;
    krul_status status = KRUL_STATUS_OK;
    if (out->n_dims != 2) {
        status = krul_fail(&err, KRUL_STATUS_BAD_SHAPE, "%s has %d dimensions but must have 2",
                           name, out->n_dims);
    }
    else if (dtype == 0 && view->dtype == KRUL_DTYPE_F16) {
        status = krul_fail(&err, KRUL_STATUS_BAD_DTYPE,
                           "%s is float16 but must be float32 or bfloat16", name);
    }
    else if (dtype != 0 && view->dtype != dtype) {
        status = krul_fail(&err, KRUL_STATUS_BAD_DTYPE, "%s is %s but must be %s", name,
                           krul_dtype_name(view->dtype), krul_dtype_name(dtype));
    }
    else if (view->device_type != KRUL_DEVICE_CPU) {
        status = krul_fail(&err, KRUL_STATUS_DEVICE, "%s is not in the memory of the CPU", name);
    }
    if (status != KRUL_STATUS_OK) {
        py_krul_raise(state, &err);
        return -1;
    }
    /* One row has no distance to the next, and NumPy gives it any; no columns want one all the
     * same. */
    int64_t n_columns = view->shape[3] > 0 ? view->shape[3] : 1;
    *stride_out = view->shape[2] > 1 && view->shape[3] > 0 ? view->stride[2] : n_columns;
    return 0;
}

PyDoc_STRVAR(blas_sgemm_doc,
             "blas_sgemm($module, blas, a, b, out, trans_a=False, trans_b=False, alpha=1.0,\n"
             "           beta=0.0)\n--\n\n"
             "out = alpha op(a) op(b) + beta out, of matrices whose rows are contiguous: float32,\n"
             "or bfloat16 into float32.\n\n"
             "Raises krul.ShapeError, krul.DTypeError, NotImplementedError. The GIL is released.");

static PyObject *
blas_sgemm(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"blas", "a", "b", "out", "trans_a", "trans_b", "alpha", "beta", NULL};
    py_krul_state *state = py_krul_state_of(module);
    PyObject *capsule, *a_in, *b_in, *out_in;
    PyObject *result = NULL;
    py_krul_borrowed a = {0}, b = {0}, out = {0};
    int trans_a = 0, trans_b = 0;
    float alpha = 1, beta = 0;
    int64_t lda, ldb, ldc;
    krul_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|ppff:blas_sgemm", names, &capsule, &a_in,
                                     &b_in, &out_in, &trans_a, &trans_b, &alpha, &beta)) {
        return NULL;
    }
    const krul_blas *blas = py_krul_blas(capsule);
    if (blas == NULL || borrow_matrix(state, a_in, "a", false, 0, &a, &lda) != 0 ||
        borrow_matrix(state, b_in, "b", false, a.view.dtype, &b, &ldb) != 0 ||
        borrow_matrix(state, out_in, "out", true, KRUL_DTYPE_F32, &out, &ldc) != 0) {
        goto done;
    }
    int64_t m = a.view.shape[trans_a ? 3 : 2], k = a.view.shape[trans_a ? 2 : 3];
    int64_t b_k = b.view.shape[trans_b ? 3 : 2], n = b.view.shape[trans_b ? 2 : 3];
    krul_status status = KRUL_STATUS_OK;
    if (b_k != k || out.view.shape[2] != m || out.view.shape[3] != n) {
        status = krul_fail(&err, KRUL_STATUS_BAD_SHAPE,
                           "op(a) is (%lld, %lld) and op(b) (%lld, %lld) but out is (%lld, %lld)",
                           (long long)m, (long long)k, (long long)b_k, (long long)n,
                           (long long)out.view.shape[2], (long long)out.view.shape[3]);
    }
    if (status == KRUL_STATUS_OK) {
        status = krul_view_check_disjoint(&a.view, "a", &out.view, "out", &err);
    }
    if (status == KRUL_STATUS_OK) {
        status = krul_view_check_disjoint(&b.view, "b", &out.view, "out", &err);
    }
    if (status == KRUL_STATUS_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = a.view.dtype == KRUL_DTYPE_BF16
                     ? krul_blas_bf16_gemm(blas, trans_a != 0, trans_b != 0, m, n, k, alpha,
                                           a.view.data, lda, b.view.data, ldb, beta, out.view.data,
                                           ldc, &err)
                     : krul_blas_sgemm(blas, trans_a != 0, trans_b != 0, m, n, k, alpha,
                                       a.view.data, lda, b.view.data, ldb, beta, out.view.data, ldc,
                                       &err);
        Py_END_ALLOW_THREADS
    }
    result = status == KRUL_STATUS_OK ? Py_NewRef(Py_None) : py_krul_raise(state, &err);
done:
    py_krul_release(&out);
    py_krul_release(&b);
    py_krul_release(&a);
    return result;
}

PyMethodDef py_blas_methods[] = {
    {"blas_open", blas_open, METH_VARARGS, blas_open_doc},
    {"blas_about", blas_about, METH_O, blas_about_doc},
    {"blas_sgemm", (PyCFunction)(void (*)(void))blas_sgemm, METH_VARARGS | METH_KEYWORDS,
     blas_sgemm_doc},
    {NULL, NULL, 0, NULL},
};

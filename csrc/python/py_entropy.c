/* py_entropy.c - the entropy coder as Python sees it: bytes in, bytes out. */
#include "py_krul.h"

/* Coding this many symbols takes about as long as giving up the GIL and taking it again. */
enum { RELEASE_GIL_BYTES = 1 << 12 };

PyDoc_STRVAR(entropy_encode_doc, "entropy_encode($module, symbols, /, backend=None)\n"
"--\n\n"
"Encode bytes with interleaved rANS, or as they are where that does not pay.\n"
"\n"
"Parameters\n"
"----------\n"
"symbols : bytes-like, contiguous\n"
"    The symbols, one byte each.\n"
"backend : str, optional\n"
"    Name of a table of `backends()`; by default the module's own choice. All give the same\n"
"    bytes.\n"
"\n"
"Returns\n"
"-------\n"
"bytes\n"
"    A stream as described in FORMAT.md, at most 12 bytes longer than `symbols`.\n"
"\n"
"Raises\n"
"------\n"
"ValueError\n"
"    If there is no such backend.\n"
"\n"
"Notes\n"
"-----\n"
"Costs about 2 ns per symbol, in one thread, without the GIL.\n"
"\n"
"Examples\n"
"--------\n"
">>> len(entropy_encode(bytes(1000)))\n"
"13\n");

static PyObject *
entropy_encode(PyObject *module, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"", "backend", NULL};
    py_krul_state *state = py_krul_state_of(module);
    Py_buffer symbols;
    PyObject *backend_name = Py_None, *bytes = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "y*|O:entropy_encode", names, &symbols,
                                     &backend_name)) {
        return NULL;
    }
    const krul_backend *backend = py_krul_backend(state, backend_name);
    if (backend == NULL) {
        goto done;
    }
    size_t n_symbols = (size_t)symbols.len, n_bytes = 0;
    size_t capacity_bytes = krul_entropy_bound(n_symbols);
    if (capacity_bytes > PY_SSIZE_T_MAX) {
        PyErr_NoMemory();
        goto done;
    }
    bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)capacity_bytes);
    if (bytes == NULL) {
        goto done;
    }
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(bytes);
    krul_error err;
    PyThreadState *thread = n_symbols >= RELEASE_GIL_BYTES ? PyEval_SaveThread() : NULL;
    krul_status status = krul_entropy_encode(backend, symbols.buf, n_symbols, out, capacity_bytes,
                                             &n_bytes, &err);
    if (thread != NULL) {
        PyEval_RestoreThread(thread);
    }
    if (status != KRUL_STATUS_OK) {
        Py_CLEAR(bytes);
        py_krul_raise(state, &err);
        goto done;
    }
    (void)_PyBytes_Resize(&bytes, (Py_ssize_t)n_bytes); /* NULL with an exception on failure */
done:
    PyBuffer_Release(&symbols);
    return bytes;
}

PyDoc_STRVAR(entropy_decode_doc, "entropy_decode($module, stream, n_symbols, /, backend=None)\n"
"--\n\n"
"Decode a stream of `entropy_encode`.\n"
"\n"
"Parameters\n"
"----------\n"
"stream : bytes-like, contiguous\n"
"    The stream; nothing in it is trusted.\n"
"n_symbols : int\n"
"    How many symbols it must hold.\n"
"backend : str, optional\n"
"    Name of a table of `backends()`; by default the module's own choice. All give the same\n"
"    symbols.\n"
"\n"
"Returns\n"
"-------\n"
"bytes\n"
"    The `n_symbols` symbols.\n"
"\n"
"Raises\n"
"------\n"
"krul.CorruptionError\n"
"    If the stream is damaged or holds another number of symbols.\n"
"ValueError\n"
"    If `n_symbols` is negative or there is no such backend.\n"
"\n"
"Notes\n"
"-----\n"
"Costs 0.5 ns per symbol with AVX-512 or AVX2 and 2 ns without, in one thread, without the GIL.\n"
"\n"
"Examples\n"
"--------\n"
">>> entropy_decode(entropy_encode(b'aabbaa'), 6)\n"
"b'aabbaa'\n");

static PyObject *
entropy_decode(PyObject *module, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"", "", "backend", NULL};
    py_krul_state *state = py_krul_state_of(module);
    Py_buffer stream;
    Py_ssize_t n_symbols;
    PyObject *backend_name = Py_None, *bytes = NULL;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "y*n|O:entropy_decode", names, &stream,
                                     &n_symbols, &backend_name)) {
        return NULL;
    }
    const krul_backend *backend = py_krul_backend(state, backend_name);
    if (backend == NULL) {
        goto done;
    }
    if (n_symbols < 0) {
        PyErr_Format(PyExc_ValueError, "n_symbols is %zd but must not be negative", n_symbols);
        goto done;
    }
    bytes = PyBytes_FromStringAndSize(NULL, n_symbols);
    if (bytes == NULL) {
        goto done;
    }
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(bytes);
    krul_error err;
    PyThreadState *thread = n_symbols >= RELEASE_GIL_BYTES ? PyEval_SaveThread() : NULL;
    krul_status status = krul_entropy_decode(backend, stream.buf, (size_t)stream.len, out,
                                             (size_t)n_symbols, &err);
    if (thread != NULL) {
        PyEval_RestoreThread(thread);
    }
    if (status != KRUL_STATUS_OK) {
        Py_CLEAR(bytes);
        py_krul_raise(state, &err);
    }
done:
    PyBuffer_Release(&stream);
    return bytes;
}

/* ---- columns ---- */

/* What both directions take beside the stream and the values; borrowed from owned arrays. */
typedef struct column_arguments {
    krul_entropy_tables *tables;
    PyArrayObject *frequencies; /* uint16 n_tables x 256 */
    PyArrayObject *classes; /* uint8 n_columns */
    PyArrayObject *shifts; /* int8 n_tokens, or NULL */
} column_arguments;

static void
release_columns(column_arguments *columns)
{
    krul_entropy_tables_free(columns->tables);
    Py_XDECREF(columns->frequencies);
    Py_XDECREF(columns->classes);
    Py_XDECREF(columns->shifts);
}

/* A contiguous array of exactly that type. */
static PyArrayObject *
take_exact(PyObject *object, const char *name, int type, int n_dims)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != type || PyArray_NDIM(array) != n_dims ||
        !PyArray_ISCARRAY_RO(array)) {
        PyArray_Descr *wanted = PyArray_DescrFromType(type);
        PyErr_Format(PyExc_TypeError, "%s must be a contiguous array of %S with %d dimensions",
                     name, (PyObject *)wanted, n_dims);
        Py_XDECREF(wanted);
        return NULL;
    }
    return (PyArrayObject *)Py_NewRef(object);
}

static int
take_columns(py_krul_state *state, PyObject *tables, PyObject *classes, PyObject *shifts,
             npy_intp n_columns, npy_intp n_tokens, column_arguments *out)
{
    krul_error err;
    out->frequencies = take_exact(tables, "tables", NPY_UINT16, 2);
    out->classes = out->frequencies == NULL ? NULL
                                            : take_exact(classes, "column_class", NPY_UINT8, 1);
    if (out->classes == NULL) {
        return -1;
    }
    if (shifts != Py_None) {
        out->shifts = take_exact(shifts, "token_shift", NPY_INT8, 1);
        if (out->shifts == NULL) {
            return -1;
        }
    }
    npy_intp n_tables = PyArray_DIM(out->frequencies, 0);
    npy_intp n_shifts = out->shifts == NULL ? n_tokens : PyArray_DIM(out->shifts, 0);
    krul_status status = KRUL_STATUS_OK;
    if (PyArray_DIM(out->frequencies, 1) != 256 || PyArray_DIM(out->classes, 0) != n_columns ||
        n_shifts != n_tokens || n_tables > KRUL_ENTROPY_MAX_TABLES) {
        status = krul_fail(&err, KRUL_STATUS_BAD_SHAPE,
                           "tables is (%lld, %lld), column_class (%lld,) and token_shift (%lld,) "
                           "but there are %lld columns of %lld tokens and at most %d tables of 256",
                           (long long)n_tables, (long long)PyArray_DIM(out->frequencies, 1),
                           (long long)PyArray_DIM(out->classes, 0), (long long)n_shifts,
                           (long long)n_columns, (long long)n_tokens, (int)KRUL_ENTROPY_MAX_TABLES);
    }
    else {
        status = krul_entropy_tables_new(PyArray_DATA(out->frequencies), (int32_t)n_tables,
                                         &out->tables, &err);
    }
    if (status != KRUL_STATUS_OK) {
        py_krul_raise(state, &err);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(entropy_encode_columns_doc,
             "entropy_encode_columns($module, values, tables, column_class, token_shift=None, /)\n"
             "--\n\n"
             "Encode int32 n_columns x n_tokens with rANS, as FORMAT.md has it.\n"
             "\n"
             "`tables` are uint16 K x 256 frequencies, `column_class` uint8 n_columns,\n"
             "`token_shift` int8 n_tokens; all contiguous. Raises krul.ShapeError, TypeError, and\n"
             "ValueError for a table with a frequency of 0. The GIL is released.");

static PyObject *
entropy_encode_columns(PyObject *module, PyObject *args)
{
    py_krul_state *state = py_krul_state_of(module);
    PyObject *values_in, *tables_in, *classes_in, *shifts_in = Py_None, *bytes = NULL;
    column_arguments columns = {0};
    krul_error err;
    if (!PyArg_ParseTuple(args, "OOO|O:entropy_encode_columns", &values_in, &tables_in, &classes_in,
                          &shifts_in)) {
        return NULL;
    }
    PyArrayObject *values = take_exact(values_in, "values", NPY_INT32, 2);
    if (values == NULL ||
        take_columns(state, tables_in, classes_in, shifts_in, PyArray_DIM(values, 0),
                     PyArray_DIM(values, 1), &columns) != 0) {
        goto done;
    }
    npy_intp n_columns = PyArray_DIM(values, 0), n_tokens = PyArray_DIM(values, 1);
    size_t capacity_bytes = krul_entropy_columns_bound(n_columns, n_tokens), n_bytes = 0;
    bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)capacity_bytes);
    if (bytes == NULL) {
        goto done;
    }
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(bytes);
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_entropy_encode_columns(
        columns.tables, PyArray_DATA(values), n_columns, n_tokens, PyArray_DATA(columns.classes),
        columns.shifts == NULL ? NULL : PyArray_DATA(columns.shifts), out, capacity_bytes, &n_bytes,
        &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        Py_CLEAR(bytes);
        py_krul_raise(state, &err);
        goto done;
    }
    (void)_PyBytes_Resize(&bytes, (Py_ssize_t)n_bytes); /* NULL with an exception on failure */
done:
    release_columns(&columns);
    Py_XDECREF(values);
    return bytes;
}

PyDoc_STRVAR(entropy_decode_columns_doc,
             "entropy_decode_columns($module, stream, out, tables, column_class,\n"
             "                       token_shift=None, backend=None, n_repeats=1, /)\n"
             "--\n\n"
             "Decode a stream of `entropy_encode_columns` into float32 n_columns x n_tokens.\n"
             "\n"
             "`n_repeats` decodes as often, for a benchmark that does not time the tables. Raises\n"
             "krul.CorruptionError for a damaged stream, of which `out` may then hold a part,\n"
             "krul.ShapeError, TypeError. The GIL is released.");

static PyObject *
entropy_decode_columns(PyObject *module, PyObject *args)
{
    py_krul_state *state = py_krul_state_of(module);
    PyObject *out_in, *tables_in, *classes_in, *shifts_in = Py_None, *backend_in = Py_None;
    PyObject *result = NULL;
    PyArrayObject *out = NULL;
    column_arguments columns = {0};
    Py_buffer stream;
    int n_repeats = 1;
    krul_error err;
    if (!PyArg_ParseTuple(args, "y*OOO|OOi:entropy_decode_columns", &stream, &out_in, &tables_in,
                          &classes_in, &shifts_in, &backend_in, &n_repeats)) {
        return NULL;
    }
    const krul_backend *backend = py_krul_backend(state, backend_in);
    if (backend == NULL) {
        goto done;
    }
    out = take_exact(out_in, "out", NPY_FLOAT32, 2);
    if (out != NULL && !PyArray_ISWRITEABLE(out)) {
        PyErr_SetString(PyExc_ValueError, "out is read-only but must be written");
        goto done;
    }
    if (out == NULL || take_columns(state, tables_in, classes_in, shifts_in, PyArray_DIM(out, 0),
                                    PyArray_DIM(out, 1), &columns) != 0) {
        goto done;
    }
    krul_status status = KRUL_STATUS_OK;
    Py_BEGIN_ALLOW_THREADS
    for (int i = 0; i < n_repeats && status == KRUL_STATUS_OK; i++) {
        status = krul_entropy_decode_columns(
            backend, columns.tables, stream.buf, (size_t)stream.len, PyArray_DIM(out, 0),
            PyArray_DIM(out, 1), PyArray_DATA(columns.classes),
            columns.shifts == NULL ? NULL : PyArray_DATA(columns.shifts), PyArray_DATA(out), &err);
    }
    Py_END_ALLOW_THREADS
    result = status == KRUL_STATUS_OK ? Py_NewRef(Py_None) : py_krul_raise(state, &err);
done:
    release_columns(&columns);
    Py_XDECREF(out);
    PyBuffer_Release(&stream);
    return result;
}

PyMethodDef py_entropy_methods[] = {
    {"entropy_encode", (PyCFunction)(void (*)(void))entropy_encode, METH_VARARGS | METH_KEYWORDS,
     entropy_encode_doc},
    {"entropy_decode", (PyCFunction)(void (*)(void))entropy_decode, METH_VARARGS | METH_KEYWORDS,
     entropy_decode_doc},
    {"entropy_encode_columns", entropy_encode_columns, METH_VARARGS, entropy_encode_columns_doc},
    {"entropy_decode_columns", entropy_decode_columns, METH_VARARGS, entropy_decode_columns_doc},
    {NULL, NULL, 0, NULL},
};

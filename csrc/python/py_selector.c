/* py_selector.c - layer pairs as NumPy arrays. */
#include "py_krul.h"

/* A contiguous array of that type and number of dimensions; NULL with an exception. */
static PyArrayObject *
take_array(PyObject *object, int type, int n_dims)
{
    return (PyArrayObject *)PyArray_FROMANY(object, type, n_dims, n_dims, NPY_ARRAY_CARRAY_RO);
}

/* An int32 array of n pairs, n x 2. */
static PyObject *
pairs_to_array(const krul_selector_pair *pairs, int32_t n_pairs)
{
    npy_intp shape[2] = {n_pairs, 2};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_INT32);
    if (array == NULL) {
        return NULL;
    }
    int32_t *out = PyArray_DATA((PyArrayObject *)array);
    for (int32_t i = 0; i < n_pairs; i++) {
        out[2 * i] = pairs[i].lower;
        out[2 * i + 1] = pairs[i].upper;
    }
    return array;
}

static krul_selector_pair *
allocate_pairs(Py_ssize_t n_layers)
{
    krul_selector_pair *pairs = PyMem_Calloc((size_t)n_layers / 2 + 1, sizeof *pairs);
    if (pairs == NULL) {
        PyErr_NoMemory();
    }
    return pairs;
}

PyDoc_STRVAR(choose_pairs_doc,
             "choose_pairs($module, /, distances, importance, layer_class, n_sensitive, n_pairs)\n"
             "--\n\n"
             "The closest disjoint pairs of layers, int32 n_pairs x 2; see krul.selector.");

static PyObject *
choose_pairs(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"distances",   "importance", "layer_class",
                            "n_sensitive", "n_pairs",    NULL};
    py_krul_state *state = py_krul_state_of(module);
    PyObject *objects[3];
    PyArrayObject *distances = NULL, *importance = NULL, *layer_class = NULL;
    krul_selector_pair *pairs = NULL;
    PyObject *result = NULL;
    int n_sensitive, n_pairs;
    krul_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOii:choose_pairs", names, &objects[0],
                                     &objects[1], &objects[2], &n_sensitive, &n_pairs)) {
        return NULL;
    }
    distances = take_array(objects[0], NPY_DOUBLE, 2);
    importance = distances == NULL ? NULL : take_array(objects[1], NPY_DOUBLE, 2);
    layer_class = importance == NULL ? NULL : take_array(objects[2], NPY_INT32, 1);
    if (layer_class == NULL) {
        goto done;
    }
    npy_intp n_layers = PyArray_DIM(layer_class, 0);
    if (PyArray_DIM(distances, 0) != n_layers || PyArray_DIM(distances, 1) != n_layers ||
        PyArray_DIM(importance, 0) != n_layers || PyArray_DIM(importance, 1) != 2 ||
        n_layers > INT32_MAX / 2) {
        krul_fail(&err, KRUL_STATUS_BAD_SHAPE,
                  "distances is (%lld, %lld) and importance (%lld, %lld) but layer_class has %lld "
                  "layers",
                  (long long)PyArray_DIM(distances, 0), (long long)PyArray_DIM(distances, 1),
                  (long long)PyArray_DIM(importance, 0), (long long)PyArray_DIM(importance, 1),
                  (long long)n_layers);
        py_krul_raise(state, &err);
        goto done;
    }
    pairs = allocate_pairs(n_layers);
    if (pairs == NULL) {
        goto done;
    }
    /* no more than n_layers / 2 can be found, so asking for more changes nothing */
    if (n_pairs > n_layers / 2) {
        n_pairs = (int)(n_layers / 2);
    }
    int32_t n_found = 0;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_selector_choose_pairs(PyArray_DATA(distances), PyArray_DATA(importance),
                                        PyArray_DATA(layer_class), (int32_t)n_layers, n_sensitive,
                                        n_pairs, pairs, &n_found, &err);
    Py_END_ALLOW_THREADS
    result = status == KRUL_STATUS_OK ? pairs_to_array(pairs, n_found) : py_krul_raise(state, &err);
done:
    PyMem_Free(pairs);
    Py_XDECREF(layer_class);
    Py_XDECREF(importance);
    Py_XDECREF(distances);
    return result;
}

PyDoc_STRVAR(fixed_pairs_doc, "fixed_pairs($module, /, layer_class, n_pairs)\n--\n\n"
                              "Adjacent layers from the middle upwards, int32 n_pairs x 2.");

static PyObject *
fixed_pairs(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer_class", "n_pairs", NULL};
    PyObject *object;
    PyObject *result = NULL;
    krul_error err;
    int n_pairs;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oi:fixed_pairs", names, &object, &n_pairs)) {
        return NULL;
    }
    PyArrayObject *layer_class = take_array(object, NPY_INT32, 1);
    if (layer_class == NULL) {
        return NULL;
    }
    npy_intp n_layers = PyArray_DIM(layer_class, 0);
    krul_selector_pair *pairs = allocate_pairs(n_layers);
    if (pairs != NULL) {
        int32_t n_found = 0;
        int32_t n_checked = n_layers > INT32_MAX / 2 ? -1 : (int32_t)n_layers;
        if (n_pairs > n_layers / 2) {
            n_pairs = (int)(n_layers / 2);
        }
        krul_status status = krul_selector_fixed_pairs(PyArray_DATA(layer_class), n_checked,
                                                       n_pairs, pairs, &n_found, &err);
        result = status == KRUL_STATUS_OK ? pairs_to_array(pairs, n_found)
                                          : py_krul_raise(py_krul_state_of(module), &err);
    }
    PyMem_Free(pairs);
    Py_DECREF(layer_class);
    return result;
}

PyDoc_STRVAR(pair_count_doc, "pair_count($module, /, n_layers, ratio)\n--\n\n"
                             "Pairs needed to leave at most that part of the bytes.");

static PyObject *
pair_count(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_layers", "ratio", NULL};
    int n_layers;
    double ratio;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "id:pair_count", names, &n_layers, &ratio)) {
        return NULL;
    }
    return PyLong_FromLong(krul_selector_pair_count(n_layers, ratio));
}

PyMethodDef py_selector_methods[] = {
    {"choose_pairs", (PyCFunction)(void (*)(void))choose_pairs, METH_VARARGS | METH_KEYWORDS,
     choose_pairs_doc},
    {"fixed_pairs", (PyCFunction)(void (*)(void))fixed_pairs, METH_VARARGS | METH_KEYWORDS,
     fixed_pairs_doc},
    {"pair_count", (PyCFunction)(void (*)(void))pair_count, METH_VARARGS | METH_KEYWORDS,
     pair_count_doc},
    {NULL, NULL, 0, NULL},
};

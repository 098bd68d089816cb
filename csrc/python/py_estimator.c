/* py_estimator.c - queries and keys in by DLPack, sums added into the caller's NumPy arrays. On a
 * device sums wait in a krul._core.Observer until they are read. */
#include "py_krul.h"

enum { N_LAYER_ITEMS = 7 };

/* What one call borrows; zeroed, it can be released. */
typedef struct observe_call {
    PyObject *sequence; /* owned: the layers, as a tuple */
    Py_ssize_t n_layers;
    PyObject **items; /* owned: one tuple per layer, NULL where not observed */
    py_krul_borrowed *borrowed; /* 2 x n_layers: queries, keys */
    krul_estimator_layer *layers;
    const int64_t *row_positions;
    npy_intp n_rows;
    const uint8_t *key_is_real;
    int64_t n_keys_total;
} observe_call;

static void
call_close(observe_call *call)
{
    for (Py_ssize_t i = 0; call->borrowed != NULL && i < 2 * call->n_layers; i++) {
        py_krul_release(&call->borrowed[i]);
    }
    for (Py_ssize_t i = 0; call->items != NULL && i < call->n_layers; i++) {
        Py_XDECREF(call->items[i]);
    }
    PyMem_Free(call->borrowed);
    PyMem_Free(call->items);
    PyMem_Free(call->layers);
    Py_XDECREF(call->sequence);
}

/* Is it a contiguous, aligned array of that type with these extents (-1: any)? The data, or NULL
 * with an exception. */
static void *
array_data(py_krul_state *state, PyObject *object, const char *name, int type, int n_dims,
           const npy_intp *shape, int is_output)
{
    krul_error err;
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s is a %s but must be a NumPy array", name,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) != type) {
        PyArray_Descr *wanted = PyArray_DescrFromType(type);
        PyObject *has = PyObject_Str((PyObject *)PyArray_DESCR(array));
        PyObject *needs = PyObject_Str((PyObject *)wanted);
        if (has != NULL && needs != NULL) {
            krul_fail(&err, KRUL_STATUS_BAD_DTYPE, "%s is %s but must be %s", name,
                      PyUnicode_AsUTF8(has), PyUnicode_AsUTF8(needs));
            py_krul_raise(state, &err);
        }
        Py_XDECREF(has);
        Py_XDECREF(needs);
        Py_XDECREF(wanted);
        return NULL;
    }
    int is_shaped = PyArray_NDIM(array) == n_dims;
    for (int i = 0; is_shaped && i < n_dims; i++) {
        is_shaped = shape[i] < 0 || PyArray_DIM(array, i) == shape[i];
    }
    if (!is_shaped) {
        krul_fail(&err, KRUL_STATUS_BAD_SHAPE,
                  "%s has %d dimensions and begins with %lld but must have %d: (%lld, %lld), -1 "
                  "for any",
                  name, PyArray_NDIM(array),
                  (long long)(PyArray_NDIM(array) > 0 ? PyArray_DIM(array, 0) : -1), n_dims,
                  (long long)shape[0], (long long)(n_dims > 1 ? shape[1] : 1));
        py_krul_raise(state, &err);
        return NULL;
    }
    int flags = is_output ? NPY_ARRAY_CARRAY : NPY_ARRAY_CARRAY_RO;
    if (!PyArray_CHKFLAGS(array, flags)) {
        krul_fail(&err, KRUL_STATUS_BAD_VALUE, "%s must be contiguous, aligned%s", name,
                  is_output ? " and writable" : "");
        py_krul_raise(state, &err);
        return NULL;
    }
    return PyArray_DATA(array);
}

/* Fill one layer from (queries, keys, scaling, softcap, sinks, row_starts, key_start) or None. */
static int
take_layer(py_krul_state *state, observe_call *call, Py_ssize_t index, PyObject *item,
           py_krul_access access)
{
    krul_estimator_layer *layer = &call->layers[index];
    py_krul_borrowed *queries = &call->borrowed[2 * index];
    py_krul_borrowed *keys = &call->borrowed[2 * index + 1];
    if (item == Py_None) {
        return 0;
    }
    PyObject *fields = call->items[index] = PySequence_Tuple(item);
    if (fields == NULL) {
        return -1;
    }
    if (PyTuple_GET_SIZE(fields) != N_LAYER_ITEMS) {
        PyErr_Format(PyExc_ValueError, "layers[%zd] has %zd items but must have %d", index,
                     PyTuple_GET_SIZE(fields), N_LAYER_ITEMS);
        return -1;
    }
    double scaling = PyFloat_AsDouble(PyTuple_GET_ITEM(fields, 2));
    double softcap = PyFloat_AsDouble(PyTuple_GET_ITEM(fields, 3));
    PyObject *sinks = PyTuple_GET_ITEM(fields, 4);
    PyObject *row_starts = PyTuple_GET_ITEM(fields, 5);
    long long key_start = PyLong_AsLongLong(PyTuple_GET_ITEM(fields, 6));
    if (PyErr_Occurred() != NULL) {
        return -1;
    }
    char name[48];
    PyOS_snprintf(name, sizeof name, "queries of layer %zd", index);
    if (py_krul_borrow(state, PyTuple_GET_ITEM(fields, 0), name, access, queries) != 0) {
        return -1;
    }
    PyOS_snprintf(name, sizeof name, "keys of layer %zd", index);
    if (py_krul_borrow(state, PyTuple_GET_ITEM(fields, 1), name, access, keys) != 0) {
        return -1;
    }
    if (sinks != Py_None) {
        PyOS_snprintf(name, sizeof name, "sinks of layer %zd", index);
        npy_intp shape[1] = {(npy_intp)queries->view.shape[1]};
        layer->sinks = array_data(state, sinks, name, NPY_FLOAT, 1, shape, 0);
        if (layer->sinks == NULL) {
            return -1;
        }
    }
    if (row_starts != Py_None) {
        PyOS_snprintf(name, sizeof name, "row_starts of layer %zd", index);
        npy_intp shape[2] = {(npy_intp)queries->view.shape[0], call->n_rows};
        layer->row_starts = array_data(state, row_starts, name, NPY_INT64, 2, shape, 0);
        if (layer->row_starts == NULL) {
            return -1;
        }
    }
    layer->queries = queries->view;
    layer->keys = keys->view;
    layer->scaling = (float)scaling;
    layer->softcap = (float)softcap;
    layer->key_start = key_start;
    return 0;
}

/* Borrow all that an observation reads. */
static int
take_call(py_krul_state *state, observe_call *call, PyObject *layers, PyObject *positions,
          PyObject *mask, py_krul_access access)
{
    call->sequence = PySequence_Tuple(layers);
    if (call->sequence == NULL) {
        return -1;
    }
    call->n_layers = PyTuple_GET_SIZE(call->sequence);
    call->items = PyMem_Calloc((size_t)call->n_layers + 1, sizeof *call->items);
    call->borrowed = PyMem_Calloc(2 * (size_t)call->n_layers + 1, sizeof *call->borrowed);
    call->layers = PyMem_Calloc((size_t)call->n_layers + 1, sizeof *call->layers);
    if (call->items == NULL || call->borrowed == NULL || call->layers == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    const npy_intp any[2] = {-1, -1};
    call->row_positions = array_data(state, positions, "row_positions", NPY_INT64, 1, any, 0);
    if (call->row_positions == NULL) {
        return -1;
    }
    call->n_rows = PyArray_DIM((PyArrayObject *)positions, 0);
    /* Foreign code may run here. Arrays of sums are looked at after it. */
    int64_t n_batch = -1;
    for (Py_ssize_t i = 0; i < call->n_layers; i++) {
        if (take_layer(state, call, i, PyTuple_GET_ITEM(call->sequence, i), access) != 0) {
            return -1;
        }
        if (n_batch < 0 && call->items[i] != NULL) {
            n_batch = call->layers[i].queries.shape[0];
        }
    }
    if (PyLong_Check(mask)) {
        call->n_keys_total = PyLong_AsLongLong(mask);
        return call->n_keys_total == -1 && PyErr_Occurred() != NULL ? -1 : 0;
    }
    const npy_intp shape[2] = {(npy_intp)n_batch, -1};
    call->key_is_real = array_data(state, mask, "key_is_real", NPY_UINT8, 2, shape, 0);
    if (call->key_is_real == NULL) {
        return -1;
    }
    call->n_keys_total = PyArray_DIM((PyArrayObject *)mask, 1);
    return 0;
}

/* The arrays of sums, all of them the caller's. */
static int
take_sums(py_krul_state *state, Py_ssize_t n_layers, PyObject *distances, PyObject *importance,
          PyObject *received, PyObject *n_rows, krul_estimator_sums *out)
{
    const npy_intp square[2] = {n_layers, n_layers};
    const npy_intp ends[2] = {n_layers, 2};
    const npy_intp by_token[2] = {n_layers, -1};
    const npy_intp one[1] = {1};
    out->distances = array_data(state, distances, "distances", NPY_DOUBLE, 2, square, 1);
    out->importance = out->distances == NULL
                          ? NULL
                          : array_data(state, importance, "importance", NPY_DOUBLE, 2, ends, 1);
    out->received = out->importance == NULL
                        ? NULL
                        : array_data(state, received, "received", NPY_FLOAT, 2, by_token, 1);
    out->n_rows = out->received == NULL
                      ? NULL
                      : array_data(state, n_rows, "n_rows", NPY_DOUBLE, 1, one, 1);
    if (out->n_rows == NULL) {
        return -1;
    }
    out->received_stride = PyArray_DIM((PyArrayObject *)received, 1);
    return 0;
}

PyDoc_STRVAR(estimator_observe_doc,
             "estimator_observe($module, /, layers, row_positions, key_is_real, weight, distances, "
             "importance, received, n_rows, tile_bytes, n_threads, backend=None)\n--\n\n"
             "Add the sums of observed attention rows to NumPy arrays; see krul.estimator.\n\n"
             "layers: None or (queries, keys, scaling, softcap, sinks, row_starts, key_start) for "
             "each.\nkey_is_real: uint8 n_batch x n_keys_total, or the number of keys.");

static PyObject *
estimator_observe(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layers",     "row_positions", "key_is_real", "weight",
                            "distances",  "importance",    "received",    "n_rows",
                            "tile_bytes", "n_threads",     "backend",     NULL};
    py_krul_state *state = py_krul_state_of(module);
    PyObject *layers, *positions, *mask, *distances, *importance, *received, *n_rows;
    PyObject *backend_object = Py_None;
    PyObject *result = NULL;
    observe_call call = {0};
    krul_estimator_sums sums = {0};
    krul_error err;
    double weight;
    Py_ssize_t tile_bytes;
    int n_threads;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOdOOOOni|O:estimator_observe", names, &layers,
                                     &positions, &mask, &weight, &distances, &importance, &received,
                                     &n_rows, &tile_bytes, &n_threads, &backend_object)) {
        return NULL;
    }
    if (tile_bytes < 0 || n_threads < 0) {
        return PyErr_Format(PyExc_ValueError,
                            "tile_bytes is %zd and n_threads is %d but neither may be below 0",
                            tile_bytes, n_threads);
    }
    const krul_backend *backend = py_krul_backend(state, backend_object);
    if (backend == NULL || take_call(state, &call, layers, positions, mask, PY_KRUL_INPUT) != 0 ||
        take_sums(state, call.n_layers, distances, importance, received, n_rows, &sums) != 0) {
        goto done;
    }
    int32_t n_layers = call.n_layers > INT32_MAX ? -1 : (int32_t)call.n_layers;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_estimator_observe(backend, call.layers, n_layers, call.row_positions, call.n_rows,
                                    call.key_is_real, call.n_keys_total, weight, (size_t)tile_bytes,
                                    n_threads, &sums, &err);
    Py_END_ALLOW_THREADS
    result = status == KRUL_STATUS_OK ? Py_NewRef(Py_None) : py_krul_raise(state, &err);
done:
    call_close(&call);
    return result;
}

PyMethodDef py_estimator_methods[] = {
    {"estimator_observe", (PyCFunction)(void (*)(void))estimator_observe,
     METH_VARARGS | METH_KEYWORDS, estimator_observe_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- on a device ------------------------------------------------------------------------------- */

typedef struct py_observer {
    PyObject_HEAD
    krul_observer *observer;
    int32_t n_layers;
} py_observer;

static PyObject *
observer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"device", "n_layers", NULL};
    py_krul_state *state = PyType_GetModuleState(type);
    int device_id, n_layers;
    krul_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii:Observer", names, &device_id, &n_layers)) {
        return NULL;
    }
    if (state->devices == NULL) {
        (void)krul_fail(&err, KRUL_STATUS_DEVICE, "there is no table of devices");
        return py_krul_raise(state, &err);
    }
    py_observer *self = (py_observer *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->n_layers = n_layers;
    if (krul_observer_new(state->devices, device_id, n_layers, &self->observer, &err) !=
        KRUL_STATUS_OK) {
        Py_DECREF(self);
        return py_krul_raise(state, &err);
    }
    return (PyObject *)self;
}

static void
observer_dealloc(PyObject *object)
{
    py_observer *self = (py_observer *)object;
    PyTypeObject *type = Py_TYPE(object);
    Py_BEGIN_ALLOW_THREADS
    krul_observer_free(self->observer);
    Py_END_ALLOW_THREADS
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(observer_observe_doc,
             "observe($self, /, layers, row_positions, key_is_real, weight, events=())\n--\n\n"
             "Add the sums of observed attention rows, on the device, after these events, a list of\n"
             "(device, address). Arguments are those of estimator_observe, with queries and keys on\n"
             "the device; they are not read any more when this returns. NotImplementedError and\n"
             "MemoryError leave everything as it was.");

static PyObject *
observer_observe(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layers", "row_positions", "key_is_real", "weight", "events", NULL};
    py_observer *self = (py_observer *)object;
    py_krul_state *state = PyType_GetModuleState(Py_TYPE(object));
    PyObject *layers, *positions, *mask;
    PyObject *events_object = NULL;
    PyObject *result = NULL;
    observe_call call = {0};
    krul_device_event *events = NULL;
    int32_t n_events = 0;
    krul_error err;
    krul_status status;
    double weight;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOd|O:observe", names, &layers, &positions,
                                     &mask, &weight, &events_object) ||
        (events_object != NULL && py_krul_events(events_object, &events, &n_events) != 0)) {
        return NULL;
    }
    if (take_call(state, &call, layers, positions, mask, PY_KRUL_INPUT_ANYWHERE) != 0) {
        goto done;
    }
    if (call.n_layers != self->n_layers) {
        (void)krul_fail(&err, KRUL_STATUS_BAD_SHAPE, "there are %lld layers but must be %d",
                        (long long)call.n_layers, (int)self->n_layers);
        py_krul_raise(state, &err);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = krul_observer_observe(self->observer, events, n_events, call.layers,
                                   call.row_positions, call.n_rows, call.key_is_real,
                                   call.n_keys_total, weight, &err);
    Py_END_ALLOW_THREADS
    result = status == KRUL_STATUS_OK ? Py_NewRef(Py_None) : py_krul_raise(state, &err);
done:
    call_close(&call);
    PyMem_Free(events);
    return result;
}

PyDoc_STRVAR(observer_read_doc,
             "read($self, /, distances, importance, received, n_rows)\n--\n\n"
             "Add the sums to NumPy arrays and begin again with zero; waits for the device.");

static PyObject *
observer_read(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"distances", "importance", "received", "n_rows", NULL};
    py_observer *self = (py_observer *)object;
    py_krul_state *state = PyType_GetModuleState(Py_TYPE(object));
    PyObject *distances, *importance, *received, *n_rows;
    krul_estimator_sums sums = {0};
    krul_error err;
    krul_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO:read", names, &distances, &importance,
                                     &received, &n_rows) ||
        take_sums(state, self->n_layers, distances, importance, received, n_rows, &sums) != 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = krul_observer_read(self->observer, &sums, &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(state, &err);
    }
    Py_RETURN_NONE;
}

static PyMethodDef observer_methods[] = {
    {"observe", (PyCFunction)(void (*)(void))observer_observe, METH_VARARGS | METH_KEYWORDS,
     observer_observe_doc},
    {"read", (PyCFunction)(void (*)(void))observer_read, METH_VARARGS | METH_KEYWORDS,
     observer_read_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(observer_doc,
             "Observer(device, n_layers)\n--\n\n"
             "Sums of observed attention rows on a CUDA device, for layers that are there.");

static PyType_Slot observer_slots[] = {
    {Py_tp_new, observer_new},
    {Py_tp_dealloc, observer_dealloc},
    {Py_tp_methods, observer_methods},
    {Py_tp_doc, (void *)observer_doc},
    {0, NULL},
};

PyType_Spec py_observer_spec = {
    .name = "krul._core.Observer",
    .basicsize = sizeof(py_observer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = observer_slots,
};

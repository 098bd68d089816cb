/* py_restore.c - krul._core.Restore: a restore under way, as Python holds it. */
#include "py_krul.h"

#include <math.h>
#include <stdlib.h>

/* Whatever takes the restore's lock is called without the GIL: a worker that holds the lock may be in
 * a function of a device, and that may wait for the GIL. */

/* How long one wait sleeps before it looks for Ctrl-C. */
static const double signal_check_s = 0.1;

typedef struct py_restore {
    PyObject_HEAD
    krul_restore *restore;
    krul_restore_machine machine; /* used where it is made up */
    bool is_made_up;
    int64_t n_steps;
    py_krul_borrowed *arrays;
    Py_ssize_t n_arrays;
    Py_buffer *payloads;
    Py_ssize_t n_payloads;
    PyObject *predictors; /* a list that keeps them alive */
} py_restore;

static void
release_arrays(py_restore *self)
{
    /* Each is taken out before it is released: that may let another thread in here. */
    while (self->n_arrays > 0) {
        self->n_arrays--;
        py_krul_release(&self->arrays[self->n_arrays]);
    }
    while (self->n_payloads > 0) {
        self->n_payloads--;
        PyBuffer_Release(&self->payloads[self->n_payloads]);
    }
}

/* The view of an array, borrowed when it is seen for the first time; NULL with an exception. */
static const krul_view *
view_of(py_krul_state *state, py_restore *self, PyObject *array, PyObject *known)
{
    PyObject *key = PyLong_FromVoidPtr(array);
    PyObject *index = key == NULL ? NULL : PyDict_GetItemWithError(known, key);
    const krul_view *view = NULL;
    if (index != NULL) {
        view = &self->arrays[PyLong_AsSsize_t(index)].view;
    }
    else if (key != NULL && !PyErr_Occurred()) {
        py_krul_borrowed *borrowed = &self->arrays[self->n_arrays];
        if (py_krul_borrow(state, array, "a step's array", PY_KRUL_OUTPUT_ANYWHERE, borrowed) ==
            0) {
            index = PyLong_FromSsize_t(self->n_arrays++);
            if (index != NULL && PyDict_SetItem(known, key, index) == 0) {
                view = &borrowed->view;
            }
            Py_XDECREF(index);
        }
    }
    Py_XDECREF(key);
    return view;
}

/* The part of a whole layer that a step writes to. */
static int
slice_view(const krul_view *whole, int64_t token_start, int64_t n_tokens, krul_view *out)
{
    int64_t n_room = whole->shape[2];
    if (n_tokens < 1 || token_start < 0 || n_tokens > n_room || token_start > n_room - n_tokens) {
        PyErr_Format(PyExc_ValueError,
                     "a step writes %lld tokens from %lld but its array has room for %lld",
                     (long long)n_tokens, (long long)token_start, (long long)n_room);
        return -1;
    }
    *out = krul_view_slice_tokens(whole, token_start, n_tokens);
    return 0;
}

/* Fill one step from (fd, payload or None, entry, (array or None, ...)), with a Predict behind them
 * where it is coded with a profile, and the tokens that it writes where arrays are whole layers. On a
 * machine that is made up an array is anything but None, and only that counts. `known` says where
 * arrays were borrowed before. */
static int
parse_step(py_krul_state *state, py_restore *self, PyObject *item, PyObject *known,
           krul_restore_step *step)
{
    PyObject *payload, *entry, *arrays, *predictor = Py_None;
    long long n_tokens = -1;
    int result = -1;
    memset(step, 0, sizeof *step);
    PyObject *tuple = PySequence_Tuple(item);
    PyObject *outputs = NULL;
    if (tuple == NULL ||
        !PyArg_ParseTuple(tuple,
                          "iOOO|OL;a step is (fd, payload, entry, arrays, "
                          "predictor, n_tokens)",
                          &step->fd, &payload, &entry, &arrays, &predictor, &n_tokens)) {
        goto done;
    }
    if (py_krul_entry_from_tuple(entry, &step->entry) != 0) {
        goto done;
    }
    if (predictor != Py_None) {
        step->predict = py_krul_predict(state, predictor);
        if (step->predict == NULL || PyList_Append(self->predictors, predictor) != 0) {
            goto done;
        }
    }
    if (payload != Py_None) {
        Py_buffer *buffer = &self->payloads[self->n_payloads];
        if (PyObject_GetBuffer(payload, buffer, PyBUF_SIMPLE) != 0) {
            goto done;
        }
        self->n_payloads++;
        if ((uint64_t)buffer->len != step->entry.payload_bytes) {
            PyErr_Format(PyExc_ValueError, "payload has %zd bytes but its entry says %llu",
                         buffer->len, (unsigned long long)step->entry.payload_bytes);
            goto done;
        }
        step->fd = -1;
        step->payload = buffer->buf;
    }
    outputs = PySequence_Tuple(arrays);
    if (outputs == NULL) {
        goto done;
    }
    Py_ssize_t n_wanted = step->entry.layer_upper >= 0 || step->entry.kv == KRUL_KV_BOTH ? 2 : 1;
    if (PyTuple_GET_SIZE(outputs) != n_wanted) {
        PyErr_Format(PyExc_ValueError, "a step has %zd arrays but its entry needs %zd",
                     PyTuple_GET_SIZE(outputs), n_wanted);
        goto done;
    }
    for (Py_ssize_t i = 0; i < n_wanted; i++) {
        PyObject *array = PyTuple_GET_ITEM(outputs, i);
        if (array == Py_None) {
            continue;
        }
        if (self->is_made_up) {
            step->views[i].data = self;
            step->views[i].shape[2] = step->entry.n_tokens;
            continue;
        }
        const krul_view *view = view_of(state, self, array, known);
        if (view == NULL) {
            goto done;
        }
        step->views[i] = *view;
        if (n_tokens >= 0 &&
            slice_view(view, step->entry.token_start, n_tokens, &step->views[i]) != 0) {
            goto done;
        }
    }
    result = 0;
done:
    Py_XDECREF(outputs);
    Py_XDECREF(tuple);
    return result;
}

/* (bytes read per second, latency in seconds, bytes decoded per second and thread) */
static int
parse_machine(PyObject *machine, krul_restore_machine *out)
{
    PyObject *tuple = PySequence_Tuple(machine);
    bool is_good = tuple != NULL &&
                   PyArg_ParseTuple(tuple,
                                    "ddd;a machine is (read_bytes_per_s, read_latency_s, "
                                    "decode_bytes_per_s)",
                                    &out->read_bytes_per_s, &out->read_latency_s,
                                    &out->decode_bytes_per_s);
    Py_XDECREF(tuple);
    return is_good ? 0 : -1;
}

/* [(device number, address of a stream), ...]; *out is to be freed. */
static int
parse_streams(PyObject *streams, krul_device_stream **out, int32_t *n_streams)
{
    krul_device_event *found = NULL;
    if (py_krul_events(streams, &found, n_streams) != 0) {
        return -1;
    }
    *out = PyMem_Calloc((size_t)*n_streams + 1, sizeof **out);
    for (int32_t i = 0; *out != NULL && i < *n_streams; i++) {
        (*out)[i] = (krul_device_stream){found[i].device_id, found[i].event};
    }
    PyMem_Free(found);
    return *out != NULL ? 0 : -1;
}

static PyObject *
restore_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"steps",   "n_layers", "n_threads",   "backend", "max_bytes_per_s",
                            "machine", "streams",  "takes_turns", NULL};
    int takes_turns = 0;
    PyObject *streams = Py_None;
    krul_device_stream *first = NULL;
    PyObject *steps_in;
    PyObject *backend_name = Py_None;
    PyObject *machine = Py_None;
    int n_layers;
    krul_restore_options options = {.n_threads = 0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oi|iOdOOp:Restore", names, &steps_in, &n_layers,
                                     &options.n_threads, &backend_name, &options.max_bytes_per_s,
                                     &machine, &streams, &takes_turns)) {
        return NULL;
    }
    py_krul_state *state = PyType_GetModuleState(type);
    const krul_backend *backend = py_krul_backend(state, backend_name);
    if (backend == NULL) {
        return NULL;
    }
    PyObject *items = PySequence_Tuple(steps_in);
    if (items == NULL) {
        return NULL;
    }
    Py_ssize_t n_steps = PyTuple_GET_SIZE(items);
    krul_restore_step *steps = PyMem_Calloc((size_t)n_steps + 1, sizeof *steps);
    PyObject *known = PyDict_New();
    py_restore *self = (py_restore *)type->tp_alloc(type, 0);
    bool is_good = self != NULL && steps != NULL && known != NULL;
    if (is_good && streams != Py_None) {
        is_good = parse_streams(streams, &first, &options.n_streams) == 0;
    }
    options.devices = state->devices;
    options.streams = first;
    options.takes_turns = takes_turns != 0;
    if (is_good && machine != Py_None) {
        self->is_made_up = true;
        options.machine = &self->machine;
        is_good = parse_machine(machine, &self->machine) == 0;
    }
    if (is_good) {
        self->n_steps = n_steps;
        self->arrays = PyMem_Calloc((size_t)n_steps * KRUL_COMPRESSOR_MAX_VIEWS + 1,
                                    sizeof *self->arrays);
        self->payloads = PyMem_Calloc((size_t)n_steps + 1, sizeof *self->payloads);
        self->predictors = PyList_New(0);
        is_good = self->arrays != NULL && self->payloads != NULL && self->predictors != NULL;
    }
    if (!is_good && !PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < n_steps && is_good; i++) {
        is_good = parse_step(state, self, PyTuple_GET_ITEM(items, i), known, &steps[i]) == 0;
    }
    if (is_good) {
        krul_error err;
        krul_status status;
        Py_BEGIN_ALLOW_THREADS
        status = krul_restore_start(backend, steps, n_steps, n_layers, &options, &self->restore,
                                    &err);
        Py_END_ALLOW_THREADS
        if (status != KRUL_STATUS_OK) {
            py_krul_raise(state, &err);
            is_good = false;
        }
    }
    PyMem_Free(first);
    PyMem_Free(steps);
    Py_DECREF(items);
    Py_XDECREF(known);
    if (!is_good) {
        Py_XDECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void
restore_dealloc(PyObject *object)
{
    py_restore *self = (py_restore *)object;
    PyTypeObject *type = Py_TYPE(object);
    Py_BEGIN_ALLOW_THREADS
    krul_restore_free(self->restore);
    Py_END_ALLOW_THREADS
    release_arrays(self);
    PyMem_Free(self->arrays);
    PyMem_Free(self->payloads);
    Py_XDECREF(self->predictors);
    type->tp_free(object);
    Py_DECREF(type);
}

/* Sleep until waiting for a layer would return at once; false with an exception after a signal. */
static bool
sleep_until_done(krul_restore *restore, int32_t layer)
{
    bool is_done = false;
    while (!is_done) {
        Py_BEGIN_ALLOW_THREADS
        is_done = krul_restore_wait_for(restore, layer, signal_check_s);
        Py_END_ALLOW_THREADS
        if (!is_done && PyErr_CheckSignals() != 0) {
            return false;
        }
    }
    return true;
}

PyDoc_STRVAR(restore_wait_doc, "wait($self, layer, /)\n--\n\n"
                               "Wait until a layer is in; raise what its blocks failed with.");

static PyObject *
restore_wait(PyObject *object, PyObject *argument)
{
    py_restore *self = (py_restore *)object;
    long layer = PyLong_AsLong(argument);
    if (layer == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (layer < 0 || layer > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "layer is %ld but must be 0 or more", layer);
    }
    krul_error err;
    krul_status status = KRUL_STATUS_OK;
    if (!sleep_until_done(self->restore, (int32_t)layer)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = krul_restore_wait(self->restore, (int32_t)layer, &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(PyType_GetModuleState(Py_TYPE(object)), &err);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_wait_stream_doc,
             "wait_stream($self, layer, stream, /)\n--\n\n"
             "Wait until a layer's blocks are enqueued on its device, and let what is enqueued on\n"
             "the stream at this address from now on come after them.");

static PyObject *
restore_wait_stream(PyObject *object, PyObject *args)
{
    py_restore *self = (py_restore *)object;
    int layer;
    PyObject *handle;
    if (!PyArg_ParseTuple(args, "iO:wait_stream", &layer, &handle)) {
        return NULL;
    }
    void *stream = PyLong_AsVoidPtr(handle);
    if (PyErr_Occurred()) {
        return NULL;
    }
    krul_error err;
    krul_status status;
    if (!sleep_until_done(self->restore, layer)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = krul_restore_wait_stream(self->restore, layer, stream, &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(PyType_GetModuleState(Py_TYPE(object)), &err);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_lead_doc,
             "lead($self, device, stream, /)\n--\n\n"
             "Let what is enqueued on the stream at this address from now on come after all that\n"
             "was enqueued on the device so far.");

static PyObject *
restore_lead(PyObject *object, PyObject *args)
{
    int device_id;
    PyObject *handle;
    if (!PyArg_ParseTuple(args, "iO:lead", &device_id, &handle)) {
        return NULL;
    }
    void *stream = PyLong_AsVoidPtr(handle);
    if (PyErr_Occurred()) {
        return NULL;
    }
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_restore_lead(((py_restore *)object)->restore, device_id, stream, &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(PyType_GetModuleState(Py_TYPE(object)), &err);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_wait_for_doc,
             "wait_for($self, layer, timeout_s, /)\n--\n\n"
             "Wait until `wait` would return or raise at once, at most so long; say whether.\n\n"
             "Where turns are taken, until what was read meanwhile is decoded, too.");

static PyObject *
restore_wait_for(PyObject *object, PyObject *args)
{
    int layer;
    double timeout_s;
    bool is_done;
    if (!PyArg_ParseTuple(args, "id:wait_for", &layer, &timeout_s)) {
        return NULL;
    }
    if (!(timeout_s >= 0) || timeout_s > 1e9) {
        PyErr_SetString(PyExc_ValueError, "timeout_s must be from 0 to 1e9");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    is_done = krul_restore_wait_for(((py_restore *)object)->restore, layer, timeout_s);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(is_done);
}

PyDoc_STRVAR(restore_cancel_doc, "cancel($self, /)\n--\n\n"
                                 "Drop what has not begun; waiters wake with InterruptedError.");

static PyObject *
restore_cancel(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Py_BEGIN_ALLOW_THREADS
    krul_restore_cancel(((py_restore *)object)->restore);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_close_doc,
             "close($self, /)\n--\n\n"
             "Cancel, and return when no thread touches an array, a file or a payload any more.");

static PyObject *
restore_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    py_restore *self = (py_restore *)object;
    Py_BEGIN_ALLOW_THREADS
    krul_restore_cancel(self->restore);
    krul_restore_join(self->restore);
    Py_END_ALLOW_THREADS
    release_arrays(self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_counts_doc, "counts($self, /)\n--\n\n"
                                 "How far it is: steps, bytes and seconds, as a dict.");

static PyObject *
restore_counts(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    krul_restore_counts counts;
    Py_BEGIN_ALLOW_THREADS
    krul_restore_read_counts(((py_restore *)object)->restore, &counts);
    Py_END_ALLOW_THREADS
    PyObject *by_codec = PyDict_New();
    for (int codec = 0; by_codec != NULL && codec < KRUL_N_CODECS; codec++) {
        if (counts.decoded_bytes_by_codec[codec] == 0) {
            continue;
        }
        PyObject *key = PyLong_FromLong(codec);
        PyObject *value = Py_BuildValue("Kd",
                                        (unsigned long long)counts.decoded_bytes_by_codec[codec],
                                        counts.decode_s_by_codec[codec]);
        if (key == NULL || value == NULL || PyDict_SetItem(by_codec, key, value) != 0) {
            Py_CLEAR(by_codec);
        }
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    if (by_codec == NULL) {
        return NULL;
    }
    return Py_BuildValue("{s:L,s:L,s:K,s:d,s:d,s:d,s:d,s:N}", "n_steps", (long long)counts.n_steps,
                         "n_steps_done", (long long)counts.n_steps_done, "read_bytes",
                         (unsigned long long)counts.read_bytes, "read_s", counts.read_s,
                         "read_wall_s", counts.read_wall_s, "decode_s", counts.decode_s,
                         "elapsed_s", counts.elapsed_s, "by_codec", by_codec);
}

PyDoc_STRVAR(restore_trace_doc,
             "trace($self, /)\n--\n\n"
             "When each step was carried out, n_steps x 5 float64: worker, or -1 where it was not,\n"
             "and the seconds since the start at which it began, was read, could be decoded, and\n"
             "was.");

static PyObject *
restore_trace(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    py_restore *self = (py_restore *)object;
    enum { N_COLUMNS = 5 };
    npy_intp shape[2] = {self->n_steps, N_COLUMNS};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_DOUBLE);
    krul_restore_trace *traces = PyMem_Calloc((size_t)self->n_steps + 1, sizeof *traces);
    if (array == NULL || traces == NULL) {
        Py_CLEAR(array);
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    krul_restore_read_trace(self->restore, traces);
    Py_END_ALLOW_THREADS
    double *out = PyArray_DATA((PyArrayObject *)array);
    for (int64_t i = 0; i < self->n_steps; i++, out += N_COLUMNS) {
        out[0] = traces[i].worker;
        out[1] = traces[i].begin_s;
        out[2] = traces[i].read_s;
        out[3] = traces[i].turn_s;
        out[4] = traces[i].end_s;
    }
done:
    PyMem_Free(traces);
    return array;
}

PyDoc_STRVAR(restore_predict_problem_doc,
             "predict_problem($self, /)\n--\n\n"
             "Why the CPU decodes codec predict for arrays on a device; empty where it does not.");

static PyObject *
restore_predict_problem(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const krul_restore *restore = ((py_restore *)object)->restore;
    const char *problem = krul_restore_predict_problem(restore);
    return PyUnicode_DecodeUTF8(problem, (Py_ssize_t)strlen(problem), "replace");
}

PyDoc_STRVAR(restore_drop_doc,
             "drop($self, layer, n_tokens, /)\n--\n\n"
             "The caller writes a layer's first tokens itself: blocks that hold nothing else are\n"
             "dropped. When it returns no thread writes there.");

static PyObject *
restore_drop(PyObject *object, PyObject *args)
{
    int layer;
    long long n_tokens;
    if (!PyArg_ParseTuple(args, "iL:drop", &layer, &n_tokens)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    krul_restore_drop(((py_restore *)object)->restore, layer, n_tokens);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_reorder_doc, "reorder($self, order, /)\n--\n\n"
                                  "Take steps that have not begun in this order: int64 indices of\n"
                                  "all steps, each once.");

static PyObject *
restore_reorder(PyObject *object, PyObject *argument)
{
    py_restore *self = (py_restore *)object;
    PyArrayObject *order = (PyArrayObject *)PyArray_FROMANY(argument, NPY_INT64, 1, 1,
                                                            NPY_ARRAY_CARRAY_RO);
    if (order == NULL) {
        return NULL;
    }
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_restore_reorder(self->restore, PyArray_DATA(order), PyArray_DIM(order, 0), &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(order);
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(PyType_GetModuleState(Py_TYPE(object)), &err);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_limit_doc, "limit($self, max_bytes_per_s, /)\n--\n\n"
                                "Change how many bytes are read per second; 0: no limit.");

static PyObject *
restore_limit(PyObject *object, PyObject *argument)
{
    double max_bytes_per_s = PyFloat_AsDouble(argument);
    if (max_bytes_per_s == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    if (!(max_bytes_per_s >= 0)) {
        return PyErr_Format(PyExc_ValueError, "max_bytes_per_s is %R but must be 0 or more",
                            argument);
    }
    Py_BEGIN_ALLOW_THREADS
    krul_restore_limit(((py_restore *)object)->restore, max_bytes_per_s);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_abandon_doc,
             "abandon($self, /)\n--\n\n"
             "Cancel, and return when no thread touches an array any more, without waiting for\n"
             "reads: files and payloads are in use until `close`.");

static PyObject *
restore_abandon(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    Py_BEGIN_ALLOW_THREADS
    krul_restore_abandon(((py_restore *)object)->restore);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(restore_advance_doc,
             "advance($self, seconds, /)\n--\n\n"
             "Let time pass on a machine that is made up, and return what time it is there.");

static PyObject *
restore_advance(PyObject *object, PyObject *argument)
{
    py_restore *self = (py_restore *)object;
    double seconds = PyFloat_AsDouble(argument);
    if (seconds == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    if (!self->is_made_up) {
        PyErr_SetString(PyExc_ValueError, "time passes by itself on a machine that is real");
        return NULL;
    }
    if (!(seconds >= 0) || !isfinite(seconds)) {
        return PyErr_Format(PyExc_ValueError, "seconds is %R but must be 0 or more", argument);
    }
    self->machine.now_s += seconds;
    return PyFloat_FromDouble(self->machine.now_s);
}

static PyMethodDef restore_methods[] = {
    {"wait", restore_wait, METH_O, restore_wait_doc},
    {"wait_stream", restore_wait_stream, METH_VARARGS, restore_wait_stream_doc},
    {"wait_for", restore_wait_for, METH_VARARGS, restore_wait_for_doc},
    {"lead", restore_lead, METH_VARARGS, restore_lead_doc},
    {"cancel", restore_cancel, METH_NOARGS, restore_cancel_doc},
    {"close", restore_close, METH_NOARGS, restore_close_doc},
    {"counts", restore_counts, METH_NOARGS, restore_counts_doc},
    {"trace", restore_trace, METH_NOARGS, restore_trace_doc},
    {"predict_problem", restore_predict_problem, METH_NOARGS, restore_predict_problem_doc},
    {"drop", restore_drop, METH_VARARGS, restore_drop_doc},
    {"reorder", restore_reorder, METH_O, restore_reorder_doc},
    {"limit", restore_limit, METH_O, restore_limit_doc},
    {"abandon", restore_abandon, METH_NOARGS, restore_abandon_doc},
    {"advance", restore_advance, METH_O, restore_advance_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(restore_doc,
             "Restore(steps, n_layers, n_threads=0, backend=None, max_bytes_per_s=0.0, "
             "machine=None, streams=None, takes_turns=False)\n--\n\n"
             "Blocks on their way from files or memory into arrays, on threads of the library.\n\n"
             "Each step is ``(fd, payload or None, entry, arrays)``, then a Predict or None, and how\n"
             "many tokens it writes, from its own first, where the arrays are whole layers. Arrays\n"
             "are written in place and kept alive, files must stay open until `close`. A machine is\n"
             "``(read_bytes_per_s, read_latency_s, decode_bytes_per_s)``: one that is made up, on\n"
             "which only a clock moves. Arrays may be on CUDA devices: what the streams\n"
             "``[(device, address), ...]`` were told so far comes before what is written there. With\n"
             "takes_turns blocks are not decoded while who waited computes; see `wait_for`.");

static PyType_Slot restore_slots[] = {
    {Py_tp_new, restore_new},
    {Py_tp_dealloc, restore_dealloc},
    {Py_tp_methods, restore_methods},
    {Py_tp_doc, (void *)restore_doc},
    {0, NULL},
};

PyType_Spec py_restore_spec = {
    .name = "krul._core.Restore",
    .basicsize = sizeof(py_restore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = restore_slots,
};

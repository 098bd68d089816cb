/* py_predict.c - krul._core.Predict: a profile made ready for one conversation. */
#include "py_krul.h"

#include <stdlib.h>
#include <string.h>

/* Arrays of a layer in the order in which Python gives them, and of those the matrices. */
enum { N_LAYER_ARRAYS = 9, N_MATRICES = 5 };

typedef struct py_predict {
    PyObject_HEAD
    krul_predict *predict;
    PyObject *blas; /* the capsule */
    Py_buffer *buffers;
    Py_ssize_t n_buffers;
} py_predict;

/* Is a buffer's format this one native letter? Arrays that were read from files say "<" before it. */
static bool
is_format(const char *format, char letter)
{
    if (format != NULL && (*format == '<' || *format == '=' || *format == '@')) {
        format++;
    }
    return format != NULL && format[0] == letter && format[1] == '\0';
}

/* Borrow a contiguous array of n_numbers of a format's, or any number where that is negative; None
 * gives NULL. */
static int
borrow_numbers(py_predict *self, PyObject *array, const char *name, Py_ssize_t layer,
               int64_t n_numbers, char format, const void **out)
{
    size_t size = format == 'f' ? sizeof(float) : sizeof(uint16_t);
    *out = NULL;
    if (array == Py_None) {
        return 0;
    }
    Py_buffer *buffer = &self->buffers[self->n_buffers];
    if (PyObject_GetBuffer(array, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
        return -1;
    }
    self->n_buffers++;
    if (!is_format(buffer->format, format)) {
        PyErr_Format(PyExc_TypeError, "%s of layer %zd is of format '%s' but must be %s", name,
                     layer, buffer->format == NULL ? "B" : buffer->format,
                     format == 'f' ? "float32" : "bfloat16 as uint16");
        return -1;
    }
    if (n_numbers >= 0 && buffer->len != n_numbers * (int64_t)size) {
        PyErr_Format(PyExc_ValueError, "%s of layer %zd has %zd numbers but must have %lld", name,
                     layer, buffer->len / (Py_ssize_t)size, (long long)n_numbers);
        return -1;
    }
    *out = buffer->buf;
    return 0;
}

static int
borrow_floats(py_predict *self, PyObject *array, const char *name, Py_ssize_t layer,
              int64_t n_floats, const float **out)
{
    const void *found;
    int result = borrow_numbers(self, array, name, layer, n_floats, 'f', &found);
    *out = found;
    return result;
}

/* A layer's matrices in bfloat16: (forward, backward, maps, left, right), sizes like those in
 * float32. */
static int
parse_narrow(py_predict *self, PyObject *item, Py_ssize_t index, krul_predict_layer *layer)
{
    static const char *names[N_MATRICES] = {"narrow forward", "narrow backward", "narrow maps",
                                            "narrow left", "narrow right"};
    int64_t width = (int64_t)2 * layer->n_heads * layer->head_dim;
    int64_t n_in = layer->n_sources * width;
    const int64_t sizes[N_MATRICES] = {width * width, width * width, n_in * width,
                                       n_in * layer->rank, layer->rank * width};
    const void *found[N_MATRICES];
    if (item == Py_None) {
        return 0;
    }
    PyObject *tuple = PySequence_Tuple(item);
    if (tuple == NULL) {
        return -1;
    }
    int result = -1;
    if (PyTuple_GET_SIZE(tuple) != N_MATRICES) {
        PyErr_Format(PyExc_ValueError, "narrow has %zd matrices for layer %zd but must have %d",
                     PyTuple_GET_SIZE(tuple), index, (int)N_MATRICES);
        goto done;
    }
    for (int i = 0; i < N_MATRICES; i++) {
        if (borrow_numbers(self, PyTuple_GET_ITEM(tuple, i), names[i], index, sizes[i], 'H',
                           &found[i]) != 0) {
            goto done;
        }
    }
    layer->narrow = (krul_predict_narrow){
        .forward = found[0],
        .backward = found[1],
        .maps = found[2],
        .left = found[3],
        .right = found[4],
    };
    result = 0;
done:
    Py_DECREF(tuple);
    return result;
}

/* One layer from (n_heads, head_dim, sources, rank, mean, deviation, forward, backward, maps, left,
 * right, convention, start, n_pairs, cos, sin). */
static int
parse_layer(py_predict *self, PyObject *item, Py_ssize_t index, int64_t n_batch, int64_t n_tokens,
            krul_predict_layer *layer)
{
    PyObject *arrays[N_LAYER_ARRAYS];
    PyObject *sources_in, *sources = NULL;
    int n_heads, head_dim, rank, convention, start, n_pairs;
    int result = -1;
    memset(layer, 0, sizeof *layer);
    if (item == Py_None) {
        return 0;
    }
    PyObject *tuple = PySequence_Tuple(item);
    if (tuple == NULL ||
        !PyArg_ParseTuple(tuple,
                          "iiOiOOOOOOOiiiOO;a layer is (n_heads, head_dim, sources, rank, mean, "
                          "deviation, forward, backward, maps, left, right, convention, start, "
                          "n_pairs, cos, sin)",
                          &n_heads, &head_dim, &sources_in, &rank, &arrays[0], &arrays[1],
                          &arrays[2], &arrays[3], &arrays[4], &arrays[5], &arrays[6], &convention,
                          &start, &n_pairs, &arrays[7], &arrays[8])) {
        goto done;
    }
    sources = PySequence_Tuple(sources_in);
    if (sources == NULL) {
        goto done;
    }
    Py_ssize_t n_sources = PyTuple_GET_SIZE(sources);
    if (n_heads < 1 || n_heads > KRUL_STORE_MAX_EXTENT || head_dim < 1 ||
        head_dim > KRUL_STORE_MAX_EXTENT || rank < 0 || rank > KRUL_PREDICT_MAX_WIDTH ||
        n_pairs < 0 || n_pairs > KRUL_STORE_MAX_EXTENT || n_sources > KRUL_PREDICT_MAX_SOURCES) {
        PyErr_Format(PyExc_ValueError,
                     "layer %zd has %d heads of %d, rank %d, %d pairs and %zd sources", index,
                     n_heads, head_dim, rank, n_pairs, n_sources);
        goto done;
    }
    layer->n_heads = n_heads;
    layer->head_dim = head_dim;
    layer->n_sources = (int32_t)n_sources;
    layer->rank = rank;
    for (Py_ssize_t i = 0; i < n_sources; i++) {
        int overflow;
        long source = PyLong_AsLongAndOverflow(PyTuple_GET_ITEM(sources, i), &overflow);
        if (PyErr_Occurred()) {
            goto done;
        }
        if (overflow != 0 || source < 0 || source > INT32_MAX) {
            PyErr_Format(PyExc_ValueError, "layer %zd has the source %R", index,
                         PyTuple_GET_ITEM(sources, i));
            goto done;
        }
        layer->sources[i] = (int32_t)source;
    }
    int64_t width = (int64_t)2 * n_heads * head_dim;
    int64_t n_in = n_sources * width;
    krul_rotary *rotary = &layer->rotary;
    rotary->convention = (krul_rotary_convention)convention;
    rotary->start = start;
    rotary->n_pairs = n_pairs;
    if (borrow_floats(self, arrays[0], "mean", index, width, &layer->mean) != 0 ||
        borrow_floats(self, arrays[1], "deviation", index, width, &layer->deviation) != 0 ||
        borrow_floats(self, arrays[2], "forward", index, width * width, &layer->forward) != 0 ||
        borrow_floats(self, arrays[3], "backward", index, width * width, &layer->backward) != 0 ||
        borrow_floats(self, arrays[4], "maps", index, n_in * width, &layer->maps) != 0 ||
        borrow_floats(self, arrays[5], "left", index, n_in * rank, &layer->left) != 0 ||
        borrow_floats(self, arrays[6], "right", index, rank * width, &layer->right) != 0 ||
        borrow_floats(self, arrays[7], "cos", index, -1, &rotary->cos) != 0) {
        goto done;
    }
    int64_t n_shared = n_tokens * n_pairs;
    int64_t n_angles = n_shared;
    if (rotary->cos != NULL) {
        int64_t n_given = self->buffers[self->n_buffers - 1].len / (int64_t)sizeof(float);
        rotary->is_per_batch = n_batch > 1 && n_given == n_batch * n_shared;
        n_angles = rotary->is_per_batch ? n_batch * n_shared : n_shared;
        if (n_given != n_angles) {
            PyErr_Format(PyExc_ValueError, "cos of layer %zd has %lld numbers but must have %lld",
                         index, (long long)n_given, (long long)n_angles);
            goto done;
        }
    }
    if (borrow_floats(self, arrays[8], "sin", index, n_angles, &rotary->sin) != 0) {
        goto done;
    }
    result = 0;
done:
    Py_XDECREF(sources);
    Py_XDECREF(tuple);
    return result;
}

static void
release_all(py_predict *self)
{
    krul_predict_free(self->predict);
    self->predict = NULL;
    for (Py_ssize_t i = 0; i < self->n_buffers; i++) {
        PyBuffer_Release(&self->buffers[i]);
    }
    PyMem_Free(self->buffers);
    self->buffers = NULL;
    self->n_buffers = 0;
    Py_CLEAR(self->blas);
}

/* Copy rows of 256 frequencies out of an array of uint16. */
static int
parse_tables(PyObject *array, krul_entropy_table **out, int32_t *n_out)
{
    Py_buffer buffer;
    int result = -1;
    if (PyObject_GetBuffer(array, &buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
        return -1;
    }
    if (buffer.ndim != 2 || buffer.shape[1] != 256 || buffer.shape[0] < 1 ||
        buffer.shape[0] > KRUL_ENTROPY_MAX_TABLES || !is_format(buffer.format, 'H')) {
        PyErr_Format(PyExc_ValueError, "tables must be uint16 and (1 to %d, 256)",
                     (int)KRUL_ENTROPY_MAX_TABLES);
        goto done;
    }
    *out = PyMem_Malloc((size_t)buffer.len);
    if (*out == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    memcpy(*out, buffer.buf, (size_t)buffer.len);
    *n_out = (int32_t)buffer.shape[0];
    result = 0;
done:
    PyBuffer_Release(&buffer);
    return result;
}

static PyObject *
predict_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"blas",    "tables",      "unit_table", "layers",
                            "n_batch", "token_start", "n_tokens",   "digest",
                            "narrow",  "is_rounded",  NULL};
    PyObject *blas, *tables_in, *layers_in, *narrow_in = Py_None;
    int is_rounded = 0;
    const char *digest = NULL;
    Py_ssize_t n_digest = 0;
    long long n_batch, token_start, n_tokens;
    int unit_table;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOiOLLL|y#Op:Predict", names, &blas, &tables_in,
                                     &unit_table, &layers_in, &n_batch, &token_start, &n_tokens,
                                     &digest, &n_digest, &narrow_in, &is_rounded)) {
        return NULL;
    }
    if (digest != NULL && n_digest != KRUL_PREDICT_DIGEST_BYTES) {
        return PyErr_Format(PyExc_ValueError, "digest has %zd bytes but must have %d", n_digest,
                            (int)KRUL_PREDICT_DIGEST_BYTES);
    }
    const krul_blas *library = py_krul_blas(blas);
    if (library == NULL) {
        return NULL;
    }
    if (n_batch < 1 || n_batch > KRUL_STORE_MAX_EXTENT || n_tokens < 0 ||
        n_tokens > KRUL_STORE_MAX_TOKENS) {
        return PyErr_Format(PyExc_ValueError, "n_batch is %lld and n_tokens %lld", n_batch,
                            n_tokens);
    }
    PyObject *items = PySequence_Tuple(layers_in);
    if (items == NULL) {
        return NULL;
    }
    Py_ssize_t n_layers = PyTuple_GET_SIZE(items);
    PyObject *narrow = NULL;
    if (narrow_in != Py_None) {
        narrow = PySequence_Tuple(narrow_in);
        if (narrow == NULL || PyTuple_GET_SIZE(narrow) != n_layers) {
            if (narrow != NULL) {
                PyErr_Format(PyExc_ValueError, "narrow has %zd layers but must have %zd",
                             PyTuple_GET_SIZE(narrow), n_layers);
            }
            Py_XDECREF(narrow);
            Py_DECREF(items);
            return NULL;
        }
    }
    krul_predict_layer *layers = PyMem_Calloc((size_t)n_layers + 1, sizeof *layers);
    krul_entropy_table *tables = NULL;
    py_predict *self = (py_predict *)type->tp_alloc(type, 0);
    bool is_good = self != NULL && layers != NULL && n_layers <= KRUL_STORE_MAX_LAYERS;
    if (is_good) {
        self->blas = Py_NewRef(blas);
        self->buffers = PyMem_Calloc((size_t)n_layers * (N_LAYER_ARRAYS + N_MATRICES) + 1,
                                     sizeof *self->buffers);
        is_good = self->buffers != NULL;
    }
    if (!is_good && !PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < n_layers && is_good; i++) {
        is_good = parse_layer(self, PyTuple_GET_ITEM(items, i), i, n_batch, n_tokens, &layers[i]) ==
                      0 &&
                  (narrow == NULL ||
                   parse_narrow(self, PyTuple_GET_ITEM(narrow, i), i, &layers[i]) == 0);
    }
    krul_predict_options options = {
        .blas = library,
        .products = narrow != NULL ? KRUL_PRODUCTS_BF16
                    : is_rounded   ? KRUL_PRODUCTS_ROUNDED
                                   : KRUL_PRODUCTS_F32,
        .unit_table = unit_table,
        .n_layers = (int32_t)n_layers,
        .layers = layers,
        .n_batch = n_batch,
        .token_start = token_start,
        .n_tokens = n_tokens,
    };
    if (digest != NULL) {
        memcpy(options.digest, digest, sizeof options.digest);
    }
    is_good = is_good && parse_tables(tables_in, &tables, &options.n_tables) == 0;
    if (is_good) {
        krul_error err;
        options.tables = tables;
        if (krul_predict_new(&options, &self->predict, &err) != KRUL_STATUS_OK) {
            py_krul_raise(PyType_GetModuleState(type), &err);
            is_good = false;
        }
    }
    PyMem_Free(tables);
    PyMem_Free(layers);
    Py_XDECREF(narrow);
    Py_DECREF(items);
    if (!is_good) {
        Py_XDECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void
predict_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    release_all((py_predict *)object);
    type->tp_free(object);
    Py_DECREF(type);
}

krul_predict *
py_krul_predict(py_krul_state *state, PyObject *object)
{
    if (!PyObject_TypeCheck(object, state->predict_type)) {
        PyErr_Format(PyExc_TypeError, "a %s is no krul._core.Predict", Py_TYPE(object)->tp_name);
        return NULL;
    }
    return ((py_predict *)object)->predict;
}

/* ---- coding ------------------------------------------------------------------------------------ */

/* One block on its way in or out. */
typedef struct predict_block {
    int32_t layer;
    int64_t token_start;
    int64_t n_tokens;
    krul_view views[2];
    py_krul_borrowed borrowed[2];
    Py_buffer given; /* the payload, or what is encoded's fineness; held while .obj is not NULL */
    uint8_t *payload; /* encoding: owned */
    size_t payload_bytes;
    double error[2];
} predict_block;

/* The blocks of one chain, which one thread codes. */
typedef struct predict_run {
    const krul_backend *backend;
    krul_predict *predict;
    float step; /* encoding */
    predict_block *blocks;
    Py_ssize_t n_blocks;
    bool fits;
    krul_status status;
    krul_error err;
} predict_run;

static void
encode_run(void *argument)
{
    predict_run *run = argument;
    run->fits = true;
    for (Py_ssize_t i = 0; i < run->n_blocks && run->fits; i++) {
        predict_block *block = &run->blocks[i];
        size_t capacity_bytes;
        run->status = krul_predict_bound(run->predict, block->layer, block->views[0].shape[2],
                                         &capacity_bytes, &run->err);
        if (run->status != KRUL_STATUS_OK) {
            return;
        }
        uint8_t *payload = malloc(capacity_bytes);
        if (payload == NULL) {
            run->status = krul_fail(&run->err, KRUL_STATUS_NO_MEMORY,
                                    "no memory for a payload of at most %zu bytes", capacity_bytes);
            return;
        }
        run->status = krul_predict_encode(
            run->backend, run->predict, block->layer, block->token_start, block->views, run->step,
            block->given.buf, payload, capacity_bytes, &block->payload_bytes, &run->fits,
            block->error, &run->err);
        if (run->status == KRUL_STATUS_OK && run->fits) {
            block->payload = realloc(payload, block->payload_bytes);
            payload = block->payload != NULL ? NULL : payload;
        }
        free(payload);
        if (run->status != KRUL_STATUS_OK) {
            return;
        }
        if (run->fits && block->payload == NULL) {
            run->status = krul_fail(&run->err, KRUL_STATUS_NO_MEMORY, "no memory for a payload");
            return;
        }
    }
}

static void
decode_run(void *argument)
{
    predict_run *run = argument;
    for (Py_ssize_t i = 0; i < run->n_blocks; i++) {
        predict_block *block = &run->blocks[i];
        run->status = krul_predict_decode(run->backend, run->predict, block->layer,
                                          block->token_start, block->n_tokens, block->given.buf,
                                          (size_t)block->given.len, block->views, &run->err);
        if (run->status != KRUL_STATUS_OK) {
            return;
        }
    }
}

static int
borrow_views(py_krul_state *state, predict_block *block, PyObject *arrays[2], bool is_output)
{
    static const char *const names[2] = {"keys", "values"};
    for (int kv = 0; kv < 2; kv++) {
        if (arrays[kv] == Py_None && is_output) {
            continue;
        }
        if (py_krul_borrow(state, arrays[kv], names[kv], is_output, &block->borrowed[kv]) != 0) {
            return -1;
        }
        block->views[kv] = block->borrowed[kv].view;
    }
    return 0;
}

/* The fineness of each token of a block, one int8 each. */
static int
borrow_fineness(PyObject *array, predict_block *block)
{
    Py_buffer *buffer = &block->given;
    int64_t n_tokens = block->views[0].shape[2];
    if (PyObject_GetBuffer(array, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
        return -1;
    }
    if (!is_format(buffer->format, 'b') || buffer->len != n_tokens) {
        PyErr_Format(PyExc_ValueError,
                     "fineness of layer %d is %zd numbers of format '%s' but must be %lld of int8",
                     (int)block->layer, buffer->len, buffer->format == NULL ? "B" : buffer->format,
                     (long long)n_tokens);
        return -1;
    }
    return 0;
}

/* Encoding: (layer, token_start, keys, values), fineness behind them or not. Decoding: (layer,
 * token_start, n_tokens, payload, keys, values). */
static int
parse_block(py_krul_state *state, PyObject *item, bool is_decoding, predict_block *block)
{
    PyObject *arrays[2], *payload = NULL, *fineness = Py_None;
    int layer;
    long long token_start, n_tokens = 0;
    int result = -1;
    PyObject *tuple = PySequence_Tuple(item);
    if (tuple == NULL) {
        return -1;
    }
    if (is_decoding
            ? PyArg_ParseTuple(tuple,
                               "iLLOOO;a block is (layer, token_start, n_tokens, payload, "
                               "keys, values)",
                               &layer, &token_start, &n_tokens, &payload, &arrays[0], &arrays[1])
            : PyArg_ParseTuple(tuple,
                               "iLOO|O;a block is (layer, token_start, keys, values[, fineness])",
                               &layer, &token_start, &arrays[0], &arrays[1], &fineness)) {
        block->layer = layer;
        block->token_start = token_start;
        block->n_tokens = n_tokens;
        result = payload != NULL && PyObject_GetBuffer(payload, &block->given, PyBUF_SIMPLE) != 0
                     ? -1
                     : borrow_views(state, block, arrays, is_decoding);
        if (result == 0 && fineness != Py_None) {
            result = borrow_fineness(fineness, block);
        }
    }
    Py_DECREF(tuple);
    return result;
}

static void
free_runs(predict_run *runs, Py_ssize_t n_runs)
{
    for (Py_ssize_t i = 0; runs != NULL && i < n_runs; i++) {
        for (Py_ssize_t k = 0; k < runs[i].n_blocks; k++) {
            predict_block *block = &runs[i].blocks[k];
            py_krul_release(&block->borrowed[0]);
            py_krul_release(&block->borrowed[1]);
            if (block->given.obj != NULL) {
                PyBuffer_Release(&block->given);
            }
            free(block->payload);
        }
        PyMem_Free(runs[i].blocks);
    }
    PyMem_Free(runs);
}

/* A list of (payload, error, power), or None where a run does not fit. */
static PyObject *
encoded_run(const predict_run *run)
{
    if (!run->fits) {
        return Py_NewRef(Py_None);
    }
    PyObject *list = PyList_New(run->n_blocks);
    for (Py_ssize_t i = 0; list != NULL && i < run->n_blocks; i++) {
        const predict_block *block = &run->blocks[i];
        PyObject *item = Py_BuildValue("(y#dd)", (const char *)block->payload,
                                       (Py_ssize_t)block->payload_bytes, block->error[0],
                                       block->error[1]);
        if (item == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, item);
    }
    return list;
}

/* Parse the runs, code them in parallel, raise the first failure. */
static PyObject *
code_runs(PyObject *object, PyObject *runs_in, float step, int n_threads, PyObject *backend_name,
          bool is_decoding)
{
    py_predict *self = (py_predict *)object;
    py_krul_state *state = PyType_GetModuleState(Py_TYPE(object));
    PyObject *result = NULL;
    predict_run *runs = NULL;
    Py_ssize_t n_runs = 0;
    if (n_threads < 0 || n_threads > KRUL_POOL_MAX_THREADS) {
        return PyErr_Format(PyExc_ValueError, "n_threads is %d but must be 0 (all) to %d",
                            n_threads, KRUL_POOL_MAX_THREADS);
    }
    const krul_backend *backend = py_krul_backend(state, backend_name);
    if (backend == NULL) {
        return NULL;
    }
    PyObject *items = PySequence_Tuple(runs_in);
    if (items == NULL) {
        return NULL;
    }
    n_runs = PyTuple_GET_SIZE(items);
    runs = PyMem_Calloc((size_t)n_runs + 1, sizeof *runs);
    if (runs == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n_runs; i++) {
        PyObject *blocks = PySequence_Tuple(PyTuple_GET_ITEM(items, i));
        if (blocks == NULL) {
            goto done;
        }
        Py_ssize_t n_blocks = PyTuple_GET_SIZE(blocks);
        runs[i] = (predict_run){.backend = backend, .predict = self->predict, .step = step};
        runs[i].blocks = PyMem_Calloc((size_t)n_blocks + 1, sizeof *runs[i].blocks);
        bool is_good = runs[i].blocks != NULL;
        runs[i].n_blocks = is_good ? n_blocks : 0;
        for (Py_ssize_t k = 0; is_good && k < n_blocks; k++) {
            is_good = parse_block(state, PyTuple_GET_ITEM(blocks, k), is_decoding,
                                  &runs[i].blocks[k]) == 0;
        }
        Py_DECREF(blocks);
        if (!is_good) {
            if (!PyErr_Occurred()) {
                PyErr_NoMemory();
            }
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    krul_pool_for_each(n_threads, is_decoding ? decode_run : encode_run, runs, sizeof *runs,
                       n_runs);
    Py_END_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n_runs; i++) {
        if (runs[i].status != KRUL_STATUS_OK) {
            py_krul_raise(state, &runs[i].err);
            goto done;
        }
    }
    if (is_decoding) {
        result = Py_NewRef(Py_None);
        goto done;
    }
    result = PyList_New(n_runs);
    for (Py_ssize_t i = 0; result != NULL && i < n_runs; i++) {
        PyObject *run = encoded_run(&runs[i]);
        if (run == NULL) {
            Py_CLEAR(result);
            break;
        }
        PyList_SET_ITEM(result, i, run);
    }
done:
    free_runs(runs, n_runs);
    Py_DECREF(items);
    return result;
}

PyDoc_STRVAR(predict_encode_doc,
             "encode($self, /, runs, step, n_threads=0, backend=None)\n--\n\n"
             "Encode runs of tokens in parallel; a run is a list of (layer, token_start, keys,\n"
             "values) or (..., fineness), int8 for each token, layer by layer. For each a list of\n"
             "(payload, error_sum, power_sum), or None where a value cannot be held.");

static PyObject *
predict_encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"runs", "step", "n_threads", "backend", NULL};
    PyObject *runs, *backend = Py_None;
    float step;
    int n_threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Of|iO:encode", names, &runs, &step, &n_threads,
                                     &backend)) {
        return NULL;
    }
    return code_runs(object, runs, step, n_threads, backend, false);
}

PyDoc_STRVAR(predict_decode_doc,
             "decode($self, /, runs, n_threads=0, backend=None)\n--\n\n"
             "Decode runs of tokens in parallel; a run is a list of (layer, token_start, n_tokens,\n"
             "payload, keys, values), layer by layer; a run may go on in the next call. None stands\n"
             "for an array that is not wanted.");

static PyObject *
predict_decode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"runs", "n_threads", "backend", NULL};
    PyObject *runs, *backend = Py_None;
    int n_threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|iO:decode", names, &runs, &n_threads,
                                     &backend)) {
        return NULL;
    }
    return code_runs(object, runs, 0, n_threads, backend, true);
}

static PyMethodDef predict_methods[] = {
    {"encode", (PyCFunction)(void (*)(void))predict_encode, METH_VARARGS | METH_KEYWORDS,
     predict_encode_doc},
    {"decode", (PyCFunction)(void (*)(void))predict_decode, METH_VARARGS | METH_KEYWORDS,
     predict_decode_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(predict_doc,
             "Predict(blas, tables, unit_table, layers, n_batch, token_start, n_tokens, "
             "digest=..., narrow=None, is_rounded=False)\n--\n\n"
             "A profile made ready for the tokens from token_start on. A layer is None or (n_heads,\n"
             "head_dim, sources, rank, mean, deviation, forward, backward, maps, left, right,\n"
             "convention, start, n_pairs, cos, sin). Arrays are borrowed. A digest of 32 bytes names\n"
             "tables and layers but for cos and sin; a device keeps what it has got under it. With\n"
             "narrow, (forward, backward, maps, left, right) of each layer in bfloat16 as uint16,\n"
             "products are of bfloat16; with is_rounded, of float32 that holds no finer numbers:\n"
             "rows are rounded, and the matrices must have been.");

static PyType_Slot predict_slots[] = {
    {Py_tp_new, predict_new},
    {Py_tp_dealloc, predict_dealloc},
    {Py_tp_methods, predict_methods},
    {Py_tp_doc, (void *)predict_doc},
    {0, NULL},
};

PyType_Spec py_predict_spec = {
    .name = "krul._core.Predict",
    .basicsize = sizeof(py_predict),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = predict_slots,
};

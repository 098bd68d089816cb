/* py_compressor.c - encode and decode blocks, many at a time.
 *
 * A job's arrays are borrowed for the whole call. An encoder's buffer has the size of the worst case
 * only in address space: pages that the payload does not need are never touched, or given back at
 * once. It is mapped, because what malloc would keep for later is as large as the conversation. */
#include "py_krul.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* One block on its way in or out. */
typedef struct compressor_job {
    const krul_backend *backend;
    krul_codec codec;
    krul_kv kv;
    int n_views;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    py_krul_borrowed borrowed[KRUL_COMPRESSOR_MAX_VIEWS];
    Py_buffer given; /* decoding: the payload, held while given.obj is not NULL */
    uint8_t *payload; /* encoding: owned, mapped_bytes of it */
    size_t mapped_bytes;
    size_t payload_bytes;
    krul_codec codec_used;
    double error[2];
    bool is_on_device;
    bool is_left; /* to the CPU; err says why */
    krul_status status;
    krul_error err;
} compressor_job;

/* What both functions hold between parsing and cleaning up. */
typedef struct compressor_call {
    py_krul_state *state;
    const krul_backend *backend;
    int n_threads;
    PyObject *items; /* a tuple of ours: foreign code cannot empty it */
    compressor_job *jobs;
    Py_ssize_t n_jobs;
    krul_device_event *events; /* what is encoded on a device comes after them; NULL: nothing is */
    int32_t n_events;
} compressor_call;

static void
free_payload(compressor_job *job)
{
    if (job->mapped_bytes > 0) {
        (void)munmap(job->payload, job->mapped_bytes);
    }
    job->payload = NULL;
    job->mapped_bytes = 0;
}

/* Give back the pages behind the payload. */
static void
shrink_payload(compressor_job *job)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    size_t used_bytes = (job->payload_bytes / page_bytes + 1) * page_bytes;
    if (used_bytes < job->mapped_bytes &&
        munmap(job->payload + used_bytes, job->mapped_bytes - used_bytes) == 0) {
        job->mapped_bytes = used_bytes;
    }
}

/* Map memory for the largest payload; false with the job's status. */
static bool
map_payload(compressor_job *job, size_t *capacity_bytes)
{
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    memcpy(views, job->views, sizeof views);
    for (int i = 0; i < job->n_views && job->is_on_device; i++) {
        views[i].device_type = KRUL_DEVICE_CPU; /* only shapes matter here */
    }
    job->status = krul_compressor_bound(views, job->n_views, capacity_bytes, &job->err);
    if (job->status != KRUL_STATUS_OK) {
        return false;
    }
    void *mapped = mmap(NULL, *capacity_bytes + 1, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        job->status = krul_fail(&job->err, KRUL_STATUS_NO_MEMORY,
                                "no memory for a payload of at most %zu bytes", *capacity_bytes);
        return false;
    }
    job->payload = mapped;
    job->mapped_bytes = *capacity_bytes + 1;
    return true;
}

static void
encode_job(void *argument)
{
    compressor_job *job = argument;
    size_t capacity_bytes = 0;
    if (job->is_on_device || !map_payload(job, &capacity_bytes)) {
        return;
    }
    job->status = krul_compressor_encode(
        job->backend, job->codec, job->kv, job->views, job->n_views, job->payload, capacity_bytes,
        &job->payload_bytes, &job->codec_used, job->error, &job->err);
    if (job->status == KRUL_STATUS_OK) {
        shrink_payload(job);
    }
}

/* Take over what came of a job on a device. */
static void
take_result(compressor_job *job, const krul_device_job *there)
{
    job->payload_bytes = there->payload_bytes;
    job->codec_used = there->codec_used;
    memcpy(job->error, there->error, sizeof job->error);
    job->err = there->failure;
    job->status = there->failure.status;
    job->is_left = job->status == KRUL_STATUS_UNSUPPORTED || job->status == KRUL_STATUS_NO_MEMORY ||
                   job->status == KRUL_STATUS_DEVICE;
    if (job->is_left) {
        job->status = KRUL_STATUS_OK;
        free_payload(job);
    }
    else if (job->status == KRUL_STATUS_OK) {
        shrink_payload(job);
    }
}

/* Encode the jobs whose arrays are on devices. */
static void
encode_on_devices(compressor_call *call)
{
    size_t n_there = 0;
    krul_device_job *there = calloc((size_t)call->n_jobs + 1, sizeof *there);
    for (Py_ssize_t i = 0; i < call->n_jobs; i++) {
        compressor_job *job = &call->jobs[i];
        size_t capacity_bytes = 0;
        if (there == NULL && job->is_on_device) {
            job->status = krul_fail(&job->err, KRUL_STATUS_NO_MEMORY, "no memory for %zd jobs",
                                    call->n_jobs);
        }
        else if (job->is_on_device && map_payload(job, &capacity_bytes)) {
            there[n_there] = (krul_device_job){.codec = job->codec,
                                               .kv = job->kv,
                                               .n_views = job->n_views,
                                               .payload = job->payload,
                                               .capacity_bytes = capacity_bytes};
            memcpy(there[n_there++].views, job->views, sizeof job->views);
        }
    }
    if (n_there > 0) {
        krul_compressor_encode_on_device(call->state->devices, call->events, call->n_events, there,
                                         (int64_t)n_there);
    }
    for (Py_ssize_t i = 0, k = 0; i < call->n_jobs && n_there > 0; i++) {
        if (call->jobs[i].is_on_device && call->jobs[i].status == KRUL_STATUS_OK) {
            take_result(&call->jobs[i], &there[k++]);
        }
    }
    free(there);
}

static void
decode_job(void *argument)
{
    compressor_job *job = argument;
    job->status = krul_compressor_decode(job->backend, job->codec, job->kv, job->given.buf,
                                         (size_t)job->given.len, job->views, job->n_views,
                                         &job->err);
}

/* Borrow a job's arrays. None, which decoding allows, takes its shape from the other array. */
static int
borrow_arrays(compressor_call *call, Py_ssize_t index, PyObject *arrays, bool is_output)
{
    compressor_job *job = &call->jobs[index];
    int result = -1;
    int given = -1;
    PyObject *tuple = PySequence_Tuple(arrays);
    if (tuple == NULL) {
        goto done;
    }
    Py_ssize_t n_arrays = PyTuple_GET_SIZE(tuple);
    if (n_arrays < 1 || n_arrays > KRUL_COMPRESSOR_MAX_VIEWS) {
        PyErr_Format(PyExc_ValueError, "jobs[%zd] has %zd arrays but must have 1 to %d", index,
                     n_arrays, KRUL_COMPRESSOR_MAX_VIEWS);
        goto done;
    }
    job->n_views = (int)n_arrays;
    for (int i = 0; i < job->n_views; i++) {
        PyObject *array = PyTuple_GET_ITEM(tuple, i);
        char name[64];
        if (is_output && array == Py_None) {
            continue;
        }
        PyOS_snprintf(name, sizeof name, "jobs[%lld] array %d", (long long)index, i);
        bool is_anywhere = call->events != NULL && call->state->devices != NULL;
        py_krul_access access = is_output     ? PY_KRUL_OUTPUT
                                : is_anywhere ? PY_KRUL_INPUT_ANYWHERE
                                              : PY_KRUL_INPUT;
        if (py_krul_borrow(call->state, array, name, access, &job->borrowed[i]) != 0) {
            goto done;
        }
        job->views[i] = job->borrowed[i].view;
        job->is_on_device = job->is_on_device || job->views[i].device_type != KRUL_DEVICE_CPU;
        given = i;
    }
    if (given < 0) {
        PyErr_Format(PyExc_ValueError,
                     "jobs[%zd] has no array but None: at least one must be given", index);
        goto done;
    }
    for (int i = 0; i < job->n_views; i++) {
        if (is_output && PyTuple_GET_ITEM(tuple, i) == Py_None) {
            job->views[i] = job->views[given];
            job->views[i].data = NULL;
        }
    }
    result = 0;
done:
    Py_XDECREF(tuple);
    return result;
}

static int
parse_job(compressor_call *call, Py_ssize_t index, bool is_decoding)
{
    compressor_job *job = &call->jobs[index];
    int codec, kv;
    int result = -1;
    PyObject *arrays;
    PyObject *payload = NULL;
    PyObject *tuple = PySequence_Tuple(PyTuple_GET_ITEM(call->items, index));
    if (tuple == NULL) {
        goto done;
    }
    if (is_decoding
            ? !PyArg_ParseTuple(tuple, "iiOO;a job is (codec, kv, payload, arrays)", &codec, &kv,
                                &payload, &arrays)
            : !PyArg_ParseTuple(tuple, "iiO;a job is (codec, kv, arrays)", &codec, &kv, &arrays)) {
        goto done;
    }
    job->backend = call->backend;
    job->codec = (krul_codec)codec;
    job->kv = (krul_kv)kv;
    if (payload != NULL && PyObject_GetBuffer(payload, &job->given, PyBUF_SIMPLE) != 0) {
        goto done;
    }
    result = borrow_arrays(call, index, arrays, is_decoding);
done:
    Py_XDECREF(tuple);
    return result;
}

static void
close_call(compressor_call *call)
{
    for (Py_ssize_t i = 0; i < call->n_jobs; i++) {
        compressor_job *job = &call->jobs[i];
        for (int j = 0; j < KRUL_COMPRESSOR_MAX_VIEWS; j++) {
            py_krul_release(&job->borrowed[j]);
        }
        if (job->given.obj != NULL) {
            PyBuffer_Release(&job->given);
        }
        free_payload(job);
    }
    free(call->jobs);
    PyMem_Free(call->events);
    Py_CLEAR(call->items);
    call->jobs = NULL;
    call->n_jobs = 0;
}

/* Parse arguments and every job, run the jobs, raise the first failure. 0 when all is well; the
 * caller closes the call in any case. */
static int
run_call(compressor_call *call, PyObject *module, PyObject *args, PyObject *kwargs,
         bool is_decoding)
{
    static char *decode_names[] = {"jobs", "n_threads", "backend", NULL};
    static char *encode_names[] = {"jobs", "n_threads", "backend", "events", NULL};
    PyObject *jobs;
    PyObject *backend = Py_None;
    PyObject *events = Py_None;
    call->state = py_krul_state_of(module);
    if (is_decoding
            ? !PyArg_ParseTupleAndKeywords(args, kwargs, "O|iO:decode_blocks", decode_names, &jobs,
                                           &call->n_threads, &backend)
            : !PyArg_ParseTupleAndKeywords(args, kwargs, "O|iOO:encode_blocks", encode_names, &jobs,
                                           &call->n_threads, &backend, &events)) {
        return -1;
    }
    if (events != Py_None && py_krul_events(events, &call->events, &call->n_events) != 0) {
        return -1;
    }
    if (call->n_threads < 0 || call->n_threads > KRUL_POOL_MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "n_threads is %d but must be 0 (all) to %d", call->n_threads,
                     KRUL_POOL_MAX_THREADS);
        return -1;
    }
    call->backend = py_krul_backend(call->state, backend);
    if (call->backend == NULL) {
        return -1;
    }
    call->items = PySequence_Tuple(jobs);
    if (call->items == NULL) {
        return -1;
    }
    Py_ssize_t n_items = PyTuple_GET_SIZE(call->items);
    call->jobs = calloc((size_t)n_items + 1, sizeof *call->jobs);
    if (call->jobs == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    call->n_jobs = n_items;
    for (Py_ssize_t i = 0; i < n_items; i++) {
        if (parse_job(call, i, is_decoding) != 0) {
            return -1;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    if (!is_decoding) {
        encode_on_devices(call);
    }
    krul_pool_for_each(call->n_threads, is_decoding ? decode_job : encode_job, call->jobs,
                       sizeof *call->jobs, n_items);
    Py_END_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n_items; i++) {
        if (call->jobs[i].status != KRUL_STATUS_OK) {
            const krul_error *err = &call->jobs[i].err;
            krul_error named = {.status = err->status};
            (void)krul_fail(&named, err->status, "jobs[%lld]: %s", (long long)i, err->message);
            named.code = err->code;
            py_krul_raise(call->state, &named);
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(encode_blocks_doc,
             "encode_blocks($module, /, jobs, n_threads=0, backend=None, events=None)\n--\n\n"
             "Encode blocks in parallel; jobs are (codec, kv, arrays), arrays one or two of\n"
             "n_batch x n_heads x n_tokens x head_dim. One (payload, codec_used, error_sum,\n"
             "power_sum) for each: sum |x - decoded|^2 and sum |x|^2. With events, a list of (device,\n"
             "address), arrays may be on a CUDA device, which encodes them after these; a str in\n"
             "place of a tuple says why it did not, and the CPU may.");

static PyObject *
encode_blocks(PyObject *module, PyObject *args, PyObject *kwargs)
{
    compressor_call call = {.n_jobs = 0};
    PyObject *list = NULL;
    if (run_call(&call, module, args, kwargs, false) != 0) {
        goto done;
    }
    list = PyList_New(call.n_jobs);
    for (Py_ssize_t i = 0; list != NULL && i < call.n_jobs; i++) {
        compressor_job *job = &call.jobs[i];
        PyObject *item = job->is_left
                             ? PyUnicode_DecodeUTF8(job->err.message,
                                                    (Py_ssize_t)strlen(job->err.message), "replace")
                             : Py_BuildValue("(y#idd)", (const char *)job->payload,
                                             (Py_ssize_t)job->payload_bytes, (int)job->codec_used,
                                             job->error[0], job->error[1]);
        free_payload(job);
        if (item == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, item);
    }
done:
    close_call(&call);
    return list;
}

PyDoc_STRVAR(decode_blocks_doc,
             "decode_blocks($module, /, jobs, n_threads=0, backend=None)\n--\n\n"
             "Decode blocks in parallel; jobs are (codec, kv, payload, arrays). The arrays are\n"
             "written in place; None stands for one that is not wanted. No two jobs may write to\n"
             "one element.");

static PyObject *
decode_blocks(PyObject *module, PyObject *args, PyObject *kwargs)
{
    compressor_call call = {.n_jobs = 0};
    int result = run_call(&call, module, args, kwargs, true);
    close_call(&call);
    if (result != 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(codecs_doc, "codecs($module, /)\n--\n\n"
                         "The number of every codec, by name.");

static PyObject *
codecs(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    PyObject *numbers = PyDict_New();
    for (int codec = KRUL_CODEC_EXACT; numbers != NULL; codec++) {
        const char *name = krul_codec_name((krul_codec)codec);
        if (name == NULL) {
            break;
        }
        PyObject *number = PyLong_FromLong(codec);
        if (number == NULL || PyDict_SetItemString(numbers, name, number) != 0) {
            Py_CLEAR(numbers);
        }
        Py_XDECREF(number);
    }
    return numbers;
}

PyMethodDef py_compressor_methods[] = {
    {"encode_blocks", (PyCFunction)(void (*)(void))encode_blocks, METH_VARARGS | METH_KEYWORDS,
     encode_blocks_doc},
    {"decode_blocks", (PyCFunction)(void (*)(void))decode_blocks, METH_VARARGS | METH_KEYWORDS,
     decode_blocks_doc},
    {"codecs", codecs, METH_NOARGS, codecs_doc},
    {NULL, NULL, 0, NULL},
};

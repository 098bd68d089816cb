/* py_store.c - containers as Python sees them: checksums, heads, payloads, whole files. */
#include "py_krul.h"

/* An entry is a tuple of this many integers, in the order of krul_store_entry's fields. */
enum { N_ENTRY_FIELDS = 14 };

/* Summing this many bytes takes about as long as giving up the GIL and taking it again. */
enum { RELEASE_GIL_BYTES = 1 << 14 };

static PyObject *
tuple_from_entry(const krul_store_entry *entry)
{
    return Py_BuildValue(
        "(iiiiiiiiiLLKKk)", (int)entry->kind, (int)entry->codec, (int)entry->kv, (int)entry->dtype,
        (int)entry->layer_lower, (int)entry->layer_upper, (int)entry->n_batch, (int)entry->n_heads,
        (int)entry->head_dim, (long long)entry->token_start, (long long)entry->n_tokens,
        (unsigned long long)entry->offset, (unsigned long long)entry->payload_bytes,
        (unsigned long)entry->payload_crc32c);
}

/* Fill *out from a tuple, without judging the numbers beyond what each field can hold. */
static int
read_tuple(PyObject *tuple, krul_store_entry *out)
{
    static const char *const names[N_ENTRY_FIELDS] = {
        "kind",          "codec",          "kv",       "dtype",       "layer_lower", "layer_upper",
        "n_batch",       "n_heads",        "head_dim", "token_start", "n_tokens",    "offset",
        "payload_bytes", "payload_crc32c",
    };
    enum { FIRST_WIDE = 9, CRC32C = 13 };
    int64_t values[N_ENTRY_FIELDS];
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != N_ENTRY_FIELDS) {
        PyErr_Format(PyExc_TypeError, "entry must be a tuple of %d integers, not %R",
                     N_ENTRY_FIELDS, tuple);
        return -1;
    }
    for (int i = 0; i < N_ENTRY_FIELDS; i++) {
        int64_t low = i >= FIRST_WIDE ? 0 : INT32_MIN;
        int64_t high = i == CRC32C ? UINT32_MAX : i >= FIRST_WIDE ? INT64_MAX : INT32_MAX;
        int overflows = 0;
        values[i] = PyLong_AsLongLongAndOverflow(PyTuple_GET_ITEM(tuple, i), &overflows);
        if (values[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
        if (overflows != 0 || values[i] < low || values[i] > high) {
            PyErr_Format(PyExc_ValueError, "entry: %s is %R but must be from %lld to %lld",
                         names[i], PyTuple_GET_ITEM(tuple, i), (long long)low, (long long)high);
            return -1;
        }
    }
    *out = (krul_store_entry){
        .kind = (krul_store_entry_kind)values[0],
        .codec = (krul_codec)values[1],
        .kv = (krul_kv)values[2],
        .dtype = (krul_dtype)values[3],
        .layer_lower = (int32_t)values[4],
        .layer_upper = (int32_t)values[5],
        .n_batch = (int32_t)values[6],
        .n_heads = (int32_t)values[7],
        .head_dim = (int32_t)values[8],
        .token_start = values[9],
        .n_tokens = values[10],
        .offset = (uint64_t)values[11],
        .payload_bytes = (uint64_t)values[12],
        .payload_crc32c = (uint32_t)values[13],
    };
    return 0;
}

int
py_krul_entry_from_tuple(PyObject *tuple, krul_store_entry *out)
{
    krul_store_entry entry;
    krul_error err;
    if (read_tuple(tuple, &entry) != 0) {
        return -1;
    }
    if (krul_store_check_entry(&entry, &err) != KRUL_STATUS_OK) {
        PyErr_SetString(PyExc_ValueError, err.message);
        return -1;
    }
    *out = entry;
    return 0;
}

/* (kind, version, file_bytes, [entry, ...]); closes the head. */
static PyObject *
tuple_from_head(krul_store_head *head)
{
    PyObject *result = NULL;
    PyObject *entries = PyList_New(head->n_entries);
    for (Py_ssize_t i = 0; entries != NULL && i < head->n_entries; i++) {
        PyObject *entry = tuple_from_entry(&head->entries[i]);
        if (entry == NULL) {
            Py_CLEAR(entries);
            break;
        }
        PyList_SET_ITEM(entries, i, entry);
    }
    if (entries != NULL) {
        result = Py_BuildValue("(ikKN)", (int)head->kind, (unsigned long)head->version,
                               (unsigned long long)head->file_bytes, entries);
    }
    krul_store_head_close(head);
    return result;
}

PyDoc_STRVAR(crc32c_doc,
             "crc32c($module, buffer, crc=0, /)\n--\n\n"
             "CRC-32C of the bytes of a buffer, continued from ``crc``.");

static PyObject *
crc32c(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer buffer;
    PyObject *crc_in = NULL;
    uint32_t crc = 0;
    if (!PyArg_ParseTuple(args, "y*|O!:crc32c", &buffer, &PyLong_Type, &crc_in)) {
        return NULL;
    }
    if (crc_in != NULL) {
        int overflows = 0;
        long long value = PyLong_AsLongLongAndOverflow(crc_in, &overflows);
        if (overflows != 0 || value < 0 || value > UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "crc is %R but must be from 0 to %llu", crc_in,
                         (unsigned long long)UINT32_MAX);
            PyBuffer_Release(&buffer);
            return NULL;
        }
        crc = (uint32_t)value;
    }
    if (buffer.len < RELEASE_GIL_BYTES) {
        crc = krul_store_crc32c(crc, buffer.buf, (size_t)buffer.len);
    }
    else {
        Py_BEGIN_ALLOW_THREADS
        crc = krul_store_crc32c(crc, buffer.buf, (size_t)buffer.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer);
    return PyLong_FromUnsignedLong(crc);
}

PyDoc_STRVAR(store_write_doc,
             "store_write($module, directory_fd, name, kind, entries, payloads, /)\n--\n\n"
             "Write a container so that ``name`` holds the old content or all of the new.\n\n"
             "``entries`` are tuples of 14 integers whose last three (offset, payload_bytes,\n"
             "payload_crc32c) are ignored; ``payloads`` are contiguous buffers. Returns the size of\n"
             "the file in bytes. Raises ValueError for what the format does not allow,\n"
             "krul.StoreFullError, OSError. The GIL is released.");

static PyObject *
store_write(PyObject *module, PyObject *args)
{
    int directory_fd, kind;
    const char *name;
    PyObject *entries_in, *payloads_in;
    if (!PyArg_ParseTuple(args, "isiOO:store_write", &directory_fd, &name, &kind, &entries_in,
                          &payloads_in)) {
        return NULL;
    }
    PyObject *result = NULL;
    krul_store_entry *entries = NULL;
    const uint8_t **payloads = NULL;
    Py_buffer *buffers = NULL;
    Py_ssize_t n_buffers = 0;
    PyObject *entry_tuple = PySequence_Tuple(entries_in);
    PyObject *payload_tuple = entry_tuple == NULL ? NULL : PySequence_Tuple(payloads_in);
    if (payload_tuple == NULL) {
        goto done;
    }
    Py_ssize_t n_entries = PyTuple_GET_SIZE(entry_tuple);
    if (PyTuple_GET_SIZE(payload_tuple) != n_entries || n_entries > KRUL_STORE_MAX_ENTRIES) {
        PyErr_Format(PyExc_ValueError,
                     "entries has %zd items and payloads %zd: must be equal and at most %d",
                     n_entries, PyTuple_GET_SIZE(payload_tuple), KRUL_STORE_MAX_ENTRIES);
        goto done;
    }
    entries = PyMem_Calloc((size_t)n_entries + 1, sizeof *entries);
    payloads = PyMem_Calloc((size_t)n_entries + 1, sizeof *payloads);
    buffers = PyMem_Calloc((size_t)n_entries + 1, sizeof *buffers);
    if (entries == NULL || payloads == NULL || buffers == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (; n_buffers < n_entries; n_buffers++) {
        Py_buffer *buffer = &buffers[n_buffers];
        if (read_tuple(PyTuple_GET_ITEM(entry_tuple, n_buffers), &entries[n_buffers]) != 0 ||
            PyObject_GetBuffer(PyTuple_GET_ITEM(payload_tuple, n_buffers), buffer, PyBUF_SIMPLE) !=
                0) {
            goto done;
        }
        payloads[n_buffers] = buffer->buf;
        entries[n_buffers].payload_bytes = (uint64_t)buffer->len;
    }
    uint64_t file_bytes = 0;
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_store_write(directory_fd, name, (krul_store_kind)kind, entries, payloads,
                              (int32_t)n_entries, &file_bytes, &err);
    Py_END_ALLOW_THREADS
    result = status == KRUL_STATUS_OK ? PyLong_FromUnsignedLongLong(file_bytes)
                                      : py_krul_raise(py_krul_state_of(module), &err);
done:
    for (Py_ssize_t i = 0; i < n_buffers; i++) {
        PyBuffer_Release(&buffers[i]);
    }
    PyMem_Free(buffers);
    PyMem_Free(payloads);
    PyMem_Free(entries);
    Py_XDECREF(payload_tuple);
    Py_XDECREF(entry_tuple);
    return result;
}

PyDoc_STRVAR(store_read_head_doc,
             "store_read_head($module, fd, /)\n--\n\n"
             "Read and check the head of an open container.\n\n"
             "Returns ``(kind, version, file_bytes, entries)``. Raises krul.FormatError,\n"
             "krul.CorruptionError, OSError. The GIL is released.");

static PyObject *
store_read_head(PyObject *module, PyObject *args)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i:store_read_head", &fd)) {
        return NULL;
    }
    krul_store_head head;
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_store_read_head(fd, &head, &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(py_krul_state_of(module), &err);
    }
    return tuple_from_head(&head);
}

PyDoc_STRVAR(store_parse_doc,
             "store_parse($module, buffer, file_bytes=None, /)\n--\n\n"
             "Check the head of a container in memory; the same result as store_read_head.\n\n"
             "``file_bytes`` is the size of the whole file, None for that of the buffer.");

static PyObject *
store_parse(PyObject *module, PyObject *args)
{
    Py_buffer buffer;
    PyObject *file_bytes_in = Py_None;
    if (!PyArg_ParseTuple(args, "y*|O:store_parse", &buffer, &file_bytes_in)) {
        return NULL;
    }
    krul_store_head head;
    krul_error err;
    krul_status status = KRUL_STATUS_OK;
    unsigned long long file_bytes = (unsigned long long)buffer.len;
    if (file_bytes_in != Py_None) {
        file_bytes = PyLong_AsUnsignedLongLong(file_bytes_in);
    }
    if (!PyErr_Occurred()) {
        status = krul_store_parse(buffer.buf, (size_t)buffer.len, file_bytes, &head, &err);
    }
    PyBuffer_Release(&buffer);
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (status != KRUL_STATUS_OK) {
        return py_krul_raise(py_krul_state_of(module), &err);
    }
    return tuple_from_head(&head);
}

PyDoc_STRVAR(store_read_payload_doc,
             "store_read_payload($module, fd, entry, /)\n--\n\n"
             "Read one payload as bytes and check its CRC-32C.\n\n"
             "Raises krul.CorruptionError, ValueError, OSError. The GIL is released.");

static PyObject *
store_read_payload(PyObject *module, PyObject *args)
{
    int fd;
    PyObject *tuple;
    krul_store_entry entry;
    if (!PyArg_ParseTuple(args, "iO:store_read_payload", &fd, &tuple) ||
        py_krul_entry_from_tuple(tuple, &entry) != 0) {
        return NULL;
    }
    if (entry.payload_bytes > (uint64_t)PY_SSIZE_T_MAX) {
        return PyErr_NoMemory();
    }
    PyObject *payload = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)entry.payload_bytes);
    if (payload == NULL) {
        return NULL;
    }
    /* Nobody else has seen this object yet. */
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(payload);
    krul_error err;
    krul_status status;
    Py_BEGIN_ALLOW_THREADS
    status = krul_store_read_payload(fd, &entry, out, &err);
    Py_END_ALLOW_THREADS
    if (status != KRUL_STATUS_OK) {
        Py_DECREF(payload);
        return py_krul_raise(py_krul_state_of(module), &err);
    }
    return payload;
}

PyDoc_STRVAR(store_constants_doc,
             "store_constants($module, /)\n--\n\n"
             "The numbers of the format by name, without their KRUL_STORE_ prefix.");

static PyObject *
store_constants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return Py_BuildValue(
        "{si si si si si si si si si si si si si si si si si si}", "VERSION", KRUL_STORE_VERSION,
        "HEADER_BYTES", KRUL_STORE_HEADER_BYTES, "ENTRY_BYTES", KRUL_STORE_ENTRY_BYTES, "ALIGNMENT",
        KRUL_STORE_ALIGNMENT, "MAX_ENTRIES", KRUL_STORE_MAX_ENTRIES, "MAX_LAYERS",
        KRUL_STORE_MAX_LAYERS, "MAX_EXTENT", KRUL_STORE_MAX_EXTENT, "MAX_TOKENS",
        KRUL_STORE_MAX_TOKENS, "MAX_BLOCK_BYTES", KRUL_STORE_MAX_BLOCK_BYTES, "MAX_META_BYTES",
        KRUL_STORE_MAX_META_BYTES, "MANIFEST", KRUL_STORE_MANIFEST, "SEGMENT", KRUL_STORE_SEGMENT,
        "ENTRY_BLOCK", KRUL_STORE_ENTRY_BLOCK, "ENTRY_META", KRUL_STORE_ENTRY_META, "ENTRY_TOKENS",
        KRUL_STORE_ENTRY_TOKENS, "ENTRY_MASK", KRUL_STORE_ENTRY_MASK, "ENTRY_POSITIONS",
        KRUL_STORE_ENTRY_POSITIONS, "ENTRY_BEHAVIOUR", KRUL_STORE_ENTRY_BEHAVIOUR);
}

PyMethodDef py_store_methods[] = {
    {"crc32c", crc32c, METH_VARARGS, crc32c_doc},
    {"store_write", store_write, METH_VARARGS, store_write_doc},
    {"store_read_head", store_read_head, METH_VARARGS, store_read_head_doc},
    {"store_parse", store_parse, METH_VARARGS, store_parse_doc},
    {"store_read_payload", store_read_payload, METH_VARARGS, store_read_payload_doc},
    {"store_constants", store_constants, METH_NOARGS, store_constants_doc},
    {NULL, NULL, 0, NULL},
};

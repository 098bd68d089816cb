/* py_memory.c - krul._core.Memory: a restored history's memory, used again by the next.
 *
 * Fresh memory costs a page fault for every page that is written, which together take as long as
 * decoding a history into them. So the memory that was let go last is kept for whoever asks next, as
 * far as the system does not want it back: MADV_FREE leaves that to the kernel. Huge pages where
 * there are any. */
#include "py_krul.h"

#include <sys/mman.h>

/* A huge page of the common processors; where it begins matters to the kernel. */
static const size_t alignment_bytes = (size_t)2 << 20;

typedef struct py_memory {
    PyObject_HEAD
    py_krul_mapping mapping;
    Py_ssize_t n_bytes;
} py_memory;

static uint8_t *
start_of(const py_krul_mapping *mapping)
{
    uintptr_t start = (uintptr_t)mapping->base;
    return (uint8_t *)((start + alignment_bytes - 1) / alignment_bytes * alignment_bytes);
}

void
py_krul_unmap(py_krul_mapping *mapping)
{
    if (mapping->base != NULL) {
        (void)munmap(mapping->base, mapping->n_bytes);
    }
    mapping->base = NULL;
    mapping->n_bytes = 0;
}

/* Take the spare mapping where it is large enough and not much too large, else a new one. */
static bool
take_mapping(py_krul_state *state, size_t n_bytes, py_krul_mapping *out)
{
    size_t wanted_bytes = n_bytes + alignment_bytes;
    py_krul_mapping *spare = &state->spare;
    if (spare->base != NULL && spare->n_bytes >= wanted_bytes &&
        spare->n_bytes / 2 <= wanted_bytes) {
        *out = *spare;
        memset(spare, 0, sizeof *spare);
        return true;
    }
    void *base = mmap(NULL, wanted_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                      0);
    if (base == MAP_FAILED) {
        return false;
    }
    out->base = base;
    out->n_bytes = wanted_bytes;
    /* Advice: a kernel without huge pages says EINVAL, and that is fine. */
    (void)madvise(base, wanted_bytes, MADV_HUGEPAGE);
    return true;
}

static PyObject *
memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_bytes", NULL};
    Py_ssize_t n_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n:Memory", names, &n_bytes)) {
        return NULL;
    }
    if (n_bytes < 0 || n_bytes > PY_SSIZE_T_MAX / 2) {
        return PyErr_Format(PyExc_ValueError, "n_bytes is %zd but must be from 0 to %zd", n_bytes,
                            PY_SSIZE_T_MAX / 2);
    }
    py_memory *self = (py_memory *)type->tp_alloc(type, 0);
    if (self != NULL &&
        !take_mapping(PyType_GetModuleState(type), (size_t)n_bytes, &self->mapping)) {
        Py_DECREF(self);
        return PyErr_Format(PyExc_MemoryError, "no memory for %zd bytes", n_bytes);
    }
    if (self != NULL) {
        self->n_bytes = n_bytes;
    }
    return (PyObject *)self;
}

static void
memory_dealloc(PyObject *object)
{
    py_memory *self = (py_memory *)object;
    PyTypeObject *type = Py_TYPE(object);
    py_krul_state *state = PyType_GetModuleState(type);
    if (self->mapping.base != NULL) {
        py_krul_unmap(&state->spare);
        state->spare = self->mapping;
#ifdef MADV_FREE
        (void)madvise(state->spare.base, state->spare.n_bytes, MADV_FREE);
#endif
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static int
memory_get_buffer(PyObject *object, Py_buffer *buffer, int flags)
{
    py_memory *self = (py_memory *)object;
    return PyBuffer_FillInfo(buffer, object, start_of(&self->mapping), self->n_bytes, 0, flags);
}

PyDoc_STRVAR(memory_doc,
             "Memory(n_bytes)\n--\n\n"
             "Memory to be written from one end to the other, by the buffer protocol.\n\n"
             "What it holds at first is anything. Raises MemoryError where there is not so much.");

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, (void *)memory_doc},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_bf_getbuffer, memory_get_buffer},
    {0, NULL},
};

PyType_Spec py_memory_spec = {
    .name = "krul._core.Memory",
    .basicsize = sizeof(py_memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};

/* py_fingerprint.c - samples of a model's weights, which lie far apart.
 *
 * Each sample is in a page of its own, so that reading them one after the other waits for memory every
 * time: those of the next tensor are asked for while one is copied. */
#include "py_krul.h"

#include <string.h>

/* Four 64-bit integers in this order. */
typedef struct sample_place {
    int64_t address;
    int64_t step_bytes;
    int64_t n_samples;
    int64_t item_bytes;
} sample_place;

static const int64_t MAX_ITEM_BYTES = 16;

static bool
is_sound(const sample_place *place)
{
    return place->n_samples >= 0 && place->item_bytes > 0 && place->item_bytes <= MAX_ITEM_BYTES &&
           place->step_bytes >= 0 && (place->address != 0 || place->n_samples == 0) &&
           (place->n_samples == 0 || place->step_bytes <= INT64_MAX / place->n_samples);
}

static void
ask_for(const sample_place *place)
{
    const uint8_t *at = (const uint8_t *)(uintptr_t)place->address;
    for (int64_t i = 0; i < place->n_samples; i++) {
        __builtin_prefetch(at + i * place->step_bytes);
    }
}

static void
copy_all(const sample_place *places, Py_ssize_t n_places, uint8_t *out)
{
    for (Py_ssize_t i = 0; i < n_places; i++) {
        const sample_place *place = &places[i];
        if (i + 1 < n_places) {
            ask_for(&places[i + 1]);
        }
        const uint8_t *at = (const uint8_t *)(uintptr_t)place->address;
        for (int64_t k = 0; k < place->n_samples; k++, out += place->item_bytes) {
            memcpy(out, at + k * place->step_bytes, (size_t)place->item_bytes);
        }
    }
}

PyDoc_STRVAR(samples_doc,
             "samples($module, places, /)\n--\n\n"
             "Numbers from memory, one after the other as bytes. ``places`` is a buffer of 64-bit\n"
             "integers, four for each tensor: the address of its first number, bytes from sample to\n"
             "sample, how many, and the bytes of one. The caller keeps the memory alive and knows\n"
             "that all samples are within it.");

static PyObject *
samples(PyObject *Py_UNUSED(module), PyObject *object)
{
    Py_buffer buffer;
    PyObject *result = NULL;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) != 0) {
        return NULL;
    }
    const sample_place *places = buffer.buf;
    Py_ssize_t n_places = buffer.len / (Py_ssize_t)sizeof *places;
    Py_ssize_t n_bytes = 0;
    /* What is empty may be anywhere. */
    bool is_whole = buffer.len == 0 || (buffer.len % (Py_ssize_t)sizeof *places == 0 &&
                                        (uintptr_t)buffer.buf % sizeof(int64_t) == 0);
    for (Py_ssize_t i = 0; i < n_places && is_whole; i++) {
        is_whole = is_sound(&places[i]) &&
                   places[i].n_samples <= (PY_SSIZE_T_MAX - n_bytes) / places[i].item_bytes;
        if (is_whole) {
            n_bytes += (Py_ssize_t)(places[i].n_samples * places[i].item_bytes);
        }
    }
    if (!is_whole) {
        PyErr_Format(PyExc_ValueError,
                     "places has %zd bytes, but must be (address, step, samples, bytes of one) of "
                     "each tensor, as 64-bit integers that memory can hold",
                     buffer.len);
        goto done;
    }
    result = PyBytes_FromStringAndSize(NULL, n_bytes);
    if (result == NULL) {
        goto done;
    }
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(result);
    Py_BEGIN_ALLOW_THREADS
    copy_all(places, n_places, out);
    Py_END_ALLOW_THREADS
done:
    PyBuffer_Release(&buffer);
    return result;
}

PyMethodDef py_fingerprint_methods[] = {
    {"samples", samples, METH_O, samples_doc},
    {NULL, NULL, 0, NULL},
};

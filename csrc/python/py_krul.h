/* py_krul.h - what the binding files share: Python and NumPy set-up, module state, borrowed arrays.
 *
 * Every binding has three parts, in this order: with the GIL, borrow inputs and make outputs;
 * without it, call the library on C memory only; with it, raise or return. */
#ifndef PY_KRUL_H
#define PY_KRUL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_24_API_VERSION
#define NPY_TARGET_VERSION NPY_1_24_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL krul_ARRAY_API
#ifndef PY_KRUL_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../krul.h"

/* Memory of the system's, whole pages. */
typedef struct py_krul_mapping {
    void *base; /* NULL: none */
    size_t n_bytes;
} py_krul_mapping;

/* One per module; all but the spare is immutable once the module has been executed. */
typedef struct py_krul_state {
    const krul_backend *backend; /* chosen in module exec */
    PyObject *errors; /* the module krul.errors */
    PyTypeObject *restore_type;
    PyTypeObject *observer_type;
    PyTypeObject *predict_type;
    PyTypeObject *memory_type;
    py_krul_mapping spare; /* what the last krul._core.Memory has let go; with the GIL */
    krul_device_pool *devices; /* NULL until device_register */
} py_krul_state;

/* The state of the module that `module` is; for methods of types use py_krul_state_of_type. */
py_krul_state *py_krul_state_of(PyObject *module);

/* Set the exception that stands for err->status, with its message; returns NULL. */
PyObject *py_krul_raise(py_krul_state *state, const krul_error *err);

/* The backend of that name (a str or None for the module's own choice); NULL with an exception. */
const krul_backend *py_krul_backend(py_krul_state *state, PyObject *name);

/* An array borrowed from Python. */
typedef struct py_krul_borrowed {
    krul_view view; /* the array's dimensions last, ones before them */
    int n_dims; /* of the array itself */
    PyObject *capsule; /* owned, or NULL */
    Py_buffer buffer; /* in use when buffer.obj is not NULL */
} py_krul_borrowed;

/* Which arrays may be borrowed. */
typedef enum py_krul_access {
    PY_KRUL_INPUT = 0,
    PY_KRUL_OUTPUT = 1,
    PY_KRUL_OUTPUT_ANYWHERE = 2, /* on a CUDA device, too: the caller orders what it does there */
    PY_KRUL_INPUT_ANYWHERE = 3,
} py_krul_access;

/* Borrow an array of float32, float16 or bfloat16 with at most four dimensions, by DLPack or else by
 * the buffer protocol. Foreign code may run. `name` is the argument's name in messages. Returns 0,
 * or -1 with an exception; *out is zeroed first, so that releasing it is always right. */
int py_krul_borrow(py_krul_state *state, PyObject *object, const char *name, py_krul_access access,
                   py_krul_borrowed *out);

/* Give it back; with the GIL. A zeroed one is allowed, and it is zeroed again. */
void py_krul_release(py_krul_borrowed *borrowed);

/* [(device number, address of an event or stream), ...]; *out is to be freed with PyMem_Free. Returns 0,
 * or -1 with an exception. */
int py_krul_events(PyObject *object, krul_device_event **out, int32_t *n_events);

/* A store entry from the tuple of 14 integers that store_read_head gives, in the order of
 * krul_store_entry's fields. Returns 0, or -1 with a TypeError or ValueError. */
int py_krul_entry_from_tuple(PyObject *tuple, krul_store_entry *out);

/* The open library in a capsule of blas_open; NULL with an exception. */
const krul_blas *py_krul_blas(PyObject *capsule);

/* What a krul._core.Predict holds; NULL with a TypeError for any other object. */
krul_predict *py_krul_predict(py_krul_state *state, PyObject *object);

/* Method tables, one per concept, ended by a zero entry. */
extern PyMethodDef py_blas_methods[];
extern PyMethodDef py_entropy_methods[];
extern PyMethodDef py_estimator_methods[];
extern PyMethodDef py_fingerprint_methods[];
extern PyMethodDef py_selector_methods[];
extern PyMethodDef py_compressor_methods[];
extern PyMethodDef py_store_methods[];
extern PyMethodDef py_restore_plan_methods[];

/* What krul._cuda hands over is in a capsule of this name. */
#define PY_KRUL_TABLE_NAME "krul._cuda.table"

/* Types that module exec makes. */
extern PyType_Spec py_restore_spec;
extern PyType_Spec py_observer_spec;
extern PyType_Spec py_predict_spec;
extern PyType_Spec py_memory_spec;

/* Give it back to the system. */
void py_krul_unmap(py_krul_mapping *mapping);

#endif /* PY_KRUL_H */

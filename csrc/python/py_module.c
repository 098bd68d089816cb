/* py_module.c - krul._core: slots, state, and the backends. */
#define PY_KRUL_IMPORTS_NUMPY
#include "py_krul.h"

#include <stdlib.h>

py_krul_state *
py_krul_state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

const krul_backend *
py_krul_backend(py_krul_state *state, PyObject *name)
{
    if (name == NULL || name == Py_None) {
        return state->backend;
    }
    const char *text = PyUnicode_AsUTF8(name);
    const krul_backend *backend = NULL;
    krul_error err;
    if (text != NULL && krul_backend_find(text, &backend, &err) != KRUL_STATUS_OK) {
        py_krul_raise(state, &err);
        return NULL;
    }
    return backend;
}

PyDoc_STRVAR(backends_doc, "backends($module, /)\n--\n\n"
                           "(name, can it run here, was it chosen) of each, best first.");

static PyObject *
backends(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        PyObject *item = Py_BuildValue(
            "(sNN)", krul_backend_name(backend), PyBool_FromLong(krul_backend_is_usable(backend)),
            PyBool_FromLong(backend == py_krul_state_of(module)->backend));
        if (item == NULL || PyList_Append(list, item) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

PyDoc_STRVAR(n_processors_doc, "n_processors($module, /)\n--\n\n"
                               "Processors that this process may run on.");

static PyObject *
n_processors(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(krul_pool_n_processors());
}

PyDoc_STRVAR(device_register_doc,
             "device_register($module, table, /)\n--\n\n"
             "Take the table of devices out of a capsule, once.");

static PyObject *
device_register(PyObject *module, PyObject *capsule)
{
    py_krul_state *state = py_krul_state_of(module);
    const krul_device_ops *ops = PyCapsule_GetPointer(capsule, PY_KRUL_TABLE_NAME);
    krul_error err;
    if (ops == NULL) {
        return NULL;
    }
    if (state->devices != NULL) {
        PyErr_SetString(PyExc_ImportError, "a table of devices is there already");
        return NULL;
    }
    if (krul_device_pool_new(ops, NULL, &state->devices, &err) != KRUL_STATUS_OK) {
        PyErr_SetString(PyExc_ImportError, err.message);
        return NULL;
    }
    Py_RETURN_NONE;
}

int
py_krul_events(PyObject *object, krul_device_event **out, int32_t *n_events)
{
    PyObject *items = PySequence_Tuple(object);
    int result = -1;
    if (items == NULL) {
        return -1;
    }
    Py_ssize_t n_items = PyTuple_GET_SIZE(items);
    krul_device_event *found = PyMem_Calloc((size_t)n_items + 1, sizeof *found);
    if (found == NULL || n_items > INT32_MAX) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n_items; i++) {
        PyObject *address;
        int device_id;
        PyObject *item = PyTuple_GET_ITEM(items, i);
        if (!PyTuple_Check(item)) {
            PyErr_Format(PyExc_TypeError, "an item is a %s but must be a tuple (device, address)",
                         Py_TYPE(item)->tp_name);
            goto done;
        }
        if (!PyArg_ParseTuple(item, "iO;an item is (device, address)", &device_id, &address)) {
            goto done;
        }
        found[i].device_id = device_id;
        found[i].event = PyLong_AsVoidPtr(address);
        if (PyErr_Occurred()) {
            goto done;
        }
    }
    *out = found;
    *n_events = (int32_t)n_items;
    found = NULL;
    result = 0;
done:
    PyMem_Free(found);
    Py_DECREF(items);
    return result;
}

static PyMethodDef module_methods[] = {
    {"backends", backends, METH_NOARGS, backends_doc},
    {"device_register", device_register, METH_O, device_register_doc},
    {"n_processors", n_processors, METH_NOARGS, n_processors_doc},
    {NULL, NULL, 0, NULL},
};

/* Once per process: NumPy does not live in several interpreters, so neither does this. */
static int
module_exec(PyObject *module)
{
    py_krul_state *state = py_krul_state_of(module);
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    state->errors = PyImport_ImportModule("krul.errors");
    if (state->errors == NULL) {
        return -1;
    }
    krul_error err;
    /* For tests: chooses among tables that give the same results. */
    if (krul_backend_find(getenv("KRUL_CPU_BACKEND"), &state->backend, &err) != KRUL_STATUS_OK) {
        py_krul_raise(state, &err);
        return -1;
    }
    PyMethodDef *tables[] = {
        module_methods,          py_estimator_methods,  py_selector_methods,
        py_entropy_methods,      py_compressor_methods, py_store_methods,
        py_restore_plan_methods, py_blas_methods,       py_fingerprint_methods};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        if (PyModule_AddFunctions(module, tables[i]) != 0) {
            return -1;
        }
    }
    state->restore_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_restore_spec, NULL);
    if (state->restore_type == NULL || PyModule_AddType(module, state->restore_type) != 0) {
        return -1;
    }
    state->observer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_observer_spec,
                                                                    NULL);
    if (state->observer_type == NULL || PyModule_AddType(module, state->observer_type) != 0) {
        return -1;
    }
    state->predict_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_predict_spec, NULL);
    if (state->predict_type == NULL || PyModule_AddType(module, state->predict_type) != 0) {
        return -1;
    }
    state->memory_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_memory_spec, NULL);
    return state->memory_type == NULL ? -1 : PyModule_AddType(module, state->memory_type);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    py_krul_state *state = py_krul_state_of(module);
    Py_VISIT(state->errors);
    Py_VISIT(state->restore_type);
    Py_VISIT(state->observer_type);
    Py_VISIT(state->predict_type);
    Py_VISIT(state->memory_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    py_krul_state *state = py_krul_state_of(module);
    Py_CLEAR(state->errors);
    Py_CLEAR(state->restore_type);
    Py_CLEAR(state->observer_type);
    Py_CLEAR(state->predict_type);
    Py_CLEAR(state->memory_type);
    return 0;
}

static void
module_free(void *module)
{
    py_krul_unmap(&py_krul_state_of(module)->spare);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static PyModuleDef module_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "krul._core",
    .m_doc = "The C library of krul, as Python sees it; the modules of krul wrap it.",
    .m_size = sizeof(py_krul_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&module_definition);
}

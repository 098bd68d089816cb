/* py_cuda.c - krul._cuda: says whether there is a driver, and hands its table over in a capsule.
 *
 * The CUDA runtime is in this module and needs no library; the driver's library it opens itself, when
 * it is first used. Devices are not counted here: a process that was forked after CUDA was used
 * cannot use it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>

#include "../device.h"

/* The same as PY_KRUL_TABLE_NAME; this module knows nothing of NumPy. */
#define TABLE_NAME "krul._cuda.table"

/* In cuda/device.cu. */
extern const krul_device_ops *krul_cuda_ops(void);

static int
module_exec(PyObject *module)
{
    if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == NULL) {
        const char *reason = dlerror();
        PyErr_Format(PyExc_ImportError, "there is no NVIDIA driver: %s",
                     reason != NULL ? reason : "libcuda.so.1 cannot be opened");
        return -1;
    }
    PyObject *table = PyCapsule_New((void *)krul_cuda_ops(), TABLE_NAME, NULL);
    int result = table == NULL ? -1 : PyModule_AddObjectRef(module, "table", table);
    Py_XDECREF(table);
    return result;
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
    .m_name = "krul._cuda",
    .m_doc = "The way to NVIDIA GPUs, for krul._core; not there without a driver.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC
PyInit__cuda(void)
{
    return PyModuleDef_Init(&module_definition);
}

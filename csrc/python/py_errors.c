/* py_errors.c - a krul_error becomes the exception that stands for its status. */
#include "py_krul.h"

/* The class in krul.errors for a status, or NULL for one that is a built-in class. */
static const char *
class_name_of(krul_status status)
{
    switch (status) {
        case KRUL_STATUS_BAD_SHAPE:
            return "ShapeError";
        case KRUL_STATUS_BAD_DTYPE:
            return "DTypeError";
        case KRUL_STATUS_BAD_FORMAT:
            return "FormatError";
        case KRUL_STATUS_CORRUPT:
            return "CorruptionError";
        case KRUL_STATUS_STORE_FULL:
            return "StoreFullError";
        case KRUL_STATUS_DEVICE:
            return "DeviceError";
        default:
            return NULL;
    }
}

static PyObject *
builtin_class_of(krul_status status)
{
    switch (status) {
        case KRUL_STATUS_NO_MEMORY:
            return PyExc_MemoryError;
        case KRUL_STATUS_BAD_VALUE:
            return PyExc_ValueError;
        case KRUL_STATUS_IO:
            return PyExc_OSError;
        case KRUL_STATUS_UNSUPPORTED:
            return PyExc_NotImplementedError;
        case KRUL_STATUS_CANCELLED:
            return PyExc_InterruptedError;
        default:
            return PyExc_SystemError;
    }
}

PyObject *
py_krul_raise(py_krul_state *state, const krul_error *err)
{
    const char *class_name = class_name_of(err->status);
    PyObject *type = NULL;
    if (class_name != NULL) {
        type = PyObject_GetAttrString(state->errors, class_name);
        if (type == NULL) {
            return NULL;
        }
    }
    else {
        type = Py_NewRef(builtin_class_of(err->status));
    }
    /* Messages may quote file names: bytes that are not UTF-8 are replaced, not refused. */
    PyObject *message = PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message),
                                             "replace");
    bool has_errno = err->code != 0 &&
                     (err->status == KRUL_STATUS_IO || err->status == KRUL_STATUS_STORE_FULL);
    PyObject *exception = NULL;
    if (message != NULL) {
        /* OSError(errno, text) picks FileNotFoundError and its like by itself. */
        exception = has_errno ? PyObject_CallFunction(type, "iO", err->code, message)
                              : PyObject_CallOneArg(type, message);
    }
    if (exception != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    }
    Py_XDECREF(exception);
    Py_XDECREF(message);
    Py_DECREF(type);
    return NULL;
}

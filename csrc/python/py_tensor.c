/* py_tensor.c - arrays in, by DLPack or by the buffer protocol; never copied, never owned. */
#include "dlpack_abi.h"
#include "py_krul.h"

/* Find the tensor in a capsule of either version; NULL with an exception. */
static const dlpack_tensor *
tensor_in_capsule(PyObject *capsule, const char *name, bool *is_read_only)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dlpack_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (managed->major > DLPACK_MAJOR_VERSION) {
            PyErr_Format(PyExc_BufferError, "%s speaks DLPack %u but krul knows %d", name,
                         managed->major, DLPACK_MAJOR_VERSION);
            return NULL;
        }
        *is_read_only = (managed->flags & DLPACK_FLAG_READ_ONLY) != 0;
        return &managed->tensor;
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        dlpack_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        *is_read_only = false;
        return &managed->tensor;
    }
    PyErr_Format(PyExc_TypeError, "%s.__dlpack__() gave %R but must give an unused DLPack capsule",
                 name, capsule);
    return NULL;
}

/* The producer's capsule destructor frees the tensor as long as the capsule keeps its first name;
 * so krul keeps the capsule, does not rename it, and dropping the reference is the release. */
static PyObject *
ask_for_capsule(PyObject *object, bool is_on_cuda)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (method == NULL) {
        return NULL;
    }
    PyObject *capsule = NULL;
    PyObject *no_arguments = PyTuple_New(0);
    /* -1: the producer need not order anything, for that is done once for all arrays. */
    PyObject *keywords = is_on_cuda
                             ? Py_BuildValue("{s:(ii),s:i}", "max_version", DLPACK_MAJOR_VERSION, 0,
                                             "stream", -1)
                             : Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR_VERSION, 0);
    if (no_arguments != NULL && keywords != NULL) {
        capsule = PyObject_Call(method, no_arguments, keywords);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear(); /* a producer from before DLPack 1.0 */
            if (PyDict_DelItemString(keywords, "max_version") == 0) {
                capsule = PyObject_Call(method, no_arguments, keywords);
            }
        }
    }
    Py_XDECREF(keywords);
    Py_XDECREF(no_arguments);
    Py_DECREF(method);
    return capsule;
}

static bool
is_anywhere(py_krul_access access)
{
    return access == PY_KRUL_OUTPUT_ANYWHERE || access == PY_KRUL_INPUT_ANYWHERE;
}

static int
raise_error(py_krul_state *state, const krul_error *err)
{
    py_krul_raise(state, err);
    return -1;
}

/* Put n_dims dimensions last, ones before them. strides NULL means row-major. */
static int
set_shape(py_krul_state *state, const char *name, int n_dims, const int64_t *shape,
          const int64_t *strides, py_krul_borrowed *out)
{
    krul_error err;
    if (n_dims < 0 || n_dims > KRUL_VIEW_DIMS) {
        (void)krul_fail(&err, KRUL_STATUS_BAD_SHAPE,
                        "%s has %d dimensions but must have at most %d", name, n_dims,
                        KRUL_VIEW_DIMS);
        return raise_error(state, &err);
    }
    out->n_dims = n_dims;
    int64_t row_major = 1;
    for (int axis = KRUL_VIEW_DIMS - 1; axis >= 0; axis--) {
        int from = axis - (KRUL_VIEW_DIMS - n_dims);
        int64_t extent = from >= 0 ? shape[from] : 1;
        out->view.shape[axis] = extent;
        out->view.stride[axis] = from >= 0 && strides != NULL ? strides[from] : row_major;
        if (__builtin_mul_overflow(row_major, extent > 0 ? extent : 1, &row_major)) {
            (void)krul_fail(&err, KRUL_STATUS_BAD_SHAPE, "%s has more than 2^63 elements", name);
            return raise_error(state, &err);
        }
    }
    return 0;
}

/* Say which device an array is on, before it is asked for anything that it may refuse for that. */
static int
find_device(py_krul_state *state, PyObject *object, const char *name, py_krul_access access,
            int *device_type)
{
    int device_id = 0;
    *device_type = DLPACK_DEVICE_CPU;
    PyObject *told = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (told == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0; /* the capsule tells */
    }
    bool is_good = PyTuple_Check(told) && PyArg_ParseTuple(told, "ii", device_type, &device_id);
    Py_DECREF(told);
    if (!is_good) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "%s.__dlpack_device__() gave no tuple", name);
        }
        return -1;
    }
    bool is_here = *device_type == DLPACK_DEVICE_CPU || *device_type == DLPACK_DEVICE_CUDA_HOST;
    if (is_here || (*device_type == DLPACK_DEVICE_CUDA && is_anywhere(access))) {
        return 0;
    }
    krul_error err;
    (void)krul_fail(&err, KRUL_STATUS_DEVICE,
                    "%s is on DLPack device (%d, %d) but must be on (1, 0), the CPU", name,
                    *device_type, device_id);
    return raise_error(state, &err);
}

static int
borrow_dlpack(py_krul_state *state, PyObject *object, const char *name, py_krul_access access,
              py_krul_borrowed *out)
{
    krul_error err;
    int told_type;
    if (find_device(state, object, name, access, &told_type) != 0) {
        return -1;
    }
    out->capsule = ask_for_capsule(object, told_type == DLPACK_DEVICE_CUDA);
    if (out->capsule == NULL) {
        return -1;
    }
    bool is_read_only;
    const dlpack_tensor *tensor = tensor_in_capsule(out->capsule, name, &is_read_only);
    if (tensor == NULL) {
        return -1;
    }
    bool is_float = tensor->dtype_code == DLPACK_CODE_FLOAT && tensor->dtype_lanes == 1;
    bool is_bfloat = tensor->dtype_code == DLPACK_CODE_BFLOAT && tensor->dtype_lanes == 1;
    if (is_float && tensor->dtype_bits == 32) {
        out->view.dtype = KRUL_DTYPE_F32;
    }
    else if (is_float && tensor->dtype_bits == 16) {
        out->view.dtype = KRUL_DTYPE_F16;
    }
    else if (is_bfloat && tensor->dtype_bits == 16) {
        out->view.dtype = KRUL_DTYPE_BF16;
    }
    else {
        (void)krul_fail(&err, KRUL_STATUS_BAD_DTYPE,
                        "%s has DLPack type code %d, %d bits, %d lanes but must be float32, "
                        "float16 or bfloat16",
                        name, tensor->dtype_code, tensor->dtype_bits, tensor->dtype_lanes);
        return raise_error(state, &err);
    }
    if (tensor->device_type == DLPACK_DEVICE_CPU ||
        tensor->device_type == DLPACK_DEVICE_CUDA_HOST) {
        out->view.device_type = KRUL_DEVICE_CPU;
    }
    else if (tensor->device_type == DLPACK_DEVICE_CUDA && is_anywhere(access) &&
             told_type == DLPACK_DEVICE_CUDA) {
        out->view.device_type = KRUL_DEVICE_CUDA;
    }
    else {
        (void)krul_fail(&err, KRUL_STATUS_DEVICE,
                        "%s is on DLPack device type %d but must be on 1 (CPU)", name,
                        tensor->device_type);
        return raise_error(state, &err);
    }
    out->view.device_id = tensor->device_id;
    out->view.is_read_only = is_read_only;
    out->view.data = tensor->data == NULL ? NULL : (uint8_t *)tensor->data + tensor->byte_offset;
    return set_shape(state, name, tensor->n_dims, tensor->shape, tensor->strides, out);
}

static int
borrow_buffer(py_krul_state *state, const char *name, py_krul_borrowed *out)
{
    krul_error err;
    const Py_buffer *buffer = &out->buffer;
    const char *format = buffer->format != NULL ? buffer->format : "B";
    format += (format[0] == '@' || format[0] == '=' || format[0] == '<') ? 1 : 0;
    if (strcmp(format, "f") == 0 && buffer->itemsize == 4) {
        out->view.dtype = KRUL_DTYPE_F32;
    }
    else if (strcmp(format, "e") == 0 && buffer->itemsize == 2) {
        out->view.dtype = KRUL_DTYPE_F16;
    }
    else {
        (void)krul_fail(&err, KRUL_STATUS_BAD_DTYPE,
                        "%s has buffer format '%s' but must be float32 ('f') or float16 ('e')",
                        name, format);
        return raise_error(state, &err);
    }
    int64_t shape[KRUL_VIEW_DIMS];
    int64_t strides[KRUL_VIEW_DIMS];
    for (int axis = 0; axis < buffer->ndim && axis < KRUL_VIEW_DIMS; axis++) {
        if (buffer->strides[axis] % buffer->itemsize != 0) {
            (void)krul_fail(&err, KRUL_STATUS_BAD_SHAPE,
                            "%s has a stride of %lld bytes, no multiple of its %lld-byte elements",
                            name, (long long)buffer->strides[axis], (long long)buffer->itemsize);
            return raise_error(state, &err);
        }
        shape[axis] = buffer->shape[axis];
        strides[axis] = buffer->strides[axis] / buffer->itemsize;
    }
    out->view.device_type = KRUL_DEVICE_CPU;
    out->view.is_read_only = buffer->readonly != 0;
    out->view.data = buffer->buf;
    return set_shape(state, name, buffer->ndim, shape, strides, out);
}

int
py_krul_borrow(py_krul_state *state, PyObject *object, const char *name, py_krul_access access,
               py_krul_borrowed *out)
{
    memset(out, 0, sizeof *out);
    /* The buffer protocol first where it serves: NumPy refuses to export read-only arrays by DLPack
     * before version 2.1, and the protocol tells read-only from writable on every version. */
    bool has_dlpack = PyObject_HasAttrString(object, "__dlpack__") != 0;
    int result = -1;
    if (PyObject_CheckBuffer(object) &&
        (PyObject_GetBuffer(object, &out->buffer, PyBUF_STRIDES | PyBUF_FORMAT) == 0 ||
         !has_dlpack)) {
        result = out->buffer.obj != NULL ? borrow_buffer(state, name, out) : -1;
    }
    else if (has_dlpack) {
        PyErr_Clear(); /* of a buffer that could not be had: bfloat16 has no format letter */
        result = borrow_dlpack(state, object, name, access, out);
    }
    else {
        PyErr_Format(PyExc_TypeError,
                     "%s is %.200s but must be an array with __dlpack__ or the buffer protocol",
                     name, Py_TYPE(object)->tp_name);
    }
    if (result == 0) {
        krul_error err;
        bool is_output = access == PY_KRUL_OUTPUT || access == PY_KRUL_OUTPUT_ANYWHERE;
        krul_status status = is_output ? krul_view_check_output(&out->view, name, &err)
                                       : krul_view_check(&out->view, name, &err);
        if (status != KRUL_STATUS_OK) {
            result = raise_error(state, &err);
        }
    }
    if (result != 0) {
        py_krul_release(out);
    }
    return result;
}

void
py_krul_release(py_krul_borrowed *borrowed)
{
    /* Foreign destructors may run, and an exception may be on its way. */
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (borrowed->buffer.obj != NULL) {
        PyBuffer_Release(&borrowed->buffer);
    }
    Py_CLEAR(borrowed->capsule);
    memset(borrowed, 0, sizeof *borrowed);
    PyErr_Restore(type, value, traceback);
}

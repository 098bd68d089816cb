/* view.c - is this memory what it claims to be? Checked once, so that the kernels need not. */
#include "internal.h"

size_t
krul_dtype_bytes(krul_dtype dtype)
{
    switch (dtype) {
        case KRUL_DTYPE_F32:
            return 4;
        case KRUL_DTYPE_F16:
        case KRUL_DTYPE_BF16:
            return 2;
        default:
            return 0;
    }
}

const char *
krul_dtype_name(krul_dtype dtype)
{
    switch (dtype) {
        case KRUL_DTYPE_F32:
            return "float32";
        case KRUL_DTYPE_F16:
            return "float16";
        case KRUL_DTYPE_BF16:
            return "bfloat16";
        default:
            return "unknown";
    }
}

int64_t
krul_view_n_elements(const krul_view *view)
{
    int64_t n_elements = 1;
    for (int axis = 0; axis < KRUL_VIEW_DIMS; axis++) {
        n_elements *= view->shape[axis];
    }
    return n_elements;
}

/* Elements from the first to one past the last; 0 when the view is empty or does not fit. */
static bool
span_overflows(const krul_view *view, int64_t *n_elements_out)
{
    int64_t last = 0;
    int64_t n_elements = 1;
    for (int axis = 0; axis < KRUL_VIEW_DIMS; axis++) {
        int64_t step;
        if (krul_multiply_overflows_i64(n_elements, view->shape[axis], &n_elements)) {
            return true;
        }
        if (view->shape[axis] == 0) {
            *n_elements_out = 0;
            return false;
        }
        if (krul_multiply_overflows_i64(view->shape[axis] - 1, view->stride[axis], &step) ||
            krul_add_overflows_i64(last, step, &last)) {
            return true;
        }
    }
    int64_t n_bytes;
    *n_elements_out = last + 1;
    return last == INT64_MAX ||
           krul_multiply_overflows_i64(last + 1, (int64_t)krul_dtype_bytes(view->dtype), &n_bytes);
}

krul_status
krul_view_check(const krul_view *view, const char *name, krul_error *err)
{
    size_t element_bytes = krul_dtype_bytes(view->dtype);
    if (element_bytes == 0) {
        return krul_fail(err, KRUL_STATUS_BAD_DTYPE,
                         "%s has dtype number %d but must be float32, float16 or bfloat16", name,
                         (int)view->dtype);
    }
    if (view->device_type != KRUL_DEVICE_CPU && view->device_type != KRUL_DEVICE_CUDA) {
        return krul_fail(err, KRUL_STATUS_DEVICE, "%s is on device type %d but must be on 1 (CPU)",
                         name, (int)view->device_type);
    }
    for (int axis = 0; axis < KRUL_VIEW_DIMS; axis++) {
        if (view->shape[axis] < 0) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "%s has extent %lld along axis %d but must have 0 or more", name,
                             (long long)view->shape[axis], axis);
        }
        if (view->stride[axis] < 0) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "%s has stride %lld along axis %d but must have 0 or more", name,
                             (long long)view->stride[axis], axis);
        }
    }
    int64_t span;
    if (span_overflows(view, &span)) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%s of shape (%lld, %lld, %lld, %lld) spans more than 2^63 bytes", name,
                         (long long)view->shape[0], (long long)view->shape[1],
                         (long long)view->shape[2], (long long)view->shape[3]);
    }
    if (span == 0) {
        return KRUL_STATUS_OK;
    }
    if (view->shape[3] > 1 && view->stride[3] != 1) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%s has stride %lld along its last axis but must have 1", name,
                         (long long)view->stride[3]);
    }
    if (view->data == NULL) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "%s has %lld elements but no memory", name,
                         (long long)krul_view_n_elements(view));
    }
    if ((uintptr_t)view->data % element_bytes != 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "%s starts %d bytes off the alignment of its %d-byte elements", name,
                         (int)((uintptr_t)view->data % element_bytes), (int)element_bytes);
    }
    return KRUL_STATUS_OK;
}

/* Do two indices reach one element? Sorting the axes by stride and asking each stride to exceed the
 * reach of all smaller ones is sufficient, and refuses nothing that torch or NumPy make by slicing
 * or transposing. */
static bool
reaches_twice(const krul_view *view)
{
    int order[KRUL_VIEW_DIMS] = {0, 1, 2, 3};
    for (int i = 1; i < KRUL_VIEW_DIMS; i++) {
        for (int j = i; j > 0 && view->stride[order[j]] < view->stride[order[j - 1]]; j--) {
            int swapped = order[j];
            order[j] = order[j - 1];
            order[j - 1] = swapped;
        }
    }
    int64_t reach = 0;
    for (int i = 0; i < KRUL_VIEW_DIMS; i++) {
        int64_t n = view->shape[order[i]];
        if (n <= 1) {
            continue;
        }
        if (view->stride[order[i]] <= reach) {
            return true;
        }
        reach += (n - 1) * view->stride[order[i]];
    }
    return false;
}

krul_status
krul_view_check_output(const krul_view *view, const char *name, krul_error *err)
{
    krul_status status = krul_view_check(view, name, err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    if (view->is_read_only) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "%s is read-only but would be written", name);
    }
    if (krul_view_n_elements(view) > 0 && reaches_twice(view)) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%s with strides (%lld, %lld, %lld, %lld) reaches one element twice but "
                         "would be written",
                         name, (long long)view->stride[0], (long long)view->stride[1],
                         (long long)view->stride[2], (long long)view->stride[3]);
    }
    return KRUL_STATUS_OK;
}

static void
byte_range(const krul_view *view, uintptr_t *start, uintptr_t *end)
{
    int64_t span = 0;
    bool overflows = span_overflows(view, &span);
    assert(!overflows);
    (void)overflows;
    *start = (uintptr_t)view->data;
    *end = *start + (uintptr_t)span * krul_dtype_bytes(view->dtype);
}

bool
krul_view_overlaps(const krul_view *left, const krul_view *right)
{
    if (krul_view_n_elements(left) == 0 || krul_view_n_elements(right) == 0 ||
        left->device_type != right->device_type || left->device_id != right->device_id) {
        return false;
    }
    uintptr_t left_start, left_end, right_start, right_end;
    byte_range(left, &left_start, &left_end);
    byte_range(right, &right_start, &right_end);
    return left_start < right_end && right_start < left_end;
}

krul_status
krul_view_check_disjoint(const krul_view *in, const char *in_name, const krul_view *out,
                         const char *out_name, krul_error *err)
{
    if (krul_view_overlaps(in, out)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "%s may share memory with %s but must not, because it is written",
                         out_name, in_name);
    }
    return KRUL_STATUS_OK;
}

krul_view
krul_view_slice_tokens(const krul_view *view, int64_t token_start, int64_t n_tokens)
{
    assert(token_start >= 0 && n_tokens >= 0 && token_start + n_tokens <= view->shape[2]);
    krul_view slice = *view;
    slice.shape[2] = n_tokens;
    if (slice.data != NULL && n_tokens > 0) {
        size_t element_bytes = krul_dtype_bytes(view->dtype);
        slice.data = (uint8_t *)view->data +
                     (size_t)(token_start * view->stride[2]) * element_bytes;
    }
    return slice;
}

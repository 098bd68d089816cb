/* test_view.c - statuses, dtypes, backends, and what a view refuses. */
#include <errno.h>
#include <math.h>
#include <string.h>

#include "check.h"
#include "dtype.h"
#include "internal.h"

static float memory[64];

static krul_view
good_view(void)
{
    return (krul_view){.data = memory,
                       .dtype = KRUL_DTYPE_F32,
                       .device_type = KRUL_DEVICE_CPU,
                       .shape = {1, 2, 4, 8},
                       .stride = {64, 32, 8, 1}};
}

static krul_status
check_of(krul_view view, krul_error *err)
{
    memset(err, 0, sizeof *err);
    return krul_view_check(&view, "x", err);
}

static void
test_status(void)
{
    krul_error err;
    for (int status = 0; status >= KRUL_STATUS_CANCELLED; status--) {
        CHECK(strcmp(krul_status_name((krul_status)status), "UNKNOWN") != 0);
    }
    CHECK(strcmp(krul_status_name((krul_status)-99), "UNKNOWN") == 0);
    CHECK(krul_fail(NULL, KRUL_STATUS_IO, "unseen") == KRUL_STATUS_IO);
    CHECK(krul_fail(&err, KRUL_STATUS_BAD_VALUE, "a is %d", 3) == KRUL_STATUS_BAD_VALUE);
    CHECK(strcmp(err.message, "a is 3") == 0 && err.code == 0);
    CHECK(krul_fail_errno(&err, ENOSPC, "writing %s", "f") == KRUL_STATUS_STORE_FULL);
    CHECK(err.code == ENOSPC && strstr(err.message, "writing f: ") != NULL);
    CHECK(krul_fail_errno(&err, EDQUOT, "w") == KRUL_STATUS_STORE_FULL);
    CHECK(krul_fail_errno(&err, EFBIG, "w") == KRUL_STATUS_STORE_FULL);
    CHECK(krul_fail_errno(NULL, ENOENT, "w") == KRUL_STATUS_IO);
    char long_text[2 * KRUL_ERROR_MESSAGE_BYTES];
    memset(long_text, 'y', sizeof long_text);
    long_text[sizeof long_text - 1] = '\0';
    (void)krul_fail_errno(&err, EIO, "%s", long_text);
    CHECK(strlen(err.message) == KRUL_ERROR_MESSAGE_BYTES - 1);
}

static void
test_refusals(void)
{
    krul_error err;
    CHECK(check_of(good_view(), &err) == KRUL_STATUS_OK);
    krul_view view = good_view();
    view.dtype = (krul_dtype)9;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_DTYPE && strstr(err.message, "9") != NULL);
    view = good_view();
    view.device_type = (krul_device_type)7;
    CHECK(check_of(view, &err) == KRUL_STATUS_DEVICE && strstr(err.message, "7") != NULL);
    view = good_view();
    view.shape[2] = -4;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_SHAPE && strstr(err.message, "-4") != NULL);
    view = good_view();
    view.stride[1] = -32;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_SHAPE && strstr(err.message, "-32") != NULL);
    view = good_view();
    view.stride[3] = 2;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_SHAPE && strstr(err.message, "last axis"));
    view = good_view();
    view.shape[0] = INT64_MAX;
    view.shape[1] = INT64_MAX;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_SHAPE && strstr(err.message, "2^63"));
    view = good_view();
    view.shape[0] = 2;
    view.stride[0] = INT64_MAX;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_SHAPE);
    view = good_view();
    view.data = NULL;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_VALUE && strstr(err.message, "no memory"));
    view.shape[2] = 0;
    CHECK(check_of(view, &err) == KRUL_STATUS_OK);
    view = good_view();
    view.data = (uint8_t *)memory + 2;
    CHECK(check_of(view, &err) == KRUL_STATUS_BAD_VALUE && strstr(err.message, "alignment"));
    view = good_view();
    view.shape[3] = 1;
    view.stride[3] = 5;
    CHECK(check_of(view, &err) == KRUL_STATUS_OK);
}

static void
test_outputs(void)
{
    krul_error err;
    krul_view view = good_view();
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_OK);
    view.is_read_only = true;
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "read-only") != NULL);
    view = good_view();
    view.stride[2] = 0;
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_BAD_SHAPE);
    CHECK(strstr(err.message, "twice") != NULL);
    CHECK(krul_view_check(&view, "in", &err) == KRUL_STATUS_OK); /* a broadcast input is fine */
    view.stride[2] = 4;
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_BAD_SHAPE);
    view.shape[2] = 0;
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_OK);
    view = good_view();
    view.dtype = (krul_dtype)0;
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_BAD_DTYPE);
    /* Transposed memory reaches every element once. */
    view = good_view();
    view.stride[1] = 8;
    view.stride[2] = 16;
    CHECK(krul_view_check_output(&view, "out", &err) == KRUL_STATUS_OK);
}

static void
test_overlap_and_slice(void)
{
    krul_error err;
    krul_view left = good_view();
    krul_view right = good_view();
    CHECK(krul_view_overlaps(&left, &right));
    CHECK(krul_view_check_disjoint(&left, "in", &right, "out", &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "in") != NULL && strstr(err.message, "out") != NULL);
    left.shape[1] = 1;
    right.shape[1] = 1;
    right.data = memory + 32;
    CHECK(!krul_view_overlaps(&left, &right));
    CHECK(krul_view_check_disjoint(&left, "in", &right, "out", &err) == KRUL_STATUS_OK);
    right.data = memory + 31;
    CHECK(krul_view_overlaps(&left, &right));
    right.shape[2] = 0;
    CHECK(!krul_view_overlaps(&left, &right));
    krul_view view = good_view();
    krul_view slice = krul_view_slice_tokens(&view, 1, 2);
    CHECK(slice.data == memory + 8 && slice.shape[2] == 2 && slice.stride[2] == 8);
    CHECK(krul_view_n_elements(&slice) == 32);
    slice = krul_view_slice_tokens(&view, 4, 0);
    CHECK(slice.shape[2] == 0);
}

/* Every f16 and bf16 goes to f32 and back unchanged, NaN aside; rounding is to nearest even. */
static void
test_dtypes(void)
{
    int64_t n_wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        uint16_t narrow = (uint16_t)bits;
        float from_f16 = krul_f16_to_f32(narrow);
        float from_bf16 = krul_bf16_to_f32(narrow);
        n_wrong += isnan(from_f16) ? !isnan(krul_f16_to_f32(krul_f32_to_f16(from_f16)))
                                   : krul_f32_to_f16(from_f16) != narrow;
        n_wrong += isnan(from_bf16) ? !isnan(krul_bf16_to_f32(krul_f32_to_bf16(from_bf16)))
                                    : krul_f32_to_bf16(from_bf16) != narrow;
    }
    CHECK(n_wrong == 0);
    CHECK(krul_f32_to_f16(65504.0f) == 0x7bff && krul_f32_to_f16(65519.9f) == 0x7bff);
    CHECK(krul_f32_to_f16(65520.0f) == 0x7c00 && krul_f32_to_f16(-1e30f) == 0xfc00);
    CHECK(krul_f32_to_f16(0x1p-24f) == 1 && krul_f32_to_f16(0x1p-25f) == 0);
    CHECK(krul_f32_to_f16(0x1.8p-24f) == 2); /* a tie, to even */
    CHECK(krul_f32_to_bf16(1.00390625f) == 0x3f80); /* a tie, to even */
    CHECK(krul_f32_to_bf16(1.01171875f) == 0x3f82);
    CHECK(krul_dtype_bytes(KRUL_DTYPE_F32) == 4 && krul_dtype_bytes(KRUL_DTYPE_BF16) == 2);
    CHECK(krul_dtype_bytes((krul_dtype)0) == 0);
    CHECK(strcmp(krul_dtype_name(KRUL_DTYPE_F16), "float16") == 0);
    CHECK(strcmp(krul_dtype_name((krul_dtype)0), "unknown") == 0);
}

static void
test_backends(void)
{
    krul_error err;
    const krul_backend *backend = NULL;
    CHECK(krul_backend_count() >= 1);
    CHECK(krul_backend_find(NULL, &backend, &err) == KRUL_STATUS_OK);
    CHECK(krul_backend_is_usable(backend));
    CHECK(krul_backend_find("scalar", &backend, &err) == KRUL_STATUS_OK);
    CHECK(strcmp(krul_backend_name(backend), "scalar") == 0);
    CHECK(krul_backend_find("abacus", &backend, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "abacus") != NULL);
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *listed = krul_backend_at(i);
        krul_status expected = krul_backend_is_usable(listed) ? KRUL_STATUS_OK
                                                              : KRUL_STATUS_UNSUPPORTED;
        CHECK(krul_backend_find(krul_backend_name(listed), &backend, &err) == expected);
    }
}

int
main(void)
{
    test_status();
    test_refusals();
    test_outputs();
    test_overlap_and_slice();
    test_dtypes();
    test_backends();
    return check_finish();
}

/* compressor.c - one table of codecs, and every check that stands before them.
 *
 * The codecs themselves (codec_*.c) see checked views only. What a codec cannot hold is coded
 * `exact` here, so that no value turns into silent garbage. */
#include "compressor.h"

#include <string.h>

#include "internal.h"

static const krul_codec_ops *const codecs[] = {
    &krul_codec_exact,      &krul_codec_int8,       &krul_codec_int4,    &krul_codec_share,
    &krul_codec_share_int8, &krul_codec_share_int4, &krul_codec_predict,
};

static const char *const view_names[KRUL_COMPRESSOR_MAX_VIEWS] = {"views[0]", "views[1]"};

static const krul_codec_ops *
find_codec(krul_codec codec)
{
    for (size_t i = 0; i < KRUL_LENGTH(codecs); i++) {
        if (codecs[i]->codec == codec) {
            return codecs[i];
        }
    }
    return NULL;
}

const char *
krul_codec_name(krul_codec codec)
{
    const krul_codec_ops *ops = find_codec(codec);
    return ops == NULL ? NULL : ops->name;
}

int
krul_codec_n_layers(krul_codec codec)
{
    const krul_codec_ops *ops = find_codec(codec);
    return ops == NULL ? 0 : ops->n_layers;
}

/* Can its blocks be coded one by one? */
static krul_status
check_is_alone(const krul_codec_ops *ops, krul_error *err)
{
    if (ops->encode == NULL) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "codec '%s' codes chains of layers with a profile, not lone blocks",
                         ops->name);
    }
    return KRUL_STATUS_OK;
}

static bool
takes_n_views(const krul_codec_ops *ops, int n_views)
{
    return ops->codec == KRUL_CODEC_EXACT || ops->n_layers == n_views;
}

static krul_status
check_n_views(const krul_codec_ops *ops, int n_views, krul_error *err)
{
    if (!takes_n_views(ops, n_views)) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "codec '%s' takes %d view%s but got %d",
                         ops->name, ops->n_layers, ops->n_layers == 1 ? "" : "s", n_views);
    }
    return KRUL_STATUS_OK;
}

/* Are the views of one shape and dtype, on this type of device? Data is looked at where it is not
 * NULL. */
static krul_status
check_views(const krul_view *views, int n_views, krul_device_type device_type, bool is_output,
            krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (n_views < 1 || n_views > KRUL_COMPRESSOR_MAX_VIEWS) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "n_views is %d but must be 1 to %d", n_views,
                         KRUL_COMPRESSOR_MAX_VIEWS);
    }
    for (int i = 0; i < n_views; i++) {
        krul_view checked = views[i];
        if (is_output && checked.data == NULL) { /* not wanted: only the shape must be sound */
            static float nowhere;
            checked.data = &nowhere;
        }
        if (is_output) {
            KRUL_TRY(krul_view_check_output(&checked, view_names[i], err));
        }
        else {
            KRUL_TRY(krul_view_check(&checked, view_names[i], err));
        }
        if (checked.device_type != device_type) {
            return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                             "%s is on device type %d but the codec works on %d", view_names[i],
                             (int)checked.device_type, (int)device_type);
        }
        if (checked.dtype != views[0].dtype) {
            return krul_fail(err, KRUL_STATUS_BAD_DTYPE, "views[0] is %s but %s is %s",
                             krul_dtype_name(views[0].dtype), view_names[i],
                             krul_dtype_name(checked.dtype));
        }
        if (memcmp(checked.shape, views[0].shape, sizeof checked.shape) != 0) {
            const int64_t *first = views[0].shape;
            const int64_t *other = checked.shape;
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "views[0] is (%lld, %lld, %lld, %lld) but %s is (%lld, %lld, %lld, "
                             "%lld)",
                             (long long)first[0], (long long)first[1], (long long)first[2],
                             (long long)first[3], view_names[i], (long long)other[0],
                             (long long)other[1], (long long)other[2], (long long)other[3]);
        }
    }
done:
    return status;
}

static krul_status
check_kv(krul_kv kv, krul_error *err)
{
    if (kv != KRUL_KV_KEY && kv != KRUL_KV_VALUE) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "kv is %d but must be %d (key) or %d (value)",
                         (int)kv, (int)KRUL_KV_KEY, (int)KRUL_KV_VALUE);
    }
    return KRUL_STATUS_OK;
}

/* May the payload and the view share a byte? */
static bool
is_payload_in_view(const uint8_t *payload, size_t payload_bytes, const krul_view *view)
{
    size_t span = krul_dtype_bytes(view->dtype);
    for (int i = 0; i < KRUL_VIEW_DIMS; i++) {
        if (view->shape[i] == 0) {
            return false;
        }
        span += (size_t)((view->shape[i] - 1) * view->stride[i]) * krul_dtype_bytes(view->dtype);
    }
    uintptr_t view_start = (uintptr_t)view->data;
    uintptr_t payload_start = (uintptr_t)payload;
    return view->data != NULL && payload_bytes > 0 && payload_start < view_start + span &&
           view_start < payload_start + payload_bytes;
}

static krul_status
check_disjoint(const uint8_t *payload, size_t payload_bytes, const krul_view *views, int n_views,
               krul_error *err)
{
    for (int i = 0; i < n_views; i++) {
        if (is_payload_in_view(payload, payload_bytes, &views[i])) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "payload at %p (%zu bytes) shares memory with %s at %p",
                             (const void *)payload, payload_bytes, view_names[i], views[i].data);
        }
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_compressor_bound(const krul_view *views, int n_views, size_t *n_bytes_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t largest = 0;
    KRUL_TRY(check_views(views, n_views, KRUL_DEVICE_CPU, false, err));
    for (size_t i = 0; i < KRUL_LENGTH(codecs); i++) {
        if (!takes_n_views(codecs[i], n_views) || codecs[i]->bound == NULL) {
            continue;
        }
        for (int kv = KRUL_KV_KEY; kv <= KRUL_KV_VALUE; kv++) {
            krul_codec_block block = {.kv = (krul_kv)kv, .n_views = n_views, .views = views};
            size_t n_bytes = 0;
            KRUL_TRY(codecs[i]->bound(&block, &n_bytes, err));
            largest = n_bytes > largest ? n_bytes : largest;
        }
    }
    *n_bytes_out = largest;
done:
    return status;
}

/* Encode with one codec if the payload can be held. */
static krul_status
encode_with(const krul_codec_ops *ops, const krul_codec_block *block, uint8_t *payload_out,
            size_t capacity_bytes, size_t *n_bytes_out, bool *fits_out, double error_out[2],
            krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t bound = 0;
    KRUL_TRY(ops->bound(block, &bound, err));
    if (bound > capacity_bytes) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "capacity_bytes is %zu but codec '%s' may need %zu", capacity_bytes,
                         ops->name, bound);
    }
    error_out[0] = 0;
    error_out[1] = 0;
    KRUL_TRY(
        ops->encode(block, payload_out, capacity_bytes, n_bytes_out, fits_out, error_out, err));
done:
    return status;
}

krul_status
krul_compressor_check(krul_codec codec, krul_kv kv, const krul_view *views, int n_views,
                      krul_device_type device_type, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_codec_ops *ops = find_codec(codec);
    if (ops == NULL) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "codec is %d, which is no codec", (int)codec);
    }
    KRUL_TRY(check_is_alone(ops, err));
    KRUL_TRY(check_kv(kv, err));
    KRUL_TRY(check_views(views, n_views, device_type, false, err));
    KRUL_TRY(check_n_views(ops, n_views, err));
done:
    return status;
}

krul_status
krul_compressor_encode(const krul_backend *backend, krul_codec codec, krul_kv kv,
                       const krul_view *views, int n_views, uint8_t *payload_out,
                       size_t capacity_bytes, size_t *n_bytes_out, krul_codec *codec_out,
                       double error_out[2], krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_codec_ops *ops = find_codec(codec);
    krul_codec_block block = {.backend = backend, .kv = kv, .n_views = n_views, .views = views};
    double error[2] = {0, 0};
    size_t n_bytes = 0;
    bool fits = false;
    KRUL_TRY(krul_compressor_check(codec, kv, views, n_views, KRUL_DEVICE_CPU, err));
    KRUL_TRY(check_disjoint(payload_out, capacity_bytes, views, n_views, err));
    KRUL_TRY(encode_with(ops, &block, payload_out, capacity_bytes, &n_bytes, &fits, error, err));
    if (!fits) {
        ops = &krul_codec_exact;
        KRUL_TRY(
            encode_with(ops, &block, payload_out, capacity_bytes, &n_bytes, &fits, error, err));
        if (!fits) {
            return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                             "codec 'exact' refused a block of %s, which it must hold",
                             krul_dtype_name(views[0].dtype));
        }
    }
    *n_bytes_out = n_bytes;
    *codec_out = ops->codec;
    if (error_out != NULL) {
        error_out[0] = error[0];
        error_out[1] = error[1];
    }
done:
    return status;
}

krul_status
krul_compressor_decode(const krul_backend *backend, krul_codec codec, krul_kv kv,
                       const uint8_t *payload, size_t payload_bytes, const krul_view *views,
                       int n_views, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_codec_ops *ops = find_codec(codec);
    krul_codec_block block = {.backend = backend, .kv = kv, .n_views = n_views, .views = views};
    if (ops == NULL) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "codec is %d, which is no codec", (int)codec);
    }
    KRUL_TRY(check_is_alone(ops, err));
    KRUL_TRY(check_kv(kv, err));
    KRUL_TRY(check_views(views, n_views, KRUL_DEVICE_CPU, true, err));
    KRUL_TRY(check_n_views(ops, n_views, err));
    if (n_views == 2 && views[0].data != NULL && views[1].data != NULL) {
        KRUL_TRY(krul_view_check_disjoint(&views[0], view_names[0], &views[1], view_names[1], err));
    }
    KRUL_TRY(check_disjoint(payload, payload_bytes, views, n_views, err));
    KRUL_TRY(ops->decode(&block, payload, payload_bytes, err));
done:
    return status;
}

/* restore_step.c - one block of a restore: what a step must be, and decoding what it has read. */
#include "restore_step.h"

#include <stdlib.h>
#include <string.h>

#include "internal.h"

int
krul_restore_n_views(const krul_store_entry *entry)
{
    return entry->layer_upper >= 0 || entry->kv == KRUL_KV_BOTH ? 2 : 1;
}

int32_t
krul_restore_layer_of(const krul_store_entry *entry, int index)
{
    return index == 0 || entry->kv == KRUL_KV_BOTH ? entry->layer_lower : entry->layer_upper;
}

krul_status
krul_restore_check_step(const krul_restore_step *step, int64_t index, int32_t n_layers,
                        bool is_made_up, krul_error *err)
{
    const krul_store_entry *entry = &step->entry;
    long long at = (long long)index;
    if (entry->kind != KRUL_STORE_ENTRY_BLOCK) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step %lld has entry kind %d but must have %d",
                         at, (int)entry->kind, (int)KRUL_STORE_ENTRY_BLOCK);
    }
    if (!is_made_up && step->fd < 0 && step->payload == NULL && entry->payload_bytes > 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step %lld has neither file nor payload", at);
    }
    bool is_chained = entry->codec == KRUL_CODEC_PREDICT;
    if (is_chained && step->predict == NULL && !is_made_up) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step %lld is coded with a profile, not given",
                         at);
    }
    bool is_wanted = is_chained; /* those that are predicted from it may want it */
    for (int i = 0; i < krul_restore_n_views(entry); i++) {
        const krul_view *view = &step->views[i];
        int32_t layer = krul_restore_layer_of(entry, i);
        if (layer < 0 || layer >= n_layers) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "step %lld is for layer %d but there are %d layers", at, (int)layer,
                             (int)n_layers);
        }
        if (view->data == NULL) {
            continue;
        }
        is_wanted = true;
        if (is_made_up) {
            continue;
        }
        krul_status status = krul_view_check_output(view, "a step's output", err);
        if (status != KRUL_STATUS_OK) {
            return status;
        }
        if (view->shape[0] != entry->n_batch || view->shape[1] != entry->n_heads ||
            view->shape[2] > entry->n_tokens || view->shape[3] != entry->head_dim) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "step %lld holds (%d, %d, %lld, %d) but its output is "
                             "(%lld, %lld, %lld, %lld)",
                             at, (int)entry->n_batch, (int)entry->n_heads,
                             (long long)entry->n_tokens, (int)entry->head_dim,
                             (long long)view->shape[0], (long long)view->shape[1],
                             (long long)view->shape[2], (long long)view->shape[3]);
        }
        if (view->dtype != entry->dtype) {
            return krul_fail(err, KRUL_STATUS_BAD_DTYPE, "step %lld holds %s but its output is %s",
                             at, krul_dtype_name(entry->dtype), krul_dtype_name(view->dtype));
        }
    }
    if (!is_wanted) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step %lld has no output", at);
    }
    return KRUL_STATUS_OK;
}

/* Copy the rows of as many tokens as `to` has room for. */
static void
copy_tokens(const krul_view *from, const krul_view *to)
{
    size_t element_bytes = krul_dtype_bytes(to->dtype);
    size_t row_bytes = (size_t)to->shape[3] * element_bytes;
    for (int64_t batch = 0; batch < to->shape[0]; batch++) {
        for (int64_t head = 0; head < to->shape[1]; head++) {
            for (int64_t token = 0; token < to->shape[2]; token++) {
                int64_t source = batch * from->stride[0] + head * from->stride[1] +
                                 token * from->stride[2];
                int64_t target = batch * to->stride[0] + head * to->stride[1] +
                                 token * to->stride[2];
                memcpy((uint8_t *)to->data + (size_t)target * element_bytes,
                       (const uint8_t *)from->data + (size_t)source * element_bytes, row_bytes);
            }
        }
    }
}

/* A row-major view of a whole block in memory of its own, for a caller that wants only its first
 * tokens; data NULL when there is no memory. */
static krul_view
new_whole_block(const krul_store_entry *entry)
{
    krul_view view = {
        .dtype = entry->dtype,
        .device_type = KRUL_DEVICE_CPU,
        .shape = {entry->n_batch, entry->n_heads, entry->n_tokens, entry->head_dim},
    };
    size_t n_bytes = krul_dtype_bytes(entry->dtype);
    int64_t stride = 1;
    for (int axis = KRUL_VIEW_DIMS - 1; axis >= 0; axis--) {
        view.stride[axis] = stride;
        if (krul_multiply_overflows_i64(stride, view.shape[axis], &stride) ||
            krul_multiply_overflows(n_bytes, (size_t)view.shape[axis], &n_bytes)) {
            return view;
        }
    }
    view.data = malloc(n_bytes);
    return view;
}

krul_status
krul_restore_decode(const krul_backend *backend, const krul_restore_step *step,
                    const krul_view *wanted, const uint8_t *payload, krul_error *err)
{
    const krul_store_entry *entry = &step->entry;
    krul_status status = KRUL_STATUS_OK;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    bool is_whole[KRUL_COMPRESSOR_MAX_VIEWS] = {false, false};
    int n_views = krul_restore_n_views(entry);
    for (int i = 0; i < n_views; i++) {
        views[i] = wanted[i];
        if (views[i].data == NULL && entry->codec != KRUL_CODEC_PREDICT) {
            /* Not wanted, but decoding asks for its shape. */
            views[i] = wanted[1 - i];
            views[i].data = NULL;
            views[i].shape[2] = entry->n_tokens;
        }
        else if (views[i].data != NULL && views[i].shape[2] < entry->n_tokens) {
            views[i] = new_whole_block(entry);
            is_whole[i] = true;
            if (views[i].data == NULL) {
                status = krul_fail(err, KRUL_STATUS_NO_MEMORY,
                                   "no memory for a whole block of %lld tokens",
                                   (long long)entry->n_tokens);
                goto done;
            }
        }
    }
    if (entry->codec == KRUL_CODEC_PREDICT) {
        KRUL_TRY(krul_predict_decode(backend, step->predict, entry->layer_lower, entry->token_start,
                                     entry->n_tokens, payload, (size_t)entry->payload_bytes, views,
                                     err));
    }
    else {
        KRUL_TRY(krul_compressor_decode(backend, entry->codec, entry->kv, payload,
                                        (size_t)entry->payload_bytes, views, n_views, err));
    }
    for (int i = 0; i < n_views; i++) {
        if (is_whole[i]) {
            copy_tokens(&views[i], &wanted[i]);
        }
    }
done:
    for (int i = 0; i < n_views; i++) {
        if (is_whole[i]) {
            free(views[i].data);
        }
    }
    return status;
}

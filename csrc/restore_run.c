/* restore_run.c - threads that carry a restore out: read, check, decode, tell who waits.
 *
 * Threads take steps in the order given, so that shallow layers come first. Each keeps one buffer
 * for the coded bytes of a block; pread instead of mmap, because a file that is truncated under a
 * mapping kills the process. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

/* What is known of one layer. */
typedef struct restore_layer {
    int64_t n_steps_left;
    krul_error failure; /* of the first step that failed */
} restore_layer;

struct krul_restore {
    const krul_backend *backend;
    krul_restore_step *steps;
    int64_t n_steps;
    size_t buffer_bytes; /* the largest payload that is read from a file */
    restore_layer *layers;
    int32_t n_layers;
    krul_pool *pool;
    double start_s;
    pthread_mutex_t lock; /* guards all below and the layers */
    pthread_cond_t has_changed;
    int64_t next_step;
    int n_workers; /* submitted and not yet ended */
    bool is_cancelled;
    krul_restore_counts counts;
};

static double
now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int
n_views_of(const krul_store_entry *entry)
{
    return entry->layer_upper >= 0 ? 2 : 1;
}

static int32_t
layer_of(const krul_store_entry *entry, int index)
{
    return index == 0 ? entry->layer_lower : entry->layer_upper;
}

static krul_status
check_step(const krul_restore_step *step, int64_t index, int32_t n_layers, krul_error *err)
{
    const krul_store_entry *entry = &step->entry;
    long long at = (long long)index;
    if (entry->kind != KRUL_STORE_ENTRY_BLOCK) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step %lld has entry kind %d but must have %d",
                         at, (int)entry->kind, (int)KRUL_STORE_ENTRY_BLOCK);
    }
    if (step->fd < 0 && step->payload == NULL && entry->payload_bytes > 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "step %lld has neither file nor payload", at);
    }
    bool is_wanted = false;
    for (int i = 0; i < n_views_of(entry); i++) {
        const krul_view *view = &step->views[i];
        int32_t layer = layer_of(entry, i);
        if (layer < 0 || layer >= n_layers) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "step %lld is for layer %d but there are %d layers", at, (int)layer,
                             (int)n_layers);
        }
        if (view->data == NULL) {
            continue;
        }
        is_wanted = true;
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

static krul_status
decode_step(const krul_backend *backend, const krul_restore_step *step, const uint8_t *payload,
            krul_error *err)
{
    const krul_store_entry *entry = &step->entry;
    krul_status status = KRUL_STATUS_OK;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    bool is_whole[KRUL_COMPRESSOR_MAX_VIEWS] = {false, false};
    int n_views = n_views_of(entry);
    for (int i = 0; i < n_views; i++) {
        views[i] = step->views[i];
        if (views[i].data == NULL) { /* not wanted, but decoding asks for its shape */
            views[i] = step->views[1 - i];
            views[i].data = NULL;
            views[i].shape[2] = entry->n_tokens;
        }
        else if (views[i].shape[2] < entry->n_tokens) {
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
    KRUL_TRY(krul_compressor_decode(backend, entry->codec, entry->kv, payload,
                                    (size_t)entry->payload_bytes, views, n_views, err));
    for (int i = 0; i < n_views; i++) {
        if (is_whole[i]) {
            copy_tokens(&views[i], &step->views[i]);
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

/* Read, check and decode one block; the seconds are added to, not set. */
static krul_status
run_step(const krul_backend *backend, const krul_restore_step *step, uint8_t *buffer,
         krul_restore_counts *spent, krul_error *err)
{
    const krul_store_entry *entry = &step->entry;
    const uint8_t *payload = step->payload;
    krul_status status = KRUL_STATUS_OK;
    double start_s = now_s();
    if (step->fd >= 0) {
        status = krul_store_read_payload(step->fd, entry, buffer, err);
        payload = buffer;
        spent->read_bytes += entry->payload_bytes;
    }
    double read_s = now_s();
    spent->read_s += read_s - start_s;
    if (status == KRUL_STATUS_OK) {
        status = decode_step(backend, step, payload, err);
        spent->decode_s += now_s() - read_s;
    }
    return status;
}

/* Enter what a step came to; with the lock. */
static void
finish_step(krul_restore *restore, const krul_restore_step *step, const krul_error *failure,
            const krul_restore_counts *spent)
{
    for (int i = 0; i < n_views_of(&step->entry); i++) {
        if (step->views[i].data != NULL) {
            restore_layer *layer = &restore->layers[layer_of(&step->entry, i)];
            layer->n_steps_left--;
            if (failure->status != KRUL_STATUS_OK && layer->failure.status == KRUL_STATUS_OK) {
                layer->failure = *failure;
            }
        }
    }
    restore->counts.n_steps_done++;
    restore->counts.read_bytes += spent->read_bytes;
    restore->counts.read_s += spent->read_s;
    restore->counts.decode_s += spent->decode_s;
    restore->counts.elapsed_s = now_s() - restore->start_s;
    pthread_cond_broadcast(&restore->has_changed);
}

static void
run_steps(void *argument)
{
    krul_restore *restore = argument;
    uint8_t *buffer = malloc(restore->buffer_bytes > 0 ? restore->buffer_bytes : 1);
    pthread_mutex_lock(&restore->lock);
    while (restore->next_step < restore->n_steps && !restore->is_cancelled) {
        const krul_restore_step *step = &restore->steps[restore->next_step++];
        pthread_mutex_unlock(&restore->lock);
        krul_error failure = {.status = KRUL_STATUS_OK};
        krul_restore_counts spent = {0};
        if (buffer == NULL) {
            (void)krul_fail(&failure, KRUL_STATUS_NO_MEMORY,
                            "no memory for a block of %zu coded bytes", restore->buffer_bytes);
        }
        else if (run_step(restore->backend, step, buffer, &spent, &failure) == KRUL_STATUS_OK) {
            failure.status = KRUL_STATUS_OK;
        }
        pthread_mutex_lock(&restore->lock);
        finish_step(restore, step, &failure, &spent);
    }
    restore->n_workers--;
    pthread_cond_broadcast(&restore->has_changed);
    pthread_mutex_unlock(&restore->lock);
    free(buffer);
}

krul_status
krul_restore_start(const krul_backend *backend, const krul_restore_step *steps, int64_t n_steps,
                   int32_t n_layers, int n_threads, krul_restore **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_restore *restore = NULL;
    size_t steps_bytes;
    if (n_steps < 0 || n_layers < 0 ||
        krul_multiply_overflows((size_t)n_steps, sizeof *steps, &steps_bytes)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "n_steps is %lld and n_layers %d but both must be 0 or more",
                         (long long)n_steps, (int)n_layers);
    }
    for (int64_t i = 0; i < n_steps; i++) {
        KRUL_TRY(check_step(&steps[i], i, n_layers, err));
    }
    restore = calloc(1, sizeof *restore);
    if (restore == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a restore");
    }
    pthread_mutex_init(&restore->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&restore->has_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    restore->backend = backend;
    restore->n_steps = n_steps;
    restore->n_layers = n_layers;
    restore->counts.n_steps = n_steps;
    restore->start_s = now_s();
    restore->steps = malloc(steps_bytes > 0 ? steps_bytes : 1);
    restore->layers = calloc((size_t)n_layers + 1, sizeof *restore->layers);
    if (restore->steps == NULL || restore->layers == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld steps of %d layers",
                           (long long)n_steps, (int)n_layers);
        goto done;
    }
    if (n_steps > 0) {
        memcpy(restore->steps, steps, steps_bytes);
    }
    for (int64_t i = 0; i < n_steps; i++) {
        const krul_restore_step *step = &restore->steps[i];
        if (step->fd >= 0 && step->entry.payload_bytes > restore->buffer_bytes) {
            restore->buffer_bytes = (size_t)step->entry.payload_bytes;
        }
        for (int k = 0; k < n_views_of(&step->entry); k++) {
            if (step->views[k].data != NULL) {
                restore->layers[layer_of(&step->entry, k)].n_steps_left++;
            }
        }
    }
    if (n_steps > 0) {
        int n_wanted = n_threads > 0 ? n_threads : krul_pool_n_processors();
        n_wanted = (int)krul_min_i64(krul_min_i64(n_wanted, n_steps), KRUL_POOL_MAX_THREADS);
        KRUL_TRY(krul_pool_new(n_wanted, (size_t)n_wanted, &restore->pool, err));
        restore->n_workers = n_wanted;
        for (int i = 0; i < n_wanted; i++) {
            krul_pool_submit(restore->pool, run_steps, restore);
        }
    }
    *out = restore;
    restore = NULL;
done:
    krul_restore_free(restore);
    return status;
}

static bool
is_done(const krul_restore *restore, int32_t layer)
{
    return restore->layers[layer].n_steps_left == 0 ||
           restore->layers[layer].failure.status != KRUL_STATUS_OK || restore->is_cancelled;
}

krul_status
krul_restore_wait(krul_restore *restore, int32_t layer, krul_error *err)
{
    if (layer < 0 || layer >= restore->n_layers) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer is %d but must be from 0 to %d",
                         (int)layer, (int)restore->n_layers - 1);
    }
    pthread_mutex_lock(&restore->lock);
    while (!is_done(restore, layer)) {
        pthread_cond_wait(&restore->has_changed, &restore->lock);
    }
    krul_error failure = restore->layers[layer].failure;
    bool is_missing = restore->layers[layer].n_steps_left > 0;
    pthread_mutex_unlock(&restore->lock);
    if (failure.status != KRUL_STATUS_OK) {
        if (err != NULL) {
            *err = failure;
        }
        return failure.status;
    }
    if (is_missing) {
        return krul_fail(err, KRUL_STATUS_CANCELLED,
                         "the restore was cancelled before layer %d was in", (int)layer);
    }
    return KRUL_STATUS_OK;
}

bool
krul_restore_wait_for(krul_restore *restore, int32_t layer, double timeout_s)
{
    if (layer < 0 || layer >= restore->n_layers) {
        return true;
    }
    double end_s = now_s() + timeout_s;
    struct timespec end = {.tv_sec = (time_t)end_s};
    end.tv_nsec = (long)((end_s - (double)end.tv_sec) * 1e9);
    int failure = 0;
    pthread_mutex_lock(&restore->lock);
    while (!is_done(restore, layer) && timeout_s > 0 && failure == 0) {
        failure = pthread_cond_timedwait(&restore->has_changed, &restore->lock, &end);
    }
    bool result = is_done(restore, layer);
    pthread_mutex_unlock(&restore->lock);
    return result;
}

void
krul_restore_cancel(krul_restore *restore)
{
    pthread_mutex_lock(&restore->lock);
    restore->is_cancelled = true;
    pthread_cond_broadcast(&restore->has_changed);
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_join(krul_restore *restore)
{
    pthread_mutex_lock(&restore->lock);
    while (restore->n_workers > 0) {
        pthread_cond_wait(&restore->has_changed, &restore->lock);
    }
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_read_counts(krul_restore *restore, krul_restore_counts *out)
{
    pthread_mutex_lock(&restore->lock);
    *out = restore->counts;
    if (out->n_steps_done < out->n_steps) {
        out->elapsed_s = now_s() - restore->start_s;
    }
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_free(krul_restore *restore)
{
    if (restore == NULL) {
        return;
    }
    krul_restore_cancel(restore);
    krul_pool_free(restore->pool);
    pthread_mutex_destroy(&restore->lock);
    pthread_cond_destroy(&restore->has_changed);
    free(restore->steps);
    free(restore->layers);
    free(restore);
}

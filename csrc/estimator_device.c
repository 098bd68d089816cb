/* estimator_device.c - sums of observed attention rows that stay on a device until they are asked for.
 *
 * Memory for one observation is a station's; only the sums are an observer's own: distances, importance,
 * then what tokens received, a row of `stride` floats for each layer. Calls return when the device is
 * done, so that nobody has to know for how long queries and keys are read. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "device_estimator.h"
#include "device_station.h"
#include "internal.h"

enum { MIN_STRIDE = 1024 };

struct krul_observer {
    krul_device_pool *pool;
    int32_t device_id;
    int32_t n_layers;
    pthread_mutex_t lock; /* guards all below */
    krul_device *device;
    uint8_t *memory; /* the sums */
    int64_t stride; /* 0: there are none */
    int64_t n_tokens; /* that they tell of, at most stride */
    double n_rows;
    krul_error failure; /* the sums are lost */
};

/* Where the sums are, and what they take. */
typedef struct places {
    size_t importance_at;
    size_t received_at;
    size_t n_bytes;
} places;

static bool
place_overflows(int32_t n_layers, int64_t stride, places *out)
{
    size_t n = (size_t)n_layers, n_pairs = 0, n_received = 0, n_bytes = 0;
    bool overflows = krul_multiply_overflows(n, n, &n_pairs) ||
                     krul_add_overflows(n_pairs, 2 * n, &n_bytes) ||
                     krul_multiply_overflows(n_bytes, sizeof(double), &n_bytes) ||
                     krul_multiply_overflows(n, (size_t)stride, &n_received) ||
                     krul_multiply_overflows(n_received, sizeof(float), &n_received) ||
                     krul_add_overflows(n_bytes, n_received, &out->n_bytes);
    out->importance_at = n_pairs * sizeof(double);
    out->received_at = n_bytes;
    return overflows;
}

static krul_estimator_sums
sums_in(uint8_t *memory, const places *at, int64_t stride, double *n_rows)
{
    return (krul_estimator_sums){
        .distances = (double *)(void *)memory,
        .importance = (double *)(void *)(memory + at->importance_at),
        .received = (float *)(void *)(memory + at->received_at),
        .received_stride = stride,
        .n_rows = n_rows,
    };
}

krul_status
krul_observer_new(krul_device_pool *pool, int32_t device_id, int32_t n_layers, krul_observer **out,
                  krul_error *err)
{
    if (n_layers < 1) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "n_layers is %d but must be at least 1",
                         (int)n_layers);
    }
    krul_observer *observer = calloc(1, sizeof *observer);
    if (observer == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for an observer");
    }
    observer->pool = pool;
    observer->device_id = device_id;
    observer->n_layers = n_layers;
    pthread_mutex_init(&observer->lock, NULL);
    *out = observer;
    return KRUL_STATUS_OK;
}

void
krul_observer_free(krul_observer *observer)
{
    if (observer == NULL) {
        return;
    }
    const krul_device_ops *ops = krul_device_pool_ops(observer->pool);
    if (observer->memory != NULL) {
        ops->memory_free(observer->device, observer->memory);
    }
    if (observer->device != NULL) {
        ops->close(observer->device);
    }
    pthread_mutex_destroy(&observer->lock);
    free(observer);
}

/* Nothing can be said of the sums any more. */
static krul_status
lose_sums(krul_observer *observer, const krul_error *failure, krul_error *err)
{
    observer->failure = *failure;
    observer->failure.status = KRUL_STATUS_DEVICE;
    return krul_fail(err, KRUL_STATUS_DEVICE, "%s", failure->message);
}

/* Have sums of so many tokens: those that are there, and zeroes. On failure they are as they were,
 * for they are only read. */
static krul_status
grow(krul_observer *observer, krul_station *station, int64_t n_tokens, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = station->ops;
    int64_t stride = krul_max_i64(krul_max_i64(n_tokens, observer->stride / 2 * 3), MIN_STRIDE);
    places before = {.n_bytes = 0}, after = {.n_bytes = 0};
    void *memory = NULL;
    size_t pinned_bytes;
    if ((observer->memory != NULL &&
         place_overflows(observer->n_layers, observer->stride, &before)) ||
        place_overflows(observer->n_layers, stride, &after) ||
        krul_add_overflows(before.n_bytes, after.n_bytes, &pinned_bytes)) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "sums of %d layers and %lld tokens",
                         (int)observer->n_layers, (long long)n_tokens);
    }
    if (observer->device == NULL) {
        KRUL_TRY(ops->open(observer->device_id, &observer->device, err));
    }
    KRUL_TRY(krul_station_reserve(station, pinned_bytes, 0, err));
    KRUL_TRY(ops->memory_new(observer->device, after.n_bytes, &memory, err));
    uint8_t *held = station->pinned + after.n_bytes;
    memset(station->pinned, 0, after.n_bytes);
    if (observer->memory != NULL) {
        KRUL_TRY(ops->copy_out(station->device, station->stream, held, observer->memory,
                               before.n_bytes, err));
        KRUL_TRY(krul_station_wait(station, err));
        memcpy(station->pinned, held, before.received_at);
        for (int32_t layer = 0; layer < observer->n_layers; layer++) {
            memcpy(station->pinned + after.received_at +
                       (size_t)layer * (size_t)stride * sizeof(float),
                   held + before.received_at +
                       (size_t)layer * (size_t)observer->stride * sizeof(float),
                   (size_t)observer->stride * sizeof(float));
        }
    }
    KRUL_TRY(ops->copy_in(station->device, station->stream, memory, station->pinned, after.n_bytes,
                          err));
    KRUL_TRY(krul_station_wait(station, err));
    if (observer->memory != NULL) {
        ops->memory_free(observer->device, observer->memory);
    }
    observer->memory = memory;
    observer->stride = stride;
    memory = NULL;
done:
    if (memory != NULL) {
        (void)ops->stream_synchronize(station->device, station->stream, NULL);
        ops->memory_free(observer->device, memory);
    }
    return krul_station_note(station, status);
}

krul_status
krul_observer_observe(krul_observer *observer, const krul_device_event *events, int32_t n_events,
                      const krul_estimator_layer *layers, const int64_t *row_positions,
                      int64_t n_rows, const uint8_t *key_is_real, int64_t n_keys_total,
                      double weight, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_station *station = NULL;
    krul_device_observation plan;
    krul_error failure = {.status = KRUL_STATUS_OK};
    const krul_device_ops *ops = krul_device_pool_ops(observer->pool);
    pthread_mutex_lock(&observer->lock);
    if (observer->failure.status != KRUL_STATUS_OK) {
        status = krul_fail(err, KRUL_STATUS_DEVICE, "%s", observer->failure.message);
        goto done;
    }
    for (int32_t l = 0; l < observer->n_layers; l++) {
        bool is_here = layers[l].queries.data == NULL ||
                       (layers[l].queries.device_id == observer->device_id &&
                        layers[l].keys.device_id == observer->device_id);
        if (!is_here) {
            status = krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                               "layer %d is on devices %d (queries) and %d (keys) but is observed "
                               "on %d",
                               (int)l, (int)layers[l].queries.device_id,
                               (int)layers[l].keys.device_id, (int)observer->device_id);
            goto done;
        }
    }
    const krul_estimator_sums any = {.received_stride = INT64_MAX}; /* they grow */
    KRUL_TRY(krul_device_observe_plan(layers, observer->n_layers, row_positions, n_rows,
                                      key_is_real, n_keys_total, weight, &any, &plan, err));
    KRUL_TRY(krul_station_take(krul_device_pool_shelf(observer->pool), observer->device_id,
                               &station, err));
    if (observer->memory == NULL || observer->stride < n_keys_total) {
        KRUL_TRY(grow(observer, station, n_keys_total, err));
    }
    KRUL_TRY(krul_station_reserve(station, plan.image_bytes, plan.workspace_bytes, err));
    krul_device_observe_fill(&plan, layers, row_positions, key_is_real, station->pinned);
    KRUL_TRY(krul_station_follow(station, events, n_events, err));
    places at = {.n_bytes = 0};
    bool overflows = place_overflows(observer->n_layers, observer->stride, &at);
    assert(!overflows);
    (void)overflows;
    krul_estimator_sums sums = sums_in(observer->memory, &at, observer->stride, &observer->n_rows);
    plan.received_stride = observer->stride;
    observer->n_tokens = krul_max_i64(observer->n_tokens, n_keys_total);
    status = ops->observe(station->device, station->stream, &plan, station->pinned, station->memory,
                          &sums, &failure);
    if (status == KRUL_STATUS_OK) {
        status = krul_station_wait(station, &failure);
    }
    if (status != KRUL_STATUS_OK) { /* some of it may have been added */
        status = lose_sums(observer, &failure, err);
    }
done:
    pthread_mutex_unlock(&observer->lock);
    krul_station_give(station);
    return status;
}

/* Add the host's copy of the sums to the caller's. */
static void
add_sums(const krul_observer *observer, const krul_estimator_sums *held, krul_estimator_sums *sums)
{
    size_t n_layers = (size_t)observer->n_layers;
    for (size_t i = 0; i < n_layers * n_layers; i++) {
        sums->distances[i] += held->distances[i];
    }
    for (size_t i = 0; i < 2 * n_layers; i++) {
        sums->importance[i] += held->importance[i];
    }
    for (int64_t layer = 0; layer < observer->n_layers; layer++) {
        const float *from = held->received + layer * observer->stride;
        float *to = sums->received + layer * sums->received_stride;
        for (int64_t i = 0; i < observer->n_tokens; i++) {
            to[i] += from[i];
        }
    }
    *sums->n_rows += observer->n_rows;
}

krul_status
krul_observer_read(krul_observer *observer, krul_estimator_sums *sums, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_station *station = NULL;
    krul_error failure = {.status = KRUL_STATUS_OK};
    places at = {.n_bytes = 0};
    pthread_mutex_lock(&observer->lock);
    if (observer->failure.status != KRUL_STATUS_OK) {
        status = krul_fail(err, KRUL_STATUS_DEVICE, "%s", observer->failure.message);
        goto done;
    }
    if (observer->memory == NULL) {
        goto done;
    }
    if (sums->received_stride < observer->n_tokens) {
        status = krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                           "received holds %lld tokens but there are %lld",
                           (long long)sums->received_stride, (long long)observer->n_tokens);
        goto done;
    }
    bool overflows = place_overflows(observer->n_layers, observer->stride, &at);
    assert(!overflows);
    (void)overflows;
    KRUL_TRY(krul_station_take(krul_device_pool_shelf(observer->pool), observer->device_id,
                               &station, err));
    KRUL_TRY(krul_station_reserve(station, 2 * at.n_bytes, 0, err));
    memset(station->pinned + at.n_bytes, 0, at.n_bytes);
    const krul_device_ops *ops = station->ops;
    status = ops->copy_out(station->device, station->stream, station->pinned, observer->memory,
                           at.n_bytes, &failure);
    if (status == KRUL_STATUS_OK) {
        status = ops->copy_in(station->device, station->stream, observer->memory,
                              station->pinned + at.n_bytes, at.n_bytes, &failure);
    }
    if (status == KRUL_STATUS_OK) {
        status = krul_station_wait(station, &failure);
    }
    if (status != KRUL_STATUS_OK) { /* they may be cleared by now */
        status = krul_station_note(station, KRUL_STATUS_DEVICE);
        (void)lose_sums(observer, &failure, err);
        goto done;
    }
    krul_estimator_sums held = sums_in(station->pinned, &at, observer->stride, NULL);
    add_sums(observer, &held, sums);
    observer->n_rows = 0;
    observer->n_tokens = 0;
done:
    pthread_mutex_unlock(&observer->lock);
    krul_station_give(station);
    return status;
}

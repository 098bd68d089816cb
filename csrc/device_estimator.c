/* device_estimator.c - observing attention on a device: arguments checked, sizes found, image filled. */
#include <string.h>

#include "device_estimator.h"
#include "estimator.h"
#include "internal.h"

enum { ALIGNMENT = 256, WIDE_BYTES = 16, MAX_KEY_BLOCKS = 1024 };

/* Take n x m elements from the running total of bytes; gives their offset. */
static bool
reserve_overflows(size_t *n_bytes, int64_t count, int64_t times, size_t element_bytes,
                  uint64_t *at_out)
{
    size_t n_elements, n_more;
    *at_out = *n_bytes;
    return krul_multiply_overflows((size_t)count, (size_t)times, &n_elements) ||
           krul_multiply_overflows(n_elements, element_bytes, &n_more) ||
           krul_add_overflows(n_more, ALIGNMENT - 1, &n_more) ||
           krul_add_overflows(*n_bytes, n_more & ~(size_t)(ALIGNMENT - 1), n_bytes);
}

/* Is the layer observed at all, and has it as many heads as another one? */
static bool
is_member(const krul_estimator_layer *layer, const krul_estimator_layer *other)
{
    return layer->queries.data != NULL && layer->queries.shape[1] == other->queries.shape[1];
}

/* Is this the first layer with its number of heads? */
static bool
is_leader(const krul_estimator_layer *layers, int32_t index)
{
    bool is_first = layers[index].queries.data != NULL && layers[index].queries.shape[1] > 0;
    for (int32_t l = 0; is_first && l < index; l++) {
        is_first = !is_member(&layers[l], &layers[index]);
    }
    return is_first;
}

/* Shared memory of a thread block; see estimator.cu. */
static size_t
shared_bytes_of(const krul_device_observe_group *group, int32_t n_key_groups)
{
    size_t n_members = (size_t)group->n_members;
    size_t n_keys = (size_t)(n_key_groups * KRUL_DEVICE_KEYS_AT_ONCE);
    size_t n_pairs = KRUL_DEVICE_LAYERS_AT_ONCE * KRUL_DEVICE_LAYERS_AT_ONCE;
    return (size_t)group->n_layer_blocks * n_pairs * sizeof(double) +
           n_members * 2 * sizeof(double) +
           n_members * n_keys * (KRUL_DEVICE_LANES + 1) * sizeof(float);
}

/* How the work of a group is cut, and where its parts lie behind the image. */
static krul_status
plan_group(krul_device_observation *plan, krul_device_observe_group *group, size_t *n_bytes,
           krul_error *err)
{
    int64_t n_members = group->n_members, n_runs = group->n_heads / group->heads_at_once;
    int64_t n_lanes, n_lane_tiles;
    int64_t n_layers = (n_members + KRUL_DEVICE_LAYERS_AT_ONCE - 1) / KRUL_DEVICE_LAYERS_AT_ONCE;
    int64_t n_layer_blocks = n_layers * (n_layers + 1) / 2;
    if (n_members > UINT16_MAX || n_layer_blocks > INT32_MAX ||
        krul_multiply_overflows_i64(plan->n_rows, group->heads_at_once, &n_lanes) ||
        krul_multiply_overflows_i64((n_lanes + KRUL_DEVICE_LANES - 1) / KRUL_DEVICE_LANES, n_runs,
                                    &n_lane_tiles) ||
        n_lane_tiles > INT32_MAX / KRUL_DEVICE_LANES || plan->n_batch > UINT16_MAX) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%d rows of %d heads, %d batch entries and %lld layers are too many",
                         (int)plan->n_rows, (int)group->n_heads, (int)plan->n_batch,
                         (long long)n_members);
    }
    group->n_blocks = (int32_t)((n_lanes + KRUL_DEVICE_LANES - 1) / KRUL_DEVICE_LANES);
    group->n_lane_tiles = (int32_t)n_lane_tiles;
    group->n_layer_blocks = (int32_t)n_layer_blocks;
    group->n_key_groups = KRUL_DEVICE_MAX_KEY_GROUPS;
    while (group->n_key_groups > 1 &&
           shared_bytes_of(group, group->n_key_groups) > KRUL_DEVICE_SHARED_BYTES) {
        group->n_key_groups /= 2;
    }
    group->shared_bytes = shared_bytes_of(group, group->n_key_groups);
    if (group->shared_bytes > KRUL_DEVICE_SHARED_BYTES) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "%d layers need %zu bytes of shared memory, more than %d",
                         (int)group->n_members, group->shared_bytes, (int)KRUL_DEVICE_SHARED_BYTES);
    }
    int64_t n_keys = group->n_key_groups * KRUL_DEVICE_KEYS_AT_ONCE;
    int64_t n_key_tiles = (plan->n_seen + n_keys - 1) / n_keys;
    group->n_key_tiles = (int32_t)n_key_tiles;
    group->n_key_blocks = (int32_t)krul_min_i64(n_key_tiles, MAX_KEY_BLOCKS);
    int64_t n_splits = KRUL_DEVICE_OBSERVE_BLOCKS / (group->n_key_blocks * (int64_t)plan->n_batch);
    group->n_splits = (int32_t)krul_max_i64(1, krul_min_i64(n_splits, n_lane_tiles));
    int64_t n_thread_blocks = (int64_t)group->n_key_blocks * group->n_splits * plan->n_batch;
    size_t n_own = plan->image_bytes;
    const int64_t n_pairs = KRUL_DEVICE_LAYERS_AT_ONCE * KRUL_DEVICE_LAYERS_AT_ONCE;
    if (reserve_overflows(&n_own, n_members * plan->n_batch, n_lane_tiles * KRUL_DEVICE_LANES,
                          2 * sizeof(float), &group->rows_at) ||
        reserve_overflows(&n_own, n_thread_blocks, n_layer_blocks * n_pairs, sizeof(double),
                          &group->distances_at) ||
        reserve_overflows(&n_own, n_thread_blocks, 2 * n_members, sizeof(double),
                          &group->importance_at) ||
        reserve_overflows(&n_own, (int64_t)plan->n_batch * group->n_splits,
                          n_members * plan->n_seen, sizeof(float), &group->received_at)) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "%lld layers and %d keys are too many",
                         (long long)n_members, (int)plan->n_seen);
    }
    *n_bytes = n_own > *n_bytes ? n_own : *n_bytes; /* groups take turns */
    return KRUL_STATUS_OK;
}

krul_status
krul_device_observe_plan(const krul_estimator_layer *layers, int32_t n_layers,
                         const int64_t *row_positions, int64_t n_rows, const uint8_t *key_is_real,
                         int64_t n_keys_total, double weight, const krul_estimator_sums *sums,
                         krul_device_observation *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int32_t first = -1;
    size_t n_bytes = ALIGNMENT; /* a place of 0 means that there is none */
    krul_device_observation plan = {0};
    KRUL_TRY(krul_estimator_check(layers, n_layers, KRUL_DEVICE_CUDA, row_positions, n_rows,
                                  n_keys_total, weight, sums, &first, err));
    plan.n_layers = n_layers;
    plan.n_rows = (int32_t)n_rows;
    plan.n_keys_total = (int32_t)n_keys_total;
    plan.received_stride = sums->received_stride;
    plan.weight = weight;
    plan.n_batch = 0;
    if (first >= 0 && n_rows > 0) {
        int64_t n_batch = layers[first].queries.shape[0];
        if (n_batch > UINT16_MAX) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "%lld batch entries are too many",
                             (long long)n_batch);
        }
        plan.n_batch = (int32_t)n_batch;
    }
    for (int32_t l = 0; l < n_layers; l++) {
        const int64_t *shape = layers[l].queries.shape;
        if (layers[l].queries.data != NULL &&
            (shape[1] > KRUL_STORE_MAX_EXTENT || shape[3] > KRUL_STORE_MAX_EXTENT)) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "layer %d has %lld heads of %lld numbers",
                             (int)l, (long long)shape[1], (long long)shape[3]);
        }
    }
    for (int64_t r = 0; r < n_rows; r++) {
        plan.n_seen = (int32_t)krul_max_i64(plan.n_seen, row_positions[r] + 1);
        for (int64_t b = 0; b < plan.n_batch; b++) {
            plan.n_real_rows += key_is_real == NULL ||
                                key_is_real[b * n_keys_total + row_positions[r]] != 0;
        }
    }
    bool fits = !reserve_overflows(&n_bytes, n_layers, 1, sizeof(int32_t), &plan.classes_at) &&
                !reserve_overflows(&n_bytes, plan.n_batch, n_rows, sizeof(int32_t),
                                   &plan.positions_at) &&
                !reserve_overflows(&n_bytes, plan.n_batch, 1, sizeof(int32_t), &plan.first_real_at);
    if (key_is_real != NULL) {
        fits = fits && !reserve_overflows(&n_bytes, plan.n_batch, n_keys_total, 1, &plan.real_at);
    }
    for (int32_t l = 0; l < n_layers && plan.n_batch > 0; l++) {
        uint64_t unused;
        if (is_leader(layers, l)) {
            if (plan.n_groups == KRUL_DEVICE_MAX_GROUPS) {
                return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                                 "layers have more than %d different numbers of heads",
                                 (int)KRUL_DEVICE_MAX_GROUPS);
            }
            krul_device_observe_group *group = &plan.groups[plan.n_groups++];
            for (int32_t u = l; u < n_layers; u++) {
                group->n_members += is_member(&layers[u], &layers[l]);
            }
            fits = fits && !reserve_overflows(&n_bytes, group->n_members, 1,
                                              sizeof(krul_device_observed), &group->members_at);
        }
        if (layers[l].queries.data != NULL && layers[l].queries.shape[1] > 0) {
            int64_t n_starts = layers[l].row_starts == NULL ? 0 : plan.n_batch * n_rows;
            int64_t n_sinks = layers[l].sinks == NULL ? 0 : layers[l].queries.shape[1];
            fits = fits && !reserve_overflows(&n_bytes, n_starts, 1, sizeof(int32_t), &unused) &&
                   !reserve_overflows(&n_bytes, n_sinks, 1, sizeof(float), &unused);
        }
    }
    if (!fits) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "%d layers and %lld rows are too many",
                         (int)n_layers, (long long)n_rows);
    }
    plan.image_bytes = plan.workspace_bytes = n_bytes;
    for (int32_t l = 0, g = 0; l < n_layers && plan.n_batch > 0; l++) {
        if (is_leader(layers, l)) {
            krul_device_observe_group *group = &plan.groups[g++];
            int64_t n_at_once = 0;
            for (int32_t u = l; u < n_layers; u++) {
                if (is_member(&layers[u], &layers[l])) {
                    n_at_once = krul_estimator_heads_at_once(&layers[u], n_at_once);
                }
            }
            group->n_heads = (int32_t)layers[l].queries.shape[1];
            group->heads_at_once = (int32_t)n_at_once;
            KRUL_TRY(plan_group(&plan, group, &plan.workspace_bytes, err));
        }
    }
    *out = plan;
done:
    return status;
}

/* May 16 bytes be read anywhere where a row has that many left, and are there never fewer? */
static bool
is_wide(const krul_view *view)
{
    size_t element_bytes = krul_dtype_bytes(view->dtype);
    uint64_t places = (uint64_t)(uintptr_t)view->data;
    places |= (uint64_t)view->shape[3] * element_bytes;
    for (int axis = 0; axis < 3; axis++) {
        places |= view->shape[axis] > 1 ? (uint64_t)view->stride[axis] * element_bytes : 0;
    }
    return places % WIDE_BYTES == 0;
}

static uint64_t
take(uint64_t *at, int64_t n_elements, size_t element_bytes)
{
    uint64_t here = *at;
    uint64_t n_bytes = (uint64_t)n_elements * element_bytes;
    *at += (n_bytes + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1);
    return here;
}

/* Fill in one layer, and its starts and sinks at *at, as they were counted. */
static void
fill_layer(const krul_device_observation *plan, const krul_estimator_layer *layer, int32_t index,
           uint8_t *image, uint64_t *at, krul_device_observed *out)
{
    const krul_view *queries = &layer->queries, *keys = &layer->keys;
    int64_t n_starts = layer->row_starts == NULL ? 0 : (int64_t)plan->n_batch * plan->n_rows;
    int64_t n_sinks = layer->sinks == NULL ? 0 : queries->shape[1];
    uint64_t starts_at = take(at, n_starts, sizeof(int32_t));
    uint64_t sinks_at = take(at, n_sinks, sizeof(float));
    *out = (krul_device_observed){
        .queries = queries->data,
        .keys = keys->data,
        .starts_at = n_starts > 0 ? starts_at : 0,
        .sinks_at = n_sinks > 0 ? sinks_at : 0,
        .query_dtype = (int32_t)queries->dtype,
        .key_dtype = (int32_t)keys->dtype,
        .head_dim = (int32_t)queries->shape[3],
        .heads_per_kv = (int32_t)(queries->shape[1] / keys->shape[1]),
        .key_start = (int32_t)layer->key_start,
        .n_keys = (int32_t)keys->shape[2],
        .layer = index,
        .is_wide = is_wide(queries) && is_wide(keys),
        .scaling = layer->scaling,
        .softcap = layer->softcap,
    };
    memcpy(out->query_stride, queries->stride, sizeof out->query_stride);
    memcpy(out->key_stride, keys->stride, sizeof out->key_stride);
    for (int64_t i = 0; i < n_starts; i++) {
        int32_t start = (int32_t)layer->row_starts[i];
        memcpy(image + starts_at + (size_t)i * sizeof start, &start, sizeof start);
    }
    if (n_sinks > 0) {
        memcpy(image + sinks_at, layer->sinks, (size_t)n_sinks * sizeof(float));
    }
}

void
krul_device_observe_fill(const krul_device_observation *observation,
                         const krul_estimator_layer *layers, const int64_t *row_positions,
                         const uint8_t *key_is_real, uint8_t *image)
{
    const krul_device_observation *plan = observation;
    int32_t *classes = (int32_t *)(void *)(image + plan->classes_at);
    int32_t *positions = (int32_t *)(void *)(image + plan->positions_at);
    int32_t *first_real = (int32_t *)(void *)(image + plan->first_real_at);
    memset(image, 0, plan->image_bytes);
    for (int64_t b = 0; b < plan->n_batch; b++) {
        const uint8_t *is_real = key_is_real == NULL ? NULL : key_is_real + b * plan->n_keys_total;
        first_real[b] = (int32_t)krul_estimator_first_real(is_real, plan->n_keys_total);
        for (int64_t r = 0; r < plan->n_rows; r++) {
            bool is_row = is_real == NULL || is_real[row_positions[r]] != 0;
            positions[b * plan->n_rows + r] = is_row ? (int32_t)row_positions[r] : -1;
        }
    }
    if (key_is_real != NULL) {
        memcpy(image + plan->real_at, key_is_real,
               (size_t)plan->n_batch * (size_t)plan->n_keys_total);
    }
    for (int32_t l = 0; l < plan->n_layers; l++) {
        classes[l] = -1;
    }
    /* In the order in which the plan counted: leaders' members, then every layer's arrays. */
    uint64_t at = plan->first_real_at;
    (void)take(&at, plan->n_batch, sizeof(int32_t));
    if (key_is_real != NULL) {
        (void)take(&at, (int64_t)plan->n_batch * plan->n_keys_total, 1);
    }
    for (int32_t l = 0, g = 0; l < plan->n_layers && plan->n_batch > 0; l++) {
        if (is_leader(layers, l)) {
            (void)take(&at, plan->groups[g].n_members, sizeof(krul_device_observed));
            for (int32_t u = l; u < plan->n_layers; u++) {
                if (is_member(&layers[u], &layers[l])) {
                    classes[u] = g;
                }
            }
            g++;
        }
        if (classes[l] >= 0) {
            int32_t own = 0; /* among the members */
            for (int32_t earlier = 0; earlier < l; earlier++) {
                own += classes[earlier] == classes[l];
            }
            krul_device_observed *members =
                (krul_device_observed *)(void *)(image + plan->groups[classes[l]].members_at);
            fill_layer(plan, &layers[l], l, image, &at, &members[own]);
        }
    }
}

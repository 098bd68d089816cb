/* estimator.c - how alike two layers attend, and to what.
 *
 * The softmax rows of all layers for the same few queries are computed together, compared, summed
 * and dropped. A tile is KRUL_ESTIMATOR_LANES queries (rows, and heads that share a KV head) of one
 * batch entry, with all their keys, of every layer. When a tile does not fit the scratch, the keys
 * are taken in chunks: once for the softmax's divisor, once more for the rows.
 *
 * Tiles run in parallel and are added to the sums strictly in order, so that results do not depend
 * on the number of threads. Layers with different numbers of heads have no common rows: each such
 * number is a group of its own, and distances across groups are NaN. */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "dtype.h"
#include "estimator.h"
#include "internal.h"

enum {
    LANES = KRUL_ESTIMATOR_LANES,
    MIN_CHUNK_KEYS = 64,
    ALIASING_FLOATS = 1024, /* layers a power of two apart would share the same few cache sets */
    PADDING_FLOATS = 256,
};

/* One call, as its workers see it. */
typedef struct observation {
    const krul_backend *backend;
    const krul_estimator_layer *layers;
    int32_t n_layers;
    const int64_t *row_positions;
    int64_t n_rows;
    const uint8_t *key_is_real; /* or NULL */
    int64_t n_keys_total;
    const int64_t *first_real; /* of each batch entry */
    double weight;
    krul_estimator_sums *sums;

    /* The group at work: layers with one number of heads. */
    const int32_t *members;
    int32_t n_members;
    int64_t n_batch;
    int64_t n_heads;
    int64_t n_heads_at_once; /* divides the heads per KV head of every member */
    int64_t n_blocks; /* tiles per batch entry and run of heads */
    int64_t n_tiles;
    int64_t chunk_keys;
    int64_t layer_stride;

    atomic_llong next_tile;
    pthread_mutex_t lock;
    pthread_cond_t has_advanced;
    int64_t next_to_add; /* under lock */
} observation;

/* One worker's scratch, carved from one allocation. */
typedef struct worker {
    observation *shared;
    double *distances; /* n_members x n_members */
    double *importance; /* n_members x 2 */
    float *tile; /* n_members x layer_stride */
    float *received; /* n_members x n_keys_total */
    float *queries; /* n_members x head_dim (largest) x LANES */
    float *widened; /* KRUL_ESTIMATOR_SCRATCH_KEYS x head_dim */
    float *lane_max; /* n_members x LANES */
    float *lane_sum; /* n_members x LANES */
    int32_t *lane_first; /* n_members x LANES: first position seen */
    int64_t *range_start; /* n_members: the least of lane_first */
    int64_t max_head_dim;
    int64_t batch;
    int64_t head_start;
    int64_t tile_start; /* positions that any lane of any layer sees */
    int64_t tile_end;
    int32_t lane_last[LANES];
    void *allocation;
} worker;

static float
read_element(const krul_view *view, int64_t index)
{
    if (view->dtype == KRUL_DTYPE_F32) {
        return ((const float *)view->data)[index];
    }
    uint16_t bits = ((const uint16_t *)view->data)[index];
    return view->dtype == KRUL_DTYPE_BF16 ? krul_bf16_to_f32(bits) : krul_f16_to_f32(bits);
}

static int64_t
greatest_common_divisor(int64_t left, int64_t right)
{
    while (right != 0) {
        int64_t rest = left % right;
        left = right;
        right = rest;
    }
    return left;
}

int64_t
krul_estimator_heads_at_once(const krul_estimator_layer *layer, int64_t n_at_once)
{
    return greatest_common_divisor(layer->queries.shape[1] / layer->keys.shape[1], n_at_once);
}

int64_t
krul_estimator_first_real(const uint8_t *key_is_real, int64_t n_keys_total)
{
    int64_t first = 0;
    while (key_is_real != NULL && first < n_keys_total && key_is_real[first] == 0) {
        first++;
    }
    return first;
}

/* Lay out the tile's queries lane by lane and note what each lane may see. */
static void
gather_tile(worker *self, int64_t tile)
{
    const observation *shared = self->shared;
    int64_t block = tile % shared->n_blocks;
    int64_t n_runs = shared->n_heads / shared->n_heads_at_once;
    self->batch = tile / shared->n_blocks / n_runs;
    self->head_start = tile / shared->n_blocks % n_runs * shared->n_heads_at_once;
    self->tile_start = INT64_MAX;
    self->tile_end = 0;
    for (int32_t m = 0; m < shared->n_members; m++) {
        const krul_estimator_layer *layer = &shared->layers[shared->members[m]];
        const krul_view *queries = &layer->queries;
        int64_t head_dim = queries->shape[3];
        float *packed = self->queries + m * self->max_head_dim * LANES;
        self->range_start[m] = INT64_MAX;
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t index = block * LANES + lane;
            int64_t row = index / shared->n_heads_at_once;
            int64_t head = self->head_start + index % shared->n_heads_at_once;
            int64_t position = row < shared->n_rows ? shared->row_positions[row] : -1;
            if (position >= 0 && shared->key_is_real != NULL &&
                shared->key_is_real[self->batch * shared->n_keys_total + position] == 0) {
                position = -1; /* the query itself is padding */
            }
            self->lane_max[m * LANES + lane] = -INFINITY;
            self->lane_sum[m * LANES + lane] = 0;
            self->lane_last[lane] = (int32_t)position;
            self->lane_first[m * LANES + lane] = INT32_MAX;
            if (position < 0) {
                for (int64_t d = 0; d < head_dim; d++) {
                    packed[d * LANES + lane] = 0;
                }
                continue;
            }
            int64_t offset = self->batch * queries->stride[0] + head * queries->stride[1] +
                             row * queries->stride[2];
            for (int64_t d = 0; d < head_dim; d++) {
                packed[d * LANES + lane] = read_element(queries, offset + d);
            }
            int64_t first = layer->row_starts == NULL
                                ? 0
                                : layer->row_starts[self->batch * shared->n_rows + row];
            first = krul_max_i64(first, shared->first_real[self->batch]);
            self->lane_first[m * LANES + lane] = (int32_t)first;
            self->range_start[m] = krul_min_i64(self->range_start[m], first);
            self->tile_end = krul_max_i64(self->tile_end, position + 1);
            if (layer->sinks != NULL) {
                self->lane_max[m * LANES + lane] = layer->sinks[head];
                self->lane_sum[m * LANES + lane] = 1;
            }
        }
        self->tile_start = krul_min_i64(self->tile_start, self->range_start[m]);
    }
    self->tile_start = krul_min_i64(self->tile_start, self->tile_end);
}

/* Scores of one layer for the positions [start, end), into the tile as if it began at start. Only
 * [*from, *to), what the layer holds and some lane sees, is written. */
static void
score_chunk(worker *self, int32_t member, int64_t start, int64_t end, int64_t *from, int64_t *to)
{
    const observation *shared = self->shared;
    const krul_estimator_layer *layer = &shared->layers[shared->members[member]];
    const krul_view *keys = &layer->keys;
    *from = krul_max_i64(krul_max_i64(start, self->range_start[member]), layer->key_start);
    *to = krul_min_i64(end, layer->key_start + keys->shape[2]);
    if (*from >= *to) {
        *from = *to = start;
        return;
    }
    int64_t kv_head = self->head_start / (shared->n_heads / keys->shape[1]);
    int64_t offset = self->batch * keys->stride[0] + kv_head * keys->stride[1] +
                     (*from - layer->key_start) * keys->stride[2];
    const uint8_t *first_key = (const uint8_t *)keys->data +
                               offset * (int64_t)krul_dtype_bytes(keys->dtype);
    float *scores = self->tile + member * shared->layer_stride + (*from - start) * LANES;
    const uint8_t *key_is_real = shared->key_is_real;
    if (key_is_real != NULL) {
        key_is_real += self->batch * shared->n_keys_total + *from;
    }
    shared->backend->estimator_scores(
        keys->dtype, first_key, keys->stride[2], *to - *from, keys->shape[3],
        self->queries + member * self->max_head_dim * LANES, self->widened, scores);
    shared->backend->estimator_mask(
        scores, *to - *from, (int32_t)*from, key_is_real, self->lane_first + member * LANES,
        self->lane_last, layer->scaling, layer->softcap, self->lane_max + member * LANES);
}

/* Score a chunk, and turn the scores into unscaled powers that lane_sum has seen. */
static void
begin_chunk(worker *self, int32_t member, int64_t start, int64_t end, int64_t *from, int64_t *to)
{
    float *lane_max = self->lane_max + member * LANES;
    float *lane_sum = self->lane_sum + member * LANES;
    float old_max[LANES];
    memcpy(old_max, lane_max, sizeof old_max);
    score_chunk(self, member, start, end, from, to);
    for (int lane = 0; lane < LANES; lane++) {
        if (lane_sum[lane] != 0 && lane_max[lane] != old_max[lane]) {
            lane_sum[lane] *= expf(old_max[lane] - lane_max[lane]);
        }
    }
    self->shared->backend->estimator_exp(self->tile + member * self->shared->layer_stride +
                                             (*from - start) * LANES,
                                         *to - *from, lane_max, lane_sum);
}

/* Scale a chunk's powers to rows, zero what was not computed, and add up the mass. */
static void
finish_chunk(worker *self, int32_t member, int64_t start, int64_t end, int64_t from, int64_t to)
{
    const observation *shared = self->shared;
    float *rows = self->tile + member * shared->layer_stride;
    float factor[LANES];
    int32_t early_first[LANES], early_last[LANES], late_first[LANES];
    int64_t early_end = 0;
    int64_t late_start = INT64_MAX;
    int64_t first_real = shared->first_real[self->batch];
    for (int lane = 0; lane < LANES; lane++) {
        float sum = self->lane_sum[member * LANES + lane];
        factor[lane] = sum == 0 ? 0 : 1 / sum;
        int64_t last = self->lane_last[lane];
        int64_t n_tenth = krul_max_i64(1, (last - first_real + 1) / 10);
        early_first[lane] = (int32_t)first_real;
        early_last[lane] = (int32_t)(last < 0 ? -1 : first_real + n_tenth - 1);
        late_first[lane] = (int32_t)(last < 0 ? INT32_MAX : last - n_tenth + 1);
        early_end = krul_max_i64(early_end, early_last[lane] + (int64_t)1);
        late_start = krul_min_i64(late_start, late_first[lane]);
    }
    memset(rows, 0, (size_t)((from - start) * LANES) * sizeof(float));
    memset(rows + (to - start) * LANES, 0, (size_t)((end - to) * LANES) * sizeof(float));
    if (from == to) {
        return;
    }
    rows += (from - start) * LANES;
    shared->backend->estimator_scale(rows, to - from, factor,
                                     self->received + member * shared->n_keys_total + from);
    if (from < early_end) {
        self->importance[member * 2] += shared->backend->estimator_mass(
            rows, krul_min_i64(to, early_end) - from, (int32_t)from, early_first, early_last);
    }
    late_start = krul_max_i64(late_start, from);
    if (late_start < to) {
        self->importance[member * 2 + 1] += shared->backend->estimator_mass(
            rows + (late_start - from) * LANES, to - late_start, (int32_t)late_start, late_first,
            self->lane_last);
    }
}

static void
compute_tile(worker *self)
{
    const observation *shared = self->shared;
    int64_t n_members = shared->n_members;
    memset(self->distances, 0, (size_t)(n_members * n_members) * sizeof(double));
    memset(self->importance, 0, (size_t)n_members * 2 * sizeof(double));
    for (int64_t m = 0; m < n_members; m++) {
        memset(self->received + m * shared->n_keys_total, 0,
               (size_t)self->tile_end * sizeof(float));
    }
    int64_t from, to;
    bool is_one_chunk = self->tile_end - self->tile_start <= shared->chunk_keys;
    if (!is_one_chunk) { /* the divisors first */
        for (int32_t m = 0; m < shared->n_members; m++) {
            for (int64_t start = self->tile_start; start < self->tile_end;
                 start += shared->chunk_keys) {
                int64_t end = krul_min_i64(start + shared->chunk_keys, self->tile_end);
                begin_chunk(self, m, start, end, &from, &to);
            }
        }
    }
    for (int64_t start = self->tile_start; start < self->tile_end; start += shared->chunk_keys) {
        int64_t end = krul_min_i64(start + shared->chunk_keys, self->tile_end);
        for (int32_t m = 0; m < shared->n_members; m++) {
            if (is_one_chunk) {
                begin_chunk(self, m, start, end, &from, &to);
            }
            else {
                float seen_before[LANES] = {0};
                score_chunk(self, m, start, end, &from, &to);
                shared->backend->estimator_exp(self->tile + m * shared->layer_stride +
                                                   (from - start) * LANES,
                                               to - from, self->lane_max + m * LANES, seen_before);
            }
            finish_chunk(self, m, start, end, from, to);
        }
        shared->backend->estimator_distances(self->tile, shared->layer_stride, shared->n_members,
                                             (end - start) * LANES, self->distances);
    }
}

static void
add_tile(const worker *self)
{
    const observation *shared = self->shared;
    const krul_estimator_sums *sums = shared->sums;
    int64_t n_members = shared->n_members;
    float weight = (float)shared->weight;
    for (int64_t m = 0; m < n_members; m++) {
        int64_t layer = shared->members[m];
        for (int64_t u = m + 1; u < n_members; u++) {
            double squared = shared->weight * self->distances[m * n_members + u];
            sums->distances[layer * shared->n_layers + shared->members[u]] += squared;
            sums->distances[shared->members[u] * (int64_t)shared->n_layers + layer] += squared;
        }
        for (int i = 0; i < 2; i++) {
            sums->importance[layer * 2 + i] += shared->weight * self->importance[m * 2 + i] /
                                               (double)shared->n_heads;
        }
        float *received_out = sums->received + layer * sums->received_stride;
        const float *received = self->received + m * shared->n_keys_total;
        for (int64_t k = self->tile_start; k < self->tile_end; k++) {
            received_out[k] += weight * received[k];
        }
    }
}

/* Take tiles until none is left; add each when all before it have been added. */
static void
run_worker(void *argument)
{
    worker *self = argument;
    observation *shared = self->shared;
    for (;;) {
        int64_t tile = atomic_fetch_add(&shared->next_tile, 1);
        if (tile >= shared->n_tiles) {
            return;
        }
        gather_tile(self, tile);
        compute_tile(self);
        pthread_mutex_lock(&shared->lock);
        while (shared->next_to_add != tile) {
            pthread_cond_wait(&shared->has_advanced, &shared->lock);
        }
        pthread_mutex_unlock(&shared->lock); /* the turn is ours until it is passed on */
        add_tile(self);
        pthread_mutex_lock(&shared->lock);
        shared->next_to_add++;
        pthread_cond_broadcast(&shared->has_advanced);
        pthread_mutex_unlock(&shared->lock);
    }
}

/* Take n x m elements from the running total of bytes; returns their offset. */
static bool
reserve_overflows(size_t *n_bytes, int64_t count, int64_t times, size_t element_bytes,
                  size_t *offset_out)
{
    size_t n_elements, n_more;
    *offset_out = *n_bytes;
    return krul_multiply_overflows((size_t)count, (size_t)times, &n_elements) ||
           krul_multiply_overflows(n_elements, element_bytes, &n_more) ||
           krul_add_overflows(n_more, 63, &n_more) ||
           krul_add_overflows(*n_bytes, n_more & ~(size_t)63, n_bytes);
}

static krul_status
worker_init(worker *self, observation *shared, int64_t max_head_dim, krul_error *err)
{
    size_t n_bytes = 0;
    size_t distances, importance, tile, received, queries, widened, lanes, starts;
    int64_t n_members = shared->n_members;
    if (reserve_overflows(&n_bytes, n_members, n_members, sizeof(double), &distances) ||
        reserve_overflows(&n_bytes, n_members, 2, sizeof(double), &importance) ||
        reserve_overflows(&n_bytes, n_members, shared->layer_stride, sizeof(float), &tile) ||
        reserve_overflows(&n_bytes, n_members, shared->n_keys_total, sizeof(float), &received) ||
        reserve_overflows(&n_bytes, n_members * LANES, max_head_dim, sizeof(float), &queries) ||
        reserve_overflows(&n_bytes, KRUL_ESTIMATOR_SCRATCH_KEYS, max_head_dim, sizeof(float),
                          &widened) ||
        reserve_overflows(&n_bytes, n_members, 3 * LANES, sizeof(float), &lanes) ||
        reserve_overflows(&n_bytes, n_members, 1, sizeof(int64_t), &starts) ||
        krul_add_overflows(n_bytes, 64, &n_bytes) || /* to align the first */
        (self->allocation = malloc(n_bytes)) == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY,
                         "the estimator's scratch for %lld layers and %lld keys needs %zu bytes",
                         (long long)n_members, (long long)shared->n_keys_total, n_bytes);
    }
    uint8_t *base = self->allocation;
    base += 64 - (uintptr_t)base % 64;
    self->shared = shared;
    self->max_head_dim = max_head_dim;
    self->distances = (double *)(void *)(base + distances);
    self->importance = (double *)(void *)(base + importance);
    self->tile = (float *)(void *)(base + tile);
    self->received = (float *)(void *)(base + received);
    self->queries = (float *)(void *)(base + queries);
    self->widened = (float *)(void *)(base + widened);
    self->lane_max = (float *)(void *)(base + lanes);
    self->lane_sum = self->lane_max + n_members * LANES;
    self->lane_first = (int32_t *)(void *)(self->lane_sum + n_members * LANES);
    self->range_start = (int64_t *)(void *)(base + starts);
    return KRUL_STATUS_OK;
}

/* Observe the layers shared->members, which have one number of heads. */
static krul_status
observe_group(observation *shared, size_t tile_bytes, int n_threads, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_estimator_layer *first = &shared->layers[shared->members[0]];
    int64_t max_head_dim = 0;
    worker *workers = NULL;
    int n_workers = n_threads > 0 ? n_threads : krul_pool_n_processors();
    shared->n_batch = first->queries.shape[0];
    shared->n_heads = first->queries.shape[1];
    shared->n_heads_at_once = 0;
    for (int32_t m = 0; m < shared->n_members; m++) {
        const krul_estimator_layer *layer = &shared->layers[shared->members[m]];
        shared->n_heads_at_once = krul_estimator_heads_at_once(layer, shared->n_heads_at_once);
        max_head_dim = krul_max_i64(max_head_dim, layer->queries.shape[3]);
    }
    shared->n_blocks = (shared->n_rows * shared->n_heads_at_once + LANES - 1) / LANES;
    shared->n_tiles = shared->n_batch * (shared->n_heads / shared->n_heads_at_once) *
                      shared->n_blocks;
    n_workers = (int)krul_min_i64(krul_min_i64(n_workers, KRUL_POOL_MAX_THREADS), shared->n_tiles);

    size_t key_bytes = (size_t)shared->n_members * LANES * sizeof(float);
    size_t chunk_keys = tile_bytes / (size_t)n_workers / key_bytes;
    shared->chunk_keys = krul_min_i64(
        krul_max_i64(MIN_CHUNK_KEYS, (int64_t)(chunk_keys & (size_t)INT64_MAX)),
        krul_max_i64(1, shared->n_keys_total));
    shared->layer_stride = (shared->chunk_keys * LANES + ALIASING_FLOATS - 1) / ALIASING_FLOATS *
                               ALIASING_FLOATS +
                           PADDING_FLOATS;
    shared->next_to_add = 0;
    atomic_init(&shared->next_tile, 0);

    workers = calloc((size_t)n_workers, sizeof *workers);
    if (workers == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d workers", n_workers);
    }
    for (int i = 0; i < n_workers; i++) {
        KRUL_TRY(worker_init(&workers[i], shared, max_head_dim, err));
    }
    krul_pool_for_each(n_workers, run_worker, workers, sizeof *workers, n_workers);

done:
    for (int i = 0; i < n_workers; i++) {
        free(workers[i].allocation);
    }
    free(workers);
    return status;
}

/* Is one layer's pair of views fit for the call that `reference`, an observed layer, is part of? */
static krul_status
check_layer(const krul_estimator_layer *layer, int32_t index, krul_device_type device_type,
            const krul_view *reference, int64_t n_rows, const int64_t *row_positions,
            int64_t n_keys_total, krul_error *err)
{
    const krul_view *queries = &layer->queries;
    const krul_view *keys = &layer->keys;
    char name[32];
    krul_status status = KRUL_STATUS_OK;
    (void)snprintf(name, sizeof name, "queries of layer %d", (int)index);
    KRUL_TRY(krul_view_check(queries, name, err));
    (void)snprintf(name, sizeof name, "keys of layer %d", (int)index);
    KRUL_TRY(krul_view_check(keys, name, err));
    if (queries->device_type != device_type || keys->device_type != device_type) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "layer %d is on device type %d (queries) and %d (keys) but is observed on "
                         "%d",
                         (int)index, (int)queries->device_type, (int)keys->device_type,
                         (int)device_type);
    }
    if (queries->shape[2] != n_rows || queries->shape[0] != reference->shape[0]) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "queries of layer %d have %lld batch entries and %lld rows but there are "
                         "%lld and %lld",
                         (int)index, (long long)queries->shape[0], (long long)queries->shape[2],
                         (long long)reference->shape[0], (long long)n_rows);
    }
    if (keys->shape[0] != queries->shape[0] || keys->shape[3] != queries->shape[3] ||
        keys->shape[1] < 1 || queries->shape[1] % keys->shape[1] != 0) {
        return krul_fail(
            err, KRUL_STATUS_BAD_SHAPE,
            "layer %d: queries are (%lld, %lld, %lld, %lld) but keys are (%lld, %lld, %lld, %lld)",
            (int)index, (long long)queries->shape[0], (long long)queries->shape[1],
            (long long)queries->shape[2], (long long)queries->shape[3], (long long)keys->shape[0],
            (long long)keys->shape[1], (long long)keys->shape[2], (long long)keys->shape[3]);
    }
    if (layer->key_start < 0 || layer->key_start > n_keys_total - keys->shape[2]) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "keys of layer %d are positions [%lld, %lld) but there are %lld",
                         (int)index, (long long)layer->key_start,
                         (long long)(layer->key_start + keys->shape[2]), (long long)n_keys_total);
    }
    if (!isfinite(layer->scaling) || !isfinite(layer->softcap) || layer->softcap < 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "layer %d has scaling %g and softcap %g but both must be finite and "
                         "softcap at least 0",
                         (int)index, (double)layer->scaling, (double)layer->softcap);
    }
    int64_t n_starts = layer->row_starts == NULL ? 0 : queries->shape[0] * n_rows;
    for (int64_t i = 0; i < n_starts; i++) {
        int64_t position = row_positions[i % n_rows];
        if (layer->row_starts[i] < 0 || layer->row_starts[i] > position) {
            return krul_fail(
                err, KRUL_STATUS_BAD_VALUE,
                "row_starts[%lld, %lld] of layer %d is %lld but the row is at position "
                "%lld",
                (long long)(i / n_rows), (long long)(i % n_rows), (int)index,
                (long long)layer->row_starts[i], (long long)position);
        }
    }
done:
    return status;
}

krul_status
krul_estimator_check(const krul_estimator_layer *layers, int32_t n_layers,
                     krul_device_type device_type, const int64_t *row_positions, int64_t n_rows,
                     int64_t n_keys_total, double weight, const krul_estimator_sums *sums,
                     int32_t *first_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int32_t first = -1;
    if (n_layers < 1 || n_rows < 0 || n_keys_total < 0 || n_keys_total >= INT32_MAX / 2 ||
        n_rows >= INT32_MAX / 2) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "n_layers is %d, n_rows %lld and n_keys_total %lld but they must be at "
                         "least 1, 0 and 0, and at most 2^30",
                         (int)n_layers, (long long)n_rows, (long long)n_keys_total);
    }
    if (!isfinite(weight) || weight < 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "weight is %g but must be finite and at least 0", weight);
    }
    if (sums->received_stride < n_keys_total) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "received holds %lld tokens but there are %lld",
                         (long long)sums->received_stride, (long long)n_keys_total);
    }
    for (int64_t r = 0; r < n_rows; r++) {
        if (row_positions[r] < 0 || row_positions[r] >= n_keys_total) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "row_positions[%lld] is %lld but there are %lld tokens", (long long)r,
                             (long long)row_positions[r], (long long)n_keys_total);
        }
    }
    for (int32_t l = 0; l < n_layers; l++) {
        if (layers[l].queries.data != NULL) {
            first = first < 0 ? l : first;
            KRUL_TRY(check_layer(&layers[l], l, device_type, &layers[first].queries, n_rows,
                                 row_positions, n_keys_total, err));
        }
    }
    *first_out = first;
done:
    return status;
}

/* Distances of layers that share no rows. */
static void
mark_unknown(const krul_estimator_layer *layers, int32_t n_layers, double *distances)
{
    for (int64_t l = 0; l < n_layers; l++) {
        for (int64_t u = 0; u < n_layers; u++) {
            if (layers[l].queries.data == NULL || layers[u].queries.data == NULL ||
                layers[l].queries.shape[1] != layers[u].queries.shape[1]) {
                distances[l * n_layers + u] = (double)NAN;
            }
        }
    }
}

krul_status
krul_estimator_observe(const krul_backend *backend, const krul_estimator_layer *layers,
                       int32_t n_layers, const int64_t *row_positions, int64_t n_rows,
                       const uint8_t *key_is_real, int64_t n_keys_total, double weight,
                       size_t tile_bytes, int n_threads, krul_estimator_sums *sums, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int32_t first = -1;
    int32_t *members = NULL;
    int64_t *first_real = NULL;
    int64_t n_real_rows = 0;
    bool has_lock = false;
    observation shared = {
        .backend = backend,
        .layers = layers,
        .n_layers = n_layers,
        .row_positions = row_positions,
        .n_rows = n_rows,
        .key_is_real = key_is_real,
        .n_keys_total = n_keys_total,
        .weight = weight,
        .sums = sums,
    };
    KRUL_TRY(krul_estimator_check(layers, n_layers, KRUL_DEVICE_CPU, row_positions, n_rows,
                                  n_keys_total, weight, sums, &first, err));
    if (first < 0 || n_rows == 0) {
        mark_unknown(layers, n_layers, sums->distances);
        goto done;
    }
    int64_t n_batch = layers[first].queries.shape[0];
    members = malloc((size_t)n_layers * sizeof *members);
    first_real = malloc((size_t)krul_max_i64(1, n_batch) * sizeof *first_real);
    if (members == NULL || first_real == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d layers", (int)n_layers);
        goto done;
    }
    for (int64_t b = 0; b < n_batch; b++) {
        const uint8_t *is_real = key_is_real == NULL ? NULL : key_is_real + b * n_keys_total;
        first_real[b] = krul_estimator_first_real(is_real, n_keys_total);
        for (int64_t r = 0; r < n_rows; r++) {
            n_real_rows += is_real == NULL || is_real[row_positions[r]] != 0;
        }
    }
    shared.first_real = first_real;
    shared.members = members;
    has_lock = pthread_mutex_init(&shared.lock, NULL) == 0;
    if (!has_lock || pthread_cond_init(&shared.has_advanced, NULL) != 0) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no lock for the estimator's workers");
        if (has_lock) {
            pthread_mutex_destroy(&shared.lock);
            has_lock = false;
        }
        goto done;
    }
    for (int32_t l = first; l < n_layers; l++) {
        /* a group is led by its first member; the others were taken along */
        bool is_leader = layers[l].queries.data != NULL && layers[l].queries.shape[1] > 0;
        for (int32_t earlier = first; is_leader && earlier < l; earlier++) {
            is_leader = layers[earlier].queries.data == NULL ||
                        layers[earlier].queries.shape[1] != layers[l].queries.shape[1];
        }
        if (!is_leader) {
            continue;
        }
        shared.n_members = 0;
        for (int32_t u = l; u < n_layers; u++) {
            if (layers[u].queries.data != NULL &&
                layers[u].queries.shape[1] == layers[l].queries.shape[1]) {
                members[shared.n_members++] = u;
            }
        }
        if (n_batch > 0) {
            KRUL_TRY(observe_group(&shared, tile_bytes, n_threads, err));
        }
    }
    mark_unknown(layers, n_layers, sums->distances);
    *sums->n_rows += weight * (double)n_real_rows;

done:
    if (has_lock) {
        pthread_cond_destroy(&shared.has_advanced);
        pthread_mutex_destroy(&shared.lock);
    }
    free(first_real);
    free(members);
    return status;
}

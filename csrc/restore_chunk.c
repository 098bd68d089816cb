/* restore_chunk.c - the steps of a restore that are for a device.
 *
 * They are read into a chunk, many of them, and the thread enqueues its copy and decoding; see
 * restore_device.c. It takes a chunk before it takes a step: who has a step must get on without waiting
 * for a thread that took a later one.
 *
 * Blocks of codec predict are decoded by a device in the order of their chains, so a chunk is enqueued
 * after those with what its blocks are predicted from. None waits for a later one: a chunk that has
 * blocks takes no other that is predicted from what is in a chunk not yet enqueued. All chains of a
 * predictor are decoded by one device, or by the CPU where that cannot be. */
#include <stdlib.h>
#include <string.h>

#include "restore_run.h"

/* A chunk is enqueued before it is full when filling it has taken so long: the store is slow then, and
 * what is there is better decoded. */
static const double max_fill_s = 5e-3;

/* Note that a step failed after all, which was done; with the lock. */
static void
fail_step(krul_restore *restore, int64_t index, const krul_error *failure)
{
    const krul_store_entry *entry = &restore->steps[index].entry;
    restore->failures[index] = failure->status;
    for (int k = 0; k < krul_restore_n_views(entry); k++) {
        restore_layer *layer = &restore->layers[krul_restore_layer_of(entry, k)];
        bool is_written = restore->steps[index].views[k].data != NULL;
        if (is_written && layer->failure.status == KRUL_STATUS_OK) {
            layer->failure = *failure;
        }
    }
}

/* Note a failure that came after a chunk's steps were done, for what was predicted from them, too; with
 * the lock. */
static void
fail_chunk(krul_restore *restore, const krul_chunk *chunk, const krul_error *failure)
{
    for (int32_t i = 0; i < chunk->n_steps; i++) {
        if (chunk->statuses[i] != KRUL_STATUS_OK) {
            continue;
        }
        int64_t index = chunk->steps[i];
        fail_step(restore, index, failure);
        while ((index = restore->after[index]) >= 0 && restore->states[index] == STEP_DONE &&
               restore->failures[index] == KRUL_STATUS_OK) {
            fail_step(restore, index, failure);
        }
    }
}

/* Wait until the device is done with a chunk; with the lock, which is let go meanwhile. */
static void
drain(krul_restore *restore, krul_chunk *chunk)
{
    krul_error failure;
    bool is_damaged = false;
    pthread_mutex_unlock(&restore->lock);
    krul_status status = krul_chunk_drain(chunk, &is_damaged, &failure);
    if (status == KRUL_STATUS_OK && is_damaged) {
        status = krul_fail(&failure, KRUL_STATUS_CORRUPT,
                           "a block does not come out even, one of %d that were decoded at once",
                           (int)chunk->n_steps);
    }
    pthread_mutex_lock(&restore->lock);
    if (status != KRUL_STATUS_OK) {
        fail_chunk(restore, chunk, &failure);
    }
    chunk->state = KRUL_CHUNK_FREE;
    pthread_cond_broadcast(&restore->has_changed);
    pthread_cond_broadcast(&restore->layer_has_changed);
}

void
krul_restore_drain_all(krul_restore *restore)
{
    for (int32_t i = 0; i < restore->n_lanes; i++) {
        while (krul_lane_is_busy(restore->lanes[i])) {
            krul_chunk *chunk = krul_lane_oldest_chunk(restore->lanes[i]);
            if (chunk != NULL) {
                drain(restore, chunk);
            }
            else {
                pthread_cond_wait(&restore->has_changed, &restore->lock);
            }
        }
    }
}

krul_chunk *
krul_restore_next_chunk(krul_restore *restore, krul_lane *lane)
{
    krul_chunk *chunk = krul_lane_next_chunk(lane);
    if (chunk != NULL) {
        return chunk;
    }
    krul_chunk *oldest = krul_lane_oldest_chunk(lane);
    if (oldest != NULL) {
        drain(restore, oldest);
    }
    else {
        pthread_cond_wait(&restore->has_changed, &restore->lock);
    }
    return NULL;
}

/* Bring one step into a chunk, or end it here; with the lock, which is let go meanwhile. */
static void
fill_chunk(krul_restore *restore, krul_chunk *chunk, int64_t index, int32_t worker, uint8_t *buffer)
{
    krul_restore_step *step = &restore->steps[index];
    const krul_store_entry *entry = &step->entry;
    krul_lane_chains *chains = restore->step_chains[index];
    bool is_raw = chains == NULL && !chunk->lane->ops->decode_is_supported(entry);
    uint8_t *to = is_raw ? buffer : krul_chunk_payload(chunk);
    const uint8_t *payload = step->fd >= 0 ? to : step->payload;
    krul_error failure = {.status = KRUL_STATUS_OK};
    krul_restore_trace trace = {.worker = worker,
                                .begin_s = krul_restore_clock_s() - restore->start_s};
    krul_status status = KRUL_STATUS_OK;
    restore->states[index] = STEP_READING;
    pthread_mutex_unlock(&restore->lock);
    if (to == NULL) {
        status = krul_fail(&failure, KRUL_STATUS_NO_MEMORY,
                           "no memory for a block of %zu coded bytes", restore->buffer_bytes);
    }
    else if (step->fd >= 0) {
        status = krul_restore_read_step(restore, step, to, &failure);
    }
    else if (!is_raw && entry->payload_bytes > 0) {
        memcpy(to, payload, (size_t)entry->payload_bytes);
    }
    trace.read_s = trace.turn_s = krul_restore_clock_s() - restore->start_s;

    pthread_mutex_lock(&restore->lock);
    if (status == KRUL_STATUS_OK && is_raw) {
        status = krul_restore_wait_for_chain(restore, index, &failure);
    }
    bool is_needed = krul_restore_is_wanted(restore, index) && !restore->is_cancelled;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    memcpy(views, step->views, sizeof views);
    if (status == KRUL_STATUS_OK && is_needed && is_raw) {
        krul_view host_views[KRUL_COMPRESSOR_MAX_VIEWS];
        krul_chunk_host_views(chunk, entry, views, host_views);
        pthread_mutex_unlock(&restore->lock);
        status = krul_restore_decode(restore->backend, step, host_views, payload, &failure);
        pthread_mutex_lock(&restore->lock);
    }
    if (status != KRUL_STATUS_OK || !is_needed) {
        memcpy(views, step->views, sizeof views);
        if (!is_needed) { /* what it would have filled was let go, or stays missing */
            memset(views, 0, sizeof views);
        }
        trace.end_s = krul_restore_clock_s() - restore->start_s;
        krul_restore_finish_step(restore, index, views, &failure, &trace);
        return;
    }
    krul_chunk_add(chunk, index, entry, views, chains);
    restore->is_decoded[index] = is_raw;
    pthread_cond_broadcast(&restore->has_changed);
    /* Who looks at traces takes a step with a worker for done. */
    trace.worker = -1;
    restore->traces[index] = trace;
}

/* Is a step in this chunk? Says where, or -1. */
static int32_t
place_in(const krul_chunk *chunk, int64_t index)
{
    int32_t place = chunk->n_steps - 1;
    while (place >= 0 && chunk->steps[place] != index) {
        place--;
    }
    return place;
}

/* Would the device decode this step, and is it predicted from one that is in another chunk and not yet
 * enqueued? With the lock. */
static bool
hangs_on_other(const krul_restore *restore, const krul_chunk *chunk, int64_t index)
{
    int64_t before = restore->before[index];
    return restore->step_chains[index] != NULL && before >= 0 && !restore->is_decoded[before] &&
           place_in(chunk, before) < 0;
}

/* Sleep until all is enqueued that blocks of a chunk are predicted from, and mark those whose chains
 * are broken; with the lock, which is let go meanwhile. */
static void
wait_for_chunks(krul_restore *restore, krul_chunk *chunk)
{
    for (int32_t i = 0; i < chunk->n_steps; i++) {
        int64_t index = chunk->steps[i];
        if (restore->step_chains[index] == NULL || restore->before[index] < 0) {
            continue;
        }
        int32_t place = place_in(chunk, restore->before[index]);
        krul_status status = place >= 0 ? chunk->statuses[place]
                                        : krul_restore_wait_for_chain(restore, index, NULL);
        if (status != KRUL_STATUS_OK) {
            chunk->statuses[i] = status;
        }
    }
}

/* Enqueue what is in a chunk and end its steps; with the lock, which is let go meanwhile. */
static void
enqueue_chunk(krul_restore *restore, krul_chunk *chunk, int32_t worker)
{
    const krul_view none[KRUL_COMPRESSOR_MAX_VIEWS] = {{.data = NULL}, {.data = NULL}};
    krul_error first_failure = {.status = KRUL_STATUS_OK};
    krul_error failure = {.status = KRUL_STATUS_OK};
    wait_for_chunks(restore, chunk);
    for (int32_t i = 0; i < chunk->n_steps; i++) {
        int64_t index = chunk->steps[i];
        bool is_good = chunk->statuses[i] == KRUL_STATUS_OK && !restore->is_cancelled;
        krul_chunk_set_views(chunk, i, is_good ? restore->steps[index].views : none,
                             is_good && krul_restore_is_wanted(restore, index));
        restore->states[index] = STEP_DECODING;
    }
    bool is_cancelled = restore->is_cancelled;
    pthread_mutex_unlock(&restore->lock);
    krul_status status = krul_chunk_enqueue(chunk, &first_failure, &failure);
    double end_s = krul_restore_clock_s() - restore->start_s;

    pthread_mutex_lock(&restore->lock);
    for (int32_t i = 0; i < chunk->n_steps; i++) {
        int64_t index = chunk->steps[i];
        /* Nobody lets go of a view meanwhile. */
        const krul_restore_step *step = &restore->steps[index];
        const krul_view *views = is_cancelled ? none : step->views;
        krul_error step_failure = {.status = KRUL_STATUS_OK};
        if (status != KRUL_STATUS_OK) {
            step_failure = failure;
            chunk->statuses[i] = status;
        }
        else if (krul_restore_check_chain(restore, index, &step_failure) != KRUL_STATUS_OK) {
            chunk->statuses[i] = step_failure.status; /* or it was found to be only now */
        }
        else if (chunk->statuses[i] != KRUL_STATUS_OK) {
            (void)krul_fail(&step_failure, chunk->statuses[i], "layer %d, tokens from %lld: %s",
                            (int)step->entry.layer_lower, (long long)step->entry.token_start,
                            first_failure.message);
        }
        for (int k = 0; k < krul_restore_n_views(&step->entry); k++) {
            if (views[k].data != NULL && step_failure.status == KRUL_STATUS_OK) {
                restore->layers[krul_restore_layer_of(&step->entry, k)].is_enqueued = true;
            }
        }
        krul_restore_trace trace = restore->traces[index];
        trace.worker = worker;
        trace.end_s = end_s;
        krul_restore_finish_step(restore, index, views, &step_failure, &trace);
    }
    bool is_enqueued = status == KRUL_STATUS_OK && chunk->n_blocks + chunk->n_links > 0;
    chunk->state = is_enqueued ? KRUL_CHUNK_ENQUEUED : KRUL_CHUNK_FREE;
    pthread_cond_broadcast(&restore->has_changed);
}

void
krul_restore_run_chunk(krul_restore *restore, krul_chunk *chunk, int32_t worker, uint8_t *buffer)
{
    double begin_s = krul_restore_clock_s();
    int64_t index;
    while ((index = krul_restore_next_step(restore)) >= 0 &&
           krul_restore_lane_of(restore, index) == chunk->lane) {
        const krul_restore_step *step = &restore->steps[index];
        bool is_late = chunk->n_steps > 0 && krul_restore_clock_s() > begin_s + max_fill_s;
        bool is_early = chunk->n_steps > 0 && hangs_on_other(restore, chunk, index);
        if (is_late || is_early ||
            !krul_chunk_has_room(chunk, &step->entry, step->views, restore->step_chains[index])) {
            break; /* one always fits: chunks are as large as the largest needs */
        }
        fill_chunk(restore, chunk, index, worker, buffer);
    }
    enqueue_chunk(restore, chunk, worker);
}

/* ---- which steps are whose ---------------------------------------------------------------------- */

/* The lane of a device among those found so far, entered if it is new; NO_LANE if there are too
 * many. */
static uint8_t
enter_device(int32_t *device_ids, int32_t *n_devices, int32_t device_id)
{
    for (int32_t i = 0; i < *n_devices; i++) {
        if (device_ids[i] == device_id) {
            return (uint8_t)i;
        }
    }
    if (*n_devices == MAX_LANES) {
        return NO_LANE;
    }
    device_ids[*n_devices] = device_id;
    return (uint8_t)(*n_devices)++;
}

/* Find out which steps are for which device, and what each device's lane must have room for. */
static krul_status
assign_lanes(krul_restore *restore, const krul_device_ops *ops, uint8_t *layer_lanes,
             int32_t *device_ids, size_t *need_bytes, int32_t *n_devices, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t n_bytes, link_bytes = 0; /* of a block that may go to any of them, wanted or not */
    for (int64_t i = 0; i < restore->n_steps; i++) {
        const krul_restore_step *step = &restore->steps[i];
        uint8_t lane = NO_LANE;
        int n_seen = 0;
        for (int k = 0; k < krul_restore_n_views(&step->entry); k++) {
            const krul_view *view = &step->views[k];
            int32_t layer = krul_restore_layer_of(&step->entry, k);
            uint8_t here = NO_LANE;
            if (view->data == NULL) {
                continue;
            }
            if (view->device_type != KRUL_DEVICE_CPU) {
                if (ops == NULL || view->device_type != ops->device_type) {
                    return krul_fail(err, KRUL_STATUS_DEVICE,
                                     "step %lld has an output on a device of type %d but there is "
                                     "no table for it",
                                     (long long)i, (int)view->device_type);
                }
                here = enter_device(device_ids, n_devices, view->device_id);
                if (here == NO_LANE) {
                    return krul_fail(err, KRUL_STATUS_UNSUPPORTED, "more than %d devices",
                                     (int)MAX_LANES);
                }
            }
            if ((n_seen > 0 && here != lane) ||
                (layer_lanes[layer] != NO_LANE && here != layer_lanes[layer])) {
                return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                                 "step %lld writes to layer %d on device %d, but what else it or "
                                 "that layer has is elsewhere",
                                 (long long)i, (int)layer, (int)view->device_id);
            }
            lane = layer_lanes[layer] = here;
            n_seen++;
        }
        restore->step_lanes[i] = lane;
        if (lane != NO_LANE) {
            KRUL_TRY(krul_chunk_need(ops, &step->entry, step->views, false, &n_bytes, err));
            need_bytes[lane] = n_bytes > need_bytes[lane] ? n_bytes : need_bytes[lane];
        }
        if (step->entry.codec == KRUL_CODEC_PREDICT && ops != NULL && ops->products_new != NULL) {
            KRUL_TRY(krul_chunk_need(ops, &step->entry, step->views, true, &n_bytes, err));
            link_bytes = n_bytes > link_bytes ? n_bytes : link_bytes;
        }
    }
    for (int32_t i = 0; i < *n_devices; i++) {
        need_bytes[i] = link_bytes > need_bytes[i] ? link_bytes : need_bytes[i];
    }
done:
    return status;
}

static int
compare_runs(const void *left_in, const void *right_in)
{
    const krul_device_run *left = left_in, *right = right_in;
    return (left->token_start > right->token_start) - (left->token_start < right->token_start);
}

/* Is it a block of this predictor's chains? */
static bool
is_chained(const krul_restore_step *step, const krul_predict *predict)
{
    return step->entry.codec == KRUL_CODEC_PREDICT && step->predict == predict;
}

/* The lane that all wanted blocks of a predictor are for; NO_LANE where there is none, or several. */
static uint8_t
lane_of_predictor(const krul_restore *restore, const krul_predict *predict, krul_error *problem)
{
    uint8_t lane = NO_LANE;
    bool is_first = true;
    for (int64_t i = 0; i < restore->n_steps; i++) {
        const krul_restore_step *step = &restore->steps[i];
        bool has_views = step->views[0].data != NULL || step->views[1].data != NULL;
        if (!is_chained(step, predict) || !has_views) {
            continue;
        }
        if (!is_first && restore->step_lanes[i] != lane) {
            (void)krul_fail(problem, KRUL_STATUS_UNSUPPORTED,
                            "layers that are predicted from one another are on several devices");
            return NO_LANE;
        }
        lane = restore->step_lanes[i];
        is_first = false;
    }
    return lane;
}

/* Have the device decode all chains of a predictor, if it can. */
static krul_status
begin_chains(krul_restore *restore, const krul_predict *predict, krul_error *err)
{
    krul_error problem = {.status = KRUL_STATUS_OK};
    krul_lane_chains *chains = NULL;
    int64_t n_runs = 0;
    uint8_t lane = lane_of_predictor(restore, predict, &problem);
    krul_device_run *runs = malloc((size_t)restore->n_steps * sizeof *runs);
    if (runs == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for runs of %lld steps",
                         (long long)restore->n_steps);
    }
    for (int64_t i = 0; i < restore->n_steps && lane != NO_LANE; i++) {
        const krul_restore_step *step = &restore->steps[i];
        if (is_chained(step, predict) && restore->before[i] < 0) {
            runs[n_runs++] = (krul_device_run){step->entry.token_start, step->entry.n_tokens};
        }
    }
    if (n_runs > 0 && restore->lanes[lane]->ops->products_new == NULL) {
        (void)krul_fail(&problem, KRUL_STATUS_UNSUPPORTED, "%s has no way for it",
                        restore->lanes[lane]->ops->name);
    }
    else if (n_runs > 0) {
        qsort(runs, (size_t)n_runs, sizeof *runs, compare_runs);
        krul_status status = krul_lane_begin_chains(restore->lanes[lane], predict, runs,
                                                    (int32_t)krul_min_i64(n_runs, INT32_MAX),
                                                    &chains, &problem);
        problem.status = status; /* what it says is of no use where all went well */
    }
    for (int64_t i = 0; i < restore->n_steps && chains != NULL; i++) {
        if (is_chained(&restore->steps[i], predict)) {
            restore->step_chains[i] = chains;
            restore->step_lanes[i] = lane;
        }
    }
    if (problem.status != KRUL_STATUS_OK && restore->predict_problem.status == KRUL_STATUS_OK) {
        restore->predict_problem = problem;
    }
    free(runs);
    return KRUL_STATUS_OK;
}

krul_status
krul_restore_take_lanes(krul_restore *restore, const krul_restore_options *options, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = options->devices == NULL ? NULL
                                                          : krul_device_pool_ops(options->devices);
    int32_t device_ids[MAX_LANES], n_devices = 0, n_events[MAX_LANES] = {0};
    size_t need_bytes[MAX_LANES] = {0};
    uint8_t *layer_lanes = malloc((size_t)restore->n_layers + 1);
    if (layer_lanes == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d layers",
                         (int)restore->n_layers);
    }
    memset(layer_lanes, NO_LANE, (size_t)restore->n_layers + 1);
    KRUL_TRY(assign_lanes(restore, ops, layer_lanes, device_ids, need_bytes, &n_devices, err));
    for (int32_t layer = 0; layer < restore->n_layers; layer++) {
        if (layer_lanes[layer] != NO_LANE) {
            n_events[layer_lanes[layer]]++;
        }
    }
    for (int32_t i = 0; i < n_devices; i++) {
        KRUL_TRY(krul_lane_take(options->devices, device_ids[i], need_bytes[i], n_events[i],
                                &restore->lanes[i], err));
        restore->n_lanes++;
    }
    for (int32_t layer = 0; layer < restore->n_layers; layer++) {
        uint8_t lane = layer_lanes[layer];
        if (lane != NO_LANE) {
            restore->layers[layer].lane = restore->lanes[lane];
            restore->layers[layer].event = restore->lanes[lane]->layer_events[--n_events[lane]];
        }
    }
    for (int64_t i = 0; i < restore->n_steps && n_devices > 0; i++) {
        int64_t first = 0;
        const krul_predict *predict = restore->steps[i].predict;
        while (first < i && !is_chained(&restore->steps[first], predict)) {
            first++;
        }
        if (first == i && is_chained(&restore->steps[i], predict)) {
            KRUL_TRY(begin_chains(restore, predict, err));
        }
    }
    for (int32_t i = 0; i < options->n_streams; i++) {
        for (int32_t k = 0; k < n_devices; k++) {
            if (device_ids[k] == options->streams[i].device_id) {
                KRUL_TRY(krul_lane_follow(restore->lanes[k], options->streams[i].stream, err));
            }
        }
    }
done:
    free(layer_lanes);
    return status;
}

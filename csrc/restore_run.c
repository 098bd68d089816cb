/* restore_run.c - threads that carry a restore out: read, check, decode, tell who waits.
 *
 * Threads take steps in the order given, so that shallow layers come first. Each keeps one buffer
 * for the coded bytes of a block; pread instead of mmap, because a file that is truncated under a
 * mapping kills the process. Between reading and decoding a thread looks again at what is wanted: a
 * read that hangs then holds up nobody who has given up on it.
 *
 * Steps whose views are on a device take another way; see restore_chunk.c.
 *
 * On a machine that is made up there are no threads: whoever waits carries the steps out, each on
 * the worker that is free first, and reading and decoding only move clocks. */
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"
#include "restore_run.h"

/* The most that one read is made to last, so that any rate gives a time that a clock can hold. */
static const double max_read_s = 1e6;

/* So many blocks are asked for ahead, so that the way to the store is not idle when a worker comes
 * late, which processors that are busy with the model make it do. A limit on bytes allows for it. */
enum { N_AHEAD = 32 };

/* How long blocks that are read wait for a caller who computes with what it waited for. */
static const double turn_s = 1.0;

/* Who decodes waits for the store if nothing was read for so long: a block in the page cache takes
 * half of it. */
static const double starved_s = 100e-6;

/* A read that takes longer than this and a memory's copy is of a store where asking ahead pays; after
 * so many of them a thread that reads is expected to wait. */
enum { N_SLOW = 4 };
static const double slow_read_s = 50e-6, memory_bytes_per_s = 2e9;

/* ---- time -------------------------------------------------------------------------------------- */

static double
now_s(const krul_restore *restore)
{
    return restore->machine != NULL ? restore->machine->now_s : krul_restore_clock_s();
}

static struct timespec
as_timespec(double at_s)
{
    struct timespec at = {.tv_sec = (time_t)at_s};
    at.tv_nsec = (long)((at_s - (double)at.tv_sec) * 1e9);
    return at;
}

/* Say when a read that begins now ends, and keep the way to the store until then; with the lock. */
static double
reserve_link(krul_restore *restore, double begin_s, double n_bytes, double bytes_per_s)
{
    double wanted_s = bytes_per_s > 0 ? n_bytes / bytes_per_s : 0;
    double since_s = restore->machine != NULL ? begin_s : begin_s - (double)N_AHEAD * wanted_s;
    double from_s = since_s > restore->link_free_s ? since_s : restore->link_free_s;
    restore->link_free_s = from_s + (wanted_s < max_read_s ? wanted_s : max_read_s);
    return restore->link_free_s;
}

/* ---- carrying one out -------------------------------------------------------------------------- */

bool
krul_restore_is_wanted(const krul_restore *restore, int64_t index)
{
    for (; index >= 0; index = restore->after[index]) {
        const krul_restore_step *step = &restore->steps[index];
        if (step->views[0].data != NULL || step->views[1].data != NULL) {
            return true;
        }
    }
    return false;
}

static uint64_t
decoded_bytes(const krul_store_entry *entry, const krul_view *views)
{
    uint64_t n_views = (uint64_t)(views[0].data != NULL) + (uint64_t)(views[1].data != NULL);
    return n_views * (uint64_t)entry->n_batch * (uint64_t)entry->n_heads *
           (uint64_t)entry->n_tokens * (uint64_t)entry->head_dim * krul_dtype_bytes(entry->dtype);
}

/* A layer waits for one step less; with the lock. What was enqueued for it stands before its event. */
static void
count_step(krul_restore *restore, restore_layer *layer)
{
    layer->n_steps_left--;
    if (layer->n_steps_left == 0) {
        pthread_cond_broadcast(&restore->layer_has_changed);
    }
    if (layer->n_steps_left > 0 || layer->lane == NULL || !layer->is_enqueued) {
        return;
    }
    krul_lane *lane = layer->lane;
    krul_error failure;
    if (lane->ops->event_record(lane->device, layer->event, lane->decode_stream, &failure) ==
        KRUL_STATUS_OK) {
        layer->has_event = true;
    }
    else if (layer->failure.status == KRUL_STATUS_OK) {
        layer->failure = failure;
    }
}

/* The layer no longer waits for this step; with the lock. */
static void
let_go(krul_restore *restore, krul_restore_step *step, int view)
{
    step->views[view].data = NULL;
    count_step(restore, &restore->layers[krul_restore_layer_of(&step->entry, view)]);
}

int64_t
krul_restore_next_step(krul_restore *restore)
{
    while (restore->next_step < restore->n_steps && !restore->is_cancelled) {
        int64_t index = restore->order[restore->next_step];
        if (restore->states[index] != STEP_WAITING) {
            restore->next_step++; /* taken before the order changed, or for those behind it */
            continue;
        }
        if (krul_restore_is_wanted(restore, index)) {
            /* What it is predicted from comes first, wherever that stands. */
            while (restore->before[index] >= 0 &&
                   restore->states[restore->before[index]] == STEP_WAITING) {
                index = restore->before[index];
            }
            return index;
        }
        restore->states[index] = STEP_DONE;
        restore->counts.n_steps_done++;
    }
    return -1;
}

void
krul_restore_finish_step(krul_restore *restore, int64_t index, const krul_view *views,
                         const krul_error *failure, const krul_restore_trace *trace)
{
    const krul_store_entry *entry = &restore->steps[index].entry;
    krul_restore_counts *counts = &restore->counts;
    double decode_s = trace->end_s - trace->turn_s;
    for (int i = 0; i < krul_restore_n_views(entry); i++) {
        restore_layer *layer = &restore->layers[krul_restore_layer_of(entry, i)];
        if (views[i].data == NULL) {
            continue;
        }
        if (trace->end_s > layer->end_s) {
            layer->end_s = trace->end_s;
        }
        if (failure->status != KRUL_STATUS_OK && layer->failure.status == KRUL_STATUS_OK) {
            layer->failure = *failure;
            pthread_cond_broadcast(&restore->layer_has_changed);
        }
        count_step(restore, layer);
    }
    if (failure->status != KRUL_STATUS_OK) {
        restore->failures[index] = failure->status;
    }
    restore->states[index] = STEP_DONE;
    restore->is_decoded[index] = true;
    restore->traces[index] = *trace;
    counts->n_steps_done++;
    counts->read_s += trace->read_s - trace->begin_s;
    counts->decode_s += decode_s;
    if (failure->status == KRUL_STATUS_OK && krul_restore_lane_of(restore, index) == NULL) {
        counts->decode_s_by_codec[entry->codec] += decode_s;
        counts->decoded_bytes_by_codec[entry->codec] += decoded_bytes(entry, views);
    }
    if (trace->end_s > counts->elapsed_s) {
        counts->elapsed_s = trace->end_s;
    }
    pthread_cond_broadcast(&restore->has_changed);
    if (counts->n_steps_done == restore->n_steps) {
        pthread_cond_broadcast(&restore->layer_has_changed);
    }
}

/* What comes to be read N_AHEAD blocks from now; a fd of -1 where that is nothing. */
static krul_restore_step
coming_step(const krul_restore *restore)
{
    int64_t place = restore->next_step + N_AHEAD;
    krul_restore_step none = {.fd = -1};
    if (restore->n_slow == 0 || restore->is_cancelled || place >= restore->n_steps ||
        restore->states[restore->order[place]] != STEP_WAITING) {
        return none;
    }
    return restore->steps[restore->order[place]];
}

static void
ask_ahead(const krul_restore_step *step)
{
#ifdef POSIX_FADV_WILLNEED
    if (step->fd >= 0) {
        (void)posix_fadvise(step->fd, (off_t)step->entry.offset, (off_t)step->entry.payload_bytes,
                            POSIX_FADV_WILLNEED);
    }
#else
    (void)step;
#endif
}

krul_status
krul_restore_read_step(krul_restore *restore, const krul_restore_step *step, uint8_t *buffer,
                       krul_error *err)
{
    const krul_store_entry *entry = &step->entry;
    pthread_mutex_lock(&restore->lock);
    double begin_s = krul_restore_clock_s();
    double end_s = begin_s;
    if (restore->max_bytes_per_s > 0) {
        end_s = reserve_link(restore, begin_s, (double)entry->payload_bytes,
                             restore->max_bytes_per_s);
    }
    if (restore->n_reading++ == 0) {
        restore->reading_since_s = begin_s;
    }
    bool is_starved = restore->takes_turns &&
                      (restore->n_slow >= N_SLOW || end_s > begin_s + starved_s);
    if (is_starved) {
        restore->n_starved++;
        pthread_cond_broadcast(&restore->layer_has_changed);
    }
    krul_restore_step coming = coming_step(restore);
    pthread_mutex_unlock(&restore->lock);

    ask_ahead(&coming);
    krul_status status = krul_store_read_payload(step->fd, entry, buffer, err);

    pthread_mutex_lock(&restore->lock);
    bool is_slow = krul_restore_clock_s() - begin_s >
                   slow_read_s + (double)entry->payload_bytes / memory_bytes_per_s;
    restore->n_slow = is_slow ? restore->n_slow + 1 : 0;
    struct timespec end = as_timespec(end_s);
    while (krul_restore_clock_s() < end_s && !restore->is_cancelled) {
        pthread_cond_timedwait(&restore->has_changed, &restore->lock, &end);
    }
    restore->n_starved -= is_starved ? 1 : 0;
    if (--restore->n_reading == 0) {
        restore->counts.read_wall_s += krul_restore_clock_s() - restore->reading_since_s;
    }
    restore->counts.read_bytes += entry->payload_bytes;
    pthread_mutex_unlock(&restore->lock);
    return status;
}

krul_status
krul_restore_check_chain(const krul_restore *restore, int64_t index, krul_error *failure)
{
    int64_t before = restore->before[index];
    krul_status status = before < 0 ? KRUL_STATUS_OK : restore->failures[before];
    if (status != KRUL_STATUS_OK) {
        const krul_store_entry *entry = &restore->steps[index].entry;
        return krul_fail(failure, status,
                         "layer %d, tokens from %lld: layer %d, which it is predicted from, failed",
                         (int)entry->layer_lower, (long long)entry->token_start,
                         (int)restore->steps[before].entry.layer_lower);
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_restore_wait_for_chain(krul_restore *restore, int64_t index, krul_error *failure)
{
    int64_t before = restore->before[index];
    while (before >= 0 && !restore->is_decoded[before] && !restore->is_cancelled) {
        pthread_cond_wait(&restore->has_changed, &restore->lock);
    }
    return krul_restore_check_chain(restore, index, failure);
}

/* ---- turns ---- */

/* Would those who decode keep at least half of the processors busy? Else the caller has room beside
 * them. */
static bool
fill_processors(const krul_restore *restore, int n_ready)
{
    return restore->takes_turns && 2 * n_ready >= restore->n_processors;
}

/* A caller begins to wait; with the lock. */
static void
begin_to_wait(krul_restore *restore)
{
    if (restore->n_waiting++ == 0 && restore->turn_end_s > 0) {
        restore->turn_end_s = 0;
        pthread_cond_broadcast(&restore->has_changed);
    }
}

/* A block is read and could be decoded: sleep until it is its turn. With the lock. */
static void
wait_for_turn(krul_restore *restore)
{
    restore->n_ready++;
    if (restore->n_ready > restore->most_ready) {
        restore->most_ready = restore->n_ready;
    }
    while (restore->n_waiting == 0 && !restore->is_cancelled &&
           krul_restore_clock_s() < restore->turn_end_s) {
        struct timespec end = as_timespec(restore->turn_end_s);
        pthread_cond_timedwait(&restore->has_changed, &restore->lock, &end);
    }
}

/* Carry one step out on this machine; with the lock, which is let go meanwhile. */
static void
run_step(krul_restore *restore, int64_t index, int32_t worker, uint8_t *buffer)
{
    krul_restore_step *step = &restore->steps[index];
    const uint8_t *payload = step->payload;
    krul_error failure = {.status = KRUL_STATUS_OK};
    krul_restore_trace trace = {.worker = worker,
                                .begin_s = krul_restore_clock_s() - restore->start_s};
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    pthread_mutex_unlock(&restore->lock);
    krul_status status = KRUL_STATUS_OK;
    if (buffer == NULL) {
        status = krul_fail(&failure, KRUL_STATUS_NO_MEMORY,
                           "no memory for a block of %zu coded bytes", restore->buffer_bytes);
    }
    else if (step->fd >= 0) {
        status = krul_restore_read_step(restore, step, buffer, &failure);
        payload = buffer;
    }
    trace.read_s = krul_restore_clock_s() - restore->start_s;

    pthread_mutex_lock(&restore->lock);
    if (status == KRUL_STATUS_OK) {
        status = krul_restore_wait_for_chain(restore, index, &failure);
    }
    wait_for_turn(restore);
    trace.turn_s = krul_restore_clock_s() - restore->start_s;
    memcpy(views, step->views, sizeof views);
    bool is_needed = krul_restore_is_wanted(restore, index) && !restore->is_cancelled;
    if (is_needed && status == KRUL_STATUS_OK) {
        restore->states[index] = STEP_DECODING;
        pthread_mutex_unlock(&restore->lock);
        status = krul_restore_decode(restore->backend, step, views, payload, &failure);
        pthread_mutex_lock(&restore->lock);
    }
    if (status == KRUL_STATUS_OK) {
        failure.status = KRUL_STATUS_OK;
    }
    trace.end_s = krul_restore_clock_s() - restore->start_s;
    if (!is_needed) { /* what it would have filled was let go, or stays missing */
        memset(views, 0, sizeof views);
    }
    restore->n_ready--;
    if (!fill_processors(restore, restore->n_ready)) {
        pthread_cond_broadcast(&restore->layer_has_changed);
    }
    krul_restore_finish_step(restore, index, views, &failure, &trace);
}

static void
run_steps(void *argument)
{
    krul_restore *restore = argument;
    uint8_t *buffer = malloc(restore->buffer_bytes > 0 ? restore->buffer_bytes : 1);
    pthread_mutex_lock(&restore->lock);
    int32_t worker = restore->n_workers++;
    int64_t index;
    while ((index = krul_restore_next_step(restore)) >= 0) {
        krul_lane *lane = krul_restore_lane_of(restore, index);
        krul_chunk *chunk = NULL;
        if (lane == NULL) {
            restore->states[index] = STEP_READING;
            run_step(restore, index, worker, buffer);
        }
        else if ((chunk = krul_restore_next_chunk(restore, lane)) != NULL) {
            krul_restore_run_chunk(restore, chunk, worker, buffer);
        }
    }
    krul_restore_drain_all(restore);
    restore->n_running--;
    pthread_cond_broadcast(&restore->has_changed);
    pthread_cond_broadcast(&restore->layer_has_changed);
    pthread_mutex_unlock(&restore->lock);
    free(buffer);
}

/* ---- a machine that is made up ----------------------------------------------------------------- */

static int
first_free_worker(const krul_restore *restore)
{
    int best = 0;
    for (int i = 1; i < restore->n_workers; i++) {
        if (restore->free_s[i] < restore->free_s[best]) {
            best = i;
        }
    }
    return best;
}

/* Take one step on the worker that is free first; false if there is none left, or none that begins
 * before until_s. */
static bool
imagine_step(krul_restore *restore, double until_s)
{
    const krul_restore_machine *machine = restore->machine;
    int worker = first_free_worker(restore);
    double begin_s = restore->free_s[worker];
    if (begin_s > until_s) {
        return false;
    }
    int64_t index = krul_restore_next_step(restore);
    if (index < 0) {
        return false;
    }
    restore->states[index] = STEP_READING;
    const krul_restore_step *step = &restore->steps[index];
    krul_error failure = {.status = KRUL_STATUS_OK};
    double n_bytes = (double)step->entry.payload_bytes;
    double read_s = reserve_link(restore, begin_s + machine->read_latency_s, n_bytes,
                                 machine->read_bytes_per_s);
    double decode_bytes = (double)decoded_bytes(&step->entry, step->views);
    double end_s = read_s;
    if (machine->decode_bytes_per_s > 0) {
        end_s += decode_bytes / machine->decode_bytes_per_s;
    }
    restore->free_s[worker] = end_s;
    restore->counts.read_bytes += step->entry.payload_bytes;
    krul_restore_trace trace = {
        .worker = worker,
        .begin_s = begin_s - restore->start_s,
        .read_s = read_s - restore->start_s,
        .turn_s = read_s - restore->start_s,
        .end_s = end_s - restore->start_s,
    };
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
    memcpy(views, step->views, sizeof views);
    krul_restore_finish_step(restore, index, views, &failure, &trace);
    return true;
}

/* Carry out what a layer waits for, and let that time pass. */
static void
imagine_layer(krul_restore *restore, int32_t layer)
{
    const restore_layer *wanted = &restore->layers[layer];
    while (wanted->n_steps_left > 0 && imagine_step(restore, HUGE_VAL)) {
    }
    double end_s = restore->start_s + wanted->end_s;
    if (end_s > restore->machine->now_s) {
        restore->machine->now_s = end_s;
    }
}

/* ---- the interface ----------------------------------------------------------------------------- */

static krul_status
check_options(const krul_restore_options *options, krul_error *err)
{
    const krul_restore_machine *machine = options->machine;
    if (!(options->max_bytes_per_s >= 0)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "max_bytes_per_s is %g but must be 0 or more",
                         options->max_bytes_per_s);
    }
    if (machine != NULL && (!(machine->read_bytes_per_s > 0) ||
                            !(machine->decode_bytes_per_s > 0) || !(machine->read_latency_s >= 0) ||
                            !isfinite(machine->read_latency_s) || !isfinite(machine->now_s))) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "a machine reads %g and decodes %g bytes per second, which must be above "
                         "0, with a latency of %g s, which must be 0 or more, at %g s",
                         machine->read_bytes_per_s, machine->decode_bytes_per_s,
                         machine->read_latency_s, machine->now_s);
    }
    return KRUL_STATUS_OK;
}

/* Copy the steps and count what each layer waits for. */
static krul_status
take_over(krul_restore *restore, const krul_restore_step *steps, krul_error *err)
{
    int64_t n_steps = restore->n_steps;
    restore->steps = calloc((size_t)n_steps + 1, sizeof *steps);
    restore->states = calloc((size_t)n_steps + 1, 1);
    restore->traces = calloc((size_t)n_steps + 1, sizeof *restore->traces);
    restore->layers = calloc((size_t)restore->n_layers + 1, sizeof *restore->layers);
    restore->order = calloc((size_t)n_steps + 1, sizeof *restore->order);
    restore->failures = calloc((size_t)n_steps + 1, sizeof *restore->failures);
    restore->is_decoded = calloc((size_t)n_steps + 1, 1);
    restore->step_lanes = malloc((size_t)n_steps + 1);
    restore->step_chains = calloc((size_t)n_steps + 1, sizeof *restore->step_chains);
    restore->before = malloc(((size_t)n_steps + 1) * sizeof *restore->before);
    restore->after = malloc(((size_t)n_steps + 1) * sizeof *restore->after);
    if (restore->steps == NULL || restore->states == NULL || restore->traces == NULL ||
        restore->layers == NULL || restore->order == NULL || restore->failures == NULL ||
        restore->is_decoded == NULL || restore->step_lanes == NULL ||
        restore->step_chains == NULL || restore->before == NULL || restore->after == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld steps of %d layers",
                         (long long)n_steps, (int)restore->n_layers);
    }
    for (int64_t i = 0; i < n_steps; i++) {
        const krul_restore_step *step = &steps[i];
        restore->steps[i] = *step;
        restore->before[i] = restore->after[i] = -1;
        restore->traces[i].worker = -1;
        restore->step_lanes[i] = NO_LANE;
        restore->order[i] = i;
        if (step->fd >= 0 && step->entry.payload_bytes > restore->buffer_bytes) {
            restore->buffer_bytes = (size_t)step->entry.payload_bytes;
        }
        for (int k = 0; k < KRUL_COMPRESSOR_MAX_VIEWS; k++) {
            if (k >= krul_restore_n_views(&step->entry)) {
                restore->steps[i].views[k].data = NULL;
            }
            else if (step->views[k].data != NULL) {
                restore->layers[krul_restore_layer_of(&step->entry, k)].n_steps_left++;
            }
        }
    }
    return KRUL_STATUS_OK;
}

/* One block of a chain, for sorting. */
typedef struct chain_place {
    const krul_predict *predict;
    int64_t token_start;
    int64_t index;
    int32_t layer;
} chain_place;

static bool
are_in_one_chain(const chain_place *left, const chain_place *right)
{
    return left->predict == right->predict && left->token_start == right->token_start;
}

static int
compare_places(const void *left_in, const void *right_in)
{
    const chain_place *left = left_in, *right = right_in;
    if (left->predict != right->predict) {
        return (uintptr_t)left->predict < (uintptr_t)right->predict ? -1 : 1;
    }
    if (left->token_start != right->token_start) {
        return left->token_start < right->token_start ? -1 : 1;
    }
    return (left->layer > right->layer) - (left->layer < right->layer);
}

/* Find which blocks are predicted from which. */
static krul_status
link_chains(krul_restore *restore, krul_error *err)
{
    int64_t n_places = 0;
    krul_status status = KRUL_STATUS_OK;
    chain_place *places = malloc(((size_t)restore->n_steps + 1) * sizeof *places);
    if (places == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %lld steps",
                         (long long)restore->n_steps);
    }
    for (int64_t i = 0; i < restore->n_steps; i++) {
        const krul_restore_step *step = &restore->steps[i];
        if (step->entry.codec == KRUL_CODEC_PREDICT) {
            places[n_places++] = (chain_place){
                .predict = step->predict,
                .token_start = step->entry.token_start,
                .index = i,
                .layer = step->entry.layer_lower,
            };
        }
    }
    qsort(places, (size_t)n_places, sizeof *places, compare_places);
    for (int64_t i = 1; i < n_places; i++) {
        const chain_place *lower = &places[i - 1], *upper = &places[i];
        if (!are_in_one_chain(lower, upper)) {
            continue;
        }
        int64_t n_lower = restore->steps[lower->index].entry.n_tokens;
        int64_t n_upper = restore->steps[upper->index].entry.n_tokens;
        if (lower->layer == upper->layer || n_lower != n_upper) {
            status = krul_fail(err, KRUL_STATUS_BAD_VALUE,
                               "steps %lld and %lld are no chain: layers %d and %d, %lld and %lld "
                               "tokens from %lld",
                               (long long)lower->index, (long long)upper->index, (int)lower->layer,
                               (int)upper->layer, (long long)n_lower, (long long)n_upper,
                               (long long)upper->token_start);
            break;
        }
        restore->after[lower->index] = upper->index;
        restore->before[upper->index] = lower->index;
    }
    free(places);
    return status;
}

static krul_status
start_workers(krul_restore *restore, int n_wanted, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (restore->machine != NULL) {
        restore->n_workers = n_wanted;
        restore->free_s = malloc((size_t)n_wanted * sizeof *restore->free_s);
        if (restore->free_s == NULL) {
            return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d workers", n_wanted);
        }
        for (int i = 0; i < n_wanted; i++) {
            restore->free_s[i] = restore->start_s;
        }
        return KRUL_STATUS_OK;
    }
    KRUL_TRY(krul_pool_new(n_wanted, (size_t)n_wanted, &restore->pool, err));
    restore->n_running = n_wanted;
    for (int i = 0; i < n_wanted; i++) {
        krul_pool_submit(restore->pool, run_steps, restore);
    }
done:
    return status;
}

krul_status
krul_restore_start(const krul_backend *backend, const krul_restore_step *steps, int64_t n_steps,
                   int32_t n_layers, const krul_restore_options *options, krul_restore **out,
                   krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_restore *restore = NULL;
    size_t steps_bytes;
    if (n_steps < 0 || n_layers < 0 ||
        krul_multiply_overflows((size_t)n_steps + 1, sizeof *steps, &steps_bytes)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "n_steps is %lld and n_layers %d but both must be 0 or more",
                         (long long)n_steps, (int)n_layers);
    }
    KRUL_TRY(check_options(options, err));
    for (int64_t i = 0; i < n_steps; i++) {
        KRUL_TRY(krul_restore_check_step(&steps[i], i, n_layers, options->machine != NULL, err));
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
    pthread_cond_init(&restore->layer_has_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    restore->backend = backend;
    restore->n_steps = n_steps;
    restore->n_layers = n_layers;
    restore->machine = options->machine;
    restore->max_bytes_per_s = options->max_bytes_per_s;
    restore->takes_turns = options->takes_turns;
    restore->n_processors = krul_pool_n_processors();
    restore->counts.n_steps = n_steps;
    restore->start_s = restore->link_free_s = now_s(restore);
    KRUL_TRY(take_over(restore, steps, err));
    KRUL_TRY(link_chains(restore, err));
    if (restore->machine == NULL) {
        KRUL_TRY(krul_restore_take_lanes(restore, options, err));
    }
    if (n_steps > 0) {
        int n_wanted = options->n_threads > 0 ? options->n_threads : krul_pool_n_processors();
        n_wanted = (int)krul_min_i64(krul_min_i64(n_wanted, n_steps), KRUL_POOL_MAX_THREADS);
        KRUL_TRY(start_workers(restore, n_wanted, err));
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

/* Is there nothing to decode but what must be waited for, or does half of those who would decode wait
 * for the store? With the lock, which is let go meanwhile. */
static bool
is_turn_over(krul_restore *restore)
{
    double since_s = krul_restore_clock_s();
    const struct timespec end = as_timespec(since_s + starved_s);
    while (restore->takes_turns && !restore->is_cancelled &&
           restore->counts.n_steps_done < restore->n_steps) {
        if (2 * restore->n_starved >= restore->n_processors) {
            break;
        }
        if (fill_processors(restore, restore->n_ready)) {
            return false;
        }
        if (krul_restore_clock_s() >= since_s + starved_s) {
            break;
        }
        (void)pthread_cond_timedwait(&restore->layer_has_changed, &restore->lock, &end);
    }
    return true;
}

krul_status
krul_restore_wait(krul_restore *restore, int32_t layer, krul_error *err)
{
    if (layer < 0 || layer >= restore->n_layers) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer is %d but must be from 0 to %d",
                         (int)layer, (int)restore->n_layers - 1);
    }
    pthread_mutex_lock(&restore->lock);
    if (restore->machine != NULL) {
        imagine_layer(restore, layer);
    }
    begin_to_wait(restore);
    while (!is_done(restore, layer)) {
        pthread_cond_wait(&restore->layer_has_changed, &restore->lock);
    }
    if (--restore->n_waiting == 0 && fill_processors(restore, restore->most_ready)) {
        restore->turn_end_s = krul_restore_clock_s() + turn_s;
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

krul_status
krul_restore_wait_stream(krul_restore *restore, int32_t layer, void *stream, krul_error *err)
{
    krul_status status = krul_restore_wait(restore, layer, err);
    if (status != KRUL_STATUS_OK || restore->machine != NULL) {
        return status;
    }
    pthread_mutex_lock(&restore->lock);
    const restore_layer *waited = &restore->layers[layer];
    const krul_lane *lane = waited->has_event ? waited->lane : NULL;
    pthread_mutex_unlock(&restore->lock);
    if (lane != NULL) {
        status = lane->ops->stream_wait_event(lane->device, stream, waited->event, err);
    }
    return status;
}

krul_status
krul_restore_lead(krul_restore *restore, int32_t device_id, void *stream, krul_error *err)
{
    for (int32_t i = 0; i < restore->n_lanes; i++) {
        if (restore->lanes[i]->device_id == device_id) {
            return krul_lane_lead(restore->lanes[i], stream, err);
        }
    }
    return KRUL_STATUS_OK;
}

const char *
krul_restore_predict_problem(const krul_restore *restore)
{
    return restore->predict_problem.status != KRUL_STATUS_OK ? restore->predict_problem.message
                                                             : "";
}

bool
krul_restore_wait_for(krul_restore *restore, int32_t layer, double timeout_s)
{
    if (layer < 0 || layer >= restore->n_layers || restore->machine != NULL) {
        return true;
    }
    struct timespec end = as_timespec(krul_restore_clock_s() + timeout_s);
    int failure = 0;
    pthread_mutex_lock(&restore->lock);
    bool result = is_done(restore, layer);
    if (timeout_s > 0) {
        begin_to_wait(restore);
        while (!(result = is_done(restore, layer) && is_turn_over(restore)) && failure == 0) {
            failure = pthread_cond_timedwait(&restore->layer_has_changed, &restore->lock, &end);
        }
        restore->n_waiting--;
    }
    pthread_mutex_unlock(&restore->lock);
    return result;
}

/* Where this step writes to the first n_tokens tokens of a layer and nothing else of it: the index
 * of that view, else -1. */
static int
view_before(const krul_restore_step *step, int32_t layer, int64_t n_tokens)
{
    for (int i = 0; i < krul_restore_n_views(&step->entry); i++) {
        bool is_before = step->entry.token_start + step->views[i].shape[2] <= n_tokens;
        if (krul_restore_layer_of(&step->entry, i) == layer && step->views[i].data != NULL &&
            is_before) {
            return i;
        }
    }
    return -1;
}

void
krul_restore_drop(krul_restore *restore, int32_t layer, int64_t n_tokens)
{
    pthread_mutex_lock(&restore->lock);
    while (restore->machine != NULL && imagine_step(restore, restore->machine->now_s)) {
    }
    for (int64_t i = 0; i < restore->n_steps; i++) {
        krul_restore_step *step = &restore->steps[i];
        while (restore->states[i] == STEP_DECODING && view_before(step, layer, n_tokens) >= 0) {
            pthread_cond_wait(&restore->has_changed, &restore->lock);
        }
        int view;
        while (restore->states[i] != STEP_DONE &&
               (view = view_before(step, layer, n_tokens)) >= 0) {
            let_go(restore, step, view);
        }
    }
    pthread_cond_broadcast(&restore->has_changed);
    pthread_mutex_unlock(&restore->lock);
}

krul_status
krul_restore_reorder(krul_restore *restore, const int64_t *order, int64_t n_steps, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (n_steps != restore->n_steps) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "order has %lld steps but the restore %lld",
                         (long long)n_steps, (long long)restore->n_steps);
    }
    uint8_t *is_named = calloc((size_t)n_steps + 1, 1);
    if (is_named == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory to order %lld steps",
                         (long long)n_steps);
    }
    for (int64_t i = 0; i < n_steps; i++) {
        if (order[i] < 0 || order[i] >= n_steps || is_named[order[i]]) {
            status = krul_fail(err, KRUL_STATUS_BAD_VALUE,
                               "order has %lld at %lld but must name each of %lld steps once",
                               (long long)order[i], (long long)i, (long long)n_steps);
            goto done;
        }
        is_named[order[i]] = 1;
    }
    pthread_mutex_lock(&restore->lock);
    while (restore->machine != NULL && imagine_step(restore, restore->machine->now_s)) {
    }
    /* A worker that found nothing left has gone: then nothing is waiting either. */
    memcpy(restore->order, order, (size_t)n_steps * sizeof *order);
    restore->next_step = 0;
    pthread_mutex_unlock(&restore->lock);

done:
    free(is_named);
    return status;
}

void
krul_restore_limit(krul_restore *restore, double max_bytes_per_s)
{
    pthread_mutex_lock(&restore->lock);
    restore->max_bytes_per_s = max_bytes_per_s;
    restore->link_free_s = now_s(restore);
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_cancel(krul_restore *restore)
{
    pthread_mutex_lock(&restore->lock);
    restore->is_cancelled = true;
    pthread_cond_broadcast(&restore->has_changed);
    pthread_cond_broadcast(&restore->layer_has_changed);
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_abandon(krul_restore *restore)
{
    krul_restore_cancel(restore);
    pthread_mutex_lock(&restore->lock);
    for (int64_t i = 0; i < restore->n_steps; i++) {
        while (restore->states[i] == STEP_DECODING) {
            pthread_cond_wait(&restore->has_changed, &restore->lock);
        }
    }
    krul_restore_drain_all(restore);
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_join(krul_restore *restore)
{
    pthread_mutex_lock(&restore->lock);
    begin_to_wait(restore);
    while (restore->n_running > 0) {
        pthread_cond_wait(&restore->has_changed, &restore->lock);
    }
    restore->n_waiting--;
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_read_counts(krul_restore *restore, krul_restore_counts *out)
{
    pthread_mutex_lock(&restore->lock);
    *out = restore->counts;
    if (out->n_steps_done < out->n_steps) {
        out->elapsed_s = now_s(restore) - restore->start_s;
    }
    if (restore->n_reading > 0) {
        out->read_wall_s += krul_restore_clock_s() - restore->reading_since_s;
    }
    pthread_mutex_unlock(&restore->lock);
}

void
krul_restore_read_trace(krul_restore *restore, krul_restore_trace *out)
{
    pthread_mutex_lock(&restore->lock);
    memcpy(out, restore->traces, (size_t)restore->n_steps * sizeof *out);
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
    for (int32_t i = 0; i < restore->n_lanes; i++) {
        krul_lane_give(restore->lanes[i]);
    }
    pthread_mutex_destroy(&restore->lock);
    pthread_cond_destroy(&restore->has_changed);
    pthread_cond_destroy(&restore->layer_has_changed);
    free(restore->steps);
    free(restore->states);
    free(restore->traces);
    free(restore->failures);
    free(restore->is_decoded);
    free(restore->step_lanes);
    free(restore->step_chains);
    free(restore->before);
    free(restore->after);
    free(restore->layers);
    free(restore->order);
    free(restore->free_s);
    free(restore);
}

/* fake_device.h - a device that is threads and heap: streams are queues, events are real.
 *
 * Memory of the device is handed out at addresses that no host can read, so that code which touches
 * it crashes. What is enqueued is done later, by the stream's thread, after a delay at random: who
 * does not wait where it must is found by comparing bytes, and by TSan and ASan. Calls can be made to
 * fail, at once or when they are carried out, and memory to be short. Decoding, encoding and observing
 * call the CPU's; for codec predict that has a predictor of its own, and what a GPU would read is
 * compared. */
#ifndef FAKE_DEVICE_H
#define FAKE_DEVICE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "device.h"

/* How the device is to behave, and what was seen of it; tests change it while nothing runs. */
typedef struct fake_state {
    atomic_int max_delay_us;
    atomic_bool host_decodes_exact; /* codec `exact` is not supported on the device */
    atomic_bool has_no_products;
    const krul_predict_options *predict_options; /* of all that is restored now; the test's */
    size_t pinned_limit; /* bytes; 0: none */
    size_t memory_limit;
    atomic_bool is_dead; /* after a failure everything fails, as with CUDA's sticky errors */
    atomic_long calls_until_failure; /* of fallible functions; below 0: none fails */
    atomic_long works_until_failure; /* of what streams carry out */
    atomic_long works_until_damage; /* decodings until one says damage */
    atomic_long n_encoded, n_observed; /* batches; passes */
    atomic_long n_failed;
    atomic_long n_devices, n_streams, n_events, n_pinned, n_memory; /* that exist */
    atomic_size_t pinned_bytes, memory_bytes;
    atomic_long n_copies;
    atomic_size_t copied_bytes;
    atomic_long n_predicted; /* blocks of codec predict that were decoded */
    atomic_long n_products; /* that exist */
    atomic_long n_large_copies; /* of at least large_bytes */
    size_t large_bytes;
} fake_state;

static fake_state fake = {
    .calls_until_failure = -1, .works_until_failure = -1, .works_until_damage = -1};

/* Nothing is mapped there, and no processor takes it for an address. */
static const uintptr_t fake_offset = (uintptr_t)1 << 62;

static void *
fake_real(const void *address)
{
    return (void *)((uintptr_t)address - fake_offset);
}

typedef enum fake_kind {
    FAKE_COPY,
    FAKE_RECORD,
    FAKE_WAIT,
    FAKE_DECODE,
    FAKE_NUMBERS,
    FAKE_ROWS,
    FAKE_ENCODE,
    FAKE_OBSERVE,
    FAKE_WRITE, /* a test's own: fill rows with one byte */
} fake_kind;

/* As with CUDA, one may be freed while streams wait for it. */
typedef struct fake_event {
    long n_recorded, n_reached, n_works; /* with fake_lock */
    bool is_freed;
} fake_event;

typedef struct fake_work {
    struct fake_work *next;
    fake_kind kind;
    void *to;
    const void *from;
    size_t n_bytes;
    fake_event *event;
    long turn;
    krul_device_batch batch;
    krul_device_predict_batch predict_batch;
    const krul_device_chains *chains;
    uint8_t *memory;
    uint8_t *scratch;
    const uint8_t *chunk;
    uint32_t *flag;
    krul_device_encode_batch coding;
    const uint8_t *plan;
    uint8_t *payloads;
    krul_device_result *results;
    krul_device_observation *observation; /* owned, as krul_device_observation is large */
    const uint8_t *image;
    krul_estimator_sums sums;
    krul_view view;
    int byte;
} fake_work;

typedef struct fake_stream {
    pthread_t thread;
    fake_work *first, *last; /* with fake_lock */
    bool is_busy, is_ending;
    unsigned seed;
} fake_stream;

struct krul_device {
    int32_t id;
};

static pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t fake_changed = PTHREAD_COND_INITIALIZER;
static atomic_bool fake_has_died;

static bool
fake_counts_down(atomic_long *counter)
{
    return atomic_load(counter) >= 0 && atomic_fetch_sub(counter, 1) == 0;
}

static krul_status
fake_call(const char *name, krul_error *err)
{
    bool fails = fake_counts_down(&fake.calls_until_failure) || atomic_load(&fake_has_died);
    if (fails) {
        atomic_fetch_add(&fake.n_failed, 1);
        if (fake.is_dead) {
            atomic_store(&fake_has_died, true);
        }
        return krul_fail(err, KRUL_STATUS_DEVICE, "%s failed", name);
    }
    return KRUL_STATUS_OK;
}

/* ---- what streams carry out ------------------------------------------------------------------- */

static krul_view
fake_real_view(const krul_view *view)
{
    krul_view real = *view;
    real.data = view->data == NULL ? NULL : fake_real(view->data);
    real.device_type = KRUL_DEVICE_CPU;
    return real;
}

static void
fake_copy_rows(const krul_view *to, const uint8_t *from, int64_t n_tokens, int byte)
{
    size_t element_bytes = krul_dtype_bytes(to->dtype);
    size_t row_bytes = (size_t)to->shape[3] * element_bytes;
    for (int64_t i = 0; i < to->shape[0]; i++) {
        for (int64_t k = 0; k < to->shape[1]; k++) {
            for (int64_t t = 0; t < to->shape[2]; t++) {
                int64_t at = i * to->stride[0] + k * to->stride[1] + t * to->stride[2];
                uint8_t *row = (uint8_t *)to->data + (size_t)at * element_bytes;
                int64_t row_index = (i * to->shape[1] + k) * n_tokens + t;
                if (from != NULL) {
                    memcpy(row, from + (size_t)row_index * row_bytes, row_bytes);
                }
                else {
                    memset(row, byte, row_bytes);
                }
            }
        }
    }
}

/* What fake_prepare writes behind the payloads. */
typedef struct fake_descriptor {
    krul_store_entry entry;
    uint64_t payload_offset;
    bool is_decoded;
    krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
} fake_descriptor;

static size_t
fake_view_bytes(const krul_store_entry *entry)
{
    return (size_t)entry->n_batch * (size_t)entry->n_heads * (size_t)entry->n_tokens *
           (size_t)entry->head_dim * krul_dtype_bytes(entry->dtype);
}

/* Decode a whole block to memory of its own, and what is wanted of it to the views, unless that is
 * only tried. */
static krul_status
fake_decode_block(const fake_descriptor *block, const uint8_t *payload, bool is_tried,
                  krul_error *err)
{
    const krul_store_entry *entry = &block->entry;
    const krul_backend *backend = NULL;
    krul_status status = krul_backend_find(NULL, &backend, err);
    krul_view whole[KRUL_COMPRESSOR_MAX_VIEWS] = {{.data = NULL}, {.data = NULL}};
    int n_views = entry->layer_upper >= 0 ? 2 : 1;
    for (int i = 0; i < n_views; i++) {
        int64_t row = entry->head_dim, head = row * entry->n_tokens;
        whole[i] = (krul_view){
            .data = malloc(fake_view_bytes(entry)),
            .dtype = entry->dtype,
            .device_type = KRUL_DEVICE_CPU,
            .shape = {entry->n_batch, entry->n_heads, entry->n_tokens, entry->head_dim},
            .stride = {head * entry->n_heads, head, row, 1},
        };
    }
    if (status == KRUL_STATUS_OK) {
        status = krul_compressor_decode(backend, entry->codec, entry->kv, payload,
                                        (size_t)entry->payload_bytes, whole, n_views, err);
    }
    for (int i = 0; i < n_views; i++) {
        if (status == KRUL_STATUS_OK && !is_tried && block->views[i].data != NULL) {
            krul_view real = fake_real_view(&block->views[i]);
            fake_copy_rows(&real, whole[i].data, entry->n_tokens, 0);
        }
        free(whole[i].data);
    }
    return status;
}

static void
fake_decode_batch(const fake_work *work)
{
    if (fake_counts_down(&fake.works_until_damage)) {
        *work->flag = 1;
        return;
    }
    for (int32_t i = 0; i < work->batch.n_units; i++) {
        fake_descriptor block;
        memcpy(&block, work->chunk + work->batch.descriptors_offset + (size_t)i * sizeof block,
               sizeof block);
        const uint8_t *payload = work->chunk + block.payload_offset;
        if (!block.is_decoded) {
            if (fake_decode_block(&block, payload, false, NULL) != KRUL_STATUS_OK) {
                *work->flag = 1;
            }
            continue;
        }
        for (int k = 0; k < KRUL_COMPRESSOR_MAX_VIEWS; k++) {
            if (block.views[k].data != NULL) {
                krul_view real = fake_real_view(&block.views[k]);
                fake_copy_rows(&real, payload, block.entry.n_tokens, 0);
                payload += (fake_view_bytes(&block.entry) + 15) / 16 * 16;
            }
        }
    }
}

/* Predictors of chains, which begin anew when an address is used again. */
typedef struct fake_predictor {
    struct fake_predictor *next;
    const krul_device_chains *chains;
    const krul_predict_options *options;
    krul_predict *predict;
} fake_predictor;

static fake_predictor *fake_predictors; /* with fake_lock */

static krul_predict *
fake_find_predictor(const krul_device_chains *chains)
{
    pthread_mutex_lock(&fake_lock);
    fake_predictor *found = fake_predictors;
    while (found != NULL && (found->chains != chains || found->options != fake.predict_options)) {
        found = found->next;
    }
    if (found == NULL) {
        found = calloc(1, sizeof *found);
        *found = (fake_predictor){
            .next = fake_predictors, .chains = chains, .options = fake.predict_options};
        if (krul_predict_new(found->options, &found->predict, NULL) != KRUL_STATUS_OK) {
            abort();
        }
        fake_predictors = found;
    }
    pthread_mutex_unlock(&fake_lock);
    return found->predict;
}

static void
fake_free_predictors(void)
{
    while (fake_predictors != NULL) {
        fake_predictor *first = fake_predictors;
        fake_predictors = first->next;
        krul_predict_free(first->predict);
        free(first);
    }
}

/* Several streams may. */
static void
fake_set_flag(const fake_work *work)
{
    __atomic_store_n(work->flag, 1, __ATOMIC_RELAXED);
}

/* Write or find all over a batch's scratch what no other batch writes. */
static bool
fake_use_scratch(const fake_work *work, bool is_written)
{
    size_t n_words = krul_device_predict_scratch(work->chains, &work->predict_batch) / 8;
    uint64_t mark = (uint64_t)(uintptr_t)work->chunk * 31 + work->predict_batch.units_at * 7 +
                    (uint64_t)work->predict_batch.layer;
    bool is_same = true;
    for (size_t i = 0; i < n_words; i++) {
        if (is_written) {
            memcpy(work->scratch + 8 * i, &mark, 8);
        }
        is_same = memcmp(work->scratch + 8 * i, &mark, 8) == 0 && is_same;
    }
    return is_same;
}

static void
fake_decode_numbers(const fake_work *work)
{
    const krul_device_profile *profile = krul_device_chains_profile(work->chains);
    const krul_predict_options *options = fake.predict_options;
    const uint8_t *frequencies = (uint8_t *)fake_real(profile->memory) + profile->frequencies_at;
    bool is_there = memcmp(frequencies, options->tables,
                           (size_t)options->n_tables * sizeof *options->tables) == 0;
    if (fake_counts_down(&fake.works_until_damage) || !is_there) {
        fake_set_flag(work);
    }
    (void)fake_use_scratch(work, true);
}

static bool
fake_decode_link(const fake_work *work, krul_predict *predict, const fake_descriptor *block)
{
    const krul_backend *backend = NULL;
    const krul_store_entry *entry = &block->entry;
    krul_view whole[2] = {{.data = NULL}, {.data = NULL}};
    krul_status status = krul_backend_find(NULL, &backend, NULL);
    for (int i = 0; i < 2; i++) {
        int64_t row = entry->head_dim, head = row * entry->n_tokens;
        whole[i] = (krul_view){
            .data = block->views[i].data != NULL ? malloc(fake_view_bytes(entry)) : NULL,
            .dtype = entry->dtype,
            .device_type = KRUL_DEVICE_CPU,
            .shape = {entry->n_batch, entry->n_heads, entry->n_tokens, entry->head_dim},
            .stride = {head * entry->n_heads, head, row, 1},
        };
    }
    if (status == KRUL_STATUS_OK) {
        status = krul_predict_decode(backend, predict, entry->layer_lower, entry->token_start,
                                     entry->n_tokens, work->chunk + block->payload_offset,
                                     (size_t)entry->payload_bytes, whole, NULL);
    }
    for (int i = 0; i < 2; i++) {
        if (status == KRUL_STATUS_OK && block->views[i].data != NULL) {
            krul_view real = fake_real_view(&block->views[i]);
            fake_copy_rows(&real, whole[i].data, entry->n_tokens, 0);
        }
        free(whole[i].data);
    }
    return status == KRUL_STATUS_OK;
}

static void
fake_decode_rows(const fake_work *work)
{
    const krul_predict_options *options = fake.predict_options;
    const krul_rotary *rotary = &options->layers[0].rotary;
    size_t n_bytes = (size_t)options->n_tokens * (size_t)rotary->n_pairs * sizeof(float);
    krul_predict *predict = fake_find_predictor(work->chains);
    bool is_good = fake_use_scratch(work, false) && memcmp(work->memory, rotary->cos, n_bytes) == 0;
    for (int32_t i = 0; i < work->predict_batch.n_blocks; i++) {
        fake_descriptor block;
        memcpy(&block, work->chunk + work->predict_batch.units_at + (size_t)i * sizeof block,
               sizeof block);
        is_good = fake_decode_link(work, predict, &block) && is_good;
        atomic_fetch_add(&fake.n_predicted, 1);
    }
    if (!is_good) {
        fake_set_flag(work);
    }
}

/* What a source was, from what krul_device_encode_prepare wrote of it. */
static krul_view
fake_described_view(const krul_device_descriptor *about, int index, krul_dtype dtype)
{
    const krul_device_output *output = &about->outputs[index];
    int64_t element_bytes = (int64_t)krul_dtype_bytes(dtype);
    return (krul_view){
        .data = fake_real((const void *)(uintptr_t)output->address),
        .dtype = dtype,
        .device_type = KRUL_DEVICE_CPU,
        .shape = {about->n_planes / about->n_heads, about->n_heads, about->n_tokens,
                  about->head_dim},
        .stride = {output->batch_bytes / element_bytes, output->head_bytes / element_bytes,
                   output->token_bytes / element_bytes, 1},
    };
}

static void
fake_encode_batch(const fake_work *work)
{
    const krul_device_encode_batch *batch = &work->coding;
    const krul_backend *backend = NULL;
    bool is_pair = krul_codec_n_layers(batch->codec) == 2;
    int32_t n_views = is_pair ? 2 : 1;
    if (krul_backend_find(NULL, &backend, NULL) != KRUL_STATUS_OK) {
        abort();
    }
    for (int32_t i = 0; i < batch->n_blocks; i++) {
        krul_device_descriptor about;
        memcpy(&about, work->plan + batch->descriptors_offset + (size_t)i * sizeof about,
               sizeof about);
        krul_view views[KRUL_COMPRESSOR_MAX_VIEWS] = {
            fake_described_view(&about, 0, batch->dtype),
            fake_described_view(&about, is_pair ? 1 : 0, batch->dtype)};
        krul_device_result *result = &work->results[about.index];
        size_t capacity_bytes = 0, n_bytes = 0;
        krul_codec used;
        if (krul_compressor_bound(views, n_views, &capacity_bytes, NULL) != KRUL_STATUS_OK) {
            abort();
        }
        uint8_t *payload = malloc(capacity_bytes);
        if (krul_compressor_encode(backend, batch->codec, (krul_kv)about.kv, views, n_views,
                                   payload, capacity_bytes, &n_bytes, &used, result->error,
                                   NULL) != KRUL_STATUS_OK) {
            abort();
        }
        result->does_not_fit = used != batch->codec;
        result->payload_bytes = n_bytes;
        if (used == batch->codec) {
            memcpy(work->payloads + (is_pair ? about.directory_offset : about.data_offset), payload,
                   n_bytes);
        }
        free(payload);
    }
    atomic_fetch_add(&fake.n_encoded, 1);
}

/* A view of queries or keys, from what krul_device_observe_fill wrote. */
static krul_view
fake_observed_view(const void *data, int32_t dtype, const int64_t *stride, int64_t n_batch,
                   int64_t n_heads, int64_t n_tokens, int64_t head_dim)
{
    return (krul_view){
        .data = fake_real(data),
        .dtype = (krul_dtype)dtype,
        .device_type = KRUL_DEVICE_CPU,
        .shape = {n_batch, n_heads, n_tokens, head_dim},
        .stride = {stride[0], stride[1], stride[2], 1},
    };
}

/* Where a row is: that is written where it is no padding. Where it is, any padding will do. */
static int64_t
fake_row_position(const krul_device_observation *plan, const int32_t *rows, const uint8_t *real)
{
    int64_t padding = 0;
    for (int32_t b = 0; b < plan->n_batch; b++) {
        if (rows[b * plan->n_rows] >= 0) {
            return rows[b * plan->n_rows];
        }
    }
    for (int32_t b = 0; b < plan->n_batch; b++) {
        if (real[b * plan->n_keys_total + padding] != 0) {
            padding++;
            b = -1;
        }
    }
    return padding;
}

static void
fake_observe_pass(const fake_work *work)
{
    const krul_device_observation *plan = work->observation;
    const uint8_t *image = work->image, *real = plan->real_at == 0 ? NULL : image + plan->real_at;
    const int32_t *rows = (const int32_t *)(const void *)(image + plan->positions_at);
    size_t n_rows = (size_t)plan->n_rows, n_all = n_rows * (size_t)plan->n_batch;
    int32_t n_layers = plan->n_layers;
    int64_t *positions = calloc(n_rows + 1, sizeof *positions);
    int64_t *starts = calloc(n_all * (size_t)n_layers + 1, sizeof *starts);
    krul_estimator_layer *layers = calloc((size_t)n_layers, sizeof *layers);
    for (int32_t r = 0; r < plan->n_rows; r++) {
        positions[r] = fake_row_position(plan, rows + r, real);
    }
    for (int32_t g = 0; g < plan->n_groups; g++) {
        const krul_device_observe_group *group = &plan->groups[g];
        for (int32_t m = 0; m < group->n_members; m++) {
            krul_device_observed about;
            memcpy(&about, image + group->members_at + (size_t)m * sizeof about, sizeof about);
            krul_estimator_layer *layer = &layers[about.layer];
            layer->queries = fake_observed_view(about.queries, about.query_dtype,
                                                about.query_stride, plan->n_batch, group->n_heads,
                                                plan->n_rows, about.head_dim);
            layer->keys = fake_observed_view(about.keys, about.key_dtype, about.key_stride,
                                             plan->n_batch, group->n_heads / about.heads_per_kv,
                                             about.n_keys, about.head_dim);
            layer->scaling = about.scaling;
            layer->softcap = about.softcap;
            layer->key_start = about.key_start;
            if (about.sinks_at != 0) {
                layer->sinks = (const float *)(const void *)(image + about.sinks_at);
            }
            if (about.starts_at != 0) {
                const int32_t *from = (const int32_t *)(const void *)(image + about.starts_at);
                int64_t *to = starts + n_all * (size_t)about.layer;
                for (size_t i = 0; i < n_all; i++) {
                    to[i] = from[i];
                }
                layer->row_starts = to;
            }
        }
    }
    const krul_backend *backend = NULL;
    krul_estimator_sums sums = work->sums;
    double n_rows_again = 0; /* counted when it was enqueued */
    sums.n_rows = &n_rows_again;
    if (krul_backend_find(NULL, &backend, NULL) != KRUL_STATUS_OK ||
        krul_estimator_observe(backend, layers, n_layers, positions, plan->n_rows, real,
                               plan->n_keys_total, plan->weight, 1 << 20, 1, &sums,
                               NULL) != KRUL_STATUS_OK) {
        abort();
    }
    free(layers);
    free(starts);
    free(positions);
    atomic_fetch_add(&fake.n_observed, 1);
}

static void
fake_carry_out(fake_stream *stream, const fake_work *work)
{
    int max_delay_us = fake.max_delay_us;
    if (max_delay_us > 0) {
        usleep((useconds_t)(rand_r(&stream->seed) % max_delay_us));
    }
    bool fails = work->kind != FAKE_RECORD && work->kind != FAKE_WAIT &&
                 fake_counts_down(&fake.works_until_failure);
    if (fails) {
        atomic_fetch_add(&fake.n_failed, 1);
        atomic_store(&fake_has_died, true);
    }
    bool is_dead = atomic_load(&fake_has_died);
    if (work->kind == FAKE_COPY && !is_dead) {
        memcpy(work->to, work->from, work->n_bytes);
    }
    else if (work->kind == FAKE_DECODE && !is_dead) {
        fake_decode_batch(work);
    }
    else if (work->kind == FAKE_NUMBERS && !is_dead) {
        fake_decode_numbers(work);
    }
    else if (work->kind == FAKE_ROWS && !is_dead) {
        fake_decode_rows(work);
    }
    else if (work->kind == FAKE_ENCODE && !is_dead) {
        fake_encode_batch(work);
    }
    else if (work->kind == FAKE_OBSERVE && !is_dead) {
        fake_observe_pass(work);
    }
    else if (work->kind == FAKE_WRITE && !is_dead) {
        krul_view real = fake_real_view(&work->view);
        fake_copy_rows(&real, NULL, 0, work->byte);
    }
    free(work->observation);
    pthread_mutex_lock(&fake_lock);
    if (work->kind == FAKE_RECORD) {
        work->event->n_reached = work->turn;
    }
    while (work->kind == FAKE_WAIT && work->event->n_reached < work->turn) {
        pthread_cond_wait(&fake_changed, &fake_lock);
    }
    if (work->event != NULL && --work->event->n_works == 0 && work->event->is_freed) {
        free(work->event);
    }
    pthread_cond_broadcast(&fake_changed);
    pthread_mutex_unlock(&fake_lock);
}

static void *
fake_run_stream(void *argument)
{
    fake_stream *stream = argument;
    pthread_mutex_lock(&fake_lock);
    for (;;) {
        while (stream->first == NULL && !stream->is_ending) {
            pthread_cond_wait(&fake_changed, &fake_lock);
        }
        fake_work *work = stream->first;
        if (work == NULL) {
            break;
        }
        stream->first = work->next;
        stream->is_busy = true;
        pthread_mutex_unlock(&fake_lock);
        fake_carry_out(stream, work);
        free(work);
        pthread_mutex_lock(&fake_lock);
        stream->is_busy = false;
        pthread_cond_broadcast(&fake_changed);
    }
    pthread_mutex_unlock(&fake_lock);
    return NULL;
}

static void
fake_enqueue(fake_stream *stream, const fake_work *work)
{
    fake_work *copy = malloc(sizeof *copy);
    *copy = *work;
    copy->next = NULL;
    pthread_mutex_lock(&fake_lock);
    if (copy->event != NULL) {
        copy->event->n_works++;
    }
    if (copy->kind == FAKE_RECORD) {
        copy->turn = ++copy->event->n_recorded;
    }
    if (copy->kind == FAKE_WAIT) {
        copy->turn = copy->event->n_recorded;
    }
    if (stream->first == NULL) {
        stream->first = copy;
    }
    else {
        stream->last->next = copy;
    }
    stream->last = copy;
    pthread_cond_broadcast(&fake_changed);
    pthread_mutex_unlock(&fake_lock);
}

/* ---- the table --------------------------------------------------------------------------------- */

static krul_status
fake_open(int32_t device_id, krul_device **out, krul_error *err)
{
    krul_status status = fake_call("open", err);
    if (status == KRUL_STATUS_OK) {
        *out = malloc(sizeof **out);
        (*out)->id = device_id;
        atomic_fetch_add(&fake.n_devices, 1);
    }
    return status;
}

static void
fake_close(krul_device *device)
{
    atomic_fetch_sub(&fake.n_devices, 1);
    free(device);
}

/* Memory with its size before it. */
static krul_status
fake_new(size_t n_bytes, size_t limit, atomic_size_t *total, atomic_long *count, void **out,
         krul_error *err)
{
    if (limit > 0 && atomic_load(total) + n_bytes > limit) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "%zu bytes are too many", n_bytes);
    }
    uint8_t *memory = malloc(n_bytes + 64);
    memcpy(memory, &n_bytes, sizeof n_bytes);
    atomic_fetch_add(total, n_bytes);
    atomic_fetch_add(count, 1);
    *out = memory + 64;
    return KRUL_STATUS_OK;
}

static void
fake_free(uint8_t *memory, atomic_size_t *total, atomic_long *count)
{
    size_t n_bytes;
    memcpy(&n_bytes, memory - 64, sizeof n_bytes);
    memset(memory, 0xEE, n_bytes); /* who is still at it races with this */
    atomic_fetch_sub(total, n_bytes);
    atomic_fetch_sub(count, 1);
    free(memory - 64);
}

static krul_status
fake_pinned_new(krul_device *device, size_t n_bytes, void **out, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("pinned_new", err);
    return status != KRUL_STATUS_OK
               ? status
               : fake_new(n_bytes, fake.pinned_limit, &fake.pinned_bytes, &fake.n_pinned, out, err);
}

static void
fake_pinned_free(krul_device *device, void *memory)
{
    (void)device;
    fake_free(memory, &fake.pinned_bytes, &fake.n_pinned);
}

static krul_status
fake_memory_new(krul_device *device, size_t n_bytes, void **out, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("memory_new", err);
    if (status == KRUL_STATUS_OK) {
        status = fake_new(n_bytes, fake.memory_limit, &fake.memory_bytes, &fake.n_memory, out, err);
    }
    if (status == KRUL_STATUS_OK) {
        *out = (void *)((uintptr_t)*out + fake_offset);
    }
    return status;
}

static void
fake_memory_free(krul_device *device, void *memory)
{
    (void)device;
    fake_free(fake_real(memory), &fake.memory_bytes, &fake.n_memory);
}

static krul_status
fake_stream_new(krul_device *device, void **out, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("stream_new", err);
    if (status == KRUL_STATUS_OK) {
        fake_stream *stream = calloc(1, sizeof *stream);
        stream->seed = (unsigned)atomic_fetch_add(&fake.n_streams, 1) + 1;
        pthread_create(&stream->thread, NULL, fake_run_stream, stream);
        *out = stream;
    }
    return status;
}

static void
fake_stream_free(krul_device *device, void *stream_in)
{
    (void)device;
    fake_stream *stream = stream_in;
    pthread_mutex_lock(&fake_lock);
    stream->is_ending = true;
    pthread_cond_broadcast(&fake_changed);
    pthread_mutex_unlock(&fake_lock);
    pthread_join(stream->thread, NULL);
    atomic_fetch_sub(&fake.n_streams, 1);
    free(stream);
}

static krul_status
fake_stream_synchronize(krul_device *device, void *stream_in, krul_error *err)
{
    (void)device;
    fake_stream *stream = stream_in;
    pthread_mutex_lock(&fake_lock);
    while (stream->first != NULL || stream->is_busy) {
        pthread_cond_wait(&fake_changed, &fake_lock);
    }
    pthread_mutex_unlock(&fake_lock);
    return fake_call("stream_synchronize", err);
}

static krul_status
fake_event_new(krul_device *device, void **out, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("event_new", err);
    if (status == KRUL_STATUS_OK) {
        *out = calloc(1, sizeof(fake_event));
        atomic_fetch_add(&fake.n_events, 1);
    }
    return status;
}

static void
fake_event_free(krul_device *device, void *event_in)
{
    (void)device;
    fake_event *event = event_in;
    atomic_fetch_sub(&fake.n_events, 1);
    pthread_mutex_lock(&fake_lock);
    bool is_over = event->n_works == 0;
    event->is_freed = true;
    pthread_mutex_unlock(&fake_lock);
    if (is_over) {
        free(event);
    }
}

static krul_status
fake_event_record(krul_device *device, void *event, void *stream, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("event_record", err);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(stream, &(fake_work){.kind = FAKE_RECORD, .event = event});
    }
    return status;
}

static krul_status
fake_event_synchronize(krul_device *device, void *event_in, krul_error *err)
{
    (void)device;
    fake_event *event = event_in;
    pthread_mutex_lock(&fake_lock);
    long turn = event->n_recorded;
    while (event->n_reached < turn) {
        pthread_cond_wait(&fake_changed, &fake_lock);
    }
    pthread_mutex_unlock(&fake_lock);
    return fake_call("event_synchronize", err);
}

static krul_status
fake_stream_wait_event(krul_device *device, void *stream, void *event, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("stream_wait_event", err);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(stream, &(fake_work){.kind = FAKE_WAIT, .event = event});
    }
    return status;
}

static krul_status
fake_copy_in(krul_device *device, void *stream, void *to, const void *from, size_t n_bytes,
             krul_error *err)
{
    (void)device;
    krul_status status = fake_call("copy_in", err);
    if (status == KRUL_STATUS_OK) {
        atomic_fetch_add(&fake.n_copies, 1);
        atomic_fetch_add(&fake.n_large_copies, n_bytes >= fake.large_bytes);
        atomic_fetch_add(&fake.copied_bytes, n_bytes);
        fake_enqueue(
            stream,
            &(fake_work){.kind = FAKE_COPY, .to = fake_real(to), .from = from, .n_bytes = n_bytes});
    }
    return status;
}

static krul_status
fake_copy_out(krul_device *device, void *stream, void *to, const void *from, size_t n_bytes,
              krul_error *err)
{
    (void)device;
    krul_status status = fake_call("copy_out", err);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(
            stream,
            &(fake_work){.kind = FAKE_COPY, .to = to, .from = fake_real(from), .n_bytes = n_bytes});
    }
    return status;
}

static bool
fake_is_supported(const krul_store_entry *entry)
{
    return entry->codec != KRUL_CODEC_PREDICT &&
           !(fake.host_decodes_exact && entry->codec == KRUL_CODEC_EXACT);
}

static size_t
fake_bound(const krul_device_block *blocks, int32_t n_blocks)
{
    (void)blocks;
    return (size_t)n_blocks * sizeof(fake_descriptor);
}

static krul_status
fake_prepare(uint8_t *chunk, size_t chunk_bytes, size_t used_bytes, const krul_device_block *blocks,
             int32_t n_blocks, krul_device_batch *batches_out, int32_t *n_batches_out,
             size_t *used_bytes_out, int32_t *bad_block_out, krul_error *err)
{
    size_t n_bytes = used_bytes + (size_t)n_blocks * sizeof(fake_descriptor);
    if (n_bytes > chunk_bytes) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "%zu bytes in a chunk of %zu", n_bytes,
                         chunk_bytes);
    }
    static atomic_uint turn;
    if (fake.max_delay_us > 0) { /* so that others do something between this and the enqueueing */
        usleep(atomic_fetch_add(&turn, 7919) % 4 == 0 ? 2000 : 10);
    }
    for (int32_t i = 0; i < n_blocks; i++) {
        fake_descriptor block = {.entry = *blocks[i].entry,
                                 .payload_offset = blocks[i].payload_offset,
                                 .is_decoded = blocks[i].is_decoded};
        memcpy(block.views, blocks[i].views, sizeof block.views);
        if (!block.is_decoded) {
            krul_status status = fake_decode_block(&block, chunk + block.payload_offset, true, err);
            if (status != KRUL_STATUS_OK) {
                *bad_block_out = i;
                return status;
            }
        }
        memcpy(chunk + used_bytes + (size_t)i * sizeof block, &block, sizeof block);
    }
    int32_t n_first = n_blocks > 1 ? n_blocks / 2 : n_blocks;
    batches_out[0] = (krul_device_batch){.n_units = n_first, .descriptors_offset = used_bytes};
    batches_out[1] = (krul_device_batch){
        .n_units = n_blocks - n_first,
        .descriptors_offset = used_bytes + (size_t)n_first * sizeof(fake_descriptor)};
    *n_batches_out = n_first < n_blocks ? 2 : 1;
    *used_bytes_out = n_bytes;
    return KRUL_STATUS_OK;
}

static krul_status
fake_decode(krul_device *device, void *stream, const krul_device_batch *batch, const uint8_t *chunk,
            uint32_t *damage_flag, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("decode", err);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(stream, &(fake_work){.kind = FAKE_DECODE,
                                          .batch = *batch,
                                          .chunk = fake_real(chunk),
                                          .flag = fake_real(damage_flag)});
    }
    return status;
}

static krul_status
fake_products_new(krul_device *device, void *stream, void **out, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("products_new", err);
    if (status == KRUL_STATUS_OK && fake.has_no_products) {
        status = krul_fail(err, KRUL_STATUS_UNSUPPORTED, "there is no library for products");
    }
    if (status == KRUL_STATUS_OK) {
        *out = calloc(1, sizeof(void *));
        memcpy(*out, &stream, sizeof stream);
        atomic_fetch_add(&fake.n_products, 1);
    }
    return status;
}

static void
fake_products_free(krul_device *device, void *products)
{
    (void)device;
    atomic_fetch_sub(&fake.n_products, 1);
    free(products);
}

static size_t
fake_predict_bound(const krul_device_block *blocks, int32_t n_blocks)
{
    return krul_device_predict_bound(blocks, n_blocks) + (size_t)n_blocks * sizeof(fake_descriptor);
}

/* What the library's own says of the blocks, and then, in place of units, what to decode. */
static krul_status
fake_predict_prepare(krul_device_chains *chains, uint8_t *chunk, size_t chunk_bytes,
                     size_t used_bytes, const krul_device_block *blocks, int32_t n_blocks,
                     krul_device_predict_batch *batches_out, int32_t *n_batches_out,
                     size_t *used_bytes_out, int32_t *bad_block_out, krul_error *err)
{
    size_t end = 0;
    krul_status status = krul_device_predict_prepare(chains, chunk, chunk_bytes, used_bytes, blocks,
                                                     n_blocks, batches_out, n_batches_out, &end,
                                                     bad_block_out, err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    if (end + (size_t)n_blocks * sizeof(fake_descriptor) > chunk_bytes) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "%zu bytes in a chunk of %zu", end,
                         chunk_bytes);
    }
    for (int32_t i = 0, batch = 0, n_left = batches_out[0].n_blocks; i < n_blocks; i++) {
        fake_descriptor block = {.entry = *blocks[i].entry,
                                 .payload_offset = blocks[i].payload_offset};
        memcpy(block.views, blocks[i].views, sizeof block.views);
        while (n_left == 0) {
            n_left = batches_out[++batch].n_blocks;
        }
        if (n_left-- == batches_out[batch].n_blocks) {
            batches_out[batch].units_at = end;
        }
        memcpy(chunk + end, &block, sizeof block);
        end += sizeof block;
    }
    *used_bytes_out = end;
    return KRUL_STATUS_OK;
}

static krul_status
fake_predict_numbers(krul_device *device, void *stream, const krul_device_chains *chains,
                     const krul_device_predict_batch *batch, const uint8_t *chunk, uint8_t *scratch,
                     uint32_t *damage_flag, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("predict_numbers", err);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(stream, &(fake_work){.kind = FAKE_NUMBERS,
                                          .chains = chains,
                                          .predict_batch = *batch,
                                          .chunk = fake_real(chunk),
                                          .scratch = fake_real(scratch),
                                          .flag = fake_real(damage_flag)});
    }
    return status;
}

static krul_status
fake_predict_rows(krul_device *device, void *products, const krul_device_chains *chains,
                  const krul_device_predict_batch *batch, const uint8_t *chunk, uint8_t *memory,
                  uint8_t *scratch, krul_error *err)
{
    (void)device;
    krul_status status = fake_call("predict_rows", err);
    void *stream;
    memcpy(&stream, products, sizeof stream);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(stream, &(fake_work){.kind = FAKE_ROWS,
                                          .chains = chains,
                                          .predict_batch = *batch,
                                          .chunk = fake_real(chunk),
                                          .memory = fake_real(memory),
                                          .scratch = fake_real(scratch),
                                          .flag = fake_real(chunk)});
    }
    return status;
}

static krul_status
fake_encode(krul_device *device, void *stream, const krul_device_encode_batch *batch,
            const uint8_t *plan, uint8_t *payloads, uint8_t *workspace, krul_device_result *results,
            krul_error *err)
{
    (void)device;
    (void)workspace;
    krul_status status = fake_call("encode", err);
    if (status == KRUL_STATUS_OK) {
        fake_enqueue(stream, &(fake_work){.kind = FAKE_ENCODE,
                                          .coding = *batch,
                                          .plan = fake_real(plan),
                                          .payloads = fake_real(payloads),
                                          .results = fake_real(results)});
    }
    return status;
}

static krul_status
fake_observe(krul_device *device, void *stream, const krul_device_observation *observation,
             const uint8_t *image, uint8_t *workspace, krul_estimator_sums *sums, krul_error *err)
{
    (void)device;
    (void)workspace;
    krul_status status = fake_call("observe", err);
    if (status == KRUL_STATUS_OK) {
        fake_work work = {.kind = FAKE_OBSERVE, .image = image, .sums = *sums};
        work.observation = malloc(sizeof *observation);
        *work.observation = *observation;
        work.sums.distances = fake_real(sums->distances);
        work.sums.importance = fake_real(sums->importance);
        work.sums.received = fake_real(sums->received);
        fake_enqueue(stream, &work);
        *sums->n_rows += observation->weight * observation->n_real_rows;
    }
    return status;
}

static const krul_device_ops fake_ops = {
    .abi = KRUL_DEVICE_ABI,
    .device_type = KRUL_DEVICE_CUDA,
    .name = "fake",
    .open = fake_open,
    .close = fake_close,
    .pinned_new = fake_pinned_new,
    .pinned_free = fake_pinned_free,
    .memory_new = fake_memory_new,
    .memory_free = fake_memory_free,
    .stream_new = fake_stream_new,
    .stream_free = fake_stream_free,
    .stream_synchronize = fake_stream_synchronize,
    .event_new = fake_event_new,
    .event_free = fake_event_free,
    .event_record = fake_event_record,
    .event_synchronize = fake_event_synchronize,
    .stream_wait_event = fake_stream_wait_event,
    .copy_in = fake_copy_in,
    .copy_out = fake_copy_out,
    .decode_is_supported = fake_is_supported,
    .decode_bound = fake_bound,
    .decode_prepare = fake_prepare,
    .decode = fake_decode,
    .products_new = fake_products_new,
    .products_free = fake_products_free,
    .predict_bound = fake_predict_bound,
    .predict_prepare = fake_predict_prepare,
    .predict_numbers = fake_predict_numbers,
    .predict_rows = fake_predict_rows,
    .encode = fake_encode,
    .observe = fake_observe,
};

/* Behave as at first. */
static void
fake_calm(void)
{
    fake.max_delay_us = 0;
    fake.host_decodes_exact = fake.is_dead = fake.has_no_products = false;
    fake.pinned_limit = fake.memory_limit = 0;
    atomic_store(&fake.calls_until_failure, -1);
    atomic_store(&fake.works_until_failure, -1);
    atomic_store(&fake.works_until_damage, -1);
    atomic_store(&fake.n_failed, 0);
    atomic_store(&fake.n_encoded, 0);
    atomic_store(&fake.n_observed, 0);
    atomic_store(&fake_has_died, false);
    fake_free_predictors();
}

/* Has everything been given back? */
static bool
fake_is_empty(void)
{
    return atomic_load(&fake.n_devices) == 0 && atomic_load(&fake.n_streams) == 0 &&
           atomic_load(&fake.n_events) == 0 && atomic_load(&fake.n_pinned) == 0 &&
           atomic_load(&fake.n_memory) == 0 && atomic_load(&fake.n_products) == 0;
}

#endif /* FAKE_DEVICE_H */

/* test_estimator_device.c - observing on a fake device: the CPU's sums, order, growth, faults. */
#include <math.h>

#include "check.h"
#include "fake_device.h"
#include "internal.h"

enum {
    N_LAYERS = 4, /* the third is not observed, the last has other heads */
    N_BATCH = 2,
    N_HEADS = 4,
    N_KV_HEADS = 2,
    HEAD_DIM = 8,
    N_ROWS = 5,
    MAX_KEYS = 3000,
    N_QUERIES = N_BATCH * 2 * N_HEADS * N_ROWS * HEAD_DIM,
    N_KEYS = N_BATCH * N_HEADS * MAX_KEYS * HEAD_DIM,
};

static const krul_backend *best;

/* What layers attend with: queries, then keys. */
static float source[N_LAYERS][N_QUERIES + N_KEYS];

static double distances[2][N_LAYERS * N_LAYERS], importance[2][N_LAYERS * 2], n_rows[2];
static float received[2][N_LAYERS * MAX_KEYS];

static krul_estimator_sums
sums_of(int which)
{
    return (krul_estimator_sums){.distances = distances[which],
                                 .importance = importance[which],
                                 .received = received[which],
                                 .received_stride = MAX_KEYS,
                                 .n_rows = &n_rows[which]};
}

static void
clear_sums(void)
{
    memset(distances, 0, sizeof distances);
    memset(importance, 0, sizeof importance);
    memset(received, 0, sizeof received);
    memset(n_rows, 0, sizeof n_rows);
}

/* Are the device's sums, [1], the CPU's, [0], but for what it cost to add them up in two goes? */
static bool
are_same(void)
{
    bool is = n_rows[0] == n_rows[1];
    for (int i = 0; i < N_LAYERS * N_LAYERS; i++) {
        is = is && (isnan(distances[0][i])
                        ? isnan(distances[1][i])
                        : fabs(distances[0][i] - distances[1][i]) <= 1e-12 * fabs(distances[0][i]));
    }
    for (int i = 0; i < N_LAYERS * 2; i++) {
        is = is && fabs(importance[0][i] - importance[1][i]) <= 1e-12 * fabs(importance[0][i]);
    }
    for (int i = 0; i < N_LAYERS * MAX_KEYS; i++) {
        is = is && fabsf(received[0][i] - received[1][i]) <= 1e-6f * fabsf(received[0][i]);
    }
    return is;
}

/* A pass over n_keys tokens. */
typedef struct pass {
    krul_estimator_layer layers[N_LAYERS];
    int64_t positions[N_ROWS];
    int64_t starts[N_BATCH * N_ROWS];
    uint8_t is_real[N_BATCH * MAX_KEYS];
    float sinks[2 * N_HEADS];
    int64_t n_keys;
} pass;

static krul_view
view_of(const void *base, int layer, size_t offset, int64_t n_heads, int64_t n_tokens,
        int32_t device_id)
{
    return (krul_view){
        .data = (void *)((uintptr_t)base + (size_t)layer * sizeof source[0] +
                         offset * sizeof(float)),
        .dtype = KRUL_DTYPE_F32,
        .device_type = device_id >= 0 ? KRUL_DEVICE_CUDA : KRUL_DEVICE_CPU,
        .device_id = device_id >= 0 ? device_id : 0,
        .is_read_only = true,
        .shape = {N_BATCH, n_heads, n_tokens, HEAD_DIM},
        .stride = {n_heads * n_tokens * HEAD_DIM, n_tokens * HEAD_DIM, HEAD_DIM, 1},
    };
}

static void
make_pass(pass *out, const void *base, int64_t n_keys, int32_t device_id)
{
    memset(out, 0, sizeof *out);
    out->n_keys = n_keys;
    for (int r = 0; r < N_ROWS; r++) {
        out->positions[r] = (n_keys - 1) * r / (N_ROWS - 1);
        for (int b = 0; b < N_BATCH; b++) {
            out->starts[b * N_ROWS + r] = krul_max_i64(0, out->positions[r] - 20);
        }
    }
    for (int64_t i = 0; i < N_BATCH * n_keys; i++) {
        out->is_real[i] = i < n_keys || i % n_keys > 3; /* of the second, the first are padding */
    }
    for (int l = 0; l < N_LAYERS; l++) {
        int64_t n_heads = l == 3 ? 2 * N_HEADS : N_HEADS;
        krul_estimator_layer *layer = &out->layers[l];
        if (l == 2) {
            continue;
        }
        layer->queries = view_of(base, l, 0, n_heads, N_ROWS, device_id);
        layer->keys = view_of(base, l, N_QUERIES, N_KV_HEADS, n_keys, device_id);
        layer->scaling = 0.4f;
        layer->softcap = l == 1 ? 20.0f : 0.0f;
        layer->sinks = l == 1 ? out->sinks : NULL;
        layer->row_starts = l == 1 ? out->starts : NULL;
    }
}

static void
observe_here(int64_t n_keys, double weight)
{
    static pass here;
    krul_estimator_sums sums = sums_of(0);
    make_pass(&here, source, n_keys, -1);
    CHECK(krul_estimator_observe(best, here.layers, N_LAYERS, here.positions, N_ROWS, here.is_real,
                                 n_keys, weight, 1 << 20, 1, &sums, NULL) == KRUL_STATUS_OK);
}

/* The layers' memory on a device, and the stream of who writes it. */
typedef struct place {
    krul_device *device;
    void *memory;
    void *stream;
    void *pinned;
    krul_device_event written;
    krul_device_pool *pool;
    krul_observer *observer;
} place;

static place
new_place(void)
{
    place made = {.device = NULL};
    if (fake_ops.open(0, &made.device, NULL) != KRUL_STATUS_OK ||
        fake_ops.memory_new(made.device, sizeof source, &made.memory, NULL) != KRUL_STATUS_OK ||
        fake_ops.pinned_new(made.device, sizeof source, &made.pinned, NULL) != KRUL_STATUS_OK ||
        fake_ops.stream_new(made.device, &made.stream, NULL) != KRUL_STATUS_OK ||
        fake_ops.event_new(made.device, &made.written.event, NULL) != KRUL_STATUS_OK ||
        krul_device_pool_new(&fake_ops, NULL, &made.pool, NULL) != KRUL_STATUS_OK ||
        krul_observer_new(made.pool, 0, N_LAYERS, &made.observer, NULL) != KRUL_STATUS_OK) {
        abort(); /* nothing that follows makes sense */
    }
    memcpy(made.pinned, source, sizeof source);
    memcpy(fake_real(made.memory), source, sizeof source);
    return made;
}

static void
free_place(place *at)
{
    krul_observer_free(at->observer);
    krul_device_pool_free(at->pool);
    fake_ops.event_free(at->device, at->written.event);
    fake_ops.stream_free(at->device, at->stream);
    fake_ops.pinned_free(at->device, at->pinned);
    fake_ops.memory_free(at->device, at->memory);
    fake_ops.close(at->device);
    CHECK(fake_is_empty());
}

static krul_status
observe_there(place *at, int64_t n_keys, double weight, krul_error *err)
{
    static pass there;
    make_pass(&there, at->memory, n_keys, 0);
    return krul_observer_observe(at->observer, &at->written, 1, there.layers, there.positions,
                                 N_ROWS, there.is_real, n_keys, weight, err);
}

static void
test_sums(void)
{
    place at = new_place();
    krul_estimator_sums sums = sums_of(1);
    const int64_t n_keys[] = {40, 90, 1500, 1501, 2900, 60};
    clear_sums();
    CHECK(krul_observer_read(at.observer, &sums, NULL) == KRUL_STATUS_OK); /* nothing yet */
    for (size_t i = 0; i < KRUL_LENGTH(n_keys); i++) {
        observe_here(n_keys[i], 1.5 + (double)i);
        CHECK(observe_there(&at, n_keys[i], 1.5 + (double)i, NULL) == KRUL_STATUS_OK);
        if (i % 2 == 1) {
            CHECK(krul_observer_read(at.observer, &sums, NULL) == KRUL_STATUS_OK);
            CHECK(are_same());
        }
    }
    CHECK(krul_observer_read(at.observer, &sums, NULL) == KRUL_STATUS_OK); /* nothing since */
    CHECK(are_same() && n_rows[0] > 0 && isnan(distances[1][2]) && distances[1][1] > 0);
    CHECK(atomic_load(&fake.n_observed) == (long)KRUL_LENGTH(n_keys));
    free_place(&at);
    fake_calm();
}

/* Queries and keys are read when they are there, and not once the call has returned. */
static void
test_order(void)
{
    place at = new_place();
    krul_estimator_sums sums = sums_of(1);
    fake.max_delay_us = 2000;
    clear_sums();
    for (int round = 0; round < 6; round++) {
        memset(fake_real(at.memory), round + 1, sizeof source);
        CHECK(fake_ops.copy_in(at.device, at.stream, at.memory, at.pinned, sizeof source, NULL) ==
              KRUL_STATUS_OK);
        CHECK(fake_ops.event_record(at.device, at.written.event, at.stream, NULL) ==
              KRUL_STATUS_OK);
        CHECK(observe_there(&at, 50, 1, NULL) == KRUL_STATUS_OK);
        observe_here(50, 1);
    }
    CHECK(krul_observer_read(at.observer, &sums, NULL) == KRUL_STATUS_OK);
    CHECK(are_same());
    fake_calm();
    free_place(&at);
}

/* A failure is told; sums that are given are right, and those that may not be are not given. */
static void
test_faults(void)
{
    int n_lost = 0, n_kept = 0;
    for (int kind = 0; kind < 2; kind++) {
        bool has_failed = true;
        for (long turn = 0; has_failed && turn < 500; turn++) {
            place at = new_place();
            krul_estimator_sums sums = sums_of(1);
            krul_error err = {.status = KRUL_STATUS_OK};
            clear_sums();
            atomic_store(kind == 0 ? &fake.calls_until_failure : &fake.works_until_failure, turn);
            const int64_t n_keys[] = {40, 1100};
            for (int i = 0; i < 2; i++) {
                krul_status status = observe_there(&at, n_keys[i], 1, &err);
                CHECK(status == KRUL_STATUS_OK ||
                      (status == KRUL_STATUS_DEVICE && err.message[0] != '\0'));
                if (status == KRUL_STATUS_OK) {
                    observe_here(n_keys[i], 1);
                }
            }
            krul_status status = krul_observer_read(at.observer, &sums, &err);
            has_failed = atomic_load(&fake.n_failed) > 0;
            if (status != KRUL_STATUS_OK) { /* once more, with a device that is well again */
                fake_calm();
                status = krul_observer_read(at.observer, &sums, &err);
            }
            fake_calm();
            CHECK(status == KRUL_STATUS_OK ? are_same()
                                           : status == KRUL_STATUS_DEVICE && n_rows[1] == 0);
            n_kept += has_failed && status == KRUL_STATUS_OK && n_rows[1] > 0;
            n_lost += status != KRUL_STATUS_OK;
            free_place(&at);
        }
        CHECK(!has_failed);
    }
    CHECK(n_lost > 0 && n_kept > 0);
}

static void
test_out_of_memory(void)
{
    int n_refused = 0, n_good = 0;
    for (size_t limit = 1000; limit < 4000000; limit *= 2) {
        for (int kind = 0; kind < 2; kind++) {
            place at = new_place();
            krul_estimator_sums sums = sums_of(1);
            krul_error err;
            const int64_t n_keys[] = {40, 2800, 50};
            clear_sums();
            fake.memory_limit = kind == 0 ? sizeof source + limit : 0;
            fake.pinned_limit = kind == 0 ? 0 : sizeof source + limit;
            for (int i = 0; i < 3; i++) {
                krul_status status = observe_there(&at, n_keys[i], 1, &err);
                CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_NO_MEMORY);
                n_refused += status != KRUL_STATUS_OK;
                n_good += status == KRUL_STATUS_OK;
                if (status == KRUL_STATUS_OK) {
                    observe_here(n_keys[i], 1);
                }
            }
            krul_status status = krul_observer_read(at.observer, &sums, &err);
            CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_NO_MEMORY);
            fake_calm();
            if (status != KRUL_STATUS_OK) { /* nothing is lost: there is room again */
                CHECK(krul_observer_read(at.observer, &sums, &err) == KRUL_STATUS_OK);
            }
            CHECK(are_same());
            free_place(&at);
        }
    }
    CHECK(n_refused > 3 && n_good > 3);
}

static void
test_refusals(void)
{
    static pass there;
    place at = new_place();
    krul_error err;
    krul_observer *none = NULL;
    CHECK(krul_observer_new(at.pool, 0, 0, &none, &err) == KRUL_STATUS_BAD_VALUE && none == NULL);
    make_pass(&there, at.memory, 40, 1);
    CHECK(krul_observer_observe(at.observer, NULL, 0, there.layers, there.positions, N_ROWS,
                                there.is_real, 40, 1, &err) == KRUL_STATUS_UNSUPPORTED);
    make_pass(&there, at.memory, 40, 0);
    there.positions[1] = 40;
    CHECK(krul_observer_observe(at.observer, NULL, 0, there.layers, there.positions, N_ROWS,
                                there.is_real, 40, 1, &err) == KRUL_STATUS_BAD_VALUE);
    clear_sums();
    krul_estimator_sums sums = sums_of(1);
    CHECK(observe_there(&at, 40, 1, &err) == KRUL_STATUS_OK);
    sums.received_stride = 39;
    CHECK(krul_observer_read(at.observer, &sums, &err) == KRUL_STATUS_BAD_SHAPE);
    sums.received_stride = MAX_KEYS;
    observe_here(40, 1);
    CHECK(krul_observer_read(at.observer, &sums, &err) == KRUL_STATUS_OK && are_same());
    free_place(&at);
    fake_calm();
}

int
main(void)
{
    uint32_t state = 7;
    best = check_best_backend();
    for (int i = 0; i < N_LAYERS * (N_QUERIES + N_KEYS); i++) {
        state = state * 1664525u + 1013904223u;
        source[i / (N_QUERIES + N_KEYS)][i % (N_QUERIES + N_KEYS)] = (float)(state >> 8) /
                                                                         8388608.0f -
                                                                     1.0f;
    }
    test_sums();
    test_order();
    test_faults();
    test_out_of_memory();
    test_refusals();
    return check_finish();
}

/* test_restore.c - restores from files and memory: order, waiting, damage, cancelling. */
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "internal.h"
#include "restore_run.h"

enum { N_LAYERS = 5, N_TOKENS = 70, HEAD_DIM = 8, N_VALUES = N_TOKENS * HEAD_DIM };

static float source[N_LAYERS][N_VALUES];
static float target[N_LAYERS][N_VALUES];
static uint8_t payloads[N_LAYERS][8 * N_VALUES + 4096];
static krul_store_entry entries[N_LAYERS];

static krul_view
view_of(float *data, int64_t n_tokens)
{
    return (krul_view){.data = data,
                       .dtype = KRUL_DTYPE_F32,
                       .device_type = KRUL_DEVICE_CPU,
                       .shape = {1, 1, n_tokens, HEAD_DIM},
                       .stride = {N_VALUES, N_VALUES, HEAD_DIM, 1}};
}

/* Start on a number of threads of this machine. */
static krul_status
start(const krul_restore_step *steps, int64_t n_steps, int32_t n_layers, int n_threads,
      krul_restore **out)
{
    krul_error err;
    krul_restore_options options = {.n_threads = n_threads};
    return krul_restore_start(check_best_backend(), steps, n_steps, n_layers, &options, out, &err);
}

static void
encode_all(void)
{
    krul_error err;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (int i = 0; i < N_VALUES; i++) {
            source[layer][i] = (float)((layer + 1) * (i % 97)) * 0.25f - 3.0f;
        }
        krul_view view = view_of(source[layer], N_TOKENS);
        size_t n_bytes = 0;
        krul_codec used = KRUL_CODEC_EXACT;
        CHECK(krul_compressor_encode(check_best_backend(), KRUL_CODEC_EXACT, KRUL_KV_KEY, &view, 1,
                                     payloads[layer], sizeof payloads[layer], &n_bytes, &used, NULL,
                                     &err) == KRUL_STATUS_OK);
        entries[layer] = (krul_store_entry){.kind = KRUL_STORE_ENTRY_BLOCK,
                                            .codec = used,
                                            .kv = KRUL_KV_KEY,
                                            .dtype = KRUL_DTYPE_F32,
                                            .layer_lower = layer,
                                            .layer_upper = -1,
                                            .n_batch = 1,
                                            .n_heads = 1,
                                            .head_dim = HEAD_DIM,
                                            .n_tokens = N_TOKENS,
                                            .payload_bytes = n_bytes};
    }
}

static void
steps_from_memory(krul_restore_step *steps)
{
    for (int layer = 0; layer < N_LAYERS; layer++) {
        steps[layer] = (krul_restore_step){.fd = -1,
                                           .payload = payloads[layer],
                                           .entry = entries[layer],
                                           .views = {view_of(target[layer], N_TOKENS)}};
    }
}

static void
test_from_memory(void)
{
    krul_error err;
    for (int n_threads = 0; n_threads <= 3; n_threads++) {
        krul_restore_step steps[N_LAYERS];
        krul_restore *restore = NULL;
        memset(target, 0, sizeof target);
        steps_from_memory(steps);
        CHECK(start(steps, N_LAYERS, N_LAYERS + 1, n_threads, &restore) == KRUL_STATUS_OK);
        memset(steps, 0, sizeof steps); /* they were copied */
        for (int32_t layer = N_LAYERS; layer >= 0; layer--) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
            CHECK(krul_restore_wait_for(restore, layer, 0));
        }
        CHECK(memcmp(source, target, sizeof source) == 0);
        CHECK(krul_restore_wait(restore, N_LAYERS + 1, &err) == KRUL_STATUS_BAD_VALUE);
        CHECK(krul_restore_wait_for(restore, -1, 1.0));
        krul_restore_counts counts;
        krul_restore_read_counts(restore, &counts);
        CHECK(counts.n_steps == N_LAYERS && counts.n_steps_done == N_LAYERS);
        CHECK(counts.read_bytes == 0 && counts.elapsed_s >= 0);
        krul_restore_free(restore);
    }
    krul_restore_free(NULL);
}

static void
test_first_tokens(void)
{
    krul_error err;
    krul_restore_step step = {.fd = -1, .payload = payloads[0], .entry = entries[0]};
    krul_restore *restore = NULL;
    memset(target, 0, sizeof target);
    step.views[0] = view_of(target[0], 9);
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
    CHECK(memcmp(source[0], target[0], 9 * HEAD_DIM * sizeof(float)) == 0);
    CHECK(target[0][9 * HEAD_DIM] == 0);
    krul_restore_free(restore);
}

/* Write the payloads to a file that has no name and make the steps read them from there. */
static int
steps_from_file(krul_restore_step *steps)
{
    char name[] = "/tmp/krul_test_restore_XXXXXX";
    int fd = mkstemp(name);
    CHECK(fd >= 0);
    unlink(name);
    uint64_t offset = 0;
    steps_from_memory(steps);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        size_t n_bytes = (size_t)entries[layer].payload_bytes;
        steps[layer].fd = fd;
        steps[layer].payload = NULL;
        steps[layer].entry.offset = offset;
        steps[layer].entry.payload_crc32c = krul_store_crc32c(0, payloads[layer], n_bytes);
        CHECK(pwrite(fd, payloads[layer], n_bytes, (off_t)offset) == (ssize_t)n_bytes);
        offset += n_bytes;
    }
    return fd;
}

static void
test_from_file(bool is_damaged)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    uint64_t n_bytes = steps[N_LAYERS - 1].entry.offset + steps[N_LAYERS - 1].entry.payload_bytes;
    if (is_damaged) {
        uint8_t byte = (uint8_t)~payloads[2][40];
        CHECK(pwrite(fd, &byte, 1, (off_t)steps[2].entry.offset + 40) == 1);
    }
    memset(target, 0, sizeof target);
    krul_restore *restore = NULL;
    CHECK(start(steps, N_LAYERS, N_LAYERS, 2, &restore) == KRUL_STATUS_OK);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        krul_status expected = is_damaged && layer == 2 ? KRUL_STATUS_CORRUPT : KRUL_STATUS_OK;
        CHECK(krul_restore_wait(restore, layer, &err) == expected);
        CHECK(krul_restore_wait(restore, layer, NULL) == expected);
        if (expected == KRUL_STATUS_OK) {
            CHECK(memcmp(source[layer], target[layer], sizeof source[layer]) == 0);
        }
    }
    krul_restore_counts counts;
    krul_restore_read_counts(restore, &counts);
    CHECK(counts.read_bytes == n_bytes);
    CHECK(counts.read_wall_s > 0 && counts.read_wall_s <= counts.elapsed_s);
    CHECK(counts.decoded_bytes_by_codec[KRUL_CODEC_EXACT] ==
          sizeof source - (is_damaged ? sizeof source[2] : 0));
    krul_restore_trace traces[N_LAYERS];
    krul_restore_read_trace(restore, traces);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        CHECK(traces[layer].worker >= 0 && traces[layer].worker < 2);
        CHECK(0 <= traces[layer].begin_s && traces[layer].begin_s <= traces[layer].read_s);
        CHECK(traces[layer].read_s <= traces[layer].end_s);
    }
    krul_restore_free(restore);
    close(fd);
}

/* A limit holds up reading by what it says, changing it lets the rest go, and a read that would last
 * for days holds up neither who gives up on it nor the end. */
static void
test_limit(void)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    krul_restore *restore = NULL;
    double first_bytes = (double)steps[0].entry.payload_bytes;
    krul_restore_options options = {.n_threads = 1, .max_bytes_per_s = first_bytes / 0.05};
    memset(target, 0, sizeof target);
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
    krul_restore_limit(restore, 0);
    CHECK(krul_restore_wait(restore, N_LAYERS - 1, &err) == KRUL_STATUS_OK);
    CHECK(memcmp(source, target, sizeof source) == 0);
    krul_restore_trace traces[N_LAYERS];
    krul_restore_read_trace(restore, traces);
    CHECK(traces[0].read_s >
          0.0499); /* from the start: a worker's lateness is no time of the store's */
    krul_restore_free(restore);

    options.max_bytes_per_s = 1e-3;
    restore = NULL;
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    CHECK(!krul_restore_wait_for(restore, 0, 0.01));
    krul_restore_abandon(restore);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_CANCELLED);
    krul_restore_join(restore);
    krul_restore_free(restore);
    options.max_bytes_per_s = -1;
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_BAD_VALUE);
    close(fd);
}

/* The block that is read next is left alone, on processors that the caller needs, until somebody waits
 * again, or will never. */
static void
test_turns(void)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    const double first_bytes = (double)steps[0].entry.payload_bytes;
    for (int end = 0; end < 4; end++) {
        krul_restore *restore = NULL;
        krul_restore_counts counts = {0};
        krul_restore_options options = {
            .n_threads = 2, .max_bytes_per_s = first_bytes / 0.01, .takes_turns = true};
        memset(target, 0, sizeof target);
        CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options,
                                 &restore, &err) == KRUL_STATUS_OK);
        pthread_mutex_lock(&restore->lock);
        restore->n_processors = 1; /* which one block keeps busy */
        pthread_mutex_unlock(&restore->lock);
        while (!krul_restore_wait_for(restore, 0, 1.0)) {
        }
        CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
        pthread_mutex_lock(&restore->lock);
        int64_t n_done = restore->counts.n_steps_done;
        CHECK(restore->turn_end_s > krul_restore_clock_s() || n_done == N_LAYERS);
        restore->turn_end_s += 3600; /* however slow this machine is */
        int n_most = restore->n_running;
        while (restore->n_ready < n_most && n_done + restore->n_ready < N_LAYERS) {
            pthread_mutex_unlock(&restore->lock);
            usleep(1000);
            pthread_mutex_lock(&restore->lock);
        }
        pthread_mutex_unlock(&restore->lock);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) { /* asking changes nothing */
            (void)krul_restore_wait_for(restore, layer, 0);
        }
        usleep(2000);
        krul_restore_read_counts(restore, &counts);
        CHECK(counts.n_steps_done == n_done);
        switch (end) {
            case 0:
                while (!krul_restore_wait_for(restore, N_LAYERS - 1, 1.0)) {
                }
                break;
            case 1:
                CHECK(krul_restore_wait(restore, N_LAYERS - 1, &err) == KRUL_STATUS_OK);
                break;
            case 2:
                krul_restore_join(restore);
                break;
            default:
                krul_restore_abandon(restore);
        }
        krul_restore_join(restore);
        CHECK(end == 3 || memcmp(source, target, sizeof source) == 0);
        krul_restore_trace traces[N_LAYERS];
        krul_restore_read_trace(restore, traces);
        for (int layer = 0; layer < N_LAYERS; layer++) {
            CHECK(traces[layer].read_s <= traces[layer].turn_s &&
                  traces[layer].turn_s <= traces[layer].end_s);
        }
        krul_restore_free(restore);
    }
    close(fd);
}

/* Somebody decodes, but whoever could do so on the other processor waits for the store: the caller has
 * it. */
static void
test_turns_at_a_slow_store(void)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    krul_restore *restore = NULL;
    krul_restore_options options = {.n_threads = 2,
                                    .max_bytes_per_s = (double)steps[0].entry.payload_bytes / 0.01,
                                    .takes_turns = true};
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
    krul_restore_limit(restore, 1e-9);
    pthread_mutex_lock(&restore->lock);
    /* Until both read what does not come: each of them takes the longest that one may. */
    while (restore->link_free_s < krul_restore_clock_s() + 1.9e6) {
        pthread_mutex_unlock(&restore->lock);
        usleep(1000);
        pthread_mutex_lock(&restore->lock);
    }
    CHECK(restore->counts.n_steps_done < N_LAYERS);
    restore->n_processors = 4;
    restore->n_ready = 2; /* as if there were two more of them */
    pthread_mutex_unlock(&restore->lock);
    CHECK(krul_restore_wait_for(restore, 0, 60.0));
    pthread_mutex_lock(&restore->lock);
    restore->n_processors = 8; /* too many for those who wait to be half of them */
    restore->n_ready = 4;
    pthread_mutex_unlock(&restore->lock);
    CHECK(!krul_restore_wait_for(restore, 0, 0.01));
    pthread_mutex_lock(&restore->lock);
    restore->n_ready = 0;
    pthread_mutex_unlock(&restore->lock);
    krul_restore_cancel(restore);
    krul_restore_join(restore);
    pthread_mutex_lock(&restore->lock);
    CHECK(restore->n_starved == 0);
    pthread_mutex_unlock(&restore->lock);
    krul_restore_free(restore);
    close(fd);
}

/* What is dropped is neither waited for nor written; what was decoded before stays. */
static void
test_drop(void)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    krul_restore *restore = NULL;
    krul_restore_options options = {.n_threads = 2, .max_bytes_per_s = 1e-3};
    memset(target, 0, sizeof target);
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    krul_restore_drop(restore, 0, N_TOKENS); /* perhaps being read */
    krul_restore_drop(restore, 1, N_TOKENS - 1); /* its one block goes on behind that */
    krul_restore_drop(restore, 3, N_TOKENS); /* not begun */
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 3, &err) == KRUL_STATUS_OK);
    CHECK(!krul_restore_wait_for(restore, 1, 0));
    krul_restore_free(restore);
    for (int i = 0; i < N_VALUES; i++) {
        CHECK(target[0][i] == 0 && target[3][i] == 0);
    }
    close(fd);
}

/* Steps that have not begun come in the new order, each once; what is no order changes nothing. */
static void
test_reorder(void)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    krul_restore *restore = NULL;
    double first_bytes = (double)steps[0].entry.payload_bytes;
    krul_restore_options options = {.n_threads = 1, .max_bytes_per_s = first_bytes / 0.05};
    memset(target, 0, sizeof target);
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    CHECK(!krul_restore_wait_for(restore, 0, 0.01)); /* it is being read */
    const int64_t order[N_LAYERS] = {4, 0, 2, 3, 1};
    CHECK(krul_restore_reorder(restore, order, N_LAYERS, &err) == KRUL_STATUS_OK);
    krul_restore_limit(restore, 0);
    const int64_t twice[N_LAYERS] = {0, 1, 2, 3, 3}, beyond[N_LAYERS] = {0, 1, 2, 3, 5};
    CHECK(krul_restore_reorder(restore, twice, N_LAYERS, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "order has 3 at 4") != NULL);
    CHECK(krul_restore_reorder(restore, beyond, N_LAYERS, NULL) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_restore_reorder(restore, order, 3, &err) == KRUL_STATUS_BAD_SHAPE);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
    }
    krul_restore_trace traces[N_LAYERS];
    krul_restore_read_trace(restore, traces);
    CHECK(traces[0].end_s <= traces[4].begin_s && traces[4].end_s <= traces[2].begin_s);
    CHECK(traces[2].end_s <= traces[3].begin_s && traces[3].end_s <= traces[1].begin_s);
    krul_restore_counts counts;
    krul_restore_read_counts(restore, &counts);
    CHECK(counts.n_steps_done == N_LAYERS);
    CHECK(krul_restore_reorder(restore, order, N_LAYERS, &err) == KRUL_STATUS_OK); /* too late */
    CHECK(memcmp(source, target, sizeof source) == 0);
    krul_restore_free(restore);
    close(fd);
}

/* On a machine that is made up the time of every step follows from four numbers. */
static void
test_made_up_machine(void)
{
    krul_error err;
    krul_restore_step steps[N_LAYERS];
    krul_restore *restore = NULL;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        entries[layer].payload_bytes = 1000;
        steps[layer] = (krul_restore_step){.fd = -1, .entry = entries[layer]};
        steps[layer].views[0].data = steps;
    }
    double block_bytes = sizeof source[0];
    krul_restore_machine machine = {.read_bytes_per_s = 1000,
                                    .read_latency_s = 0.25,
                                    .decode_bytes_per_s = block_bytes / 2,
                                    .now_s = 10};
    krul_restore_options options = {.n_threads = 1, .machine = &machine};
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_OK);
    CHECK(machine.now_s == 13.25);
    machine.now_s += 1;
    CHECK(krul_restore_wait(restore, 1, &err) == KRUL_STATUS_OK);
    CHECK(machine.now_s == 16.5);
    krul_restore_drop(restore, 2, N_TOKENS); /* has begun: too late */
    krul_restore_drop(restore, 3, N_TOKENS);
    CHECK(krul_restore_wait(restore, 3, &err) == KRUL_STATUS_OK);
    CHECK(machine.now_s == 16.5);
    CHECK(krul_restore_wait(restore, 4, &err) == KRUL_STATUS_OK);
    CHECK(machine.now_s == 23);
    krul_restore_free(restore);
    restore = NULL;

    /* Two workers share the way to the store and decode beside each other. */
    machine.now_s = 0;
    options.n_threads = 2;
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 1, &err) == KRUL_STATUS_OK);
    CHECK(machine.now_s == 4.25);
    krul_restore_free(restore);
    machine.decode_bytes_per_s = 0;
    CHECK(krul_restore_start(check_best_backend(), steps, N_LAYERS, N_LAYERS, &options, &restore,
                             &err) == KRUL_STATUS_BAD_VALUE);
}

static void *
wait_for_last(void *argument)
{
    krul_error err;
    krul_status status = krul_restore_wait(argument, N_LAYERS - 1, &err);
    return (void *)(intptr_t)(status == KRUL_STATUS_OK || status == KRUL_STATUS_CANCELLED);
}

static void
test_cancel(void)
{
    for (int round = 0; round < 50; round++) {
        krul_restore_step steps[N_LAYERS];
        krul_restore *restore = NULL;
        pthread_t waiter;
        void *is_expected = NULL;
        steps_from_memory(steps);
        CHECK(start(steps, N_LAYERS, N_LAYERS, 2, &restore) == KRUL_STATUS_OK);
        CHECK(pthread_create(&waiter, NULL, wait_for_last, restore) == 0);
        krul_restore_cancel(restore);
        krul_restore_join(restore);
        pthread_join(waiter, &is_expected);
        CHECK(is_expected != NULL);
        krul_restore_free(restore);
    }
}

/* A restore that another thread meddles with. */
typedef struct meddling {
    krul_restore *restore;
    unsigned seed;
} meddling;

static void *
meddle(void *argument)
{
    meddling *with = argument;
    for (int i = 0; i < 4; i++) {
        int32_t layer = (int32_t)(rand_r(&with->seed) % N_LAYERS);
        switch (rand_r(&with->seed) % 7) {
            case 0:
                krul_restore_drop(with->restore, layer, N_TOKENS);
                break;
            case 1:
                krul_restore_limit(with->restore, rand_r(&with->seed) % 2 ? 1e5 : 0);
                break;
            case 2:
                (void)krul_restore_wait_for(with->restore, layer, 1e-4);
                break;
            case 3:
                usleep((useconds_t)(rand_r(&with->seed) % 100));
                break;
            case 4: {
                int64_t order[N_LAYERS];
                krul_error err;
                for (int64_t k = 0; k < N_LAYERS; k++) {
                    order[k] = (k * 2 + layer) % N_LAYERS;
                }
                if (krul_restore_reorder(with->restore, order, N_LAYERS, &err) != KRUL_STATUS_OK) {
                    abort(); /* CHECK counts, and is for one thread */
                }
                break;
            }
            case 5: {
                krul_restore_counts counts;
                krul_restore_trace traces[N_LAYERS];
                krul_restore_read_counts(with->restore, &counts);
                krul_restore_read_trace(with->restore, traces);
                break;
            }
            default:
                if (rand_r(&with->seed) % 4 == 0) {
                    krul_restore_abandon(with->restore);
                }
        }
    }
    return NULL;
}

/* A thousand restores with faults, limits, drops and cancels at random: every layer comes to its
 * numbers, to what was dropped, or to a failure that says so, and none hangs. */
static void
test_storm(void)
{
    krul_restore_step steps[N_LAYERS];
    int fd = steps_from_file(steps);
    unsigned seed = 1;
    int n_good = 0, n_cancelled = 0, n_corrupt = 0;
    for (int round = 0; round < 1000; round++) {
        krul_restore_step mine[N_LAYERS];
        int damaged = (int)(rand_r(&seed) % (2 * N_LAYERS));
        memcpy(mine, steps, sizeof mine);
        if (damaged < N_LAYERS) {
            mine[damaged].entry.payload_crc32c ^= 1;
        }
        memset(target, 0, sizeof target);
        krul_restore_options options = {.n_threads = 1 + (int)(rand_r(&seed) % 3),
                                        .max_bytes_per_s = rand_r(&seed) % 2 ? 1e7 : 0,
                                        .takes_turns = rand_r(&seed) % 2 != 0};
        krul_error err;
        pthread_t thread;
        meddling with = {.seed = (unsigned)rand_r(&seed)};
        CHECK(krul_restore_start(check_best_backend(), mine, N_LAYERS, N_LAYERS, &options,
                                 &with.restore, &err) == KRUL_STATUS_OK);
        CHECK(pthread_create(&thread, NULL, meddle, &with) == 0);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            krul_status status = krul_restore_wait(with.restore, layer, &err);
            if (status == KRUL_STATUS_OK) {
                bool is_whole = memcmp(source[layer], target[layer], sizeof source[layer]) == 0;
                bool is_untouched = target[layer][1] == 0 && target[layer][N_VALUES - 1] == 0;
                CHECK(is_whole || is_untouched);
                n_good++;
            }
            else if (status == KRUL_STATUS_CORRUPT) {
                CHECK(layer == damaged);
                n_corrupt++;
            }
            else {
                CHECK(status == KRUL_STATUS_CANCELLED);
                n_cancelled++;
            }
        }
        pthread_join(thread, NULL);
        krul_restore_free(with.restore);
    }
    CHECK(n_good > 1000 && n_corrupt > 50 && n_cancelled > 50);
    close(fd);
}

static void
test_refusals(void)
{
    krul_error err;
    krul_restore *restore = NULL;
    krul_restore_step good = {.fd = -1,
                              .payload = payloads[0],
                              .entry = entries[0],
                              .views = {view_of(target[0], N_TOKENS)}};
    krul_restore_step step = good;
    step.entry.kind = KRUL_STORE_ENTRY_META;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    step = good;
    step.payload = NULL;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    step = good;
    step.entry.layer_lower = 1;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    step = good;
    step.entry.head_dim = HEAD_DIM + 1;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_SHAPE);
    step = good;
    step.views[0].dtype = KRUL_DTYPE_F16;
    step.views[0].shape[3] = HEAD_DIM;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_DTYPE);
    step = good;
    step.views[0].is_read_only = true;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    step = good;
    step.views[0].data = NULL;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    CHECK(start(&good, -1, 1, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    CHECK(start(&good, 1, 1, -1, &restore) == KRUL_STATUS_OK);
    krul_restore_free(restore);
    restore = NULL;
    /* A payload that is cut short is damage, told to who waits. */
    step = good;
    step.entry.payload_bytes = 3;
    CHECK(start(&step, 1, 1, 1, &restore) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 0, &err) == KRUL_STATUS_CORRUPT);
    krul_restore_free(restore);
    restore = NULL;
    CHECK(start(NULL, 0, 2, 1, &restore) == KRUL_STATUS_OK);
    CHECK(krul_restore_wait(restore, 1, &err) == KRUL_STATUS_OK);
    krul_restore_free(restore);
}

int
main(void)
{
    encode_all();
    test_from_memory();
    test_first_tokens();
    test_from_file(false);
    test_from_file(true);
    test_cancel();
    test_limit();
    test_turns();
    test_turns_at_a_slow_store();
    test_drop();
    test_reorder();
    test_storm();
    test_refusals();
    test_made_up_machine(); /* last: it changes the entries */
    return check_finish();
}

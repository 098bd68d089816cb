/* test_restore_device.c - restores onto a device that is fake: order, streams, drops, faults. */
#include <fcntl.h>
#include <unistd.h>

#include "check.h"
#include "fake_device.h"
#include "internal.h"

enum {
    N_LAYERS = 7, /* of each codec one, and a pair; the last has no blocks */
    N_HEADS = 2,
    HEAD_DIM = 16,
    BLOCK_TOKENS = 40,
    N_BLOCKS = 6,
    N_TOKENS = BLOCK_TOKENS * (N_BLOCKS - 1) + 17,
    N_VALUES = N_HEADS * N_TOKENS * HEAD_DIM,
    LAYER_BYTES = N_VALUES * (int)sizeof(float),
    N_FULL_LAYERS = 4,
    N_STEPS = (N_FULL_LAYERS + 1) * 2 * N_BLOCKS, /* pairs share theirs */
    PAYLOAD_CAPACITY = 1 << 16,
};

static const krul_codec codecs[N_FULL_LAYERS + 1] = {
    KRUL_CODEC_INT8, KRUL_CODEC_INT4, KRUL_CODEC_EXACT, KRUL_CODEC_INT8, KRUL_CODEC_SHARE_INT8};

static const krul_backend *best;
static float source[N_LAYERS][2][N_VALUES];
static float expected[N_LAYERS][2][N_VALUES]; /* what the CPU decodes */
static uint8_t *payloads[N_STEPS]; /* allocated to the byte */
static krul_store_entry entries[N_STEPS];

/* The layers' memory on a device. */
typedef struct place {
    krul_device *device;
    void *memory;
} place;

static place
new_place(int32_t device_id)
{
    place made = {NULL, NULL};
    if (fake_ops.open(device_id, &made.device, NULL) != KRUL_STATUS_OK ||
        fake_ops.memory_new(made.device, sizeof expected, &made.memory, NULL) != KRUL_STATUS_OK) {
        abort(); /* nothing that follows makes sense */
    }
    memset(fake_real(made.memory), 0, sizeof expected);
    return made;
}

static void
free_place(place *at)
{
    fake_ops.memory_free(at->device, at->memory);
    fake_ops.close(at->device);
}

static krul_view
view_of(void *data, int64_t token_start, int64_t n_tokens, int32_t device_id)
{
    return (krul_view){
        .data = (void *)((uintptr_t)data + (size_t)token_start * HEAD_DIM * sizeof(float)),
        .dtype = KRUL_DTYPE_F32,
        .device_type = device_id >= 0 ? KRUL_DEVICE_CUDA : KRUL_DEVICE_CPU,
        .device_id = device_id >= 0 ? device_id : 0,
        .shape = {1, N_HEADS, n_tokens, HEAD_DIM},
        .stride = {N_VALUES, N_TOKENS * HEAD_DIM, HEAD_DIM, 1},
    };
}

static void *
layer_memory(const place *at, int32_t layer, int kv)
{
    return (void *)((uintptr_t)at->memory + (size_t)(layer * 2 + kv) * LAYER_BYTES);
}

static int64_t
block_tokens(int block)
{
    return block < N_BLOCKS - 1 ? BLOCK_TOKENS : 17;
}

/* Where step number `index` stands: layer by layer, K and V in turn. */
static int32_t
layer_of(int index)
{
    return (int32_t)(index / (2 * N_BLOCKS));
}

static void
encode_all(void)
{
    uint32_t state = 7;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (int i = 0; i < 2 * N_VALUES; i++) {
            state = state * 1664525u + 1013904223u;
            source[layer][i / N_VALUES][i % N_VALUES] = (float)(state >> 8) / 8388608.0f - 1.0f;
        }
    }
    uint8_t *buffer = malloc(PAYLOAD_CAPACITY);
    for (int i = 0; i < N_STEPS; i++) {
        int32_t layer = layer_of(i);
        int kv = i % 2, block = i / 2 % N_BLOCKS;
        int64_t start = block * BLOCK_TOKENS;
        bool is_pair = layer == N_FULL_LAYERS;
        krul_error err;
        krul_view views[2] = {view_of(source[layer][kv], start, block_tokens(block), -1),
                              view_of(source[layer + 1][kv], start, block_tokens(block), -1)};
        size_t n_bytes = 0;
        krul_codec used;
        CHECK(krul_compressor_encode(best, codecs[layer], (krul_kv)kv, views, is_pair ? 2 : 1,
                                     buffer, PAYLOAD_CAPACITY, &n_bytes, &used, NULL,
                                     &err) == KRUL_STATUS_OK);
        payloads[i] = malloc(n_bytes);
        memcpy(payloads[i], buffer, n_bytes);
        entries[i] = (krul_store_entry){.kind = KRUL_STORE_ENTRY_BLOCK,
                                        .codec = used,
                                        .kv = (krul_kv)kv,
                                        .dtype = KRUL_DTYPE_F32,
                                        .layer_lower = layer,
                                        .layer_upper = is_pair ? layer + 1 : -1,
                                        .n_batch = 1,
                                        .n_heads = N_HEADS,
                                        .head_dim = HEAD_DIM,
                                        .token_start = start,
                                        .n_tokens = block_tokens(block),
                                        .payload_bytes = n_bytes,
                                        .payload_crc32c = krul_store_crc32c(0, buffer, n_bytes)};
        krul_view outs[2] = {view_of(expected[layer][kv], start, block_tokens(block), -1),
                             view_of(expected[layer + 1][kv], start, block_tokens(block), -1)};
        CHECK(krul_compressor_decode(best, used, (krul_kv)kv, buffer, n_bytes, outs,
                                     is_pair ? 2 : 1, &err) == KRUL_STATUS_OK);
    }
    free(buffer);
}

/* Steps from memory; layers from `first_of_second` on are on the other device. */
static void
make_steps(krul_restore_step *steps, const place *at, const place *second, int32_t first_of_second)
{
    for (int i = 0; i < N_STEPS; i++) {
        const krul_store_entry *entry = &entries[i];
        int32_t layer = entry->layer_lower;
        bool is_second = second != NULL && layer >= first_of_second;
        const place *here = is_second ? second : at;
        int32_t id = is_second ? 1 : 0;
        steps[i] = (krul_restore_step){.fd = -1, .payload = payloads[i], .entry = *entry};
        steps[i].views[0] = view_of(layer_memory(here, layer, (int)entry->kv), entry->token_start,
                                    entry->n_tokens, id);
        if (entry->layer_upper >= 0) {
            steps[i].views[1] = view_of(layer_memory(here, layer + 1, (int)entry->kv),
                                        entry->token_start, entry->n_tokens, id);
        }
    }
}

/* Make steps read from a file that has no name. */
static int
move_to_file(krul_restore_step *steps)
{
    char name[] = "/tmp/krul_test_device_XXXXXX";
    int fd = mkstemp(name);
    CHECK(fd >= 0);
    unlink(name);
    uint64_t offset = 0;
    for (int i = 0; i < N_STEPS; i++) {
        size_t n_bytes = (size_t)entries[i].payload_bytes;
        CHECK(pwrite(fd, payloads[i], n_bytes, (off_t)offset) == (ssize_t)n_bytes);
        steps[i].fd = fd;
        steps[i].payload = NULL;
        steps[i].entry.offset = offset;
        offset += n_bytes;
    }
    return fd;
}

static krul_status
start(const krul_restore_step *steps, krul_device_pool *pool, int n_threads, krul_restore **out)
{
    krul_restore_options options = {.n_threads = n_threads, .devices = pool};
    return krul_restore_start(best, steps, N_STEPS, N_LAYERS, &options, out, NULL);
}

static krul_device_pool *
new_pool(size_t chunk_bytes, int32_t n_chunks)
{
    krul_device_pool *pool = NULL;
    krul_device_pool_options options = {.chunk_bytes = chunk_bytes, .n_chunks = n_chunks};
    CHECK(krul_device_pool_new(&fake_ops, &options, &pool, NULL) == KRUL_STATUS_OK);
    return pool;
}

static bool
is_whole(const place *at, int32_t layer)
{
    return memcmp(fake_real(layer_memory(at, layer, 0)), expected[layer], sizeof expected[layer]) ==
           0;
}

/* A stream of the caller's, as the model has one. */
static void *
new_stream(const place *at)
{
    void *stream = NULL;
    CHECK(fake_ops.stream_new(at->device, &stream, NULL) == KRUL_STATUS_OK);
    return stream;
}

/* Whatever the size and number of chunks and threads: every byte, and right when a stream that was
 * told to wait reads it, while the host goes on. */
static void
test_right_bytes(void)
{
    static const size_t chunk_bytes[] = {1, 20000, 70000, 4 << 20};
    static float copy[N_LAYERS][2][N_VALUES];
    fake.max_delay_us = 100;
    for (int round = 0; round < 24; round++) {
        place at = new_place(0);
        krul_device_pool *pool = new_pool(chunk_bytes[round % 4], 1 + round % 3);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        void *stream = new_stream(&at);
        krul_error err;
        fake.host_decodes_exact = round % 2 == 1;
        make_steps(steps, &at, NULL, 0);
        int fd = round % 3 == 0 ? move_to_file(steps) : -1;
        memset(copy, 0, sizeof copy);
        CHECK(start(steps, pool, 1 + round % 4, &restore) == KRUL_STATUS_OK);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait_stream(restore, layer, stream, &err) == KRUL_STATUS_OK);
            CHECK(fake_ops.copy_out(at.device, stream, copy[layer], layer_memory(&at, layer, 0),
                                    sizeof copy[layer], NULL) == KRUL_STATUS_OK);
        }
        CHECK(fake_ops.stream_synchronize(at.device, stream, NULL) == KRUL_STATUS_OK);
        CHECK(memcmp(copy, expected, sizeof copy) == 0);
        krul_restore_join(restore);
        krul_restore_counts counts;
        krul_restore_read_counts(restore, &counts);
        CHECK(counts.n_steps_done == N_STEPS);
        CHECK(krul_restore_wait_stream(restore, N_LAYERS, stream, &err) == KRUL_STATUS_BAD_VALUE);
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        fake_ops.stream_free(at.device, stream);
        free_place(&at);
        CHECK(fake_is_empty());
        if (fd >= 0) {
            close(fd);
        }
    }
    fake_calm();
}

/* Copies are as large as chunks are, but for a last few; memory is kept for the next restore. */
static void
test_large_copies(void)
{
    place at = new_place(0);
    krul_device_pool *pool = new_pool(1 << 15, 3);
    krul_restore_step steps[N_STEPS];
    make_steps(steps, &at, NULL, 0);
    size_t pinned_bytes = 0;
    for (int round = 0; round < 4; round++) {
        krul_restore *restore = NULL;
        atomic_store(&fake.n_copies, 0);
        atomic_store(&fake.n_large_copies, 0);
        atomic_store(&fake.copied_bytes, 0);
        fake.large_bytes = 3 << 13;
        memset(fake_real(at.memory), 0, sizeof expected);
        CHECK(start(steps, pool, 1, &restore) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            CHECK(is_whole(&at, layer));
        }
        long n_expected = (long)(atomic_load(&fake.copied_bytes) >> 15);
        CHECK(n_expected >= 2 && atomic_load(&fake.n_large_copies) >= n_expected);
        /* A machine that is slow may be late for a chunk, never for all. */
        CHECK(atomic_load(&fake.n_copies) <= 4 * (n_expected + 1));
        krul_restore_free(restore);
        CHECK(round == 0 || atomic_load(&fake.pinned_bytes) == pinned_bytes);
        pinned_bytes = atomic_load(&fake.pinned_bytes);
    }
    CHECK(pinned_bytes > 3 << 15);
    krul_device_pool_free(pool);
    free_place(&at);
    CHECK(fake_is_empty());
}

/* What the caller's stream was told before comes first: memory that torch gives out may be in use. */
static void
test_follows(void)
{
    for (int round = 0; round < 4; round++) {
        place at = new_place(0);
        krul_device_pool *pool = new_pool(0, 0);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        void *stream = new_stream(&at);
        fake_event gate = {.n_recorded = 1};
        make_steps(steps, &at, NULL, 0);
        fake_enqueue(stream, &(fake_work){.kind = FAKE_WAIT, .event = &gate});
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            fake_enqueue(stream,
                         &(fake_work){.kind = FAKE_WRITE,
                                      .view = view_of(layer_memory(&at, layer, 0), 0, N_TOKENS, 0),
                                      .byte = 0x77});
        }
        krul_device_stream first = {.device_id = 0, .stream = stream};
        krul_restore_options options = {
            .n_threads = 2, .devices = pool, .streams = &first, .n_streams = 1};
        CHECK(krul_restore_start(best, steps, N_STEPS, N_LAYERS, &options, &restore, NULL) ==
              KRUL_STATUS_OK);
        usleep(20000); /* a decoding that does not wait would be over */
        pthread_mutex_lock(&fake_lock);
        gate.n_reached = 1;
        pthread_cond_broadcast(&fake_changed);
        pthread_mutex_unlock(&fake_lock);
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            CHECK(is_whole(&at, layer));
        }
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        fake_ops.stream_free(at.device, stream);
        free_place(&at);
    }
    CHECK(fake_is_empty());
    fake_calm();
}

/* What is dropped is the caller's stream's from krul_restore_lead on, whatever was under way. */
static void
test_drop(void)
{
    fake.max_delay_us = 200;
    int n_untouched = 0;
    for (int round = 0; round < 40; round++) {
        place at = new_place(0);
        krul_device_pool *pool = new_pool(30000, 2);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        krul_error err;
        void *stream = new_stream(&at);
        int32_t layer = round % (N_LAYERS - 1);
        int64_t n_tokens = round % 3 == 0 ? N_TOKENS : BLOCK_TOKENS * (1 + round % (N_BLOCKS - 1));
        make_steps(steps, &at, NULL, 0);
        fake.host_decodes_exact = round % 2 == 1;
        CHECK(start(steps, pool, 1 + round % 3, &restore) == KRUL_STATUS_OK);
        usleep((useconds_t)(round * 50));
        krul_restore_drop(restore, layer, n_tokens);
        CHECK(krul_restore_lead(restore, 0, stream, &err) == KRUL_STATUS_OK);
        CHECK(krul_restore_lead(restore, 5, stream, &err) == KRUL_STATUS_OK); /* none of ours */
        for (int kv = 0; kv < 2; kv++) {
            fake_enqueue(stream,
                         &(fake_work){.kind = FAKE_WRITE,
                                      .view = view_of(layer_memory(&at, layer, kv), 0, n_tokens, 0),
                                      .byte = 0x55});
        }
        CHECK(krul_restore_wait_stream(restore, layer, stream, &err) == KRUL_STATUS_OK);
        CHECK(fake_ops.stream_synchronize(at.device, stream, NULL) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        for (int i = 0; i < 2 * N_VALUES; i++) {
            uint32_t found, wanted = 0x55555555;
            memcpy(&found, (uint8_t *)fake_real(layer_memory(&at, layer, 0)) + 4 * (size_t)i, 4);
            if (i / HEAD_DIM % N_TOKENS >= n_tokens) {
                memcpy(&wanted, &expected[layer][0][0] + i, 4);
            }
            if (found != wanted) {
                CHECK(found == wanted);
                break;
            }
        }
        for (int32_t other = 0; other < N_LAYERS - 1; other++) {
            n_untouched += other != layer && is_whole(&at, other);
        }
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        fake_ops.stream_free(at.device, stream);
        free_place(&at);
    }
    CHECK(n_untouched == 40 * (N_LAYERS - 2));
    CHECK(fake_is_empty());
    fake_calm();
}

/* After krul_restore_abandon the views may be freed at once; what was not in is cancelled. */
static void
test_abandon(void)
{
    fake.max_delay_us = 200;
    int n_cancelled = 0;
    for (int round = 0; round < 40; round++) {
        place at = new_place(0);
        krul_device_pool *pool = new_pool(20000, 1 + round % 3);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        make_steps(steps, &at, NULL, 0);
        int fd = round % 2 == 0 ? move_to_file(steps) : -1;
        fake.host_decodes_exact = round % 4 >= 2;
        krul_restore_options options = {
            .n_threads = 2, .devices = pool, .max_bytes_per_s = round % 3 == 0 ? 1e-3 : 0};
        CHECK(krul_restore_start(best, steps, N_STEPS, N_LAYERS, &options, &restore, NULL) ==
              KRUL_STATUS_OK);
        usleep((useconds_t)(round * 100));
        krul_restore_abandon(restore);
        memset(fake_real(at.memory), 0x33, sizeof expected);
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            krul_status status = krul_restore_wait(restore, layer, NULL);
            CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_CANCELLED);
            n_cancelled += status == KRUL_STATUS_CANCELLED;
        }
        krul_restore_join(restore);
        for (size_t i = 0; i < sizeof expected; i++) {
            if (((uint8_t *)fake_real(at.memory))[i] != 0x33) {
                CHECK(((uint8_t *)fake_real(at.memory))[i] == 0x33);
                break;
            }
        }
        free_place(&at);
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        if (fd >= 0) {
            close(fd);
        }
    }
    CHECK(n_cancelled > 20);
    CHECK(fake_is_empty());
    fake_calm();
}

/* A payload that is damaged fails its layers with the reason and no other; what only the device sees
 * fails the layers that may have it, at the latest when the restore is over. */
static void
test_damage(void)
{
    for (int round = 0; round < 12; round++) {
        place at = new_place(0);
        krul_device_pool *pool = new_pool(round % 2 == 0 ? 0 : 10000, 2);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        krul_error err;
        int bad = round * 5 % N_STEPS;
        uint8_t byte[3] = {0};
        make_steps(steps, &at, NULL, 0);
        fake.host_decodes_exact = round % 4 == 0;
        steps[bad].payload = byte;
        steps[bad].entry.payload_bytes = sizeof byte;
        CHECK(start(steps, pool, 2, &restore) == KRUL_STATUS_OK);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            bool is_bad = layer == entries[bad].layer_lower || layer == entries[bad].layer_upper;
            krul_status status = krul_restore_wait(restore, layer, &err);
            CHECK(status == (is_bad ? KRUL_STATUS_CORRUPT : KRUL_STATUS_OK));
        }
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) != KRUL_STATUS_OK ||
                  is_whole(&at, layer));
        }
        krul_restore_free(restore);

        restore = NULL;
        make_steps(steps, &at, NULL, 0);
        atomic_store(&fake.works_until_damage, round % 2);
        CHECK(start(steps, pool, 2, &restore) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        int n_corrupt = 0;
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            krul_status status = krul_restore_wait(restore, layer, &err);
            CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT);
            n_corrupt += status == KRUL_STATUS_CORRUPT;
            CHECK(status == KRUL_STATUS_CORRUPT || is_whole(&at, layer));
        }
        CHECK(n_corrupt > 0 && strstr(err.message, "even") != NULL);
        krul_restore_free(restore);

        restore = NULL; /* with the chunks that had it */
        make_steps(steps, &at, NULL, 0);
        CHECK(start(steps, pool, 2, &restore) == KRUL_STATUS_OK);
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS; layer++) {
            CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
        }
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        free_place(&at);
        fake_calm();
    }
    CHECK(fake_is_empty());
}

/* Every call that can fail does, once, and sometimes for good: then each layer is whole or says
 * DEVICE, nothing hangs, and nothing is left behind. The next restore of the same pool is well. */
static void
test_faults(void)
{
    int n_failed = 0, n_whole = 0;
    for (int kind = 0; kind < 3; kind++) {
        bool is_over = false;
        for (int at_call = 0; !is_over; at_call++) {
            place at = new_place(0);
            krul_device_pool *pool = new_pool(70000, 2);
            krul_restore_step steps[N_STEPS];
            krul_restore *restore = NULL;
            krul_error err = {.status = KRUL_STATUS_OK};
            void *stream = new_stream(&at);
            make_steps(steps, &at, NULL, 0);
            fake.is_dead = kind == 1;
            atomic_store(kind < 2 ? &fake.calls_until_failure : &fake.works_until_failure, at_call);
            krul_restore_options options = {.n_threads = 2, .devices = pool};
            krul_status status = krul_restore_start(best, steps, N_STEPS, N_LAYERS, &options,
                                                    &restore, &err);
            if (status == KRUL_STATUS_OK) {
                krul_status statuses[N_LAYERS];
                for (int32_t layer = 0; layer < N_LAYERS; layer++) {
                    status = krul_restore_wait_stream(restore, layer, stream, &err);
                    CHECK(status == KRUL_STATUS_OK || status == KRUL_STATUS_DEVICE);
                }
                krul_restore_join(restore);
                for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
                    statuses[layer] = krul_restore_wait(restore, layer, &err);
                    CHECK(statuses[layer] == KRUL_STATUS_OK ||
                          statuses[layer] == KRUL_STATUS_DEVICE);
                    bool is_good = statuses[layer] == KRUL_STATUS_OK;
                    CHECK(!is_good || is_whole(&at, layer));
                    n_whole += is_good;
                }
                krul_restore_free(restore);
            }
            else {
                CHECK(status == KRUL_STATUS_DEVICE && err.message[0] != '\0');
            }
            is_over = atomic_load(&fake.n_failed) == 0;
            n_failed += !is_over;
            fake_calm();
            restore = NULL;
            CHECK(start(steps, pool, 2, &restore) == KRUL_STATUS_OK);
            for (int32_t layer = 0; layer < N_LAYERS; layer++) {
                CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
            }
            krul_restore_free(restore);
            for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
                CHECK(is_whole(&at, layer));
            }
            krul_device_pool_free(pool);
            fake_ops.stream_free(at.device, stream);
            free_place(&at);
            CHECK(fake_is_empty());
        }
    }
    CHECK(n_failed > 60 && n_whole > 60);
}

/* Less memory: smaller and fewer chunks, and where not even one block fits a reason. */
static void
test_out_of_memory(void)
{
    int n_refused = 0, n_good = 0;
    for (int round = 0; round < 28; round++) {
        place at = new_place(0);
        krul_device_pool *pool = new_pool(1 << 20, 4);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        krul_error err = {.status = KRUL_STATUS_OK};
        make_steps(steps, &at, NULL, 0);
        size_t limit = (size_t)100 << round / 2;
        if (round % 2 == 0) {
            fake.pinned_limit = limit;
        }
        else {
            fake.memory_limit = limit + sizeof expected;
        }
        krul_restore_options options = {.n_threads = 2, .devices = pool};
        krul_status status = krul_restore_start(best, steps, N_STEPS, N_LAYERS, &options, &restore,
                                                &err);
        if (status == KRUL_STATUS_OK) {
            CHECK(limit >= 1 << 15);
            krul_restore_join(restore);
            for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
                CHECK(krul_restore_wait(restore, layer, &err) == KRUL_STATUS_OK);
                CHECK(is_whole(&at, layer));
            }
            n_good++;
        }
        else {
            CHECK(status == KRUL_STATUS_DEVICE && strstr(err.message, "needs") != NULL);
            n_refused++;
        }
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        free_place(&at);
        fake_calm();
        CHECK(fake_is_empty());
    }
    CHECK(n_refused > 3 && n_good > 3);
}

static void
test_two_devices(void)
{
    fake.max_delay_us = 100;
    for (int round = 0; round < 8; round++) {
        place first = new_place(0), second = new_place(1);
        krul_device_pool *pool = new_pool(30000, 2);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        krul_error err;
        int32_t cut = 1 + round % N_FULL_LAYERS;
        make_steps(steps, &first, &second, cut);
        void *streams[2] = {new_stream(&first), new_stream(&second)};
        CHECK(start(steps, pool, 1 + round % 3, &restore) == KRUL_STATUS_OK);
        for (int32_t layer = N_LAYERS - 1; layer >= 0; layer--) {
            CHECK(krul_restore_wait_stream(restore, layer, streams[layer >= cut], &err) ==
                  KRUL_STATUS_OK);
        }
        for (int i = 0; i < 2; i++) {
            CHECK(fake_ops.stream_synchronize(NULL, streams[i], NULL) == KRUL_STATUS_OK);
            fake_ops.stream_free(NULL, streams[i]);
        }
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            CHECK(is_whole(layer >= cut ? &second : &first, layer));
        }
        krul_restore_free(restore);
        krul_device_pool_free(pool);
        free_place(&first);
        free_place(&second);
    }
    CHECK(fake_is_empty());
    fake_calm();
}

static void
test_refusals(void)
{
    place at = new_place(0);
    krul_device_pool *pool = new_pool(0, 0);
    krul_restore_step steps[N_STEPS];
    krul_restore *restore = NULL;
    make_steps(steps, &at, NULL, 0);
    CHECK(start(steps, NULL, 1, &restore) == KRUL_STATUS_DEVICE);
    steps[3].views[0].device_id = 1; /* another block of its layer is on device 0 */
    CHECK(start(steps, pool, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    make_steps(steps, &at, NULL, 0);
    steps[N_STEPS - 1].views[1].device_id = 1; /* the pair's other half is on device 0 */
    CHECK(start(steps, pool, 1, &restore) == KRUL_STATUS_BAD_VALUE);
    make_steps(steps, &at, NULL, 0);
    steps[0].views[0].device_type = (krul_device_type)7;
    CHECK(start(steps, pool, 1, &restore) != KRUL_STATUS_OK);
    CHECK(restore == NULL);
    krul_device_ops other = fake_ops;
    other.abi++;
    krul_device_pool *none = NULL;
    CHECK(krul_device_pool_new(&other, NULL, &none, NULL) == KRUL_STATUS_UNSUPPORTED);
    krul_device_pool_options options = {.n_chunks = -1};
    CHECK(krul_device_pool_new(&fake_ops, &options, &none, NULL) == KRUL_STATUS_BAD_VALUE);
    krul_device_pool_free(none);
    krul_device_pool_free(pool);
    free_place(&at);
    CHECK(fake_is_empty());
}

/* A restore that is meddled with, one of many that share a pool. */
typedef struct rider {
    krul_device_pool *pool;
    unsigned seed;
    int n_whole, n_corrupt, n_cancelled, n_wrong;
} rider;

static void *
ride(void *argument)
{
    rider *mine = argument;
    for (int round = 0; round < 12; round++) {
        place at = new_place(0);
        krul_restore_step steps[N_STEPS];
        krul_restore *restore = NULL;
        void *stream = NULL;
        krul_error err;
        int64_t order[N_STEPS];
        make_steps(steps, &at, NULL, 0);
        int damaged = rand_r(&mine->seed) % (2 * N_STEPS);
        uint8_t byte[3] = {0};
        if (damaged < N_STEPS) {
            steps[damaged].payload = byte;
            steps[damaged].entry.payload_bytes = sizeof byte;
        }
        krul_restore_options options = {.n_threads = 1 + rand_r(&mine->seed) % 3,
                                        .devices = mine->pool};
        if (fake_ops.stream_new(at.device, &stream, NULL) != KRUL_STATUS_OK ||
            krul_restore_start(best, steps, N_STEPS, N_LAYERS, &options, &restore, &err) !=
                KRUL_STATUS_OK) {
            abort(); /* CHECK counts, and is for one thread */
        }
        for (int i = 0; i < 3; i++) {
            int32_t layer = rand_r(&mine->seed) % N_LAYERS;
            switch (rand_r(&mine->seed) % 5) {
                case 0:
                    for (int64_t k = 0; k < N_STEPS; k++) {
                        order[k] = (k * 7 + layer) % N_STEPS;
                    }
                    mine->n_wrong += krul_restore_reorder(restore, order, N_STEPS, &err) !=
                                     KRUL_STATUS_OK;
                    break;
                case 1:
                    if (krul_restore_wait_stream(restore, layer, stream, &err) ==
                        KRUL_STATUS_DEVICE) {
                        mine->n_wrong++;
                    }
                    break;
                case 2:
                    krul_restore_drop(restore, N_LAYERS - 1, N_TOKENS);
                    mine->n_wrong += krul_restore_lead(restore, 0, stream, &err) != KRUL_STATUS_OK;
                    break;
                case 3:
                    usleep((useconds_t)(rand_r(&mine->seed) % 2000));
                    break;
                default:
                    if (rand_r(&mine->seed) % 4 == 0) {
                        krul_restore_abandon(restore);
                    }
            }
        }
        krul_restore_join(restore);
        for (int32_t layer = 0; layer < N_LAYERS - 1; layer++) {
            krul_status status = krul_restore_wait(restore, layer, &err);
            mine->n_whole += status == KRUL_STATUS_OK;
            mine->n_corrupt += status == KRUL_STATUS_CORRUPT;
            mine->n_cancelled += status == KRUL_STATUS_CANCELLED;
            mine->n_wrong += status == KRUL_STATUS_OK && !is_whole(&at, layer);
        }
        krul_restore_free(restore);
        fake_ops.stream_free(at.device, stream);
        free_place(&at);
    }
    return NULL;
}

static void
test_storm(void)
{
    enum { N_RIDERS = 4 };
    fake.max_delay_us = 60;
    krul_device_pool *pool = new_pool(30000, 2);
    rider riders[N_RIDERS];
    pthread_t threads[N_RIDERS];
    int n_whole = 0, n_corrupt = 0, n_cancelled = 0;
    for (unsigned i = 0; i < N_RIDERS; i++) {
        riders[i] = (rider){.pool = pool, .seed = i + 1};
        CHECK(pthread_create(&threads[i], NULL, ride, &riders[i]) == 0);
    }
    for (int i = 0; i < N_RIDERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(riders[i].n_wrong == 0);
        n_whole += riders[i].n_whole;
        n_corrupt += riders[i].n_corrupt;
        n_cancelled += riders[i].n_cancelled;
    }
    CHECK(n_whole > 100 && n_corrupt > 5 && n_cancelled > 5);
    krul_device_pool_free(pool);
    CHECK(fake_is_empty());
    fake_calm();
}

int
main(void)
{
    best = check_best_backend();
    encode_all();
    test_right_bytes();
    test_large_copies();
    test_follows();
    test_drop();
    test_abandon();
    test_damage();
    test_faults();
    test_out_of_memory();
    test_two_devices();
    test_refusals();
    test_storm();
    for (int i = 0; i < N_STEPS; i++) {
        free(payloads[i]);
    }
    return check_finish();
}

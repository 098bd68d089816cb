/* test_compressor_device.c - blocks that a fake device encodes: bytes, order, faults, lack of memory. */
#include "check.h"
#include "fake_device.h"
#include "internal.h"

enum {
    N_HEADS = 3,
    HEAD_DIM = 16,
    N_TOKENS = 90,
    N_TENSORS = 12,
    N_VALUES = N_HEADS * N_TOKENS * HEAD_DIM,
    N_JOBS = 20,
    N_ODD = 6, /* of these hold what their codec cannot */
};

static const krul_codec codecs[] = {KRUL_CODEC_EXACT, KRUL_CODEC_INT8,       KRUL_CODEC_INT4,
                                    KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4};

static const krul_backend *best;
static float source[N_TENSORS][N_VALUES];

/* The tensors' memory on a device, and a stream of whoever wrote them. */
typedef struct place {
    krul_device *device;
    void *memory;
    void *stream;
    krul_device_event written;
} place;

static place
new_place(int32_t device_id)
{
    place made = {.written = {.device_id = device_id}};
    void *pinned = NULL;
    if (fake_ops.open(device_id, &made.device, NULL) != KRUL_STATUS_OK ||
        fake_ops.memory_new(made.device, sizeof source, &made.memory, NULL) != KRUL_STATUS_OK ||
        fake_ops.stream_new(made.device, &made.stream, NULL) != KRUL_STATUS_OK ||
        fake_ops.event_new(made.device, &made.written.event, NULL) != KRUL_STATUS_OK ||
        fake_ops.pinned_new(made.device, sizeof source, &pinned, NULL) != KRUL_STATUS_OK) {
        abort(); /* nothing that follows makes sense */
    }
    memset(fake_real(made.memory), 0, sizeof source);
    memcpy(pinned, source, sizeof source);
    CHECK(fake_ops.copy_in(made.device, made.stream, made.memory, pinned, sizeof source, NULL) ==
          KRUL_STATUS_OK);
    CHECK(fake_ops.event_record(made.device, made.written.event, made.stream, NULL) ==
          KRUL_STATUS_OK);
    CHECK(fake_ops.stream_synchronize(made.device, made.stream, NULL) == KRUL_STATUS_OK);
    fake_ops.pinned_free(made.device, pinned);
    return made;
}

static void
free_place(place *at)
{
    fake_ops.event_free(at->device, at->written.event);
    fake_ops.stream_free(at->device, at->stream);
    fake_ops.memory_free(at->device, at->memory);
    fake_ops.close(at->device);
}

static krul_view
view_of(const void *base, int tensor, int64_t start, int64_t n_tokens, int32_t device_id)
{
    return (krul_view){
        .data = (void *)((uintptr_t)base + (size_t)tensor * sizeof source[0] +
                         (size_t)start * HEAD_DIM * sizeof(float)),
        .dtype = KRUL_DTYPE_F32,
        .device_type = device_id >= 0 ? KRUL_DEVICE_CUDA : KRUL_DEVICE_CPU,
        .device_id = device_id >= 0 ? device_id : 0,
        .shape = {1, N_HEADS, n_tokens, HEAD_DIM},
        .stride = {N_VALUES, N_TOKENS * HEAD_DIM, HEAD_DIM, 1},
    };
}

/* Job number `index`, on a device or, below 0, on the CPU. */
static krul_device_job
make_job(int index, const void *base, int32_t device_id)
{
    krul_codec codec = codecs[index % (int)KRUL_LENGTH(codecs)];
    int n_views = krul_codec_n_layers(codec);
    int64_t start = index % 3 * 13, n_tokens = 40 + index;
    bool is_odd = index >= N_JOBS - N_ODD;
    int tensor = is_odd ? N_TENSORS - 2 : index % (N_TENSORS - 2);
    n_views = codec == KRUL_CODEC_EXACT && index % 4 == 0 ? 2 : n_views;
    krul_device_job job = {.codec = codec,
                           .kv = (krul_kv)(index / 2 % 2),
                           .n_views = n_views,
                           .views = {view_of(base, tensor, start, n_tokens, device_id)}};
    if (n_views == 2) {
        job.views[1] = view_of(base, (tensor + 1) % N_TENSORS, start, n_tokens, device_id);
    }
    return job;
}

/* Jobs on a device, each with as much room as the CPU would need, to the byte. */
static void
make_jobs(krul_device_job *jobs, const place *at, int32_t device_id)
{
    for (int i = 0; i < N_JOBS; i++) {
        krul_device_job here = make_job(i, source, -1);
        jobs[i] = make_job(i, at->memory, device_id);
        if (krul_compressor_bound(here.views, here.n_views, &jobs[i].capacity_bytes, NULL) !=
            KRUL_STATUS_OK) {
            abort();
        }
        jobs[i].payload = malloc(jobs[i].capacity_bytes);
    }
}

static void
free_jobs(krul_device_job *jobs)
{
    for (int i = 0; i < N_JOBS; i++) {
        free(jobs[i].payload);
    }
}

/* Is what came of a job what comes of it on the CPU? */
static bool
is_same(const krul_device_job *job, int index)
{
    krul_device_job here = make_job(index, source, -1);
    uint8_t *payload = malloc(job->capacity_bytes);
    size_t n_bytes = 0;
    krul_codec used = KRUL_CODEC_EXACT;
    double error[2] = {0, 0};
    bool is = krul_compressor_encode(best, here.codec, here.kv, here.views, here.n_views, payload,
                                     job->capacity_bytes, &n_bytes, &used, error,
                                     NULL) == KRUL_STATUS_OK;
    is = is && n_bytes == job->payload_bytes && used == job->codec_used &&
         memcmp(payload, job->payload, n_bytes) == 0;
    for (int i = 0; i < 2; i++) {
        double most = 1e-9 * error[i]; /* infinite where there are infinities */
        double gap = error[i] - job->error[i];
        is = is &&
             (error[i] == job->error[i] || error[i] != error[i] || (gap <= most && -gap <= most));
    }
    free(payload);
    return is;
}

static krul_device_pool *
new_pool(void)
{
    krul_device_pool *pool = NULL;
    CHECK(krul_device_pool_new(&fake_ops, NULL, &pool, NULL) == KRUL_STATUS_OK);
    return pool;
}

static void
test_right_bytes(void)
{
    place at = new_place(0);
    krul_device_pool *pool = new_pool();
    krul_device_job jobs[N_JOBS];
    make_jobs(jobs, &at, 0);
    for (int round = 0; round < 2; round++) { /* the second finds a station that waits */
        krul_compressor_encode_on_device(pool, &at.written, 1, jobs, N_JOBS);
        int n_exact = 0;
        for (int i = 0; i < N_JOBS; i++) {
            CHECK(jobs[i].failure.status == KRUL_STATUS_OK);
            CHECK(is_same(&jobs[i], i));
            n_exact += jobs[i].codec_used != jobs[i].codec;
        }
        CHECK(n_exact == N_ODD); /* one of them is exact anyway, one more is a pair with odd */
    }
    CHECK(atomic_load(&fake.n_encoded) > 0);
    free_jobs(jobs);
    krul_device_pool_free(pool);
    free_place(&at);
    CHECK(fake_is_empty());
    fake_calm();
}

/* What an event stands for comes first, however late it is; what is told later does not matter. */
static void
test_follows(void)
{
    place at = new_place(0);
    krul_device_pool *pool = new_pool();
    krul_device_job jobs[N_JOBS];
    void *pinned = NULL;
    CHECK(fake_ops.pinned_new(at.device, sizeof source, &pinned, NULL) == KRUL_STATUS_OK);
    memcpy(pinned, source, sizeof source);
    make_jobs(jobs, &at, 0);
    fake.max_delay_us = 3000;
    for (int round = 0; round < 10; round++) {
        memset(fake_real(at.memory), round, sizeof source);
        for (int tensor = 0; tensor < N_TENSORS; tensor++) {
            size_t offset = (size_t)tensor * sizeof source[0];
            CHECK(fake_ops.copy_in(at.device, at.stream, (uint8_t *)at.memory + offset,
                                   (uint8_t *)pinned + offset, sizeof source[0],
                                   NULL) == KRUL_STATUS_OK);
        }
        CHECK(fake_ops.event_record(at.device, at.written.event, at.stream, NULL) ==
              KRUL_STATUS_OK);
        const krul_device_event events[2] = {{.device_id = 1, .event = NULL}, at.written};
        krul_compressor_encode_on_device(pool, events, 2, jobs, N_JOBS);
        for (int i = 0; i < N_JOBS; i++) {
            CHECK(jobs[i].failure.status == KRUL_STATUS_OK && is_same(&jobs[i], i));
        }
    }
    fake_calm();
    fake_ops.pinned_free(at.device, pinned);
    free_jobs(jobs);
    krul_device_pool_free(pool);
    free_place(&at);
    CHECK(fake_is_empty());
}

/* Each job is coded as on the CPU, or says why it is left to it. */
static int
count_coded(const krul_device_job *jobs, krul_status reason)
{
    int n_coded = 0;
    for (int i = 0; i < N_JOBS; i++) {
        if (jobs[i].failure.status == KRUL_STATUS_OK) {
            CHECK(is_same(&jobs[i], i));
            n_coded++;
        }
        else {
            CHECK(jobs[i].failure.status == reason && jobs[i].failure.message[0] != '\0');
        }
    }
    return n_coded;
}

static void
test_faults(void)
{
    krul_device_job jobs[N_JOBS];
    for (int kind = 0; kind < 2; kind++) {
        bool has_failed = true;
        int n_some = 0;
        for (long turn = 0; has_failed; turn++) {
            place at = new_place(0);
            krul_device_pool *pool = new_pool();
            make_jobs(jobs, &at, 0);
            atomic_store(kind == 0 ? &fake.calls_until_failure : &fake.works_until_failure, turn);
            krul_compressor_encode_on_device(pool, &at.written, 1, jobs, N_JOBS);
            has_failed = atomic_load(&fake.n_failed) > 0;
            fake_calm();
            int n_coded = count_coded(jobs, KRUL_STATUS_DEVICE);
            CHECK(has_failed ? n_coded < N_JOBS || turn > 0 : n_coded == N_JOBS);
            n_some += n_coded > 0 && n_coded < N_JOBS;
            krul_compressor_encode_on_device(pool, &at.written, 1, jobs, N_JOBS);
            CHECK(count_coded(jobs, KRUL_STATUS_DEVICE) == N_JOBS); /* the next station is sound */
            free_jobs(jobs);
            krul_device_pool_free(pool);
            free_place(&at);
            CHECK(fake_is_empty());
            CHECK(turn < 1000);
        }
        CHECK(n_some > 0);
    }
}

/* Fewer at a time, then one by one, then none. */
static void
test_out_of_memory(void)
{
    int n_all = 0, n_some = 0, n_none = 0;
    krul_device_job jobs[N_JOBS];
    for (size_t limit = 1000; limit < 4000000; limit = limit * 3 / 2) {
        for (int kind = 0; kind < 2; kind++) {
            place at = new_place(0);
            krul_device_pool *pool = new_pool();
            make_jobs(jobs, &at, 0);
            fake.memory_limit = kind == 0 ? limit + sizeof source : 0;
            fake.pinned_limit = kind == 0 ? 0 : limit;
            krul_compressor_encode_on_device(pool, &at.written, 1, jobs, N_JOBS);
            int n_coded = count_coded(jobs, KRUL_STATUS_NO_MEMORY);
            n_none += n_coded == 0;
            n_some += n_coded > 0 && n_coded < N_JOBS;
            n_all += n_coded == N_JOBS && atomic_load(&fake.n_encoded) > 12; /* in several groups */
            fake_calm();
            free_jobs(jobs);
            krul_device_pool_free(pool);
            free_place(&at);
            CHECK(fake_is_empty());
        }
    }
    CHECK(n_all > 0 && n_some > 0 && n_none > 0);
}

static void
test_refusals(void)
{
    place at = new_place(0);
    krul_device_pool *pool = new_pool();
    krul_device_job jobs[N_JOBS];
    make_jobs(jobs, &at, 0);
    jobs[0].codec = (krul_codec)99;
    jobs[1].codec = KRUL_CODEC_PREDICT;
    jobs[2].kv = KRUL_KV_BOTH;
    jobs[3].n_views = 1;
    jobs[4].views[1].device_id = 1; /* the pair is on two devices */
    jobs[5].views[0].device_type = KRUL_DEVICE_CPU;
    jobs[6].views[0].shape[2] = 0;
    jobs[7].capacity_bytes = 10;
    jobs[8].views[0].dtype = (krul_dtype)77;
    krul_compressor_encode_on_device(pool, &at.written, 1, jobs, N_JOBS);
    const krul_status wanted[] = {
        KRUL_STATUS_BAD_VALUE,   KRUL_STATUS_BAD_VALUE,   KRUL_STATUS_BAD_VALUE,
        KRUL_STATUS_BAD_SHAPE,   KRUL_STATUS_UNSUPPORTED, KRUL_STATUS_UNSUPPORTED,
        KRUL_STATUS_UNSUPPORTED, KRUL_STATUS_BAD_VALUE,   KRUL_STATUS_BAD_DTYPE};
    for (int i = 0; i < N_JOBS; i++) {
        if (i < (int)KRUL_LENGTH(wanted)) {
            CHECK(jobs[i].failure.status == wanted[i]);
        }
        else {
            CHECK(jobs[i].failure.status == KRUL_STATUS_OK && is_same(&jobs[i], i));
        }
    }
    krul_compressor_encode_on_device(pool, NULL, 0, NULL, 0);
    free_jobs(jobs);
    krul_device_pool_free(pool);
    free_place(&at);
    CHECK(fake_is_empty());
}

typedef struct rider {
    krul_device_pool *pool;
    const place *places;
    int first; /* the device of its first job */
    int n_wrong;
} rider;

static void *
ride(void *argument)
{
    rider *mine = argument;
    for (int round = 0; round < 5; round++) {
        krul_device_job jobs[N_JOBS];
        krul_device_job others[N_JOBS];
        krul_device_event events[2] = {mine->places[0].written, mine->places[1].written};
        make_jobs(jobs, &mine->places[0], 0);
        make_jobs(others, &mine->places[1], 1);
        for (int i = 0; i < N_JOBS; i++) {
            if ((i + mine->first) % 2 == 0) {
                krul_device_job job = jobs[i];
                jobs[i] = others[i];
                others[i] = job;
            }
        }
        krul_compressor_encode_on_device(mine->pool, events, 2, jobs, N_JOBS);
        for (int i = 0; i < N_JOBS; i++) {
            mine->n_wrong += jobs[i].failure.status != KRUL_STATUS_OK || !is_same(&jobs[i], i);
        }
        free_jobs(jobs);
        free_jobs(others);
    }
    return NULL;
}

static void
test_threads_and_devices(void)
{
    enum { N_RIDERS = 4 };
    place places[2] = {new_place(0), new_place(1)};
    krul_device_pool *pool = new_pool();
    rider riders[N_RIDERS];
    pthread_t threads[N_RIDERS];
    fake.max_delay_us = 60;
    for (int i = 0; i < N_RIDERS; i++) {
        riders[i] = (rider){.pool = pool, .places = places, .first = i};
        CHECK(pthread_create(&threads[i], NULL, ride, &riders[i]) == 0);
    }
    for (int i = 0; i < N_RIDERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(riders[i].n_wrong == 0);
    }
    fake_calm();
    krul_device_pool_free(pool);
    free_place(&places[0]);
    free_place(&places[1]);
    CHECK(fake_is_empty());
}

int
main(void)
{
    uint32_t state = 7;
    best = check_best_backend();
    for (int i = 0; i < N_TENSORS * N_VALUES; i++) {
        state = state * 1664525u + 1013904223u;
        source[i / N_VALUES][i % N_VALUES] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    for (int i = 0; i < N_VALUES; i += 50) { /* in every block */
        source[N_TENSORS - 2][i] = __builtin_inff();
    }
    test_right_bytes();
    test_follows();
    test_faults();
    test_out_of_memory();
    test_refusals();
    test_threads_and_devices();
    return check_finish();
}

/* compressor_device.c - blocks that are encoded where they are, in groups that fit the device's memory.
 *
 * A group lies on a station as head (results and plan, which one copy brings in, results being
 * zeroes), payloads and workspace. What a codec of a job cannot hold is coded `exact` in a second
 * turn; `exact` of two views is two sections, which are coded apart and stand one after the other. */
#include <stdlib.h>
#include <string.h>

#include "compressor.h"
#include "device_encode.h"
#include "device_station.h"
#include "internal.h"

enum {
    ALIGNMENT = 256,
    GROUP_BYTES = 32 << 20, /* of the device's memory, unless one block needs more */
    GROUP_SOURCES = 256,
};

/* A job's block, or one view of it, on its way through a group. */
typedef struct part {
    krul_device_job *job;
    krul_device_source source;
    size_t plan_bytes; /* at most */
    size_t room_bytes; /* of its payload */
    size_t workspace_bytes;
} part;

/* Where things are in a station's memory. Its pinned memory holds head and payloads likewise. */
typedef struct places {
    size_t plan_at;
    size_t payloads_at;
    size_t workspace_at;
    size_t n_bytes;
} places;

static size_t
aligned(size_t n_bytes)
{
    return (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int
n_parts_of(const krul_device_job *job)
{
    return job->codec_used == KRUL_CODEC_EXACT ? job->n_views : 1;
}

/* Is it still to be coded, with codec_used? */
static bool
is_waiting(const krul_device_job *job, int32_t device_id, bool is_second_turn)
{
    return job->failure.status == KRUL_STATUS_OK && job->views[0].device_id == device_id &&
           job->payload_bytes == 0 && (!is_second_turn || job->codec != job->codec_used);
}

static void
fail_job(krul_device_job *job, const krul_error *failure)
{
    job->failure = *failure;
    job->payload_bytes = 0;
}

/* Everything that can be wrong with a job, or in the way of its coding on a device. */
static void
check_job(krul_device_job *job)
{
    krul_error *err = &job->failure;
    const int64_t *shape = job->views[0].shape;
    *err = (krul_error){.status = KRUL_STATUS_OK};
    job->payload_bytes = 0;
    job->codec_used = job->codec;
    job->error[0] = job->error[1] = 0;
    krul_status status = krul_compressor_check(job->codec, job->kv, job->views, job->n_views,
                                               KRUL_DEVICE_CUDA, err);
    if (status == KRUL_STATUS_OK && job->n_views == 2 &&
        job->views[0].device_id != job->views[1].device_id) {
        status = krul_fail(err, KRUL_STATUS_UNSUPPORTED, "views are on devices %d and %d",
                           (int)job->views[0].device_id, (int)job->views[1].device_id);
    }
    if (status == KRUL_STATUS_OK &&
        !krul_device_encode_is_supported(job->codec, job->views[0].dtype, shape)) {
        status = krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                           "codec '%s' is not coded by a device for (%lld, %lld, %lld, %lld) of %s",
                           krul_codec_name(job->codec), (long long)shape[0], (long long)shape[1],
                           (long long)shape[2], (long long)shape[3],
                           krul_dtype_name(job->views[0].dtype));
    }
    err->status = status;
}

/* Make the parts of a job, and find what they take. */
static krul_status
make_parts(krul_device_job *job, part *parts, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    uint8_t *plan = NULL;
    for (int i = 0; i < n_parts_of(job); i++) {
        krul_device_encode_batch batches[KRUL_DEVICE_MAX_BATCHES];
        int32_t n_batches;
        uint64_t payload_bytes;
        size_t used_bytes;
        part *made = &parts[i];
        *made = (part){.job = job, .source = {.codec = job->codec_used, .kv = job->kv}};
        made->source.views[0] = job->views[i];
        if (n_parts_of(job) == 1) {
            memcpy(made->source.views, job->views, sizeof job->views);
        }
        made->plan_bytes = krul_device_encode_bound(&made->source, 1);
        free(plan);
        plan = malloc(made->plan_bytes);
        if (plan == NULL) {
            return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a plan of %zu bytes",
                             made->plan_bytes);
        }
        KRUL_TRY(krul_device_encode_prepare(plan, made->plan_bytes, &made->source, 1, batches,
                                            &n_batches, &payload_bytes, &used_bytes,
                                            &made->workspace_bytes, err));
        made->room_bytes = aligned((size_t)payload_bytes);
    }
done:
    free(plan);
    return status;
}

static places
place(const part *parts, int32_t n_parts)
{
    places at = {.plan_at = aligned((size_t)n_parts * sizeof(krul_device_result))};
    at.payloads_at = at.plan_at;
    for (int32_t i = 0; i < n_parts; i++) {
        at.payloads_at += aligned(parts[i].plan_bytes);
    }
    at.workspace_at = at.payloads_at;
    for (int32_t i = 0; i < n_parts; i++) {
        at.workspace_at += parts[i].room_bytes;
    }
    at.n_bytes = at.workspace_at;
    for (int32_t i = 0; i < n_parts; i++) {
        at.n_bytes += aligned(parts[i].workspace_bytes);
    }
    return at;
}

/* Have the parts coded, and wait for their results, which are then in pinned memory. */
static krul_status
code_parts(krul_station *station, const places *at, part *parts, int32_t n_parts,
           uint64_t *payload_bytes, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = station->ops;
    krul_device_encode_batch batches[KRUL_DEVICE_MAX_BATCHES];
    krul_device_source sources[GROUP_SOURCES];
    int32_t n_batches;
    size_t used_bytes, workspace_bytes, payload_at = 0;
    for (int32_t i = 0; i < n_parts; i++) {
        parts[i].source.payload_offset = payload_at;
        payload_at += parts[i].room_bytes;
        sources[i] = parts[i].source;
    }
    KRUL_TRY(krul_device_encode_prepare(
        station->pinned + at->plan_at, at->payloads_at - at->plan_at, sources, n_parts, batches,
        &n_batches, payload_bytes, &used_bytes, &workspace_bytes, err));
    assert(workspace_bytes <= at->n_bytes - at->workspace_at);
    memset(station->pinned, 0, at->plan_at);
    KRUL_TRY(ops->copy_in(station->device, station->stream, station->memory, station->pinned,
                          at->plan_at + used_bytes, err));
    for (int32_t i = 0; i < n_batches; i++) {
        KRUL_TRY(ops->encode(station->device, station->stream, &batches[i],
                             station->memory + at->plan_at, station->memory + at->payloads_at,
                             station->memory + at->workspace_at,
                             (krul_device_result *)(void *)station->memory, err));
    }
    KRUL_TRY(ops->copy_out(station->device, station->stream, station->pinned, station->memory,
                           (size_t)n_parts * sizeof(krul_device_result), err));
    KRUL_TRY(krul_station_wait(station, err));
done:
    return krul_station_note(station, status);
}

/* Copy out what fits, to where pinned memory has it as the device's has. */
static krul_status
fetch_payloads(krul_station *station, const places *at, const part *parts, int32_t n_parts,
               uint64_t *payload_bytes, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_result *results = (const krul_device_result *)(const void *)station->pinned;
    for (int32_t i = 0; i < n_parts; i++) {
        if (parts[i].source.codec == KRUL_CODEC_EXACT) {
            payload_bytes[i] = results[i].payload_bytes;
        }
        if (results[i].does_not_fit != 0) {
            continue;
        }
        if (payload_bytes[i] > parts[i].room_bytes) {
            status = krul_fail(err, KRUL_STATUS_DEVICE,
                               "%s says that a payload has %llu bytes but there is room for %zu",
                               station->ops->name, (unsigned long long)payload_bytes[i],
                               parts[i].room_bytes);
            goto done;
        }
        size_t offset = at->payloads_at + (size_t)parts[i].source.payload_offset;
        KRUL_TRY(station->ops->copy_out(station->device, station->stream, station->pinned + offset,
                                        station->memory + offset, (size_t)payload_bytes[i], err));
    }
    KRUL_TRY(krul_station_wait(station, err));
done:
    return krul_station_note(station, status);
}

/* Give the jobs what came of their parts. */
static void
hand_over(const krul_station *station, const places *at, const part *parts, int32_t n_parts,
          const uint64_t *payload_bytes)
{
    const krul_device_result *results = (const krul_device_result *)(const void *)station->pinned;
    for (int32_t i = 0; i < n_parts; i++) {
        krul_device_job *job = parts[i].job;
        if (results[i].does_not_fit != 0 && job->codec_used == KRUL_CODEC_EXACT) {
            krul_fail(&job->failure, KRUL_STATUS_UNSUPPORTED,
                      "codec 'exact' refused a block of %s, which it must hold",
                      krul_dtype_name(job->views[0].dtype));
        }
        else if (results[i].does_not_fit != 0) {
            job->codec_used = KRUL_CODEC_EXACT; /* in the second turn */
        }
        else if (payload_bytes[i] > job->capacity_bytes - job->payload_bytes) {
            krul_fail(&job->failure, KRUL_STATUS_BAD_VALUE,
                      "capacity_bytes is %zu but the payload has %llu", job->capacity_bytes,
                      (unsigned long long)(job->payload_bytes + payload_bytes[i]));
        }
        else {
            memcpy(job->payload + job->payload_bytes,
                   station->pinned + at->payloads_at + parts[i].source.payload_offset,
                   (size_t)payload_bytes[i]);
            job->payload_bytes += (size_t)payload_bytes[i];
            job->error[0] += results[i].error[0];
            job->error[1] += results[i].error[1];
        }
    }
}

/* Code a group, or where there is no room for it, its halves. */
static void
code_group(krul_station *station, part *parts, int32_t n_parts)
{
    krul_error failure = {.status = KRUL_STATUS_OK};
    uint64_t payload_bytes[GROUP_SOURCES];
    places at = place(parts, n_parts);
    krul_status status = KRUL_STATUS_OK;
    if (station->has_failed) {
        status = krul_fail(&failure, KRUL_STATUS_DEVICE, "%s %d has failed before",
                           station->ops->name, (int)station->device_id);
        goto done;
    }
    KRUL_TRY(krul_station_reserve(station, at.workspace_at, at.n_bytes, &failure));
    KRUL_TRY(code_parts(station, &at, parts, n_parts, payload_bytes, &failure));
    KRUL_TRY(fetch_payloads(station, &at, parts, n_parts, payload_bytes, &failure));
    hand_over(station, &at, parts, n_parts, payload_bytes);
done:
    if (status == KRUL_STATUS_OK) {
        return;
    }
    /* Nothing of it may be under way when its memory is used again. */
    krul_status end = station->ops->stream_synchronize(station->device, station->stream, NULL);
    status = krul_station_note(station, end) == KRUL_STATUS_OK ? status : end;
    int32_t n_first = n_parts / 2;
    n_first += n_first > 0 && parts[n_first - 1].job == parts[n_first].job; /* of two views */
    if (status == KRUL_STATUS_NO_MEMORY && n_first > 0 && n_first < n_parts) {
        code_group(station, parts, n_first);
        code_group(station, parts + n_first, n_parts - n_first);
        return;
    }
    for (int32_t i = 0; i < n_parts; i++) {
        fail_job(parts[i].job, &failure);
    }
}

/* Code the jobs of one device that wait for it, group by group. */
static void
take_turn(krul_station *station, krul_device_job *jobs, int64_t n_jobs, part *parts,
          bool is_second_turn)
{
    int32_t n_parts = 0;
    size_t n_bytes = 0;
    for (int64_t i = 0; i < n_jobs; i++) {
        part made[KRUL_COMPRESSOR_MAX_VIEWS];
        krul_error failure;
        if (!is_waiting(&jobs[i], station->device_id, is_second_turn)) {
            continue;
        }
        if (make_parts(&jobs[i], made, &failure) != KRUL_STATUS_OK) {
            fail_job(&jobs[i], &failure);
            continue;
        }
        int n_made = n_parts_of(&jobs[i]);
        size_t more_bytes = place(made, n_made).n_bytes;
        if (n_parts > 0 &&
            (n_parts + n_made > GROUP_SOURCES || more_bytes > GROUP_BYTES - n_bytes)) {
            code_group(station, parts, n_parts);
            n_parts = 0;
            n_bytes = 0;
        }
        memcpy(parts + n_parts, made, (size_t)n_made * sizeof *made);
        n_parts += n_made;
        n_bytes = more_bytes > GROUP_BYTES - n_bytes ? GROUP_BYTES : n_bytes + more_bytes;
    }
    if (n_parts > 0) {
        code_group(station, parts, n_parts);
    }
}

void
krul_compressor_encode_on_device(krul_device_pool *pool, const krul_device_event *events,
                                 int32_t n_events, krul_device_job *jobs, int64_t n_jobs)
{
    part *parts = malloc(GROUP_SOURCES * sizeof *parts);
    for (int64_t i = 0; i < n_jobs; i++) {
        check_job(&jobs[i]);
        if (parts == NULL && jobs[i].failure.status == KRUL_STATUS_OK) {
            krul_fail(&jobs[i].failure, KRUL_STATUS_NO_MEMORY, "no memory for a group of blocks");
        }
    }
    for (int64_t i = 0; i < n_jobs; i++) {
        int32_t device_id = jobs[i].views[0].device_id;
        if (!is_waiting(&jobs[i], device_id, false)) {
            continue; /* an earlier one's device has had its turns */
        }
        krul_station *station = NULL;
        krul_error failure = {.status = KRUL_STATUS_OK};
        krul_status status = krul_station_take(krul_device_pool_shelf(pool), device_id, &station,
                                               &failure);
        if (status == KRUL_STATUS_OK) {
            status = krul_station_follow(station, events, n_events, &failure);
        }
        if (status == KRUL_STATUS_OK) {
            take_turn(station, jobs, n_jobs, parts, false);
            take_turn(station, jobs, n_jobs, parts, true);
        }
        for (int64_t k = i; k < n_jobs && status != KRUL_STATUS_OK; k++) {
            if (is_waiting(&jobs[k], device_id, false)) {
                fail_job(&jobs[k], &failure);
            }
        }
        krul_station_give(station);
    }
    free(parts);
}

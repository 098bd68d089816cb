/* restore_predict.c - codec predict on a lane: profiles kept, memory had in time, batches enqueued.
 *
 * Decoding the numbers of a batch takes a few warps a long time and needs no other layer; products and
 * stores take all of the device a short time, one layer after the other. So there are several batches
 * whose numbers are under way, each on a stream and with scratch of its own, ahead of the one stream
 * that everything else is on. */
#include "restore_predict.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "codec_predict.h"
#include "internal.h"

enum {
    MAX_KEPT = 2, /* profiles of one device that nobody uses */
    SCRATCH_BYTES = 32 << 20, /* for a batch, unless one block needs more */
};

/* A profile on a device. */
typedef struct kept_profile {
    struct kept_profile *next;
    uint8_t digest[KRUL_PREDICT_DIGEST_BYTES]; /* zeros: for nobody else */
    int32_t device_id;
    int32_t n_users;
    krul_device *device; /* of its own: lanes come and go */
    krul_device_profile *profile;
} kept_profile;

struct krul_profiles {
    const krul_device_ops *ops;
    pthread_mutex_t lock; /* held while one is copied, so that who wants the same waits for it */
    kept_profile *first; /* the one that was taken last */
};

/* ---- profiles ---------------------------------------------------------------------------------- */

krul_status
krul_profiles_new(const krul_device_ops *ops, krul_profiles **out, krul_error *err)
{
    krul_profiles *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a list of profiles");
    }
    made->ops = ops;
    pthread_mutex_init(&made->lock, NULL);
    *out = made;
    return KRUL_STATUS_OK;
}

static void
free_kept(const krul_profiles *profiles, kept_profile *kept)
{
    if (kept->profile != NULL && kept->profile->memory != NULL) {
        profiles->ops->memory_free(kept->device, kept->profile->memory);
    }
    krul_device_profile_free(kept->profile);
    if (kept->device != NULL) {
        profiles->ops->close(kept->device);
    }
    free(kept);
}

void
krul_profiles_free(krul_profiles *profiles)
{
    if (profiles == NULL) {
        return;
    }
    while (profiles->first != NULL) {
        kept_profile *kept = profiles->first;
        profiles->first = kept->next;
        free_kept(profiles, kept);
    }
    pthread_mutex_destroy(&profiles->lock);
    free(profiles);
}

static bool
has_digest(const uint8_t *digest)
{
    static const uint8_t none[KRUL_PREDICT_DIGEST_BYTES];
    return memcmp(digest, none, sizeof none) != 0;
}

/* Free profiles of a device that nobody uses, but for the first n_kept; with the lock. */
static void
trim(krul_profiles *profiles, int32_t device_id, int32_t n_kept)
{
    kept_profile **link = &profiles->first;
    while (*link != NULL) {
        kept_profile *kept = *link;
        bool is_idle = kept->device_id == device_id && kept->n_users == 0;
        if (is_idle && (n_kept == 0 || !has_digest(kept->digest))) {
            *link = kept->next;
            free_kept(profiles, kept);
            continue;
        }
        n_kept -= is_idle;
        link = &kept->next;
    }
}

/* Memory of a device, in place of profiles that nobody uses where there is no other; with the lock. */
static krul_status
make_room(krul_profiles *profiles, krul_device *device, int32_t device_id, size_t n_bytes,
          void **out, krul_error *err)
{
    krul_status status = profiles->ops->memory_new(device, n_bytes, out, err);
    if (status == KRUL_STATUS_NO_MEMORY) {
        trim(profiles, device_id, 0);
        status = profiles->ops->memory_new(device, n_bytes, out, err);
    }
    return status;
}

/* Bring a profile to the lane's device; with the lock. */
static krul_status
copy_profile(krul_profiles *profiles, krul_lane *lane, const krul_predict_options *options,
             kept_profile **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = profiles->ops;
    void *memory = NULL;
    krul_device_copy copy;
    kept_profile *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a profile");
    }
    made->device_id = lane->device_id;
    memcpy(made->digest, options->digest, sizeof made->digest);
    KRUL_TRY(ops->open(lane->device_id, &made->device, err));
    KRUL_TRY(krul_device_profile_new(options, &made->profile, err));
    KRUL_TRY(make_room(profiles, made->device, lane->device_id, (size_t)made->profile->n_bytes,
                       &memory, err));
    made->profile->memory = memory;
    for (int32_t i = 0; krul_device_profile_copy(made->profile, options, i, &copy); i++) {
        if (copy.n_bytes > 0) {
            KRUL_TRY(ops->copy_in(lane->device, lane->copy_stream, made->profile->memory + copy.to,
                                  copy.from, copy.n_bytes, err));
        }
    }
    KRUL_TRY(ops->stream_synchronize(lane->device, lane->copy_stream, err));
    made->next = profiles->first;
    profiles->first = made;
    *out = made;
    made = NULL;
done:
    if (made != NULL) {
        (void)ops->stream_synchronize(lane->device, lane->copy_stream, NULL);
        free_kept(profiles, made);
    }
    return status;
}

/* The profile of these options on the lane's device, one user more. */
static krul_status
take_profile(krul_lane *lane, const krul_predict_options *options, kept_profile **out,
             krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_profiles *profiles = lane->profiles;
    kept_profile *found = NULL;
    pthread_mutex_lock(&profiles->lock);
    for (kept_profile **link = &profiles->first; *link != NULL; link = &(*link)->next) {
        if ((*link)->device_id == lane->device_id && has_digest(options->digest) &&
            memcmp((*link)->digest, options->digest, sizeof options->digest) == 0) {
            found = *link;
            *link = found->next;
            found->next = profiles->first;
            profiles->first = found;
            break;
        }
    }
    if (found == NULL) {
        status = copy_profile(profiles, lane, options, &found, err);
    }
    if (status == KRUL_STATUS_OK) {
        found->n_users++;
        *out = found;
    }
    pthread_mutex_unlock(&profiles->lock);
    return status;
}

/* One user less. On a device that has failed it is not known what its memory holds. */
static void
give_profile(krul_lane *lane, kept_profile *kept)
{
    krul_profiles *profiles = lane->profiles;
    pthread_mutex_lock(&profiles->lock);
    kept->n_users--;
    if (lane->failure.status != KRUL_STATUS_OK) {
        memset(kept->digest, 0, sizeof kept->digest);
    }
    trim(profiles, lane->device_id, MAX_KEPT);
    pthread_mutex_unlock(&profiles->lock);
}

/* ---- what a lane has --------------------------------------------------------------------------- */

void
krul_lane_free_ahead(krul_lane *lane)
{
    const krul_device_ops *ops = lane->ops;
    for (int i = 0; i < KRUL_LANE_N_AHEAD; i++) {
        krul_lane_ahead *ahead = &lane->ahead[i];
        if (ahead->numbered != NULL) {
            ops->event_free(lane->device, ahead->numbered);
        }
        if (ahead->used != NULL) {
            ops->event_free(lane->device, ahead->used);
        }
        if (ahead->stream != NULL) {
            ops->stream_free(lane->device, ahead->stream);
        }
        *ahead = (krul_lane_ahead){.stream = NULL};
    }
    if (lane->products != NULL) {
        ops->products_free(lane->device, lane->products);
        lane->products = NULL;
    }
}

/* Have what stays with the lane. */
static krul_status
make_ahead(krul_lane *lane, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = lane->ops;
    if (lane->products != NULL) {
        return KRUL_STATUS_OK;
    }
    KRUL_TRY(ops->products_new(lane->device, lane->decode_stream, &lane->products, err));
    for (int i = 0; i < KRUL_LANE_N_AHEAD; i++) {
        KRUL_TRY(ops->stream_new(lane->device, &lane->ahead[i].stream, err));
        KRUL_TRY(ops->event_new(lane->device, &lane->ahead[i].numbered, err));
        KRUL_TRY(ops->event_new(lane->device, &lane->ahead[i].used, err));
    }
done:
    if (status != KRUL_STATUS_OK) {
        krul_lane_free_ahead(lane);
    }
    return status;
}

static void
free_chains(krul_lane *lane, krul_lane_chains *own)
{
    /* Cosines may still be on their way where no chunk was enqueued. */
    (void)lane->ops->stream_synchronize(lane->device, lane->copy_stream, NULL);
    if (own->memory != NULL) {
        lane->ops->memory_free(lane->device, own->memory);
    }
    krul_device_chains_free(own->chains);
    if (own->profile != NULL) {
        give_profile(lane, own->profile);
    }
    free(own);
}

void
krul_lane_end_chains(krul_lane *lane)
{
    while (lane->chains != NULL) {
        krul_lane_chains *own = lane->chains;
        lane->chains = own->next;
        free_chains(lane, own);
    }
}

static int64_t
whole_rows(int64_t n_rows)
{
    return (n_rows + KRUL_DEVICE_ROWS_AT_ONCE - 1) / KRUL_DEVICE_ROWS_AT_ONCE *
           KRUL_DEVICE_ROWS_AT_ONCE;
}

int64_t
krul_chain_rows(const krul_store_entry *entry)
{
    return whole_rows((int64_t)entry->n_batch * entry->n_tokens);
}

/* Choose how many rows are decoded at once, and so how much scratch there is. Runs were checked. */
static krul_status
choose_scratch(krul_lane_chains *own, int64_t n_batch, const krul_device_run *runs, int32_t n_runs,
               size_t *n_bytes_out, krul_error *err)
{
    const krul_device_profile *profile = own->profile->profile;
    size_t row_bytes = ((size_t)profile->row_floats + (size_t)profile->max_rank) * sizeof(float);
    int64_t n_rows = 0, largest = 0;
    size_t all_scratch, n_bytes;
    for (int32_t i = 0; i < n_runs; i++) {
        int64_t n_own = whole_rows(n_batch * runs[i].n_tokens);
        n_rows += n_own;
        largest = krul_max_i64(largest, n_own);
    }
    int64_t n_usual = (int64_t)(SCRATCH_BYTES / row_bytes);
    own->max_rows = krul_max_i64(largest, krul_min_i64(n_usual, n_rows));
    if (krul_multiply_overflows((size_t)own->max_rows, row_bytes, &n_bytes) ||
        krul_add_overflows(n_bytes, 2 * KRUL_DEVICE_MEMORY_ALIGNMENT, &n_bytes) ||
        krul_multiply_overflows(n_bytes, KRUL_LANE_N_AHEAD, &all_scratch) ||
        krul_add_overflows(all_scratch, krul_device_chains_bytes(own->chains), n_bytes_out)) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "scratch for %lld rows of %zu bytes",
                         (long long)own->max_rows, row_bytes);
    }
    own->scratch_bytes = n_bytes / KRUL_DEVICE_MEMORY_ALIGNMENT * KRUL_DEVICE_MEMORY_ALIGNMENT;
    own->scratch_at = krul_device_chains_bytes(own->chains);
    return KRUL_STATUS_OK;
}

krul_status
krul_lane_begin_chains(krul_lane *lane, const krul_predict *predict, const krul_device_run *runs,
                       int32_t n_runs, krul_lane_chains **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_predict_options options = krul_predict_options_of(predict);
    krul_profiles *profiles = lane->profiles;
    void *memory = NULL;
    krul_device_copy copy;
    size_t n_bytes = 0;
    krul_lane_chains *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for chains");
    }
    KRUL_TRY(make_ahead(lane, err));
    KRUL_TRY(take_profile(lane, &options, &made->profile, err));
    KRUL_TRY(
        krul_device_chains_new(made->profile->profile, &options, runs, n_runs, &made->chains, err));
    KRUL_TRY(choose_scratch(made, options.n_batch, runs, n_runs, &n_bytes, err));
    pthread_mutex_lock(&profiles->lock);
    status = make_room(profiles, lane->device, lane->device_id, n_bytes, &memory, err);
    pthread_mutex_unlock(&profiles->lock);
    if (status != KRUL_STATUS_OK) {
        goto done;
    }
    made->memory = memory;
    for (int32_t i = 0; krul_device_chains_copy(made->chains, i, &copy); i++) {
        if (copy.n_bytes > 0) { /* before the first chunk, which is on the same stream */
            KRUL_TRY(lane->ops->copy_in(lane->device, lane->copy_stream, made->memory + copy.to,
                                        copy.from, copy.n_bytes, err));
        }
    }
    made->next = lane->chains;
    lane->chains = made;
    *out = made;
    made = NULL;
done:
    if (made != NULL) {
        free_chains(lane, made);
    }
    return status;
}

krul_status
krul_lane_decode_batch(krul_lane *lane, const krul_lane_chains *chains,
                       const krul_device_predict_batch *batch, const krul_chunk *chunk,
                       uint32_t *damage_flag, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = lane->ops;
    krul_device *device = lane->device;
    uint64_t place = lane->n_batches++ % KRUL_LANE_N_AHEAD;
    krul_lane_ahead *ahead = &lane->ahead[place];
    uint8_t *scratch = chains->memory + chains->scratch_at + place * chains->scratch_bytes;
    assert(krul_device_predict_scratch(chains->chains, batch) <= chains->scratch_bytes);
    KRUL_TRY(ops->stream_wait_event(device, ahead->stream, chunk->copied, err));
    KRUL_TRY(ops->stream_wait_event(device, ahead->stream, ahead->used, err));
    KRUL_TRY(ops->predict_numbers(device, ahead->stream, chains->chains, batch, chunk->memory,
                                  scratch, damage_flag, err));
    KRUL_TRY(ops->event_record(device, ahead->numbered, ahead->stream, err));
    KRUL_TRY(ops->stream_wait_event(device, lane->decode_stream, ahead->numbered, err));
    KRUL_TRY(ops->predict_rows(device, lane->products, chains->chains, batch, chunk->memory,
                               chains->memory, scratch, err));
    KRUL_TRY(ops->event_record(device, ahead->used, lane->decode_stream, err));
done:
    return status;
}

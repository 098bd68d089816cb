/* restore_device.c - lanes and their chunks: memory that waits, one copy and one decoding for many
 * blocks.
 *
 * A chunk begins with the flag that a decoding sets when it finds damage: the copy to the device
 * clears it, and four bytes are copied back behind the decoding. Copies and decodings are on two
 * streams, so that the next chunk is copied while one is decoded. Blocks of codec predict are prepared
 * while nobody else enqueues: what is told to the streams must come in the order of the chains. */
#include "restore_device.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "device_station.h"
#include "internal.h"
#include "restore_predict.h"

enum {
    HEADER_BYTES = 64, /* of a chunk; the flag is its first number */
    ALIGNMENT = KRUL_DEVICE_ALIGNMENT,
    SLACK_BYTES = 64, /* behind the last byte, for loads that are wider than what they want */
    DEFAULT_CHUNK_BYTES = 8 << 20,
    DEFAULT_N_CHUNKS = 6,
    DEFAULT_N_IDLE = 2,
    ALL_VIEWS = -1,
    MIN_CHUNK_BYTES = 1 << 16, /* smaller chunks are not tried where memory is short */
};

struct krul_device_pool {
    krul_device_ops ops; /* every entry is set, but those of a device without codec predict */
    krul_profiles *profiles;
    size_t chunk_bytes;
    int32_t n_chunks;
    int32_t max_idle;
    pthread_mutex_t lock; /* guards all below */
    int32_t n_idle;
    krul_lane *idle;
    krul_station_shelf shelf; /* has a lock of its own */
};

/* A lane, and what no other file needs to know of it. */
typedef struct private_lane {
    krul_lane lane;
    pthread_mutex_t enqueueing; /* one thread at a time tells the streams what belongs together */
} private_lane;

/* ---- pools ------------------------------------------------------------------------------------- */

krul_status
krul_device_pool_new(const krul_device_ops *ops, const krul_device_pool_options *options,
                     krul_device_pool **out, krul_error *err)
{
    const krul_device_pool_options defaults = {0};
    options = options != NULL ? options : &defaults;
    if (ops->abi != KRUL_DEVICE_ABI) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "the table of %s is of version %u but must be of %d", ops->name,
                         (unsigned)ops->abi, (int)KRUL_DEVICE_ABI);
    }
    if (options->n_chunks < 0 || options->n_idle < 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "n_chunks is %d and n_idle %d but both must be 0 or more",
                         (int)options->n_chunks, (int)options->n_idle);
    }
    krul_device_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a pool of lanes");
    }
    pool->ops = *ops;
    krul_status status = krul_profiles_new(&pool->ops, &pool->profiles, err);
    if (status != KRUL_STATUS_OK) {
        free(pool);
        return status;
    }
    if (ops->predict_prepare == NULL) {
        pool->ops.predict_bound = krul_device_predict_bound;
        pool->ops.predict_prepare = krul_device_predict_prepare;
    }
    if (ops->decode_is_supported == NULL) {
        pool->ops.decode_is_supported = krul_device_decode_is_supported;
        pool->ops.decode_bound = krul_device_decode_bound;
        pool->ops.decode_prepare = krul_device_decode_prepare;
    }
    pool->chunk_bytes = options->chunk_bytes > 0 ? options->chunk_bytes : DEFAULT_CHUNK_BYTES;
    pool->n_chunks = options->n_chunks > 0 ? options->n_chunks : DEFAULT_N_CHUNKS;
    pool->max_idle = options->n_idle > 0 ? options->n_idle : DEFAULT_N_IDLE;
    pthread_mutex_init(&pool->lock, NULL);
    krul_station_shelf_init(&pool->shelf, &pool->ops, pool->max_idle);
    *out = pool;
    return KRUL_STATUS_OK;
}

const krul_device_ops *
krul_device_pool_ops(const krul_device_pool *pool)
{
    return &pool->ops;
}

krul_station_shelf *
krul_device_pool_shelf(krul_device_pool *pool)
{
    return &pool->shelf;
}

/* ---- lanes ------------------------------------------------------------------------------------- */

static void
free_chunk(krul_lane *lane, krul_chunk *chunk)
{
    if (chunk->copied != NULL) {
        lane->ops->event_free(lane->device, chunk->copied);
    }
    if (chunk->decoded != NULL) {
        lane->ops->event_free(lane->device, chunk->decoded);
    }
    if (chunk->pinned != NULL) {
        lane->ops->pinned_free(lane->device, chunk->pinned);
    }
    if (chunk->memory != NULL) {
        lane->ops->memory_free(lane->device, chunk->memory);
    }
    free(chunk->blocks);
    free(chunk->block_steps);
    free(chunk->block_views);
    free(chunk->links);
    free(chunk->link_blocks);
    free(chunk->batches);
    free(chunk->batch_chains);
    free(chunk->steps);
    free(chunk->statuses);
    memset(chunk, 0, sizeof *chunk);
}

static void
free_lane(krul_lane *lane)
{
    if (lane == NULL) {
        return;
    }
    const krul_device_ops *ops = lane->ops;
    if (lane->device != NULL) {
        /* Nothing is under way, but a device that failed may not have said so. */
        if (lane->copy_stream != NULL) {
            (void)ops->stream_synchronize(lane->device, lane->copy_stream, NULL);
        }
        if (lane->decode_stream != NULL) {
            (void)ops->stream_synchronize(lane->device, lane->decode_stream, NULL);
        }
        krul_lane_end_chains(lane);
        krul_lane_free_ahead(lane);
        for (int32_t i = 0; i < lane->n_chunks; i++) {
            free_chunk(lane, &lane->chunks[i]);
        }
        for (int32_t i = 0; i < lane->n_layer_events; i++) {
            ops->event_free(lane->device, lane->layer_events[i]);
        }
        if (lane->fence != NULL) {
            ops->event_free(lane->device, lane->fence);
        }
        if (lane->decode_stream != NULL) {
            ops->stream_free(lane->device, lane->decode_stream);
        }
        if (lane->copy_stream != NULL) {
            ops->stream_free(lane->device, lane->copy_stream);
        }
        ops->close(lane->device);
    }
    free(lane->layer_events);
    free(lane->chunks);
    pthread_mutex_destroy(&((private_lane *)lane)->enqueueing);
    free(lane);
}

static krul_status
new_chunk(krul_lane *lane, size_t chunk_bytes, krul_chunk *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = lane->ops;
    krul_chunk chunk = {.lane = lane};
    void *memory = NULL;
    chunk.blocks = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.blocks);
    chunk.block_steps = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.block_steps);
    chunk.block_views = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.block_views);
    chunk.links = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.links);
    chunk.link_blocks = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.link_blocks);
    chunk.batches = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.batches);
    chunk.batch_chains = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.batch_chains);
    chunk.steps = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.steps);
    chunk.statuses = calloc(KRUL_CHUNK_MAX_BLOCKS, sizeof *chunk.statuses);
    if (chunk.blocks == NULL || chunk.block_steps == NULL || chunk.block_views == NULL ||
        chunk.links == NULL || chunk.link_blocks == NULL || chunk.batches == NULL ||
        chunk.batch_chains == NULL || chunk.steps == NULL || chunk.statuses == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a chunk's list");
        goto done;
    }
    KRUL_TRY(ops->pinned_new(lane->device, chunk_bytes + SLACK_BYTES, &memory, err));
    chunk.pinned = memory;
    memory = NULL;
    KRUL_TRY(ops->memory_new(lane->device, chunk_bytes + SLACK_BYTES, &memory, err));
    chunk.memory = memory;
    KRUL_TRY(ops->event_new(lane->device, &chunk.copied, err));
    KRUL_TRY(ops->event_new(lane->device, &chunk.decoded, err));
    memset(chunk.pinned, 0, chunk_bytes + SLACK_BYTES); /* padding is copied, too */
    *out = chunk;
done:
    if (status != KRUL_STATUS_OK) {
        free_chunk(lane, &chunk);
    }
    return status;
}

/* Make the ring: as many chunks as there is memory for, and smaller ones where there is not enough
 * for a single one. */
static krul_status
make_ring(krul_lane *lane, size_t need_bytes, krul_error *err)
{
    const krul_device_pool *pool = lane->pool;
    size_t chunk_bytes = pool->chunk_bytes > need_bytes ? pool->chunk_bytes : need_bytes;
    size_t least_bytes = need_bytes > MIN_CHUNK_BYTES ? need_bytes : MIN_CHUNK_BYTES;
    krul_status status;
    lane->chunks = calloc((size_t)pool->n_chunks, sizeof *lane->chunks);
    if (lane->chunks == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d chunks",
                         (int)pool->n_chunks);
    }
    for (;;) {
        krul_error reason;
        status = new_chunk(lane, chunk_bytes, &lane->chunks[0], &reason);
        if (status == KRUL_STATUS_OK) {
            break;
        }
        if (status != KRUL_STATUS_NO_MEMORY || chunk_bytes <= least_bytes) {
            return krul_fail(err, KRUL_STATUS_DEVICE,
                             "%s %d has no chunk of %zu bytes, and a block needs %zu: %s",
                             lane->ops->name, (int)lane->device_id, chunk_bytes, need_bytes,
                             reason.message);
        }
        chunk_bytes = chunk_bytes / 2 > least_bytes ? chunk_bytes / 2 : least_bytes;
    }
    lane->chunk_bytes = chunk_bytes;
    lane->n_chunks = 1;
    while (lane->n_chunks < pool->n_chunks && status == KRUL_STATUS_OK) {
        status = new_chunk(lane, chunk_bytes, &lane->chunks[lane->n_chunks], NULL);
        lane->n_chunks += status == KRUL_STATUS_OK;
    }
    /* One is enough, though reading and copying then take turns; a device that fails says so again. */
    return KRUL_STATUS_OK;
}

static krul_status
new_lane(krul_device_pool *pool, int32_t device_id, size_t need_bytes, krul_lane **out,
         krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    private_lane *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a lane");
    }
    pthread_mutex_init(&made->enqueueing, NULL);
    krul_lane *lane = &made->lane;
    lane->pool = pool;
    lane->ops = &pool->ops;
    lane->profiles = pool->profiles;
    lane->device_id = device_id;
    KRUL_TRY(pool->ops.open(device_id, &lane->device, err));
    KRUL_TRY(pool->ops.stream_new(lane->device, &lane->copy_stream, err));
    KRUL_TRY(pool->ops.stream_new(lane->device, &lane->decode_stream, err));
    KRUL_TRY(pool->ops.event_new(lane->device, &lane->fence, err));
    KRUL_TRY(make_ring(lane, need_bytes, err));
    *out = lane;
    lane = NULL;
done:
    free_lane(lane);
    return status;
}

/* Have events for layers, more than there were before where needed. */
static krul_status
make_events(krul_lane *lane, int32_t n_events, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    if (n_events > lane->n_layer_events) {
        void **events = realloc(lane->layer_events, (size_t)n_events * sizeof *events);
        if (events == NULL) {
            return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d events", (int)n_events);
        }
        lane->layer_events = events;
    }
    while (lane->n_layer_events < n_events) {
        KRUL_TRY(
            lane->ops->event_new(lane->device, &lane->layer_events[lane->n_layer_events], err));
        lane->n_layer_events++;
    }
done:
    return status;
}

krul_status
krul_lane_take(krul_device_pool *pool, int32_t device_id, size_t need_bytes, int32_t n_events,
               krul_lane **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_lane *lane = NULL;
    pthread_mutex_lock(&pool->lock);
    for (krul_lane **link = &pool->idle; *link != NULL; link = &(*link)->next) {
        if ((*link)->device_id == device_id && (*link)->chunk_bytes >= need_bytes) {
            lane = *link;
            *link = lane->next;
            pool->n_idle--;
            break;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    if (lane == NULL) {
        KRUL_TRY(new_lane(pool, device_id, need_bytes, &lane, err));
    }
    lane->next = NULL;
    KRUL_TRY(make_events(lane, n_events, err));
    *out = lane;
    lane = NULL;
done:
    free_lane(lane);
    return status;
}

void
krul_lane_give(krul_lane *lane)
{
    if (lane == NULL) {
        return;
    }
    krul_device_pool *pool = lane->pool;
    krul_lane *unwanted = lane;
    krul_lane_end_chains(lane);
    pthread_mutex_lock(&pool->lock);
    if (lane->failure.status == KRUL_STATUS_OK) {
        lane->next = pool->idle;
        pool->idle = lane;
        pool->n_idle++;
        unwanted = NULL;
        if (pool->n_idle > pool->max_idle) { /* the one that has waited longest */
            krul_lane **link = &pool->idle;
            while ((*link)->next != NULL) {
                link = &(*link)->next;
            }
            unwanted = *link;
            *link = NULL;
            pool->n_idle--;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    free_lane(unwanted);
}

void
krul_device_pool_free(krul_device_pool *pool)
{
    if (pool == NULL) {
        return;
    }
    while (pool->idle != NULL) {
        krul_lane *lane = pool->idle;
        pool->idle = lane->next;
        free_lane(lane);
    }
    krul_station_shelf_close(&pool->shelf);
    krul_profiles_free(pool->profiles);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static void
lock_streams(krul_lane *lane)
{
    pthread_mutex_lock(&((private_lane *)lane)->enqueueing);
}

static void
unlock_streams(krul_lane *lane)
{
    pthread_mutex_unlock(&((private_lane *)lane)->enqueueing);
}

krul_status
krul_lane_follow(krul_lane *lane, void *stream, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    lock_streams(lane);
    KRUL_TRY(lane->ops->event_record(lane->device, lane->fence, stream, err));
    KRUL_TRY(lane->ops->stream_wait_event(lane->device, lane->decode_stream, lane->fence, err));
done:
    unlock_streams(lane);
    return status;
}

krul_status
krul_lane_lead(krul_lane *lane, void *stream, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    lock_streams(lane);
    KRUL_TRY(lane->ops->event_record(lane->device, lane->fence, lane->decode_stream, err));
    KRUL_TRY(lane->ops->stream_wait_event(lane->device, stream, lane->fence, err));
done:
    unlock_streams(lane);
    return status;
}

krul_chunk *
krul_lane_next_chunk(krul_lane *lane)
{
    for (int32_t i = 0; i < lane->n_chunks; i++) {
        krul_chunk *chunk = &lane->chunks[i];
        if (chunk->state == KRUL_CHUNK_FREE) {
            chunk->state = KRUL_CHUNK_FILLING;
            chunk->used_bytes = HEADER_BYTES;
            chunk->n_blocks = chunk->n_links = chunk->n_steps = 0;
            return chunk;
        }
    }
    return NULL;
}

krul_chunk *
krul_lane_oldest_chunk(krul_lane *lane)
{
    krul_chunk *oldest = NULL;
    for (int32_t i = 0; i < lane->n_chunks; i++) {
        krul_chunk *chunk = &lane->chunks[i];
        if (chunk->state == KRUL_CHUNK_ENQUEUED && (oldest == NULL || chunk->turn < oldest->turn)) {
            oldest = chunk;
        }
    }
    if (oldest != NULL) {
        oldest->state = KRUL_CHUNK_DRAINING;
    }
    return oldest;
}

bool
krul_lane_is_busy(const krul_lane *lane)
{
    for (int32_t i = 0; i < lane->n_chunks; i++) {
        if (lane->chunks[i].state >= KRUL_CHUNK_ENQUEUED) {
            return true;
        }
    }
    return false;
}

/* ---- filling a chunk --------------------------------------------------------------------------- */

static size_t
aligned(size_t n_bytes)
{
    return (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Bytes of a view's elements in a whole block; entries were checked, so that these fit. */
static size_t
decoded_bytes(const krul_store_entry *entry)
{
    return (size_t)entry->n_batch * (size_t)entry->n_heads * (size_t)entry->n_tokens *
           (size_t)entry->head_dim * krul_dtype_bytes(entry->dtype);
}

/* The blocks that a step becomes: one, or where it is decoded on the host, one for each view. */
static int32_t
make_blocks(const krul_device_ops *ops, const krul_store_entry *entry, const krul_view *views,
            uint64_t offset, krul_device_block *blocks, int32_t *block_views, size_t *n_bytes_out)
{
    if (ops->decode_is_supported(entry)) {
        blocks[0] = (krul_device_block){.entry = entry, .payload_offset = offset};
        memcpy(blocks[0].views, views, sizeof blocks[0].views);
        block_views[0] = ALL_VIEWS;
        *n_bytes_out = aligned((size_t)entry->payload_bytes);
        return 1;
    }
    int32_t n_blocks = 0;
    *n_bytes_out = 0;
    for (int i = 0; i < KRUL_COMPRESSOR_MAX_VIEWS; i++) {
        if (views[i].data == NULL) {
            continue;
        }
        blocks[n_blocks] = (krul_device_block){
            .entry = entry, .payload_offset = offset + *n_bytes_out, .is_decoded = true};
        blocks[n_blocks].views[i] = views[i];
        block_views[n_blocks++] = i;
        *n_bytes_out += aligned(decoded_bytes(entry));
    }
    return n_blocks;
}

/* What preparing a block of chains may append, whatever stands before it. */
static size_t
link_bound(const krul_device_ops *ops, const krul_store_entry *entry)
{
    krul_device_block block = {.entry = entry};
    return aligned(ops->predict_bound(&block, 1));
}

krul_status
krul_chunk_need(const krul_device_ops *ops, const krul_store_entry *entry, const krul_view *views,
                bool is_link, size_t *n_bytes_out, krul_error *err)
{
    krul_device_block blocks[KRUL_COMPRESSOR_MAX_VIEWS];
    int32_t block_views[KRUL_COMPRESSOR_MAX_VIEWS];
    size_t n_bytes;
    if (entry->payload_bytes > KRUL_STORE_MAX_BLOCK_BYTES * (uint64_t)4) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "a block has %llu coded bytes",
                         (unsigned long long)entry->payload_bytes);
    }
    if (is_link) {
        n_bytes = aligned((size_t)entry->payload_bytes) + link_bound(ops, entry);
    }
    else {
        int32_t n_blocks = make_blocks(ops, entry, views, HEADER_BYTES, blocks, block_views,
                                       &n_bytes);
        n_bytes += aligned(ops->decode_bound(blocks, n_blocks));
    }
    *n_bytes_out = HEADER_BYTES + n_bytes + 2 * ALIGNMENT;
    return KRUL_STATUS_OK;
}

bool
krul_chunk_has_room(const krul_chunk *chunk, const krul_store_entry *entry, const krul_view *views,
                    const krul_lane_chains *chains)
{
    const krul_lane *lane = chunk->lane;
    size_t n_bytes = 0, bound = 0;
    int32_t n_blocks = chunk->n_blocks;
    if (n_blocks + chunk->n_links + KRUL_COMPRESSOR_MAX_VIEWS > KRUL_CHUNK_MAX_BLOCKS ||
        chunk->n_steps == KRUL_CHUNK_MAX_BLOCKS) {
        return false;
    }
    if (chains != NULL) {
        n_bytes = aligned((size_t)entry->payload_bytes);
        bound = link_bound(lane->ops, entry);
    }
    else {
        /* Tried behind the others: what stands there is not in the chunk yet. */
        n_blocks += make_blocks(lane->ops, entry, views, chunk->used_bytes,
                                &chunk->blocks[n_blocks], &chunk->block_views[n_blocks], &n_bytes);
    }
    for (int32_t i = 0; i < chunk->n_links; i++) {
        bound += link_bound(lane->ops, chunk->links[i].block.entry);
    }
    bound += aligned(lane->ops->decode_bound(chunk->blocks, n_blocks));
    return chunk->used_bytes + n_bytes + bound + 2 * ALIGNMENT <= lane->chunk_bytes;
}

uint8_t *
krul_chunk_payload(krul_chunk *chunk)
{
    return chunk->pinned + chunk->used_bytes;
}

/* Do these stand in order: chains by chains, layer by layer, within one by token? */
static bool
are_in_order(const krul_chunk_link *left, const krul_chunk_link *right)
{
    const krul_store_entry *lower = left->block.entry, *upper = right->block.entry;
    if (left->chains != right->chains) {
        return (uintptr_t)left->chains < (uintptr_t)right->chains;
    }
    if (lower->layer_lower != upper->layer_lower) {
        return lower->layer_lower < upper->layer_lower;
    }
    return lower->token_start < upper->token_start;
}

static void
add_link(krul_chunk *chunk, const krul_store_entry *entry, const krul_view *views,
         krul_lane_chains *chains)
{
    krul_chunk_link link = {
        .block = {.entry = entry, .payload_offset = chunk->used_bytes},
        .chains = chains,
        .step = chunk->n_steps,
    };
    memcpy(link.block.views, views, sizeof link.block.views);
    int32_t at = chunk->n_links++;
    while (at > 0 && !are_in_order(&chunk->links[at - 1], &link)) {
        chunk->links[at] = chunk->links[at - 1];
        at--;
    }
    chunk->links[at] = link;
}

void
krul_chunk_add(krul_chunk *chunk, int64_t step, const krul_store_entry *entry,
               const krul_view *views, krul_lane_chains *chains)
{
    size_t n_bytes;
    int32_t first = chunk->n_blocks;
    if (chains != NULL) {
        add_link(chunk, entry, views, chains);
        n_bytes = aligned((size_t)entry->payload_bytes);
    }
    else {
        chunk->n_blocks += make_blocks(chunk->lane->ops, entry, views, chunk->used_bytes,
                                       &chunk->blocks[first], &chunk->block_views[first], &n_bytes);
    }
    for (int32_t i = first; i < chunk->n_blocks; i++) {
        chunk->block_steps[i] = chunk->n_steps;
    }
    chunk->steps[chunk->n_steps] = step;
    chunk->statuses[chunk->n_steps] = KRUL_STATUS_OK;
    chunk->n_steps++;
    chunk->used_bytes += n_bytes;
}

void
krul_chunk_host_views(const krul_chunk *chunk, const krul_store_entry *entry,
                      const krul_view *views, krul_view *out)
{
    size_t offset = chunk->used_bytes;
    for (int i = 0; i < KRUL_COMPRESSOR_MAX_VIEWS; i++) {
        out[i] = views[i];
        out[i].device_type = KRUL_DEVICE_CPU;
        if (views[i].data == NULL) {
            continue;
        }
        out[i].data = chunk->pinned + offset;
        out[i].shape[2] = entry->n_tokens;
        int64_t stride = 1;
        for (int axis = KRUL_VIEW_DIMS - 1; axis >= 0; axis--) {
            out[i].stride[axis] = stride;
            stride *= out[i].shape[axis];
        }
        offset += aligned(decoded_bytes(entry));
    }
}

void
krul_chunk_set_views(krul_chunk *chunk, int32_t index, const krul_view *views, bool is_needed)
{
    for (int32_t i = 0; i < chunk->n_links; i++) {
        krul_chunk_link *link = &chunk->links[i];
        if (link->step == index) {
            memcpy(link->block.views, views, sizeof link->block.views);
            link->is_needed = is_needed;
        }
    }
    for (int32_t i = 0; i < chunk->n_blocks; i++) {
        if (chunk->block_steps[i] != index) {
            continue;
        }
        for (int k = 0; k < KRUL_COMPRESSOR_MAX_VIEWS; k++) {
            bool is_here = chunk->block_views[i] == k || chunk->block_views[i] == ALL_VIEWS;
            chunk->blocks[i].views[k] = is_here ? views[k] : (krul_view){.data = NULL};
        }
    }
}

/* ---- enqueueing it ----------------------------------------------------------------------------- */

/* Keep the blocks of good steps that somebody wants. */
static void
keep_wanted(krul_chunk *chunk)
{
    int32_t n_kept = 0;
    for (int32_t i = 0; i < chunk->n_blocks; i++) {
        const krul_device_block *block = &chunk->blocks[i];
        bool is_wanted = block->views[0].data != NULL || block->views[1].data != NULL;
        if (!is_wanted || chunk->statuses[chunk->block_steps[i]] != KRUL_STATUS_OK) {
            continue;
        }
        chunk->block_steps[n_kept] = chunk->block_steps[i];
        chunk->blocks[n_kept++] = *block;
    }
    chunk->n_blocks = n_kept;
    n_kept = 0;
    for (int32_t i = 0; i < chunk->n_links; i++) {
        if (chunk->links[i].is_needed && chunk->statuses[chunk->links[i].step] == KRUL_STATUS_OK) {
            chunk->links[n_kept++] = chunk->links[i];
        }
    }
    chunk->n_links = n_kept;
}

/* Check the blocks and write behind them what the device must know; leave out what is damaged. */
static krul_status
prepare(krul_chunk *chunk, krul_device_batch *batches, int32_t *n_batches_out,
        size_t *used_bytes_out, krul_error *first_failure, krul_error *err)
{
    const krul_lane *lane = chunk->lane;
    *n_batches_out = 0;
    while (chunk->n_blocks > 0) {
        int32_t bad_block = -1;
        krul_status status = lane->ops->decode_prepare(
            chunk->pinned, lane->chunk_bytes, chunk->used_bytes, chunk->blocks, chunk->n_blocks,
            batches, n_batches_out, used_bytes_out, &bad_block, err);
        if (status == KRUL_STATUS_OK || bad_block < 0 || bad_block >= chunk->n_blocks) {
            return status;
        }
        chunk->statuses[chunk->block_steps[bad_block]] = status;
        if (first_failure->status == KRUL_STATUS_OK && err != NULL) {
            *first_failure = *err;
        }
        *n_batches_out = 0;
        keep_wanted(chunk);
    }
    return KRUL_STATUS_OK;
}

/* A block of chains is damaged: it and what follows it in its run is not to be decoded. */
static void
leave_out(krul_chunk *chunk, const krul_chunk_link *bad, krul_status failure)
{
    for (int32_t i = 0; i < chunk->n_links; i++) {
        const krul_chunk_link *link = &chunk->links[i];
        const krul_store_entry *entry = link->block.entry;
        if (link->chains == bad->chains && entry->token_start == bad->block.entry->token_start &&
            entry->layer_lower >= bad->block.entry->layer_lower) {
            chunk->statuses[link->step] = failure;
        }
    }
}

/* The same for blocks of codec predict, as many at once as there is scratch for; with the streams'
 * lock. What is prepared counts as decoded for what comes later. */
static krul_status
prepare_links(krul_chunk *chunk, int32_t *n_batches_out, size_t *used_bytes,
              krul_error *first_failure, krul_error *err)
{
    const krul_lane *lane = chunk->lane;
    int32_t first = 0;
    *n_batches_out = 0;
    while (first < chunk->n_links) {
        const krul_lane_chains *chains = chunk->links[first].chains;
        int64_t n_rows = 0;
        int32_t n_blocks = 0, n_batches = 0, bad_block = -1;
        for (int32_t i = first; i < chunk->n_links && chunk->links[i].chains == chains; i++) {
            n_rows += krul_chain_rows(chunk->links[i].block.entry);
            if (i > first && n_rows > chains->max_rows) {
                break;
            }
            chunk->link_blocks[n_blocks++] = chunk->links[i].block;
        }
        krul_status status = lane->ops->predict_prepare(
            chains->chains, chunk->pinned, lane->chunk_bytes, *used_bytes, chunk->link_blocks,
            n_blocks, chunk->batches + *n_batches_out, &n_batches, used_bytes, &bad_block, err);
        if (status == KRUL_STATUS_OK) {
            for (int32_t i = 0; i < n_batches; i++) {
                chunk->batch_chains[(*n_batches_out)++] = chunk->links[first].chains;
            }
            first += n_blocks;
            continue;
        }
        if (bad_block < 0 || bad_block >= n_blocks) {
            return status;
        }
        if (first_failure->status == KRUL_STATUS_OK && err != NULL) {
            *first_failure = *err;
        }
        /* What was prepared before it is good, and stays where it is. */
        krul_chunk_link bad = chunk->links[first + bad_block];
        leave_out(chunk, &bad, status);
        keep_wanted(chunk);
    }
    return KRUL_STATUS_OK;
}

static krul_status
tell_streams(krul_chunk *chunk, const krul_device_batch *batches, int32_t n_batches,
             int32_t n_link_batches, size_t used_bytes, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_lane *lane = chunk->lane;
    const krul_device_ops *ops = lane->ops;
    uint32_t *flag = (uint32_t *)(void *)chunk->memory;
    chunk->turn = lane->n_turns++;
    KRUL_TRY(ops->copy_in(lane->device, lane->copy_stream, chunk->memory, chunk->pinned, used_bytes,
                          err));
    KRUL_TRY(ops->event_record(lane->device, chunk->copied, lane->copy_stream, err));
    KRUL_TRY(ops->stream_wait_event(lane->device, lane->decode_stream, chunk->copied, err));
    for (int32_t i = 0; i < n_batches; i++) {
        KRUL_TRY(
            ops->decode(lane->device, lane->decode_stream, &batches[i], chunk->memory, flag, err));
    }
    for (int32_t i = 0; i < n_link_batches; i++) {
        KRUL_TRY(krul_lane_decode_batch(lane, chunk->batch_chains[i], &chunk->batches[i], chunk,
                                        flag, err));
    }
    KRUL_TRY(
        ops->copy_out(lane->device, lane->decode_stream, chunk->pinned, flag, sizeof *flag, err));
    KRUL_TRY(ops->event_record(lane->device, chunk->decoded, lane->decode_stream, err));
done:
    return status;
}

/* Nothing more is asked of a device that failed; wait for what it may still be doing. */
static void
give_up(krul_lane *lane, const krul_error *failure)
{
    if (lane->failure.status == KRUL_STATUS_OK) {
        lane->failure = *failure;
        lane->failure.status = KRUL_STATUS_DEVICE;
    }
    (void)lane->ops->stream_synchronize(lane->device, lane->copy_stream, NULL);
    for (int i = 0; i < KRUL_LANE_N_AHEAD && lane->products != NULL; i++) {
        (void)lane->ops->stream_synchronize(lane->device, lane->ahead[i].stream, NULL);
    }
    (void)lane->ops->stream_synchronize(lane->device, lane->decode_stream, NULL);
}

krul_status
krul_chunk_enqueue(krul_chunk *chunk, krul_error *first_failure, krul_error *err)
{
    krul_lane *lane = chunk->lane;
    krul_device_batch batches[KRUL_DEVICE_MAX_BATCHES];
    int32_t n_batches = 0, n_link_batches = 0;
    size_t used_bytes = chunk->used_bytes;
    krul_error failure = {.status = KRUL_STATUS_OK};
    memset(chunk->pinned, 0, HEADER_BYTES);
    keep_wanted(chunk);
    krul_status status = prepare(chunk, batches, &n_batches, &used_bytes, first_failure, &failure);
    if (status == KRUL_STATUS_OK && chunk->n_blocks + chunk->n_links > 0) {
        lock_streams(lane);
        if (lane->failure.status != KRUL_STATUS_OK) {
            failure = lane->failure;
            status = failure.status;
        }
        else {
            status = prepare_links(chunk, &n_link_batches, &used_bytes, first_failure, &failure);
        }
        if (status == KRUL_STATUS_OK && n_batches + n_link_batches > 0) {
            status = tell_streams(chunk, batches, n_batches, n_link_batches, used_bytes, &failure);
            if (status != KRUL_STATUS_OK) {
                give_up(lane, &failure);
            }
        }
        unlock_streams(lane);
    }
    if (status != KRUL_STATUS_OK) {
        chunk->n_blocks = chunk->n_links = 0;
        return krul_fail(err, KRUL_STATUS_DEVICE, "%s", failure.message);
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_chunk_drain(krul_chunk *chunk, bool *is_damaged_out, krul_error *err)
{
    krul_lane *lane = chunk->lane;
    krul_error failure;
    krul_status status = lane->ops->event_synchronize(lane->device, chunk->decoded, &failure);
    if (status != KRUL_STATUS_OK) {
        lock_streams(lane);
        give_up(lane, &failure);
        unlock_streams(lane);
        return krul_fail(err, KRUL_STATUS_DEVICE, "%s", failure.message);
    }
    uint32_t flag;
    memcpy(&flag, chunk->pinned, sizeof flag);
    *is_damaged_out = flag != 0;
    return KRUL_STATUS_OK;
}

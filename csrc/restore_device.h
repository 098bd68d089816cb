/* restore_device.h - lanes: the way from coded blocks in files to views on a device.
 *
 * A lane has two streams of a device and a ring of chunks, pinned memory with as much memory of the
 * device. Blocks are read into a chunk; then one copy on the one stream and a decoding on the other
 * are enqueued. When these are over the chunk is free again. Codec predict has more streams, which run
 * ahead of the other's; see restore_predict.c. A lane belongs to one restore at a time,
 * and waits in its pool for the next: taking pinned memory is slow.
 *
 * Chunks change their state with the restore's lock; what works on a chunk that it has taken, or
 * enqueues on the streams, needs no lock. */
#ifndef KRUL_RESTORE_DEVICE_H
#define KRUL_RESTORE_DEVICE_H

#include "device.h"
#include "krul.h"

enum {
    KRUL_CHUNK_MAX_BLOCKS = 512, /* most in one chunk */
    KRUL_LANE_N_AHEAD = 8, /* batches of codec predict whose numbers are decoded side by side */
};

typedef enum krul_chunk_state {
    KRUL_CHUNK_FREE,
    KRUL_CHUNK_FILLING, /* by one thread */
    KRUL_CHUNK_ENQUEUED, /* the device works on it, or will */
    KRUL_CHUNK_DRAINING, /* the same, and one thread waits for that */
} krul_chunk_state;

typedef struct krul_lane krul_lane;
typedef struct krul_lane_chains krul_lane_chains; /* restore_predict.h */
typedef struct krul_profiles krul_profiles;

/* One block of codec predict in a chunk. */
typedef struct krul_chunk_link {
    krul_device_block block;
    krul_lane_chains *chains;
    int32_t step; /* which of the chunk's */
    bool is_needed; /* by its views, or by those that are predicted from it */
} krul_chunk_link;

/* One piece of the ring. */
typedef struct krul_chunk {
    krul_lane *lane;
    krul_chunk_state state;
    uint64_t turn; /* of being enqueued: the smallest is over first */
    uint8_t *pinned;
    uint8_t *memory; /* of the device */
    void *copied; /* events */
    void *decoded;
    size_t used_bytes;
    int32_t n_blocks;
    int32_t n_steps; /* blocks of one step are neighbours */
    krul_device_block *blocks; /* KRUL_CHUNK_MAX_BLOCKS of each */
    int32_t *block_steps; /* which of the chunk's steps it belongs to */
    int32_t *block_views; /* which of the step's views it is, or -1: all */
    int32_t n_links;
    krul_chunk_link *links; /* by chains, layer and token; KRUL_CHUNK_MAX_BLOCKS of each */
    krul_device_block *link_blocks; /* room for those that are prepared at once */
    krul_device_predict_batch *batches;
    krul_lane_chains **batch_chains;
    int64_t *steps; /* the restore's number of each */
    krul_status *statuses; /* what became of each */
} krul_chunk;

/* One batch of codec predict that is under way before its turn. */
typedef struct krul_lane_ahead {
    void *stream;
    void *numbered; /* events: its numbers are in scratch, and were used */
    void *used;
} krul_lane_ahead;

struct krul_lane {
    krul_device_pool *pool;
    krul_lane *next; /* in the pool */
    const krul_device_ops *ops;
    krul_device *device;
    int32_t device_id;
    size_t chunk_bytes;
    int32_t n_chunks;
    krul_chunk *chunks;
    void *copy_stream;
    void *decode_stream;
    void *fence; /* an event for orderings of a moment */
    void **layer_events; /* n_layer_events, for the restore that has the lane */
    int32_t n_layer_events;
    uint64_t n_turns;
    krul_profiles *profiles; /* the pool's */
    void *products; /* on decode_stream; NULL until codec predict is wanted, as is what is ahead */
    krul_lane_ahead ahead[KRUL_LANE_N_AHEAD];
    uint64_t n_batches; /* of codec predict so far */
    krul_lane_chains *chains; /* of the restore that has the lane */
    krul_error failure; /* of the device: nothing more is asked of it */
};

/* Take a lane of a device from the pool, or make one, with chunks of at least need_bytes and
 * n_events events for layers. Where memory is short it has smaller and fewer chunks;
 * KRUL_STATUS_DEVICE when even that cannot be had. */
krul_status krul_lane_take(krul_device_pool *pool, int32_t device_id, size_t need_bytes,
                           int32_t n_events, krul_lane **out, krul_error *err) KRUL_MUST_CHECK;

/* Give it back; nothing may be enqueued on it any more. NULL is allowed. */
void krul_lane_give(krul_lane *lane);

/* Order what `stream` was told so far before what the lane is told from now on, or the reverse. */
krul_status krul_lane_follow(krul_lane *lane, void *stream, krul_error *err) KRUL_MUST_CHECK;
krul_status krul_lane_lead(krul_lane *lane, void *stream, krul_error *err) KRUL_MUST_CHECK;

/* A chunk that is free, now being filled; NULL if there is none. With the restore's lock. */
krul_chunk *krul_lane_next_chunk(krul_lane *lane);

/* The chunk that will be over first, now being drained; NULL if none is enqueued. With the lock. */
krul_chunk *krul_lane_oldest_chunk(krul_lane *lane);

/* Is any chunk enqueued or being drained? With the lock. */
bool krul_lane_is_busy(const krul_lane *lane);

/* Chunk bytes that a block needs which is alone in its chunk, with these views; is_link: of chains. */
krul_status krul_chunk_need(const krul_device_ops *ops, const krul_store_entry *entry,
                            const krul_view *views, bool is_link, size_t *n_bytes_out,
                            krul_error *err) KRUL_MUST_CHECK;

/* Is there room for a step's block behind those that are in? Here and below `chains` are those that
 * it belongs to, NULL for other codecs and where the CPU decodes predict. */
bool krul_chunk_has_room(const krul_chunk *chunk, const krul_store_entry *entry,
                         const krul_view *views, const krul_lane_chains *chains);

/* Where the next coded bytes are to be read to: entry->payload_bytes of them. */
uint8_t *krul_chunk_payload(krul_chunk *chunk);

/* Where a step that the device cannot decode is decoded to by the host: for each view that is wanted
 * the whole block in the chunk. */
void krul_chunk_host_views(const krul_chunk *chunk, const krul_store_entry *entry,
                           const krul_view *views, krul_view *out);

/* Enter a step whose coded bytes have been put there, or that was decoded to there for these views. */
void krul_chunk_add(krul_chunk *chunk, int64_t step, const krul_store_entry *entry,
                    const krul_view *views, krul_lane_chains *chains);

/* Say where a step's block goes; data NULL: nowhere. One of chains may be needed nevertheless. */
void krul_chunk_set_views(krul_chunk *chunk, int32_t index, const krul_view *views, bool is_needed);

/* Check what is in the chunk and enqueue it. Blocks that are damaged are left out, with those of the
 * chunk that are predicted from them, and `statuses` says which; first_failure is that of the first.
 * All blocks of lower layers of the same chains must be in it, or have been enqueued. KRUL_STATUS_DEVICE is of all: then nothing of the
 * chunk is under way when this returns, and the lane is not used any more. */
krul_status krul_chunk_enqueue(krul_chunk *chunk, krul_error *first_failure,
                               krul_error *err) KRUL_MUST_CHECK;

/* Sleep until what was enqueued is over; did the device find damage? */
krul_status krul_chunk_drain(krul_chunk *chunk, bool *is_damaged_out,
                             krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_RESTORE_DEVICE_H */

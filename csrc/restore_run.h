/* restore_run.h - what a restore consists of, for restore_run.c and restore_chunk.c. */
#ifndef KRUL_RESTORE_RUN_H
#define KRUL_RESTORE_RUN_H

#include <pthread.h>
#include <time.h>

#include "internal.h"
#include "restore_predict.h"
#include "restore_step.h"

typedef enum step_state {
    STEP_WAITING,
    STEP_READING,
    STEP_DECODING,
    STEP_DONE,
} step_state;

/* Most devices of one restore, and what stands for none. */
enum { MAX_LANES = 64, NO_LANE = 255 };

/* What is known of one layer. */
typedef struct restore_layer {
    int64_t n_steps_left;
    double end_s; /* of its last step so far */
    krul_error failure; /* of the first step that failed */
    krul_lane *lane; /* of a layer on a device, else NULL */
    void *event; /* behind all that was enqueued for it, once it waits for no step */
    bool is_enqueued; /* something was */
    bool has_event; /* and the event was recorded */
} restore_layer;

struct krul_restore {
    const krul_backend *backend;
    krul_restore_step *steps; /* views are unwanted with the lock */
    uint8_t *states; /* step_state of each step */
    int64_t *before; /* the step of the same chain that must be decoded first, or -1 */
    int64_t *after; /* the one that follows it, or -1 */
    krul_restore_trace *traces;
    int64_t n_steps;
    size_t buffer_bytes; /* the largest payload that is read from a file */
    krul_status *failures; /* of each step; with the lock */
    uint8_t *is_decoded; /* what is predicted from a step may be decoded; with the lock */
    uint8_t *step_lanes; /* the lane of each step, or NO_LANE */
    krul_lane_chains **step_chains; /* NULL: not of codec predict, or decoded by the CPU */
    krul_error predict_problem; /* why that is so */
    krul_lane *lanes[MAX_LANES];
    int32_t n_lanes;
    restore_layer *layers;
    int32_t n_layers;
    krul_pool *pool;
    krul_restore_machine *machine;
    double *free_s; /* on a made-up machine: when each worker is free again */
    int n_workers;
    double start_s;
    pthread_mutex_t lock; /* guards all below, the layers, states and traces */
    pthread_cond_t has_changed;
    /* For callers, who are not woken by every block: a layer is in or failed, or so little is ready
     * to be decoded that it may be a caller's turn. */
    pthread_cond_t layer_has_changed;
    int64_t *order; /* in which steps are taken */
    int64_t next_step; /* place in order */
    int n_running; /* workers submitted and not yet ended */
    bool is_cancelled;
    double max_bytes_per_s;
    double link_free_s; /* when the way to the store is free again */
    int n_reading;
    int n_starved; /* of those, who are expected to wait for the store */
    int n_slow; /* reads since the last that was fast */
    bool takes_turns;
    int n_processors;
    int n_waiting; /* callers: then it is the turn of those who decode */
    int n_ready; /* blocks that are read and are being decoded, or could be */
    int most_ready; /* at any time so far */
    double turn_end_s; /* until when it is a caller's turn */
    double reading_since_s;
    krul_restore_counts counts;
};

/* ---- in restore_run.c; what waits lets the lock go meanwhile ---- */

/* Does somebody wait for what a step writes, or for what is predicted from it? */
bool krul_restore_is_wanted(const krul_restore *restore, int64_t index);

/* The next step that somebody wants; -1 if there is none. With the lock. */
int64_t krul_restore_next_step(krul_restore *restore);

/* Enter what a step came to, for the views it was decoded into; with the lock. */
void krul_restore_finish_step(krul_restore *restore, int64_t index, const krul_view *views,
                              const krul_error *failure, const krul_restore_trace *trace);

/* Read and check a block, no faster than is allowed; without the lock. */
krul_status krul_restore_read_step(krul_restore *restore, const krul_restore_step *step,
                                   uint8_t *buffer, krul_error *err);

/* Has what a step is predicted from failed? With the lock. */
krul_status krul_restore_check_chain(const krul_restore *restore, int64_t index,
                                     krul_error *failure);

/* Sleep until what a step is predicted from is in: a step is taken after all before it in its chain,
 * so that somebody always gets on. With the lock. */
krul_status krul_restore_wait_for_chain(krul_restore *restore, int64_t index, krul_error *failure);

static inline double
krul_restore_clock_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline krul_lane *
krul_restore_lane_of(const krul_restore *restore, int64_t index)
{
    uint8_t lane = restore->step_lanes[index];
    return lane == NO_LANE ? NULL : restore->lanes[lane];
}

/* ---- in restore_chunk.c ---- */

/* Wait until the device is done with all that was enqueued; with the lock. */
void krul_restore_drain_all(krul_restore *restore);

/* A chunk to be filled; NULL when the lock was let go: then it is time to look again what is to be
 * done. With the lock. */
krul_chunk *krul_restore_next_chunk(krul_restore *restore, krul_lane *lane);

/* Carry out the next steps of a lane, as many as fit into a chunk; with the lock. */
void krul_restore_run_chunk(krul_restore *restore, krul_chunk *chunk, int32_t worker,
                            uint8_t *buffer);

/* Have a lane for each device that steps write to, behind what their streams were told so far. */
krul_status krul_restore_take_lanes(krul_restore *restore, const krul_restore_options *options,
                                    krul_error *err);

#endif /* KRUL_RESTORE_RUN_H */

/* restore_predict.h - codec predict on a lane: profiles that devices keep, and chains of a restore.
 *
 * All memory that a restore's chains take on a device is had before its first chunk; where that cannot
 * be, the CPU decodes them. A profile is large and always the same: it stays on the device for the
 * next restore, the few that were used last. */
#ifndef KRUL_RESTORE_PREDICT_H
#define KRUL_RESTORE_PREDICT_H

#include "restore_device.h"

/* What one predictor's chains have on a lane. */
struct krul_lane_chains {
    krul_lane_chains *next; /* of the lane */
    krul_device_chains *chains;
    struct kept_profile *profile;
    int64_t max_rows; /* of blocks that are prepared at once */
    uint8_t *memory; /* of the device: that of the chains, then scratch */
    size_t scratch_at;
    size_t scratch_bytes; /* for each batch that is ahead */
};

krul_status krul_profiles_new(const krul_device_ops *ops, krul_profiles **out,
                              krul_error *err) KRUL_MUST_CHECK;

/* None may be in use. NULL is allowed. */
void krul_profiles_free(krul_profiles *profiles);

/* Have a lane decode what this predictor coded; runs as krul_device_chains_new takes them. Nothing
 * may be enqueued on the lane yet. Whatever it fails with, the lane is as good as before. */
krul_status krul_lane_begin_chains(krul_lane *lane, const krul_predict *predict,
                                   const krul_device_run *runs, int32_t n_runs,
                                   krul_lane_chains **out, krul_error *err) KRUL_MUST_CHECK;

/* Free what the restore's chains had; nothing may be enqueued on the lane any more. */
void krul_lane_end_chains(krul_lane *lane);

/* Free what stays with a lane from one restore to the next. */
void krul_lane_free_ahead(krul_lane *lane);

/* Rows that a block adds to what is prepared at once. */
int64_t krul_chain_rows(const krul_store_entry *entry);

/* Enqueue a batch of a chunk: its numbers as soon as the chunk was copied, its rows on the decode
 * stream. Batches in the order in which they were prepared. */
krul_status krul_lane_decode_batch(krul_lane *lane, const krul_lane_chains *chains,
                                   const krul_device_predict_batch *batch, const krul_chunk *chunk,
                                   uint32_t *damage_flag, krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_RESTORE_PREDICT_H */

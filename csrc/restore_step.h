/* restore_step.h - what one block of a restore needs; see restore_step.c. */
#ifndef KRUL_RESTORE_STEP_H
#define KRUL_RESTORE_STEP_H

#include "krul.h"

/* Views that a block fills: 1, or 2 where two layers share or K and V are coded together. */
int krul_restore_n_views(const krul_store_entry *entry);

/* The layer of view 0 or 1. */
int32_t krul_restore_layer_of(const krul_store_entry *entry, int index);

/* Refuse a step that is no block, has no source, or does not fit its outputs. On a machine that is
 * made up there is neither source nor output. */
krul_status krul_restore_check_step(const krul_restore_step *step, int64_t index, int32_t n_layers,
                                    bool is_made_up, krul_error *err) KRUL_MUST_CHECK;

/* Decode a block into the views that are wanted; one with fewer tokens gets the first ones. */
krul_status krul_restore_decode(const krul_backend *backend, const krul_restore_step *step,
                                const krul_view *wanted, const uint8_t *payload,
                                krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_RESTORE_STEP_H */

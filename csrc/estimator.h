/* estimator.h - what observing attention shares, whatever it runs on; internal. */
#ifndef KRUL_ESTIMATOR_H
#define KRUL_ESTIMATOR_H

#include "krul.h"

/* Check all arguments of an observation on a type of device, before any sum is touched. *first_out is
 * the first layer that is observed, or -1. */
krul_status krul_estimator_check(const krul_estimator_layer *layers, int32_t n_layers,
                                 krul_device_type device_type, const int64_t *row_positions,
                                 int64_t n_rows, int64_t n_keys_total, double weight,
                                 const krul_estimator_sums *sums, int32_t *first_out,
                                 krul_error *err) KRUL_MUST_CHECK;

/* The first token of a batch row that is no padding, n_keys_total where all are. */
int64_t krul_estimator_first_real(const uint8_t *key_is_real, int64_t n_keys_total);

/* Most heads that share a KV head in this layer and in those that gave n_at_once, 0: in none yet. */
int64_t krul_estimator_heads_at_once(const krul_estimator_layer *layer, int64_t n_at_once);

#endif /* KRUL_ESTIMATOR_H */

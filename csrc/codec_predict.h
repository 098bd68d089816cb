/* codec_predict.h - what decoders of codec predict share, whatever they decode on; internal. */
#ifndef KRUL_CODEC_PREDICT_H
#define KRUL_CODEC_PREDICT_H

#include "krul.h"

enum {
    KRUL_PREDICT_HEADER_BYTES = 12,
    KRUL_PREDICT_MAX_SHIFT = 4, /* classes that a row may lie above or below what is expected */
};

/* Do the numbers of a profile fit together, and is every array there? */
krul_status krul_predict_check_options(const krul_predict_options *options,
                                       krul_error *err) KRUL_MUST_CHECK;

/* The options that a predictor was made of, borrowed from it. */
krul_predict_options krul_predict_options_of(const krul_predict *predict);

/* 3 log2(value), rounded down; by comparisons alone, so that every machine finds the same. */
int32_t krul_predict_level_of(float value);

/* The step of a row as a part of the block's: 2^(-fineness/3), the same float on every machine. */
float krul_predict_row_step(int32_t fineness);

/* Header and side information of a payload: the class of each of `width` components, whose
 * deviations have these levels, and of each row its fineness and its shift, of which the fineness is
 * a part. *side_bytes_out is where the column stream begins. Trusts nothing; on failure the arrays
 * may be partly written. */
krul_status krul_predict_read_side(const int16_t *levels, int64_t width, int64_t n_rows,
                                   int32_t unit_table, int32_t n_tables, const uint8_t *payload,
                                   size_t payload_bytes, uint8_t *classes_out, int8_t *fineness_out,
                                   int8_t *shifts_out, float *step_out, size_t *side_bytes_out,
                                   krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_CODEC_PREDICT_H */

/* selector.c - which layer pairs share their KV.
 *
 * A few dozen layers make a few hundred pairs: sorting them all is exact and costs nothing. */
#include <math.h>
#include <stdlib.h>

#include "internal.h"

/* A pair that may be taken, with what it is ranked by. */
typedef struct candidate {
    double distance;
    krul_selector_pair pair;
} candidate;

/* A layer with how much it attends to both ends of the text. */
typedef struct ranked_layer {
    double importance;
    int32_t layer;
} ranked_layer;

static int
compare_candidates(const void *left_bytes, const void *right_bytes)
{
    const candidate *left = left_bytes;
    const candidate *right = right_bytes;
    int32_t left_gap = left->pair.upper - left->pair.lower;
    int32_t right_gap = right->pair.upper - right->pair.lower;
    if (left->distance != right->distance) {
        return left->distance < right->distance ? -1 : 1;
    }
    if (left_gap != right_gap) {
        return left_gap < right_gap ? -1 : 1;
    }
    return (left->pair.lower > right->pair.lower) - (left->pair.lower < right->pair.lower);
}

/* Most important first. What is not known is taken as sensitive: sharing it could do most harm. */
static int
compare_importance(const void *left_bytes, const void *right_bytes)
{
    const ranked_layer *left = left_bytes;
    const ranked_layer *right = right_bytes;
    if (isnan(left->importance) != isnan(right->importance)) {
        return isnan(left->importance) ? -1 : 1;
    }
    if (left->importance != right->importance && !isnan(left->importance)) {
        return left->importance > right->importance ? -1 : 1;
    }
    return (left->layer > right->layer) - (left->layer < right->layer);
}

static krul_status
check_counts(int32_t n_layers, int32_t n_sensitive, int32_t n_pairs, krul_error *err)
{
    if (n_layers < 0 || n_layers > 1 << 14) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "n_layers is %d but must be from 0 to %d",
                         (int)n_layers, 1 << 14);
    }
    if (n_sensitive < 0 || n_pairs < 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "n_sensitive is %d and n_pairs is %d but neither may be below 0",
                         (int)n_sensitive, (int)n_pairs);
    }
    return KRUL_STATUS_OK;
}

int32_t
krul_selector_pair_count(int32_t n_layers, double ratio)
{
    if (n_layers < 2 || !(ratio < 1)) {
        return 0;
    }
    /* 0.75 of 20 layers is 5 pairs, though (1 - 0.75) * 20 need not be 5 exactly for other numbers */
    double n_pairs = ceil((1 - ratio) * n_layers - 1e-9);
    return n_pairs < n_layers / 2 ? (int32_t)n_pairs : n_layers / 2;
}

krul_status
krul_selector_choose_pairs(const double *distances, const double *importance,
                           const int32_t *layer_class, int32_t n_layers, int32_t n_sensitive,
                           int32_t n_pairs, krul_selector_pair *pairs_out, int32_t *n_pairs_out,
                           krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    ranked_layer *ranked = NULL;
    candidate *candidates = NULL;
    bool *is_taken = NULL;
    size_t n_candidates = 0;
    int32_t n_chosen = 0;
    KRUL_TRY(check_counts(n_layers, n_sensitive, n_pairs, err));
    size_t n_all = (size_t)n_layers * (size_t)(n_layers > 0 ? n_layers - 1 : 0) / 2;
    ranked = malloc(((size_t)n_layers + 1) * sizeof *ranked);
    candidates = malloc((n_all + 1) * sizeof *candidates);
    is_taken = calloc((size_t)n_layers + 1, sizeof *is_taken);
    if (ranked == NULL || candidates == NULL || is_taken == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for the pairs of %d layers",
                           (int)n_layers);
        goto done;
    }

    for (int32_t l = 0; l < n_layers; l++) {
        ranked[l] = (ranked_layer){importance[l * 2] + importance[l * 2 + 1], l};
    }
    qsort(ranked, (size_t)n_layers, sizeof *ranked, compare_importance);
    for (int32_t i = 0; i < n_sensitive && i < n_layers; i++) {
        is_taken[ranked[i].layer] = true;
    }
    for (int32_t lower = 0; lower < n_layers; lower++) {
        for (int32_t upper = lower + 1; upper < n_layers; upper++) {
            double distance = distances[(size_t)lower * (size_t)n_layers + (size_t)upper];
            if (!is_taken[lower] && !is_taken[upper] && !isnan(distance) &&
                layer_class[lower] == layer_class[upper]) {
                candidates[n_candidates++] = (candidate){distance, {lower, upper}};
            }
        }
    }
    qsort(candidates, n_candidates, sizeof *candidates, compare_candidates);
    for (size_t i = 0; i < n_candidates && n_chosen < n_pairs; i++) {
        krul_selector_pair pair = candidates[i].pair;
        if (!is_taken[pair.lower] && !is_taken[pair.upper]) {
            is_taken[pair.lower] = is_taken[pair.upper] = true;
            pairs_out[n_chosen++] = pair;
        }
    }
    *n_pairs_out = n_chosen;

done:
    free(is_taken);
    free(candidates);
    free(ranked);
    return status;
}

krul_status
krul_selector_fixed_pairs(const int32_t *layer_class, int32_t n_layers, int32_t n_pairs,
                          krul_selector_pair *pairs_out, int32_t *n_pairs_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int32_t n_chosen = 0;
    KRUL_TRY(check_counts(n_layers, 0, n_pairs, err));
    for (int32_t lower = n_layers / 2; lower + 1 < n_layers && n_chosen < n_pairs;) {
        if (layer_class[lower] == layer_class[lower + 1]) {
            pairs_out[n_chosen++] = (krul_selector_pair){lower, lower + 1};
            lower += 2;
        }
        else {
            lower++;
        }
    }
    *n_pairs_out = n_chosen;

done:
    return status;
}

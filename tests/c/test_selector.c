/* test_selector.c - pairs of layers: rules, ties, NaN, bounds. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "internal.h"

enum { MAX_LAYERS = 8 };

static double distances[MAX_LAYERS * MAX_LAYERS];
static double importance[MAX_LAYERS * 2];
static int32_t classes[MAX_LAYERS];
static krul_selector_pair pairs[MAX_LAYERS];

static void
reset(int32_t n_layers)
{
    for (int32_t i = 0; i < n_layers * n_layers; i++) {
        distances[i] = 1;
    }
    memset(importance, 0, sizeof importance);
    memset(classes, 0, sizeof classes);
    memset(pairs, -1, sizeof pairs);
}

static int32_t
choose(int32_t n_layers, int32_t n_sensitive, int32_t n_pairs)
{
    int32_t n_found = -1;
    krul_error err;
    CHECK(krul_selector_choose_pairs(distances, importance, classes, n_layers, n_sensitive, n_pairs,
                                     pairs, &n_found, &err) == KRUL_STATUS_OK);
    return n_found;
}

static bool
is_pair(int index, int32_t lower, int32_t upper)
{
    return pairs[index].lower == lower && pairs[index].upper == upper;
}

static void
test_ties(void)
{
    reset(6);
    CHECK(choose(6, 0, 3) == 3);
    CHECK(is_pair(0, 0, 1) && is_pair(1, 2, 3) && is_pair(2, 4, 5));
    classes[1] = classes[3] = classes[5] = 1;
    CHECK(choose(6, 0, 3) == 2);
    CHECK(is_pair(0, 0, 2) && is_pair(1, 1, 3));
}

static void
test_distance_and_sensitivity(void)
{
    reset(4);
    distances[1 * 4 + 3] = 0.5;
    CHECK(choose(4, 0, 4) == 2);
    CHECK(is_pair(0, 1, 3) && is_pair(1, 0, 2));
    importance[1 * 2 + 1] = 0.7;
    importance[2 * 2] = (double)NAN;
    CHECK(choose(4, 1, 2) == 1); /* what is not known counts as sensitive */
    CHECK(is_pair(0, 1, 3));
    CHECK(choose(4, 2, 2) == 1);
    CHECK(is_pair(0, 0, 3));
    CHECK(choose(4, 9, 2) == 0);
}

static void
test_nan_is_never_paired(void)
{
    reset(3);
    distances[0 * 3 + 1] = distances[0 * 3 + 2] = (double)NAN;
    CHECK(choose(3, 0, 1) == 1);
    CHECK(is_pair(0, 1, 2));
    distances[1 * 3 + 2] = (double)NAN;
    CHECK(choose(3, 0, 1) == 0);
}

static void
test_fixed(void)
{
    krul_error err;
    int32_t n_found = -1;
    reset(8);
    CHECK(krul_selector_fixed_pairs(classes, 8, 3, pairs, &n_found, &err) == KRUL_STATUS_OK);
    CHECK(n_found == 2 && is_pair(0, 4, 5) && is_pair(1, 6, 7));
    classes[4] = 1;
    CHECK(krul_selector_fixed_pairs(classes, 8, 1, pairs, &n_found, &err) == KRUL_STATUS_OK);
    CHECK(n_found == 1 && is_pair(0, 5, 6));
}

static void
test_counts(void)
{
    CHECK(krul_selector_pair_count(30, 0.75) == 8);
    CHECK(krul_selector_pair_count(20, 0.75) == 5);
    CHECK(krul_selector_pair_count(30, 1.0) == 0);
    CHECK(krul_selector_pair_count(30, 0.1) == 15);
    CHECK(krul_selector_pair_count(1, 0.5) == 0);
    CHECK(krul_selector_pair_count(-3, 0.5) == 0);
    CHECK(krul_selector_pair_count(30, (double)NAN) == 0);
}

static void
test_refusals(void)
{
    krul_error err;
    int32_t n_found = 77;
    reset(2);
    CHECK(krul_selector_choose_pairs(distances, importance, classes, -1, 0, 0, pairs, &n_found,
                                     &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_selector_choose_pairs(distances, importance, classes, 2, -1, 0, pairs, &n_found,
                                     &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_selector_choose_pairs(distances, importance, classes, 2, 0, -1, pairs, &n_found,
                                     NULL) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_selector_fixed_pairs(classes, 1 << 20, 1, pairs, &n_found, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(n_found == 77);
    CHECK(choose(0, 0, 0) == 0);
    CHECK(choose(1, 0, 0) == 0);
}

int
main(void)
{
    test_ties();
    test_distance_and_sensitivity();
    test_nan_is_never_paired();
    test_fixed();
    test_counts();
    test_refusals();
    return check_finish();
}

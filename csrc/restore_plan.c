/* restore_plan.c - which part of a history to recompute while the rest is loaded.
 *
 * A candidate is at most three numbers, and its time is one pass over the layers: `predict` is all
 * that is known of the model of time, for the search, the report and the tests. The search is one
 * function too, used inside itself for each number. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Sums of costs that are no larger stay finite for any number of layers and tokens. */
static const double MAX_COST = 1e12;

/* A plan that recomputes more must be faster by this part: rounding is no reason to recompute. */
static const double MARGIN = 1e-9;

enum {
    MAX_SCANNED = 24, /* values of a number that are all tried */
    MAX_SPLITS = 64, /* of the layers into first ones and others, that are looked at beyond */
};

/* A plan before its layers are written out; what a level is stands at level_tokens. */
typedef struct plan_candidate {
    krul_restore_shape shape;
    int64_t first_level; /* of the first layers */
    int64_t last_level; /* of the last layer: with STEP, of all after n_first_layers */
    int32_t n_first_layers; /* STEP only */
    int64_t n_recomputed; /* tokens of all layers */
    double predicted_s;
} plan_candidate;

/* What the search looks at over and over. */
typedef struct planner_state {
    const krul_restore_costs *costs;
    int64_t granularity; /* at most n_tokens, as are the next two */
    int64_t level_spacing; /* tokens of a block, or granularity if that is larger */
    int64_t first_spacing; /* the same of the first block */
    int64_t top_level; /* of n_recomputable */
    double *read_s; /* n_layers: of a whole layer with all that it shares */
    double *overlapped_s; /* n_layers: decoding where that overlaps reading, else 0 */
    double *bound_load_s; /* n_layers: what the bound counts to a layer */
    double *prompt_s; /* n_layers + 1: the prompt's pass from a layer to the end */
    int64_t *n_recomputed; /* n_layers: scratch of the candidate that is looked at */
    double *fractions; /* n_layers: scratch of predict */
    plan_candidate best;
} planner_state;

/* fmax and fmin are calls, because of NaN; there is none here. */
static inline double
larger(double left, double right)
{
    return left > right ? left : right;
}

static inline double
smaller(double left, double right)
{
    return left < right ? left : right;
}

/* ---- validation ------------------------------------------------------------------------------ */

static krul_status
check_count(const char *name, int64_t value, int64_t low, int64_t high, krul_error *err)
{
    if (value < low || value > high) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "%s is %lld but must be from %lld to %lld",
                         name, (long long)value, (long long)low, (long long)high);
    }
    return KRUL_STATUS_OK;
}

/* NaN fails the comparison and is refused with the rest. */
static krul_status
check_seconds(const char *name, const double *values, int32_t n_layers, krul_error *err)
{
    for (int32_t l = 0; l < n_layers; l++) {
        if (!(values[l] >= 0 && values[l] <= MAX_COST)) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "%s of layer %d is %g but must be from 0 to %g", name, (int)l,
                             values[l], MAX_COST);
        }
    }
    return KRUL_STATUS_OK;
}

/* Token counts of layers: within bounds, and never growing with depth. */
static krul_status
check_tokens(const char *name, const int64_t *n_tokens, const krul_restore_costs *costs,
             krul_error *err)
{
    int64_t n_before = costs->n_recomputable;
    for (int32_t l = 0; l < costs->n_layers; l++) {
        if (n_tokens[l] < 0 || n_tokens[l] > n_before) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "%s of layer %d is %lld but must be from 0 to %lld, which %s", name,
                             (int)l, (long long)n_tokens[l], (long long)n_before,
                             l == 0 ? "is n_recomputable" : "the layer before it has");
        }
        n_before = n_tokens[l];
    }
    return KRUL_STATUS_OK;
}

static krul_status
check_partners(const krul_restore_costs *costs, krul_error *err)
{
    for (int32_t l = 0; l < costs->n_layers; l++) {
        if (costs->partner[l] < -1 || costs->partner[l] >= l) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "partner of layer %d is %d but must be -1 or a layer below it", (int)l,
                             (int)costs->partner[l]);
        }
    }
    return KRUL_STATUS_OK;
}

static krul_status
check_costs(const krul_restore_costs *costs, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int32_t n_layers = costs->n_layers;
    KRUL_TRY(check_count("n_layers", n_layers, 1, KRUL_STORE_MAX_LAYERS, err));
    KRUL_TRY(check_count("n_tokens", costs->n_tokens, 0, KRUL_STORE_MAX_TOKENS, err));
    KRUL_TRY(check_count("n_prompt_tokens", costs->n_prompt_tokens, 0, KRUL_STORE_MAX_TOKENS, err));
    KRUL_TRY(check_count("granularity", costs->granularity, 1, INT64_MAX, err));
    KRUL_TRY(check_count("block_tokens", costs->block_tokens, 0, INT64_MAX, err));
    KRUL_TRY(check_count("first_block_tokens", costs->first_block_tokens, 0, INT64_MAX, err));
    KRUL_TRY(check_count("n_recomputable", costs->n_recomputable, 0, costs->n_tokens, err));
    KRUL_TRY(check_seconds("linear_s_per_token", costs->linear_s_per_token, n_layers, err));
    KRUL_TRY(check_seconds("quadratic_s_per_token2", costs->quadratic_s_per_token2, n_layers, err));
    KRUL_TRY(check_seconds("overhead_s", costs->overhead_s, n_layers, err));
    KRUL_TRY(check_seconds("read_s", costs->read_s, n_layers, err));
    KRUL_TRY(check_seconds("decode_s", costs->decode_s, n_layers, err));
    if (costs->partner != NULL) {
        KRUL_TRY(check_partners(costs, err));
        KRUL_TRY(check_seconds("pair_read_s", costs->pair_read_s, n_layers, err));
    }
    if (!(costs->latency_s >= 0 && costs->latency_s <= MAX_COST)) {
        status = krul_fail(err, KRUL_STATUS_BAD_VALUE, "latency_s is %g but must be from 0 to %g",
                           costs->latency_s, MAX_COST);
    }
    else if (costs->n_required != NULL) {
        status = check_tokens("n_required", costs->n_required, costs, err);
    }

done:
    return status;
}

/* ---- the model of time ----------------------------------------------------------------------- */

static double
layer_recompute_s(const krul_restore_costs *costs, int32_t layer, double n_tokens)
{
    if (n_tokens <= 0) {
        return 0;
    }
    return n_tokens * (costs->linear_s_per_token[layer] +
                       costs->quadratic_s_per_token2[layer] * n_tokens) +
           costs->overhead_s[layer];
}

/* (N + m)^2 - N^2 is m (2 N + m), without cancellation. */
static double
layer_prompt_s(const krul_restore_costs *costs, int32_t layer)
{
    double n_history = (double)costs->n_tokens;
    double n_prompt = (double)costs->n_prompt_tokens;
    if (n_prompt <= 0) {
        return 0;
    }
    return n_prompt * (costs->linear_s_per_token[layer] +
                       costs->quadratic_s_per_token2[layer] * (2 * n_history + n_prompt)) +
           costs->overhead_s[layer];
}

/* Part of a layer that is read when its first n_recomputed tokens are not wanted. */
static double
loaded_fraction(const krul_restore_costs *costs, int64_t n_recomputed)
{
    int64_t n_first = costs->first_block_tokens;
    int64_t n_block = krul_max_i64(costs->block_tokens, 1);
    if (n_recomputed >= costs->n_tokens) {
        return 0;
    }
    int64_t n_skipped = n_recomputed < n_first ? 0
                                               : n_recomputed - (n_recomputed - n_first) % n_block;
    return (double)(costs->n_tokens - n_skipped) / (double)costs->n_tokens;
}

static double
layer_decode_s(const krul_restore_costs *costs, int32_t layer)
{
    return costs->decode_on_compute ? costs->decode_s[layer] : 0;
}

static int32_t
partner_of(const krul_restore_costs *costs, int32_t layer)
{
    return costs->partner == NULL ? -1 : costs->partner[layer];
}

/* Seconds that the channel spends on a layer at its turn, of which `fractions` are read. What it
 * shares with a lower layer, and that needs too, has come with the lower one. */
static inline double
turn_s(const planner_state *planner, int32_t layer, const double *fractions)
{
    const krul_restore_costs *costs = planner->costs;
    double read_s = fractions[layer] * planner->read_s[layer];
    int32_t partner = partner_of(costs, layer);
    if (partner >= 0) {
        read_s -= fractions[partner] * costs->pair_read_s[layer];
    }
    return larger(read_s, fractions[layer] * planner->overlapped_s[layer]);
}

/* Seconds until the first token. */
static double
predict(const planner_state *planner, const int64_t *n_recomputed)
{
    const krul_restore_costs *costs = planner->costs;
    double work_s = planner->prompt_s[0];
    double load_end_s = costs->latency_s;
    double loads_s = 0; /* until the first token, were there nothing but loads and the prompt */
    double fraction = 0;
    int64_t n_before = -1;
    for (int32_t l = 0; l < costs->n_layers; l++) {
        int64_t n = n_recomputed[l];
        if (n != n_before) {
            fraction = loaded_fraction(costs, n);
            n_before = n;
        }
        work_s += layer_recompute_s(costs, l, (double)n) + fraction * layer_decode_s(costs, l);
        planner->fractions[l] = fraction;
        if (fraction > 0) {
            load_end_s += turn_s(planner, l, planner->fractions);
            loads_s = larger(loads_s, load_end_s + planner->prompt_s[l]);
        }
    }
    return larger(work_s, loads_s);
}

/* ---- candidates ------------------------------------------------------------------------------ */

/* Levels are the token counts that are worth a trial: of the multiples of granularity that end in
 * one block only the least, because the rest recompute more and load the same; and all of the
 * history. Returns how many tokens a level is. */
static int64_t
level_tokens(const planner_state *planner, int64_t level)
{
    if (level == 0) {
        return 0;
    }
    int64_t granularity = planner->granularity;
    int64_t block_start = planner->first_spacing + (level - 1) * planner->level_spacing;
    int64_t n_rounded_up = (block_start + granularity - 1) / granularity * granularity;
    return krul_min_i64(n_rounded_up, planner->costs->n_tokens);
}

/* The last level of at most n_tokens, which is below the whole history. */
static int64_t
level_of(const planner_state *planner, int64_t n_tokens)
{
    int64_t n_behind = n_tokens - n_tokens % planner->granularity - planner->first_spacing;
    return n_behind < 0 ? 0 : 1 + n_behind / planner->level_spacing;
}

/* The line from the first level to the last, rounded down. */
static void
fill_ramp(const planner_state *planner, const plan_candidate *candidate, int64_t *out)
{
    int64_t n_gaps = krul_max_i64(planner->costs->n_layers - 1, 1);
    int64_t fall = candidate->first_level - candidate->last_level;
    for (int32_t l = 0; l < planner->costs->n_layers; l++) {
        out[l] = level_tokens(planner, (candidate->first_level * n_gaps - fall * l) / n_gaps);
    }
}

/* Write a candidate's layers to planner->n_recomputed; returns their sum. */
static int64_t
fill(const planner_state *planner, const plan_candidate *candidate)
{
    int64_t *out = planner->n_recomputed;
    int32_t n_layers = planner->costs->n_layers;
    const int64_t *n_required = planner->costs->n_required;
    int64_t n_total = 0;
    if (candidate->shape == KRUL_RESTORE_SHAPE_PYRAMID) {
        fill_ramp(planner, candidate, out);
    }
    else {
        int64_t first = level_tokens(planner, candidate->first_level);
        int64_t last = level_tokens(planner, candidate->last_level);
        int32_t l = 0;
        for (; l < candidate->n_first_layers; l++) {
            out[l] = first;
        }
        for (; l < n_layers; l++) {
            out[l] = last;
        }
    }
    for (int32_t l = 0; n_required != NULL && l < n_layers; l++) {
        out[l] = krul_max_i64(out[l], n_required[l]);
    }
    for (int32_t l = 0; l < n_layers; l++) {
        n_total += out[l];
    }
    return n_total;
}

static bool
is_better(const plan_candidate *left, const plan_candidate *right)
{
    return left->predicted_s < right->predicted_s * (1 - MARGIN) ||
           (left->predicted_s <= right->predicted_s && left->n_recomputed < right->n_recomputed);
}

/* Every candidate passes here: predict it, and keep it if there is no better one. */
static double
consider(planner_state *planner, plan_candidate *candidate)
{
    candidate->n_recomputed = fill(planner, candidate);
    candidate->predicted_s = predict(planner, planner->n_recomputed);
    if (is_better(candidate, &planner->best)) {
        planner->best = *candidate;
    }
    return candidate->predicted_s;
}

/* ---- search ---------------------------------------------------------------------------------- */

/* Set one number of a candidate to value; returns the least time found with it. */
typedef double (*try_number)(planner_state *planner, plan_candidate *candidate, int64_t value);

/* The least time over value in [low, high]: each tried where they are few, else by Fibonacci
 * search. The ends are always tried, because overhead and whole layers make them special. */
static double
search(planner_state *planner, plan_candidate *candidate, try_number try, int64_t low, int64_t high)
{
    double least_s = INFINITY;
    if (high - low < MAX_SCANNED) {
        for (int64_t value = low; value <= high; value++) {
            least_s = smaller(least_s, try(planner, candidate, value));
        }
        return least_s;
    }
    least_s = smaller(try(planner, candidate, low), try(planner, candidate, high));
    int64_t shorter = 1, longer = 1; /* neighbouring Fibonacci numbers, their sum the range */
    while (shorter + longer < high - low) {
        longer += shorter;
        shorter = longer - shorter;
    }
    double left_s = try(planner, candidate, low + shorter);
    double right_s = try(planner, candidate, low + longer);
    least_s = smaller(least_s, smaller(left_s, right_s));
    while (longer > shorter) {
        int64_t next = longer - shorter;
        if (left_s <= right_s) {
            right_s = left_s;
            left_s = try(planner, candidate, low + next);
            least_s = smaller(least_s, left_s);
        }
        else {
            low += shorter;
            left_s = right_s;
            /* the Fibonacci number may be larger than the range was */
            right_s = low + shorter < high ? try(planner, candidate, low + shorter) : INFINITY;
            least_s = smaller(least_s, right_s);
        }
        longer = shorter;
        shorter = next;
    }
    return least_s;
}

static double
try_last_level(planner_state *planner, plan_candidate *candidate, int64_t value)
{
    candidate->last_level = value;
    return consider(planner, candidate);
}

static double
try_both_levels(planner_state *planner, plan_candidate *candidate, int64_t value)
{
    candidate->first_level = value;
    return try_last_level(planner, candidate, value);
}

static double
try_first_level(planner_state *planner, plan_candidate *candidate, int64_t value)
{
    candidate->first_level = value;
    return search(planner, candidate, try_last_level, 0, value);
}

static double
try_first_level_alone(planner_state *planner, plan_candidate *candidate, int64_t value)
{
    candidate->first_level = value;
    return consider(planner, candidate);
}

static double
try_n_first_layers(planner_state *planner, plan_candidate *candidate, int64_t value)
{
    candidate->n_first_layers = (int32_t)value;
    return search(planner, candidate, try_first_level, 0, planner->top_level);
}

/* Time is anything but convex in n_first_layers. Splits are looked at with the first layers
 * recomputed whole, and with the rest loaded whole; the best of either kind is searched in full. */
static double
search_step(planner_state *planner, plan_candidate *candidate)
{
    int32_t n_layers = planner->costs->n_layers;
    int32_t stride = 1 + (n_layers - 1) / MAX_SPLITS;
    double least_s[2] = {INFINITY, INFINITY};
    int32_t best[2] = {1, 1};
    if (n_layers <= MAX_SCANNED) {
        return search(planner, candidate, try_n_first_layers, 1, n_layers);
    }
    for (int32_t n = 1; n <= n_layers; n += stride) {
        candidate->n_first_layers = n;
        candidate->first_level = planner->top_level;
        double whole_s = search(planner, candidate, try_last_level, 0, planner->top_level);
        candidate->last_level = 0;
        double loaded_s = search(planner, candidate, try_first_level_alone, 0, planner->top_level);
        if (whole_s < least_s[0]) {
            least_s[0] = whole_s;
            best[0] = n;
        }
        if (loaded_s < least_s[1]) {
            least_s[1] = loaded_s;
            best[1] = n;
        }
    }
    return smaller(try_n_first_layers(planner, candidate, best[0]),
                   try_n_first_layers(planner, candidate, best[1]));
}

/* The least time of a shape's candidates; the best of all so far is in planner->best. */
static double
search_shape(planner_state *planner, krul_restore_shape shape)
{
    plan_candidate candidate = {.shape = shape};
    int64_t top_level = planner->top_level;
    switch (shape) {
        case KRUL_RESTORE_SHAPE_RECOMPUTE:
            return try_both_levels(planner, &candidate, top_level);
        case KRUL_RESTORE_SHAPE_UNIFORM:
            return search(planner, &candidate, try_both_levels, 0, top_level);
        case KRUL_RESTORE_SHAPE_PYRAMID:
            return search(planner, &candidate, try_first_level, 0, top_level);
        case KRUL_RESTORE_SHAPE_STEP:
            return search_step(planner, &candidate);
        default:
            return try_both_levels(planner, &candidate, 0);
    }
}

/* ---- bound ----------------------------------------------------------------------------------- */
/* No plan is faster than w * work + (1 - w) * loads for any weight w, each layer choosing the real
 * number of tokens that suits it best. The bound is the largest of these: with equal linear layers
 * 1 / T = 1 / (all recomputed) + 1 / (all loaded), and a true bound for any others. */

/* What loading spares a layer: the work of its whole history, less what decoding it takes. */
static double
spared_s(const planner_state *planner, int32_t layer)
{
    const krul_restore_costs *costs = planner->costs;
    double work_s = layer_recompute_s(costs, layer, (double)costs->n_tokens);
    return larger(work_s - layer_decode_s(costs, layer), 0);
}

/* What the bound counts to each layer. Of a block that two layers share the channel carries what
 * either needs, which is no less than any part of what one needs and the rest of what the other
 * does; the parts are those at which both would best be recomputed for as many tokens. Where
 * decoding overlaps, a layer's turn takes the longer of two: then all of the reading is counted and
 * no decoding of layers that share, or the other way round. */
static void
share_out(planner_state *planner)
{
    const krul_restore_costs *costs = planner->costs;
    double read_s = 0, decode_s = 0; /* of layers that share, counted in either way */
    for (int32_t l = 0; l < costs->n_layers; l++) {
        planner->bound_load_s[l] = larger(costs->read_s[l], planner->overlapped_s[l]);
        planner->fractions[l] = partner_of(costs, l) >= 0;
        if (partner_of(costs, l) >= 0) {
            planner->fractions[costs->partner[l]] = 1;
            read_s += costs->pair_read_s[l];
        }
    }
    for (int32_t l = 0; l < costs->n_layers; l++) {
        read_s += planner->fractions[l] * costs->read_s[l];
        decode_s += planner->fractions[l] * planner->bound_load_s[l];
    }
    if (decode_s > read_s) {
        return;
    }
    for (int32_t l = 0; l < costs->n_layers; l++) {
        if (planner->fractions[l] > 0) {
            planner->bound_load_s[l] = costs->read_s[l];
        }
    }
    for (int32_t l = 0; l < costs->n_layers; l++) {
        int32_t lower = partner_of(costs, l);
        if (lower < 0) {
            continue;
        }
        double pair_s = costs->pair_read_s[l];
        double upper_spared_s = spared_s(planner, l);
        double spared = upper_spared_s + spared_s(planner, lower);
        double both_s = pair_s + costs->read_s[l] + costs->read_s[lower];
        double upper_s = spared > 0 ? both_s * upper_spared_s / spared - costs->read_s[l] : pair_s;
        upper_s = smaller(larger(upper_s, 0), pair_s);
        planner->bound_load_s[l] += upper_s;
        planner->bound_load_s[lower] += pair_s - upper_s;
    }
}

/* Seconds of work and of loading that a layer adds at its best n, for one weight. */
typedef struct plan_demand {
    double work_s;
    double load_s;
} plan_demand;

static plan_demand
demand_at(const planner_state *planner, int32_t layer, double n_recomputed)
{
    double fraction = 1 - n_recomputed / (double)planner->costs->n_tokens;
    return (plan_demand){layer_recompute_s(planner->costs, layer, n_recomputed) +
                             fraction * layer_decode_s(planner->costs, layer),
                         fraction * planner->bound_load_s[layer]};
}

static double
weighted_s(plan_demand demand, double weight)
{
    return weight * demand.work_s + (1 - weight) * demand.load_s;
}

/* Convex in n but for the overhead at 0, so least at an end or where the slope is 0. */
static plan_demand
least_demand(const planner_state *planner, int32_t layer, double weight)
{
    const krul_restore_costs *costs = planner->costs;
    double n_tokens = (double)costs->n_tokens;
    double low = costs->n_required == NULL ? 0 : (double)costs->n_required[layer];
    double high = (double)costs->n_recomputable;
    double slope = weight * (costs->linear_s_per_token[layer] -
                             layer_decode_s(costs, layer) / n_tokens) -
                   (1 - weight) * planner->bound_load_s[layer] / n_tokens;
    double curvature = 2 * weight * costs->quadratic_s_per_token2[layer];
    double ends[] = {low, high,
                     curvature > 0 ? smaller(larger(-slope / curvature, low), high) : high};
    plan_demand least = demand_at(planner, layer, ends[0]);
    for (size_t i = 1; i < KRUL_LENGTH(ends); i++) {
        plan_demand other = demand_at(planner, layer, ends[i]);
        least = weighted_s(other, weight) < weighted_s(least, weight) ? other : least;
    }
    return least;
}

static double
bound_s(const planner_state *planner)
{
    int32_t n_layers = planner->costs->n_layers;
    double bound = 0, low = 0, high = 1; /* the last two of the weight */
    if (planner->costs->n_tokens == 0) {
        return planner->prompt_s[0];
    }
    /* as often as a double can be halved from 1 */
    for (int i = 0; i < DBL_MANT_DIG; i++) {
        double weight = (low + high) / 2;
        plan_demand total = {planner->prompt_s[0],
                             planner->costs->latency_s + planner->prompt_s[n_layers - 1]};
        for (int32_t l = 0; l < n_layers; l++) {
            plan_demand layer = least_demand(planner, l, weight);
            total.work_s += layer.work_s;
            total.load_s += layer.load_s;
        }
        bound = larger(bound, weighted_s(total, weight));
        /* the derivative in the weight: the bound is concave in it */
        if (total.work_s > total.load_s) {
            low = weight;
        }
        else {
            high = weight;
        }
    }
    return bound;
}

/* ---- plans ----------------------------------------------------------------------------------- */

static void
planner_close(planner_state *planner)
{
    free(planner->read_s);
    free(planner->overlapped_s);
    free(planner->bound_load_s);
    free(planner->fractions);
    free(planner->prompt_s);
    free(planner->n_recomputed);
}

static krul_status
planner_init(planner_state *out, const krul_restore_costs *costs, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    KRUL_TRY(check_costs(costs, err));
    size_t n_layers = (size_t)costs->n_layers;
    int64_t most = krul_max_i64(costs->n_tokens, 1);
    int64_t granularity = krul_min_i64(costs->granularity, most);
    bool has_blocks = costs->block_tokens > granularity;
    int64_t level_spacing = has_blocks ? krul_min_i64(costs->block_tokens, most) : granularity;
    *out = (planner_state){
        .costs = costs,
        .granularity = granularity,
        .level_spacing = level_spacing,
        .first_spacing = has_blocks && costs->first_block_tokens > 0
                             ? krul_min_i64(costs->first_block_tokens, most)
                             : level_spacing,
        .read_s = calloc(n_layers, sizeof(double)),
        .overlapped_s = calloc(n_layers, sizeof(double)),
        .bound_load_s = calloc(n_layers, sizeof(double)),
        .fractions = calloc(n_layers, sizeof(double)),
        .prompt_s = calloc(n_layers + 1, sizeof(double)),
        .n_recomputed = calloc(n_layers, sizeof(int64_t)),
        .best = {.predicted_s = INFINITY},
    };
    if (out->read_s == NULL || out->overlapped_s == NULL || out->bound_load_s == NULL ||
        out->fractions == NULL || out->prompt_s == NULL || out->n_recomputed == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory to plan the restore of %d layers",
                           (int)costs->n_layers);
        goto done;
    }
    out->top_level = costs->n_recomputable < costs->n_tokens
                         ? level_of(out, costs->n_recomputable)
                         : level_of(out, most - 1) + (costs->n_tokens > 0);
    for (int32_t l = costs->n_layers - 1; l >= 0; l--) {
        out->overlapped_s[l] = costs->decode_on_compute ? 0 : costs->decode_s[l];
        out->prompt_s[l] = out->prompt_s[l + 1] + layer_prompt_s(costs, l);
        out->read_s[l] += costs->read_s[l];
        if (partner_of(costs, l) >= 0) {
            out->read_s[l] += costs->pair_read_s[l];
            out->read_s[costs->partner[l]] += costs->pair_read_s[l];
        }
    }
    share_out(out);

done:
    return status;
}

/* The planner, and is n_recomputed something that it could have chosen? */
static krul_status
planner_init_for(planner_state *out, const krul_restore_costs *costs, const int64_t *n_recomputed,
                 krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    KRUL_TRY(planner_init(out, costs, err));
    KRUL_TRY(check_tokens("n_recomputed", n_recomputed, costs, err));
    for (int32_t l = 0; costs->n_required != NULL && l < costs->n_layers; l++) {
        if (n_recomputed[l] < costs->n_required[l]) {
            status = krul_fail(err, KRUL_STATUS_BAD_VALUE,
                               "n_recomputed of layer %d is %lld but n_required is %lld", (int)l,
                               (long long)n_recomputed[l], (long long)costs->n_required[l]);
            goto done;
        }
    }

done:
    return status;
}

krul_status
krul_restore_plan_predict(const krul_restore_costs *costs, const int64_t *n_recomputed, double *out,
                          krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    planner_state planner = {0};
    KRUL_TRY(planner_init_for(&planner, costs, n_recomputed, err));
    *out = predict(&planner, n_recomputed);

done:
    planner_close(&planner);
    return status;
}

krul_status
krul_restore_plan_choose(const krul_restore_costs *costs, krul_restore_shape shape,
                         krul_restore_plan *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    planner_state planner = {0};
    KRUL_TRY(check_count("shape", (int64_t)shape, KRUL_RESTORE_SHAPE_AUTO, KRUL_RESTORE_SHAPE_STEP,
                         err));
    KRUL_TRY(planner_init(&planner, costs, err));
    double load_s = search_shape(&planner, KRUL_RESTORE_SHAPE_LOAD);
    double recompute_s = search_shape(&planner, KRUL_RESTORE_SHAPE_RECOMPUTE);
    if (shape != KRUL_RESTORE_SHAPE_AUTO) {
        planner.best.predicted_s = INFINITY;
        search_shape(&planner, shape);
    }
    else {
        search_shape(&planner, KRUL_RESTORE_SHAPE_UNIFORM);
        search_shape(&planner, KRUL_RESTORE_SHAPE_PYRAMID);
        search_shape(&planner, KRUL_RESTORE_SHAPE_STEP);
    }
    fill(&planner, &planner.best);
    memcpy(out->n_recomputed, planner.n_recomputed,
           (size_t)costs->n_layers * sizeof *out->n_recomputed);
    out->shape = planner.best.shape;
    out->predicted_s = planner.best.predicted_s;
    out->load_s = load_s;
    out->recompute_s = recompute_s;
    /* without a load there is no latency, which the bound has paid */
    out->bound_s = smaller(bound_s(&planner), smaller(recompute_s, out->predicted_s));

done:
    planner_close(&planner);
    return status;
}

/* ---- steps ----------------------------------------------------------------------------------- */

static krul_restore_plan_step *
append(krul_restore_plan_step *steps, int64_t *n_steps, krul_restore_action action, int32_t layer,
       int64_t token_start, int64_t token_end)
{
    krul_restore_plan_step *step = &steps[(*n_steps)++];
    *step = (krul_restore_plan_step){
        .action = action, .layer = layer, .token_start = token_start, .token_end = token_end};
    return step;
}

/* By start. At one instant a step that takes no time comes before what needs it: recomputing, then
 * loading, then the prompt's pass, each from the first layer on. */
static int
compare_steps(const void *left_bytes, const void *right_bytes)
{
    const krul_restore_plan_step *left = left_bytes;
    const krul_restore_plan_step *right = right_bytes;
    if (left->start_s != right->start_s) {
        return left->start_s < right->start_s ? -1 : 1;
    }
    if (left->action != right->action) {
        return left->action < right->action ? -1 : 1;
    }
    return (left->layer > right->layer) - (left->layer < right->layer);
}

krul_status
krul_restore_plan_steps(const krul_restore_costs *costs, const int64_t *n_recomputed,
                        krul_restore_plan_step *steps_out, int64_t *n_steps_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    planner_state planner = {0};
    KRUL_TRY(planner_init_for(&planner, costs, n_recomputed, err));
    double first_token_s = predict(&planner, n_recomputed);
    int64_t n_tokens = costs->n_tokens, n_steps = 0;
    krul_restore_plan_step *step;

    double work_end_s = 0;
    double decode_s = 0;
    for (int32_t l = 0; l < costs->n_layers; l++) {
        decode_s += loaded_fraction(costs, n_recomputed[l]) * layer_decode_s(costs, l);
        if (n_recomputed[l] > 0) {
            step = append(steps_out, &n_steps, KRUL_RESTORE_ACTION_RECOMPUTE, l, 0,
                          n_recomputed[l]);
            step->start_s = work_end_s;
            work_end_s += layer_recompute_s(costs, l, (double)n_recomputed[l]);
            step->end_s = work_end_s;
        }
    }
    for (int64_t i = 0; i < n_steps; i++) {
        double left_s = work_end_s - steps_out[i].end_s + decode_s + planner.prompt_s[0];
        steps_out[i].deadline_s = first_token_s - left_s;
    }

    double load_end_s = costs->latency_s;
    double prompt_end_s = work_end_s + decode_s;
    for (int32_t l = 0; l < costs->n_layers; l++) {
        if (n_recomputed[l] < n_tokens) {
            step = append(steps_out, &n_steps, KRUL_RESTORE_ACTION_LOAD, l, n_recomputed[l],
                          n_tokens);
            step->start_s = load_end_s;
            load_end_s += turn_s(&planner, l, planner.fractions); /* of what predict has seen */
            step->end_s = load_end_s;
            step->deadline_s = first_token_s - planner.prompt_s[l];
            prompt_end_s = larger(prompt_end_s, load_end_s);
        }
        if (costs->n_prompt_tokens > 0) {
            step = append(steps_out, &n_steps, KRUL_RESTORE_ACTION_PROMPT, l, n_tokens,
                          n_tokens + costs->n_prompt_tokens);
            step->start_s = prompt_end_s;
            prompt_end_s += layer_prompt_s(costs, l);
            step->end_s = prompt_end_s;
            step->deadline_s = first_token_s - planner.prompt_s[l + 1];
        }
    }
    qsort(steps_out, (size_t)n_steps, sizeof *steps_out, compare_steps);
    *n_steps_out = n_steps;

done:
    planner_close(&planner);
    return status;
}

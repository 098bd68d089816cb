/* test_restore_plan.c - one plan in full, each shape, and every refusal. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "internal.h"

enum { N_LAYERS = 4, N_TOKENS = 12 };

static double linear[N_LAYERS], quadratic[N_LAYERS], overhead[N_LAYERS], reading[N_LAYERS],
    decoding[N_LAYERS], pair_reading[N_LAYERS];
static int32_t partner[N_LAYERS];
static int64_t required[N_LAYERS], n_recomputed[N_LAYERS];

/* A second per token and layer, whether recomputed or loaded. */
static krul_restore_costs
reset(void)
{
    for (int l = 0; l < N_LAYERS; l++) {
        linear[l] = 1;
        reading[l] = N_TOKENS;
        quadratic[l] = overhead[l] = decoding[l] = pair_reading[l] = 0;
        partner[l] = -1;
        required[l] = 0;
        n_recomputed[l] = -7;
    }
    return (krul_restore_costs){
        .n_layers = N_LAYERS,
        .n_tokens = N_TOKENS,
        .granularity = 1,
        .linear_s_per_token = linear,
        .quadratic_s_per_token2 = quadratic,
        .overhead_s = overhead,
        .read_s = reading,
        .decode_s = decoding,
        .n_recomputable = N_TOKENS,
    };
}

static krul_restore_plan
choose(const krul_restore_costs *costs, krul_restore_shape shape)
{
    krul_restore_plan plan = {.n_recomputed = n_recomputed};
    krul_error err;
    CHECK(krul_restore_plan_choose(costs, shape, &plan, &err) == KRUL_STATUS_OK);
    return plan;
}

static bool
is_close(double value, double expected)
{
    return fabs(value - expected) <= 1e-12 * expected;
}

static void
test_half_and_half(void)
{
    krul_restore_costs costs = reset();
    krul_restore_plan plan = choose(&costs, KRUL_RESTORE_SHAPE_AUTO);
    CHECK(plan.shape == KRUL_RESTORE_SHAPE_UNIFORM);
    for (int l = 0; l < N_LAYERS; l++) {
        CHECK(n_recomputed[l] == 6);
    }
    CHECK(plan.load_s == 48 && plan.recompute_s == 48);
    CHECK(plan.predicted_s == 24 && is_close(plan.bound_s, 24));
    double predicted_s = 0;
    krul_error err;
    CHECK(krul_restore_plan_predict(&costs, n_recomputed, &predicted_s, &err) == KRUL_STATUS_OK);
    CHECK(predicted_s == plan.predicted_s);
}

static void
test_shapes(void)
{
    krul_restore_costs costs = reset();
    costs.granularity = 4;
    for (krul_restore_shape shape = KRUL_RESTORE_SHAPE_LOAD; shape <= KRUL_RESTORE_SHAPE_STEP;
         shape++) {
        krul_restore_plan plan = choose(&costs, shape);
        CHECK(plan.shape == shape);
        CHECK(plan.predicted_s >= 24);
        for (int l = 1; l < N_LAYERS; l++) {
            CHECK(n_recomputed[l] <= n_recomputed[l - 1] && n_recomputed[l] % 4 == 0);
        }
    }
    CHECK(choose(&costs, KRUL_RESTORE_SHAPE_AUTO).predicted_s == 24); /* 8 8 4 4 of STEP */
    choose(&costs, KRUL_RESTORE_SHAPE_LOAD);
    CHECK(n_recomputed[0] == 0 && n_recomputed[3] == 0);
    choose(&costs, KRUL_RESTORE_SHAPE_RECOMPUTE);
    CHECK(n_recomputed[0] == N_TOKENS && n_recomputed[3] == N_TOKENS);
    costs.n_required = required;
    required[0] = 5;
    choose(&costs, KRUL_RESTORE_SHAPE_LOAD);
    CHECK(n_recomputed[0] == 5 && n_recomputed[1] == 0);
    costs.n_recomputable = 5;
    choose(&costs, KRUL_RESTORE_SHAPE_RECOMPUTE);
    CHECK(n_recomputed[0] == 5 && n_recomputed[1] == 4);
}

static void
test_steps(void)
{
    krul_restore_plan_step steps[3 * N_LAYERS];
    int64_t n_steps = 0;
    krul_error err;
    krul_restore_costs costs = reset();
    costs.n_prompt_tokens = 2;
    costs.latency_s = 1;
    costs.n_layers = 2;
    n_recomputed[0] = 12;
    n_recomputed[1] = 10;
    CHECK(krul_restore_plan_steps(&costs, n_recomputed, steps, &n_steps, &err) == KRUL_STATUS_OK);
    CHECK(n_steps == 5);
    CHECK(steps[0].action == KRUL_RESTORE_ACTION_RECOMPUTE && steps[0].end_s == 12);
    CHECK(steps[1].action == KRUL_RESTORE_ACTION_LOAD && steps[1].layer == 1);
    CHECK(steps[1].token_start == 10 && steps[1].token_end == 12);
    CHECK(is_close(steps[1].start_s, 1) && is_close(steps[1].end_s, 3));
    CHECK(is_close(steps[1].deadline_s, 24)); /* 22 of recomputing and layer 0 of the prompt */
    CHECK(steps[2].action == KRUL_RESTORE_ACTION_RECOMPUTE && steps[2].end_s == 22);
    CHECK(steps[3].action == KRUL_RESTORE_ACTION_PROMPT && steps[3].layer == 0);
    CHECK(steps[4].action == KRUL_RESTORE_ACTION_PROMPT && is_close(steps[4].end_s, 26));
}

/* Layers 0 and 3 share all that they have, so do 1 and 2: half of the bytes. */
static void
test_pairs(void)
{
    krul_restore_plan_step steps[3 * N_LAYERS];
    int64_t n_steps = 0;
    krul_error err;
    krul_restore_costs costs = reset();
    costs.partner = partner;
    costs.pair_read_s = pair_reading;
    memset(reading, 0, sizeof reading);
    partner[3] = 0;
    partner[2] = 1;
    pair_reading[3] = pair_reading[2] = N_TOKENS;
    krul_restore_plan plan = choose(&costs, KRUL_RESTORE_SHAPE_AUTO);
    CHECK(plan.load_s == 24 && plan.recompute_s == 48 && plan.predicted_s == 16);
    CHECK(is_close(plan.bound_s, 16));
    for (int l = 0; l < N_LAYERS; l++) {
        CHECK(n_recomputed[l] == 4);
    }
    n_recomputed[0] = n_recomputed[1] = 12;
    n_recomputed[2] = 6;
    n_recomputed[3] = 3;
    CHECK(krul_restore_plan_steps(&costs, n_recomputed, steps, &n_steps, &err) == KRUL_STATUS_OK);
    CHECK(n_steps == 6);
    for (int64_t i = 0; i < n_steps; i++) {
        if (steps[i].action == KRUL_RESTORE_ACTION_LOAD) {
            CHECK(is_close(steps[i].end_s, steps[i].layer == 2 ? 6 : 15));
        }
    }
    partner[2] = 2;
    CHECK(krul_restore_plan_steps(&costs, n_recomputed, steps, &n_steps, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "partner of layer 2 is 2") != NULL);
}

static void
test_limits(void)
{
    krul_restore_costs costs = reset();
    for (int l = 0; l < N_LAYERS; l++) {
        reading[l] = 1e9;
    }
    CHECK(choose(&costs, KRUL_RESTORE_SHAPE_AUTO).shape == KRUL_RESTORE_SHAPE_RECOMPUTE);
    costs.block_tokens = costs.first_block_tokens = costs.granularity = INT64_MAX;
    CHECK(choose(&costs, KRUL_RESTORE_SHAPE_AUTO).shape == KRUL_RESTORE_SHAPE_RECOMPUTE);
    costs.n_tokens = costs.n_recomputable = 0;
    krul_restore_plan plan = choose(&costs, KRUL_RESTORE_SHAPE_AUTO);
    CHECK(plan.shape == KRUL_RESTORE_SHAPE_LOAD && plan.predicted_s == 0 && plan.bound_s == 0);
}

/* The status of a choice; what it would write must stay as it was. */
static bool
is_refused(const krul_restore_costs *costs, krul_restore_shape shape, const char *words)
{
    krul_restore_plan plan = {.n_recomputed = n_recomputed, .predicted_s = 77};
    krul_error err;
    n_recomputed[0] = -7;
    krul_status status = krul_restore_plan_choose(costs, shape, &plan, &err);
    return status == KRUL_STATUS_BAD_VALUE && strstr(err.message, words) != NULL &&
           plan.predicted_s == 77 && n_recomputed[0] == -7 &&
           krul_restore_plan_choose(costs, shape, &plan, NULL) == KRUL_STATUS_BAD_VALUE;
}

static void
test_refused_counts(void)
{
    const krul_restore_costs good = reset();
    krul_restore_costs costs = good;
    CHECK(is_refused(&costs, (krul_restore_shape)6, "shape is 6"));
    costs.n_layers = 0;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "n_layers is 0"));
    costs.n_layers = KRUL_STORE_MAX_LAYERS + 1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "n_layers is 65537"));
    costs = good;
    costs.n_tokens = -1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "n_tokens is -1"));
    costs.n_tokens = (int64_t)KRUL_STORE_MAX_TOKENS + 1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "n_tokens is 1073741825"));
    costs = good;
    costs.n_prompt_tokens = -1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "n_prompt_tokens is -1"));
    costs = good;
    costs.granularity = 0;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "granularity is 0"));
    costs = good;
    costs.block_tokens = -1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "block_tokens is -1"));
    costs = good;
    costs.first_block_tokens = -1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "first_block_tokens is -1"));
    costs = good;
    costs.n_recomputable = N_TOKENS + 1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "n_recomputable is 13"));
}

static void
test_refused_costs(void)
{
    const double bad[] = {-1, (double)NAN, (double)INFINITY, 1e13};
    double *const arrays[] = {linear, quadratic, overhead, reading, decoding};
    const char *const words[] = {"linear_s_per_token of layer 2", "quadratic_s_per_token2 of layer",
                                 "overhead_s of layer 2", "read_s of layer 2",
                                 "decode_s of layer 2"};
    for (size_t b = 0; b < KRUL_LENGTH(bad); b++) {
        for (size_t a = 0; a < KRUL_LENGTH(arrays); a++) {
            krul_restore_costs costs = reset();
            arrays[a][2] = bad[b];
            CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, words[a]));
        }
        krul_restore_costs costs = reset();
        costs.latency_s = bad[b];
        CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_AUTO, "latency_s is"));
    }
}

static void
test_refused_tokens(void)
{
    krul_restore_costs costs = reset();
    krul_restore_plan_step steps[3 * N_LAYERS];
    int64_t n_steps = 77;
    double predicted_s = 77;
    krul_error err;
    costs.n_required = required;
    required[1] = 1;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_LOAD, "n_required of layer 1 is 1"));
    required[0] = 3;
    costs.n_recomputable = 2;
    CHECK(is_refused(&costs, KRUL_RESTORE_SHAPE_LOAD, "n_required of layer 0 is 3"));
    costs.n_recomputable = N_TOKENS;
    memset(n_recomputed, 0, sizeof n_recomputed);
    CHECK(krul_restore_plan_predict(&costs, n_recomputed, &predicted_s, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "layer 0 is 0 but n_required is 3") != NULL);
    n_recomputed[0] = N_TOKENS + 1;
    CHECK(krul_restore_plan_steps(&costs, n_recomputed, steps, &n_steps, NULL) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(n_steps == 77 && predicted_s == 77);
}

int
main(void)
{
    test_half_and_half();
    test_shapes();
    test_steps();
    test_pairs();
    test_limits();
    test_refused_counts();
    test_refused_costs();
    test_refused_tokens();
    return check_finish();
}

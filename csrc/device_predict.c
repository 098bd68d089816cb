/* device_predict.c - codec predict on a device: profiles laid out, payloads parsed, units written.
 *
 * Everything that can be wrong with a payload but its states and words is found here, on the threads
 * that read it, so that kernels have no loop whose end a payload decides. Where rows are kept is
 * decided once for a profile: layers are taken in order, so that it is known which slot is free when
 * a layer begins, whatever the runs. */
#include <stdlib.h>
#include <string.h>

#include "codec_predict.h"
#include "device_predict.h"
#include "entropy.h"
#include "internal.h"

enum {
    N_ARRAYS = 4, /* of a layer: mean, backward, maps or left, right */
    N_TABLE_ARRAYS = 2, /* slots and frequencies */
    MAX_VECTOR_BYTES = 16,
    UNIT_ALIGNMENT = 16,
    FLOATS_AT_ONCE = 4, /* rows of floats are read four by four */
};

/* Cosines and sines that several layers share. */
typedef struct rotation {
    const float *cos;
    const float *sin;
    int32_t n_pairs;
    bool is_per_batch;
    size_t n_floats; /* of each */
    uint64_t cos_at;
    uint64_t sin_at;
} rotation;

/* Where a run stands, and how far it is. */
typedef struct chain_run {
    int64_t token_start;
    int64_t n_tokens;
    int64_t n_rows; /* without those that fill up */
    int64_t first_row;
    int32_t next_layer; /* the first that may be prepared */
    int32_t next_layer_if_done; /* of the call under way */
} chain_run;

struct krul_device_chains {
    const krul_device_profile *profile;
    int64_t n_batch;
    int64_t token_start;
    int64_t n_tokens;
    int64_t n_rows;
    size_t slot_bytes;
    size_t rotations_bytes;
    bool is_rounded;
    int32_t n_rotations;
    int32_t n_runs;
    rotation *rotations;
    int32_t *rotation_of; /* of each layer, -1: none */
    krul_rotary *rotaries; /* of each layer, without its arrays */
    chain_run *runs;
    uint8_t *is_decoded; /* n_runs x n_layers; 2: by the call under way */
};

/* Round up to a multiple that is a power of two; false where it does not fit. */
static bool
align_overflows(size_t n_bytes, size_t alignment, size_t *out)
{
    bool has_overflow = krul_add_overflows(n_bytes, alignment - 1, out);
    *out &= ~(alignment - 1);
    return has_overflow;
}

/* Take count x times elements from a running total, aligned. */
static bool
reserve_overflows(size_t *n_bytes, size_t count, size_t times, size_t element_bytes,
                  uint64_t *at_out)
{
    size_t n_elements, n_more;
    *at_out = *n_bytes;
    return krul_multiply_overflows(count, times, &n_elements) ||
           krul_multiply_overflows(n_elements, element_bytes, &n_more) ||
           align_overflows(n_more, KRUL_DEVICE_MEMORY_ALIGNMENT, &n_more) ||
           krul_add_overflows(*n_bytes, n_more, n_bytes);
}

/* ---- profile ----------------------------------------------------------------------------------- */

/* A slot for each layer, free again after the last layer that is predicted from it. Layers without a
 * place of their own (n_heads 0) have none. Returns how many slots there are. */
static int32_t
choose_slots(krul_device_profile *profile, int32_t *last_user)
{
    krul_device_profile_layer *layers = profile->layers;
    int32_t n_slots = 0;
    for (int32_t i = 0; i < profile->n_layers; i++) {
        last_user[i] = i;
        for (int32_t k = 0; k < layers[i].n_sources; k++) {
            last_user[layers[i].sources[k]] = i;
            layers[layers[i].sources[k]].is_source = true;
        }
    }
    for (int32_t i = 0; i < profile->n_layers; i++) {
        if (layers[i].n_heads == 0) {
            continue;
        }
        int32_t slot = 0;
        for (int32_t earlier = 0; earlier < i; earlier++) {
            if (layers[earlier].n_heads > 0 && layers[earlier].slot == slot &&
                last_user[earlier] >= i) {
                slot++;
                earlier = -1; /* from the first again */
            }
        }
        layers[i].slot = slot;
        n_slots = slot >= n_slots ? slot + 1 : n_slots;
    }
    return n_slots;
}

/* Places of one layer's arrays; false where they do not fit. */
static bool
place_layer(krul_device_profile_layer *layer, size_t *n_bytes)
{
    size_t width = (size_t)layer->width, rank = (size_t)layer->rank;
    size_t n_columns = layer->n_sources == 0 ? 0 : rank > 0 ? rank : width;
    return !reserve_overflows(n_bytes, width, 1, sizeof(float), &layer->mean_at) &&
           !reserve_overflows(n_bytes, width, width, sizeof(float), &layer->backward_at) &&
           !reserve_overflows(n_bytes, (size_t)layer->n_sources * width, n_columns, sizeof(float),
                              &layer->maps_at) &&
           !reserve_overflows(n_bytes, layer->n_sources == 0 ? 0 : rank, width, sizeof(float),
                              &layer->right_at);
}

krul_status
krul_device_profile_new(const krul_predict_options *options, krul_device_profile **out,
                        krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_device_profile *made = NULL;
    int32_t *last_user = NULL;
    size_t n_levels = 0, n_bytes = 0;
    KRUL_TRY(krul_predict_check_options(options, err));
    size_t n_layers = (size_t)options->n_layers;
    for (size_t i = 0; i < n_layers; i++) {
        const krul_predict_layer *layer = &options->layers[i];
        n_levels += layer->n_heads > 0 ? 2 * (size_t)layer->n_heads * (size_t)layer->head_dim : 0;
    }
    made = calloc(1, sizeof *made);
    last_user = malloc(n_layers * sizeof *last_user);
    if (made != NULL) {
        made->layers = calloc(n_layers, sizeof *made->layers);
        made->levels = malloc((n_levels + 1) * sizeof *made->levels);
    }
    if (made == NULL || last_user == NULL || made->layers == NULL || made->levels == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu layers", n_layers);
        goto done;
    }
    KRUL_TRY(krul_entropy_tables_new(options->tables, options->n_tables, &made->tables, err));
    made->n_layers = options->n_layers;
    made->n_tables = options->n_tables;
    made->unit_table = options->unit_table;
    bool fits = !reserve_overflows(&n_bytes, (size_t)made->n_tables, KRUL_ENTROPY_N_SLOTS,
                                   sizeof(uint32_t), &made->slots_at) &&
                !reserve_overflows(&n_bytes, (size_t)made->n_tables, sizeof(krul_entropy_table), 1,
                                   &made->frequencies_at);
    int16_t *next_level = made->levels;
    for (size_t i = 0; i < n_layers && fits; i++) {
        const krul_predict_layer *from = &options->layers[i];
        krul_device_profile_layer *layer = &made->layers[i];
        if (from->n_heads == 0) {
            continue;
        }
        layer->n_heads = from->n_heads;
        layer->head_dim = from->head_dim;
        layer->width = 2 * from->n_heads * from->head_dim;
        layer->n_sources = from->n_sources;
        memcpy(layer->sources, from->sources, sizeof layer->sources);
        layer->rank = from->rank;
        layer->levels = next_level;
        for (int32_t k = 0; k < layer->width; k++) {
            *next_level++ = (int16_t)krul_predict_level_of(from->deviation[k]);
        }
        made->max_rank = layer->rank > made->max_rank ? layer->rank : made->max_rank;
        made->row_floats = layer->width > made->row_floats ? layer->width : made->row_floats;
        fits = place_layer(layer, &n_bytes);
    }
    if (!fits) {
        status = krul_fail(err, KRUL_STATUS_BAD_SHAPE, "a profile of %zu layers is too large",
                           n_layers);
        goto done;
    }
    made->row_floats = (made->row_floats + FLOATS_AT_ONCE - 1) / FLOATS_AT_ONCE * FLOATS_AT_ONCE;
    made->n_bytes = n_bytes;
    made->n_slots = choose_slots(made, last_user);
    *out = made;
    made = NULL;
done:
    krul_device_profile_free(made);
    free(last_user);
    return status;
}

void
krul_device_profile_free(krul_device_profile *profile)
{
    if (profile != NULL) {
        krul_entropy_tables_free(profile->tables);
        free(profile->layers);
        free(profile->levels);
        free(profile);
    }
}

bool
krul_device_profile_copy(const krul_device_profile *profile, const krul_predict_options *options,
                         int32_t index, krul_device_copy *out)
{
    size_t n_tables = (size_t)profile->n_tables;
    *out = (krul_device_copy){0};
    if (index == 0) {
        out->from = krul_entropy_tables_slots(profile->tables);
        out->to = profile->slots_at;
        out->n_bytes = n_tables * KRUL_ENTROPY_N_SLOTS * sizeof(uint32_t);
        return true;
    }
    if (index == 1) {
        out->from = options->tables;
        out->to = profile->frequencies_at;
        out->n_bytes = n_tables * sizeof *options->tables;
        return true;
    }
    int32_t at = (index - N_TABLE_ARRAYS) / N_ARRAYS;
    if (index < 0 || at >= profile->n_layers) {
        return false;
    }
    const krul_device_profile_layer *layer = &profile->layers[at];
    const krul_predict_layer *from = &options->layers[at];
    size_t width = (size_t)layer->width, rank = (size_t)layer->rank;
    size_t n_columns = rank > 0 ? rank : width, n_sources = (size_t)layer->n_sources;
    if (layer->n_heads == 0) {
        return true;
    }
    switch ((index - N_TABLE_ARRAYS) % N_ARRAYS) {
        case 0:
            *out = (krul_device_copy){from->mean, layer->mean_at, width * sizeof(float)};
            break;
        case 1:
            *out = (krul_device_copy){from->backward, layer->backward_at,
                                      width * width * sizeof(float)};
            break;
        case 2:
            *out = (krul_device_copy){rank > 0 ? from->left : from->maps, layer->maps_at,
                                      n_sources * width * n_columns * sizeof(float)};
            break;
        default:
            *out = (krul_device_copy){from->right, layer->right_at,
                                      (n_sources > 0 ? rank : 0) * width * sizeof(float)};
            break;
    }
    return true;
}

/* ---- chains ------------------------------------------------------------------------------------ */

/* Are these the options that the profile was made of, as far as shapes tell? */
static krul_status
check_profile(const krul_device_profile *profile, const krul_predict_options *options,
              krul_error *err)
{
    if (options->n_layers != profile->n_layers) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "options have %d layers, the profile %d",
                         (int)options->n_layers, (int)profile->n_layers);
    }
    for (int32_t i = 0; i < profile->n_layers; i++) {
        const krul_predict_layer *layer = &options->layers[i];
        const krul_device_profile_layer *own = &profile->layers[i];
        if (layer->n_heads != own->n_heads ||
            (own->n_heads > 0 && layer->head_dim != own->head_dim)) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "layer %d of the options has %d heads of %d, of the profile %d of %d",
                             (int)i, (int)layer->n_heads, (int)layer->head_dim, (int)own->n_heads,
                             (int)own->head_dim);
        }
    }
    return KRUL_STATUS_OK;
}

/* Place the runs' rows below one another. */
static krul_status
place_runs(krul_device_chains *chains, const krul_device_run *runs, int32_t n_runs, krul_error *err)
{
    int64_t end = chains->token_start, n_rows = 0;
    for (int32_t i = 0; i < n_runs; i++) {
        int64_t own_rows, run_end;
        if (runs[i].n_tokens < 1 || runs[i].token_start < end ||
            krul_add_overflows_i64(runs[i].token_start, runs[i].n_tokens, &run_end) ||
            run_end > chains->token_start + chains->n_tokens) {
            return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                             "run %d is %lld tokens from %lld but must lie in [%lld, %lld)", (int)i,
                             (long long)runs[i].n_tokens, (long long)runs[i].token_start,
                             (long long)end, (long long)(chains->token_start + chains->n_tokens));
        }
        end = run_end;
        /* Both are bounded: 2^30 tokens of 2^16 batch rows. */
        own_rows = chains->n_batch * runs[i].n_tokens;
        chains->runs[i] = (chain_run){
            .token_start = runs[i].token_start,
            .n_tokens = runs[i].n_tokens,
            .n_rows = own_rows,
            .first_row = n_rows,
        };
        n_rows += (own_rows + KRUL_DEVICE_ROWS_AT_ONCE - 1) / KRUL_DEVICE_ROWS_AT_ONCE *
                  KRUL_DEVICE_ROWS_AT_ONCE;
    }
    chains->n_rows = n_rows;
    return KRUL_STATUS_OK;
}

/* Which cosines a layer uses: those of an earlier layer, or new ones. */
static bool
place_rotation(krul_device_chains *chains, int32_t index, const krul_rotary *rotary,
               size_t *n_bytes)
{
    chains->rotaries[index] = *rotary;
    chains->rotaries[index].cos = chains->rotaries[index].sin = NULL;
    chains->rotation_of[index] = -1;
    if (rotary->convention == KRUL_ROTARY_NONE || rotary->n_pairs == 0) {
        return true;
    }
    for (int32_t i = 0; i < chains->n_rotations; i++) {
        const rotation *known = &chains->rotations[i];
        if (known->cos == rotary->cos && known->sin == rotary->sin &&
            known->n_pairs == rotary->n_pairs && known->is_per_batch == rotary->is_per_batch) {
            chains->rotation_of[index] = i;
            return true;
        }
    }
    rotation *made = &chains->rotations[chains->n_rotations];
    size_t n_tokens = (size_t)(rotary->is_per_batch ? chains->n_batch : 1) *
                      (size_t)chains->n_tokens;
    *made = (rotation){.cos = rotary->cos,
                       .sin = rotary->sin,
                       .n_pairs = rotary->n_pairs,
                       .is_per_batch = rotary->is_per_batch};
    chains->rotation_of[index] = chains->n_rotations++;
    return !krul_multiply_overflows(n_tokens, (size_t)rotary->n_pairs, &made->n_floats) &&
           !reserve_overflows(n_bytes, made->n_floats, 1, sizeof(float), &made->cos_at) &&
           !reserve_overflows(n_bytes, made->n_floats, 1, sizeof(float), &made->sin_at);
}

krul_status
krul_device_chains_new(const krul_device_profile *profile, const krul_predict_options *options,
                       const krul_device_run *runs, int32_t n_runs, krul_device_chains **out,
                       krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_device_chains *made = NULL;
    size_t n_bytes = 0, n_marks, all_slots;
    KRUL_TRY(krul_predict_check_options(options, err));
    KRUL_TRY(check_profile(profile, options, err));
    if (n_runs < 1 || n_runs > KRUL_STORE_MAX_ENTRIES) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "there are %d runs but must be 1 to %d",
                         (int)n_runs, (int)KRUL_STORE_MAX_ENTRIES);
    }
    size_t n_layers = (size_t)options->n_layers;
    if (krul_multiply_overflows(n_layers, (size_t)n_runs, &n_marks) ||
        (made = calloc(1, sizeof *made)) == NULL) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d runs", (int)n_runs);
    }
    made->rotations = calloc(n_layers, sizeof *made->rotations);
    made->rotation_of = calloc(n_layers, sizeof *made->rotation_of);
    made->rotaries = calloc(n_layers, sizeof *made->rotaries);
    made->runs = calloc((size_t)n_runs, sizeof *made->runs);
    made->is_decoded = calloc(n_marks, 1);
    if (made->rotations == NULL || made->rotation_of == NULL || made->rotaries == NULL ||
        made->runs == NULL || made->is_decoded == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d runs of %zu layers",
                           (int)n_runs, n_layers);
        goto done;
    }
    made->profile = profile;
    made->is_rounded = options->products != KRUL_PRODUCTS_F32;
    made->n_batch = options->n_batch;
    made->token_start = options->token_start;
    made->n_tokens = options->n_tokens;
    made->n_runs = n_runs;
    KRUL_TRY(place_runs(made, runs, n_runs, err));
    bool fits = true;
    for (int32_t i = 0; i < options->n_layers; i++) {
        made->rotation_of[i] = -1;
        if (options->layers[i].n_heads > 0) {
            fits = fits && place_rotation(made, i, &options->layers[i].rotary, &n_bytes);
        }
    }
    made->rotations_bytes = n_bytes;
    if (!fits ||
        krul_multiply_overflows((size_t)made->n_rows, (size_t)profile->row_floats * sizeof(float),
                                &made->slot_bytes) ||
        align_overflows(made->slot_bytes, KRUL_DEVICE_MEMORY_ALIGNMENT, &made->slot_bytes) ||
        krul_multiply_overflows(made->slot_bytes, (size_t)profile->n_slots, &all_slots) ||
        krul_add_overflows(all_slots, made->rotations_bytes, &all_slots)) {
        status = krul_fail(err, KRUL_STATUS_BAD_SHAPE, "%lld rows of %d floats are too many",
                           (long long)made->n_rows, (int)profile->row_floats);
        goto done;
    }
    *out = made;
    made = NULL;
done:
    krul_device_chains_free(made);
    return status;
}

void
krul_device_chains_free(krul_device_chains *chains)
{
    if (chains != NULL) {
        free(chains->rotations);
        free(chains->rotation_of);
        free(chains->rotaries);
        free(chains->runs);
        free(chains->is_decoded);
        free(chains);
    }
}

size_t
krul_device_chains_bytes(const krul_device_chains *chains)
{
    return chains->rotations_bytes + chains->slot_bytes * (size_t)chains->profile->n_slots;
}

bool
krul_device_chains_copy(const krul_device_chains *chains, int32_t index, krul_device_copy *out)
{
    *out = (krul_device_copy){0};
    if (index < 0 || index / 2 >= chains->n_rotations) {
        return false;
    }
    const rotation *from = &chains->rotations[index / 2];
    bool is_sin = index % 2 != 0;
    *out = (krul_device_copy){is_sin ? from->sin : from->cos, is_sin ? from->sin_at : from->cos_at,
                              from->n_floats * sizeof(float)};
    return true;
}

const krul_device_profile *
krul_device_chains_profile(const krul_device_chains *chains)
{
    return chains->profile;
}

bool
krul_device_chains_are_rounded(const krul_device_chains *chains)
{
    return chains->is_rounded;
}

uint64_t
krul_device_chains_slot(const krul_device_chains *chains, int32_t slot)
{
    return chains->rotations_bytes + (uint64_t)slot * chains->slot_bytes;
}

size_t
krul_device_predict_scratch(const krul_device_chains *chains,
                            const krul_device_predict_batch *batch)
{
    /* No more than the slots have, or twice that: it fits. */
    const krul_device_profile_layer *layer = &chains->profile->layers[batch->layer];
    size_t rank = layer->n_sources > 0 ? (size_t)layer->rank : 0;
    return (size_t)batch->n_rows * ((size_t)batch->n_used + rank) * sizeof(float) +
           KRUL_DEVICE_MEMORY_ALIGNMENT;
}

/* ---- blocks ------------------------------------------------------------------------------------ */

static chain_run *
find_run(const krul_device_chains *chains, int64_t token_start)
{
    int32_t low = 0, high = chains->n_runs;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (chains->runs[middle].token_start < token_start) {
            low = middle + 1;
        }
        else {
            high = middle;
        }
    }
    return low < chains->n_runs && chains->runs[low].token_start == token_start ? &chains->runs[low]
                                                                                : NULL;
}

/* Is this a block of the profile and of one of the runs, and is it its turn? */
static krul_status
check_block(const krul_device_chains *chains, const krul_device_block *block, chain_run **run_out,
            krul_error *err)
{
    const krul_store_entry *entry = block->entry;
    const krul_device_profile *profile = chains->profile;
    int32_t index = entry->layer_lower;
    if (entry->codec != KRUL_CODEC_PREDICT || entry->kv != KRUL_KV_BOTH || block->is_decoded) {
        return krul_fail(
            err, KRUL_STATUS_BAD_VALUE, "a block is %s of codec %d but must be coded, of %d",
            block->is_decoded ? "decoded" : "coded", (int)entry->codec, (int)KRUL_CODEC_PREDICT);
    }
    if (index < 0 || index >= profile->n_layers || profile->layers[index].n_heads == 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "layer %d takes no part in this profile of %d layers", (int)index,
                         (int)profile->n_layers);
    }
    const krul_device_profile_layer *layer = &profile->layers[index];
    if (entry->n_batch != chains->n_batch || entry->n_heads != layer->n_heads ||
        entry->head_dim != layer->head_dim) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "layer %d: a block of (%d, %d, %d) but the profile needs (%lld, %d, %d)",
                         (int)index, (int)entry->n_batch, (int)entry->n_heads, (int)entry->head_dim,
                         (long long)chains->n_batch, (int)layer->n_heads, (int)layer->head_dim);
    }
    chain_run *run = find_run(chains, entry->token_start);
    if (run == NULL || run->n_tokens != entry->n_tokens) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE, "layer %d: no run is %lld tokens from %lld on",
                         (int)index, (long long)entry->n_tokens, (long long)entry->token_start);
    }
    if (run->n_rows * layer->width > KRUL_ENTROPY_MAX_COLUMN_VALUES) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%lld rows are too many for a block of width %d", (long long)run->n_rows,
                         (int)layer->width);
    }
    if (index < run->next_layer_if_done) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "layer %d was prepared before",
                         (int)run->next_layer_if_done - 1);
    }
    const uint8_t *is_decoded = chains->is_decoded + (run - chains->runs) * profile->n_layers;
    for (int32_t i = 0; i < layer->n_sources; i++) {
        if (is_decoded[layer->sources[i]] == 0) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE, "its source, layer %d, was not decoded",
                             (int)layer->sources[i]);
        }
    }
    *run_out = run;
    return KRUL_STATUS_OK;
}

static krul_status
check_view(const krul_device_block *block, int kv, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    static const char *const names[2] = {"keys", "values"};
    const krul_store_entry *entry = block->entry;
    const krul_view *view = &block->views[kv];
    KRUL_TRY(krul_view_check_output(view, names[kv], err));
    if (view->device_type != KRUL_DEVICE_CUDA) {
        return krul_fail(err, KRUL_STATUS_UNSUPPORTED,
                         "%s are on device type %d, not on a GPU (%d)", names[kv],
                         (int)view->device_type, (int)KRUL_DEVICE_CUDA);
    }
    if (view->shape[0] != entry->n_batch || view->shape[1] != entry->n_heads ||
        view->shape[2] > entry->n_tokens || view->shape[3] != entry->head_dim) {
        return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                         "%s are (%lld, %lld, %lld, %lld) but the block is (%d, %d, %lld, %d)",
                         names[kv], (long long)view->shape[0], (long long)view->shape[1],
                         (long long)view->shape[2], (long long)view->shape[3], (int)entry->n_batch,
                         (int)entry->n_heads, (long long)entry->n_tokens, (int)entry->head_dim);
    }
done:
    return status;
}

/* Does a store of `vector` elements fit everywhere in this view? */
static bool
is_aligned(const krul_view *view, int32_t vector)
{
    uint64_t places = (uint64_t)(uintptr_t)view->data / krul_dtype_bytes(view->dtype) |
                      (uint64_t)view->shape[3];
    for (int axis = 0; axis < 3; axis++) {
        places |= view->shape[axis] > 1 ? (uint64_t)view->stride[axis] : 0;
    }
    return places % (uint64_t)vector == 0;
}

/* The most elements that can be stored at once: 16 bytes of them, 4 bytes, or one. All of a vector of
 * keys is turned, with its partners in one other vector or in itself, or none of it. */
static int32_t
choose_vector(const krul_view *view, const krul_rotary *rotary)
{
    int32_t element_bytes = (int32_t)krul_dtype_bytes(view->dtype);
    for (int32_t n_bytes = MAX_VECTOR_BYTES; n_bytes > element_bytes; n_bytes /= 4) {
        int32_t vector = n_bytes / element_bytes;
        bool is_half = rotary->convention == KRUL_ROTARY_HALF;
        int32_t unit = is_half ? rotary->n_pairs : 2 * rotary->n_pairs;
        bool is_whole = rotary->convention == KRUL_ROTARY_NONE ||
                        (rotary->start % vector == 0 && unit % vector == 0);
        if (is_whole && is_aligned(view, vector)) {
            return vector;
        }
    }
    return 1;
}

/* Parse one payload, and fill in what a kernel needs. Classes, fineness and shifts go to `bytes`. */
static krul_status
fill_unit(const krul_device_chains *chains, const uint8_t *chunk, size_t chunk_bytes,
          const krul_device_block *block, const chain_run *run, uint8_t *bytes,
          krul_device_predict_unit *unit, float *step_out, int32_t *n_used_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_store_entry *entry = block->entry;
    const krul_device_profile *profile = chains->profile;
    const krul_device_profile_layer *layer = &profile->layers[entry->layer_lower];
    size_t width = (size_t)layer->width, n_rows = (size_t)run->n_rows, side_bytes;
    krul_entropy_columns_parts parts;
    if (block->payload_offset > chunk_bytes ||
        entry->payload_bytes > chunk_bytes - block->payload_offset) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "a payload of %llu bytes at %llu is not within a chunk of %zu",
                         (unsigned long long)entry->payload_bytes,
                         (unsigned long long)block->payload_offset, chunk_bytes);
    }
    const uint8_t *payload = chunk + block->payload_offset;
    uint8_t *classes = bytes;
    int8_t *fineness = (int8_t *)bytes + width, *shifts = fineness + n_rows;
    KRUL_TRY(krul_predict_read_side(layer->levels, layer->width, run->n_rows, profile->unit_table,
                                    profile->n_tables, payload, (size_t)entry->payload_bytes,
                                    classes, fineness, shifts, step_out, &side_bytes, err));
    KRUL_TRY(krul_entropy_columns_open(payload + side_bytes,
                                       (size_t)entry->payload_bytes - side_bytes, width * n_rows,
                                       &parts, err));
    for (int lane = 0; lane < KRUL_ENTROPY_N_LANES; lane++) {
        uint32_t state = krul_load_u32(parts.states + 4 * lane);
        if (state < KRUL_ENTROPY_STATE_FLOOR) {
            return krul_fail(err, KRUL_STATUS_CORRUPT, "state %d is %u but must be at least %d",
                             lane, (unsigned)state, (int)KRUL_ENTROPY_STATE_FLOOR);
        }
    }
    if (!krul_entropy_check_escapes(parts.escapes, parts.escapes_bytes, parts.n_escapes)) {
        return krul_fail(err, KRUL_STATUS_CORRUPT, "one of %u escapes in %zu bytes is malformed",
                         (unsigned)parts.n_escapes, parts.escapes_bytes);
    }
    uint8_t any_shift = 0, any_fineness = 0;
    for (size_t i = 0; i < n_rows; i++) {
        any_shift |= (uint8_t)shifts[i];
        any_fineness |= (uint8_t)fineness[i];
    }
    int32_t n_used = layer->width;
    while (n_used > 0 && classes[n_used - 1] == KRUL_ENTROPY_NO_SYMBOLS) {
        n_used--;
    }
    *n_used_out = n_used;
    *unit = (krul_device_predict_unit){
        .states_at = (uint64_t)(parts.states - chunk),
        .escapes_at = (uint64_t)(parts.escapes - chunk),
        .classes_at = (uint64_t)(classes - chunk),
        .fineness_at = (uint64_t)((uint8_t *)fineness - chunk),
        .shifts_at = (uint64_t)((uint8_t *)shifts - chunk),
        .words_bytes = (uint32_t)parts.words_bytes,
        .n_escapes = parts.n_escapes,
        .has_shifts = any_shift != 0,
        .has_fineness = any_fineness != 0,
        .n_rows = (int32_t)run->n_rows,
        .n_tokens = (int32_t)run->n_tokens,
        .token = run->token_start - chains->token_start,
    };
    for (int kv = 0; kv < 2; kv++) {
        const krul_view *view = &block->views[kv];
        if (view->data != NULL && view->shape[2] > 0) {
            KRUL_TRY(check_view(block, kv, err));
            unit->data[kv] = view->data;
            unit->n_stored[kv] = view->shape[2];
            memcpy(unit->stride[kv], view->stride, sizeof unit->stride[kv]);
        }
    }
done:
    return status;
}

/* Take a block into the batch under way, if it fits there. */
static bool
extend_batch(krul_device_predict_batch *batch, const krul_device_chains *chains,
             const krul_device_block *block, const chain_run *run, int32_t n_used)
{
    const krul_rotary *rotary = &chains->rotaries[block->entry->layer_lower];
    const krul_rotary not_rotated = {.convention = KRUL_ROTARY_NONE};
    if (batch->layer != block->entry->layer_lower ||
        batch->first_row + batch->n_rows != run->first_row || batch->n_blocks == UINT16_MAX) {
        return false;
    }
    for (int kv = 0; kv < 2; kv++) {
        const krul_view *view = &block->views[kv];
        if (view->data != NULL && view->shape[2] > 0 && batch->dtype[kv] != 0 &&
            batch->dtype[kv] != view->dtype) {
            return false;
        }
    }
    for (int kv = 0; kv < 2; kv++) {
        const krul_view *view = &block->views[kv];
        if (view->data == NULL || view->shape[2] == 0) {
            continue;
        }
        int32_t vector = choose_vector(view, kv == 0 ? rotary : &not_rotated);
        batch->vector[kv] = batch->dtype[kv] == 0 || vector < batch->vector[kv] ? vector
                                                                                : batch->vector[kv];
        batch->dtype[kv] = view->dtype;
    }
    batch->n_used = n_used > batch->n_used ? n_used : batch->n_used;
    batch->n_rows += (run->n_rows + KRUL_DEVICE_ROWS_AT_ONCE - 1) / KRUL_DEVICE_ROWS_AT_ONCE *
                     KRUL_DEVICE_ROWS_AT_ONCE;
    batch->max_rows = krul_max_i64(batch->max_rows, run->n_rows);
    batch->n_blocks++;
    return true;
}

static void
begin_batch(krul_device_predict_batch *batch, const krul_device_chains *chains, int32_t layer,
            const chain_run *run, uint64_t units_at)
{
    int32_t index = chains->rotation_of[layer];
    *batch = (krul_device_predict_batch){
        .layer = layer,
        .n_used = 1,
        .first_row = run->first_row,
        .units_at = units_at,
        .vector = {1, 1},
    };
    if (index >= 0) {
        const rotation *used = &chains->rotations[index];
        batch->convention = chains->rotaries[layer].convention;
        batch->rotary_start = chains->rotaries[layer].start;
        batch->n_pairs = used->n_pairs;
        batch->angles_per_batch = used->is_per_batch ? chains->n_tokens * used->n_pairs : 0;
        batch->cos_at = used->cos_at;
        batch->sin_at = used->sin_at;
    }
}

size_t
krul_device_predict_bound(const krul_device_block *blocks, int32_t n_blocks)
{
    size_t n_bytes = UNIT_ALIGNMENT;
    for (int32_t i = 0; i < n_blocks; i++) {
        const krul_store_entry *entry = blocks[i].entry;
        n_bytes += sizeof(krul_device_predict_unit) +
                   2 * (size_t)entry->n_heads * (size_t)entry->head_dim +
                   2 * (size_t)entry->n_batch * (size_t)entry->n_tokens;
    }
    return n_bytes;
}

/* What was marked by the call under way counts from now on, or never did. */
static void
end_call(krul_device_chains *chains, bool is_done)
{
    size_t n_layers = (size_t)chains->profile->n_layers;
    for (int32_t i = 0; i < chains->n_runs; i++) {
        chain_run *run = &chains->runs[i];
        uint8_t *is_decoded = chains->is_decoded + (size_t)i * n_layers;
        for (int32_t k = run->next_layer; k < run->next_layer_if_done; k++) {
            is_decoded[k] = is_decoded[k] == 2 ? is_done : is_decoded[k];
        }
        if (is_done) {
            run->next_layer = run->next_layer_if_done;
        }
        run->next_layer_if_done = run->next_layer;
    }
}

krul_status
krul_device_predict_prepare(krul_device_chains *chains, uint8_t *chunk, size_t chunk_bytes,
                            size_t used_bytes, const krul_device_block *blocks, int32_t n_blocks,
                            krul_device_predict_batch *batches_out, int32_t *n_batches_out,
                            size_t *used_bytes_out, int32_t *bad_block_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t units_at, bytes_at, end;
    int32_t n_batches = 0, at_work = -1;
    const krul_device_profile *profile = chains->profile;
    if (n_blocks < 0 || used_bytes > chunk_bytes ||
        align_overflows(used_bytes, UNIT_ALIGNMENT, &units_at) ||
        krul_multiply_overflows((size_t)n_blocks, sizeof(krul_device_predict_unit), &bytes_at) ||
        krul_add_overflows(units_at, bytes_at, &bytes_at) || bytes_at > chunk_bytes ||
        (uintptr_t)chunk % UNIT_ALIGNMENT != 0) {
        return krul_fail(
            err, KRUL_STATUS_BAD_VALUE,
            "a chunk of %zu bytes, %zu of them in use, cannot take what %d blocks need",
            chunk_bytes, used_bytes, (int)n_blocks);
    }
    krul_device_predict_unit *units = (krul_device_predict_unit *)(void *)(chunk + units_at);
    for (int32_t i = 0; i < n_blocks; i++) {
        chain_run *run = NULL;
        float step = 0;
        int32_t n_used = 0;
        const krul_store_entry *entry = blocks[i].entry;
        at_work = i;
        KRUL_TRY(check_block(chains, &blocks[i], &run, err));
        size_t width = (size_t)profile->layers[entry->layer_lower].width;
        if (krul_add_overflows(bytes_at, width + 2 * (size_t)run->n_rows, &end) ||
            end > chunk_bytes) {
            status = krul_fail(err, KRUL_STATUS_BAD_VALUE,
                               "a chunk of %zu bytes cannot take what block %d of %d needs",
                               chunk_bytes, (int)i, (int)n_blocks);
            goto done;
        }
        KRUL_TRY(fill_unit(chains, chunk, chunk_bytes, &blocks[i], run, chunk + bytes_at, &units[i],
                           &step, &n_used, err));
        bytes_at = end;
        units[i].factor = step; /* what it is for now */
        if (n_batches == 0 ||
            !extend_batch(&batches_out[n_batches - 1], chains, &blocks[i], run, n_used)) {
            begin_batch(&batches_out[n_batches], chains, entry->layer_lower, run,
                        units_at + (size_t)i * sizeof *units);
            (void)extend_batch(&batches_out[n_batches], chains, &blocks[i], run, n_used);
            n_batches++;
        }
        units[i].row = run->first_row - batches_out[n_batches - 1].first_row;
        run->next_layer_if_done = entry->layer_lower + 1;
        chains->is_decoded[(run - chains->runs) * profile->n_layers + entry->layer_lower] = 2;
    }
    for (int32_t i = 0, unit = 0; i < n_batches; i++) {
        bool is_one_step = true;
        for (int32_t k = 0; k < batches_out[i].n_blocks; k++) {
            is_one_step = is_one_step && units[unit + k].factor == units[unit].factor;
        }
        batches_out[i].step = is_one_step ? units[unit].factor : 1.0f;
        for (int32_t k = 0; k < batches_out[i].n_blocks; k++, unit++) {
            units[unit].factor = is_one_step ? 1.0f : units[unit].factor;
        }
    }
    *n_batches_out = n_batches;
    *used_bytes_out = bytes_at;
done:
    if (status != KRUL_STATUS_OK && bad_block_out != NULL) {
        *bad_block_out = at_work;
    }
    end_call(chains, status == KRUL_STATUS_OK);
    return status;
}

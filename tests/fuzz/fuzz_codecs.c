/* fuzz_codecs.c - any bytes as a payload, for every codec, tensor, dtype and shape: decoded or
 * refused, never a byte outside the output, and the same by every backend.
 *
 * The first eight bytes of an input choose what is decoded; tests/data/make.py writes seeds in the
 * same form. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../c/check_device.h"
#include "device_predict.h"
#include "krul.h"

enum {
    AT_CODEC = 0, /* 0: an entropy stream; a krul_codec; 7: a column stream; 8: a predict chain */
    AT_KV = 1,
    AT_DTYPE = 2,
    AT_N_BATCH = 3,
    AT_N_HEADS = 4,
    AT_N_TOKENS = 5,
    AT_HEAD_DIM = 6,
    AT_WANTED = 7, /* which of two views are decoded; bit 2: `exact` of a pair */
    CHOICE_BYTES = 8,
    MAX_N_TOKENS = 140,
    MAX_HEAD_DIM = 136,
};

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes);

static void
need(bool is_true)
{
    if (!is_true) {
        abort();
    }
}

/* A decoder may find damage, a length that no stream has, or nothing wrong: no other failure. */
static void
need_known(krul_status status, const krul_error *err)
{
    need(status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT ||
         status == KRUL_STATUS_BAD_FORMAT);
    need(status == KRUL_STATUS_OK || (err->status == status && err->message[0] != '\0'));
}

static void
fuzz_entropy(const uint8_t *bytes, size_t n_bytes)
{
    size_t n_symbols = (size_t)bytes[AT_N_TOKENS] << 8 | bytes[AT_HEAD_DIM];
    uint8_t *first = NULL;
    krul_status first_status = KRUL_STATUS_OK;
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        uint8_t *symbols = malloc(n_symbols + 1);
        need(symbols != NULL);
        symbols[n_symbols] = 0xa5;
        krul_error err = {0};
        krul_status status = krul_entropy_decode(backend, bytes + CHOICE_BYTES,
                                                 n_bytes - CHOICE_BYTES, symbols, n_symbols, &err);
        need_known(status, &err);
        need(symbols[n_symbols] == 0xa5);
        if (first == NULL) {
            first = symbols;
            first_status = status;
            continue;
        }
        need(status == first_status);
        need(status != KRUL_STATUS_OK || memcmp(symbols, first, n_symbols) == 0);
        free(symbols);
    }
    free(first);
}

/* Bit for bit, but that processors differ in which NaN a NaN and a number give: a CRC stands between
 * such a payload and a user, and what is asked here is that every backend sees the same damage. */
static bool
are_same(const uint8_t *left, const uint8_t *right, size_t n_bytes, krul_dtype dtype)
{
    const uint32_t infinity = dtype == KRUL_DTYPE_F32   ? 0x7f800000u
                              : dtype == KRUL_DTYPE_F16 ? 0x7c00u
                                                        : 0x7f80u;
    const uint32_t magnitude = dtype == KRUL_DTYPE_F32 ? 0x7fffffffu : 0x7fffu;
    size_t item_bytes = krul_dtype_bytes(dtype);
    for (size_t i = 0; i < n_bytes; i += item_bytes) {
        uint32_t left_bits = 0, right_bits = 0;
        memcpy(&left_bits, left + i, item_bytes);
        memcpy(&right_bits, right + i, item_bytes);
        bool are_nan = (left_bits & magnitude) > infinity && (right_bits & magnitude) > infinity;
        if (left_bits != right_bits && !are_nan) {
            return false;
        }
    }
    return true;
}

/* The same block made ready for a device: what the CPU decodes is not refused, and nothing that a
 * kernel would read lies outside. */
static void
fuzz_device(const uint8_t *bytes, size_t n_bytes, krul_codec codec, krul_kv kv,
            const krul_view views[KRUL_COMPRESSOR_MAX_VIEWS], int n_views, bool is_decoded)
{
    const int64_t *shape = views[0].shape;
    krul_store_entry entry = {
        .kind = KRUL_STORE_ENTRY_BLOCK,
        .codec = codec,
        .kv = kv,
        .dtype = views[0].dtype,
        .layer_upper = n_views == 2 ? 1 : -1,
        .n_batch = (int32_t)shape[0],
        .n_heads = (int32_t)shape[1],
        .head_dim = (int32_t)shape[3],
        .n_tokens = shape[2],
        .payload_bytes = n_bytes,
    };
    krul_device_block block = {.entry = &entry};
    for (int i = 0; i < n_views; i++) {
        block.views[i] = views[i];
    }
    size_t capacity = n_bytes + krul_device_decode_bound(&block, 1);
    uint8_t *chunk = malloc(capacity);
    need(chunk != NULL);
    memcpy(chunk, bytes, n_bytes);
    krul_device_batch batches[KRUL_DEVICE_MAX_BATCHES];
    int32_t n_batches = 0, bad_block = -1;
    size_t used_bytes = 0;
    krul_error err = {0};
    krul_status status = krul_device_decode_prepare(chunk, capacity, n_bytes, &block, 1, batches,
                                                    &n_batches, &used_bytes, &bad_block, &err);
    need_known(status, &err);
    need(status == KRUL_STATUS_OK || (bad_block == 0 && !is_decoded));
    if (status == KRUL_STATUS_OK) {
        checked_chunk checked = {chunk, n_bytes, used_bytes};
        need(check_device_batches(&checked, batches, n_batches));
    }
    need(memcmp(chunk, bytes, n_bytes) == 0);
    free(chunk);
}

static void
fuzz_codec(const uint8_t *bytes, size_t n_bytes, krul_codec codec)
{
    krul_dtype dtype = (krul_dtype)(bytes[AT_DTYPE] % 3 + 1);
    krul_kv kv = (krul_kv)(bytes[AT_KV] % 2);
    int64_t shape[KRUL_VIEW_DIMS] = {bytes[AT_N_BATCH] % 2 + 1, bytes[AT_N_HEADS] % 3 + 1,
                                     bytes[AT_N_TOKENS] % MAX_N_TOKENS + 1,
                                     bytes[AT_HEAD_DIM] % MAX_HEAD_DIM + 1};
    int n_views = krul_codec_n_layers(codec);
    if (codec == KRUL_CODEC_EXACT && (bytes[AT_WANTED] & 4) != 0) {
        n_views = 2;
    }
    size_t view_bytes = (size_t)(shape[0] * shape[1] * shape[2] * shape[3]) *
                        krul_dtype_bytes(dtype);
    uint8_t *first = NULL;
    krul_status first_status = KRUL_STATUS_OK;
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        /* One allocation per view would be freed and made anew; two halves of one are enough, since
         * a write past the first half changes the comparison below. */
        uint8_t *data = calloc((size_t)n_views, view_bytes);
        need(data != NULL);
        krul_view views[KRUL_COMPRESSOR_MAX_VIEWS];
        for (int j = 0; j < n_views; j++) {
            bool is_wanted = n_views == 1 || (bytes[AT_WANTED] >> j & 1) == 0;
            views[j] = (krul_view){
                .data = is_wanted ? data + (size_t)j * view_bytes : NULL,
                .dtype = dtype,
                .device_type = KRUL_DEVICE_CPU,
                .shape = {shape[0], shape[1], shape[2], shape[3]},
                .stride = {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1},
            };
        }
        krul_error err = {0};
        krul_status status = krul_compressor_decode(backend, codec, kv, bytes + CHOICE_BYTES,
                                                    n_bytes - CHOICE_BYTES, views, n_views, &err);
        need_known(status, &err);
        for (int j = 0; j < n_views; j++) {
            /* What was not wanted is not touched. */
            for (size_t k = 0; views[j].data == NULL && k < view_bytes; k++) {
                need(data[(size_t)j * view_bytes + k] == 0);
            }
        }
        if (first == NULL) {
            first = data;
            first_status = status;
            if (n_bytes > CHOICE_BYTES) { /* an entry has at least a byte of payload */
                fuzz_device(bytes + CHOICE_BYTES, n_bytes - CHOICE_BYTES, codec, kv, views, n_views,
                            status == KRUL_STATUS_OK);
            }
            continue;
        }
        need(status == first_status);
        need(status != KRUL_STATUS_OK ||
             are_same(data, first, view_bytes * (size_t)n_views, dtype));
        free(data);
    }
    free(first);
}

enum {
    N_COLUMN_TABLES = 4,
    MAX_N_COLUMNS = 8,
    COLUMNS_CHOICE = KRUL_CODEC_SHARE_INT4 + 1,
};

/* Four tables: flat, and ever steeper about the symbol of 0, the last without odd symbols below 255;
 * tests/data/make.py has the same. */
static void
fill_column_tables(krul_entropy_table made[N_COLUMN_TABLES])
{
    for (int table = 0; table < N_COLUMN_TABLES; table++) {
        int sum = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            bool is_left_out = table == 3 && symbol % 2 == 1 && symbol != 255;
            made[table].frequency[symbol] = (uint16_t)(is_left_out ? 0 : 16 >> table);
            sum += made[table].frequency[symbol];
        }
        made[table].frequency[127] = (uint16_t)(made[table].frequency[127] + 4096 - sum);
    }
}

/* Classes count up from AT_WANTED, every fourth column without symbols; where AT_KV is odd every
 * fifth token has a shift. */
static void
fuzz_columns(const uint8_t *bytes, size_t n_bytes)
{
    size_t n_tokens = bytes[AT_N_TOKENS], n_columns = bytes[AT_HEAD_DIM] % MAX_N_COLUMNS;
    size_t n_values = n_columns * n_tokens;
    uint8_t column_class[MAX_N_COLUMNS];
    for (size_t i = 0; i < MAX_N_COLUMNS; i++) {
        column_class[i] = i % 4 == 3 ? 255 : (uint8_t)((bytes[AT_WANTED] + i) % 8);
    }
    int8_t *token_shift = malloc(n_tokens + 1); /* no more than that, to be seen by a sanitizer */
    krul_entropy_table made[N_COLUMN_TABLES];
    krul_entropy_tables *tables = NULL;
    need(token_shift != NULL);
    fill_column_tables(made);
    need(krul_entropy_tables_new(made, N_COLUMN_TABLES, &tables, NULL) == KRUL_STATUS_OK);
    for (size_t i = 0; i < n_tokens; i++) {
        token_shift[i] = (int8_t)(i % 5 == 4 ? (int)(i % 7) - 3 : 0);
    }
    float *first = NULL;
    krul_status first_status = KRUL_STATUS_OK;
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        float *values = calloc(n_values + 1, sizeof *values);
        need(values != NULL);
        krul_error err = {0};
        krul_status status = krul_entropy_decode_columns(
            backend, tables, bytes + CHOICE_BYTES, n_bytes - CHOICE_BYTES, (int64_t)n_columns,
            (int64_t)n_tokens, column_class, bytes[AT_KV] % 2 == 1 ? token_shift : NULL, values,
            &err);
        need_known(status, &err);
        need(values[n_values] == 0);
        if (first == NULL) {
            first = values;
            first_status = status;
            continue;
        }
        need(status == first_status);
        need(status != KRUL_STATUS_OK || memcmp(values, first, n_values * sizeof *values) == 0);
        free(values);
    }
    free(first);
    free(token_shift);
    krul_entropy_tables_free(tables);
}

/* ---- predict ---- */

enum {
    PREDICT_CHOICE = COLUMNS_CHOICE + 1,
    N_PREDICT_LAYERS = 2,
    PREDICT_DIM = 4,
    PREDICT_WIDTH = 2 * PREDICT_DIM,
    MAX_PREDICT_TOKENS = 40,
    N_PREDICT_PAIRS = 2,
    PREDICT_UNIT_TABLE = 1,
};

/* A profile whose numbers are exact: the first layer has no source, the second half of the first;
 * keys are turned by quarters of a circle. tests/data/make.py has the same. */
typedef struct tiny_profile {
    float unit[PREDICT_WIDTH * PREDICT_WIDTH], half[PREDICT_WIDTH * PREDICT_WIDTH];
    float mean[PREDICT_WIDTH], deviation[PREDICT_WIDTH];
    float cos[MAX_PREDICT_TOKENS * N_PREDICT_PAIRS], sin[MAX_PREDICT_TOKENS * N_PREDICT_PAIRS];
    krul_predict_layer layers[N_PREDICT_LAYERS];
} tiny_profile;

static void
fill_profile(tiny_profile *made)
{
    static const float quarters[5] = {1, 0, -1, 0, 1};
    memset(made, 0, sizeof *made);
    for (int i = 0; i < PREDICT_WIDTH; i++) {
        made->unit[i * PREDICT_WIDTH + i] = 1;
        made->half[i * PREDICT_WIDTH + (i + 1) % PREDICT_WIDTH] = 0.5f;
        made->mean[i] = 0.25f * (float)i;
        made->deviation[i] = 4.0f / (float)(1 << i / 2);
    }
    for (int i = 0; i < MAX_PREDICT_TOKENS * N_PREDICT_PAIRS; i++) {
        made->cos[i] = quarters[i % 3];
        made->sin[i] = quarters[i % 3 + 1];
    }
    for (int i = 0; i < N_PREDICT_LAYERS; i++) {
        made->layers[i] = (krul_predict_layer){
            .n_heads = 1,
            .head_dim = PREDICT_DIM,
            .n_sources = i,
            .mean = made->mean,
            .deviation = made->deviation,
            .backward = made->unit,
            .maps = made->half,
            .rotary = {.convention = KRUL_ROTARY_HALF,
                       .n_pairs = N_PREDICT_PAIRS,
                       .cos = made->cos,
                       .sin = made->sin},
        };
    }
}

/* The products of a stub that is built beside this program. */
static const krul_blas *
find_blas(void)
{
    static krul_blas *blas; /* for good */
    if (blas == NULL) {
        char path[PATH_MAX + 32];
        ssize_t n_bytes = readlink("/proc/self/exe", path, PATH_MAX - 1);
        need(n_bytes > 0);
        path[n_bytes] = '\0';
        strcpy(strrchr(path, '/'), "/libstub_cblas.so");
        need(krul_blas_open(path, &blas, NULL) == KRUL_STATUS_OK);
    }
    return blas;
}

/* A device's host part may refuse only what the CPU refuses, and writes no byte too far. */
static void
prepare_predict(const krul_predict_options *options, const uint8_t *payloads,
                const size_t lengths[N_PREDICT_LAYERS], const krul_status on_cpu[N_PREDICT_LAYERS],
                int64_t n_tokens)
{
    krul_device_profile *profile = NULL;
    krul_device_chains *chains = NULL;
    const krul_device_run run = {.n_tokens = n_tokens};
    krul_store_entry entries[N_PREDICT_LAYERS];
    krul_device_block blocks[N_PREDICT_LAYERS];
    krul_device_predict_batch batches[N_PREDICT_LAYERS];
    size_t used_bytes = 0, end = 0;
    memset(blocks, 0, sizeof blocks);
    for (int layer = 0; layer < N_PREDICT_LAYERS; layer++) {
        entries[layer] = (krul_store_entry){
            .codec = KRUL_CODEC_PREDICT,
            .kv = KRUL_KV_BOTH,
            .layer_lower = layer,
            .n_batch = (int32_t)options->n_batch,
            .n_heads = 1,
            .head_dim = PREDICT_DIM,
            .n_tokens = n_tokens,
            .payload_bytes = lengths[layer],
        };
        blocks[layer].entry = &entries[layer];
        blocks[layer].payload_offset = used_bytes;
        used_bytes = (used_bytes + lengths[layer] + 15) / 16 * 16;
    }
    size_t n_bytes = used_bytes + krul_device_predict_bound(blocks, N_PREDICT_LAYERS);
    uint8_t *chunk = malloc(n_bytes);
    need(chunk != NULL);
    for (int layer = 0; layer < N_PREDICT_LAYERS; layer++) {
        memcpy(chunk + blocks[layer].payload_offset, payloads + (layer == 0 ? 0 : lengths[0]),
               lengths[layer]);
    }
    need(krul_device_profile_new(options, &profile, NULL) == KRUL_STATUS_OK);
    need(krul_device_chains_new(profile, options, &run, 1, &chains, NULL) == KRUL_STATUS_OK);
    krul_error err = {0};
    int32_t n_batches = -1, bad_block = -1;
    krul_status status = krul_device_predict_prepare(chains, chunk, n_bytes, used_bytes, blocks,
                                                     N_PREDICT_LAYERS, batches, &n_batches, &end,
                                                     &bad_block, &err);
    need_known(status, &err);
    if (status == KRUL_STATUS_OK) {
        need(n_batches == N_PREDICT_LAYERS && end <= n_bytes);
    }
    else { /* the CPU stops at the first layer, if it is damaged where only a decoder sees it */
        need(bad_block >= 0 && bad_block < N_PREDICT_LAYERS);
        need(on_cpu[0] != KRUL_STATUS_OK || (bad_block == 1 && on_cpu[1] != KRUL_STATUS_OK));
    }
    krul_device_chains_free(chains);
    krul_device_profile_free(profile);
    free(chunk);
}

/* Two layers of one chain: AT_N_HEADS and AT_HEAD_DIM say how many bytes are the first's. */
static void
fuzz_predict(const uint8_t *bytes, size_t n_bytes)
{
    krul_dtype dtype = (krul_dtype)(bytes[AT_DTYPE] % 3 + 1);
    int64_t n_batch = bytes[AT_N_BATCH] % 2 + 1;
    int64_t n_tokens = bytes[AT_N_TOKENS] % MAX_PREDICT_TOKENS + 1;
    size_t n_given = n_bytes - CHOICE_BYTES;
    size_t n_first = (size_t)bytes[AT_N_HEADS] << 8 | bytes[AT_HEAD_DIM];
    n_first = n_first < n_given ? n_first : n_given;
    const size_t lengths[N_PREDICT_LAYERS] = {n_first, n_given - n_first};
    size_t view_bytes = (size_t)(n_batch * n_tokens * PREDICT_DIM) * krul_dtype_bytes(dtype);
    size_t all_bytes = N_PREDICT_LAYERS * 2 * view_bytes;
    tiny_profile profile;
    krul_entropy_table tables[N_COLUMN_TABLES];
    fill_profile(&profile);
    fill_column_tables(tables);
    krul_predict_options options = {
        .blas = find_blas(),
        .tables = tables,
        .n_tables = N_COLUMN_TABLES,
        .unit_table = PREDICT_UNIT_TABLE,
        .n_layers = N_PREDICT_LAYERS,
        .layers = profile.layers,
        .n_batch = n_batch,
        .n_tokens = MAX_PREDICT_TOKENS,
    };
    uint8_t *first = NULL;
    krul_status first_status[N_PREDICT_LAYERS] = {KRUL_STATUS_OK, KRUL_STATUS_OK};
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        krul_predict *predict = NULL;
        uint8_t *data = calloc(1, all_bytes);
        krul_status status = KRUL_STATUS_OK;
        need(data != NULL && krul_predict_new(&options, &predict, NULL) == KRUL_STATUS_OK);
        for (int layer = 0; layer < N_PREDICT_LAYERS && status == KRUL_STATUS_OK; layer++) {
            krul_view views[2];
            for (int kv = 0; kv < 2; kv++) {
                bool is_wanted = (bytes[AT_WANTED] >> (2 * layer + kv) & 1) == 0;
                uint8_t *here = data + (size_t)(2 * layer + kv) * view_bytes;
                views[kv] = (krul_view){
                    .data = is_wanted ? here : NULL,
                    .dtype = dtype,
                    .device_type = KRUL_DEVICE_CPU,
                    .shape = {n_batch, 1, n_tokens, PREDICT_DIM},
                    .stride = {n_tokens * PREDICT_DIM, n_tokens * PREDICT_DIM, PREDICT_DIM, 1},
                };
            }
            /* In memory of its own, so that a sanitizer sees a byte too far. */
            uint8_t *payload = malloc(lengths[layer] + 1);
            need(payload != NULL);
            uint8_t *at = payload + 1; /* not aligned to anything */
            memcpy(at, bytes + CHOICE_BYTES + (layer == 0 ? 0 : n_first), lengths[layer]);
            krul_error err = {0};
            status = krul_predict_decode(backend, predict, layer, 0, n_tokens, at, lengths[layer],
                                         views, &err);
            need_known(status, &err);
            free(payload);
            for (int kv = 0; kv < 2; kv++) {
                bool is_untouched = views[kv].data == NULL || status != KRUL_STATUS_OK;
                for (size_t k = 0; is_untouched && k < view_bytes; k++) {
                    need(data[(size_t)(2 * layer + kv) * view_bytes + k] == 0);
                }
            }
            need(first == NULL || status == first_status[layer]);
            first_status[layer] = status;
        }
        krul_predict_free(predict);
        if (first == NULL) {
            first = data;
            continue;
        }
        need(are_same(data, first, all_bytes, dtype));
        free(data);
    }
    free(first);
    prepare_predict(&options, bytes + CHOICE_BYTES, lengths, first_status, n_tokens);
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes)
{
    if (n_bytes < CHOICE_BYTES) {
        return 0;
    }
    int choice = bytes[AT_CODEC] % (PREDICT_CHOICE + 1);
    if (choice == 0) {
        fuzz_entropy(bytes, n_bytes);
    }
    else if (choice == COLUMNS_CHOICE) {
        fuzz_columns(bytes, n_bytes);
    }
    else if (choice == PREDICT_CHOICE) {
        fuzz_predict(bytes, n_bytes);
    }
    else {
        fuzz_codec(bytes, n_bytes, (krul_codec)choice);
    }
    return 0;
}

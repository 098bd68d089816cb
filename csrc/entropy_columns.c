/* entropy_columns.c - interleaved rANS over columns of whole numbers, with tables from outside.
 *
 * The coefficients of a block of tokens: small numbers, a column per component, each column of a
 * class whose table the profile has. Lanes and words are those of an entropy stream, but that the
 * states run on from column to column, so that a short column costs nothing, and that numbers too
 * large for a byte stand in a list at the end. FORMAT.md has the stream. */
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "entropy.h"
#include "internal.h"

enum {
    N_SYMBOLS = 256,
    STARTS_BYTES = KRUL_ENTROPY_COLUMNS_HEADER_BYTES + KRUL_ENTROPY_STATES_BYTES,
    MAX_ESCAPE_BYTES = 5,
    SCAN_VALUES = 64,
};

struct krul_entropy_tables {
    int32_t n_tables;
    krul_entropy_table *tables;
    uint32_t *slots; /* n_tables x KRUL_ENTROPY_N_SLOTS */
    krul_entropy_encoder_symbol (*encoders)[N_SYMBOLS];
};

krul_status
krul_entropy_tables_new(const krul_entropy_table *tables, int32_t n_tables,
                        krul_entropy_tables **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_entropy_tables *made = NULL;
    if (n_tables < 1 || n_tables > KRUL_ENTROPY_MAX_TABLES) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "n_tables is %d but must be from 1 to %d",
                         (int)n_tables, (int)KRUL_ENTROPY_MAX_TABLES);
    }
    for (int32_t table = 0; table < n_tables; table++) {
        uint32_t sum = 0;
        for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
            sum += tables[table].frequency[symbol];
        }
        /* A slot holds frequencies of 12 bits: the escape may not be all there is. */
        uint16_t escape = tables[table].frequency[KRUL_ENTROPY_ESCAPE];
        if (escape == 0 || escape >= KRUL_ENTROPY_N_SLOTS) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                             "table %d gives escapes the frequency %d but must give 1 to %d",
                             (int)table, (int)escape, (int)KRUL_ENTROPY_N_SLOTS - 1);
        }
        if (sum != KRUL_ENTROPY_N_SLOTS) {
            return krul_fail(err, KRUL_STATUS_BAD_VALUE, "table %d sums to %u, not to %d",
                             (int)table, (unsigned)sum, (int)KRUL_ENTROPY_N_SLOTS);
        }
    }
    /* At most 64 tables of 16 KiB, 4 KiB and 512 bytes: no product of sizes here can overflow. */
    made = calloc(1, sizeof *made);
    if (made != NULL) {
        made->n_tables = n_tables;
        made->tables = malloc((size_t)n_tables * sizeof *made->tables);
        made->slots = malloc((size_t)n_tables * KRUL_ENTROPY_N_SLOTS * sizeof *made->slots);
        made->encoders = malloc((size_t)n_tables * sizeof *made->encoders);
    }
    if (made == NULL || made->tables == NULL || made->slots == NULL || made->encoders == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %d entropy tables",
                           (int)n_tables);
        goto done;
    }
    memcpy(made->tables, tables, (size_t)n_tables * sizeof *tables);
    uint32_t *slot = made->slots;
    for (int32_t table = 0; table < n_tables; table++) {
        krul_entropy_encoder_init(&tables[table], made->encoders[table]);
        for (uint32_t symbol = 0; symbol < N_SYMBOLS; symbol++) {
            uint32_t frequency = tables[table].frequency[symbol];
            for (uint32_t offset = 0; offset < frequency; offset++) {
                *slot++ = krul_entropy_slot(frequency, offset, symbol);
            }
        }
    }
    *out = made;
    made = NULL;
done:
    krul_entropy_tables_free(made);
    return status;
}

void
krul_entropy_tables_free(krul_entropy_tables *tables)
{
    if (tables != NULL) {
        free(tables->tables);
        free(tables->slots);
        free(tables->encoders);
        free(tables);
    }
}

const uint32_t *
krul_entropy_tables_slots(const krul_entropy_tables *tables)
{
    return tables->slots;
}

/* The number of values, or false where it is none that a stream may hold. */
static bool
count_values(int64_t n_columns, int64_t n_tokens, size_t *out)
{
    int64_t n_values;
    if (n_columns < 0 || n_tokens < 0 ||
        krul_multiply_overflows_i64(n_columns, n_tokens, &n_values) ||
        n_values > KRUL_ENTROPY_MAX_COLUMN_VALUES) {
        return false;
    }
    *out = (size_t)n_values;
    return true;
}

static krul_status
fail_count(int64_t n_columns, int64_t n_tokens, krul_error *err)
{
    return krul_fail(err, KRUL_STATUS_BAD_SHAPE,
                     "n_columns is %lld and n_tokens %lld but a stream holds 0 to %d values",
                     (long long)n_columns, (long long)n_tokens,
                     (int)KRUL_ENTROPY_MAX_COLUMN_VALUES);
}

size_t
krul_entropy_columns_bound(int64_t n_columns, int64_t n_tokens)
{
    size_t n_values;
    if (!count_values(n_columns, n_tokens, &n_values)) {
        return 0;
    }
    return STARTS_BYTES + n_values * (2 + MAX_ESCAPE_BYTES);
}

/* ---- encoder ---- */

static inline int32_t
table_of(const krul_entropy_tables *tables, uint8_t column_class, int32_t shift)
{
    int32_t table = column_class + shift;
    return table < 0 ? 0 : table < tables->n_tables ? table : tables->n_tables - 1;
}

static inline int32_t
shift_of(const int8_t *token_shift, size_t token)
{
    return token_shift != NULL ? token_shift[token] : 0;
}

/* The symbol of a value, if its table has that; else the escape. */
static inline uint32_t
symbol_of(const krul_entropy_table *table, int32_t value)
{
    uint32_t symbol = (uint32_t)value + KRUL_ENTROPY_ZERO;
    bool has_symbol = symbol < KRUL_ENTROPY_ESCAPE && table->frequency[symbol] != 0;
    return has_symbol ? symbol : KRUL_ENTROPY_ESCAPE;
}

/* Zigzag, then seven bits to a byte, the lowest first, the top bit set on all but the last. */
static uint8_t *
escape_write(int32_t value, uint8_t *out)
{
    uint32_t rest = (uint32_t)value << 1 ^ (value < 0 ? UINT32_MAX : 0);
    while (rest >= 0x80) {
        *out++ = (uint8_t)(rest | 0x80);
        rest >>= 7;
    }
    *out++ = (uint8_t)rest;
    return out;
}

/* Backwards, last value first, so that the words end at `end`; returns where they begin. */
static uint8_t *
encode_words(const krul_entropy_tables *tables, const int32_t *values, size_t n_columns,
             size_t n_tokens, const uint8_t *column_class, const int8_t *token_shift,
             uint32_t states[KRUL_ENTROPY_N_LANES], uint8_t *end)
{
    uint8_t *out = end;
    for (size_t column = n_columns; column-- > 0;) {
        if (column_class[column] == KRUL_ENTROPY_NO_SYMBOLS) {
            continue;
        }
        for (size_t token = n_tokens; token-- > 0;) {
            int32_t table = table_of(tables, column_class[column], shift_of(token_shift, token));
            uint32_t symbol = symbol_of(&tables->tables[table], values[column * n_tokens + token]);
            out = krul_entropy_put(&tables->encoders[table][symbol],
                                   &states[token % KRUL_ENTROPY_N_LANES], out);
        }
    }
    return out;
}

krul_status
krul_entropy_encode_columns(const krul_entropy_tables *tables, const int32_t *values,
                            int64_t n_columns, int64_t n_tokens, const uint8_t *column_class,
                            const int8_t *token_shift, uint8_t *out, size_t capacity_bytes,
                            size_t *n_bytes_out, krul_error *err)
{
    size_t n_values;
    if (!count_values(n_columns, n_tokens, &n_values)) {
        return fail_count(n_columns, n_tokens, err);
    }
    size_t bound = krul_entropy_columns_bound(n_columns, n_tokens);
    if (capacity_bytes < bound) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "capacity_bytes is %zu but %lld columns of %lld tokens may need %zu",
                         capacity_bytes, (long long)n_columns, (long long)n_tokens, bound);
    }
    for (size_t column = 0; column < (size_t)n_columns; column++) {
        const int32_t *here = values + column * (size_t)n_tokens;
        bool is_zero = column_class[column] == KRUL_ENTROPY_NO_SYMBOLS;
        for (size_t token = 0; is_zero && token < (size_t)n_tokens; token++) {
            if (here[token] != 0) {
                return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                                 "column %zu is of class %d, all zeros, but holds %d", column,
                                 (int)KRUL_ENTROPY_NO_SYMBOLS, (int)here[token]);
            }
        }
    }
    uint32_t states[KRUL_ENTROPY_N_LANES];
    for (int lane = 0; lane < KRUL_ENTROPY_N_LANES; lane++) {
        states[lane] = KRUL_ENTROPY_STATE_FLOOR;
    }
    /* A value takes a word at most; what is written below the first word is overwritten by states. */
    uint8_t *end = out + STARTS_BYTES + 2 * n_values;
    const uint8_t *begin = encode_words(tables, values, (size_t)n_columns, (size_t)n_tokens,
                                        column_class, token_shift, states, end);
    size_t words_bytes = (size_t)(end - begin);
    memmove(out + STARTS_BYTES, begin, words_bytes);
    for (int lane = 0; lane < KRUL_ENTROPY_N_LANES; lane++) {
        krul_store_u32(out + KRUL_ENTROPY_COLUMNS_HEADER_BYTES + 4 * lane, states[lane]);
    }
    uint8_t *escapes = out + STARTS_BYTES + words_bytes;
    uint32_t n_escapes = 0;
    for (size_t column = 0; column < (size_t)n_columns; column++) {
        for (size_t token = 0;
             token < (size_t)n_tokens && column_class[column] != KRUL_ENTROPY_NO_SYMBOLS; token++) {
            int32_t table = table_of(tables, column_class[column], shift_of(token_shift, token));
            int32_t value = values[column * (size_t)n_tokens + token];
            if (symbol_of(&tables->tables[table], value) == KRUL_ENTROPY_ESCAPE) {
                escapes = escape_write(value, escapes);
                n_escapes++;
            }
        }
    }
    krul_store_u32(out, n_escapes);
    krul_store_u32(out + 4, (uint32_t)words_bytes);
    *n_bytes_out = (size_t)(escapes - out);
    return KRUL_STATUS_OK;
}

/* ---- decoder ---- */

/* The next escape, or false for one that is cut off, longer than it need be, or beyond 32 bits. */
static bool
escape_read(const uint8_t **bytes, const uint8_t *end, int32_t *out)
{
    uint64_t zigzag = 0;
    const uint8_t *at = *bytes;
    for (int i = 0; i < MAX_ESCAPE_BYTES; i++) {
        if (at == end) {
            return false;
        }
        uint8_t byte = *at++;
        zigzag |= (uint64_t)(byte & 0x7f) << 7 * i;
        if ((byte & 0x80) == 0) {
            int64_t value = (int64_t)(zigzag >> 1) ^ -(int64_t)(zigzag & 1);
            *bytes = at;
            *out = (int32_t)value;
            return zigzag <= UINT32_MAX && (i == 0 || byte != 0);
        }
    }
    return false;
}

bool
krul_entropy_check_escapes(const uint8_t *bytes, size_t n_bytes, uint32_t n_escapes)
{
    const uint8_t *end = bytes + n_bytes;
    int32_t value;
    for (uint32_t i = 0; i < n_escapes; i++) {
        if (!escape_read(&bytes, end, &value)) {
            return false;
        }
    }
    return bytes == end;
}

krul_status
krul_entropy_columns_open(const uint8_t *stream, size_t n_bytes, size_t n_values,
                          krul_entropy_columns_parts *out, krul_error *err)
{
    if (n_bytes < STARTS_BYTES) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "column stream has %zu bytes, its header and states %d", n_bytes,
                         (int)STARTS_BYTES);
    }
    uint32_t n_escapes = krul_load_u32(stream);
    size_t words_bytes = krul_load_u32(stream + 4);
    size_t left_bytes = n_bytes - STARTS_BYTES;
    if (words_bytes > left_bytes || words_bytes % 2 != 0 || words_bytes / 2 > n_values) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "column stream of %zu values has %zu bytes of words in %zu", n_values,
                         words_bytes, left_bytes);
    }
    size_t escapes_bytes = left_bytes - words_bytes;
    if (n_escapes > n_values || n_escapes > escapes_bytes ||
        (n_escapes == 0 && escapes_bytes != 0)) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "column stream of %zu values has %u escapes in %zu bytes", n_values,
                         (unsigned)n_escapes, escapes_bytes);
    }
    *out = (krul_entropy_columns_parts){
        .states = stream + KRUL_ENTROPY_COLUMNS_HEADER_BYTES,
        .words_bytes = words_bytes,
        .escapes = stream + STARTS_BYTES + words_bytes,
        .escapes_bytes = escapes_bytes,
        .n_escapes = n_escapes,
    };
    return KRUL_STATUS_OK;
}

/* Put the escapes where the decoder left their marks; all must be used, and none may be a value that
 * its table has. */
static krul_status
patch_escapes(const krul_entropy_tables *tables, const krul_entropy_columns *columns,
              const uint8_t *bytes, size_t n_bytes, uint32_t n_escapes, krul_error *err)
{
    const float mark = KRUL_ENTROPY_ESCAPE - KRUL_ENTROPY_ZERO;
    const uint8_t *end = bytes + n_bytes;
    uint32_t n_found = 0;
    for (size_t column = 0; column < columns->n_columns; column++) {
        float *out = columns->out + column * columns->n_tokens;
        for (size_t token = 0; token < columns->n_tokens; token++) {
            /* Marks are few: most stretches are passed over by a loop that has no way out, so that
             * compilers make it one of vectors. */
            if (token % SCAN_VALUES == 0 && columns->n_tokens - token >= SCAN_VALUES) {
                uint32_t has_mark = 0;
                for (size_t i = 0; i < SCAN_VALUES; i++) {
                    has_mark |= out[token + i] == mark;
                }
                if (has_mark == 0) {
                    token += SCAN_VALUES - 1;
                    continue;
                }
            }
            if (out[token] != mark) {
                continue;
            }
            int32_t table = table_of(tables, columns->column_class[column],
                                     shift_of(columns->token_shift, token));
            int32_t value;
            if (n_found == n_escapes || !escape_read(&bytes, end, &value) ||
                symbol_of(&tables->tables[table], value) != KRUL_ENTROPY_ESCAPE) {
                return krul_fail(
                    err, KRUL_STATUS_CORRUPT,
                    "column stream has %u escapes, and number %u is missing or malformed",
                    (unsigned)n_escapes, (unsigned)n_found);
            }
            out[token] = (float)value;
            n_found++;
        }
    }
    if (n_found != n_escapes || bytes != end) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "column stream has %u escapes, of which %u are used, and %zu bytes more",
                         (unsigned)n_escapes, (unsigned)n_found, (size_t)(end - bytes));
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_entropy_decode_columns(const krul_backend *backend, const krul_entropy_tables *tables,
                            const uint8_t *stream, size_t n_bytes, int64_t n_columns,
                            int64_t n_tokens, const uint8_t *column_class,
                            const int8_t *token_shift, float *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    size_t n_values;
    if (!count_values(n_columns, n_tokens, &n_values)) {
        return fail_count(n_columns, n_tokens, err);
    }
    krul_entropy_columns_parts parts;
    KRUL_TRY(krul_entropy_columns_open(stream, n_bytes, n_values, &parts, err));
    const krul_entropy_columns columns = {
        .bytes = parts.states,
        .n_bytes = KRUL_ENTROPY_STATES_BYTES + parts.words_bytes,
        .slots = tables->slots,
        .n_tables = tables->n_tables,
        .column_class = column_class,
        .token_shift = token_shift,
        .n_columns = (size_t)n_columns,
        .n_tokens = (size_t)n_tokens,
        .out = out,
    };
    bool has_escape = false;
    if (!backend->entropy_decode_columns(&columns, &has_escape)) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "column stream of %lld columns of %lld tokens does not decode",
                         (long long)n_columns, (long long)n_tokens);
    }
    if (has_escape || parts.n_escapes != 0) {
        KRUL_TRY(patch_escapes(tables, &columns, parts.escapes, parts.escapes_bytes,
                               parts.n_escapes, err));
    }
done:
    return status;
}

/* test_entropy.c - round trips on every backend, and streams that are cut or changed. */
#include <stdlib.h>
#include <string.h>

#include "../../csrc/krul.h"
#include "check.h"

enum { MAX_SYMBOLS = 3 * 65536 };

static uint8_t *symbols, *decoded, *stream, *other_stream;

/* Test data: how the bytes are distributed. */
typedef enum distribution { ONE_VALUE, TWO_VALUES, SKEWED, UNIFORM, N_DISTRIBUTIONS } distribution;

static uint32_t
next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static void
fill(distribution kind, size_t n_symbols)
{
    uint32_t state = (uint32_t)n_symbols + 1;
    for (size_t i = 0; i < n_symbols; i++) {
        uint32_t random = next_random(&state);
        switch (kind) {
            case ONE_VALUE:
                symbols[i] = 255;
                break;
            case TWO_VALUES:
                symbols[i] = random % 1000 == 0 ? 0 : 127;
                break;
            case SKEWED: /* about as exponents are: each value half as likely as the one before */
                symbols[i] = (uint8_t)(120 - (random == 0 ? 0 : __builtin_ctz(random)));
                break;
            default:
                symbols[i] = (uint8_t)random;
                break;
        }
    }
}

/* Every backend must write the same bytes, and decode all of them. */
static void
test_round_trip(distribution kind, size_t n_symbols)
{
    krul_error err;
    fill(kind, n_symbols);
    size_t n_bytes = 0, bound = krul_entropy_bound(n_symbols);
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        size_t n_bytes_here = 0;
        CHECK(krul_entropy_encode(backend, symbols, n_symbols, other_stream, bound, &n_bytes_here,
                                  &err) == KRUL_STATUS_OK);
        CHECK(n_bytes_here <= bound && (n_bytes == 0 || n_bytes_here == n_bytes));
        CHECK(n_bytes == 0 || memcmp(stream, other_stream, n_bytes) == 0);
        n_bytes = n_bytes_here;
        memcpy(stream, other_stream, n_bytes);
        /* Exact allocations, so that a sanitizer sees a byte too far. */
        uint8_t *exact_stream = malloc(n_bytes), *exact_symbols = malloc(n_symbols + 1);
        memcpy(exact_stream, stream, n_bytes);
        exact_symbols[n_symbols] = 0xa5;
        CHECK(krul_entropy_decode(backend, exact_stream, n_bytes, exact_symbols, n_symbols, &err) ==
              KRUL_STATUS_OK);
        CHECK(memcmp(exact_symbols, symbols, n_symbols) == 0 && exact_symbols[n_symbols] == 0xa5);
        free(exact_stream);
        free(exact_symbols);
    }
    bool is_long = n_symbols >= 65536;
    CHECK(!is_long || kind != SKEWED || n_bytes < n_symbols / 3);
    CHECK(kind != ONE_VALUE || n_symbols == 0 || n_bytes == 13);
    CHECK(kind != UNIFORM || n_bytes == bound);
}

/* Every truncation is refused. Every changed byte is refused or decodes to something; and since
 * states, words and lengths must come out even, few may decode. */
static void
test_damage(distribution kind, size_t n_symbols)
{
    krul_error err;
    size_t n_bytes;
    fill(kind, n_symbols);
    CHECK(krul_entropy_encode(krul_backend_at(krul_backend_count() - 1), symbols, n_symbols, stream,
                              krul_entropy_bound(n_symbols), &n_bytes, &err) == KRUL_STATUS_OK);
    CHECK(stream[0] == 2);
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        uint8_t *exact_symbols = malloc(n_symbols);
        bool is_refused = true;
        for (size_t n_kept = 0; n_kept < n_bytes; n_kept++) {
            uint8_t *cut = malloc(n_kept + (n_kept == 0));
            memcpy(cut, stream, n_kept);
            err.message[0] = '\0';
            is_refused &= krul_entropy_decode(backend, cut, n_kept, exact_symbols, n_symbols,
                                              &err) == KRUL_STATUS_CORRUPT;
            is_refused &= err.message[0] != '\0';
            free(cut);
        }
        CHECK(is_refused);
        uint8_t *changed = malloc(n_bytes);
        memcpy(changed, stream, n_bytes);
        size_t n_decoded = 0;
        bool is_known = true;
        for (size_t at = 0; at < n_bytes; at++) {
            for (int bit = 0; bit < 8; bit++) {
                changed[at] ^= (uint8_t)(1 << bit);
                krul_status status = krul_entropy_decode(backend, changed, n_bytes, exact_symbols,
                                                         n_symbols, &err);
                is_known &= status == KRUL_STATUS_OK || status == KRUL_STATUS_CORRUPT;
                n_decoded += status == KRUL_STATUS_OK;
                changed[at] ^= (uint8_t)(1 << bit);
            }
            changed[at] = (uint8_t)~changed[at];
            is_known &= krul_entropy_decode(backend, changed, n_bytes, exact_symbols, n_symbols,
                                            &err) != KRUL_STATUS_NO_MEMORY;
            changed[at] = (uint8_t)~changed[at];
        }
        CHECK(is_known);
        /* The log of the chunk size may change without harm when there is one chunk. */
        CHECK(n_decoded <= 8);
        CHECK(krul_entropy_decode(backend, stream, n_bytes, exact_symbols, n_symbols - 1, &err) ==
              KRUL_STATUS_CORRUPT);
        free(changed);
        free(exact_symbols);
    }
}

static void
test_table(void)
{
    krul_error err;
    krul_entropy_table table;
    uint64_t counts[256] = {0};
    CHECK(krul_entropy_table_build(counts, &table, &err) == KRUL_STATUS_BAD_VALUE);
    for (int shape = 0; shape < 4; shape++) {
        for (int symbol = 0; symbol < 256; symbol++) {
            counts[symbol] = shape == 0   ? symbol == 77
                             : shape == 1 ? UINT64_MAX
                             : shape == 2 ? (symbol == 3 ? UINT64_MAX : 1)
                                          : (uint64_t)(symbol % 3 == 0);
        }
        CHECK(krul_entropy_table_build(counts, &table, &err) == KRUL_STATUS_OK);
        uint32_t sum = 0;
        bool is_covered = true;
        for (int symbol = 0; symbol < 256; symbol++) {
            sum += table.frequency[symbol];
            is_covered &= counts[symbol] == 0 || table.frequency[symbol] >= 1;
            is_covered &= table.frequency[symbol] < 1 << KRUL_ENTROPY_PROBABILITY_BITS;
        }
        CHECK(sum == 1 << KRUL_ENTROPY_PROBABILITY_BITS);
        CHECK(is_covered);
    }
}

/* ---- columns ---- */

enum { N_COLUMNS = 7, N_TABLES = 5, MAX_TOKENS = 200 };

static krul_entropy_table column_tables[N_TABLES];

/* Each symbol as often as the table before says, less steep from table to table. */
static void
make_column_tables(void)
{
    for (int table = 0; table < N_TABLES; table++) {
        uint32_t sum = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            int distance = symbol < 127 ? 127 - symbol : symbol - 127;
            int steps = distance / (table + 1);
            column_tables[table].frequency[symbol] = (uint16_t)(1 + (steps < 8
                                                                         ? 600 >> steps >> table
                                                                         : 0));
            sum += column_tables[table].frequency[symbol];
        }
        column_tables[table].frequency[127] = (uint16_t)(column_tables[table].frequency[127] +
                                                         4096 - sum);
    }
}

typedef struct column_case {
    size_t n_tokens;
    bool has_shift;
    uint8_t column_class[N_COLUMNS];
    int8_t token_shift[MAX_TOKENS];
    int32_t values[N_COLUMNS * MAX_TOKENS];
    uint8_t stream[136 + 7 * N_COLUMNS * MAX_TOKENS];
    size_t n_bytes;
} column_case;

static void
encode_case(const krul_entropy_tables *tables, column_case *made, size_t n_tokens, bool has_shift,
            bool has_escapes)
{
    static const uint8_t classes[N_COLUMNS] = {0, 4, 255, 2, 200, 1, 255};
    uint32_t state = (uint32_t)n_tokens * 2 + has_shift;
    krul_error err;
    made->n_tokens = n_tokens;
    made->has_shift = has_shift;
    memcpy(made->column_class, classes, sizeof classes);
    for (size_t token = 0; token < n_tokens; token++) {
        made->token_shift[token] = (int8_t)(next_random(&state) % 3 == 0 ? next_random(&state) : 0);
    }
    for (size_t i = 0; i < N_COLUMNS * n_tokens; i++) {
        uint32_t random = next_random(&state);
        int32_t value = (int32_t)(random % 5) - 2;
        if (has_escapes && random % 64 == 0) {
            value = (int32_t)(next_random(&state) << 8) >> (random >> 8 & 31);
        }
        made->values[i] = classes[i / n_tokens] == 255 ? 0 : value;
    }
    CHECK(krul_entropy_encode_columns(tables, made->values, N_COLUMNS, (int64_t)n_tokens,
                                      made->column_class, has_shift ? made->token_shift : NULL,
                                      made->stream,
                                      krul_entropy_columns_bound(N_COLUMNS, (int64_t)n_tokens),
                                      &made->n_bytes, &err) == KRUL_STATUS_OK);
}

/* Decode a copy of bytes, everything allocated to the byte; whether it went well, and the numbers. */
static krul_status
decode_case(const krul_backend *backend, const krul_entropy_tables *tables, const column_case *made,
            const uint8_t *bytes, size_t n_bytes, float *values_out)
{
    krul_error err = {0};
    size_t n_values = N_COLUMNS * made->n_tokens;
    uint8_t *exact_stream = malloc(n_bytes + (n_bytes == 0));
    float *exact_values = malloc(n_values * sizeof(float) + (n_values == 0));
    int8_t *exact_shift = malloc(made->n_tokens + (made->n_tokens == 0));
    memcpy(exact_stream, bytes, n_bytes);
    memcpy(exact_shift, made->token_shift, made->n_tokens);
    krul_status status = krul_entropy_decode_columns(
        backend, tables, exact_stream, n_bytes, N_COLUMNS, (int64_t)made->n_tokens,
        made->column_class, made->has_shift ? exact_shift : NULL, exact_values, &err);
    CHECK(status == KRUL_STATUS_OK || (status == KRUL_STATUS_CORRUPT && err.message[0] != '\0'));
    memcpy(values_out, exact_values, n_values * sizeof(float));
    free(exact_stream);
    free(exact_values);
    free(exact_shift);
    return status;
}

/* Every backend gives the numbers back, and refuses every truncation. Of a changed byte all say the
 * same, and where they decode they decode alike. */
static void
test_columns(const krul_entropy_tables *tables, size_t n_tokens, bool has_shift, bool has_escapes)
{
    static column_case made;
    static float found[N_COLUMNS * MAX_TOKENS], other[N_COLUMNS * MAX_TOKENS];
    encode_case(tables, &made, n_tokens, has_shift, has_escapes);
    size_t n_values = N_COLUMNS * n_tokens;
    bool are_right = true, are_refused = true, are_alike = true;
    for (int i = 0; i < krul_backend_count(); i++) {
        const krul_backend *backend = krul_backend_at(i);
        if (!krul_backend_is_usable(backend)) {
            continue;
        }
        are_right &= decode_case(backend, tables, &made, made.stream, made.n_bytes, found) ==
                     KRUL_STATUS_OK;
        for (size_t j = 0; j < n_values; j++) {
            are_right &= found[j] == (float)made.values[j];
        }
        for (size_t n_kept = 0; n_kept < made.n_bytes; n_kept++) {
            are_refused &= decode_case(backend, tables, &made, made.stream, n_kept, found) ==
                           KRUL_STATUS_CORRUPT;
        }
    }
    const krul_backend *last = krul_backend_at(krul_backend_count() - 1);
    for (size_t at = 0; at < made.n_bytes; at++) {
        made.stream[at] ^= (uint8_t)(1 << at % 8);
        krul_status status = decode_case(last, tables, &made, made.stream, made.n_bytes, found);
        for (int i = 0; i + 1 < krul_backend_count(); i++) {
            if (krul_backend_is_usable(krul_backend_at(i))) {
                are_alike &= decode_case(krul_backend_at(i), tables, &made, made.stream,
                                         made.n_bytes, other) == status;
                are_alike &= status != KRUL_STATUS_OK ||
                             memcmp(found, other, n_values * sizeof(float)) == 0;
            }
        }
        made.stream[at] ^= (uint8_t)(1 << at % 8);
    }
    CHECK(are_right);
    CHECK(are_refused);
    CHECK(are_alike);
}

static void
test_column_arguments(krul_entropy_tables *tables)
{
    krul_error err;
    krul_entropy_tables *none = NULL;
    uint8_t bytes[1024];
    size_t n_bytes = 0;
    const int32_t values[2] = {0, 1};
    const uint8_t classes[2] = {0, 255};
    CHECK(krul_entropy_tables_new(column_tables, 0, &none, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_entropy_tables_new(column_tables, 65, &none, &err) == KRUL_STATUS_BAD_VALUE);
    column_tables[1].frequency[9]--;
    CHECK(krul_entropy_tables_new(column_tables, 2, &none, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "table 1") != NULL && none == NULL);
    column_tables[1].frequency[9]++;
    krul_entropy_table alone = {{0}};
    alone.frequency[255] = 4096; /* twelve bits of a slot do not hold it */
    CHECK(krul_entropy_tables_new(&alone, 1, &none, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "its largest frequency is 4096") != NULL && none == NULL);
    CHECK(krul_entropy_columns_bound(-1, 1) == 0 && krul_entropy_columns_bound(1, -1) == 0);
    CHECK(krul_entropy_columns_bound(INT64_MAX, 2) == 0);
    CHECK(krul_entropy_columns_bound(1 << 15, (1 << 14) + 1) == 0);
    CHECK(krul_entropy_columns_bound(0, 5) == 136 && krul_entropy_columns_bound(2, 1) == 150);
    CHECK(krul_entropy_encode_columns(tables, values, 2, 1, classes, NULL, bytes, 149, &n_bytes,
                                      &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_entropy_encode_columns(tables, values, 2, 1, classes, NULL, bytes, 150, &n_bytes,
                                      &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "column 1 is of class 255") != NULL && n_bytes == 0);
    CHECK(krul_entropy_encode_columns(tables, values, -2, 1, classes, NULL, bytes, 150, &n_bytes,
                                      &err) == KRUL_STATUS_BAD_SHAPE);
    float out[2];
    CHECK(krul_entropy_decode_columns(check_best_backend(), tables, bytes, 136, -1, 1, classes,
                                      NULL, out, &err) == KRUL_STATUS_BAD_SHAPE);
    krul_entropy_tables_free(NULL);
}

static void
test_all_columns(void)
{
    static const size_t n_tokens[] = {0, 1, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 200};
    krul_error err;
    krul_entropy_tables *tables = NULL;
    make_column_tables();
    CHECK(krul_entropy_tables_new(column_tables, N_TABLES, &tables, &err) == KRUL_STATUS_OK);
    for (size_t i = 0; i < sizeof n_tokens / sizeof n_tokens[0]; i++) {
        test_columns(tables, n_tokens[i], false, false);
        test_columns(tables, n_tokens[i], true, true);
    }
    test_column_arguments(tables);
    krul_entropy_tables_free(tables);
}

int
main(void)
{
    static const size_t sizes[] = {0,   1,    2,     3,     31,    32,        33,
                                   257, 1000, 32767, 32768, 32769, 65536 + 5, MAX_SYMBOLS};
    symbols = malloc(MAX_SYMBOLS);
    decoded = malloc(MAX_SYMBOLS);
    stream = malloc(krul_entropy_bound(MAX_SYMBOLS));
    other_stream = malloc(krul_entropy_bound(MAX_SYMBOLS));
    for (int at = 0; at < N_DISTRIBUTIONS; at++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            test_round_trip((distribution)at, sizes[i]);
        }
    }
    test_damage(SKEWED, 600);
    test_damage(SKEWED, 1024 + 17);
    test_damage(TWO_VALUES, 2048);
    test_table();
    test_all_columns();
    krul_error err;
    size_t n_bytes = 0;
    CHECK(krul_entropy_encode(check_best_backend(), symbols, 100, stream, 111, &n_bytes, &err) ==
          KRUL_STATUS_BAD_VALUE);
    CHECK(krul_entropy_bound(SIZE_MAX) == 0);
    free(symbols);
    free(decoded);
    free(stream);
    free(other_stream);
    return check_finish();
}

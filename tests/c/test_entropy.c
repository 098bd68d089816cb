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

/* entropy.h - the parts of the entropy coder that codecs and kernels use; internal.
 *
 * FORMAT.md has the stream. A codec that joins symbols with other bytes does not want the whole
 * stream decoded at once: it opens a reader and takes a few chunks at a time, so that the symbols
 * are still in the processor's cache when they are joined. */
#ifndef KRUL_ENTROPY_H
#define KRUL_ENTROPY_H

#include "krul.h"

enum {
    KRUL_ENTROPY_N_SLOTS = 1 << KRUL_ENTROPY_PROBABILITY_BITS,
    /* A state lives in [2^16, 2^32) and sheds or takes one 16-bit word at a time. */
    KRUL_ENTROPY_STATE_FLOOR = 1 << 16,
    KRUL_ENTROPY_HEADER_BYTES = 12,
    KRUL_ENTROPY_STATES_BYTES = 4 * KRUL_ENTROPY_N_LANES,
    /* Two header bytes and 256 frequencies of at most two bytes. */
    KRUL_ENTROPY_MAX_TABLE_BYTES = 2 + 2 * 256,
    /* The encoder's choice: small enough for a dozen chunks in a block and for symbols to stay in
     * the second-level cache, large enough for the 132 bytes that a chunk costs to be 0.1 %. */
    KRUL_ENTROPY_CHUNK_BITS = 15,
    KRUL_ENTROPY_MIN_CHUNK_BITS = 10,
    KRUL_ENTROPY_MAX_CHUNK_BITS = 20,
    KRUL_ENTROPY_RECIPROCAL_BITS = 44,
};

/* How a stream holds its symbols. Pinned: these numbers are in files. */
typedef enum krul_entropy_mode {
    KRUL_ENTROPY_RAW = 0,
    KRUL_ENTROPY_CONSTANT = 1,
    KRUL_ENTROPY_CODED = 2,
} krul_entropy_mode;

/* What the decoder knows of a slot, in one word: how far the state moves on, and which symbol. */
static inline uint32_t
krul_entropy_slot(uint32_t frequency, uint32_t offset_in_symbol, uint32_t symbol)
{
    return frequency << 20 | offset_in_symbol << 8 | symbol;
}

/* What encoding a symbol takes. After shedding a word the state is below frequency << 20; then
 * state * reciprocal fits 64 bits and its top 20 bits are exactly state / frequency, because the
 * reciprocal is too large by at most frequency / 2^44 of itself and frequency^2 is below 2^24. */
typedef struct krul_entropy_encoder_symbol {
    uint64_t reciprocal;
    uint32_t limit; /* frequency << 20; a state from here on sheds a word */
    uint16_t complement; /* (1 << KRUL_ENTROPY_PROBABILITY_BITS) - frequency */
    uint16_t start; /* sum of the frequencies of lower symbols */
} krul_entropy_encoder_symbol;

/* What encoding each symbol of a table takes. */
void krul_entropy_encoder_init(const krul_entropy_table *table,
                               krul_entropy_encoder_symbol encoder[256]);

/* Encode one symbol, backwards: returns where the words now begin. The two bytes below `out` are
 * scribbled on; there is no branch, because it would be a coin toss. */
static inline uint8_t *
krul_entropy_put(const krul_entropy_encoder_symbol *symbol, uint32_t *state_in_out, uint8_t *out)
{
    uint32_t state = *state_in_out;
    uint32_t is_high = state >= symbol->limit;
    out[-2] = (uint8_t)state;
    out[-1] = (uint8_t)(state >> 8);
    out -= 2 * is_high;
    state >>= 16 * is_high;
    uint32_t quotient = (uint32_t)((state * symbol->reciprocal) >> KRUL_ENTROPY_RECIPROCAL_BITS);
    *state_in_out = state + symbol->start + quotient * symbol->complement;
    return out;
}

/* One chunk of an entropy stream, and where its symbols go. */
typedef struct krul_entropy_chunk {
    const uint8_t *bytes;
    size_t n_bytes;
    uint8_t *symbols_out;
    size_t n_symbols;
} krul_entropy_chunk;

enum {
    KRUL_ENTROPY_COLUMNS_HEADER_BYTES = 8,
    KRUL_ENTROPY_ZERO = 127, /* the symbol of the value 0 in a column stream */
    KRUL_ENTROPY_ESCAPE = 255, /* the symbol of a value that stands in the list of escapes */
    KRUL_ENTROPY_NO_SYMBOLS = 255, /* the class of a column of zeros */
};

/* The states and words of a column stream, and where its values go. */
typedef struct krul_entropy_columns {
    const uint8_t *bytes;
    size_t n_bytes;
    const uint32_t *slots; /* of table 0, then of table 1, ... */
    int32_t n_tables;
    const uint8_t *column_class; /* n_columns */
    const int8_t *token_shift; /* n_tokens, or NULL for zeros */
    size_t n_columns;
    size_t n_tokens;
    float *out; /* n_columns x n_tokens */
} krul_entropy_columns;

/* What a decoder looks up: KRUL_ENTROPY_N_SLOTS of krul_entropy_slot for each table. */
const uint32_t *krul_entropy_tables_slots(const krul_entropy_tables *tables);

/* Where the parts of a column stream lie. */
typedef struct krul_entropy_columns_parts {
    const uint8_t *states; /* KRUL_ENTROPY_STATES_BYTES, then the words */
    size_t words_bytes;
    const uint8_t *escapes;
    size_t escapes_bytes;
    uint32_t n_escapes;
} krul_entropy_columns_parts;

/* Find the parts of a stream of n_values. What they hold is not looked at. */
krul_status krul_entropy_columns_open(const uint8_t *stream, size_t n_bytes, size_t n_values,
                                      krul_entropy_columns_parts *out,
                                      krul_error *err) KRUL_MUST_CHECK;

/* Are these n_escapes escapes, each in its one form, and nothing else? */
bool krul_entropy_check_escapes(const uint8_t *bytes, size_t n_bytes, uint32_t n_escapes);

/* A parsed stream; borrows its bytes. */
typedef struct krul_entropy_reader {
    krul_entropy_mode mode;
    size_t n_symbols;
    size_t chunk_symbols; /* of every chunk but the last */
    size_t n_chunks; /* raw and constant streams are cut alike, to look the same */
    const uint8_t *directory; /* coded: where each chunk ends */
    const uint8_t *bytes; /* coded: the chunks; raw, constant: the symbols */
    krul_entropy_table table; /* coded */
    uint32_t slots[KRUL_ENTROPY_N_SLOTS];
} krul_entropy_reader;

/* How often each byte occurs. */
void krul_entropy_count(const uint8_t *symbols, size_t n_symbols, uint64_t counts[256]);

/* Roughly the bytes that encoding symbols with these counts takes, if they are coded. */
uint64_t krul_entropy_estimate(const uint64_t counts[256]);

/* Encode symbols whose counts are known, if that takes at most capacity_bytes; else *n_bytes_out
 * is 0 and nothing is promised of `out`. */
krul_status krul_entropy_encode_counted(const krul_backend *backend, const uint8_t *symbols,
                                        size_t n_symbols, const uint64_t counts[256], uint8_t *out,
                                        size_t capacity_bytes, size_t *n_bytes_out,
                                        krul_error *err) KRUL_MUST_CHECK;

/* Parse a stream that must hold exactly n_symbols. Trusts nothing. */
krul_status krul_entropy_reader_init(krul_entropy_reader *reader, const uint8_t *stream,
                                     size_t n_bytes, size_t n_symbols,
                                     krul_error *err) KRUL_MUST_CHECK;

/* Decode the chunks [first_chunk, first_chunk + n_chunks) to symbols_out. */
krul_status krul_entropy_reader_read(const krul_entropy_reader *reader, const krul_backend *backend,
                                     size_t first_chunk, size_t n_chunks, uint8_t *symbols_out,
                                     krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_ENTROPY_H */

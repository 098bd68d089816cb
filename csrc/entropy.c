/* entropy.c - interleaved rANS, the only entropy coder.
 *
 * Thirty-two states take turns, symbol i going to state i mod 32, and share one sequence of 16-bit
 * words. A decoder with 32 lanes, of vectors or of a CUDA warp, keeps a state per lane and finds
 * its word by counting the lower lanes that need one. Chunks have states of their own and can be
 * decoded in any order. All arithmetic is on integers, so that every machine writes the same
 * bytes. Encoding runs backwards, last symbol first, and has no division: see entropy.h. */
#include "entropy.h"

#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "internal.h"

enum {
    WHOLE = 1 << KRUL_ENTROPY_PROBABILITY_BITS,
    N_SYMBOLS = 256,
    LOG_FRACTION_BITS = 8,
};

/* A frequency of `WHOLE` would not fit the twelve bits of a slot, and no symbol needs it: one that
 * is alone leaves a slot to a neighbour. */
static const uint16_t max_frequency = WHOLE - 1;

/* ---- tables ---- */

/* Is `left` per `left_weight` less than `right` per `right_weight`? */
static bool
is_less_per(uint64_t left, uint32_t left_weight, uint64_t right, uint32_t right_weight)
{
    return left * right_weight < right * left_weight;
}

/* Change one frequency by one so that the coded size grows least, or shrinks most. The size is the
 * sum of count * log(WHOLE / frequency), so that a step costs about count / (frequency +- 1/2). */
static void
adjust_one(const uint64_t counts[N_SYMBOLS], bool is_increase, uint16_t frequency[N_SYMBOLS])
{
    int best = -1;
    uint32_t best_weight = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        uint32_t twice = 2u * frequency[symbol];
        uint32_t weight = is_increase ? twice + 1 : twice - 1;
        bool is_allowed = is_increase ? counts[symbol] != 0 && frequency[symbol] < max_frequency
                                      : frequency[symbol] > 1;
        if (!is_allowed) {
            continue;
        }
        if (best < 0 ||
            (is_increase ? is_less_per(counts[best], best_weight, counts[symbol], weight)
                         : is_less_per(counts[symbol], weight, counts[best], best_weight))) {
            best = symbol;
            best_weight = weight;
        }
    }
    assert(best >= 0);
    frequency[best] = (uint16_t)(is_increase ? frequency[best] + 1 : frequency[best] - 1);
}

krul_status
krul_entropy_table_build(const uint64_t counts[256], krul_entropy_table *out, krul_error *err)
{
    uint64_t scaled[N_SYMBOLS];
    uint64_t total = 0, largest = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        largest = counts[symbol] > largest ? counts[symbol] : largest;
    }
    if (largest == 0) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "counts are all 0, a table needs at least 1 symbol");
    }
    /* Below 2^40 each, so that neither their sum nor a product with WHOLE overflows. */
    int shift = 0;
    while (largest >> shift >> 40 != 0) {
        shift++;
    }
    int n_distinct = 0, last = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        scaled[symbol] = counts[symbol] >> shift;
        if (counts[symbol] != 0) {
            scaled[symbol] += scaled[symbol] == 0;
            n_distinct++;
            last = symbol;
        }
        total += scaled[symbol];
    }
    krul_entropy_table table = {{0}};
    if (n_distinct == 1) {
        table.frequency[last] = max_frequency;
        table.frequency[last ^ 1] = 1;
        *out = table;
        return KRUL_STATUS_OK;
    }
    int32_t sum = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        if (scaled[symbol] == 0) {
            continue;
        }
        uint64_t share = (scaled[symbol] * WHOLE + total / 2) / total;
        share = share == 0 ? 1 : share;
        table.frequency[symbol] = (uint16_t)(share > max_frequency ? max_frequency : share);
        sum += table.frequency[symbol];
    }
    for (; sum != WHOLE; sum += sum < WHOLE ? 1 : -1) {
        adjust_one(scaled, sum < WHOLE, table.frequency);
    }
    *out = table;
    return KRUL_STATUS_OK;
}

/* First symbol, last symbol, then the frequencies from one to the other: a byte below 128 is a
 * frequency, one with the top bit holds bits 8 to 11 and the next byte the rest. Padded to an even
 * number of bytes. */
static size_t
table_write(const krul_entropy_table *table, uint8_t out[KRUL_ENTROPY_MAX_TABLE_BYTES])
{
    int first = 0, last = N_SYMBOLS - 1;
    while (table->frequency[first] == 0) {
        first++;
    }
    while (table->frequency[last] == 0) {
        last--;
    }
    size_t n_bytes = 0;
    out[n_bytes++] = (uint8_t)first;
    out[n_bytes++] = (uint8_t)last;
    for (int symbol = first; symbol <= last; symbol++) {
        uint16_t frequency = table->frequency[symbol];
        if (frequency >= 128) {
            out[n_bytes++] = (uint8_t)(0x80 | frequency >> 8);
        }
        out[n_bytes++] = (uint8_t)frequency;
    }
    if (n_bytes % 2 != 0) {
        out[n_bytes++] = 0;
    }
    return n_bytes;
}

/* The inverse; there is one way to write a table, and any other is refused. */
static krul_status
table_read(const uint8_t *bytes, size_t n_bytes, krul_entropy_table *out, krul_error *err)
{
    if (n_bytes < 4 || n_bytes > KRUL_ENTROPY_MAX_TABLE_BYTES || n_bytes % 2 != 0) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "entropy table has %zu bytes, not an even number from 4 to %d", n_bytes,
                         (int)KRUL_ENTROPY_MAX_TABLE_BYTES);
    }
    memset(out, 0, sizeof *out);
    int first = bytes[0], last = bytes[1];
    uint32_t sum = 0;
    size_t at = 2;
    for (int symbol = first; symbol <= last; symbol++) {
        bool is_long = at < n_bytes && (bytes[at] & 0x80) != 0;
        if (at + (is_long ? 2 : 1) > n_bytes) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "entropy table of %zu bytes ends before symbol %d of %d to %d",
                             n_bytes, symbol, first, last);
        }
        uint32_t frequency = bytes[at++];
        if (is_long) {
            frequency = (frequency & 0x7f) << 8 | bytes[at++];
        }
        if (frequency > max_frequency || (is_long && frequency < 128) ||
            (frequency == 0 && (symbol == first || symbol == last))) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "entropy table gives symbol %d of %d to %d the frequency %u", symbol,
                             first, last, (unsigned)frequency);
        }
        out->frequency[symbol] = (uint16_t)frequency;
        sum += frequency;
    }
    bool is_padded = at % 2 != 0;
    if (sum != WHOLE || at + is_padded != n_bytes || (is_padded && bytes[at] != 0)) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "entropy table sums to %u in %zu bytes, not to %d in %zu", (unsigned)sum,
                         at, (int)WHOLE, n_bytes);
    }
    return KRUL_STATUS_OK;
}

/* ---- encoder ---- */

void
krul_entropy_encoder_init(const krul_entropy_table *table, krul_entropy_encoder_symbol encoder[256])
{
    uint32_t start = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        uint32_t frequency = table->frequency[symbol];
        encoder[symbol] = (krul_entropy_encoder_symbol){
            .reciprocal = frequency == 0
                              ? 0
                              : ((uint64_t)1 << KRUL_ENTROPY_RECIPROCAL_BITS) / frequency + 1,
            .limit = frequency << 20,
            .complement = (uint16_t)(WHOLE - frequency),
            .start = (uint16_t)start,
        };
        start += frequency;
    }
}

/* log2(value) in units of 2^-LOG_FRACTION_BITS, rounded down; value is 1 to WHOLE. */
static uint32_t
log2_fixed(uint32_t value)
{
    uint32_t whole = 31u - (uint32_t)__builtin_clz(value);
    uint32_t result = whole;
    uint64_t mantissa = (uint64_t)value << (31 - whole); /* [1, 2) with 31 bits after the point */
    for (int i = 0; i < LOG_FRACTION_BITS; i++) {
        mantissa = mantissa * mantissa >> 31;
        uint32_t bit = (uint32_t)(mantissa >> 32);
        mantissa >>= bit;
        result = result << 1 | bit;
    }
    return result;
}

static size_t
n_chunks_of(size_t n_symbols, size_t chunk_symbols)
{
    return n_symbols / chunk_symbols + (n_symbols % chunk_symbols != 0);
}

/* What a stream of these symbols will take once coded, within a fraction of a percent. */
static uint64_t
estimate_bytes(const uint64_t counts[N_SYMBOLS], const krul_entropy_table *table)
{
    uint64_t cost = 0; /* in units of 2^-LOG_FRACTION_BITS bits */
    uint64_t n_symbols = 0;
    for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
        if (counts[symbol] != 0) {
            uint32_t bits = (KRUL_ENTROPY_PROBABILITY_BITS << LOG_FRACTION_BITS) -
                            log2_fixed(table->frequency[symbol]);
            cost += counts[symbol] * bits;
            n_symbols += counts[symbol];
        }
    }
    uint64_t n_chunks = (n_symbols >> KRUL_ENTROPY_CHUNK_BITS) + 1;
    return (cost >> (LOG_FRACTION_BITS + 3)) + n_chunks * (KRUL_ENTROPY_STATES_BYTES + 4) +
           KRUL_ENTROPY_HEADER_BYTES;
}

void
krul_entropy_count(const uint8_t *symbols, size_t n_symbols, uint64_t counts[256])
{
    /* Four histograms: with one, a run of equal symbols waits for its own increments. */
    uint32_t parts[4][N_SYMBOLS];
    memset(counts, 0, N_SYMBOLS * sizeof counts[0]);
    while (n_symbols > 0) {
        size_t n_now = n_symbols < (size_t)1 << 30 ? n_symbols : (size_t)1 << 30;
        memset(parts, 0, sizeof parts);
        size_t i = 0;
        for (; i + 4 <= n_now; i += 4) {
            parts[0][symbols[i]]++;
            parts[1][symbols[i + 1]]++;
            parts[2][symbols[i + 2]]++;
            parts[3][symbols[i + 3]]++;
        }
        for (; i < n_now; i++) {
            parts[0][symbols[i]]++;
        }
        for (int symbol = 0; symbol < N_SYMBOLS; symbol++) {
            counts[symbol] += (uint64_t)parts[0][symbol] + parts[1][symbol] + parts[2][symbol] +
                              parts[3][symbol];
        }
        symbols += n_now;
        n_symbols -= n_now;
    }
}

uint64_t
krul_entropy_estimate(const uint64_t counts[256])
{
    krul_entropy_table table;
    return krul_entropy_table_build(counts, &table, NULL) == KRUL_STATUS_OK
               ? estimate_bytes(counts, &table)
               : 0;
}

static void
header_write(krul_entropy_mode mode, int chunk_bits, size_t table_bytes, size_t n_symbols,
             uint8_t *out)
{
    out[0] = (uint8_t)mode;
    out[1] = (uint8_t)chunk_bits;
    krul_store_u16(out + 2, (uint16_t)table_bytes);
    krul_store_u64(out + 4, n_symbols);
}

krul_status
krul_entropy_encode_counted(const krul_backend *backend, const uint8_t *symbols, size_t n_symbols,
                            const uint64_t counts[256], uint8_t *out, size_t capacity_bytes,
                            size_t *n_bytes_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    uint8_t *scratch = NULL;
    krul_entropy_encoder_symbol encoder[N_SYMBOLS];
    krul_entropy_table table;
    *n_bytes_out = 0;

    /* Ends of chunks are 32-bit numbers, which this keeps safe for any table. */
    if (n_symbols == 0 || n_symbols > INT32_MAX / 2) {
        goto done;
    }
    if (counts[symbols[0]] == n_symbols) {
        if (capacity_bytes > KRUL_ENTROPY_HEADER_BYTES) {
            header_write(KRUL_ENTROPY_CONSTANT, KRUL_ENTROPY_CHUNK_BITS, 0, n_symbols, out);
            out[KRUL_ENTROPY_HEADER_BYTES] = symbols[0];
            *n_bytes_out = KRUL_ENTROPY_HEADER_BYTES + 1;
        }
        goto done;
    }
    KRUL_TRY(krul_entropy_table_build(counts, &table, err));
    if (estimate_bytes(counts, &table) > capacity_bytes) {
        goto done;
    }
    uint8_t table_bytes[KRUL_ENTROPY_MAX_TABLE_BYTES];
    size_t n_table_bytes = table_write(&table, table_bytes);
    size_t chunk_symbols = (size_t)1 << KRUL_ENTROPY_CHUNK_BITS;
    size_t n_chunks = n_chunks_of(n_symbols, chunk_symbols);
    size_t chunks_start = KRUL_ENTROPY_HEADER_BYTES + n_table_bytes + 4 * n_chunks;
    if (chunks_start > capacity_bytes) {
        goto done;
    }
    size_t scratch_bytes = KRUL_ENTROPY_STATES_BYTES +
                           2 * (n_symbols < chunk_symbols ? n_symbols : chunk_symbols);
    scratch = malloc(scratch_bytes);
    if (scratch == NULL) {
        status = krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %zu bytes of entropy chunk",
                           scratch_bytes);
        goto done;
    }
    krul_entropy_encoder_init(&table, encoder);
    size_t chunks_bytes = 0;
    for (size_t chunk = 0; chunk < n_chunks; chunk++) {
        size_t first = chunk * chunk_symbols;
        size_t n_here = n_symbols - first < chunk_symbols ? n_symbols - first : chunk_symbols;
        const uint8_t *begin = backend->entropy_encode_chunk(encoder, symbols + first, n_here,
                                                             scratch + scratch_bytes);
        size_t n_bytes = (size_t)(scratch + scratch_bytes - begin);
        if (n_bytes > capacity_bytes - chunks_start - chunks_bytes) {
            goto done;
        }
        memcpy(out + chunks_start + chunks_bytes, begin, n_bytes);
        chunks_bytes += n_bytes;
        krul_store_u32(out + KRUL_ENTROPY_HEADER_BYTES + n_table_bytes + 4 * chunk,
                       (uint32_t)chunks_bytes);
    }
    header_write(KRUL_ENTROPY_CODED, KRUL_ENTROPY_CHUNK_BITS, n_table_bytes, n_symbols, out);
    memcpy(out + KRUL_ENTROPY_HEADER_BYTES, table_bytes, n_table_bytes);
    *n_bytes_out = chunks_start + chunks_bytes;
done:
    free(scratch);
    return status;
}

size_t
krul_entropy_bound(size_t n_symbols)
{
    size_t n_bytes;
    return krul_add_overflows(n_symbols, KRUL_ENTROPY_HEADER_BYTES, &n_bytes) ? 0 : n_bytes;
}

krul_status
krul_entropy_encode(const krul_backend *backend, const uint8_t *symbols, size_t n_symbols,
                    uint8_t *out, size_t capacity_bytes, size_t *n_bytes_out, krul_error *err)
{
    size_t bound = krul_entropy_bound(n_symbols);
    if (bound == 0 || capacity_bytes < bound) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "capacity_bytes is %zu but %zu symbols may need %zu", capacity_bytes,
                         n_symbols, bound);
    }
    uint64_t counts[N_SYMBOLS];
    krul_entropy_count(symbols, n_symbols, counts);
    size_t n_bytes;
    /* One byte less than raw, so that coding must pay. */
    krul_status status = krul_entropy_encode_counted(backend, symbols, n_symbols, counts, out,
                                                     bound - 1, &n_bytes, err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    if (n_bytes == 0) {
        header_write(KRUL_ENTROPY_RAW, KRUL_ENTROPY_CHUNK_BITS, 0, n_symbols, out);
        if (n_symbols != 0) {
            memcpy(out + KRUL_ENTROPY_HEADER_BYTES, symbols, n_symbols);
        }
        n_bytes = bound;
    }
    *n_bytes_out = n_bytes;
    return KRUL_STATUS_OK;
}

/* ---- decoder ---- */

static size_t
chunk_end(const krul_entropy_reader *reader, size_t chunk)
{
    return krul_load_u32(reader->directory + 4 * chunk);
}

/* Parse what a coded stream has and the others have not. */
static krul_status
reader_init_coded(krul_entropy_reader *reader, size_t table_bytes, const uint8_t *bytes,
                  size_t n_bytes, krul_error *err)
{
    if (table_bytes > n_bytes || reader->n_chunks > (n_bytes - table_bytes) / 4) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "entropy stream has %zu bytes after its header, too few for a table of "
                         "%zu and %zu chunks",
                         n_bytes, table_bytes, reader->n_chunks);
    }
    krul_status status = table_read(bytes, table_bytes, &reader->table, err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    reader->directory = bytes + table_bytes;
    reader->bytes = reader->directory + 4 * reader->n_chunks;
    size_t chunks_bytes = n_bytes - table_bytes - 4 * reader->n_chunks;
    size_t begin = 0;
    for (size_t chunk = 0; chunk < reader->n_chunks; chunk++) {
        size_t end = chunk_end(reader, chunk);
        bool is_last = chunk + 1 == reader->n_chunks;
        if (end < begin || end - begin < KRUL_ENTROPY_STATES_BYTES || (end - begin) % 2 != 0 ||
            end > chunks_bytes || (is_last && end != chunks_bytes)) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "entropy chunk %zu of %zu spans bytes %zu to %zu of %zu", chunk,
                             reader->n_chunks, begin, end, chunks_bytes);
        }
        begin = end;
    }
    uint32_t *slot = reader->slots;
    for (uint32_t symbol = 0; symbol < N_SYMBOLS; symbol++) {
        uint32_t frequency = reader->table.frequency[symbol];
        for (uint32_t offset = 0; offset < frequency; offset++) {
            *slot++ = krul_entropy_slot(frequency, offset, symbol);
        }
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_entropy_reader_init(krul_entropy_reader *reader, const uint8_t *stream, size_t n_bytes,
                         size_t n_symbols, krul_error *err)
{
    if (n_bytes < KRUL_ENTROPY_HEADER_BYTES) {
        return krul_fail(err, KRUL_STATUS_CORRUPT, "entropy stream has %zu bytes, its header %d",
                         n_bytes, (int)KRUL_ENTROPY_HEADER_BYTES);
    }
    int mode = stream[0], chunk_bits = stream[1];
    size_t table_bytes = krul_load_u16(stream + 2);
    uint64_t n_held = krul_load_u64(stream + 4);
    if (n_held != n_symbols) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "entropy stream holds %llu symbols, not the %zu expected",
                         (unsigned long long)n_held, n_symbols);
    }
    if (chunk_bits < KRUL_ENTROPY_MIN_CHUNK_BITS || chunk_bits > KRUL_ENTROPY_MAX_CHUNK_BITS) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "entropy stream has chunks of 2^%d symbols, not 2^%d to 2^%d", chunk_bits,
                         (int)KRUL_ENTROPY_MIN_CHUNK_BITS, (int)KRUL_ENTROPY_MAX_CHUNK_BITS);
    }
    const uint8_t *bytes = stream + KRUL_ENTROPY_HEADER_BYTES;
    n_bytes -= KRUL_ENTROPY_HEADER_BYTES;
    reader->n_symbols = n_symbols;
    reader->chunk_symbols = (size_t)1 << chunk_bits;
    reader->n_chunks = n_chunks_of(n_symbols, reader->chunk_symbols);
    reader->directory = NULL;
    reader->bytes = bytes;
    if (mode == KRUL_ENTROPY_CODED && n_symbols != 0) {
        reader->mode = KRUL_ENTROPY_CODED;
        return reader_init_coded(reader, table_bytes, bytes, n_bytes, err);
    }
    bool is_raw = mode == KRUL_ENTROPY_RAW;
    if ((!is_raw && mode != KRUL_ENTROPY_CONSTANT) || n_bytes != (is_raw ? n_symbols : 1) ||
        table_bytes != 0) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "entropy stream of mode %d has %zu bytes and a table of %zu for %zu "
                         "symbols",
                         mode, n_bytes, table_bytes, n_symbols);
    }
    reader->mode = is_raw ? KRUL_ENTROPY_RAW : KRUL_ENTROPY_CONSTANT;
    return KRUL_STATUS_OK;
}

krul_status
krul_entropy_reader_read(const krul_entropy_reader *reader, const krul_backend *backend,
                         size_t first_chunk, size_t n_chunks, uint8_t *symbols_out, krul_error *err)
{
    enum { MAX_AT_ONCE = 16 };
    assert(first_chunk <= reader->n_chunks && n_chunks <= reader->n_chunks - first_chunk);
    if (n_chunks == 0) {
        return KRUL_STATUS_OK;
    }
    size_t first_symbol = first_chunk * reader->chunk_symbols;
    if (reader->mode != KRUL_ENTROPY_CODED) {
        size_t n_here = n_chunks * reader->chunk_symbols;
        size_t n_left = reader->n_symbols - first_symbol;
        n_here = n_left < n_here ? n_left : n_here;
        if (reader->mode == KRUL_ENTROPY_RAW) {
            memcpy(symbols_out, reader->bytes + first_symbol, n_here);
        }
        else {
            memset(symbols_out, reader->bytes[0], n_here);
        }
        return KRUL_STATUS_OK;
    }
    size_t begin = first_chunk == 0 ? 0 : chunk_end(reader, first_chunk - 1);
    size_t end_chunk = first_chunk + n_chunks;
    for (size_t chunk = first_chunk; chunk < end_chunk;) {
        krul_entropy_chunk chunks[MAX_AT_ONCE];
        size_t n_now = 0;
        for (; n_now < MAX_AT_ONCE && chunk < end_chunk; n_now++, chunk++) {
            size_t end = chunk_end(reader, chunk);
            size_t n_left = reader->n_symbols - chunk * reader->chunk_symbols;
            chunks[n_now] = (krul_entropy_chunk){
                .bytes = reader->bytes + begin,
                .n_bytes = end - begin,
                .symbols_out = symbols_out,
                .n_symbols = n_left < reader->chunk_symbols ? n_left : reader->chunk_symbols,
            };
            symbols_out += chunks[n_now].n_symbols;
            begin = end;
        }
        if (!backend->entropy_decode_chunks(reader->slots, chunks, n_now)) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "entropy chunks %zu to %zu of %zu do not decode", chunk - n_now,
                             chunk - 1, reader->n_chunks);
        }
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_entropy_decode(const krul_backend *backend, const uint8_t *stream, size_t n_bytes,
                    uint8_t *symbols_out, size_t n_symbols, krul_error *err)
{
    krul_entropy_reader reader;
    krul_status status = krul_entropy_reader_init(&reader, stream, n_bytes, n_symbols, err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    return krul_entropy_reader_read(&reader, backend, 0, reader.n_chunks, symbols_out, err);
}

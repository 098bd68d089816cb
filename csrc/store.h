/* store.h - where each field of a container lies, and what the store's files share; internal. */
#ifndef KRUL_STORE_H
#define KRUL_STORE_H

#include "internal.h"

/* The header, byte by byte; FORMAT.md shows the same as a ruler. */
enum {
    KRUL_STORE_MAGIC_BYTES = 8,
    KRUL_STORE_AT_VERSION = 8,
    KRUL_STORE_AT_KIND = 12,
    KRUL_STORE_AT_FILE_BYTES = 16,
    KRUL_STORE_AT_N_ENTRIES = 24,
    KRUL_STORE_AT_TABLE_CRC32C = 28,
    KRUL_STORE_AT_HEADER_RESERVED = 32,
    KRUL_STORE_AT_HEADER_CRC32C = 60,
};

/* An entry of the table. */
enum {
    KRUL_STORE_AT_ENTRY_KIND = 0,
    KRUL_STORE_AT_CODEC = 2,
    KRUL_STORE_AT_KV = 3,
    KRUL_STORE_AT_DTYPE = 4,
    KRUL_STORE_AT_ENTRY_RESERVED = 5,
    KRUL_STORE_AT_LAYER_LOWER = 8,
    KRUL_STORE_AT_LAYER_UPPER = 12,
    KRUL_STORE_AT_N_BATCH = 16,
    KRUL_STORE_AT_N_HEADS = 20,
    KRUL_STORE_AT_HEAD_DIM = 24,
    KRUL_STORE_AT_PAYLOAD_CRC32C = 28,
    KRUL_STORE_AT_TOKEN_START = 32,
    KRUL_STORE_AT_N_TOKENS = 40,
    KRUL_STORE_AT_OFFSET = 48,
    KRUL_STORE_AT_PAYLOAD_BYTES = 56,
};

/* No line ending, character set or text filter leaves these bytes as they are. */
extern const uint8_t krul_store_magic[KRUL_STORE_MAGIC_BYTES];

/* The next multiple of KRUL_STORE_ALIGNMENT; false if it does not fit. */
static inline bool
krul_store_align(uint64_t n_bytes, uint64_t *out)
{
    uint64_t sum = 0;
    if (__builtin_add_overflow(n_bytes, (uint64_t)KRUL_STORE_ALIGNMENT - 1, &sum)) {
        return false;
    }
    *out = sum & ~((uint64_t)KRUL_STORE_ALIGNMENT - 1);
    return true;
}

/* The rules for a whole table in a file of this kind: what every entry may hold, which entries the
 * file must have, and in which order. Offsets are not looked at. A breach is `breach`: BAD_FORMAT
 * for a file that is read, BAD_VALUE for one that a caller wants written. */
krul_status krul_store_check_table(krul_store_kind kind, const krul_store_entry *entries,
                                   int64_t n_entries, krul_status breach,
                                   krul_error *err) KRUL_MUST_CHECK;

/* The slower ways to a CRC-32C, for tests to compare; krul_store_crc32c takes the fastest. */
uint32_t krul_store_crc32c_by_table(uint32_t crc, const void *bytes, size_t n_bytes);

/* Calls the table where the processor has no instruction for it. */
uint32_t krul_store_crc32c_by_instruction(uint32_t crc, const void *bytes, size_t n_bytes);

bool krul_store_crc32c_has_instruction(void);

#endif /* KRUL_STORE_H */

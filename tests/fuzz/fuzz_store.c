/* fuzz_store.c - any bytes as the head of a container: refused, or every promise holds.
 *
 * Checksums would stop nearly every mutation at the door, so each input is tried twice: as it is,
 * and with its checksums put right, which lets the rules behind them be reached. */
#include <stdlib.h>
#include <string.h>

#include "store.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes);

static void
need(bool is_true)
{
    if (!is_true) {
        abort();
    }
}

static void
check_promises(const krul_store_head *head, const uint8_t *bytes, size_t n_bytes)
{
    uint64_t end = KRUL_STORE_HEADER_BYTES + (uint64_t)head->n_entries * KRUL_STORE_ENTRY_BYTES;
    uint32_t crc = 0;
    need(head->file_bytes == n_bytes && head->version == KRUL_STORE_VERSION);
    need(head->n_entries > 0 && head->n_entries <= KRUL_STORE_MAX_ENTRIES);
    for (int32_t i = 0; i < head->n_entries; i++) {
        const krul_store_entry *entry = &head->entries[i];
        need(entry->offset >= end && entry->offset - end < KRUL_STORE_ALIGNMENT);
        need(entry->offset % KRUL_STORE_ALIGNMENT == 0);
        need(entry->offset <= n_bytes && entry->payload_bytes <= n_bytes - entry->offset);
        need(krul_store_check_entry(entry, NULL) == KRUL_STATUS_OK);
        need((entry->kind == KRUL_STORE_ENTRY_BLOCK) == (head->kind == KRUL_STORE_SEGMENT));
        end = entry->offset + entry->payload_bytes;
        /* Touch every byte, so that a sanitizer can object. */
        crc = krul_store_crc32c(crc, bytes + entry->offset, (size_t)entry->payload_bytes);
    }
    need(end == n_bytes);
    (void)crc;
}

static void
try_parse(const uint8_t *bytes, size_t n_bytes)
{
    krul_store_head head = {0};
    krul_error err = {0};
    krul_status status = krul_store_parse(bytes, n_bytes, n_bytes, &head, &err);
    if (status == KRUL_STATUS_OK) {
        check_promises(&head, bytes, n_bytes);
        krul_store_head_close(&head);
        return;
    }
    need(status == KRUL_STATUS_CORRUPT || status == KRUL_STATUS_BAD_FORMAT);
    need(head.entries == NULL && err.status == status && err.message[0] != '\0');
}

int
LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes)
{
    try_parse(bytes, n_bytes);
    if (n_bytes < KRUL_STORE_HEADER_BYTES) {
        return 0;
    }
    uint8_t *sealed = malloc(n_bytes);
    if (sealed == NULL) {
        return 0;
    }
    memcpy(sealed, bytes, n_bytes);
    uint64_t n_entries = krul_load_u32(sealed + KRUL_STORE_AT_N_ENTRIES);
    if (n_entries <= (n_bytes - KRUL_STORE_HEADER_BYTES) / KRUL_STORE_ENTRY_BYTES) {
        krul_store_u32(sealed + KRUL_STORE_AT_TABLE_CRC32C,
                       krul_store_crc32c(0, sealed + KRUL_STORE_HEADER_BYTES,
                                         (size_t)n_entries * KRUL_STORE_ENTRY_BYTES));
    }
    krul_store_u64(sealed + KRUL_STORE_AT_FILE_BYTES, n_bytes);
    krul_store_u32(sealed + KRUL_STORE_AT_HEADER_CRC32C,
                   krul_store_crc32c(0, sealed, KRUL_STORE_AT_HEADER_CRC32C));
    try_parse(sealed, n_bytes);
    free(sealed);
    return 0;
}

/* store_read.c - the head of a container and its payloads, read without trusting a byte.
 *
 * Two kinds of wrong are told apart. Sizes or checksums that disagree mean damage: CORRUPT. A file
 * whose checksums agree but whose content breaks a rule was written that way: BAD_FORMAT. Nothing in
 * a file is used before both have been ruled out; the only number that is needed earlier, the count
 * of entries, is bounded first. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store.h"

enum { MAX_READ_BYTES = 1 << 30 }; /* one pread moves at most a little under 2 GiB */

const uint8_t krul_store_magic[KRUL_STORE_MAGIC_BYTES] = {0x89, 'K',  'R',  'U',
                                                          'L',  '\r', '\n', 0x1a};

/* ---- rules for entries ------------------------------------------------------------------------ */

static krul_status
check_between(int64_t value, int64_t low, int64_t high, const char *field, int64_t index,
              krul_status breach, krul_error *err)
{
    if (value < low || value > high) {
        return krul_fail(err, breach,
                         "entry %" PRId64 ": %s is %" PRId64 " but must be from %" PRId64
                         " to %" PRId64,
                         index, field, value, low, high);
    }
    return KRUL_STATUS_OK;
}

static krul_status
check_block(const krul_store_entry *entry, int64_t index, krul_status breach, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    int codec_layers = krul_codec_n_layers(entry->codec);
    bool is_pair = entry->layer_upper != -1;
    if (codec_layers == 0) {
        KRUL_TRY(krul_fail(err, breach, "entry %" PRId64 ": codec is %d but the last known is %d",
                           index, (int)entry->codec, KRUL_CODEC_PREDICT));
    }
    KRUL_TRY(check_between(entry->kv, KRUL_KV_KEY, KRUL_KV_BOTH, "kv", index, breach, err));
    if ((entry->kv == KRUL_KV_BOTH) != (entry->codec == KRUL_CODEC_PREDICT)) {
        KRUL_TRY(krul_fail(err, breach, "entry %" PRId64 ": codec %s has the kv %d", index,
                           krul_codec_name(entry->codec), (int)entry->kv));
    }
    KRUL_TRY(
        check_between(entry->dtype, KRUL_DTYPE_F32, KRUL_DTYPE_BF16, "dtype", index, breach, err));
    KRUL_TRY(check_between(entry->layer_lower, 0, KRUL_STORE_MAX_LAYERS - 1, "layer_lower", index,
                           breach, err));
    if (is_pair) {
        KRUL_TRY(check_between(entry->layer_upper, (int64_t)entry->layer_lower + 1,
                               KRUL_STORE_MAX_LAYERS - 1, "layer_upper", index, breach, err));
    }
    if (entry->codec != KRUL_CODEC_EXACT && is_pair != (codec_layers == 2)) {
        KRUL_TRY(krul_fail(err, breach,
                           "entry %" PRId64 ": codec %s takes %d layer(s) but the entry has %d",
                           index, krul_codec_name(entry->codec), codec_layers, is_pair ? 2 : 1));
    }
    KRUL_TRY(
        check_between(entry->n_batch, 1, KRUL_STORE_MAX_EXTENT, "n_batch", index, breach, err));
    KRUL_TRY(
        check_between(entry->n_heads, 1, KRUL_STORE_MAX_EXTENT, "n_heads", index, breach, err));
    KRUL_TRY(
        check_between(entry->head_dim, 1, KRUL_STORE_MAX_EXTENT, "head_dim", index, breach, err));
    KRUL_TRY(
        check_between(entry->n_tokens, 1, KRUL_STORE_MAX_TOKENS, "n_tokens", index, breach, err));
    KRUL_TRY(check_between(entry->token_start, 0, KRUL_STORE_MAX_TOKENS - entry->n_tokens,
                           "token_start", index, breach, err));

    size_t raw_bytes = krul_dtype_bytes(entry->dtype) *
                       (is_pair || entry->kv == KRUL_KV_BOTH ? 2 : 1);
    bool overflows = krul_multiply_overflows(raw_bytes, (size_t)entry->n_batch, &raw_bytes);
    overflows = krul_multiply_overflows(raw_bytes, (size_t)entry->n_heads, &raw_bytes) || overflows;
    overflows = krul_multiply_overflows(raw_bytes, (size_t)entry->head_dim, &raw_bytes) ||
                overflows;
    overflows = krul_multiply_overflows(raw_bytes, (size_t)entry->n_tokens, &raw_bytes) ||
                overflows;
    if (overflows || raw_bytes > KRUL_STORE_MAX_BLOCK_BYTES) {
        KRUL_TRY(krul_fail(err, breach,
                           "entry %" PRId64 ": a block of %d x %d x %" PRId64
                           " x %d values is more than %d bytes decoded",
                           index, entry->n_batch, entry->n_heads, entry->n_tokens, entry->head_dim,
                           KRUL_STORE_MAX_BLOCK_BYTES));
    }
    if (entry->payload_bytes == 0) {
        KRUL_TRY(krul_fail(err, breach,
                           "entry %" PRId64 ": payload_bytes is 0 but a block has at least 1",
                           index));
    }
done:
    return status;
}

/* Entries other than blocks use kind, offset, payload_bytes and the checksum only. */
static krul_status
check_plain(const krul_store_entry *entry, int64_t index, krul_status breach, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const struct {
        const char *name;
        int64_t value;
    } fields[] = {
        {"codec", entry->codec},
        {"kv", entry->kv},
        {"dtype", entry->dtype},
        {"layer_lower", entry->layer_lower},
        {"layer_upper", entry->layer_upper},
        {"n_batch", entry->n_batch},
        {"n_heads", entry->n_heads},
        {"head_dim", entry->head_dim},
        {"token_start", entry->token_start},
        {"n_tokens", entry->n_tokens},
    };
    for (size_t i = 0; i < KRUL_LENGTH(fields); i++) {
        KRUL_TRY(check_between(fields[i].value, 0, 0, fields[i].name, index, breach, err));
    }
    if (entry->kind == KRUL_STORE_ENTRY_META && entry->payload_bytes > KRUL_STORE_MAX_META_BYTES) {
        KRUL_TRY(krul_fail(err, breach,
                           "entry %" PRId64 ": META has %" PRIu64 " bytes but at most %d are read",
                           index, entry->payload_bytes, KRUL_STORE_MAX_META_BYTES));
    }
done:
    return status;
}

krul_status
krul_store_check_entry(const krul_store_entry *entry, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    KRUL_TRY(check_between(entry->kind, KRUL_STORE_ENTRY_BLOCK, KRUL_STORE_ENTRY_BEHAVIOUR, "kind",
                           0, KRUL_STATUS_BAD_VALUE, err));
    if (entry->kind == KRUL_STORE_ENTRY_BLOCK) {
        KRUL_TRY(check_block(entry, 0, KRUL_STATUS_BAD_VALUE, err));
    }
    else {
        KRUL_TRY(check_plain(entry, 0, KRUL_STATUS_BAD_VALUE, err));
    }
done:
    return status;
}

/* Blocks are layer-major: by lower layer, K before V before both, then by token, without overlap. */
static krul_status
check_block_order(const krul_store_entry *last, const krul_store_entry *next, int64_t index,
                  krul_status breach, krul_error *err)
{
    int64_t last_tensor = (int64_t)last->layer_lower * 3 + last->kv;
    int64_t next_tensor = (int64_t)next->layer_lower * 3 + next->kv;
    int64_t last_token_end = last->token_start + last->n_tokens;
    if (next_tensor < last_tensor ||
        (next_tensor == last_tensor && next->token_start < last_token_end)) {
        return krul_fail(err, breach,
                         "entry %" PRId64 ": layer %d, kv %d, token %" PRId64
                         " comes after layer %d, kv %d, token %" PRId64 " but must not",
                         index, next->layer_lower, (int)next->kv, next->token_start,
                         last->layer_lower, (int)last->kv, last_token_end - 1);
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_store_check_table(krul_store_kind kind, const krul_store_entry *entries, int64_t n_entries,
                       krul_status breach, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    bool is_manifest = kind == KRUL_STORE_MANIFEST;
    if (!is_manifest && kind != KRUL_STORE_SEGMENT) {
        KRUL_TRY(krul_fail(err, breach, "kind of file is %d but the last known is %d", (int)kind,
                           KRUL_STORE_SEGMENT));
    }
    int64_t least = is_manifest ? 2 : 1;
    if (n_entries < least || n_entries > KRUL_STORE_MAX_ENTRIES) {
        KRUL_TRY(krul_fail(err, breach,
                           "n_entries is %" PRId64 " but must be from %" PRId64 " to %d", n_entries,
                           least, KRUL_STORE_MAX_ENTRIES));
    }
    for (int64_t i = 0; i < n_entries; i++) {
        const krul_store_entry *entry = &entries[i];
        if (!is_manifest) {
            KRUL_TRY(check_between(entry->kind, KRUL_STORE_ENTRY_BLOCK, KRUL_STORE_ENTRY_BLOCK,
                                   "kind in a segment", i, breach, err));
            KRUL_TRY(check_block(entry, i, breach, err));
            if (i > 0) {
                KRUL_TRY(check_block_order(&entries[i - 1], entry, i, breach, err));
            }
            continue;
        }
        /* META, then TOKENS, then any of the others, each once and in order of their numbers. */
        int64_t low = i == 0 ? KRUL_STORE_ENTRY_META : (int64_t)entries[i - 1].kind + 1;
        int64_t high = i < 2 ? KRUL_STORE_ENTRY_META + i : KRUL_STORE_ENTRY_BEHAVIOUR;
        KRUL_TRY(check_between(entry->kind, low, high, "kind in a manifest", i, breach, err));
        KRUL_TRY(check_plain(entry, i, breach, err));
    }
done:
    return status;
}

/* ---- parsing ----------------------------------------------------------------------------------- */

static bool
are_zero(const uint8_t *bytes, size_t n_bytes)
{
    uint8_t any = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        any |= bytes[i];
    }
    return any == 0;
}

krul_status
krul_store_head_bytes(const uint8_t *header, size_t n_bytes, size_t *n_bytes_out, krul_error *err)
{
    size_t n_magic = n_bytes < KRUL_STORE_MAGIC_BYTES ? n_bytes : KRUL_STORE_MAGIC_BYTES;
    if (n_magic > 0 && memcmp(header, krul_store_magic, n_magic) != 0) {
        return krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                         "not a krul file: it begins with byte 0x%02x, not with the magic bytes",
                         header[0]);
    }
    if (n_bytes < KRUL_STORE_HEADER_BYTES) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "truncated: the file has %zu bytes but its header alone has %d", n_bytes,
                         KRUL_STORE_HEADER_BYTES);
    }
    uint32_t crc = krul_store_crc32c(0, header, KRUL_STORE_AT_HEADER_CRC32C);
    uint32_t stored_crc = krul_load_u32(header + KRUL_STORE_AT_HEADER_CRC32C);
    if (crc != stored_crc) {
        return krul_fail(err, KRUL_STATUS_CORRUPT,
                         "header: CRC-32C is %08" PRIx32 " but %08" PRIx32 " was stored", crc,
                         stored_crc);
    }
    uint32_t version = krul_load_u32(header + KRUL_STORE_AT_VERSION);
    if (version != KRUL_STORE_VERSION) {
        return krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                         "the file has format version %" PRIu32 " but this krul reads version %d",
                         version, KRUL_STORE_VERSION);
    }
    uint32_t n_entries = krul_load_u32(header + KRUL_STORE_AT_N_ENTRIES);
    if (n_entries > KRUL_STORE_MAX_ENTRIES) {
        return krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                         "n_entries is %" PRIu32 " but at most %d are read", n_entries,
                         KRUL_STORE_MAX_ENTRIES);
    }
    *n_bytes_out = KRUL_STORE_HEADER_BYTES + (size_t)n_entries * KRUL_STORE_ENTRY_BYTES;
    return KRUL_STATUS_OK;
}

/* Fields that the table's rules bound later are only moved here; those that would not survive the
 * move into a signed field are refused. */
static krul_status
parse_entry(const uint8_t *bytes, int64_t index, krul_store_entry *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    uint16_t kind = krul_load_u16(bytes + KRUL_STORE_AT_ENTRY_KIND);
    KRUL_TRY(check_between(kind, KRUL_STORE_ENTRY_BLOCK, KRUL_STORE_ENTRY_BEHAVIOUR, "kind", index,
                           KRUL_STATUS_BAD_FORMAT, err));
    if (!are_zero(bytes + KRUL_STORE_AT_ENTRY_RESERVED,
                  KRUL_STORE_AT_LAYER_LOWER - KRUL_STORE_AT_ENTRY_RESERVED)) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                           "entry %" PRId64 ": reserved bytes are not zero", index));
    }
    *out = (krul_store_entry){
        .kind = (krul_store_entry_kind)kind,
        .codec = (krul_codec)bytes[KRUL_STORE_AT_CODEC],
        .kv = (krul_kv)bytes[KRUL_STORE_AT_KV],
        .dtype = (krul_dtype)bytes[KRUL_STORE_AT_DTYPE],
        .layer_lower = (int32_t)krul_load_u32(bytes + KRUL_STORE_AT_LAYER_LOWER),
        .layer_upper = (int32_t)krul_load_u32(bytes + KRUL_STORE_AT_LAYER_UPPER),
        .n_batch = (int32_t)krul_load_u32(bytes + KRUL_STORE_AT_N_BATCH),
        .n_heads = (int32_t)krul_load_u32(bytes + KRUL_STORE_AT_N_HEADS),
        .head_dim = (int32_t)krul_load_u32(bytes + KRUL_STORE_AT_HEAD_DIM),
        .token_start = (int64_t)krul_load_u64(bytes + KRUL_STORE_AT_TOKEN_START),
        .n_tokens = (int64_t)krul_load_u64(bytes + KRUL_STORE_AT_N_TOKENS),
        .offset = krul_load_u64(bytes + KRUL_STORE_AT_OFFSET),
        .payload_bytes = krul_load_u64(bytes + KRUL_STORE_AT_PAYLOAD_BYTES),
        .payload_crc32c = krul_load_u32(bytes + KRUL_STORE_AT_PAYLOAD_CRC32C),
    };
done:
    return status;
}

/* Every payload begins where the one before it ends, rounded up, and the last one ends the file:
 * there is one right offset for each, so nothing can overlap, lie outside, or hide in a gap. */
static krul_status
check_offsets(const krul_store_entry *entries, int64_t n_entries, uint64_t head_bytes,
              uint64_t file_bytes, krul_error *err)
{
    uint64_t end = head_bytes;
    for (int64_t i = 0; i < n_entries; i++) {
        uint64_t offset = 0;
        if (!krul_store_align(end, &offset) || entries[i].offset != offset) {
            return krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                             "entry %" PRId64 ": offset is %" PRIu64 " but must be %" PRIu64, i,
                             entries[i].offset, offset);
        }
        if (offset > file_bytes || entries[i].payload_bytes > file_bytes - offset) {
            return krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                             "entry %" PRId64 ": payload of %" PRIu64 " bytes at %" PRIu64
                             " does not fit into a file of %" PRIu64 " bytes",
                             i, entries[i].payload_bytes, offset, file_bytes);
        }
        end = offset + entries[i].payload_bytes;
    }
    if (end != file_bytes) {
        return krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                         "the last payload ends at %" PRIu64 " but the file at %" PRIu64, end,
                         file_bytes);
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_store_parse(const uint8_t *bytes, size_t n_bytes, uint64_t file_bytes, krul_store_head *out,
                 krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_store_entry *entries = NULL;
    size_t head_bytes = 0;
    KRUL_TRY(krul_store_head_bytes(bytes, n_bytes, &head_bytes, err));

    uint64_t stored_file_bytes = krul_load_u64(bytes + KRUL_STORE_AT_FILE_BYTES);
    if (stored_file_bytes != file_bytes) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_CORRUPT,
                           "%s: the file has %" PRIu64 " bytes but was written with %" PRIu64,
                           file_bytes < stored_file_bytes ? "truncated" : "too long", file_bytes,
                           stored_file_bytes));
    }
    if (n_bytes < head_bytes) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_CORRUPT,
                           "truncated: %zu bytes but header and table have %zu", n_bytes,
                           head_bytes));
    }
    const uint8_t *table = bytes + KRUL_STORE_HEADER_BYTES;
    uint32_t crc = krul_store_crc32c(0, table, head_bytes - KRUL_STORE_HEADER_BYTES);
    uint32_t stored_crc = krul_load_u32(bytes + KRUL_STORE_AT_TABLE_CRC32C);
    if (crc != stored_crc) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_CORRUPT,
                           "table of entries: CRC-32C is %08" PRIx32 " but %08" PRIx32
                           " was stored",
                           crc, stored_crc));
    }
    if (!are_zero(bytes + KRUL_STORE_AT_HEADER_RESERVED,
                  KRUL_STORE_AT_HEADER_CRC32C - KRUL_STORE_AT_HEADER_RESERVED)) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_BAD_FORMAT, "header: reserved bytes are not zero"));
    }

    uint32_t kind = krul_load_u32(bytes + KRUL_STORE_AT_KIND);
    if (kind < KRUL_STORE_MANIFEST || kind > KRUL_STORE_SEGMENT) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                           "kind of file is %" PRIu32 " but the last known is %d", kind,
                           KRUL_STORE_SEGMENT));
    }
    int32_t n_entries = (int32_t)krul_load_u32(bytes + KRUL_STORE_AT_N_ENTRIES);
    entries = malloc(((size_t)n_entries + 1) * sizeof *entries);
    if (entries == NULL) {
        KRUL_TRY(
            krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %" PRId32 " entries", n_entries));
    }
    for (int32_t i = 0; i < n_entries; i++) {
        KRUL_TRY(parse_entry(table + (size_t)i * KRUL_STORE_ENTRY_BYTES, i, &entries[i], err));
    }
    KRUL_TRY(krul_store_check_table((krul_store_kind)kind, entries, n_entries,
                                    KRUL_STATUS_BAD_FORMAT, err));
    KRUL_TRY(check_offsets(entries, n_entries, head_bytes, file_bytes, err));

    *out = (krul_store_head){
        .kind = (krul_store_kind)kind,
        .version = KRUL_STORE_VERSION,
        .file_bytes = file_bytes,
        .n_entries = n_entries,
        .entries = entries,
    };
    entries = NULL;
done:
    free(entries);
    return status;
}

void
krul_store_head_close(krul_store_head *head)
{
    free(head->entries);
    *head = (krul_store_head){0};
}

/* ---- reading ----------------------------------------------------------------------------------- */

/* All n_bytes or a failure: a call may be interrupted or bring less than was asked for. */
static krul_status
read_all(int fd, uint64_t offset, uint8_t *out, uint64_t n_bytes, const char *what, krul_error *err)
{
    uint64_t n_done = 0;
    if (offset > INT64_MAX || n_bytes > INT64_MAX - offset) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "%s: %" PRIu64 " bytes at %" PRIu64 " are beyond what a file can hold",
                         what, n_bytes, offset);
    }
    while (n_done < n_bytes) {
        uint64_t want = n_bytes - n_done < MAX_READ_BYTES ? n_bytes - n_done : MAX_READ_BYTES;
        ssize_t got = pread(fd, out + n_done, (size_t)want, (off_t)(offset + n_done));
        if (got > 0) {
            n_done += (uint64_t)got;
        }
        else if (got == 0) {
            return krul_fail(err, KRUL_STATUS_CORRUPT,
                             "truncated: %s has %" PRIu64 " bytes at %" PRIu64
                             " but the file ends after %" PRIu64 " of them",
                             what, n_bytes, offset, n_done);
        }
        else if (errno != EINTR) {
            return krul_fail_errno(err, errno, "reading %s, %" PRIu64 " bytes at %" PRIu64, what,
                                   n_bytes, offset);
        }
    }
    return KRUL_STATUS_OK;
}

krul_status
krul_store_read_head(int fd, krul_store_head *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    uint8_t header[KRUL_STORE_HEADER_BYTES] = {0};
    uint8_t *head = NULL;
    size_t head_bytes = 0;
    struct stat about;
    if (fstat(fd, &about) != 0) {
        KRUL_TRY(krul_fail_errno(err, errno, "asking for the size of descriptor %d", fd));
    }
    if (!S_ISREG(about.st_mode)) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_BAD_FORMAT,
                           "not a krul file: a file of mode %o is not a regular file",
                           (unsigned)about.st_mode));
    }
    uint64_t file_bytes = (uint64_t)about.st_size;
    size_t header_bytes = file_bytes < sizeof header ? (size_t)file_bytes : sizeof header;
    KRUL_TRY(read_all(fd, 0, header, header_bytes, "the header", err));
    KRUL_TRY(krul_store_head_bytes(header, header_bytes, &head_bytes, err));
    /* Bound the allocation by the file before making it. */
    if (head_bytes > file_bytes) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_CORRUPT,
                           "truncated: the file has %" PRIu64
                           " bytes but header and table have %zu",
                           file_bytes, head_bytes));
    }
    head = malloc(head_bytes);
    if (head == NULL) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a table of %zu bytes",
                           head_bytes));
    }
    memcpy(head, header, sizeof header);
    KRUL_TRY(read_all(fd, sizeof header, head + sizeof header, head_bytes - sizeof header,
                      "the table of entries", err));
    KRUL_TRY(krul_store_parse(head, head_bytes, file_bytes, out, err));
done:
    free(head);
    return status;
}

krul_status
krul_store_read_payload(int fd, const krul_store_entry *entry, uint8_t *out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    KRUL_TRY(read_all(fd, entry->offset, out, entry->payload_bytes, "a payload", err));
    uint32_t crc = krul_store_crc32c(0, out, (size_t)entry->payload_bytes);
    if (crc != entry->payload_crc32c) {
        KRUL_TRY(krul_fail(err, KRUL_STATUS_CORRUPT,
                           "payload of %" PRIu64 " bytes at %" PRIu64 ": CRC-32C is %08" PRIx32
                           " but %08" PRIx32 " was stored",
                           entry->payload_bytes, entry->offset, crc, entry->payload_crc32c));
    }
done:
    return status;
}

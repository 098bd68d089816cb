/* test_store.c - checksums, and containers written, read, and broken in every way there is. */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "store.h"

/* ---- checksums --------------------------------------------------------------------------------- */

/* The definition, one bit at a time. */
static uint32_t
crc32c_by_bit(uint32_t crc, const uint8_t *bytes, size_t n_bytes)
{
    crc = ~crc;
    for (size_t i = 0; i < n_bytes; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc & 1u) != 0 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
        }
    }
    return ~crc;
}

static void
test_crc32c(void)
{
    /* The vectors of RFC 3720, B.4, and the usual nine digits. */
    uint8_t bytes[32];
    CHECK(krul_store_crc32c(0, "123456789", 9) == 0xe3069283u);
    memset(bytes, 0, sizeof bytes);
    CHECK(krul_store_crc32c(0, bytes, 32) == 0x8a9136aau);
    memset(bytes, 0xff, sizeof bytes);
    CHECK(krul_store_crc32c(0, bytes, 32) == 0x62a8ab43u);
    for (size_t i = 0; i < 32; i++) {
        bytes[i] = (uint8_t)i;
    }
    CHECK(krul_store_crc32c(0, bytes, 32) == 0x46dd794eu);
    CHECK(krul_store_crc32c(7, NULL, 0) == 7);

    /* Sizes around each stretch of the fast path, at every alignment. */
    enum { N_BYTES = 40000 };
    static const size_t sizes[] = {0,    1,    2,     7,     8,     9,     63,    64,    255,  256,
                                   257,  271,  511,   512,   513,   767,   768,   769,   1535, 1536,
                                   4095, 4096, 12287, 12288, 12289, 13056, 24576, 25345, 39990};
    uint8_t *noise = malloc(N_BYTES);
    uint32_t state = 12345;
    for (size_t i = 0; i < N_BYTES; i++) {
        state = state * 1664525u + 1013904223u;
        noise[i] = (uint8_t)(state >> 24);
    }
    for (size_t i = 0; i < KRUL_LENGTH(sizes); i++) {
        for (size_t start = 0; start < 9; start++) {
            uint32_t wanted = crc32c_by_bit(start == 3 ? 99 : 0, noise + start, sizes[i]);
            uint32_t crc = start == 3 ? 99 : 0;
            CHECK(krul_store_crc32c_by_table(crc, noise + start, sizes[i]) == wanted);
            CHECK(krul_store_crc32c_by_instruction(crc, noise + start, sizes[i]) == wanted);
            CHECK(krul_store_crc32c(crc, noise + start, sizes[i]) == wanted);
        }
    }
    /* Continued over any cut, a checksum is that of the whole. */
    uint32_t whole = krul_store_crc32c(0, noise, N_BYTES);
    for (size_t cut = 0; cut <= N_BYTES; cut += 1999) {
        uint32_t first = krul_store_crc32c(0, noise, cut);
        CHECK(krul_store_crc32c(first, noise + cut, N_BYTES - cut) == whole);
    }
    free(noise);
}

/* ---- a small file in a directory of its own ----------------------------------------------------- */

static char directory[64];
static int directory_fd = -1;

static void
make_directory(void)
{
    snprintf(directory, sizeof directory, "/tmp/krul-test-store-XXXXXX");
    CHECK(mkdtemp(directory) != NULL);
    directory_fd = open(directory, O_RDONLY | O_DIRECTORY);
    CHECK(directory_fd >= 0);
}

static int
count_files(void)
{
    int n_files = 0;
    DIR *listing = opendir(directory);
    for (struct dirent *item = readdir(listing); item != NULL; item = readdir(listing)) {
        n_files += strcmp(item->d_name, ".") != 0 && strcmp(item->d_name, "..") != 0;
    }
    closedir(listing);
    return n_files;
}

static void
remove_directory(void)
{
    DIR *listing = opendir(directory);
    for (struct dirent *item = readdir(listing); item != NULL; item = readdir(listing)) {
        (void)unlinkat(directory_fd, item->d_name, 0);
    }
    closedir(listing);
    close(directory_fd);
    CHECK(rmdir(directory) == 0);
}

enum { N_BLOCKS = 4 };

static const uint8_t *const block_payloads[N_BLOCKS] = {
    (const uint8_t *)"one", (const uint8_t *)"the second payload", (const uint8_t *)"3",
    (const uint8_t *)"a payload that is longer than the sixty-four bytes of one alignment step!"};

static void
make_blocks(krul_store_entry entries[N_BLOCKS])
{
    for (int i = 0; i < N_BLOCKS; i++) {
        entries[i] = (krul_store_entry){
            .kind = KRUL_STORE_ENTRY_BLOCK,
            .codec = KRUL_CODEC_INT8,
            .kv = i % 2 == 0 ? KRUL_KV_KEY : KRUL_KV_VALUE,
            .dtype = KRUL_DTYPE_BF16,
            .layer_lower = i / 2,
            .layer_upper = -1,
            .n_batch = 1,
            .n_heads = 2,
            .head_dim = 8,
            .token_start = 10,
            .n_tokens = 5,
            .payload_bytes = strlen((const char *)block_payloads[i]),
        };
    }
}

static krul_status
write_blocks(const char *name, krul_error *err)
{
    krul_store_entry entries[N_BLOCKS];
    make_blocks(entries);
    return krul_store_write(directory_fd, name, KRUL_STORE_SEGMENT, entries, block_payloads,
                            N_BLOCKS, NULL, err);
}

/* The bytes of a file, the caller's to free. */
static uint8_t *
slurp(const char *name, size_t *n_bytes_out)
{
    int fd = openat(directory_fd, name, O_RDONLY);
    struct stat about;
    CHECK(fd >= 0 && fstat(fd, &about) == 0);
    size_t n_bytes = (size_t)about.st_size;
    uint8_t *bytes = malloc(n_bytes + 1);
    CHECK(pread(fd, bytes, n_bytes, 0) == (ssize_t)n_bytes);
    close(fd);
    *n_bytes_out = n_bytes;
    return bytes;
}

static void
test_round_trip(void)
{
    krul_error err;
    krul_store_entry entries[N_BLOCKS];
    krul_store_head head;
    uint64_t file_bytes = 0;
    make_blocks(entries);
    CHECK(krul_store_write(directory_fd, "segment-1", KRUL_STORE_SEGMENT, entries, block_payloads,
                           N_BLOCKS, &file_bytes, &err) == KRUL_STATUS_OK);
    CHECK(file_bytes == entries[3].offset + entries[3].payload_bytes);
    CHECK(count_files() == 1);

    int fd = openat(directory_fd, "segment-1", O_RDONLY);
    struct stat about;
    CHECK(fstat(fd, &about) == 0 && (about.st_mode & 0777) == 0600);
    CHECK((uint64_t)about.st_size == file_bytes);
    CHECK(krul_store_read_head(fd, &head, &err) == KRUL_STATUS_OK);
    CHECK(head.kind == KRUL_STORE_SEGMENT && head.version == KRUL_STORE_VERSION);
    CHECK(head.file_bytes == file_bytes && head.n_entries == N_BLOCKS);
    for (int i = 0; i < N_BLOCKS; i++) {
        const krul_store_entry *found = &head.entries[i];
        const krul_store_entry *wanted = &entries[i];
        uint8_t payload[128];
        CHECK(found->kind == wanted->kind && found->codec == wanted->codec);
        CHECK(found->kv == wanted->kv && found->dtype == wanted->dtype);
        CHECK(found->layer_lower == wanted->layer_lower && found->layer_upper == -1);
        CHECK(found->n_batch == 1 && found->n_heads == 2 && found->head_dim == 8);
        CHECK(found->token_start == 10 && found->n_tokens == 5);
        CHECK(found->offset == wanted->offset && found->offset % KRUL_STORE_ALIGNMENT == 0);
        CHECK(found->payload_crc32c == wanted->payload_crc32c);
        CHECK(krul_store_read_payload(fd, found, payload, &err) == KRUL_STATUS_OK);
        CHECK(memcmp(payload, block_payloads[i], (size_t)found->payload_bytes) == 0);
    }
    krul_store_head_close(&head);
    CHECK(head.entries == NULL && head.n_entries == 0);
    close(fd);
}

/* More blocks than one writev takes. */
static void
test_many_blocks(void)
{
    enum { N_MANY = 1000 };
    krul_error err;
    krul_store_head head;
    krul_store_entry *entries = calloc(N_MANY, sizeof *entries);
    const uint8_t **payloads = calloc(N_MANY, sizeof *payloads);
    uint8_t *bytes = malloc(N_MANY);
    for (int i = 0; i < N_MANY; i++) {
        bytes[i] = (uint8_t)i;
        payloads[i] = bytes;
        krul_store_entry blocks[N_BLOCKS];
        make_blocks(blocks);
        entries[i] = blocks[0];
        entries[i].layer_lower = i;
        entries[i].payload_bytes = (uint64_t)(i + 1);
    }
    CHECK(krul_store_write(directory_fd, "segment-2", KRUL_STORE_SEGMENT, entries, payloads, N_MANY,
                           NULL, &err) == KRUL_STATUS_OK);
    int fd = openat(directory_fd, "segment-2", O_RDONLY);
    CHECK(krul_store_read_head(fd, &head, &err) == KRUL_STATUS_OK);
    uint8_t *payload = malloc(N_MANY);
    for (int i = 0; i < head.n_entries; i++) {
        CHECK(krul_store_read_payload(fd, &head.entries[i], payload, &err) == KRUL_STATUS_OK);
        CHECK(memcmp(payload, bytes, (size_t)i + 1) == 0);
    }
    CHECK(head.n_entries == N_MANY);
    krul_store_head_close(&head);
    close(fd);
    free(payload);
    free(bytes);
    free(payloads);
    free(entries);
}

/* ---- damage ------------------------------------------------------------------------------------ */

static bool
is_refusal(krul_status status, const krul_error *err)
{
    bool is_known = status == KRUL_STATUS_CORRUPT || status == KRUL_STATUS_BAD_FORMAT;
    return is_known && err->status == status && err->message[0] != '\0';
}

static void
test_truncations(void)
{
    krul_error err;
    size_t n_bytes = 0;
    CHECK(write_blocks("segment-3", &err) == KRUL_STATUS_OK);
    uint8_t *bytes = slurp("segment-3", &n_bytes);
    int fd = openat(directory_fd, "short", O_RDWR | O_CREAT, 0600);
    CHECK(pwrite(fd, bytes, n_bytes, 0) == (ssize_t)n_bytes);
    for (size_t length = n_bytes; length-- > 0;) {
        krul_store_head head = {0};
        CHECK(is_refusal(krul_store_parse(bytes, length, length, &head, &err), &err));
        CHECK(head.entries == NULL);
        CHECK(ftruncate(fd, (off_t)length) == 0);
        CHECK(is_refusal(krul_store_read_head(fd, &head, &err), &err));
        /* The header alone must not be believed either. */
        if (length >= KRUL_STORE_HEADER_BYTES) {
            krul_status status = krul_store_parse(bytes, length, n_bytes, &head, &err);
            size_t head_bytes = KRUL_STORE_HEADER_BYTES + N_BLOCKS * KRUL_STORE_ENTRY_BYTES;
            CHECK((status == KRUL_STATUS_OK) == (length >= head_bytes));
            if (status == KRUL_STATUS_OK) {
                krul_store_head_close(&head);
            }
        }
    }
    close(fd);
    /* One byte too many. */
    krul_store_head head = {0};
    bytes[n_bytes] = 0;
    CHECK(krul_store_parse(bytes, n_bytes + 1, n_bytes + 1, &head, &err) == KRUL_STATUS_CORRUPT);
    CHECK(strstr(err.message, "too long") != NULL);
    free(bytes);
}

/* Flip every bit of every byte: caught by the head, by the payload, or in the padding. */
static void
test_flips(void)
{
    krul_error err;
    size_t n_bytes = 0;
    uint8_t *bytes = slurp("segment-3", &n_bytes);
    krul_store_head good;
    CHECK(krul_store_parse(bytes, n_bytes, n_bytes, &good, &err) == KRUL_STATUS_OK);
    for (size_t i = 0; i < n_bytes; i++) {
        bool is_covered = i < good.entries[0].offset;
        for (int j = 0; j < good.n_entries; j++) {
            uint64_t start = good.entries[j].offset;
            is_covered = is_covered || (i >= start && i < start + good.entries[j].payload_bytes);
        }
        for (int bit = 0; bit < 8; bit++) {
            krul_store_head head = {0};
            bytes[i] ^= (uint8_t)(1 << bit);
            krul_status status = krul_store_parse(bytes, n_bytes, n_bytes, &head, &err);
            bool is_caught = status != KRUL_STATUS_OK && is_refusal(status, &err);
            for (int j = 0; status == KRUL_STATUS_OK && j < head.n_entries; j++) {
                const krul_store_entry *entry = &head.entries[j];
                is_caught = is_caught || krul_store_crc32c(0, bytes + entry->offset,
                                                           (size_t)entry->payload_bytes) !=
                                             entry->payload_crc32c;
            }
            CHECK(is_caught == is_covered);
            krul_store_head_close(&head);
            bytes[i] ^= (uint8_t)(1 << bit);
        }
    }
    krul_store_head_close(&good);
    free(bytes);
}

/* Put the checksums right again after a change, so that only the rules are left to notice it. */
static void
seal(uint8_t *bytes)
{
    size_t table_bytes = (size_t)krul_load_u32(bytes + KRUL_STORE_AT_N_ENTRIES) *
                         KRUL_STORE_ENTRY_BYTES;
    krul_store_u32(bytes + KRUL_STORE_AT_TABLE_CRC32C,
                   crc32c_by_bit(0, bytes + KRUL_STORE_HEADER_BYTES, table_bytes));
    krul_store_u32(bytes + KRUL_STORE_AT_HEADER_CRC32C,
                   crc32c_by_bit(0, bytes, KRUL_STORE_AT_HEADER_CRC32C));
}

/* A change to a good segment: `n_bytes` bytes of `value` at `at`. */
typedef struct change {
    const char *words; /* that the message must have */
    size_t at;
    int n_bytes;
    uint64_t value;
} change;

enum {
    ENTRY_0 = KRUL_STORE_HEADER_BYTES,
    ENTRY_1 = ENTRY_0 + KRUL_STORE_ENTRY_BYTES,
    ENTRY_2 = ENTRY_1 + KRUL_STORE_ENTRY_BYTES,
    ENTRY_3 = ENTRY_2 + KRUL_STORE_ENTRY_BYTES,
};

static const change changes[] = {
    {"version 2 but this krul reads version 1", KRUL_STORE_AT_VERSION, 4, 2},
    {"version 0", KRUL_STORE_AT_VERSION, 4, 0},
    {"kind of file is 3", KRUL_STORE_AT_KIND, 4, 3},
    {"kind of file is 0", KRUL_STORE_AT_KIND, 4, 0},
    {"kind in a manifest is 1", KRUL_STORE_AT_KIND, 4, KRUL_STORE_MANIFEST},
    {"header: reserved", KRUL_STORE_AT_HEADER_RESERVED + 27, 1, 1},
    {"header: reserved", KRUL_STORE_AT_HEADER_RESERVED, 1, 1},
    {"kind is 7", ENTRY_0 + KRUL_STORE_AT_ENTRY_KIND, 2, 7},
    {"kind is 0", ENTRY_0 + KRUL_STORE_AT_ENTRY_KIND, 2, 0},
    {"kind in a segment is 2", ENTRY_0 + KRUL_STORE_AT_ENTRY_KIND, 2, KRUL_STORE_ENTRY_META},
    {"codec is 0", ENTRY_0 + KRUL_STORE_AT_CODEC, 1, 0},
    {"codec is 8", ENTRY_1 + KRUL_STORE_AT_CODEC, 1, 8},
    {"codec is 255", ENTRY_1 + KRUL_STORE_AT_CODEC, 1, 255},
    {"takes 2 layer(s) but the entry has 1", ENTRY_1 + KRUL_STORE_AT_CODEC, 1, KRUL_CODEC_SHARE},
    {"kv is 3", ENTRY_1 + KRUL_STORE_AT_KV, 1, 3},
    {"codec int8 has the kv 2", ENTRY_1 + KRUL_STORE_AT_KV, 1, 2},
    {"codec predict has the kv", ENTRY_1 + KRUL_STORE_AT_CODEC, 1, KRUL_CODEC_PREDICT},
    {"dtype is 0", ENTRY_1 + KRUL_STORE_AT_DTYPE, 1, 0},
    {"dtype is 4", ENTRY_1 + KRUL_STORE_AT_DTYPE, 1, 4},
    {"entry 1: reserved", ENTRY_1 + KRUL_STORE_AT_ENTRY_RESERVED, 1, 1},
    {"entry 1: reserved", ENTRY_1 + KRUL_STORE_AT_ENTRY_RESERVED + 2, 1, 255},
    {"layer_lower is -1", ENTRY_1 + KRUL_STORE_AT_LAYER_LOWER, 4, 0xffffffffu},
    {"layer_lower is 65536", ENTRY_3 + KRUL_STORE_AT_LAYER_LOWER, 4, 65536},
    {"layer_upper is 0", ENTRY_1 + KRUL_STORE_AT_LAYER_UPPER, 4, 0},
    {"layer_upper is -2", ENTRY_1 + KRUL_STORE_AT_LAYER_UPPER, 4, 0xfffffffeu},
    {"layer_upper is 65536", ENTRY_1 + KRUL_STORE_AT_LAYER_UPPER, 4, 65536},
    {"takes 1 layer(s) but the entry has 2", ENTRY_1 + KRUL_STORE_AT_LAYER_UPPER, 4, 5},
    {"n_batch is 0", ENTRY_1 + KRUL_STORE_AT_N_BATCH, 4, 0},
    {"n_batch is -1", ENTRY_1 + KRUL_STORE_AT_N_BATCH, 4, 0xffffffffu},
    {"n_batch is 65537", ENTRY_1 + KRUL_STORE_AT_N_BATCH, 4, 65537},
    {"n_heads is 0", ENTRY_1 + KRUL_STORE_AT_N_HEADS, 4, 0},
    {"n_heads is 65537", ENTRY_1 + KRUL_STORE_AT_N_HEADS, 4, 65537},
    {"head_dim is 0", ENTRY_1 + KRUL_STORE_AT_HEAD_DIM, 4, 0},
    {"head_dim is 65537", ENTRY_1 + KRUL_STORE_AT_HEAD_DIM, 4, 65537},
    {"n_tokens is 0", ENTRY_1 + KRUL_STORE_AT_N_TOKENS, 8, 0},
    {"n_tokens is -1", ENTRY_1 + KRUL_STORE_AT_N_TOKENS, 8, UINT64_MAX},
    {"n_tokens is 1073741825", ENTRY_1 + KRUL_STORE_AT_N_TOKENS, 8, (1u << 30) + 1},
    {"token_start is -1", ENTRY_1 + KRUL_STORE_AT_TOKEN_START, 8, UINT64_MAX},
    {"token_start is 1073741820", ENTRY_1 + KRUL_STORE_AT_TOKEN_START, 8, (1u << 30) - 4},
    {"more than 1073741824 bytes", ENTRY_1 + KRUL_STORE_AT_N_TOKENS, 8, (1u << 30) - 10},
    {"more than 1073741824 bytes", ENTRY_1 + KRUL_STORE_AT_N_TOKENS, 8, (1u << 25) + 1},
    {"comes after layer 0, kv 1", ENTRY_2 + KRUL_STORE_AT_LAYER_LOWER, 4, 0},
    {"token 10 comes after layer 1, kv 0, token 14", ENTRY_3 + KRUL_STORE_AT_KV, 1, 0},
    {"offset is 0 but must be 320", ENTRY_0 + KRUL_STORE_AT_OFFSET, 8, 0},
    {"offset is 448 but must be 384", ENTRY_1 + KRUL_STORE_AT_OFFSET, 8, 448},
    {"offset is 385 but must be 384", ENTRY_1 + KRUL_STORE_AT_OFFSET, 8, 385},
    {"offset is 18446744073709551552", ENTRY_1 + KRUL_STORE_AT_OFFSET, 8, (uint64_t)-64},
    {"payload_bytes is 0", ENTRY_1 + KRUL_STORE_AT_PAYLOAD_BYTES, 8, 0},
    {"does not fit", ENTRY_1 + KRUL_STORE_AT_PAYLOAD_BYTES, 8, UINT64_MAX},
    {"does not fit", ENTRY_1 + KRUL_STORE_AT_PAYLOAD_BYTES, 8, (uint64_t)INT64_MAX},
    {"must be", ENTRY_1 + KRUL_STORE_AT_PAYLOAD_BYTES, 8, 100},
    {"the last payload ends at", ENTRY_3 + KRUL_STORE_AT_PAYLOAD_BYTES, 8, 70},
    {"does not fit", ENTRY_3 + KRUL_STORE_AT_PAYLOAD_BYTES, 8, 74},
    {"n_entries is 0", KRUL_STORE_AT_N_ENTRIES, 4, 0},
    {"offset is 320 but must be 256", KRUL_STORE_AT_N_ENTRIES, 4, 3},
};

static void
test_rules(void)
{
    size_t n_bytes = 0;
    uint8_t *good = slurp("segment-3", &n_bytes);
    uint8_t *bytes = malloc(n_bytes);
    for (size_t i = 0; i < KRUL_LENGTH(changes); i++) {
        krul_error err = {0};
        krul_store_head head = {0};
        memcpy(bytes, good, n_bytes);
        for (int j = 0; j < changes[i].n_bytes; j++) {
            bytes[changes[i].at + (size_t)j] = (uint8_t)(changes[i].value >> 8 * j);
        }
        seal(bytes);
        krul_status status = krul_store_parse(bytes, n_bytes, n_bytes, &head, &err);
        bool is_right = status == KRUL_STATUS_BAD_FORMAT &&
                        strstr(err.message, changes[i].words) != NULL;
        CHECK(is_right);
        if (!is_right) {
            fprintf(stderr, "wanted \"%s\" but got \"%s\"\n", changes[i].words, err.message);
        }
    }
    /* The count of entries is bounded before anything is allocated for it. */
    krul_error err;
    krul_store_head head = {0};
    memcpy(bytes, good, n_bytes);
    krul_store_u32(bytes + KRUL_STORE_AT_N_ENTRIES, UINT32_MAX);
    krul_store_u32(bytes + KRUL_STORE_AT_HEADER_CRC32C,
                   crc32c_by_bit(0, bytes, KRUL_STORE_AT_HEADER_CRC32C));
    CHECK(krul_store_parse(bytes, n_bytes, n_bytes, &head, &err) == KRUL_STATUS_BAD_FORMAT);
    CHECK(strstr(err.message, "4294967295") != NULL);
    krul_store_u32(bytes + KRUL_STORE_AT_N_ENTRIES, KRUL_STORE_MAX_ENTRIES);
    krul_store_u32(bytes + KRUL_STORE_AT_HEADER_CRC32C,
                   crc32c_by_bit(0, bytes, KRUL_STORE_AT_HEADER_CRC32C));
    CHECK(krul_store_parse(bytes, n_bytes, n_bytes, &head, &err) == KRUL_STATUS_CORRUPT);
    free(bytes);
    free(good);
}

/* ---- manifests --------------------------------------------------------------------------------- */

static krul_status
write_manifest(const krul_store_entry_kind *kinds, int32_t n_entries, uint64_t meta_bytes,
               krul_error *err)
{
    krul_store_entry entries[8] = {0};
    const uint8_t *payloads[8];
    uint8_t *zeros = calloc(1, (size_t)meta_bytes + 1);
    for (int32_t i = 0; i < n_entries; i++) {
        entries[i].kind = kinds[i];
        entries[i].payload_bytes = kinds[i] == KRUL_STORE_ENTRY_META ? meta_bytes : 0;
        payloads[i] = zeros;
    }
    krul_status status = krul_store_write(directory_fd, "manifest", KRUL_STORE_MANIFEST, entries,
                                          payloads, n_entries, NULL, err);
    free(zeros);
    return status;
}

static void
test_manifests(void)
{
    krul_error err;
    const krul_store_entry_kind all[] = {KRUL_STORE_ENTRY_META, KRUL_STORE_ENTRY_TOKENS,
                                         KRUL_STORE_ENTRY_MASK, KRUL_STORE_ENTRY_POSITIONS,
                                         KRUL_STORE_ENTRY_BEHAVIOUR};
    const krul_store_entry_kind skipping[] = {KRUL_STORE_ENTRY_META, KRUL_STORE_ENTRY_TOKENS,
                                              KRUL_STORE_ENTRY_BEHAVIOUR};
    const krul_store_entry_kind no_tokens[] = {KRUL_STORE_ENTRY_META, KRUL_STORE_ENTRY_MASK};
    const krul_store_entry_kind twice[] = {KRUL_STORE_ENTRY_META, KRUL_STORE_ENTRY_TOKENS,
                                           KRUL_STORE_ENTRY_TOKENS};
    const krul_store_entry_kind turned[] = {KRUL_STORE_ENTRY_TOKENS, KRUL_STORE_ENTRY_META};
    const krul_store_entry_kind block[] = {KRUL_STORE_ENTRY_META, KRUL_STORE_ENTRY_BLOCK};
    CHECK(write_manifest(all, 5, 2, &err) == KRUL_STATUS_OK);
    CHECK(write_manifest(all, 2, 2, &err) == KRUL_STATUS_OK);
    CHECK(write_manifest(skipping, 3, 2, &err) == KRUL_STATUS_OK);
    int fd = openat(directory_fd, "manifest", O_RDONLY);
    krul_store_head head;
    CHECK(krul_store_read_head(fd, &head, &err) == KRUL_STATUS_OK);
    CHECK(head.kind == KRUL_STORE_MANIFEST && head.n_entries == 3);
    CHECK(head.entries[1].payload_bytes == 0);
    CHECK(krul_store_read_payload(fd, &head.entries[1], NULL, &err) == KRUL_STATUS_OK);
    krul_store_head_close(&head);
    close(fd);

    CHECK(write_manifest(all, 1, 2, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(write_manifest(no_tokens, 2, 2, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(write_manifest(twice, 3, 2, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(write_manifest(turned, 2, 2, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(write_manifest(block, 2, 2, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(write_manifest(all, 5, KRUL_STORE_MAX_META_BYTES + 1, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "67108865") != NULL);

    krul_store_entry meta = {.kind = KRUL_STORE_ENTRY_META, .n_tokens = 1};
    CHECK(krul_store_check_entry(&meta, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "n_tokens is 1 but must be from 0 to 0") != NULL);
    meta.n_tokens = 0;
    CHECK(krul_store_check_entry(&meta, &err) == KRUL_STATUS_OK);
    meta.kind = (krul_store_entry_kind)9;
    CHECK(krul_store_check_entry(&meta, &err) == KRUL_STATUS_BAD_VALUE);
    krul_store_entry blocks[N_BLOCKS];
    make_blocks(blocks);
    CHECK(krul_store_check_entry(&blocks[1], &err) == KRUL_STATUS_OK);
    blocks[1].codec = KRUL_CODEC_EXACT;
    blocks[1].layer_upper = 9;
    CHECK(krul_store_check_entry(&blocks[1], &err) == KRUL_STATUS_OK);
    blocks[1].head_dim = 0;
    CHECK(krul_store_check_entry(&blocks[1], NULL) == KRUL_STATUS_BAD_VALUE);
}

/* ---- failures of the system -------------------------------------------------------------------- */

static void
test_bad_writes(void)
{
    krul_error err;
    krul_store_entry entries[N_BLOCKS];
    const char *bad_names[] = {"", ".", "..", ".hidden", "a/b", "/etc/passwd"};
    char long_name[200];
    for (size_t i = 0; i < KRUL_LENGTH(bad_names); i++) {
        CHECK(write_blocks(bad_names[i], &err) == KRUL_STATUS_BAD_VALUE);
    }
    memset(long_name, 'n', sizeof long_name);
    long_name[sizeof long_name - 1] = '\0';
    CHECK(write_blocks(long_name, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(err.message, "199 bytes") != NULL);

    make_blocks(entries);
    CHECK(krul_store_write(-1, "segment", KRUL_STORE_SEGMENT, entries, block_payloads, N_BLOCKS,
                           NULL, &err) == KRUL_STATUS_IO);
    CHECK(err.code != 0);
    CHECK(krul_store_write(directory_fd, "segment", (krul_store_kind)3, entries, block_payloads,
                           N_BLOCKS, NULL, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_store_write(directory_fd, "segment", KRUL_STORE_SEGMENT, entries, block_payloads, 0,
                           NULL, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_store_write(directory_fd, "segment", KRUL_STORE_SEGMENT, entries, block_payloads, -1,
                           NULL, &err) == KRUL_STATUS_BAD_VALUE);
    entries[2].codec = (krul_codec)99;
    CHECK(krul_store_write(directory_fd, "segment", KRUL_STORE_SEGMENT, entries, block_payloads,
                           N_BLOCKS, NULL, &err) == KRUL_STATUS_BAD_VALUE);
    make_blocks(entries);
    entries[3].payload_bytes = 0;
    CHECK(krul_store_write(directory_fd, "segment", KRUL_STORE_SEGMENT, entries, block_payloads,
                           N_BLOCKS, NULL, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(faccessat(directory_fd, "segment", F_OK, 0) != 0);

    /* A directory stands where the file should go: the rename fails, nothing is left behind. */
    int n_before = count_files();
    CHECK(mkdirat(directory_fd, "segment", 0700) == 0);
    CHECK(write_blocks("segment", &err) == KRUL_STATUS_IO);
    CHECK(strstr(err.message, "segment") != NULL);
    CHECK(unlinkat(directory_fd, "segment", AT_REMOVEDIR) == 0);
    CHECK(count_files() == n_before);
}

/* The size limit of files stands for a full disk: both fail in the middle of a write. */
static void
test_full(void)
{
    krul_error err;
    size_t n_before = 0, n_after = 0;
    struct rlimit old_limit;
    CHECK(write_blocks("segment-4", &err) == KRUL_STATUS_OK);
    uint8_t *before = slurp("segment-4", &n_before);
    int n_files = count_files();
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    CHECK(getrlimit(RLIMIT_FSIZE, &old_limit) == 0);
    for (rlim_t n_bytes = 0; n_bytes < n_before; n_bytes += 100) {
        struct rlimit limit = {.rlim_cur = n_bytes, .rlim_max = old_limit.rlim_max};
        CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
        CHECK(write_blocks("segment-4", &err) == KRUL_STATUS_STORE_FULL);
        CHECK(err.code != 0);
        CHECK(count_files() == n_files);
    }
    CHECK(setrlimit(RLIMIT_FSIZE, &old_limit) == 0);
    uint8_t *after = slurp("segment-4", &n_after);
    CHECK(n_after == n_before && memcmp(before, after, n_before) == 0);
    free(before);
    free(after);
}

static void
test_bad_reads(void)
{
    krul_error err;
    krul_store_head head = {0};
    uint8_t byte = 0;
    CHECK(krul_store_read_head(-1, &head, &err) == KRUL_STATUS_IO);
    CHECK(krul_store_read_head(directory_fd, &head, &err) == KRUL_STATUS_BAD_FORMAT);
    CHECK(strstr(err.message, "not a regular file") != NULL);
    int ends[2];
    CHECK(pipe(ends) == 0);
    CHECK(krul_store_read_head(ends[0], &head, &err) == KRUL_STATUS_BAD_FORMAT);
    close(ends[0]);
    close(ends[1]);
    CHECK(head.entries == NULL);

    int fd = openat(directory_fd, "segment-4", O_RDONLY);
    krul_store_entry entry = {.offset = 1u << 20, .payload_bytes = 1};
    CHECK(krul_store_read_payload(fd, &entry, &byte, &err) == KRUL_STATUS_CORRUPT);
    entry.offset = UINT64_MAX;
    CHECK(krul_store_read_payload(fd, &entry, &byte, &err) == KRUL_STATUS_BAD_VALUE);
    entry.offset = 0; /* the first byte of the magic, with a wrong checksum */
    CHECK(krul_store_read_payload(fd, &entry, &byte, &err) == KRUL_STATUS_CORRUPT);
    CHECK(strstr(err.message, "CRC-32C") != NULL);
    CHECK(krul_store_read_payload(-1, &entry, &byte, &err) == KRUL_STATUS_IO);
    close(fd);
}

/* ---- threads ----------------------------------------------------------------------------------- */

enum { N_ROUNDS = 30 };

static void *
write_often(void *argument)
{
    bool *is_good = argument;
    for (int i = 0; i < N_ROUNDS; i++) {
        *is_good = *is_good && write_blocks("segment-5", NULL) == KRUL_STATUS_OK;
    }
    return NULL;
}

static void *
read_often(void *argument)
{
    bool *is_good = argument;
    for (int i = 0; i < N_ROUNDS; i++) {
        krul_store_head head = {0};
        uint8_t payload[128];
        int fd = openat(directory_fd, "segment-5", O_RDONLY);
        *is_good = *is_good && krul_store_read_head(fd, &head, NULL) == KRUL_STATUS_OK;
        for (int j = 0; j < head.n_entries; j++) {
            *is_good = *is_good && krul_store_read_payload(fd, &head.entries[j], payload, NULL) ==
                                       KRUL_STATUS_OK;
        }
        krul_store_head_close(&head);
        close(fd);
    }
    return NULL;
}

static void
test_threads(void)
{
    enum { N_THREADS = 4 };
    pthread_t threads[N_THREADS];
    bool is_good[N_THREADS];
    CHECK(write_blocks("segment-5", NULL) == KRUL_STATUS_OK);
    int n_files = count_files();
    for (int i = 0; i < N_THREADS; i++) {
        is_good[i] = true;
        CHECK(pthread_create(&threads[i], NULL, i % 2 == 0 ? write_often : read_often,
                             &is_good[i]) == 0);
    }
    for (int i = 0; i < N_THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(is_good[i]);
    }
    CHECK(count_files() == n_files);
}

int
main(void)
{
    test_crc32c();
    make_directory();
    test_round_trip();
    test_many_blocks();
    test_truncations();
    test_flips();
    test_rules();
    test_manifests();
    test_bad_writes();
    test_full();
    test_bad_reads();
    test_threads();
    remove_directory();
    return check_finish();
}

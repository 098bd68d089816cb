/* store_write.c - a container written so that its name never holds half of one.
 *
 * The bytes go to a temporary file in the same directory, which is fsynced and then renamed: a
 * rename within a directory is atomic, and the fsync before it keeps the name from becoming durable
 * before the bytes. The directory is fsynced last, so that success means durable. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "store.h"

enum {
    MAX_NAME_BYTES = 128,
    MAX_TEMPORARY_BYTES = MAX_NAME_BYTES + 32,
    MAX_ATTEMPTS = 64,
    MAX_PIECES = 256, /* per writev; IOV_MAX is at least 1024 on Linux */
};

static krul_status
check_name(const char *name, krul_error *err)
{
    size_t n_bytes = strlen(name);
    if (n_bytes == 0 || n_bytes > MAX_NAME_BYTES || name[0] == '.' || strchr(name, '/') != NULL) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "name is \"%.64s\" (%zu bytes) but must have 1 to %d bytes, no slash, and "
                         "not begin with a dot",
                         name, n_bytes, MAX_NAME_BYTES);
    }
    return KRUL_STATUS_OK;
}

/* Names are random so that neither another process nor what a killed one left is in the way. */
static krul_status
open_temporary(int directory_fd, const char *name, char temporary_out[MAX_TEMPORARY_BYTES],
               int *fd_out, krul_error *err)
{
    for (int attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
        uint64_t number = 0;
        if (getrandom(&number, sizeof number, GRND_NONBLOCK) != (ssize_t)sizeof number) {
            struct timespec now = {0};
            clock_gettime(CLOCK_MONOTONIC, &now);
            number = (uint64_t)now.tv_nsec << 32 ^ (uint64_t)getpid() << 8 ^ (uint64_t)attempt;
        }
        snprintf(temporary_out, MAX_TEMPORARY_BYTES, ".tmp-%s-%016" PRIx64, name, number);
        int fd = openat(directory_fd, temporary_out, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd >= 0) {
            *fd_out = fd;
            return KRUL_STATUS_OK;
        }
        int errno_value = errno;
        temporary_out[0] = '\0'; /* not ours, so not ours to remove */
        if (errno_value != EEXIST && errno_value != EINTR) {
            return krul_fail_errno(err, errno_value, "creating a temporary file for \"%s\"", name);
        }
    }
    return krul_fail(err, KRUL_STATUS_IO, "no free temporary name for \"%s\" in %d attempts", name,
                     MAX_ATTEMPTS);
}

/* Write all pieces; they are changed on the way, because a call may write a part of them. */
static krul_status
write_pieces(int fd, struct iovec *pieces, int n_pieces, const char *name, krul_error *err)
{
    int first = 0;
    while (first < n_pieces) {
        if (pieces[first].iov_len == 0) {
            first++;
            continue;
        }
        ssize_t written = writev(fd, pieces + first, n_pieces - first);
        if (written < 0) {
            if (errno == EINTR) {
                continue;
            }
            return krul_fail_errno(err, errno, "writing \"%s\"", name);
        }
        size_t left = (size_t)written;
        while (left > 0) {
            size_t taken = left < pieces[first].iov_len ? left : pieces[first].iov_len;
            pieces[first].iov_base = (uint8_t *)pieces[first].iov_base + taken;
            pieces[first].iov_len -= taken;
            left -= taken;
            if (pieces[first].iov_len == 0) {
                first++;
            }
        }
    }
    return KRUL_STATUS_OK;
}

static krul_status
write_file(int fd, uint8_t *head, size_t head_bytes, const krul_store_entry *entries,
           const uint8_t *const *payloads, int32_t n_entries, const char *name, krul_error *err)
{
    static const uint8_t zeros[KRUL_STORE_ALIGNMENT] = {0};
    krul_status status = KRUL_STATUS_OK;
    struct iovec pieces[MAX_PIECES];
    int n_pieces = 0;
    uint64_t end = head_bytes;
    pieces[n_pieces++] = (struct iovec){.iov_base = head, .iov_len = head_bytes};
    for (int32_t i = 0; i < n_entries; i++) {
        if (n_pieces + 2 > MAX_PIECES) {
            KRUL_TRY(write_pieces(fd, pieces, n_pieces, name, err));
            n_pieces = 0;
        }
        /* iovec has no const form; writev reads only. */
        pieces[n_pieces++] = (struct iovec){.iov_base = (void *)(uintptr_t)zeros,
                                            .iov_len = (size_t)(entries[i].offset - end)};
        pieces[n_pieces++] = (struct iovec){.iov_base = (void *)(uintptr_t)payloads[i],
                                            .iov_len = (size_t)entries[i].payload_bytes};
        end = entries[i].offset + entries[i].payload_bytes;
    }
    KRUL_TRY(write_pieces(fd, pieces, n_pieces, name, err));
done:
    return status;
}

static krul_status
sync_file(int fd, const char *what, krul_error *err)
{
    while (fsync(fd) != 0) {
        if (errno != EINTR) {
            return krul_fail_errno(err, errno, "making %s durable", what);
        }
    }
    return KRUL_STATUS_OK;
}

static void
put_entry(const krul_store_entry *entry, uint8_t *out)
{
    memset(out, 0, KRUL_STORE_ENTRY_BYTES);
    krul_store_u16(out + KRUL_STORE_AT_ENTRY_KIND, (uint16_t)entry->kind);
    out[KRUL_STORE_AT_CODEC] = (uint8_t)entry->codec;
    out[KRUL_STORE_AT_KV] = (uint8_t)entry->kv;
    out[KRUL_STORE_AT_DTYPE] = (uint8_t)entry->dtype;
    krul_store_u32(out + KRUL_STORE_AT_LAYER_LOWER, (uint32_t)entry->layer_lower);
    krul_store_u32(out + KRUL_STORE_AT_LAYER_UPPER, (uint32_t)entry->layer_upper);
    krul_store_u32(out + KRUL_STORE_AT_N_BATCH, (uint32_t)entry->n_batch);
    krul_store_u32(out + KRUL_STORE_AT_N_HEADS, (uint32_t)entry->n_heads);
    krul_store_u32(out + KRUL_STORE_AT_HEAD_DIM, (uint32_t)entry->head_dim);
    krul_store_u32(out + KRUL_STORE_AT_PAYLOAD_CRC32C, entry->payload_crc32c);
    krul_store_u64(out + KRUL_STORE_AT_TOKEN_START, (uint64_t)entry->token_start);
    krul_store_u64(out + KRUL_STORE_AT_N_TOKENS, (uint64_t)entry->n_tokens);
    krul_store_u64(out + KRUL_STORE_AT_OFFSET, entry->offset);
    krul_store_u64(out + KRUL_STORE_AT_PAYLOAD_BYTES, entry->payload_bytes);
}

static void
put_header(krul_store_kind kind, uint64_t file_bytes, int32_t n_entries, uint8_t *head)
{
    size_t table_bytes = (size_t)n_entries * KRUL_STORE_ENTRY_BYTES;
    memset(head, 0, KRUL_STORE_HEADER_BYTES);
    memcpy(head, krul_store_magic, KRUL_STORE_MAGIC_BYTES);
    krul_store_u32(head + KRUL_STORE_AT_VERSION, KRUL_STORE_VERSION);
    krul_store_u32(head + KRUL_STORE_AT_KIND, (uint32_t)kind);
    krul_store_u64(head + KRUL_STORE_AT_FILE_BYTES, file_bytes);
    krul_store_u32(head + KRUL_STORE_AT_N_ENTRIES, (uint32_t)n_entries);
    krul_store_u32(head + KRUL_STORE_AT_TABLE_CRC32C,
                   krul_store_crc32c(0, head + KRUL_STORE_HEADER_BYTES, table_bytes));
    krul_store_u32(head + KRUL_STORE_AT_HEADER_CRC32C,
                   krul_store_crc32c(0, head, KRUL_STORE_AT_HEADER_CRC32C));
}

krul_status
krul_store_write(int directory_fd, const char *name, krul_store_kind kind,
                 krul_store_entry *entries, const uint8_t *const *payloads, int32_t n_entries,
                 uint64_t *file_bytes_out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_store_entry *placed = NULL;
    uint8_t *head = NULL;
    int fd = -1;
    char temporary[MAX_TEMPORARY_BYTES] = "";
    KRUL_TRY(check_name(name, err));
    KRUL_TRY(krul_store_check_table(kind, entries, n_entries, KRUL_STATUS_BAD_VALUE, err));

    size_t head_bytes = KRUL_STORE_HEADER_BYTES +
                        (size_t)n_entries * (size_t)KRUL_STORE_ENTRY_BYTES;
    head = malloc(head_bytes);
    placed = malloc((size_t)n_entries * sizeof *placed);
    if (head == NULL || placed == NULL) {
        KRUL_TRY(
            krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for %" PRId32 " entries", n_entries));
    }
    uint64_t end = head_bytes;
    for (int32_t i = 0; i < n_entries; i++) {
        uint64_t payload_bytes = entries[i].payload_bytes;
        placed[i] = entries[i];
        if (!krul_store_align(end, &placed[i].offset) || placed[i].offset > INT64_MAX ||
            payload_bytes > INT64_MAX - placed[i].offset) {
            KRUL_TRY(krul_fail(err, KRUL_STATUS_BAD_VALUE,
                               "entry %" PRId32 ": %" PRIu64 " bytes at %" PRIu64
                               " are beyond what a file can hold",
                               i, payload_bytes, end));
        }
        placed[i].payload_crc32c = krul_store_crc32c(0, payloads[i], (size_t)payload_bytes);
        put_entry(&placed[i], head + KRUL_STORE_HEADER_BYTES + (size_t)i * KRUL_STORE_ENTRY_BYTES);
        end = placed[i].offset + payload_bytes;
    }
    put_header(kind, end, n_entries, head);

    KRUL_TRY(open_temporary(directory_fd, name, temporary, &fd, err));
    KRUL_TRY(write_file(fd, head, head_bytes, placed, payloads, n_entries, name, err));
    KRUL_TRY(sync_file(fd, name, err));
    int closed = close(fd);
    fd = -1;
    if (closed != 0 && errno != EINTR) {
        KRUL_TRY(krul_fail_errno(err, errno, "closing \"%s\"", name));
    }
    if (renameat(directory_fd, temporary, directory_fd, name) != 0) {
        KRUL_TRY(krul_fail_errno(err, errno, "renaming to \"%s\"", name));
    }
    temporary[0] = '\0';
    KRUL_TRY(sync_file(directory_fd, "the directory", err));

    memcpy(entries, placed, (size_t)n_entries * sizeof *entries);
    if (file_bytes_out != NULL) {
        *file_bytes_out = end;
    }
done:
    if (fd >= 0) {
        (void)close(fd);
    }
    if (temporary[0] != '\0') {
        (void)unlinkat(directory_fd, temporary, 0);
    }
    free(placed);
    free(head);
    return status;
}

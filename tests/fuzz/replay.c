/* replay.c - runs a fuzz target once on each file given, or on each file of a directory.
 *
 * Linked with one fuzz_*.c in place of libFuzzer, so that what was ever found is a unit test with
 * any compiler. A failure aborts; the last line counts. */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes);

static int n_replayed;

static void
die(const char *what, const char *path)
{
    fprintf(stderr, "replay: %s: %s\n", path, what);
    exit(2);
}

static void
replay_file(const char *path, int fd, size_t n_bytes)
{
    /* Exactly as large as the file, so that a sanitizer sees one byte too many. */
    uint8_t *bytes = malloc(n_bytes > 0 ? n_bytes : 1);
    size_t n_done = 0;
    if (bytes == NULL) {
        die("no memory", path);
    }
    while (n_done < n_bytes) {
        ssize_t got = read(fd, bytes + n_done, n_bytes - n_done);
        if (got <= 0) {
            die("cannot read", path);
        }
        n_done += (size_t)got;
    }
    LLVMFuzzerTestOneInput(bytes, n_bytes);
    n_replayed++;
    free(bytes);
}

static void
replay(const char *path)
{
    struct stat about;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &about) != 0) {
        die("cannot open", path);
    }
    if (!S_ISDIR(about.st_mode)) {
        replay_file(path, fd, (size_t)about.st_size);
        close(fd);
        return;
    }
    DIR *listing = fdopendir(fd);
    if (listing == NULL) {
        die("cannot list", path);
    }
    for (struct dirent *item = readdir(listing); item != NULL; item = readdir(listing)) {
        char inner[4096];
        if (item->d_name[0] == '.') {
            continue;
        }
        if (snprintf(inner, sizeof inner, "%s/%s", path, item->d_name) >= (int)sizeof inner) {
            die("the path of a file in it is too long", path);
        }
        replay(inner);
    }
    closedir(listing);
}

int
main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        replay(argv[i]);
    }
    printf("%d inputs replayed\n", n_replayed);
    return n_replayed > 0 ? 0 : 2;
}

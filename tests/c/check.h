/* check.h - the C tests' harness: CHECK counts, check_finish prints the totals last. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>

#include "krul.h"

static int check_n_passed, check_n_failed;

/* A test goes on after a failure, so that one run shows all of them. */
#define CHECK(condition)                                                                           \
    ((condition) ? (void)check_n_passed++                                                          \
                 : (void)(check_n_failed++,                                                        \
                          fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition)))

/* The fastest table that this machine can run; krul_backend_at(0) may be another's. */
static inline const krul_backend *
check_best_backend(void)
{
    const krul_backend *backend = NULL;
    CHECK(krul_backend_find(NULL, &backend, NULL) == KRUL_STATUS_OK);
    return backend;
}

/* The value for main to return. */
static inline int
check_finish(void)
{
    printf("%d passed, %d failed\n", check_n_passed, check_n_failed);
    return check_n_failed != 0 || check_n_passed == 0;
}

#endif /* CHECK_H */

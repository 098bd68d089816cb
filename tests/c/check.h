/* check.h - the C tests' harness: CHECK counts, check_finish prints the totals last. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>

static int check_n_passed, check_n_failed;

/* A test goes on after a failure, so that one run shows all of them. */
#define CHECK(condition)                                                                           \
    ((condition) ? (void)check_n_passed++                                                          \
                 : (void)(check_n_failed++,                                                        \
                          fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition)))

/* The value for main to return. */
static inline int
check_finish(void)
{
    printf("%d passed, %d failed\n", check_n_passed, check_n_failed);
    return check_n_failed != 0 || check_n_passed == 0;
}

#endif /* CHECK_H */

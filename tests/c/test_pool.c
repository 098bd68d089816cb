/* test_pool.c - the thread pool: every task once, bounded queue, drain, join. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "check.h"
#include "internal.h"

static atomic_int n_runs;

static void
count_run(void *argument)
{
    atomic_fetch_add((atomic_int *)argument, 1);
}

static void
test_submit(void)
{
    krul_error err;
    for (int n_threads = 0; n_threads <= 3; n_threads++) {
        krul_pool *pool = NULL;
        CHECK(krul_pool_new(n_threads, 2, &pool, &err) == KRUL_STATUS_OK);
        atomic_store(&n_runs, 0);
        for (int i = 0; i < 1000; i++) {
            krul_pool_submit(pool, count_run, &n_runs);
        }
        krul_pool_drain(pool);
        CHECK(atomic_load(&n_runs) == 1000);
        krul_pool_submit(pool, count_run, &n_runs);
        krul_pool_free(pool); /* drains */
        CHECK(atomic_load(&n_runs) == 1001);
    }
    krul_pool_free(NULL);
}

static void
test_refusals(void)
{
    krul_error err;
    krul_pool *pool = NULL;
    CHECK(krul_pool_new(-1, 1, &pool, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_pool_new(KRUL_POOL_MAX_THREADS + 1, 1, &pool, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_pool_new(1, 0, &pool, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(krul_pool_new(1, SIZE_MAX, &pool, &err) == KRUL_STATUS_BAD_VALUE);
    CHECK(pool == NULL);
}

typedef struct cell {
    int value;
    bool is_blocked;
} cell;

static void
set_cell(void *argument)
{
    cell *cell_of_task = argument;
    cell_of_task->value++;
}

static void
test_for_each(void)
{
    static cell cells[257];
    for (int n_threads = 0; n_threads <= 4; n_threads++) {
        krul_pool_for_each(n_threads, set_cell, cells, sizeof cells[0], 257);
    }
    int n_wrong = 0;
    for (int i = 0; i < 257; i++) {
        n_wrong += cells[i].value != 5;
    }
    CHECK(n_wrong == 0);
    krul_pool_for_each(2, set_cell, NULL, sizeof cells[0], 0);
}

static void
look_at_signals(void *argument)
{
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    ((cell *)argument)->is_blocked = sigismember(&blocked, SIGINT) == 1;
}

static void
test_signals(void)
{
    krul_error err;
    krul_pool *pool = NULL;
    cell seen = {.is_blocked = false};
    CHECK(krul_pool_new(1, 1, &pool, &err) == KRUL_STATUS_OK);
    krul_pool_submit(pool, look_at_signals, &seen);
    krul_pool_free(pool);
    CHECK(seen.is_blocked);
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    CHECK(sigismember(&blocked, SIGINT) == 0); /* the caller's mask is as before */
}

int
main(void)
{
    CHECK(krul_pool_n_processors() >= 1);
    test_submit();
    test_refusals();
    test_for_each();
    test_signals();
    return check_finish();
}

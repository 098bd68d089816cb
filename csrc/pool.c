/* pool.c - a fixed set of threads and a bounded queue; joined when it is freed. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

typedef struct pool_item {
    krul_task task;
    void *argument;
} pool_item;

struct krul_pool {
    pthread_mutex_t lock;
    pthread_cond_t has_item;
    pthread_cond_t has_room;
    pthread_cond_t is_idle;
    pool_item *items; /* a ring of `capacity` */
    size_t capacity;
    size_t first;
    size_t n_items;
    int n_running;
    bool is_closing;
    int n_threads;
    pthread_t threads[];
};

int
krul_pool_n_processors(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) {
        return CPU_COUNT(&set);
    }
    return 1;
}

static void *
run_items(void *argument)
{
    krul_pool *pool = argument;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->n_items == 0 && !pool->is_closing) {
            pthread_cond_wait(&pool->has_item, &pool->lock);
        }
        if (pool->n_items == 0) {
            break;
        }
        pool_item item = pool->items[pool->first];
        pool->first = (pool->first + 1) % pool->capacity;
        pool->n_items--;
        pool->n_running++;
        pthread_cond_signal(&pool->has_room);
        pthread_mutex_unlock(&pool->lock);
        item.task(item.argument);
        pthread_mutex_lock(&pool->lock);
        pool->n_running--;
        if (pool->n_running == 0 && pool->n_items == 0) {
            pthread_cond_broadcast(&pool->is_idle);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Start a thread that no signal is delivered to. */
static int
start_thread(pthread_t *thread, void *(*body)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failure;
}

krul_status
krul_pool_new(int n_threads, size_t queue_capacity, krul_pool **out, krul_error *err)
{
    if (n_threads < 0 || n_threads > KRUL_POOL_MAX_THREADS) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE, "n_threads is %d but must be from 0 to %d",
                         n_threads, KRUL_POOL_MAX_THREADS);
    }
    if (queue_capacity == 0 || queue_capacity > SIZE_MAX / sizeof(pool_item)) {
        return krul_fail(err, KRUL_STATUS_BAD_VALUE,
                         "queue_capacity is %zu but must be from 1 to %zu", queue_capacity,
                         SIZE_MAX / sizeof(pool_item));
    }
    if (n_threads == 0) {
        n_threads = krul_pool_n_processors();
        n_threads = n_threads < KRUL_POOL_MAX_THREADS ? n_threads : KRUL_POOL_MAX_THREADS;
    }
    krul_pool *pool = calloc(1, sizeof *pool + (size_t)n_threads * sizeof pool->threads[0]);
    pool_item *items = calloc(queue_capacity, sizeof *items);
    if (pool == NULL || items == NULL) {
        free(pool);
        free(items);
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a pool of %d threads",
                         n_threads);
    }
    pool->items = items;
    pool->capacity = queue_capacity;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->has_item, NULL);
    pthread_cond_init(&pool->has_room, NULL);
    pthread_cond_init(&pool->is_idle, NULL);
    int failure = 0;
    while (pool->n_threads < n_threads) {
        failure = start_thread(&pool->threads[pool->n_threads], run_items, pool);
        if (failure != 0) {
            break;
        }
        pool->n_threads++;
    }
    if (pool->n_threads == 0) {
        krul_pool_free(pool);
        return krul_fail_errno(err, failure, "none of %d threads could be started", n_threads);
    }
    *out = pool;
    return KRUL_STATUS_OK;
}

void
krul_pool_submit(krul_pool *pool, krul_task task, void *argument)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->n_items == pool->capacity) {
        pthread_cond_wait(&pool->has_room, &pool->lock);
    }
    pool->items[(pool->first + pool->n_items) % pool->capacity] = (pool_item){task, argument};
    pool->n_items++;
    pthread_cond_signal(&pool->has_item);
    pthread_mutex_unlock(&pool->lock);
}

void
krul_pool_drain(krul_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->n_items > 0 || pool->n_running > 0) {
        pthread_cond_wait(&pool->is_idle, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
}

void
krul_pool_free(krul_pool *pool)
{
    if (pool == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->is_closing = true;
    pthread_cond_broadcast(&pool->has_item);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->n_threads; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->has_item);
    pthread_cond_destroy(&pool->has_room);
    pthread_cond_destroy(&pool->is_idle);
    free(pool->items);
    free(pool);
}

/* What the threads of krul_pool_for_each share: each takes the next index until none is left. */
typedef struct for_each_work {
    krul_task task;
    uint8_t *arguments;
    size_t argument_bytes;
    int64_t n_tasks;
    atomic_llong next;
} for_each_work;

static void *
run_for_each(void *argument)
{
    for_each_work *work = argument;
    for (;;) {
        int64_t index = atomic_fetch_add(&work->next, 1);
        if (index >= work->n_tasks) {
            return NULL;
        }
        work->task(work->arguments + (size_t)index * work->argument_bytes);
    }
}

void
krul_pool_for_each(int n_threads, krul_task task, void *arguments, size_t argument_bytes,
                   int64_t n_tasks)
{
    for_each_work work = {
        .task = task, .arguments = arguments, .argument_bytes = argument_bytes, .n_tasks = n_tasks};
    pthread_t threads[KRUL_POOL_MAX_THREADS];
    int64_t n_wanted = n_threads > 0 ? n_threads : krul_pool_n_processors();
    n_wanted = krul_min_i64(krul_min_i64(n_wanted, n_tasks), KRUL_POOL_MAX_THREADS);
    int n_started = 0;
    atomic_init(&work.next, 0);
    while (n_started + 1 < n_wanted &&
           start_thread(&threads[n_started], run_for_each, &work) == 0) {
        n_started++;
    }
    run_for_each(&work);
    for (int i = 0; i < n_started; i++) {
        pthread_join(threads[i], NULL);
    }
}

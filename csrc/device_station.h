/* device_station.h - a stream of a device with some memory: where one call at a time has its work done.
 *
 * Whoever encodes or observes takes a station, tells its stream what to do, waits for that and gives
 * the station back to its pool, where it waits for the next: taking memory is slow. The thread that
 * waits is never the one that runs the model. */
#ifndef KRUL_DEVICE_STATION_H
#define KRUL_DEVICE_STATION_H

#include <pthread.h>

#include "device.h"
#include "krul.h"

typedef struct krul_station {
    struct krul_station *next; /* on the shelf */
    struct krul_station_shelf *shelf;
    const krul_device_ops *ops;
    krul_device *device;
    int32_t device_id;
    void *stream;
    void *fence; /* an event */
    uint8_t *pinned; /* krul_station_reserve says how much */
    size_t pinned_bytes;
    uint8_t *memory; /* of the device */
    size_t memory_bytes;
    bool has_failed; /* the device did: the station is not used again */
} krul_station;

/* Stations that wait, of all devices of a pool. */
typedef struct krul_station_shelf {
    const krul_device_ops *ops;
    int32_t max_idle; /* of a device */
    pthread_mutex_t lock; /* guards the rest */
    krul_station *idle;
} krul_station_shelf;

void krul_station_shelf_init(krul_station_shelf *shelf, const krul_device_ops *ops,
                             int32_t max_idle);

/* No station may be taken. */
void krul_station_shelf_close(krul_station_shelf *shelf);

/* The shelf of a pool; in restore_device.c. */
krul_station_shelf *krul_device_pool_shelf(krul_device_pool *pool);

/* Take a station of a device from the shelf, or make one. */
krul_status krul_station_take(krul_station_shelf *shelf, int32_t device_id, krul_station **out,
                              krul_error *err) KRUL_MUST_CHECK;

/* Give it back; waits for what may still be under way. NULL is allowed. */
void krul_station_give(krul_station *station);

/* Have at least so much memory; what it held is lost, and nothing may be under way that uses it.
 * KRUL_STATUS_NO_MEMORY leaves a station that can be asked for less. */
krul_status krul_station_reserve(krul_station *station, size_t pinned_bytes, size_t memory_bytes,
                                 krul_error *err) KRUL_MUST_CHECK;

/* What the station is told from now on comes after those of the events that are its device's. */
krul_status krul_station_follow(krul_station *station, const krul_device_event *events,
                                int32_t n_events, krul_error *err) KRUL_MUST_CHECK;

/* Sleep until all that the station was told is done. */
krul_status krul_station_wait(krul_station *station, krul_error *err) KRUL_MUST_CHECK;

/* Note that a call to the device failed, if it did, and return its status. */
krul_status krul_station_note(krul_station *station, krul_status status) KRUL_MUST_CHECK;

#endif /* KRUL_DEVICE_STATION_H */

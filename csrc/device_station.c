/* device_station.c - stations are made, grown, waited for, and kept on a shelf. */
#include "device_station.h"

#include <stdlib.h>

#include "internal.h"

void
krul_station_shelf_init(krul_station_shelf *shelf, const krul_device_ops *ops, int32_t max_idle)
{
    *shelf = (krul_station_shelf){.ops = ops, .max_idle = max_idle};
    pthread_mutex_init(&shelf->lock, NULL);
}

static void
free_station(krul_station *station)
{
    if (station == NULL) {
        return;
    }
    const krul_device_ops *ops = station->ops;
    if (station->device != NULL) {
        if (station->pinned != NULL) {
            ops->pinned_free(station->device, station->pinned);
        }
        if (station->memory != NULL) {
            ops->memory_free(station->device, station->memory);
        }
        if (station->fence != NULL) {
            ops->event_free(station->device, station->fence);
        }
        if (station->stream != NULL) {
            ops->stream_free(station->device, station->stream);
        }
        ops->close(station->device);
    }
    free(station);
}

void
krul_station_shelf_close(krul_station_shelf *shelf)
{
    while (shelf->idle != NULL) {
        krul_station *station = shelf->idle;
        shelf->idle = station->next;
        free_station(station);
    }
    pthread_mutex_destroy(&shelf->lock);
}

krul_status
krul_station_note(krul_station *station, krul_status status)
{
    station->has_failed = station->has_failed || status == KRUL_STATUS_DEVICE;
    return status;
}

krul_status
krul_station_take(krul_station_shelf *shelf, int32_t device_id, krul_station **out, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    krul_station *station = NULL;
    pthread_mutex_lock(&shelf->lock);
    for (krul_station **link = &shelf->idle; *link != NULL; link = &(*link)->next) {
        if ((*link)->device_id == device_id) {
            station = *link;
            *link = station->next;
            break;
        }
    }
    pthread_mutex_unlock(&shelf->lock);
    if (station == NULL) {
        station = calloc(1, sizeof *station);
        if (station == NULL) {
            return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a station");
        }
        station->shelf = shelf;
        station->ops = shelf->ops;
        station->device_id = device_id;
        KRUL_TRY(shelf->ops->open(device_id, &station->device, err));
        KRUL_TRY(shelf->ops->stream_new(station->device, &station->stream, err));
        KRUL_TRY(shelf->ops->event_new(station->device, &station->fence, err));
    }
    station->next = NULL;
    *out = station;
    station = NULL;
done:
    free_station(station);
    return status;
}

void
krul_station_give(krul_station *station)
{
    if (station == NULL) {
        return;
    }
    krul_station_shelf *shelf = station->shelf;
    krul_station *unwanted = station;
    int32_t n_idle = 0;
    krul_status status = station->ops->stream_synchronize(station->device, station->stream, NULL);
    if (krul_station_note(station, status) == KRUL_STATUS_OK && !station->has_failed) {
        pthread_mutex_lock(&shelf->lock);
        for (const krul_station *idle = shelf->idle; idle != NULL; idle = idle->next) {
            n_idle += idle->device_id == station->device_id;
        }
        if (n_idle < shelf->max_idle) {
            station->next = shelf->idle;
            shelf->idle = station;
            unwanted = NULL;
        }
        pthread_mutex_unlock(&shelf->lock);
    }
    free_station(unwanted);
}

krul_status
krul_station_reserve(krul_station *station, size_t pinned_bytes, size_t memory_bytes,
                     krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    const krul_device_ops *ops = station->ops;
    void *made = NULL;
    if (pinned_bytes > station->pinned_bytes) {
        if (station->pinned != NULL) {
            ops->pinned_free(station->device, station->pinned);
        }
        station->pinned = NULL;
        station->pinned_bytes = 0;
        KRUL_TRY(ops->pinned_new(station->device, pinned_bytes, &made, err));
        station->pinned = made;
        station->pinned_bytes = pinned_bytes;
    }
    if (memory_bytes > station->memory_bytes) {
        if (station->memory != NULL) {
            ops->memory_free(station->device, station->memory);
        }
        station->memory = NULL;
        station->memory_bytes = 0;
        KRUL_TRY(ops->memory_new(station->device, memory_bytes, &made, err));
        station->memory = made;
        station->memory_bytes = memory_bytes;
    }
done:
    return krul_station_note(station, status);
}

krul_status
krul_station_follow(krul_station *station, const krul_device_event *events, int32_t n_events,
                    krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    for (int32_t i = 0; i < n_events; i++) {
        if (events[i].device_id == station->device_id) {
            KRUL_TRY(station->ops->stream_wait_event(station->device, station->stream,
                                                     events[i].event, err));
        }
    }
done:
    return krul_station_note(station, status);
}

krul_status
krul_station_wait(krul_station *station, krul_error *err)
{
    krul_status status = KRUL_STATUS_OK;
    KRUL_TRY(station->ops->event_record(station->device, station->fence, station->stream, err));
    KRUL_TRY(station->ops->event_synchronize(station->device, station->fence, err));
done:
    return krul_station_note(station, status);
}

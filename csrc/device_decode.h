/* device_decode.h - blocks on their way to a device; internal, no CUDA. */
#ifndef KRUL_DEVICE_DECODE_H
#define KRUL_DEVICE_DECODE_H

#include "krul.h"

/* One coded block in a chunk of pinned memory, and where it shall be decoded to. */
typedef struct krul_device_block {
    const krul_store_entry *entry;
    uint64_t payload_offset; /* in the chunk; 16-byte aligned */
    krul_view views[2]; /* on the device; data NULL: not wanted; may hold the block's first tokens */
} krul_device_block;

#endif /* KRUL_DEVICE_DECODE_H */

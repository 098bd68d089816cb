/* codec_exact.h - sections as codec_exact.c lays them out, for who decodes them on a device. */
#ifndef KRUL_CODEC_EXACT_H
#define KRUL_CODEC_EXACT_H

#include "krul.h"

/* The mode, then 56 bits of how many bytes the stream has. */
enum { KRUL_EXACT_HEADER_BYTES = 8 };

/* How a section holds its elements. Pinned: these numbers are in files. */
typedef enum krul_exact_mode {
    KRUL_EXACT_RAW = 0,
    KRUL_EXACT_SPLIT = 1,
    KRUL_EXACT_SPLIT_WITH_OFFSETS = 2,
} krul_exact_mode;

/* The sizes of one section. */
typedef struct krul_exact_sizes {
    size_t n_elements;
    size_t element_bytes;
    size_t n_offsets; /* one per batch item, head and channel */
    size_t kept_bytes; /* n_elements * (element_bytes - 1) */
    size_t raw_bytes; /* n_elements * element_bytes */
} krul_exact_sizes;

/* A section whose lengths are known to lie inside the payload. */
typedef struct krul_exact_section {
    krul_exact_mode mode;
    const uint8_t *kept; /* or the elements, when raw */
    const uint8_t *offsets;
    const uint8_t *stream;
    size_t stream_bytes;
    size_t n_bytes; /* of all, header included */
} krul_exact_section;

krul_status krul_exact_measure(krul_dtype dtype, const int64_t shape[KRUL_VIEW_DIMS],
                               krul_exact_sizes *out, krul_error *err) KRUL_MUST_CHECK;

/* The section that a payload begins with. Trusts nothing; the stream itself is not looked at. */
krul_status krul_exact_read_section(const uint8_t *payload, size_t payload_bytes,
                                    const krul_exact_sizes *sizes, krul_exact_section *out,
                                    krul_error *err) KRUL_MUST_CHECK;

#endif /* KRUL_CODEC_EXACT_H */

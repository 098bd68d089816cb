/* dlpack_abi.h - the part of DLPack's public binary interface that krul reads, layout asserted.
 *
 * https://dmlc.github.io/dlpack/latest/c_api.html, versions 0 and 1. */
#ifndef DLPACK_ABI_H
#define DLPACK_ABI_H

#include <stddef.h>
#include <stdint.h>

enum {
    DLPACK_DEVICE_CPU = 1,
    DLPACK_DEVICE_CUDA = 2,
    DLPACK_DEVICE_CUDA_HOST = 3,
};

enum {
    DLPACK_CODE_FLOAT = 2,
    DLPACK_CODE_BFLOAT = 4,
};

enum {
    DLPACK_MAJOR_VERSION = 1,
    DLPACK_FLAG_READ_ONLY = 1,
};

typedef struct dlpack_tensor {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t n_dims;
    uint8_t dtype_code;
    uint8_t dtype_bits;
    uint16_t dtype_lanes;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL means row-major without gaps */
    uint64_t byte_offset;
} dlpack_tensor;

/* In a capsule named "dltensor". */
typedef struct dlpack_managed {
    dlpack_tensor tensor;
    void *context;
    void (*deleter)(struct dlpack_managed *self);
} dlpack_managed;

/* In a capsule named "dltensor_versioned". */
typedef struct dlpack_managed_versioned {
    uint32_t major;
    uint32_t minor;
    void *context;
    void (*deleter)(struct dlpack_managed_versioned *self);
    uint64_t flags;
    dlpack_tensor tensor;
} dlpack_managed_versioned;

_Static_assert(sizeof(void *) != 8 || sizeof(dlpack_tensor) == 48, "DLTensor");
_Static_assert(sizeof(void *) != 8 || offsetof(dlpack_tensor, strides) == 32, "DLTensor.strides");
_Static_assert(sizeof(void *) != 8 || offsetof(dlpack_managed, deleter) == 56, "DLManagedTensor");
_Static_assert(sizeof(void *) != 8 || offsetof(dlpack_managed_versioned, tensor) == 32,
               "DLManagedTensorVersioned");

#endif /* DLPACK_ABI_H */

/* device.cu - the table of csrc/device.h for NVIDIA GPUs: streams, events, memory and copies.
 *
 * Threads of the library and of Python call it, and torch has its own idea of which device is the
 * current one: every call sets its own and puts the caller's back. Errors are read from the call that
 * made them; what a call leaves behind in the runtime is cleared, so that nobody else trips over it. */
#include <stdlib.h>

#include "cublas.h"
#include "device.cuh"
#include "device.h"

struct krul_device {
    int id;
};

namespace {

/* Makes a device the current one of this thread, and undoes that. */
class Current {
  public:
    explicit Current(const krul_device *device) : Current(device->id) {}

    explicit Current(int id) : id_(id), before_(id), code_(cudaGetDevice(&before_))
    {
        if (code_ == cudaSuccess && before_ != id_) {
            code_ = cudaSetDevice(id_);
        }
    }

    ~Current()
    {
        if (code_ == cudaSuccess && before_ != id_) {
            (void)cudaSetDevice(before_);
        }
    }

    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;

    /* Is it the current one? Then what `code` says, which is of a call made since. */
    krul_status check(const char *call, cudaError_t code, krul_error *err) const
    {
        krul_status status = krul_cuda_check(code_ == cudaSuccess ? code : code_, call, err);
        if (status != KRUL_STATUS_OK) {
            (void)cudaGetLastError();
        }
        return status;
    }

    bool is_set() const
    {
        return code_ == cudaSuccess;
    }

  private:
    int id_;
    int before_;
    cudaError_t code_;
};

/* Asked for its attributes: a GPU for which nothing was compiled has no answer. */
__global__ void
nothing()
{
}

krul_status
device_open(int32_t device_id, krul_device **out, krul_error *err)
{
    int n_devices = 0;
    krul_status status = krul_cuda_check(cudaGetDeviceCount(&n_devices), "cudaGetDeviceCount", err);
    if (status != KRUL_STATUS_OK) {
        (void)cudaGetLastError();
        return status;
    }
    if (device_id < 0 || device_id >= n_devices) {
        return krul_fail(err, KRUL_STATUS_DEVICE, "device is %d but there are %d", (int)device_id,
                         n_devices);
    }
    Current current(device_id);
    cudaFuncAttributes attributes;
    status = current.check("cudaFuncGetAttributes: is the GPU one that krul was compiled for? It",
                           cudaFuncGetAttributes(&attributes, nothing), err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    krul_device *device = (krul_device *)malloc(sizeof *device);
    if (device == nullptr) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a device");
    }
    device->id = device_id;
    *out = device;
    return KRUL_STATUS_OK;
}

void
device_close(krul_device *device)
{
    free(device);
}

krul_status
pinned_new(krul_device *device, size_t n_bytes, void **out, krul_error *err)
{
    Current current(device);
    void *memory = nullptr;
    cudaError_t code = cudaErrorUnknown;
    if (current.is_set()) {
        code = cudaHostAlloc(&memory, n_bytes, cudaHostAllocPortable);
    }
    krul_status status = current.check("cudaHostAlloc", code, err);
    if (status == KRUL_STATUS_OK) {
        *out = memory;
    }
    return status;
}

void
pinned_free(krul_device *device, void *memory)
{
    Current current(device);
    (void)current.check("cudaFreeHost", cudaFreeHost(memory), nullptr);
}

krul_status
memory_new(krul_device *device, size_t n_bytes, void **out, krul_error *err)
{
    Current current(device);
    void *memory = nullptr;
    cudaError_t code = current.is_set() ? cudaMalloc(&memory, n_bytes) : cudaErrorUnknown;
    krul_status status = current.check("cudaMalloc", code, err);
    if (status == KRUL_STATUS_OK) {
        *out = memory;
    }
    return status;
}

void
memory_free(krul_device *device, void *memory)
{
    Current current(device);
    (void)current.check("cudaFree", cudaFree(memory), nullptr);
}

krul_status
stream_new(krul_device *device, void **out, krul_error *err)
{
    Current current(device);
    cudaStream_t stream = nullptr;
    cudaError_t code = cudaErrorUnknown;
    if (current.is_set()) {
        code = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    }
    krul_status status = current.check("cudaStreamCreateWithFlags", code, err);
    if (status == KRUL_STATUS_OK) {
        *out = stream;
    }
    return status;
}

void
stream_free(krul_device *device, void *stream)
{
    Current current(device);
    (void)current.check("cudaStreamDestroy", cudaStreamDestroy((cudaStream_t)stream), nullptr);
}

/* Sleeps where cudaStreamSynchronize would spin, unless the device was told otherwise. */
krul_status
stream_synchronize(krul_device *device, void *stream, krul_error *err)
{
    Current current(device);
    return current.check("cudaStreamSynchronize", cudaStreamSynchronize((cudaStream_t)stream), err);
}

krul_status
event_new(krul_device *device, void **out, krul_error *err)
{
    Current current(device);
    cudaEvent_t event = nullptr;
    cudaError_t code = cudaErrorUnknown;
    if (current.is_set()) {
        code = cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
    }
    krul_status status = current.check("cudaEventCreateWithFlags", code, err);
    if (status == KRUL_STATUS_OK) {
        *out = event;
    }
    return status;
}

void
event_free(krul_device *device, void *event)
{
    Current current(device);
    (void)current.check("cudaEventDestroy", cudaEventDestroy((cudaEvent_t)event), nullptr);
}

krul_status
event_record(krul_device *device, void *event, void *stream, krul_error *err)
{
    Current current(device);
    return current.check("cudaEventRecord",
                         cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream), err);
}

krul_status
event_synchronize(krul_device *device, void *event, krul_error *err)
{
    Current current(device);
    return current.check("cudaEventSynchronize", cudaEventSynchronize((cudaEvent_t)event), err);
}

krul_status
stream_wait_event(krul_device *device, void *stream, void *event, krul_error *err)
{
    Current current(device);
    return current.check("cudaStreamWaitEvent",
                         cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0), err);
}

krul_status
copy_in(krul_device *device, void *stream, void *to, const void *from, size_t n_bytes,
        krul_error *err)
{
    Current current(device);
    return current.check(
        "cudaMemcpyAsync to the device",
        cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream), err);
}

krul_status
copy_out(krul_device *device, void *stream, void *to, const void *from, size_t n_bytes,
         krul_error *err)
{
    Current current(device);
    return current.check(
        "cudaMemcpyAsync from the device",
        cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream), err);
}

krul_status
decode(krul_device *device, void *stream, const krul_device_batch *batch, const uint8_t *chunk,
       uint32_t *damage_flag, krul_error *err)
{
    Current current(device);
    krul_status status = current.check("cudaSetDevice", cudaSuccess, err);
    return status != KRUL_STATUS_OK ? status
                                    : krul_cuda_decode(stream, batch, chunk, damage_flag, err);
}

/* A handle of cuBLAS, and the memory that it works in. */
struct products {
    krul_cublas *cublas;
    void *workspace;
};

void
products_free(krul_device *device, void *products_in)
{
    products *own = (products *)products_in;
    Current current(device);
    krul_cublas_free(own->cublas);
    if (own->workspace != nullptr) {
        (void)current.check("cudaFree", cudaFree(own->workspace), nullptr);
    }
    free(own);
}

krul_status
products_new(krul_device *device, void *stream, void **out, krul_error *err)
{
    const krul_cublas_table *table = nullptr;
    krul_status status = krul_cublas_find(&table, err);
    if (status != KRUL_STATUS_OK) {
        return status;
    }
    products *made = (products *)calloc(1, sizeof *made);
    if (made == nullptr) {
        return krul_fail(err, KRUL_STATUS_NO_MEMORY, "no memory for a handle of cuBLAS");
    }
    status = memory_new(device, KRUL_CUBLAS_WORKSPACE_BYTES, &made->workspace, err);
    if (status == KRUL_STATUS_OK) {
        Current current(device);
        status = krul_cublas_new(table, stream, made->workspace, KRUL_CUBLAS_WORKSPACE_BYTES,
                                 KRUL_CUBLAS_FLOAT32, &made->cublas, err);
    }
    if (status != KRUL_STATUS_OK) {
        products_free(device, made);
        return status;
    }
    *out = made;
    return KRUL_STATUS_OK;
}

krul_status
predict_numbers(krul_device *device, void *stream, const krul_device_chains *chains,
                const krul_device_predict_batch *batch, const uint8_t *chunk, uint8_t *scratch,
                uint32_t *damage_flag, krul_error *err)
{
    Current current(device);
    krul_status status = current.check("cudaSetDevice", cudaSuccess, err);
    return status != KRUL_STATUS_OK
               ? status
               : krul_cuda_predict_numbers(chains, batch, stream, chunk, scratch, damage_flag, err);
}

krul_status
predict_rows(krul_device *device, void *products_in, const krul_device_chains *chains,
             const krul_device_predict_batch *batch, const uint8_t *chunk, uint8_t *memory,
             uint8_t *scratch, krul_error *err)
{
    Current current(device);
    krul_status status = current.check("cudaSetDevice", cudaSuccess, err);
    return status != KRUL_STATUS_OK
               ? status
               : krul_cuda_predict_rows(chains, batch, ((products *)products_in)->cublas, chunk,
                                        memory, scratch, err);
}

krul_status
encode(krul_device *device, void *stream, const krul_device_encode_batch *batch,
       const uint8_t *plan, uint8_t *payloads, uint8_t *workspace, krul_device_result *results,
       krul_error *err)
{
    Current current(device);
    krul_status status = current.check("cudaSetDevice", cudaSuccess, err);
    return status != KRUL_STATUS_OK
               ? status
               : krul_cuda_encode(stream, batch, plan, payloads, workspace, results, err);
}

krul_status
observe(krul_device *device, void *stream, const krul_device_observation *observation,
        const uint8_t *image, uint8_t *workspace, krul_estimator_sums *sums, krul_error *err)
{
    Current current(device);
    krul_status status = current.check("cudaSetDevice", cudaSuccess, err);
    return status != KRUL_STATUS_OK
               ? status
               : krul_cuda_estimator_observe(observation, image, workspace, sums, stream, err);
}

} // namespace

/* Reached by py_cuda.c, which knows no CUDA. */
extern "C" const krul_device_ops *
krul_cuda_ops(void)
{
    static const krul_device_ops ops = {
        KRUL_DEVICE_ABI,
        KRUL_DEVICE_CUDA,
        "CUDA device",
        device_open,
        device_close,
        pinned_new,
        pinned_free,
        memory_new,
        memory_free,
        stream_new,
        stream_free,
        stream_synchronize,
        event_new,
        event_free,
        event_record,
        event_synchronize,
        stream_wait_event,
        copy_in,
        copy_out,
        nullptr, /* what is done on the host is in krul._core */
        nullptr,
        nullptr,
        decode,
        products_new,
        products_free,
        nullptr, /* likewise */
        nullptr,
        predict_numbers,
        predict_rows,
        encode,
        observe,
    };
    return &ops;
}

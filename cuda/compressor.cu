/* compressor.cu - decodes blocks of the store on the device. */
#include "device.cuh"

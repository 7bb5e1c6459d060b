// What the .cu files need beside reward_math.h. Compiled by nvcc for GPUs; the tests compile the same files with a host
// compiler and their own host_device.h, which runs a block's threads on the CPU, to check indexing and barriers.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define MR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MR_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace megarubric::cuda {

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("megarubric: launching ") + name + ": " + cudaGetErrorString(error));
  }
}

}  // namespace megarubric::cuda

#else
#include "host_device.h"
#endif

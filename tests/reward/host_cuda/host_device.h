// Runs the .cu files of csrc/ on the CPU, to check their logic where no GPU is: a block's threads are real threads, a
// barrier is a barrier, shared memory is poisoned before every block, wide loads must be aligned. It says nothing about
// speed or about what nvcc makes of the code.
#pragma once

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define MR_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(host_device::shared.data())
#define MR_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  host_device::launch((grid), (block), (shared_bytes), [&] { kernel(__VA_ARGS__); })

struct Index {
  unsigned x;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(4) uchar4 {
  uint8_t x, y, z, w;
};

inline thread_local Index threadIdx, blockIdx;

namespace host_device {

inline std::vector<uint64_t> shared;
inline std::unique_ptr<std::barrier<>> barrier;

template <class Kernel>
void launch(unsigned grid, unsigned block, size_t shared_bytes, Kernel kernel) {
  if (shared_bytes > 48 * 1024) {
    std::fprintf(stderr, "more shared memory than a launch gets\n");
    std::abort();
  }
  for (unsigned b = 0; b < grid; ++b) {
    shared.assign(shared_bytes / 8 + 1, 0x7fa5a5a57fa5a5a5u);  // signalling NaNs
    barrier = std::make_unique<std::barrier<>>(block);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block; ++t) {
      threads.emplace_back([&, t] {
        threadIdx.x = t;
        blockIdx.x = b;
        kernel();
        barrier->arrive_and_drop();  // a thread that has left no longer counts
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace host_device

inline void __syncthreads() { host_device::barrier->arrive_and_wait(); }

template <class T>
T __ldcs(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) {
    std::fprintf(stderr, "misaligned wide load\n");
    std::abort();
  }
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline unsigned long long atomicMin(unsigned long long* target, unsigned long long value) {
  std::atomic_ref<unsigned long long> cell(*target);
  unsigned long long seen = cell.load();
  while (value < seen && !cell.compare_exchange_weak(seen, value)) {
  }
  return seen;
}

inline unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) {
  return std::atomic_ref<unsigned long long>(*target).fetch_add(value);
}

namespace megarubric::cuda {
inline void check_launch(const char*) {}
}  // namespace megarubric::cuda

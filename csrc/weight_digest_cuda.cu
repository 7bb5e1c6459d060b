// Weight digest on CUDA: one tile per block, 16-byte loads, a block's sums added to its tensor's by atomics. Integer
// sums commute, so runs repeat bit for bit and the CPU's bits come out.
#include "device.h"
#include "weight_digest.h"

namespace megarubric::cuda {
namespace {

constexpr int kThreads = 256;

// The sums begin with the tensor's length: the tiles' kernel adds to them.
__global__ void __launch_bounds__(kThreads) digest_lengths_kernel(DigestArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.n) return;
  DigestSums sums{};
  add_word(sums, static_cast<uint64_t>(a.table[3 * t + 1]), 0);
  a.sums[2 * t] = sums.first;
  a.sums[2 * t + 1] = sums.second;
}

__global__ void __launch_bounds__(kThreads) digest_tiles_kernel(DigestArgs a) {
  __shared__ DigestSums partial[kThreads];
  const DigestTile tile = digest_tile(a, blockIdx.x);
  const int64_t thread = threadIdx.x;
  DigestSums sums{};
  // Buckets align tensors to 256 bytes, so the wide path is the one that counts.
  const int64_t wide = reinterpret_cast<uintptr_t>(tile.bytes) % 16 == 0 ? tile.nbytes / 16 : 0;
  const uint4* body = reinterpret_cast<const uint4*>(tile.bytes);
#pragma unroll 4
  for (int64_t at = thread; at < wide; at += kThreads) {
    const uint4 four = __ldcs(body + at);
    add_word(sums, static_cast<uint64_t>(four.y) << 32 | four.x, tile.position + 2 * at);
    add_word(sums, static_cast<uint64_t>(four.w) << 32 | four.z, tile.position + 2 * at + 1);
  }
  const int64_t words = (tile.nbytes + 7) / 8;
  for (int64_t at = 2 * wide + thread; at < words; at += kThreads) {  // the rest, or all of an unaligned tensor
    const int64_t left = tile.nbytes - 8 * at;
    add_word(sums, partial_word(tile.bytes + 8 * at, left < 8 ? left : 8), tile.position + at);
  }
  partial[threadIdx.x] = sums;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      partial[threadIdx.x].first += partial[threadIdx.x + half].first;
      partial[threadIdx.x].second += partial[threadIdx.x + half].second;
    }
  }
  if (threadIdx.x != 0) return;
  auto* total = reinterpret_cast<unsigned long long*>(a.sums + 2 * tile.tensor);
  atomicAdd(total, static_cast<unsigned long long>(partial[0].first));
  atomicAdd(total + 1, static_cast<unsigned long long>(partial[0].second));
}

}  // namespace

void weight_digest(const DigestArgs& args, void* stream) {
  if (args.n == 0) return;
  MR_LAUNCH(digest_lengths_kernel, static_cast<unsigned>((args.n + kThreads - 1) / kThreads), kThreads, 0, stream, args);
  if (args.tiles > 0) MR_LAUNCH(digest_tiles_kernel, static_cast<unsigned>(args.tiles), kThreads, 0, stream, args);
  check_launch("weight_digest");
}

}  // namespace megarubric::cuda

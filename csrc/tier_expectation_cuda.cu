// Tier expectation on CUDA. Gathered log-probabilities: one row per thread. Logits: one row per block, read once with
// 16-byte loads; each thread keeps a running maximum and a float64 sum, and the block combines them in a fixed tree, so
// runs repeat bit for bit. (The CPU adds in another order: the log-normaliser may differ in its last float64 places.)
#include "device.h"
#include "tier_expectation.h"

namespace megarubric::cuda {
namespace {

constexpr int kThreads = 256;

MR_INLINE float bfloat16_bits(uint32_t bits) { return bits_float(static_cast<int32_t>(bits << 16)); }

MR_INLINE float element(const TierArgs& a, int64_t row, int64_t width, int64_t column) {
  const int64_t at = row * width + column;
  if (a.bfloat16) return bfloat16_bits(static_cast<const uint16_t*>(a.rows)[at]);
  return static_cast<const float*>(a.rows)[at];
}

struct RunningSum {
  float top;   // maximum so far
  double sum;  // of exp(x - top)
};

MR_INLINE void add(RunningSum& s, float x) {
  if (x > s.top) {
    s.sum = s.sum * static_cast<double>(exp_negative(x - s.top)) + 1.0;
    s.top = x;
  } else {
    s.sum = s.sum + static_cast<double>(exp_negative(s.top - x));
  }
}

MR_INLINE RunningSum combine(RunningSum a, RunningSum b) {
  if (b.top > a.top) {
    const RunningSum swap = a;
    a = b;
    b = swap;
  }
  a.sum = a.sum + b.sum * static_cast<double>(exp_negative(a.top - b.top));
  return a;
}

template <bool kBfloat16>
__global__ void __launch_bounds__(kThreads) logits_kernel(TierArgs a) {
  __shared__ RunningSum partial[kThreads];
  constexpr int kWide = kBfloat16 ? 8 : 4;  // elements in 16 bytes
  constexpr int kSize = kBfloat16 ? 2 : 4;
  const int64_t row = blockIdx.x;
  const char* bytes = static_cast<const char*>(a.rows) + row * a.vocabulary * kSize;
  // A row of odd length starts anywhere: single elements up to the next 16-byte boundary and after the last one.
  int64_t head = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(bytes) % 16) % 16) / kSize;
  head = head < a.vocabulary ? head : a.vocabulary;
  const int64_t wide = (a.vocabulary - head) / kWide, tail = head + wide * kWide;

  RunningSum mine{-__builtin_inff(), 0.0};
  if (threadIdx.x < head) add(mine, element(a, row, a.vocabulary, threadIdx.x));
  const uint4* body = reinterpret_cast<const uint4*>(bytes + head * kSize);
  for (int64_t at = threadIdx.x; at < wide; at += kThreads) {
    const uint4 four = __ldcs(body + at);
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (kBfloat16) {
        add(mine, bfloat16_bits(words[c] & 0xffffu));
        add(mine, bfloat16_bits(words[c] >> 16));
      } else {
        add(mine, bits_float(static_cast<int32_t>(words[c])));
      }
    }
  }
  if (tail + threadIdx.x < a.vocabulary) add(mine, element(a, row, a.vocabulary, tail + threadIdx.x));
  partial[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] = combine(partial[threadIdx.x], partial[threadIdx.x + half]);
  }
  if (threadIdx.x != 0) return;
  const RunningSum all = partial[0];
  const bool usable = all.top > -__builtin_inff() && all.top <= 3.4e38f;
  const double normaliser = usable ? all.top + tier_log(all.sum) : __builtin_nan("");
  read_tiers(a, row, [&](int32_t t) {
    return static_cast<double>(element(a, row, a.vocabulary, a.token_ids[t])) - normaliser;
  });
}

__global__ void __launch_bounds__(kThreads) gathered_kernel(TierArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.n) return;
  read_tiers(a, row, [&](int32_t t) { return static_cast<double>(element(a, row, a.n_tiers, t)); });
}

}  // namespace

void tier_expectation(const TierArgs& args, void* stream) {
  if (args.n == 0) return;
  if (args.vocabulary == 0) {
    const unsigned blocks = static_cast<unsigned>((args.n + kThreads - 1) / kThreads);
    MR_LAUNCH(gathered_kernel, blocks, kThreads, 0, stream, args);
  } else if (args.bfloat16) {
    MR_LAUNCH(logits_kernel<true>, static_cast<unsigned>(args.n), kThreads, 0, stream, args);
  } else {
    MR_LAUNCH(logits_kernel<false>, static_cast<unsigned>(args.n), kThreads, 0, stream, args);
  }
  check_launch("tier_expectation");
}

}  // namespace megarubric::cuda

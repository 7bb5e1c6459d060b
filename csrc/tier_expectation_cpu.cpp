// Tier expectation on CPU. A row of logits is read twice (maximum, then the sum of exponentials): a row of a 152k
// vocabulary fits the second-level cache, so memory sees it once.
#include <cstring>

#include "isa.h"
#include "tier_expectation.h"

namespace megarubric {
namespace MEGARUBRIC_ISA {
namespace {

constexpr int kSums = 16;                     // partial sums of a row, whatever the register's width
constexpr int kRegisters = kSums / kLanes;
constexpr int64_t kBlock = 64 * kSums;        // terms added in float32 before float64 takes over
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

MR_INLINE float load1(const void* row, int64_t at, bool bfloat16) {
  if (!bfloat16) return static_cast<const float*>(row)[at];
  const uint32_t word = static_cast<uint32_t>(static_cast<const uint16_t*>(row)[at]) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <bool kBfloat16>
MR_INLINE Float load(const void* row, int64_t at) {
  if (kBfloat16) {
    Half half;
    std::memcpy(&half, static_cast<const uint16_t*>(row) + at, sizeof half);
    return bits_float(__builtin_convertvector(half, Int) << 16);
  }
  Float value;
  std::memcpy(&value, static_cast<const float*>(row) + at, sizeof value);
  return value;
}

// log sum exp of one row. Term t is added to partial sum t % 16; the partial sums are added in order.
template <bool kBfloat16>
double log_normaliser(const void* row, int64_t vocabulary) {
  const int64_t whole = vocabulary / kSums * kSums;
  Float top = splat(-__builtin_inff());
  for (int64_t at = 0; at < whole; at += kLanes) {
    const Float x = load<kBfloat16>(row, at);
    top = select(greater(x, top), x, top);
  }
  float highest = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) highest = top[lane] > highest ? top[lane] : highest;
  for (int64_t at = whole; at < vocabulary; ++at) {
    const float x = load1(row, at, kBfloat16);
    highest = x > highest ? x : highest;
  }
  if (!(highest > -__builtin_inff()) || highest > 3.4e38f) return __builtin_nan("");
  double sums[kSums] = {};
  for (int64_t block = 0; block < whole; block += kBlock) {
    Float partial[kRegisters] = {};
    const int64_t end = whole < block + kBlock ? whole : block + kBlock;
    for (int64_t at = block; at < end; at += kSums) {
      for (int r = 0; r < kRegisters; ++r) {
        partial[r] = partial[r] + exp_negative(highest - load<kBfloat16>(row, at + r * kLanes));
      }
    }
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] + static_cast<double>(partial[i / kLanes][i % kLanes]);
  }
  double total = 0.0;
  for (double sum : sums) total = total + sum;
  for (int64_t at = whole; at < vocabulary; ++at) {
    total = total + tier_probability(static_cast<double>(load1(row, at, kBfloat16)) - highest);
  }
  return highest + tier_log(total);
}

}  // namespace

void tier_expectation(const TierArgs& args, const ParallelFor& parallel_for) {
  const int64_t width = args.vocabulary > 0 ? args.vocabulary : args.n_tiers;
  const int64_t grain = width < 32768 ? 32768 / width : 1;
  parallel_for(args.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const void* row = static_cast<const char*>(args.rows) + i * width * (args.bfloat16 ? 2 : 4);
      if (args.vocabulary == 0) {
        read_tiers(args, i, [&](int32_t t) { return static_cast<double>(load1(row, t, args.bfloat16)); });
        continue;
      }
      const double normaliser =
          args.bfloat16 ? log_normaliser<true>(row, width) : log_normaliser<false>(row, width);
      read_tiers(args, i, [&](int32_t t) {
        return static_cast<double>(load1(row, args.token_ids[t], args.bfloat16)) - normaliser;
      });
    }
  });
}

}  // namespace MEGARUBRIC_ISA
}  // namespace megarubric

// Tier expectation on CPU. A row of logits is read twice (maximum, then the sum of exponentials): a row of a 152k
// vocabulary fits the second-level cache, so memory sees it once.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "tier_expectation.h"

namespace megarubric {
namespace MEGARUBRIC_ISA {
namespace {

typedef uint16_t Half16 __attribute__((vector_size(32)));

MR_INLINE Float load16(const void* row, int64_t at, bool bfloat16) {
  if (bfloat16) {
    Half16 half;
    std::memcpy(&half, static_cast<const uint16_t*>(row) + at, sizeof half);
    return bits_float(__builtin_convertvector(half, Int) << 16);
  }
  Float value;
  std::memcpy(&value, static_cast<const float*>(row) + at, sizeof value);
  return value;
}

MR_INLINE float load1(const void* row, int64_t at, bool bfloat16) {
  return bfloat16 ? bfloat16_to_float(static_cast<const uint16_t*>(row)[at]) : static_cast<const float*>(row)[at];
}

// log sum exp of one row: 16 lanes, float32 within 64 terms, float64 beyond, lanes added in order.
template <bool kBfloat16>
double log_normaliser(const void* row, int64_t vocabulary) {
  const int64_t whole = vocabulary / 16 * 16;
  Float top = splat(-__builtin_inff());
  for (int64_t at = 0; at < whole; at += 16) {
    const Float x = load16(row, at, kBfloat16);
    top = select(x > top, x, top);
  }
  float highest = -__builtin_inff();
  for (int lane = 0; lane < 16; ++lane) highest = std::max(highest, top[lane]);
  for (int64_t at = whole; at < vocabulary; ++at) highest = std::max(highest, load1(row, at, kBfloat16));
  if (!(highest > -__builtin_inff())) return __builtin_nan("");
  Double8 low = {}, high = {};
  typedef float Float8 __attribute__((vector_size(32)));
  for (int64_t block = 0; block < whole; block += 16 * 64) {
    Float sum = splat(0.0f);
    const int64_t end = std::min(whole, block + 16 * 64);
    for (int64_t at = block; at < end; at += 16) {
      const Float below = highest - load16(row, at, kBfloat16);
      sum = sum + exp_negative(below);
    }
    Float8 half[2];
    std::memcpy(half, &sum, sizeof sum);
    low = low + __builtin_convertvector(half[0], Double8);
    high = high + __builtin_convertvector(half[1], Double8);
  }
  double total = 0.0;
  for (int lane = 0; lane < 8; ++lane) total = total + low[lane];
  for (int lane = 0; lane < 8; ++lane) total = total + high[lane];
  for (int64_t at = whole; at < vocabulary; ++at) {
    total = total + tier_probability(static_cast<double>(load1(row, at, kBfloat16)) - highest);
  }
  return highest + tier_log(total);
}

}  // namespace

void tier_expectation(const TierArgs& args, const ParallelFor& parallel_for) {
  const int64_t width = args.vocabulary > 0 ? args.vocabulary : args.n_tiers;
  const int64_t grain = std::max<int64_t>(1, 32768 / width);
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

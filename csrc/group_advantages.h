// Advantages of one group: sums in float64 in index order, results rounded once. Shared by CPU and CUDA.
#pragma once

#include <cmath>

#include "ops.h"

#if defined(__CUDACC__)
#define MR_HOST_DEVICE __host__ __device__ inline
#else
#define MR_HOST_DEVICE inline
#endif

namespace megarubric {

struct GroupSpread {
  double mean = 0.0, std = 0.0;
  bool degenerate = true;
};

// Mean and population standard deviation over the valid members of column `k` of values [n, n_criteria].
MR_HOST_DEVICE GroupSpread group_spread(const AdvantageArgs& a, int64_t begin, int64_t end, int32_t k) {
  GroupSpread out;
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = (a.order ? a.order[at] : at) * a.n_criteria + k;
    if (a.valid[i]) {
      sum = sum + (double)a.values[i];
      ++count;
    }
  }
  const double divisor = count > 0 ? (double)count : 1.0;
  out.mean = sum / divisor;
  double squares = 0.0;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = (a.order ? a.order[at] : at) * a.n_criteria + k;
    if (a.valid[i]) {
      const double deviation = (double)a.values[i] - out.mean;
      squares = squares + deviation * deviation;
    }
  }
  out.std = sqrt(squares / divisor);
  out.degenerate = count < 2 || out.std < 1e-8;
  return out;
}

// Plain rewards [n].
MR_HOST_DEVICE void reward_advantages(const AdvantageArgs& a, int64_t group) {
  const int64_t begin = a.group_offsets[group], end = a.group_offsets[group + 1];
  const GroupSpread spread = group_spread(a, begin, end, 0);
  const double divisor = a.standardize ? spread.std + 1e-6 : 1.0;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = a.order ? a.order[at] : at;
    const bool counts = a.valid[i] && !spread.degenerate;
    a.advantages[i] = counts ? (float)(((double)a.values[i] - spread.mean) / divisor) : 0.0f;
  }
  a.degenerate[group] = spread.degenerate;
}

// Criterion scores [n, n_criteria], standardised one by one and summed with the group's weights.
MR_HOST_DEVICE void objective_wise_advantages(const AdvantageArgs& a, int64_t group) {
  const int64_t begin = a.group_offsets[group], end = a.group_offsets[group + 1];
  bool informative = false;
  for (int64_t at = begin; at < end; ++at) a.total[a.order ? a.order[at] : at] = 0.0;
  for (int32_t k = 0; k < a.n_criteria; ++k) {
    const GroupSpread spread = group_spread(a, begin, end, k);
    if (spread.degenerate) continue;
    const double weight = (double)a.weights[group * a.n_criteria + k];
    informative = informative || weight != 0.0;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = a.order ? a.order[at] : at;
      const int64_t cell = i * a.n_criteria + k;
      if (!a.valid[cell]) continue;
      a.total[i] = a.total[i] + weight * (((double)a.values[cell] - spread.mean) / (spread.std + 1e-6));
    }
  }
  for (int64_t at = begin; at < end; ++at) {
    const int64_t i = a.order ? a.order[at] : at;
    a.advantages[i] = (float)a.total[i];
  }
  a.degenerate[group] = !informative;
}

}  // namespace megarubric

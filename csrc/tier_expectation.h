// Expected tier value, entropy and mass of one row of tier log-probabilities. Shared by CPU and CUDA.
#pragma once

#include "ops.h"
#include "reward_math.h"

namespace megarubric {

// Lane 0 of the shared functions.
MR_INLINE double lane0(Double x) {
#if defined(__CUDACC__) || defined(MEGARUBRIC_SCALAR_LANES)
  return x;
#else
  return x[0];
#endif
}

MR_INLINE double tier_probability(double logprob) {
  return logprob < -700.0 ? 0.0 : lane0(exp64(splat_double(logprob)));
}

MR_INLINE double tier_log(double x) { return lane0(log64(splat_double(x))); }

// `logprob(t)` is the unrestricted log-probability of tier t, -inf allowed.
template <class Logprob>
MR_INLINE void read_tiers(const TierArgs& a, int64_t row, Logprob logprob) {
  const double nan = __builtin_nan(""), infinity = __builtin_inf();
  double top = -infinity, mass = 0.0;
  bool broken = false;
  for (int32_t t = 0; t < a.n_tiers; ++t) {
    const double l = logprob(t);
    broken = broken || !(l < infinity);
    top = l > top ? l : top;
    mass = mass + tier_probability(l);
  }
  double value = nan, entropy = nan;
  const bool dead = broken || top == -infinity;
  if (!dead) {
    double z = 0.0, weighted = 0.0, spread = 0.0;
    for (int32_t t = 0; t < a.n_tiers; ++t) {
      const double below = logprob(t) - top;
      const double p = tier_probability(below);
      z = z + p;
      weighted = weighted + p * (double)a.values[t];
      spread = spread + (p > 0.0 ? p * below : 0.0);
    }
    value = weighted / z;
    entropy = tier_log(z) - spread / z;  // -sum p log p
  }
  a.value[row] = (float)value;
  a.entropy[row] = (float)entropy;
  a.mass[row] = broken ? (float)nan : (float)mass;
  a.read[row] = !dead && mass >= a.min_mass;
}

}  // namespace megarubric

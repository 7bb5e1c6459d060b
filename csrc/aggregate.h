// spec/reward.md for one sample per lane. Included by the CPU and the CUDA kernel.
#pragma once

#include "reward_math.h"
#include "rubric_table.h"

namespace megarubric {

// A masked score is this sentinel once it is in the tile: far outside what a judged score may be.
constexpr float kMasked = -2.0f;
constexpr float kJudgedAbove = -1.0f;
constexpr float kLowestScore = -1e-6f;
constexpr float kHighestScore = 1.000001f;
constexpr int32_t kHighestBits = 0x3f800008;  // of kHighestScore

struct Reward {
  Float reward, r0, r1;
  Float divisor;       // of the criteria's attribution; 0 where the sample is unscored
  Float pair_divisor;  // of the pairs' attribution: 0 for all-pitfall samples as well
  Mask valid, vetoed;
  Int veto;  // index of the first failing veto criterion, -1: none
};

MR_INLINE Float pair_phi(const PairRecord& pair, Float x, Float y) {
  if (pair.kind == kProduct) return x * y;
  if (pair.kind == kMin) return minimum(x, y);
  const Float phi = x - y;
  return select(greater(splat(0.0f), phi), -phi, phi);
}

// `tile` gives access to the criterion's row of scores: tile.score(k) reads s, tile.set(k, g) and tile.get(k) keep g.
// Everything but r1 and reward: `finish_lanes` makes those.
template <class Tile>
MR_INLINE Reward aggregate_lanes(const RubricRecord& rubric, const CriterionRecord* criteria, const PairRecord* pairs,
                                 Tile tile) {
  const Float zero = splat(0.0f);
  Float numerator = zero, denominator = zero, magnitude = zero;
  Mask pitfall = none(), failed = none(), missing = none();
  Int veto = splat_int(-1);

  for (int k = 0; k < rubric.n_criteria; ++k) {
    const CriterionRecord c = criteria[k];
    const Float s = tile.score(k);
    const Mask judged = greater(s, splat(kJudgedAbove));
    Float g = s;
    if (c.flags & kSaturates) {
      g = select(greater(s, splat(c.theta)), c.theta + c.span * one_minus_exp2((s - c.theta) * c.rate), s);
    }
    tile.set(k, g);
    numerator = numerator + select(judged, c.weight * g, zero);
    denominator = denominator + select(judged, splat(c.ceiling_weight), zero);
    if (rubric.flags & kHasPitfall) {
      magnitude = magnitude + select(judged, splat(c.weight < 0.0f ? -c.weight : c.weight), zero);
      if (c.weight < 0.0f) pitfall = either(pitfall, judged);
    }
    if (c.flags & kVeto) {
      const Mask over = at_least(s, splat(c.tau));
      Mask fails = both(judged, (c.flags & kFailsHigh) ? over : negate(over));
      if (rubric.flags & kMissingVetoFails) fails = either(fails, negate(judged));
      if (rubric.flags & kMissingVetoUnscores) missing = either(missing, negate(judged));
      veto = select(both(fails, negate(failed)), splat_int(k), veto);
      failed = either(failed, fails);
    }
  }

  Float pair_numerator = zero, pair_denominator = zero;
  for (int j = 0; j < rubric.n_pairs; ++j) {
    const PairRecord pair = pairs[j];
    const Float x = tile.get(pair.a), y = tile.get(pair.b);
    const Mask judged = both(greater(x, splat(kJudgedAbove)), greater(y, splat(kJudgedAbove)));
    const Float phi = pair_phi(pair, x, y);
    pair_numerator = pair_numerator + select(judged, pair.weight * phi, zero);
    pair_denominator = pair_denominator + select(judged, splat(pair.ceiling_weight), zero);
  }

  Reward out;
  const Float total = denominator + pair_denominator;
  Mask scored = greater(total, zero);
  out.r0 = clip01((numerator + pair_numerator) / total);
  out.divisor = out.pair_divisor = select(scored, total, zero);
  if (rubric.flags & kHasPitfall) {
    const Mask only_pitfalls = both(pitfall, negate(scored));
    out.r0 = select(only_pitfalls, clip01(1.0f + numerator / magnitude), out.r0);
    out.divisor = select(only_pitfalls, magnitude, out.divisor);
    scored = either(scored, only_pitfalls);
  }
  out.r0 = select(scored, out.r0, quiet_nan());
  out.vetoed = failed;
  out.veto = veto;
  out.valid = either(failed, both(scored, negate(missing)));
  return out;
}

// Shaping and veto: r1 and reward from r0 (NaN where undefined), valid and vetoed.
MR_INLINE void finish_lanes(const RubricRecord& rubric, Reward& out) {
  out.r1 = out.r0;
  if (rubric.flags & kShaped) {
    const Float t = maximum((out.r0 - rubric.kappa) / (1.0f - rubric.kappa), splat(0.0f));
    const Float shaped = (out.r0 + rubric.gain * power(t, rubric.power)) / (1.0f + rubric.gain);
    out.r1 = select(at_least(out.r0, splat(0.0f)), shaped, quiet_nan());
  }
  out.reward = select(out.valid, select(out.vetoed, splat(rubric.veto_reward), out.r1), quiet_nan());
}

// Share of one criterion or pair: weight * value / divisor, 0 where masked or unscored, never -0.
MR_INLINE Float attribution_share(Float weighted, Mask judged, Float divisor) {
  return select(both(judged, greater(divisor, splat(0.0f))), weighted / divisor + 0.0f, splat(0.0f));
}

}  // namespace megarubric

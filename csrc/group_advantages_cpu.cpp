#include "group_advantages.h"

namespace megarubric::cpu {

void group_advantages(const AdvantageArgs& args, const ParallelFor& parallel_for) {
  const auto one = args.weights != nullptr ? objective_wise_advantages : reward_advantages;
  parallel_for(args.n_groups, 256, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) one(args, group);
  });
}

}  // namespace megarubric::cpu

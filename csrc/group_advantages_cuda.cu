// Group advantages on CUDA: one group per thread, sums in index order, so the CPU's bits come out. A group's rewards
// are a few neighbouring sectors, read from memory once and from cache on the second pass.
#include "device.h"
#include "group_advantages.h"

namespace megarubric::cuda {
namespace {

constexpr int kThreads = 64;

template <bool kObjectiveWise>
__global__ void __launch_bounds__(kThreads) group_advantages_kernel(AdvantageArgs a) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= a.n_groups) return;
  kObjectiveWise ? objective_wise_advantages(a, group) : reward_advantages(a, group);
}

}  // namespace

void group_advantages(const AdvantageArgs& args, void* stream) {
  if (args.n_groups == 0) return;
  const unsigned blocks = static_cast<unsigned>((args.n_groups + kThreads - 1) / kThreads);
  if (args.weights != nullptr) {
    MR_LAUNCH(group_advantages_kernel<true>, blocks, kThreads, 0, stream, args);
  } else {
    MR_LAUNCH(group_advantages_kernel<false>, blocks, kThreads, 0, stream, args);
  }
  check_launch("group_advantages");
}

}  // namespace megarubric::cuda

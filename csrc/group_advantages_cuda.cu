// Group advantages on CUDA: one group per thread, sums in index order, so the CPU's bits come out. A group's rewards
// are a few neighbouring sectors, read from memory once and from cache on the second pass.
#include "device.h"
#include "group_advantages.h"

namespace megarubric::cuda {
namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) group_advantages_kernel(AdvantageArgs a) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group < a.n_groups) group_advantages_of(a, group);
}

}  // namespace

void group_advantages(const AdvantageArgs& args, void* stream) {
  if (args.n_groups == 0) return;
  const unsigned blocks = static_cast<unsigned>((args.n_groups + kThreads - 1) / kThreads);
  MR_LAUNCH(group_advantages_kernel, blocks, kThreads, 0, stream, args);
  check_launch("group_advantages");
}

}  // namespace megarubric::cuda

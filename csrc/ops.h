// What the binding file calls: raw pointers and sizes, no torch types. The CPU and the CUDA twin take the same structs.
#pragma once

#include <cstdint>
#include <functional>

namespace megarubric {

constexpr int64_t kNothingBad = INT64_MAX;

// n samples; sample i has the scores [offsets[i], offsets[i+1]) in its rubric's criterion order.
struct AggregateArgs {
  int64_t n = 0;
  int64_t nnz = 0;
  int32_t n_tables = 1;    // > 1: a sweep; only `reward` is written, [n_tables, n]
  int64_t table_words = 0;  // words per table
  const float* scores = nullptr;
  const uint8_t* mask = nullptr;  // null: every score is judged
  const int64_t* offsets = nullptr;
  const int32_t* rubric = nullptr;
  const int32_t* table = nullptr;
  float* reward = nullptr;  // NaN where not valid
  float* r0 = nullptr;
  float* r1 = nullptr;
  uint8_t* valid = nullptr;
  uint8_t* vetoed = nullptr;
  int32_t* veto = nullptr;
  float* attribution = nullptr;       // [nnz] or null
  float* pair_attribution = nullptr;  // [n, max_pairs] or null
  int32_t max_pairs = 0;
  // bad[0]: lowest index into `scores` of an unusable judged score; bad[1]: lowest sample whose rubric index or length
  // does not fit the table. kNothingBad: none. Such samples come out as not valid.
  int64_t* bad = nullptr;
};

// Group g is order[offsets[g] .. offsets[g+1]), or that range itself where order is null.
struct AdvantageArgs {
  int64_t n = 0;
  int64_t n_groups = 0;
  int32_t n_criteria = 1;  // 1 with weights null: plain rewards; else objective-wise over scores [n, n_criteria]
  bool standardize = true;
  const float* values = nullptr;
  const uint8_t* valid = nullptr;  // same shape as values
  const int64_t* group_offsets = nullptr;
  const int64_t* order = nullptr;
  const float* weights = nullptr;  // [n_groups, n_criteria] or null
  double* total = nullptr;         // [n] scratch, objective-wise only
  float* advantages = nullptr;     // [n]
  uint8_t* degenerate = nullptr;   // [n_groups]
};

// Rows of log-probabilities [n, tiers], or of logits [n, vocabulary] with the tiers' token ids.
struct TierArgs {
  int64_t n = 0;
  int64_t vocabulary = 0;  // 0: rows are gathered log-probabilities
  int32_t n_tiers = 0;
  bool bfloat16 = false;
  const void* rows = nullptr;
  const int64_t* token_ids = nullptr;
  const float* values = nullptr;
  double min_mass = 0.5;
  float* value = nullptr;
  float* entropy = nullptr;
  float* mass = nullptr;
  uint8_t* read = nullptr;
};

// n tensors in a buffer: table[n][3] has offset, nbytes and first tile of each. A tile is tile_bytes (a multiple of 16) of
// one tensor, the last of a tensor shorter; `tiles` in all.
struct DigestArgs {
  int64_t n = 0;
  int64_t buffer_bytes = 0;
  int64_t tile_bytes = 0;
  int64_t tiles = 0;
  const uint8_t* buffer = nullptr;
  const int64_t* table = nullptr;
  uint64_t* sums = nullptr;  // [n][2]
};

// Runs body(begin, end) over [0, n) on the threads of the caller's pool; bodies must not depend on the split.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

namespace cpu {
// The vectorised kernels, one set per instruction set the library was compiled for.
struct Kernels {
  const char* name;
  void (*aggregate)(const AggregateArgs&, const ParallelFor&);
  void (*tier_expectation)(const TierArgs&, const ParallelFor&);
  void (*weight_digest)(const DigestArgs&, const ParallelFor&);
};
void group_advantages(const AdvantageArgs&, const ParallelFor&);
}  // namespace cpu

#define MEGARUBRIC_DECLARE_KERNELS(isa)                         \
  namespace isa {                                               \
  void aggregate(const AggregateArgs&, const ParallelFor&);     \
  void tier_expectation(const TierArgs&, const ParallelFor&);   \
  void weight_digest(const DigestArgs&, const ParallelFor&);    \
  }
MEGARUBRIC_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
MEGARUBRIC_DECLARE_KERNELS(avx2)
MEGARUBRIC_DECLARE_KERNELS(avx512)
#endif
#undef MEGARUBRIC_DECLARE_KERNELS

#if defined(MEGARUBRIC_CUDA) || defined(MEGARUBRIC_HOST_DEVICE) || defined(__CUDACC__)
namespace cuda {
// `stream` is a cudaStream_t. They only enqueue work (graph-capturable) and throw std::runtime_error on a launch error.
void aggregate(const AggregateArgs&, void* stream);
void group_advantages(const AdvantageArgs&, void* stream);
void tier_expectation(const TierArgs&, void* stream);
void weight_digest(const DigestArgs&, void* stream);
}  // namespace cuda
#endif

}  // namespace megarubric

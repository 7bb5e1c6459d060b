// Aggregation on CUDA: one sample per thread, one pass over the bytes.
//
// The rows of a block's consecutive samples are one contiguous span of scores, whatever their lengths. The block brings
// it in with 16-byte loads (scores) and 4-byte loads (mask), applies mask and range check on the way, and parks it in
// shared memory at index a + a / 32: threads then walk their own rows without bank conflicts for any common row length
// (8, 16, 32 criteria). Everything per sample runs in registers; outputs are written once, coalesced.
#include "aggregate.h"
#include "device.h"
#include "ops.h"

namespace megarubric::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSharedBytes = 48 * 1024;  // what every architecture gives without asking
constexpr float kUnusable = -3.0f;       // like kMasked, and spoils its sample

MR_INLINE int skewed(int at) { return at + (at >> 5); }

MR_INLINE float admit(float score, bool judged, int64_t at, const AggregateArgs& a) {
  if (!judged) return kMasked;
  if (score >= kLowestScore && score <= kHighestScore) return score;
  // A minimum does not depend on the order of arrival.
  atomicMin(reinterpret_cast<unsigned long long*>(a.bad), static_cast<unsigned long long>(at));
  return kUnusable;
}

// A row in shared memory. `raw` stays as it is for the next table of a sweep when `saturated` is elsewhere.
struct SharedRow {
  const float* raw;
  float* saturated;
  int begin;
  bool* spoiled;
  MR_INLINE float score(int k) const {
    const float s = raw[skewed(begin + k)];
    if (s < kMasked) *spoiled = true;
    return s;
  }
  MR_INLINE void set(int k, float g) const { saturated[skewed(begin + k)] = g; }
  MR_INLINE float get(int k) const { return saturated[skewed(begin + k)]; }
};

// A row in global memory, for blocks whose span does not fit: g is computed again where a pair asks for it.
struct GlobalRow {
  const AggregateArgs& args;
  const CriterionRecord* criteria;
  int64_t begin;
  bool* spoiled;
  MR_INLINE float score(int k) const {
    const int64_t at = begin + k;
    const float s = admit(args.scores[at], args.mask == nullptr || args.mask[at], at, args);
    if (s < kMasked) *spoiled = true;
    return s;
  }
  MR_INLINE void set(int, float) const {}
  MR_INLINE float get(int k) const {
    const float s = score(k);
    const CriterionRecord c = criteria[k];
    return (c.flags & kSaturates) && s > c.theta ? c.theta + c.span * one_minus_exp2((s - c.theta) * c.rate) : s;
  }
};

MR_INLINE void write_outputs(const AggregateArgs& a, int64_t i, int32_t table, const Reward& out) {
  a.reward[table * a.n + i] = out.reward;
  if (a.n_tables > 1) return;
  a.r0[i] = out.r0;
  a.r1[i] = out.r1;
  a.veto[i] = out.veto;
  a.valid[i] = out.valid;
  a.vetoed[i] = out.vetoed;
}

MR_INLINE Reward unusable_sample() {
  Reward out;
  out.reward = out.r0 = out.r1 = quiet_nan();
  out.divisor = out.pair_divisor = 0.0f;
  out.valid = out.vetoed = false;
  out.veto = -1;
  return out;
}

template <class Row>
MR_INLINE void attribute_pairs(const AggregateArgs& a, int64_t i, const RubricRecord& rubric, const PairRecord* pairs,
                               const Row& row, float divisor) {
  float* to = a.pair_attribution + i * a.max_pairs;
  for (int j = 0; j < a.max_pairs; ++j) {
    float share = 0.0f;
    if (j < rubric.n_pairs) {
      const PairRecord pair = pairs[j];
      const float x = row.get(pair.a), y = row.get(pair.b);
      share = attribution_share(pair.weight * pair_phi(pair, x, y), x > kJudgedAbove && y > kJudgedAbove, divisor);
    }
    to[j] = share;
  }
}

// Brings scores[begin, end) into shared memory. kAligned: `scores` is 16-byte and `mask` 4-byte aligned.
template <bool kAligned>
MR_INLINE void stage(const AggregateArgs& a, int64_t begin, int64_t end, float* tile) {
  const int64_t from = kAligned ? begin & ~int64_t(3) : begin;
  for (int64_t at = from + 4 * threadIdx.x; at < end; at += 4 * kThreads) {
    float score[4];
    bool judged[4] = {true, true, true, true};
    if (kAligned && at + 4 <= a.nnz) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(a.scores + at));
      score[0] = four.x, score[1] = four.y, score[2] = four.z, score[3] = four.w;
      if (a.mask != nullptr) {
        const uchar4 flags = __ldcs(reinterpret_cast<const uchar4*>(a.mask + at));
        judged[0] = flags.x, judged[1] = flags.y, judged[2] = flags.z, judged[3] = flags.w;
      }
    } else {
      for (int c = 0; c < 4; ++c) {
        if (at + c >= a.nnz) break;
        score[c] = a.scores[at + c];
        if (a.mask != nullptr) judged[c] = a.mask[at + c];
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (at + c >= begin && at + c < end) {
        tile[skewed(static_cast<int>(at + c - begin))] = admit(score[c], judged[c], at + c, a);
      }
    }
  }
}

template <bool kAligned, bool kSweep>
__global__ void __launch_bounds__(kThreads) aggregate_kernel(AggregateArgs a, int capacity) {
  MR_DYNAMIC_SHARED(float, shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads, i = first + threadIdx.x;
  const int64_t last = first + kThreads < a.n ? first + kThreads : a.n;
  const int64_t span_begin = a.offsets[first], span_end = a.offsets[last];
  const bool staged =
      span_begin >= 0 && span_begin <= span_end && span_end <= a.nnz && span_end - span_begin <= capacity;
  if (staged) {
    stage<kAligned>(a, span_begin, span_end, shared);
    __syncthreads();
  }

  int64_t begin = 0;
  int32_t index = -1;
  bool fits = false;
  if (i < a.n) {
    const auto* header = reinterpret_cast<const TableHeader*>(a.table);
    index = a.rubric[i];
    begin = a.offsets[i];
    const int64_t end = a.offsets[i + 1];
    fits = index >= 0 && index < header->n_rubrics && begin >= 0 && end <= a.nnz &&
           end - begin == reinterpret_cast<const RubricRecord*>(header + 1)[index].n_criteria &&
           (!staged || (begin >= span_begin && end <= span_end));
    if (!fits) {
      atomicMin(reinterpret_cast<unsigned long long*>(a.bad + 1), static_cast<unsigned long long>(i));
      for (int32_t p = 0; p < a.n_tables; ++p) write_outputs(a, i, p, unusable_sample());
      if (a.attribution != nullptr) {
        for (int j = 0; j < a.max_pairs; ++j) a.pair_attribution[i * a.max_pairs + j] = 0.0f;
      }
    }
  }

  float divisor = 0.0f;
  int n_criteria = 0;
  const CriterionRecord* criteria = nullptr;
  for (int32_t p = 0; fits && p < (kSweep ? a.n_tables : 1); ++p) {
    const int32_t* table = a.table + p * a.table_words;
    const RubricRecord rubric = reinterpret_cast<const RubricRecord*>(table + sizeof(TableHeader) / 4)[index];
    const auto* pairs = reinterpret_cast<const PairRecord*>(table + rubric.pairs);
    criteria = reinterpret_cast<const CriterionRecord*>(table + rubric.criteria);
    n_criteria = rubric.n_criteria;
    bool spoiled = false;
    Reward out;
    const SharedRow row{shared, kSweep ? shared + skewed(capacity) : shared, static_cast<int>(begin - span_begin),
                        &spoiled};
    const GlobalRow far_row{a, criteria, begin, &spoiled};
    out = staged ? aggregate_lanes(rubric, criteria, pairs, row) : aggregate_lanes(rubric, criteria, pairs, far_row);
    finish_lanes(rubric, out);
    if (spoiled) out = unusable_sample();
    divisor = out.divisor;
    write_outputs(a, i, p, out);
    if (!kSweep && a.attribution != nullptr) {
      if (staged) {
        attribute_pairs(a, i, rubric, pairs, row, out.pair_divisor);
      } else {
        attribute_pairs(a, i, rubric, pairs, far_row, out.pair_divisor);
      }
    }
  }
  if (kSweep || a.attribution == nullptr) return;

  // Criterion shares take the scores' place in shared memory and leave coalesced.
  if (!staged) {
    bool spoiled = false;
    for (int k = 0; k < n_criteria; ++k) {
      const float g = GlobalRow{a, criteria, begin, &spoiled}.get(k);
      a.attribution[begin + k] = attribution_share(criteria[k].weight * g, g > kJudgedAbove, divisor);
    }
    return;
  }
  if (fits) {
    const int row = static_cast<int>(begin - span_begin);
    for (int k = 0; k < n_criteria; ++k) {
      float& cell = shared[skewed(row + k)];
      cell = attribution_share(criteria[k].weight * cell, cell > kJudgedAbove, divisor);
    }
  } else if (i < a.n) {
    const int64_t end = a.offsets[i + 1] < span_end ? a.offsets[i + 1] : span_end;
    for (int64_t at = begin > span_begin ? begin : span_begin; at < end; ++at) {
      shared[skewed(static_cast<int>(at - span_begin))] = 0.0f;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < span_end - span_begin; at += kThreads) {
    a.attribution[span_begin + at] = shared[skewed(at)];
  }
}

__global__ void nothing_bad(int64_t* bad) { bad[threadIdx.x] = kNothingBad; }

template <bool kAligned, bool kSweep>
void launch(const AggregateArgs& args, int64_t blocks, int capacity, size_t bytes, void* stream) {
  MR_LAUNCH((aggregate_kernel<kAligned, kSweep>), static_cast<unsigned>(blocks), kThreads, bytes, stream, args, capacity);
}

}  // namespace

void aggregate(const AggregateArgs& args, void* stream) {
  MR_LAUNCH(nothing_bad, 1, 2, 0, stream, args.bad);
  check_launch("nothing_bad");
  if (args.n == 0) return;
  const bool sweep = args.n_tables > 1;
  // Room for the mean row and half as much again (ragged batches), in whole multiples of 32; skewed by one word in 32.
  const int64_t mean = (args.nnz + args.n - 1) / args.n;
  int64_t capacity = (mean + mean / 2 + 1) * kThreads;
  const int64_t most = kSharedBytes / 4 / (sweep ? 2 : 1) / 33 * 32;
  capacity = capacity < most ? (capacity + 31) / 32 * 32 : most;
  const size_t bytes = static_cast<size_t>(capacity + capacity / 32) * 4 * (sweep ? 2 : 1);
  const bool aligned = reinterpret_cast<uintptr_t>(args.scores) % 16 == 0 && reinterpret_cast<uintptr_t>(args.mask) % 4 == 0;
  const int64_t blocks = (args.n + kThreads - 1) / kThreads;
  const int room = static_cast<int>(capacity);
  if (aligned) {
    sweep ? launch<true, true>(args, blocks, room, bytes, stream) : launch<true, false>(args, blocks, room, bytes, stream);
  } else {
    sweep ? launch<false, true>(args, blocks, room, bytes, stream) : launch<false, false>(args, blocks, room, bytes, stream);
  }
  check_launch("aggregate");
}

}  // namespace megarubric::cuda

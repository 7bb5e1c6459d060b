// Aggregation on CPU: a register's worth of samples of one rubric at a time, one sample per lane (16 with AVX-512).
//
// Scores lie sample by sample in memory and the equations run criterion by criterion, so a group's rows are transposed
// into a [criteria][lanes] tile first; masks and range checks are applied to rows on the way. Lanes never mix: a
// sample's bits do not depend on its neighbours, on the batch's split over threads or on the instruction set.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "aggregate.h"
#include "isa.h"
#include "ops.h"

namespace megarubric {
namespace MEGARUBRIC_ISA {
namespace {


constexpr int64_t kChunk = 1024;  // samples between decisions about grouping

template <class V>
MR_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
MR_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// A square of lanes: row j holds columns of lane j; afterwards row c holds column c of all lanes.
MR_INLINE void transpose(Float (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = (Float)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 1] = (Float)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 2] = (Float)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    r[i + 3] = (Float)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit part q of r[4b + i]: column 4q + i of lanes 4b..4b+3
    const __m512 a = (__m512)r[i], b = (__m512)r[4 + i], c = (__m512)r[8 + i], d = (__m512)r[12 + i];
    t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (Float)_mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = (Float)_mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = (Float)_mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = (Float)_mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = (Float)_mm256_unpacklo_pd((__m256d)t[i], (__m256d)t[i + 2]);
    r[i + 1] = (Float)_mm256_unpackhi_pd((__m256d)t[i], (__m256d)t[i + 2]);
    r[i + 2] = (Float)_mm256_unpacklo_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
    r[i + 3] = (Float)_mm256_unpackhi_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 low = (__m256)r[i], high = (__m256)r[4 + i];
    r[i] = (Float)_mm256_permute2f128_ps(low, high, 0x20);
    r[4 + i] = (Float)_mm256_permute2f128_ps(low, high, 0x31);
  }
#else
  const Float a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const Float c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// Two [criteria][lanes] arrays: raw scores (kept for the next table of a sweep) and saturated ones.
struct Tile {
  const float* s;
  float* g;
  MR_INLINE Float score(int k) const { return load<Float>(s + kLanes * k); }
  MR_INLINE void set(int k, Float x) const { store(g + kLanes * k, x); }
  MR_INLINE Float get(int k) const { return load<Float>(g + kLanes * k); }
};

// Grows to the largest rubric once per thread. No std::vector: its code would be shared between the instruction sets.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  float* at_least(size_t floats) {
    if (floats > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
      size = data != nullptr ? floats : 0;
      if (data == nullptr) throw std::bad_alloc();
    }
    return data;
  }
};

struct Worker {
  const AggregateArgs& args;
  const RubricRecord* rubrics;
  int64_t bad_score = kNothingBad;
  int64_t bad_sample = kNothingBad;
  float* s;
  float* g;

  Worker(const AggregateArgs& a, Scratch& scratch) : args(a) {
    const auto* header = reinterpret_cast<const TableHeader*>(args.table);
    rubrics = reinterpret_cast<const RubricRecord*>(header + 1);
    // Criteria are padded to whole blocks.
    const size_t rows = (static_cast<size_t>(header->max_criteria) + kLanes - 1) / kLanes * kLanes;
    s = scratch.at_least(2 * rows * kLanes);
    g = s + rows * kLanes;
  }

  // One register of the row at `at`, of which `width` columns belong to it, and which of them are judged. Reading past
  // the row is fine, reading past the array is not (kWhole: it cannot happen here).
  template <bool kWhole>
  MR_INLINE Float load_row(int64_t at, int width, Mask& judged) const {
    if (kWhole) {
      if (args.mask != nullptr) judged = both(judged, nonzero(load<Bytes>(args.mask + at)));
      return load<Float>(args.scores + at);
    }
    float padded[kLanes] = {};
    std::memcpy(padded, args.scores + at, sizeof(float) * width);
    if (args.mask != nullptr) {
      uint8_t bytes[kLanes] = {};
      std::memcpy(bytes, args.mask + at, width);
      judged = both(judged, nonzero(load<Bytes>(bytes)));
    }
    return load<Float>(padded);
  }

  // Rows at `at` into `s`, kMasked where masked or unusable. Returns the lanes with an unusable score, as bits.
  uint32_t load_tile(const int64_t* at, int live, int n_criteria) {
    uint32_t bad_lanes = 0;
    Int column;
    for (int c = 0; c < kLanes; ++c) column[c] = c;
    for (int first = 0; first < n_criteria; first += kLanes) {
      const int width = std::min(kLanes, n_criteria - first);
      const Mask used = nonzero(column < splat_int(width));
      const bool whole = at[live - 1] + first + kLanes <= args.nnz;  // lanes are in ascending order
      Float rows[kLanes];
      // As unsigned integers the bits of floats in [0, highest] lie at or below highest's; NaN, infinity and anything
      // negative lie above. Seldom is one above, and then scores are looked at one by one.
      Unsigned top = {};
      for (int j = 0; j < kLanes; ++j) {
        Mask judged = used;
        const Float value = __builtin_expect(whole, 1) ? load_row<true>(at[j] + first, width, judged)
                                                       : load_row<false>(at[j] + first, width, judged);
        const Unsigned bits = (Unsigned)select(judged, (Int)value, splat_int(0));
        top = bits > top ? bits : top;
        rows[j] = select(judged, value, splat(kMasked));
      }
      if (__builtin_expect(any(nonzero((Int)(top > (uint32_t)kHighestBits))), 0)) {
        bad_lanes |= inspect(at, live, first, width, rows);
      }
      transpose(rows);
      for (int c = 0; c < kLanes; ++c) store(s + kLanes * (first + c), rows[c]);
    }
    return bad_lanes;
  }

  // Finds unusable scores among `rows`, notes the first and masks them.
  __attribute__((noinline)) uint32_t inspect(const int64_t* at, int live, int first, int width, Float* rows) {
    uint32_t bad_lanes = 0;
    for (int j = 0; j < kLanes; ++j) {
      for (int c = 0; c < width; ++c) {
        const float score = rows[j][c];
        if (score == kMasked && args.mask != nullptr && !args.mask[at[j] + first + c]) continue;
        if (score >= kLowestScore && score <= kHighestScore) continue;
        rows[j][c] = kMasked;
        if (j >= live) continue;  // repeats lane 0
        bad_lanes |= 1u << j;
        bad_score = std::min(bad_score, at[j] + first + c);
      }
    }
    return bad_lanes;
  }

  // `lanes`: kLanes ascending sample indices of one rubric, `at` where their rows begin; entries from `live` on repeat
  // the first and are not written. `defer`: r1 and reward are left to `finish`.
  void samples(const int64_t* lanes, const int64_t* at, int live, int32_t rubric_index, bool defer) {
    const uint32_t bad_lanes = load_tile(at, live, rubrics[rubric_index].n_criteria);
    const bool dense = live == kLanes && lanes[kLanes - 1] - lanes[0] == kLanes - 1;
    for (int32_t p = 0; p < args.n_tables; ++p) {
      const int32_t* table = args.table + p * args.table_words;
      const auto* header = reinterpret_cast<const TableHeader*>(table);
      const RubricRecord& rubric = reinterpret_cast<const RubricRecord*>(header + 1)[rubric_index];
      const auto* criteria = reinterpret_cast<const CriterionRecord*>(table + rubric.criteria);
      const auto* pairs = reinterpret_cast<const PairRecord*>(table + rubric.pairs);
      Reward out = aggregate_lanes(rubric, criteria, pairs, Tile{s, g});
      if (__builtin_expect(bad_lanes != 0, 0)) spoil_lanes(out, bad_lanes);
      if (!defer) {
        finish_lanes(rubric, out);
        write(args.reward + p * args.n, out.reward, lanes, live, dense);
        if (args.n_tables > 1) continue;
        write(args.r1, out.r1, lanes, live, dense);
      }
      write(args.r0, out.r0, lanes, live, dense);
      write(args.veto, out.veto, lanes, live, dense);
      write_flags(args.valid, out.valid, lanes, live, dense);
      write_flags(args.vetoed, out.vetoed, lanes, live, dense);
      if (args.attribution != nullptr) attribute(rubric, criteria, pairs, out, lanes, live);
    }
  }

  static void spoil_lanes(Reward& out, uint32_t bad_lanes) {
    Int bits;
    for (int j = 0; j < kLanes; ++j) bits[j] = (bad_lanes >> j) & 1;
    const Mask spoiled = nonzero(bits);
    out.valid = both(out.valid, negate(spoiled));
    out.vetoed = both(out.vetoed, negate(spoiled));
    out.veto = select(spoiled, splat_int(-1), out.veto);
    out.r0 = select(spoiled, quiet_nan(), out.r0);
    out.divisor = select(spoiled, splat(0.0f), out.divisor);
    out.pair_divisor = select(spoiled, splat(0.0f), out.pair_divisor);
  }

  template <class T, class V>
  MR_INLINE void write(T* to, V value, const int64_t* lanes, int live, bool dense) {
    if (to == nullptr) return;
    if (dense) {
      store(to + lanes[0], value);
      return;
    }
    for (int j = 0; j < live; ++j) to[lanes[j]] = value[j];
  }

  MR_INLINE void write_flags(uint8_t* to, Mask flags, const int64_t* lanes, int live, bool dense) {
    if (to == nullptr) return;
    const Bytes bytes = __builtin_convertvector(select(flags, splat_int(1), splat_int(0)), Bytes);
    if (dense) {
      store(to + lanes[0], bytes);
      return;
    }
    for (int j = 0; j < live; ++j) to[lanes[j]] = bytes[j];
  }

  // Shares leave lane by lane through a second transposition.
  void attribute(const RubricRecord& rubric, const CriterionRecord* criteria, const PairRecord* pairs, const Reward& out,
                 const int64_t* lanes, int live) {
    Float block[kLanes];
    for (int first = 0; first < rubric.n_pairs; first += kLanes) {
      const int width = std::min(kLanes, rubric.n_pairs - first);
      for (int j = 0; j < kLanes; ++j) {
        block[j] = splat(0.0f);
        if (j >= width) continue;
        const PairRecord& pair = pairs[first + j];
        const Float x = load<Float>(g + kLanes * pair.a), y = load<Float>(g + kLanes * pair.b);
        const Mask judged = both(greater(x, splat(kJudgedAbove)), greater(y, splat(kJudgedAbove)));
        block[j] = attribution_share(pair.weight * pair_phi(pair, x, y), judged, out.pair_divisor);
      }
      transpose(block);
      for (int j = 0; j < live; ++j) {
        std::memcpy(args.pair_attribution + lanes[j] * args.max_pairs + first, &block[j], sizeof(float) * width);
      }
    }
    for (int j = 0; j < live; ++j) {
      float* row = args.pair_attribution + lanes[j] * args.max_pairs;
      std::fill(row + rubric.n_pairs, row + args.max_pairs, 0.0f);
    }
    for (int first = 0; first < rubric.n_criteria; first += kLanes) {
      const int width = std::min(kLanes, rubric.n_criteria - first);
      for (int k = 0; k < kLanes; ++k) {
        block[k] = splat(0.0f);
        if (k >= width) continue;
        const Float x = load<Float>(g + kLanes * (first + k));
        block[k] = attribution_share(criteria[first + k].weight * x, greater(x, splat(kJudgedAbove)), out.divisor);
      }
      transpose(block);
      for (int j = 0; j < live; ++j) {
        std::memcpy(args.attribution + args.offsets[lanes[j]] + first, &block[j], sizeof(float) * width);
      }
    }
  }

  // A sample whose rubric or length does not fit the table: reported, written as not valid.
  void spoil(int64_t i) {
    bad_sample = std::min(bad_sample, i);
    const float nan = __builtin_nanf("");
    for (int32_t p = 0; p < args.n_tables; ++p) args.reward[p * args.n + i] = nan;
    if (args.n_tables > 1) return;
    args.r0[i] = args.r1[i] = nan;
    args.valid[i] = args.vetoed[i] = 0;
    args.veto[i] = -1;
    if (args.attribution == nullptr) return;
    std::fill_n(args.pair_attribution + i * args.max_pairs, args.max_pairs, 0.0f);
    const int64_t begin = args.offsets[i], end = args.offsets[i + 1];
    if (begin >= 0 && end <= args.nnz && begin < end) std::fill(args.attribution + begin, args.attribution + end, 0.0f);
  }

  bool fits(int64_t i) const {
    const int32_t n_rubrics = reinterpret_cast<const TableHeader*>(args.table)->n_rubrics;
    const int32_t rubric = args.rubric[i];
    if (rubric < 0 || rubric >= n_rubrics) return false;
    const int64_t begin = args.offsets[i], end = args.offsets[i + 1];
    return begin >= 0 && end <= args.nnz && end - begin == rubrics[rubric].n_criteria;
  }

  // Samples [begin, end), at most kChunk of them.
  void chunk(int64_t begin, int64_t end) {
    if (!uniform(begin, end)) {
      ragged(begin, end);
      return;
    }
    const int32_t rubric = args.rubric[begin];
    const int64_t width = rubrics[rubric].n_criteria;
    const bool defer = args.n_tables == 1 && (rubrics[rubric].flags & kShaped);
    int64_t lanes[kLanes], at[kLanes];
    for (int64_t i = begin; i < end; i += kLanes) {
      const int live = static_cast<int>(std::min<int64_t>(kLanes, end - i));
      for (int j = 0; j < kLanes; ++j) {
        lanes[j] = i + (j < live ? j : 0);
        at[j] = args.offsets[begin] + (lanes[j] - begin) * width;
      }
      samples(lanes, at, live, rubric, defer);
    }
    if (defer) finish(begin, end, rubrics[rubric]);
  }

  // Shaping of a chunk in a loop of its own. Its power is one long chain of dependent steps: done sample group by sample
  // group it would leave the core waiting, here many groups are under way at once.
  void finish(int64_t begin, int64_t end, const RubricRecord& rubric) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      Reward out;
      out.r0 = load<Float>(args.r0 + i);
      out.valid = nonzero(load<Bytes>(args.valid + i));
      out.vetoed = nonzero(load<Bytes>(args.vetoed + i));
      finish_lanes(rubric, out);
      store(args.r1 + i, out.r1);
      store(args.reward + i, out.reward);
    }
    for (; i < end; ++i) {
      Reward out;
      out.r0 = splat(args.r0[i]);
      out.valid = nonzero(splat_int(args.valid[i]));
      out.vetoed = nonzero(splat_int(args.vetoed[i]));
      finish_lanes(rubric, out);
      args.r1[i] = out.r1[0];
      args.reward[i] = out.reward[0];
    }
  }

  // Whether all samples have one rubric and lie back to back: a score matrix, not a ragged batch.
  bool uniform(int64_t begin, int64_t end) const {
    if (!fits(begin)) return false;
    const int32_t rubric = args.rubric[begin];
    const int64_t first = args.offsets[begin], width = rubrics[rubric].n_criteria;
    if (args.offsets[end] > args.nnz) return false;
    int32_t other = 0;
    int64_t astray = 0;
    for (int64_t i = begin; i < end; ++i) {
      other |= args.rubric[i] ^ rubric;
      astray |= args.offsets[i + 1] ^ (first + (i + 1 - begin) * width);
    }
    return (other | astray) == 0;
  }

  // Neighbours with one rubric are taken as they lie; where runs are short, the chunk is sorted by rubric first so that
  // lanes are not left empty.
  void ragged(int64_t begin, int64_t end) {
    int64_t order[kChunk];
    int count = 0, runs = 0;
    int32_t last = -1;
    for (int64_t i = begin; i < end; ++i) {
      if (!fits(i)) {
        spoil(i);
        continue;
      }
      runs += args.rubric[i] != last;
      last = args.rubric[i];
      order[count++] = i;
    }
    if (runs * 8 > count) {
      std::sort(order, order + count, [this](int64_t x, int64_t y) {
        return args.rubric[x] != args.rubric[y] ? args.rubric[x] < args.rubric[y] : x < y;
      });
    }
    int64_t lanes[kLanes], at[kLanes];
    for (int next = 0; next < count;) {
      const int32_t rubric = args.rubric[order[next]];
      int live = 0;
      while (live < kLanes && next < count && args.rubric[order[next]] == rubric) lanes[live++] = order[next++];
      for (int j = live; j < kLanes; ++j) lanes[j] = lanes[0];
      for (int j = 0; j < kLanes; ++j) at[j] = args.offsets[lanes[j]];
      samples(lanes, at, live, rubric, false);
    }
  }
};

void lower(std::atomic<int64_t>& target, int64_t value) {
  int64_t seen = target.load();
  while (value < seen && !target.compare_exchange_weak(seen, value)) {
  }
}

}  // namespace

void aggregate(const AggregateArgs& args, const ParallelFor& parallel_for) {
  std::atomic<int64_t> bad_score{kNothingBad}, bad_sample{kNothingBad};
  parallel_for(args.n, 2 * kChunk, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Worker worker(args, scratch);
    for (int64_t at = begin; at < end; at += kChunk) worker.chunk(at, std::min(end, at + kChunk));
    lower(bad_score, worker.bad_score);
    lower(bad_sample, worker.bad_sample);
  });
  args.bad[0] = bad_score.load();
  args.bad[1] = bad_sample.load();
}

}  // namespace MEGARUBRIC_ISA
}  // namespace megarubric

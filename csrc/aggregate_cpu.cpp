// Aggregation on CPU: sixteen samples of one rubric at a time, one sample per vector lane.
//
// Scores lie sample by sample in memory and the equations run criterion by criterion, so a group's rows are transposed
// into a [criteria][16] tile first; masks and range checks are applied to rows on the way. Lanes never mix: a sample's
// bits do not depend on its neighbours, on the batch's split over threads or on the instruction set.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "aggregate.h"
#include "isa.h"
#include "ops.h"

namespace megarubric {
namespace MEGARUBRIC_ISA {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

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

MR_INLINE bool any(Mask m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#else
  typedef int64_t L8 __attribute__((vector_size(64)));
  const L8 w = (L8)m;
  return ((w[0] | w[1]) | (w[2] | w[3]) | (w[4] | w[5]) | (w[6] | w[7])) != 0;
#endif
}

// rows: 16 vectors, row j holds 16 columns of lane j. out: 16 vectors, row c holds column c of all lanes.
MR_INLINE void transpose16(const float* rows, float* out) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(rows + 16 * i);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i + 0] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 2])));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 2])));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[4 * i + 1]), _mm512_castps_pd(t[4 * i + 3])));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[4 * i + 1]), _mm512_castps_pd(t[4 * i + 3])));
  }
  for (int i = 0; i < 4; ++i) {  // r[4b + i], 128-bit part q: column 4q + i of lanes 4b..4b+3
    const __m512 x = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), y = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    const __m512 z = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd), w = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_ps(out + 16 * i, _mm512_shuffle_f32x4(x, y, 0x88));
    _mm512_storeu_ps(out + 16 * (8 + i), _mm512_shuffle_f32x4(x, y, 0xdd));
    _mm512_storeu_ps(out + 16 * (4 + i), _mm512_shuffle_f32x4(z, w, 0x88));
    _mm512_storeu_ps(out + 16 * (12 + i), _mm512_shuffle_f32x4(z, w, 0xdd));
  }
#else
  for (int j = 0; j < 16; j += 4) {
    for (int c = 0; c < 16; c += 4) {
      const Float4 a = load<Float4>(rows + 16 * j + c), b = load<Float4>(rows + 16 * (j + 1) + c);
      const Float4 d = load<Float4>(rows + 16 * (j + 2) + c), e = load<Float4>(rows + 16 * (j + 3) + c);
      const Float4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Float4 de_low = __builtin_shufflevector(d, e, 0, 4, 1, 5), de_high = __builtin_shufflevector(d, e, 2, 6, 3, 7);
      store(out + 16 * c + j, __builtin_shufflevector(ab_low, de_low, 0, 1, 4, 5));
      store(out + 16 * (c + 1) + j, __builtin_shufflevector(ab_low, de_low, 2, 3, 6, 7));
      store(out + 16 * (c + 2) + j, __builtin_shufflevector(ab_high, de_high, 0, 1, 4, 5));
      store(out + 16 * (c + 3) + j, __builtin_shufflevector(ab_high, de_high, 2, 3, 6, 7));
    }
  }
#endif
}

// Two [criteria][16] arrays: raw scores (kept for the next table of a sweep) and saturated ones.
struct Tile {
  const float* s;
  float* g;
  MR_INLINE Float score(int k) const { return load<Float>(s + 16 * k); }
  MR_INLINE void set(int k, Float x) const { store(g + 16 * k, x); }
  MR_INLINE Float get(int k) const { return load<Float>(g + 16 * k); }
};

struct Worker {
  const AggregateArgs& args;
  const RubricRecord* rubrics;
  std::vector<float>& scratch;
  int64_t bad_score = kNothingBad;
  int64_t bad_sample = kNothingBad;
  float* s;
  float* g;

  Worker(const AggregateArgs& a, std::vector<float>& memory) : args(a), scratch(memory) {
    const auto* header = reinterpret_cast<const TableHeader*>(args.table);
    rubrics = reinterpret_cast<const RubricRecord*>(header + 1);
    // Criteria are padded to whole blocks of 16; +16 floats to align by hand.
    const size_t rows = (static_cast<size_t>(header->max_criteria) + 15) / 16 * 16;
    scratch.resize(2 * rows * 16 + 16);
    auto address = reinterpret_cast<uintptr_t>(scratch.data());
    s = reinterpret_cast<float*>((address + 63) / 64 * 64);
    g = s + rows * 16;
  }

  // Rows of up to 16 samples into `s`, masked or bad scores as kMasked. Returns lanes with a bad score, as bits.
  uint32_t load_tile(const int64_t* lanes, int live, int n_criteria) {
    uint32_t bad_lanes = 0;
    const Int column = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) float rows[256];
    for (int first = 0; first < n_criteria; first += 16) {
      const Mask used = column < (n_criteria - first);
      for (int j = 0; j < 16; ++j) {
        const int64_t at = args.offsets[lanes[j]] + first;
        const bool inside = at + 16 <= args.nnz;  // reading past the row is fine, past the array it is not
        const int width = inside ? 16 : n_criteria - first;
        alignas(64) float padded[16];
        const float* source = args.scores + at;
        if (__builtin_expect(!inside, 0)) {
          std::memset(padded, 0, sizeof padded);
          std::memcpy(padded, source, sizeof(float) * std::min(width, 16));
          source = padded;
        }
        const Float value = load<Float>(source);
        Mask judged = used;
        if (args.mask != nullptr) {
          uint8_t bytes[16] = {};
          if (__builtin_expect(inside, 1)) {
            std::memcpy(bytes, args.mask + at, 16);
          } else {
            std::memcpy(bytes, args.mask + at, std::min(width, 16));
          }
          judged &= __builtin_convertvector(load<Byte16>(bytes), Int) != 0;
        }
        const Mask good = (value >= kLowestScore) & (value <= kHighestScore);  // false for NaN
        store(rows + 16 * j, select(both(judged, good), value, splat(kMasked)));
        const Mask bad = both(judged, negate(good));
        if (__builtin_expect(any(bad), 0) && j < live) {
          bad_lanes |= 1u << j;
          for (int c = 0; c < 16; ++c) {
            if (bad[c]) bad_score = std::min(bad_score, at + c);
          }
        }
      }
      transpose16(rows, s + 16 * first);
    }
    return bad_lanes;
  }

  // `lanes`: 16 sample indices of one rubric; entries from `live` on repeat the first and are not written.
  void samples(const int64_t* lanes, int live, const RubricRecord& shape, int32_t rubric_index) {
    const uint32_t bad_lanes = load_tile(lanes, live, shape.n_criteria);
    const bool dense = live == 16 && lanes[15] - lanes[0] == 15;  // lanes are in ascending order
    for (int32_t p = 0; p < args.n_tables; ++p) {
      const int32_t* table = args.table + p * args.table_words;
      const auto* header = reinterpret_cast<const TableHeader*>(table);
      const RubricRecord& rubric = reinterpret_cast<const RubricRecord*>(header + 1)[rubric_index];
      const auto* criteria = reinterpret_cast<const CriterionRecord*>(table + rubric.criteria);
      const auto* pairs = reinterpret_cast<const PairRecord*>(table + rubric.pairs);
      Reward out = aggregate_lanes(rubric, criteria, pairs, Tile{s, g});
      if (__builtin_expect(bad_lanes != 0, 0)) {
        const Int bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
        const Mask spoiled = (bit & static_cast<int32_t>(bad_lanes)) != 0;
        out.valid &= ~spoiled;
        out.vetoed &= ~spoiled;
        out.veto = select(spoiled, splat_int(-1), out.veto);
        out.reward = select(spoiled, quiet_nan(), out.reward);
        out.r0 = select(spoiled, quiet_nan(), out.r0);
        out.r1 = select(spoiled, quiet_nan(), out.r1);
        out.divisor = select(spoiled, splat(0.0f), out.divisor);
        out.pair_divisor = select(spoiled, splat(0.0f), out.pair_divisor);
      }
      write(args.reward + p * args.n, out.reward, lanes, live, dense);
      if (args.n_tables > 1) continue;
      write(args.r0, out.r0, lanes, live, dense);
      write(args.r1, out.r1, lanes, live, dense);
      write(args.veto, out.veto, lanes, live, dense);
      write_flags(args.valid, out.valid, lanes, live, dense);
      write_flags(args.vetoed, out.vetoed, lanes, live, dense);
      if (args.attribution != nullptr) attribute(rubric, criteria, pairs, out, lanes, live);
    }
  }

  template <class T, class V>
  MR_INLINE void write(T* to, V value, const int64_t* lanes, int live, bool dense) {
    if (to == nullptr) return;
    if (dense) {
      store(to + lanes[0], value);
      return;
    }
    T each[16];
    store(each, value);
    for (int j = 0; j < live; ++j) to[lanes[j]] = each[j];
  }

  MR_INLINE void write_flags(uint8_t* to, Mask flags, const int64_t* lanes, int live, bool dense) {
    if (to == nullptr) return;
    const Byte16 bytes = __builtin_convertvector(flags & 1, Byte16);
    if (dense) {
      store(to + lanes[0], bytes);
      return;
    }
    for (int j = 0; j < live; ++j) to[lanes[j]] = bytes[j];
  }

  // Shares replace the saturated scores in `g`'s place and leave through a second transposition.
  void attribute(const RubricRecord& rubric, const CriterionRecord* criteria, const PairRecord* pairs, const Reward& out,
                 const int64_t* lanes, int live) {
    alignas(64) float block[256], turned[256];
    for (int first = 0; first < rubric.n_pairs; first += 16) {
      const int width = std::min(16, rubric.n_pairs - first);
      for (int j = 0; j < width; ++j) {
        const PairRecord& pair = pairs[first + j];
        const Float x = load<Float>(g + 16 * pair.a), y = load<Float>(g + 16 * pair.b);
        const Mask judged = both(x > kJudgedAbove, y > kJudgedAbove);
        store(block + 16 * j, attribution_share(pair.weight * pair_phi(pair, x, y), judged, out.pair_divisor));
      }
      transpose16(block, turned);
      for (int j = 0; j < live; ++j) {
        std::memcpy(args.pair_attribution + lanes[j] * args.max_pairs + first, turned + 16 * j, sizeof(float) * width);
      }
    }
    for (int j = 0; j < live; ++j) {
      float* row = args.pair_attribution + lanes[j] * args.max_pairs;
      std::fill(row + rubric.n_pairs, row + args.max_pairs, 0.0f);
    }
    for (int first = 0; first < rubric.n_criteria; first += 16) {
      const int width = std::min(16, rubric.n_criteria - first);
      for (int k = 0; k < width; ++k) {
        const Float x = load<Float>(g + 16 * (first + k));
        store(block + 16 * k, attribution_share(criteria[first + k].weight * x, x > kJudgedAbove, out.divisor));
      }
      transpose16(block, turned);
      for (int j = 0; j < live; ++j) {
        std::memcpy(args.attribution + args.offsets[lanes[j]] + first, turned + 16 * j, sizeof(float) * width);
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

  bool fits(int64_t i, int32_t n_rubrics) const {
    const int32_t rubric = args.rubric[i];
    if (rubric < 0 || rubric >= n_rubrics) return false;
    const int64_t begin = args.offsets[i], end = args.offsets[i + 1];
    return begin >= 0 && end <= args.nnz && end - begin == rubrics[rubric].n_criteria;
  }

  // Samples [begin, end), at most kChunk of them. Neighbours with one rubric are taken as they lie; where runs are
  // short, the chunk is sorted by rubric first so that lanes are not left empty.
  void chunk(int64_t begin, int64_t end) {
    const int32_t n_rubrics = reinterpret_cast<const TableHeader*>(args.table)->n_rubrics;
    int64_t order[kChunk];
    int count = 0, runs = 0;
    int32_t last = -1;
    for (int64_t i = begin; i < end; ++i) {
      if (!fits(i, n_rubrics)) {
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
    int64_t lanes[16];
    for (int at = 0; at < count;) {
      const int32_t rubric = args.rubric[order[at]];
      int live = 0;
      while (live < 16 && at < count && args.rubric[order[at]] == rubric) lanes[live++] = order[at++];
      for (int j = live; j < 16; ++j) lanes[j] = lanes[0];
      samples(lanes, live, rubrics[rubric], rubric);
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
    thread_local std::vector<float> memory;  // grows to the largest rubric once per thread
    Worker worker(args, memory);
    for (int64_t at = begin; at < end; at += kChunk) worker.chunk(at, std::min(end, at + kChunk));
    lower(bad_score, worker.bad_score);
    lower(bad_sample, worker.bad_sample);
  });
  args.bad[0] = bad_score.load();
  args.bad[1] = bad_sample.load();
}

}  // namespace MEGARUBRIC_ISA
}  // namespace megarubric

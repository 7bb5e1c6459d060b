// Weight digest on CPU: a register of words at a time, tiles on the caller's threads.
#include "weight_digest.h"

#include <atomic>
#include <cstring>

#include "isa.h"

namespace megarubric {
namespace MEGARUBRIC_ISA {
namespace {

typedef uint64_t Words __attribute__((vector_size(MR_BYTES)));
constexpr int kWords = MR_BYTES / 8;
constexpr int kUnroll = 4;  // independent chains of multiplications

// Product of the two halves of each word, one instruction where the compiler would emulate a 64-bit multiplication.
MR_INLINE Words halves(Words h) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)h, _mm512_srli_epi64((__m512i)h, 32));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)h, _mm256_srli_epi64((__m256i)h, 32));
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)h, _mm_srli_epi64((__m128i)h, 32));
#else
  return (h & 0xffffffffu) * (h >> 32);
#endif
}

DigestSums tile_sums(const DigestTile& tile) {
  Words first[kUnroll] = {}, second[kUnroll] = {}, at[kUnroll];
  for (int u = 0; u < kUnroll; ++u) {
    for (int i = 0; i < kWords; ++i) at[u][i] = static_cast<uint64_t>(tile.position + u * kWords + i) * kDigestStep;
  }
  const int64_t words = tile.nbytes / 8, whole = words / (kUnroll * kWords) * (kUnroll * kWords);
  for (int64_t w = 0; w < whole; w += kUnroll * kWords) {
    for (int u = 0; u < kUnroll; ++u) {
      Words x;
      std::memcpy(&x, tile.bytes + 8 * (w + u * kWords), sizeof x);
      const Words h = digest_mix(x + at[u]);
      first[u] += h;
      second[u] += halves(h);
      at[u] += kUnroll * kWords * kDigestStep;
    }
  }
  DigestSums sums{};
  for (int u = 0; u < kUnroll; ++u) {
    for (int i = 0; i < kWords; ++i) {
      sums.first += first[u][i];
      sums.second += second[u][i];
    }
  }
  for (int64_t w = whole; w < words; ++w) {
    uint64_t word;
    std::memcpy(&word, tile.bytes + 8 * w, sizeof word);
    add_word(sums, word, tile.position + w);
  }
  if (tile.nbytes % 8 != 0) {
    add_word(sums, partial_word(tile.bytes + 8 * words, tile.nbytes % 8), tile.position + words);
  }
  return sums;
}

}  // namespace

void weight_digest(const DigestArgs& args, const ParallelFor& parallel_for) {
  for (int64_t t = 0; t < args.n; ++t) {
    DigestSums sums{};
    add_word(sums, static_cast<uint64_t>(args.table[3 * t + 1]), 0);
    args.sums[2 * t] = sums.first;
    args.sums[2 * t + 1] = sums.second;
  }
  parallel_for(args.tiles, args.tile_bytes < (1 << 20) ? (1 << 20) / args.tile_bytes : 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const DigestTile tile = digest_tile(args, t);
      const DigestSums sums = tile_sums(tile);
      std::atomic_ref<uint64_t>(args.sums[2 * tile.tensor]).fetch_add(sums.first, std::memory_order_relaxed);
      std::atomic_ref<uint64_t>(args.sums[2 * tile.tensor + 1]).fetch_add(sums.second, std::memory_order_relaxed);
    }
  });
}

}  // namespace MEGARUBRIC_ISA
}  // namespace megarubric

// The 128-bit digest of a tensor's bytes that any number of threads can compute (megarubric/exchange/digest.py says what
// it finds): two sums modulo 2^64 over the tensor's 64-bit little-endian words, the last padded with zeros, before them
// its length as word 0. Integer sums commute, so no order has to be kept.
#pragma once

#include "ops.h"
#include "reward_math.h"

namespace megarubric {

constexpr uint64_t kDigestStep = 0x9e3779b97f4a7c15u;  // odd: no two positions of a tensor add the same

// A bijection of 64 bits in which every bit of x reaches every bit of the result (the finaliser of SplitMix64).
template <class Word>
MR_INLINE Word digest_mix(Word x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct DigestSums {  // start from DigestSums{}; no constructor, for CUDA's shared memory has none
  uint64_t first, second;
};

MR_INLINE void add_word(DigestSums& sums, uint64_t word, int64_t position) {
  const uint64_t h = digest_mix(word + static_cast<uint64_t>(position) * kDigestStep);
  sums.first += h;
  sums.second += (h & 0xffffffffu) * (h >> 32);
}

// Word at `bytes`, of which `count` < 8 are the tensor's. Any alignment.
MR_INLINE uint64_t partial_word(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

// One tile of a tensor, as the table has it.
struct DigestTile {
  int64_t tensor;
  const uint8_t* bytes;
  int64_t nbytes;
  int64_t position;  // of its first word, counted from 1
};

// Table row: offset, nbytes, first tile (the tiles of the rows before). Rows without bytes have no tile.
MR_INLINE DigestTile digest_tile(const DigestArgs& a, int64_t tile) {
  int64_t low = 0, high = a.n - 1;
  while (low < high) {  // the last row whose first tile is not behind
    const int64_t middle = (low + high + 1) / 2;
    if (a.table[3 * middle + 2] <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t offset = a.table[3 * low], nbytes = a.table[3 * low + 1];
  const int64_t begin = (tile - a.table[3 * low + 2]) * a.tile_bytes;
  int64_t count = nbytes - begin < a.tile_bytes ? nbytes - begin : a.tile_bytes;
  // The CPU op refuses such a table, CUDA cannot look: what is not in the buffer is not read.
  if (offset < 0 || begin < 0 || count < 0 || offset + begin + count > a.buffer_bytes) count = 0;
  return {low, a.buffer + offset + begin, count, begin / 8 + 1};
}

}  // namespace megarubric

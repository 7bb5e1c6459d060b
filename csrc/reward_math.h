// The functions of the reward equations for one lane (a CUDA thread) or for a CPU register of lanes: the same operations
// in the same order.
//
// Every operation here is one IEEE-754 operation. Compile without fast-math and without contraction
// (-ffp-contract=off, --fmad=false): then the Python reference, every CPU instruction set and CUDA agree bit for bit.
// megarubric/reward/numerics.py spells out the same functions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define MR_INLINE __device__ __forceinline__  // these headers only ever run on the device there
#else
#define MR_INLINE inline __attribute__((always_inline))
#endif

namespace megarubric {

#if defined(__CUDACC__) || defined(MEGARUBRIC_SCALAR_LANES)

constexpr int kLanes = 1;
using Float = float;
using Int = int32_t;
using Double = double;
using Long = int64_t;
using Mask = bool;

MR_INLINE Float splat(float x) { return x; }
MR_INLINE Int splat_int(int32_t x) { return x; }
MR_INLINE Double splat_double(double x) { return x; }
template <class T>
MR_INLINE T select(Mask m, T a, T b) {
  return m ? a : b;
}
MR_INLINE Mask greater(Float a, Float b) { return a > b; }
MR_INLINE Mask greater(Double a, Double b) { return a > b; }
MR_INLINE Mask at_least(Float a, Float b) { return a >= b; }
MR_INLINE Float minimum(Float a, Float b) { return a < b ? a : b; }
MR_INLINE Float maximum(Float a, Float b) { return a > b ? a : b; }
MR_INLINE Mask none() { return false; }
MR_INLINE Mask both(Mask a, Mask b) { return a && b; }
MR_INLINE Mask either(Mask a, Mask b) { return a || b; }
MR_INLINE Mask negate(Mask a) { return !a; }
#if defined(__CUDACC__)
MR_INLINE Int float_bits(Float x) { return __float_as_int(x); }
MR_INLINE Float bits_float(Int x) { return __int_as_float(x); }
MR_INLINE Long double_bits(Double x) { return __double_as_longlong(x); }
MR_INLINE Double bits_double(Long x) { return __longlong_as_double(x); }
#else
template <class To, class From>
MR_INLINE To pun(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
MR_INLINE Int float_bits(Float x) { return pun<Int>(x); }
MR_INLINE Float bits_float(Int x) { return pun<Float>(x); }
MR_INLINE Long double_bits(Double x) { return pun<Long>(x); }
MR_INLINE Double bits_double(Long x) { return pun<Double>(x); }
#endif

#else  // one register of lanes, by the compiler's vector types

#if defined(__AVX512F__)
#define MR_BYTES 64
#elif defined(__AVX2__)
#define MR_BYTES 32
#else  // SSE2, NEON
#define MR_BYTES 16
#endif
constexpr int kLanes = MR_BYTES / 4;
typedef float Float __attribute__((vector_size(MR_BYTES)));
typedef int32_t Int __attribute__((vector_size(MR_BYTES)));
typedef uint32_t Unsigned __attribute__((vector_size(MR_BYTES)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef double Double __attribute__((vector_size(MR_BYTES)));  // half as many lanes
typedef int64_t Long __attribute__((vector_size(MR_BYTES)));

MR_INLINE Float splat(float x) { return x - Float{}; }  // - 0 is nothing to the compiler, + 0 would be an addition
MR_INLINE Int splat_int(int32_t x) { return x - Int{}; }
MR_INLINE Double splat_double(double x) { return x - Double{}; }
MR_INLINE Int float_bits(Float x) { return (Int)x; }
MR_INLINE Float bits_float(Int x) { return (Float)x; }
MR_INLINE Long double_bits(Double x) { return (Long)x; }
MR_INLINE Double bits_double(Long x) { return (Double)x; }

#if defined(__AVX512F__)  // mask registers; the compiler would go through vectors of -1
struct Mask {
  __mmask16 bits;
};
struct DoubleMask {
  __mmask8 bits;
};
MR_INLINE Mask greater(Float a, Float b) { return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ)}; }
MR_INLINE Mask at_least(Float a, Float b) { return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ)}; }
MR_INLINE DoubleMask greater(Double a, Double b) {
  return {_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ)};
}
MR_INLINE Float select(Mask m, Float a, Float b) { return (Float)_mm512_mask_blend_ps(m.bits, (__m512)b, (__m512)a); }
MR_INLINE Int select(Mask m, Int a, Int b) { return (Int)_mm512_mask_blend_epi32(m.bits, (__m512i)b, (__m512i)a); }
MR_INLINE Double select(DoubleMask m, Double a, Double b) {
  return (Double)_mm512_mask_blend_pd(m.bits, (__m512d)b, (__m512d)a);
}
// a where a < b (a > b), else b: what the instructions do.
MR_INLINE Float minimum(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
MR_INLINE Float maximum(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
MR_INLINE Mask none() { return {0}; }
MR_INLINE Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
MR_INLINE Mask either(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
MR_INLINE Mask negate(Mask a) { return {static_cast<__mmask16>(~a.bits)}; }
MR_INLINE Mask nonzero(Int x) { return {_mm512_test_epi32_mask((__m512i)x, (__m512i)x)}; }
MR_INLINE Mask nonzero(Bytes x) { return {_mm_test_epi8_mask((__m128i)x, (__m128i)x)}; }
MR_INLINE bool any(Mask m) { return m.bits != 0; }
#else
using Mask = Int;  // all bits of a lane set where true
MR_INLINE Mask greater(Float a, Float b) { return a > b; }
MR_INLINE Mask at_least(Float a, Float b) { return a >= b; }
MR_INLINE Long greater(Double a, Double b) { return a > b; }
MR_INLINE Float select(Mask m, Float a, Float b) { return (Float)((m & (Int)a) | (~m & (Int)b)); }
MR_INLINE Int select(Mask m, Int a, Int b) { return (m & a) | (~m & b); }
MR_INLINE Double select(Long m, Double a, Double b) { return (Double)((m & (Long)a) | (~m & (Long)b)); }
MR_INLINE Float minimum(Float a, Float b) { return select(greater(b, a), a, b); }
MR_INLINE Float maximum(Float a, Float b) { return select(greater(a, b), a, b); }
MR_INLINE Mask none() { return Int{}; }
MR_INLINE Mask both(Mask a, Mask b) { return a & b; }
MR_INLINE Mask either(Mask a, Mask b) { return a | b; }
MR_INLINE Mask negate(Mask a) { return ~a; }
MR_INLINE Mask nonzero(Int x) { return x != 0; }
MR_INLINE Mask nonzero(Bytes x) { return __builtin_convertvector(x, Int) != 0; }
MR_INLINE bool any(Mask m) {
  const Long w = (Long)m;
  int64_t all = 0;
  for (int i = 0; i < kLanes / 2; ++i) all |= w[i];
  return all != 0;
}
#endif

#endif

struct Exp2 {
  Float scale, q;  // 2^-w = scale * (1 + q), |q| < 0.42
};

MR_INLINE Exp2 reduced_exp2(Float w) {
  w = minimum(w, splat(120.0f));
  const Float t = w + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer, which the low bits of t then hold
  const Float y = (t - 12582912.0f) - w;
  Float q = y * 1.5403502e-4f + 1.3390849e-3f;
  q = q * y + 9.618238e-3f;
  q = q * y + 5.5503573e-2f;
  q = q * y + 0.24022649f;
  q = q * y + 0.6931472f;
  return {bits_float((127 + 0x4B400000 - float_bits(t)) << 23), y * q};
}

// 1 - 2^-w, w >= 0, accurate where w is tiny.
MR_INLINE Float one_minus_exp2(Float w) {
  const Exp2 e = reduced_exp2(w);
  return (1.0f - e.scale) - e.scale * e.q;
}

// exp(-x), x >= 0; stays at 2^-120 beyond. Relative error about x * 6e-8: for sums in which large x count for little.
MR_INLINE Float exp_negative(Float x) {
  const Exp2 e = reduced_exp2(x * 1.4426950408889634f);
  return e.scale + e.scale * e.q;
}

// log of a normal double x > 0.
MR_INLINE Double log64(Double x) {
  const Long bits = double_bits(x);
  // x = 2^e * m with m in [1/2, 1), then one doubling where m < sqrt(1/2).
  const Long e = ((bits >> 52) & 0x7ff) - 1022;
  Double m = bits_double((bits & 0x000fffffffffffffLL) | 0x3fe0000000000000LL);
  const auto low = greater(splat_double(0.70710678118654752440), m);
  m = select(low, m + m, m);
  // Small integer to double without a conversion instruction: add it to the bits of 1.5 * 2^52.
  Double exponent = bits_double(e + 0x4338000000000000LL) - 6755399441055744.0;
  exponent = select(low, exponent - 1.0, exponent);
  const Double f = (m - 1.0) / (m + 1.0);
  const Double z = f * f;
  const Double z2 = z * z;
  const Double p = (((2.0 / 3) + (2.0 / 5) * z) + ((2.0 / 7) + (2.0 / 9) * z) * z2) + (2.0 / 11) * (z2 * z2);
  return exponent * 0.693147180369123816490 + (exponent * 1.90821492927058770002e-10 + (2.0 * f + f * (z * p)));
}

// exp(x), x <= 0; stays at exp(-700) below.
MR_INLINE Double exp64(Double x) {
  x = select(greater(x, splat_double(-700.0)), x, splat_double(-700.0));
  const Double t = x * 1.4426950408889634 + 6755399441055744.0;
  const Double n = t - 6755399441055744.0;
  const Double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  const Double r2 = r * r, r4 = r2 * r2;
  const Double low_terms = ((1.0 / 2) + (1.0 / 6) * r) + ((1.0 / 24) + (1.0 / 120) * r) * r2;
  const Double high_terms = ((1.0 / 720) + (1.0 / 5040) * r) + ((1.0 / 40320) + (1.0 / 362880) * r) * r2;
  const Double p = low_terms + high_terms * r4;
  const Long k = double_bits(t) - 0x4338000000000000LL;
  return (1.0 + (r + r2 * p)) * bits_double((k + 1023) << 52);
}

// t^p for t in [0, 1], p >= 1, in double, rounded once.
MR_INLINE Float power(Float t, float p) {
#if defined(__CUDACC__) || defined(MEGARUBRIC_SCALAR_LANES)
  const Float value = (float)exp64((double)p * log64((double)t));
#else
  typedef float Half __attribute__((vector_size(MR_BYTES / 2)));
  Half half[2];
  std::memcpy(half, &t, sizeof t);
  for (Half& h : half) {
    const Double wide = __builtin_convertvector(h, Double);
    h = __builtin_convertvector(exp64((double)p * log64(wide)), Half);
  }
  Float value;
  std::memcpy(&value, half, sizeof value);
#endif
  return select(greater(t, splat(0.0f)), value, splat(0.0f));
}

MR_INLINE Float clip01(Float x) { return minimum(maximum(x, splat(0.0f)), splat(1.0f)); }

MR_INLINE Float quiet_nan() { return bits_float(splat_int(0x7fc00000)); }

}  // namespace megarubric

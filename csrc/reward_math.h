// The reward equations for one lane (a CUDA thread) or sixteen (a CPU vector): the same operations in the same order.
//
// Every operation here is one IEEE-754 operation. Compile without fast-math and without contraction
// (-ffp-contract=off, --fmad=false): then the Python reference, every CPU instruction set and CUDA agree bit for bit.
// megarubric/reward/numerics.py spells out the same functions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MR_INLINE __device__ __forceinline__
#else
#define MR_INLINE inline __attribute__((always_inline))
#endif

namespace megarubric {

#if defined(__CUDACC__) || defined(MEGARUBRIC_SCALAR_LANES)

using Float = float;
using Int = int32_t;
using Mask = bool;
constexpr int kLanes = 1;

MR_INLINE Float splat(float x) { return x; }
MR_INLINE Int splat_int(int32_t x) { return x; }
template <class T>
MR_INLINE T select(Mask m, T a, T b) {
  return m ? a : b;
}
MR_INLINE Mask none() { return false; }
MR_INLINE Mask both(Mask a, Mask b) { return a && b; }
MR_INLINE Mask either(Mask a, Mask b) { return a || b; }
MR_INLINE Mask negate(Mask a) { return !a; }
#if defined(__CUDACC__)
MR_INLINE int32_t float_bits(float x) { return __float_as_int(x); }
MR_INLINE float bits_float(int32_t x) { return __int_as_float(x); }
MR_INLINE int64_t double_bits(double x) { return __double_as_longlong(x); }
MR_INLINE double bits_double(int64_t x) { return __longlong_as_double(x); }
#else
template <class To, class From>
MR_INLINE To pun(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
MR_INLINE int32_t float_bits(float x) { return pun<int32_t>(x); }
MR_INLINE float bits_float(int32_t x) { return pun<float>(x); }
MR_INLINE int64_t double_bits(double x) { return pun<int64_t>(x); }
MR_INLINE double bits_double(int64_t x) { return pun<double>(x); }
#endif

#else  // vectors of 16 lanes by compiler extension: one zmm, two ymm, four xmm or NEON registers

constexpr int kLanes = 16;
typedef float Float __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
typedef int64_t Long8 __attribute__((vector_size(64)));
using Mask = Int;  // all bits set where true

MR_INLINE Float splat(float x) { return Float{} + x; }
MR_INLINE Int splat_int(int32_t x) { return Int{} + x; }
MR_INLINE Float select(Mask m, Float a, Float b) { return m ? a : b; }
MR_INLINE Int select(Mask m, Int a, Int b) { return m ? a : b; }
MR_INLINE Double8 select(Long8 m, Double8 a, Double8 b) { return m ? a : b; }
MR_INLINE Mask none() { return Int{}; }
MR_INLINE Mask both(Mask a, Mask b) { return a & b; }
MR_INLINE Mask either(Mask a, Mask b) { return a | b; }
MR_INLINE Mask negate(Mask a) { return ~a; }
MR_INLINE Int float_bits(Float x) { return (Int)x; }
MR_INLINE Float bits_float(Int x) { return (Float)x; }
MR_INLINE Long8 double_bits(Double8 x) { return (Long8)x; }
MR_INLINE Double8 bits_double(Long8 x) { return (Double8)x; }

#endif

// 1 - exp(-x), x >= 0, accurate where x is tiny.
template <class F>
MR_INLINE F one_minus_exp(F x) {
  const float magic = 12582912.0f;  // rounds to the nearest integer
  const int32_t magic_bits = 0x4B400000;
  x = select(x < 80.0f, x, F{} + 80.0f);
  F t = x * 1.4426950408889634f + magic;
  F n = t - magic;
  F y = n * -2.12194440054690583e-4f - (x - n * 0.693359375f);
  F p = y * 1.3946542e-3f + 8.366656e-3f;
  p = p * y + 4.166628e-2f;
  p = p * y + 0.16666542f;
  p = p * y + 0.5f;
  F q = y + (y * y) * p;
  F scale = bits_float((127 - (float_bits(t) - magic_bits)) << 23);
  return (1.0f - scale) - scale * q;
}

// exp(-x), x >= 0; stays at exp(-80) above.
template <class F>
MR_INLINE F exp_negative(F x) {
  const float magic = 12582912.0f;
  x = select(x < 80.0f, x, F{} + 80.0f);
  F t = x * 1.4426950408889634f + magic;
  F n = t - magic;
  F y = n * -2.12194440054690583e-4f - (x - n * 0.693359375f);
  F p = y * 1.3946542e-3f + 8.366656e-3f;
  p = p * y + 4.166628e-2f;
  p = p * y + 0.16666542f;
  p = p * y + 0.5f;
  F scale = bits_float((127 - (float_bits(t) - 0x4B400000)) << 23);
  return scale + scale * (y + (y * y) * p);
}

// log of a normal double x > 0; D is double or a vector of doubles, L the integer of the same width.
template <class D, class L>
MR_INLINE D log64(D x) {
  L bits = double_bits(x);
  // x = 2^e * m with m in [1/2, 1), then one doubling where m < sqrt(1/2).
  L e = ((bits >> 52) & 0x7ff) - 1022;
  D m = bits_double((bits & 0x000fffffffffffffLL) | 0x3fe0000000000000LL);
  const auto low = m < 0.70710678118654752440;
  m = select(low, m + m, m);
  // int -> double without a conversion instruction: e is small, so adding it to the bits of 1.5 * 2^52 is exact.
  D exponent = bits_double(e + 0x4338000000000000LL) - 6755399441055744.0;
  exponent = select(low, exponent - 1.0, exponent);
  D f = (m - 1.0) / (m + 1.0);
  D z = f * f;
  D p = z * (2.0 / 21) + (2.0 / 19);
  p = p * z + (2.0 / 17);
  p = p * z + (2.0 / 15);
  p = p * z + (2.0 / 13);
  p = p * z + (2.0 / 11);
  p = p * z + (2.0 / 9);
  p = p * z + (2.0 / 7);
  p = p * z + (2.0 / 5);
  p = p * z + (2.0 / 3);
  return exponent * 0.693147180369123816490 + (exponent * 1.90821492927058770002e-10 + (2.0 * f + f * (z * p)));
}

// exp(x), x <= 0; stays at exp(-700) below.
template <class D, class L>
MR_INLINE D exp64(D x) {
  x = select(x > -700.0, x, D{} + -700.0);
  D t = x * 1.4426950408889634 + 6755399441055744.0;
  D n = t - 6755399441055744.0;
  D r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  D p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + (1.0 / 2.0);
  L k = double_bits(t) - 0x4338000000000000LL;
  return (1.0 + (r + r * r * p)) * bits_double((k + 1023) << 52);
}

// t^p for t in [0, 1], p >= 1, in double, rounded once.
MR_INLINE Float power(Float t, float p) {
#if defined(__CUDACC__) || defined(MEGARUBRIC_SCALAR_LANES)
  const double value = exp64<double, int64_t>((double)p * log64<double, int64_t>((double)t));
  return t > 0.0f ? (float)value : 0.0f;
#else
  typedef float Float8 __attribute__((vector_size(32)));
  Float8 half[2], out[2];
  std::memcpy(half, &t, sizeof t);
  for (int h = 0; h < 2; ++h) {
    Double8 wide = __builtin_convertvector(half[h], Double8);
    out[h] = __builtin_convertvector(exp64<Double8, Long8>((double)p * log64<Double8, Long8>(wide)), Float8);
  }
  Float value;
  std::memcpy(&value, out, sizeof value);
  return select(t > 0.0f, value, Float{});
#endif
}

MR_INLINE Float clip01(Float x) {
  x = select(x > 0.0f, x, splat(0.0f));
  return select(x < 1.0f, x, splat(1.0f));
}

MR_INLINE Float quiet_nan() { return bits_float(splat_int(0x7fc00000)); }

}  // namespace megarubric

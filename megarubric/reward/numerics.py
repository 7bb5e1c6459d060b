"""The two transcendental functions of the reward equations, spelled out operation by operation.

`csrc/reward_math.h` holds the same operations in the same order for C++ vectors and for CUDA threads. Every step is one
IEEE-754 operation and no step may be fused into a multiply-add, so Python, CPU and GPU return the same bits. Library
functions (`math.expm1`, `expf`, CUDA's `__expf`) differ between machines in the last place and would not.
"""

from __future__ import annotations

import math

import numpy as np

F32 = np.float32

LOG2_E = F32(1.4426950408889634)
ROUND_MAGIC = F32(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to the nearest integer
EXP2_COEFFICIENTS = tuple(
    F32(c) for c in (1.5403502e-4, 1.3390849e-3, 9.618238e-3, 5.5503573e-2, 0.24022649, 0.6931472)
)  # 2**y - 1 ~ y * Q(y), |y| <= 1/2, highest power first; fitted, error about 2e-8 relative
LARGEST_EXPONENT = F32(120.0)  # 2**-120 is far below half an ulp of 1


def one_minus_exp2(w: F32) -> F32:
    """1 - 2**-w for a float32 w >= 0, to about 2 ulp relative (also where w is tiny and 1 - 2**-w would cancel)."""
    w = w if w < LARGEST_EXPONENT else LARGEST_EXPONENT
    n = (w + ROUND_MAGIC) - ROUND_MAGIC
    y = n - w
    q = EXP2_COEFFICIENTS[0]
    for coefficient in EXP2_COEFFICIENTS[1:]:
        q = q * y + coefficient
    q = y * q
    scale = F32(math.ldexp(1.0, -int(n)))
    return (F32(1) - scale) - scale * q


# Double precision to about 1e-10, far below half a float32 ulp: log on [sqrt(1/2), sqrt(2)) by the odd series in
# f = (m-1)/(m+1), exp on |r| <= ln(2)/2 by Taylor. Terms are paired (Estrin) to shorten the chain of dependent steps.
LOG_TERMS = tuple(2.0 / k for k in (3, 5, 7, 9, 11))
EXP_TERMS = tuple(1.0 / math.factorial(k) for k in range(2, 10))
LN2_HIGH_64 = 0.693147180369123816490
LN2_LOW_64 = 1.90821492927058770002e-10
LOG2_E_64 = 1.4426950408889634
ROUND_MAGIC_64 = 6755399441055744.0  # 1.5 * 2**52
SQRT_HALF = 0.70710678118654752440
SMALLEST_EXPONENT_64 = -700.0


def log64(x: float) -> float:
    """Natural logarithm of a normal double x > 0."""
    m, e = math.frexp(x)  # m in [1/2, 1)
    if m < SQRT_HALF:
        m, e = m + m, e - 1
    f = (m - 1.0) / (m + 1.0)
    z = f * f
    z2 = z * z
    c = LOG_TERMS
    p = ((c[0] + c[1] * z) + (c[2] + c[3] * z) * z2) + c[4] * (z2 * z2)
    return e * LN2_HIGH_64 + (e * LN2_LOW_64 + (2.0 * f + f * (z * p)))


def exp64(x: float) -> float:
    """exp(x) for a double x <= 0; below exp(-700) the result stays at exp(-700)."""
    x = x if x > SMALLEST_EXPONENT_64 else SMALLEST_EXPONENT_64
    n = (x * LOG2_E_64 + ROUND_MAGIC_64) - ROUND_MAGIC_64
    r = (x - n * LN2_HIGH_64) - n * LN2_LOW_64
    r2 = r * r
    r4 = r2 * r2
    c = EXP_TERMS
    p = ((c[0] + c[1] * r) + (c[2] + c[3] * r) * r2) + ((c[4] + c[5] * r) + (c[6] + c[7] * r) * r2) * r4
    return math.ldexp(1.0 + (r + r2 * p), int(n))


def power(t: F32, p: F32) -> F32:
    """t**p for float32 t in [0, 1] and p >= 1, rounded once from double precision (so t**1 == t exactly)."""
    if t <= 0:
        return F32(0)
    return F32(exp64(float(p) * log64(float(t))))

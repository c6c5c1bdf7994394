// What happens between the two products, one vector at a time, rounding after each operation as eager PyTorch does.
#pragma once
#include <cmath>

#include "vec.h"

namespace {

inline V vexp(V x) {  // within 2 units in the last place; overflows to inf, underflows through subnormals to 0
  x = pick(x > 90.f, splat(90.f), pick(x < -110.f, splat(-110.f), x));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  V n = (x * 1.44269504f + magic) - magic;
  V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = splat(1.9900430924e-4f);
  p = p * r + 1.3934534509e-3f;
  p = p * r + 8.3332974464e-3f;
  p = p * r + 4.1666455567e-2f;
  p = p * r + 1.6666667163e-1f;
  p = p * r + 0.5f;
  p = (p * r * r + r) + 1.f;
  n = pick(n == n, n, splat(0.f));  // a NaN is in p already
  VI whole = __builtin_convertvector(n, VI), half = whole >> 1;
  V low = as_float((VU)((half + 127) << 23)), high = as_float((VU)((whole - half + 127) << 23));
  return p * low * high;
}

inline V vabs(V x) { return as_float(bits(x) & 0x7fffffffu); }
inline V with_sign_of(V x, V s) { return as_float(bits(x) | (bits(s) & 0x80000000u)); }

inline V vtanh(V x) {
  V a = vabs(x), z = x * x;
  V p = splat(-6.0477517545e-3f);
  p = p * z + 2.0962830633e-2f;
  p = p * z - 5.3843379021e-2f;
  p = p * z + 1.3332714140e-1f;
  p = p * z - 3.3333328366e-1f;
  V near = x + x * z * p, far = with_sign_of(1.f - 2.f / (vexp(a + a) + 1.f), x);
  return pick(a < 0.625f, near, far);
}

inline V verf(V x) {
  V a = vabs(x), z = x * x;
  V p = splat(7.8824938100e-5f);
  p = p * z - 8.0188538413e-4f;
  p = p * z + 5.1893116906e-3f;
  p = p * z - 2.6854328811e-2f;
  p = p * z + 1.1283597350e-1f;
  p = p * z - 3.7612625957e-1f;
  p = p * z + 1.1283791065f;
  V b = pick(a > 10.f, splat(10.f), a), t = 1.f / (b + 1.f);
  V q = splat(7.5477182865e-1f);
  q = q * t - 1.2737699747f;
  q = q * t - 4.0384081006e-1f;
  q = q * t + 2.4148924351f;
  q = q * t - 1.8334531784f;
  q = q * t - 5.6672673672e-3f;
  q = q * t + 2.4216486514e-1f;
  q = q * t + 5.6738597155e-1f;
  q = q * t + 5.6407982111e-1f;
  return pick(a < 1.f, x * p, pick(x == x, with_sign_of(1.f - t * q * vexp(-b * b), x), x));
}

inline V vsigmoid(V x) { return 1.f / (1.f + vexp(-x)); }

inline V each(V x, float (*f)(float)) {
  for (int i = 0; i < L; i++) x[i] = f(x[i]);
  return x;
}

inline V activate(V g, const moeopt_spec &s) {
  const int64_t d = s.act;
  const float alpha = (float)s.alpha;
  switch (s.activation) {
    case SILU: return round_to(g / (1.f + vexp(-g)), d);
    case GELU: return round_to(g * 0.5f * (1.f + verf(g * 0.70710678f)), d);
    case GELU_TANH: {
      V inner = 0.79788456f * (g + 0.044715f * g * g * g);
      return round_to(0.5f * g * (1.f + vtanh(inner)), d);
    }
    case RELU: return pick(g < 0.f, splat(0.f), g);
    case RELU2: { V r = pick(g < 0.f, splat(0.f), g); return round_to(r * r, d); }
    case SIGMOID: return round_to(vsigmoid(g), d);
    case TANH: return round_to(vtanh(g), d);
    case SWISH: return round_to(g * round_to(vsigmoid(round_to(g * alpha, d)), d), d);
    case SOFTCAP: return round_to(alpha * round_to(vtanh(round_to(g / alpha, d)), d), d);
    case LEAKY_RELU: return round_to(pick(g > 0.f, g, g * alpha), d);
    case ELU: return round_to(pick(g > 0.f, g, alpha * each(g, expm1f)), d);
    case MISH: {  // x tanh(log(1 + e)) with e = exp(x), without the logarithm
      V e = vexp(pick(g > 20.f, splat(20.f), g)), n = e * (e + 2.f);
      return round_to(pick(g > 20.f, g, g * (n / (n + 2.f))), d);
    }
    case SOFTPLUS: return round_to(pick(g > 20.f, g, each(each(g, expf), log1pf)), d);
    default: return g;
  }
}

inline V between(V x, const moeopt_spec &s, int low) {  // low: the bit of the lower limit; NaN stays NaN
  const int at = __builtin_ctz(low);
  if (s.clamps & low) x = pick(x < (float)s.limits[at], splat((float)s.limits[at]), x);
  if (s.clamps & (low << 1)) x = pick(x > (float)s.limits[at + 1], splat((float)s.limits[at + 1]), x);
  return x;
}

// gate and up, with bias and rounded to the compute dtype -> the input of the second product, in the compute dtype
inline V gate_product(V g, V u, const moeopt_spec &s) {
  const int64_t d = s.act;
  g = between(round_to(g, d), s, GATE_MIN);
  V a = between(activate(g, s), s, ACT_MIN);
  if (s.rows != PLAIN) {
    u = between(round_to(u, d), s, UP_MIN);
    if (s.up_offset != 0.0) u = round_to(u + (float)s.up_offset, d);
    a = round_to(a * u, d);
  }
  return round_to(a, s.compute);
}

}  // namespace

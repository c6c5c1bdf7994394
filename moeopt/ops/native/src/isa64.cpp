// The four kinds of task of a call in float64, for one instruction set: every number of it has 64 bits, so nothing is rounded
// in between. Sums are made k by k, GROUP of them at a time, whatever the number of rows: a token's bits depend on no other.
#include <cmath>
#include <cstring>

#include "isa.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef MOEOPT_KERNELS64
#define MOEOPT_KERNELS64 kernels64_generic
#define MOEOPT_ISA ISA_GENERIC
#endif
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int L = BYTES / 8, NV = 2, NX = MANY_REGISTERS ? 10 : 5, WIDE = NV * L;  // a tile: rows of x, vectors, columns
constexpr int64_t GROUP = 64, COLUMNS = COLUMNS64;
static_assert(COLUMNS % WIDE == 0, "columns of a task are whole tiles");
typedef double D __attribute__((vector_size(BYTES)));
typedef int64_t DI __attribute__((vector_size(BYTES)));
typedef uint64_t DU __attribute__((vector_size(BYTES)));

inline D load(const double *p) { D v; memcpy(&v, p, sizeof v); return v; }
inline void store(double *p, D v) { memcpy(p, &v, sizeof v); }
inline D splat(double a) { return a - D{}; }
inline DI bits(D v) { DI i; memcpy(&i, &v, sizeof i); return i; }
inline D power_of_two(DI n) { const DU i = (DU)(n + 1023) << 52; D v; memcpy(&v, &i, sizeof v); return v; }

inline double number(const void *p, int64_t dtype, int64_t i) {  // a routing weight of any dtype
  if (dtype == MOEOPT_F64) return ((const double *)p)[i];
  if (dtype == MOEOPT_F32) return ((const float *)p)[i];
  const uint16_t h = ((const uint16_t *)p)[i];
  if (dtype == MOEOPT_BF16) {
    const uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                     : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return h >> 15 ? -size : size;
}

inline double weight_of(const moeopt_call &c, int64_t t, int64_t k) {
  return number(c.weights, c.weights_dtype, t * c.weights_stride[0] + k * c.weights_stride[1]);
}

inline D vexp(D x) {  // within 2 units in the last place; overflows to inf, underflows through subnormals to 0
  x = x > 710. ? splat(710.) : x < -746. ? splat(-746.) : x;
  const double magic = 6755399441055744.;  // 1.5 * 2^52: adding it rounds to a whole number
  const D shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
  const D r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  D p = splat(1. / 6227020800.);
  constexpr double inverse[] = {1. / 479001600., 1. / 39916800., 1. / 3628800., 1. / 362880., 1. / 40320., 1. / 5040.,
                                1. / 720., 1. / 120., 1. / 24., 1. / 6., 0.5, 1., 1.};
  UNROLL for (double c : inverse) p = p * r + c;
  const DI whole = bits(shifted) - bits(splat(magic)), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

template <int ROWS_OF_X>
inline void tile(const double *w, int64_t step, const double *x, int64_t ldx, int64_t n, double *to, bool add) {
  D acc[ROWS_OF_X][NV];
  UNROLL for (int i = 0; i < ROWS_OF_X; i++)
    UNROLL for (int v = 0; v < NV; v++) acc[i][v] = D{};
  for (int64_t k = 0; k < n; k++, w += step) {
    const D a = load(w), b = load(w + L);
    UNROLL for (int i = 0; i < ROWS_OF_X; i++) {
      const D xi = splat(x[i * ldx + k]);
      acc[i][0] += a * xi, acc[i][1] += b * xi;
    }
  }
  UNROLL for (int i = 0; i < ROWS_OF_X; i++)
    UNROLL for (int v = 0; v < NV; v++) {
      double *at = to + i * COLUMNS + v * L;
      store(at, add ? load(at) + acc[i][v] : acc[i][v]);
    }
}

template <int M>
inline int64_t tile_of(int64_t rows, const double *w, int64_t step, const double *x, int64_t ldx, int64_t n, double *to, bool add) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<M - 1>(rows, w, step, x, ldx, n, to, add);
  tile<M>(w, step, x, ldx, n, to, add);
  return M;
}

// `n` of WIDE columns of W, at k .. k + kc, beside zeros: panel[k][column]
inline void turn(const double *w, int64_t so, int64_t si, int64_t n, int64_t kc, double *panel) {
  int64_t c = 0;
#if defined(__AVX2__)
  for (; si == 1 && c + 4 <= n; c += 4) {
    const double *row = w + c * so;
    int64_t k = 0;
    for (; k + 4 <= kc; k += 4) {
      const __m256d r0 = _mm256_loadu_pd(row + k), r1 = _mm256_loadu_pd(row + so + k);
      const __m256d r2 = _mm256_loadu_pd(row + 2 * so + k), r3 = _mm256_loadu_pd(row + 3 * so + k);
      const __m256d a = _mm256_unpacklo_pd(r0, r1), b = _mm256_unpackhi_pd(r0, r1);
      const __m256d d = _mm256_unpacklo_pd(r2, r3), e = _mm256_unpackhi_pd(r2, r3);
      double *to = panel + k * WIDE + c;
      _mm256_storeu_pd(to, _mm256_permute2f128_pd(a, d, 0x20)), _mm256_storeu_pd(to + WIDE, _mm256_permute2f128_pd(b, e, 0x20));
      _mm256_storeu_pd(to + 2 * WIDE, _mm256_permute2f128_pd(a, d, 0x31));
      _mm256_storeu_pd(to + 3 * WIDE, _mm256_permute2f128_pd(b, e, 0x31));
    }
    for (; k < kc; k++)
      for (int i = 0; i < 4; i++) panel[k * WIDE + c + i] = row[i * so + k];
  }
#endif
  for (; c < WIDE; c++)
    for (int64_t k = 0; k < kc; k++) panel[k * WIDE + c] = c < n ? w[c * so + k * si] : 0.;
}

// to[m * COLUMNS + j] = sum over k of W[first + j][k] * x[m * ldx + k]; the columns of `to` behind n are garbage
void product(const moeopt_matrix &W, int64_t first, int64_t row_step, int64_t n, const double *x, int64_t ldx, int64_t M, double *to,
             double *panel) {
  const int64_t so = W.stride_out * row_step, si = W.stride_in, K = W.in;
  if (!K)  // an expert without neurons: sums of nothing
    for (int64_t m = 0; m < M; m++) memset(to + m * COLUMNS, 0, n * sizeof(double));
  for (int64_t j = 0; j < n; j += WIDE)
    for (int64_t k = 0; k < K; k += GROUP) {
      const int64_t kc = K - k < GROUP ? K - k : GROUP;
      const double *w = (const double *)W.data + first * W.stride_out + j * so + k * si;
      const bool lies = so == 1 && j + WIDE <= n;  // a row of W is a row of the panel
      if (!lies) turn(w, so, si, n - j < WIDE ? n - j : WIDE, kc, panel);
      for (int64_t m = 0; m < M;)
        m += tile_of<NX>(M - m, lies ? w : panel, lies ? si : WIDE, x + m * ldx + k, ldx, kc, to + m * COLUMNS + j, k > 0);
    }
}

inline double bias_of(const moeopt_vector &b, int64_t i) { return b.data ? ((const double *)b.data)[i * b.stride] : 0.; }

template <class Function>
inline void each(double *g, int64_t n, const Function &f) {
  for (int64_t j = 0; j < n; j++) g[j] = f(g[j]);
}
template <class Function>
inline void vectors(double *g, int64_t n, const Function &f) {  // n of COLUMNS numbers; garbage behind them is welcome
  for (int64_t j = 0; j < n; j += L) store(g + j, f(load(g + j)));
}

void activate(double *g, int64_t n, const moeopt_spec &s) {
  const double alpha = s.alpha;
  switch (s.activation) {
    case SILU: return vectors(g, n, [](D x) { return x / (1. + vexp(-x)); });
    case SIGMOID: return vectors(g, n, [](D x) { return 1. / (1. + vexp(-x)); });
    case SWISH: return vectors(g, n, [=](D x) { return x * (1. / (1. + vexp(-(x * alpha)))); });
    case GELU: return each(g, n, [](double x) { return x * 0.5 * (1. + erf(x * 0.70710678118654752440)); });
    case GELU_TANH: return each(g, n, [](double x) {
      return 0.5 * x * (1. + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    });
    case RELU: return each(g, n, [](double x) { return x < 0. ? 0. : x; });
    case RELU2: return each(g, n, [](double x) { return x < 0. ? 0. : x * x; });
    case TANH: return each(g, n, [](double x) { return tanh(x); });
    case SOFTCAP: return each(g, n, [=](double x) { return alpha * tanh(x / alpha); });
    case LEAKY_RELU: return each(g, n, [=](double x) { return x > 0. ? x : x * alpha; });
    case ELU: return each(g, n, [=](double x) { return x > 0. ? x : alpha * expm1(x); });
    case MISH: return each(g, n, [](double x) { return x * tanh(log1p(exp(x))); });
    case SOFTPLUS: return each(g, n, [](double x) { return x > 20. ? x : log1p(exp(x)); });
    default: return;
  }
}

void clamp(double *x, int64_t n, const moeopt_spec &s, int low) {  // low: the bit of the lower limit; NaN stays NaN
  const double *limits = s.limits + __builtin_ctz(low);
  if (s.clamps & low) each(x, n, [=](double v) { return v < limits[0] ? limits[0] : v; });
  if (s.clamps & (low << 1)) each(x, n, [=](double v) { return v > limits[1] ? limits[1] : v; });
}

void gather(const Job &job, int64_t row, int64_t end) {
  const moeopt_call &c = *job.call;
  for (; row < end; row++) {
    const double *x = (const double *)c.x + job.token[row] * c.x_stride[0];
    const double w = c.spec->weight_on_input ? weight_of(c, job.token[row], job.slot[row]) : 1.;
    double *r = (double *)((char *)job.r + row * job.step);
    for (int64_t i = 0; i < c.H; i++) r[i] = x[i * c.x_stride[1]] * w;
  }
}

inline void keep(const Job &job, int64_t row, int64_t at, const double *from, int64_t n) {
  memcpy((double *)job.call->kept + row * job.call->kept_step + at, from, n * sizeof(double));
}

void hidden(const Job &job, const Segment &seg, int64_t first, int64_t end, float *scratch) {
  const moeopt_spec &s = *job.call->spec;
  const moeopt_expert &e = *seg.weights;
  const bool mixed = s.rows == INTERLEAVED || s.rows == INTERLEAVED_UP, gated = s.rows != PLAIN;
  const int64_t n = end - first, step = mixed ? 2 : 1;
  const int second = s.rows == SEPARATE;  // the matrix of the ups
  const int64_t gate_at = (s.rows == UP_GATE ? seg.I : s.rows == INTERLEAVED_UP ? 1 : 0) + first * step;
  const int64_t up_at = (s.rows == GATE_UP ? seg.I : s.rows == INTERLEAVED ? 1 : 0) + first * step;
  double *panel = (double *)scratch, *gates = panel + GROUP * WIDE, *ups = gates + ROWS * COLUMNS;
  for (int64_t m0 = 0; m0 < seg.count; m0 += ROWS) {
    const int64_t M = seg.count - m0 < ROWS ? seg.count - m0 : ROWS;
    const double *x = (const double *)((const char *)job.r + (seg.row + m0) * job.step);
    product(e.w_in[0], gate_at, step, n, x, seg.x.ld, M, gates, panel);
    if (gated) product(e.w_in[second], up_at, step, n, x, seg.x.ld, M, ups, panel);
    for (int64_t m = 0; m < M; m++) {
      double *g = gates + m * COLUMNS, *u = ups + m * COLUMNS;
      if (e.b_in[0].data)
        for (int64_t j = 0; j < n; j++) g[j] += bias_of(e.b_in[0], gate_at + j * step);
      if (job.call->kept) keep(job, seg.row + m0 + m, first, g, n);
      clamp(g, n, s, GATE_MIN);
      activate(g, n, s);
      clamp(g, n, s, ACT_MIN);
      if (gated) {
        if (e.b_in[second].data)
          for (int64_t j = 0; j < n; j++) u[j] += bias_of(e.b_in[second], up_at + j * step);
        if (job.call->kept) keep(job, seg.row + m0 + m, seg.I + first, u, n);
        clamp(u, n, s, UP_MIN);
        if (s.up_offset != 0.) each(u, n, [&](double v) { return v + s.up_offset; });
        for (int64_t j = 0; j < n; j++) g[j] *= u[j];
      }
      memcpy((double *)((char *)job.h + seg.h) + (m0 + m) * seg.hidden.ld + first, g, n * sizeof(double));
    }
  }
}

void output(const Job &job, const Segment &seg, int64_t first, int64_t end, float *scratch) {
  const int64_t n = end - first;
  double *panel = (double *)scratch, *to = panel + GROUP * WIDE;
  for (int64_t m0 = 0; m0 < seg.count; m0 += ROWS) {
    const int64_t M = seg.count - m0 < ROWS ? seg.count - m0 : ROWS;
    const double *h = (const double *)((const char *)job.h + seg.h) + m0 * seg.hidden.ld;
    product(seg.weights->w_out, first, 1, n, h, seg.hidden.ld, M, to, panel);
    for (int64_t m = 0; m < M; m++) {
      double *o = (double *)job.o + (seg.row + m0 + m) * job.ldo + first;
      for (int64_t j = 0; j < n; j++) o[j] = to[m * COLUMNS + j] + bias_of(seg.weights->b_out, first + j);
    }
  }
}

void combine(const Job &job, int64_t token, int64_t end, float *) {
  const moeopt_call &c = *job.call;
  const moeopt_spec &s = *c.spec;
  for (; token < end; token++) {
    double *y = (double *)c.y + token * c.D;
    for (int64_t j = 0; j < c.D; j++) y[j] = 0.;
    for (int64_t i = 0; i < c.K; i++) {
      const int64_t k = job.order[token * c.K + i], row = job.row_of[token * c.K + k];
      const double weight = weight_of(c, token, k);
      if (row >= 0) {
        const double *o = (const double *)job.o + row * job.ldo, w = s.weight_on_input ? 1. : weight;
        if (!s.has_norm) {
          for (int64_t j = 0; j < c.D; j++) y[j] += o[j] * w;
          continue;
        }
        const moeopt_vector &norm = job.segments[job.segment_of[row]].weights->norm;
        double sum = 0.;
        for (int64_t j = 0; j < c.D; j++) sum += o[j] * o[j];
        const double size = 1. / sqrt(sum / (double)c.D + s.norm_eps);
        for (int64_t j = 0; j < c.D; j++) y[j] += o[j] * size * (norm.data ? bias_of(norm, j) : 1.) * w;
      } else if (row == -2) {  // beyond E: the token itself
        const double *x = (const double *)c.x + token * c.x_stride[0];
        for (int64_t j = 0; j < c.D; j++) y[j] += x[j * c.x_stride[1]] * weight;
      }
    }
  }
}

}  // namespace

const Kernels *MOEOPT_KERNELS64() {
  static const Kernels table = {
      MOEOPT_ISA, L, false, 2 * (GROUP * WIDE + 2 * ROWS * COLUMNS), gather, hidden, output, combine, true, false, false, false, nullptr,
  };
  return &table;
}

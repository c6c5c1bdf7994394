// The four kinds of task of one call, for one instruction set: this file is compiled once for each.
#include "isa.h"

#include "act.h"
#include "product.h"
#include "vec.h"

#ifndef MOEOPT_KERNELS
#define MOEOPT_KERNELS kernels_generic
#define MOEOPT_ISA ISA_GENERIC
#endif

namespace {

constexpr int64_t WIDEST = outer_vectors(1) * L;  // columns of a tile: a product may write so many, whatever is asked for
static_assert(WIDEST <= 256, "columns of a task are whole tiles");
#if defined(__AVX512F__)
constexpr int64_t PANEL = LANE_PANEL;
#else
constexpr int64_t PANEL = PANEL_SUMS;
#endif
static_assert(PANEL >= PANEL_SUMS && PANEL >= 4 * (DOT_CHUNK + 80) && PANEL * 4 >= TILE_SCRATCH, "four rows of W fit too, and what tiles are turned to");
constexpr int64_t BIAS = 2 * MOST_COLUMNS;
constexpr int64_t APART = 16;  // rows of sums do not fall on the same cache sets
static_assert(LANE_TURN * (2 * LANE_TASK + APART) <= 2 * MOST_SUMS, "the sums of a turn of many rows");

inline int64_t rows_of_turn(const Rows &lie, int64_t count) {
  if (!lie.by_lane) return ROWS;
  const int64_t turns = (count + LANE_TURN - 1) / LANE_TURN;  // even ones: none is of few rows
  return (count + turns - 1) / turns;
}

inline int64_t product_dtype(int64_t a, int64_t b) { return a == b ? a : (int64_t)MOEOPT_F32; }

inline float weight_of(const moeopt_call &c, int64_t t, int64_t k) {
  return load_one(c.weights, c.weights_dtype, t * c.weights_stride[0] + k * c.weights_stride[1]);
}

inline View view(const moeopt_matrix &m, const Job &job, const Rows &lie) {
  const moeopt_spec &s = *job.call->spec;
  const bool exact = m.dtype == s.compute || s.compute == MOEOPT_F32;
  return {m.data, m.dtype, m.stride_out, m.stride_in, exact, m.scales, m.scale_dtype, m.scale_stride, m.block, lie.evens, s.rounds != 0,
          m.zeros, m.zero_stride, job.tiles, lie.by_lane};
}

inline View rows_of(View v, int64_t first, int64_t step) {
  const int64_t halves = v.dtype == MOEOPT_U4 ? 1 : v.dtype == MOEOPT_I8 ? 2 : v.dtype == MOEOPT_F32 ? 8 : 4;  // of bytes
  v.data = (const char *)v.data + first * v.so * halves / 2;
  if (v.scales) v.scales = (const char *)v.scales + first * v.ss * (v.scale_dtype == MOEOPT_F32 ? 4 : 2);
  if (v.zeros) v.zeros = (const char *)v.zeros + first * v.zs;
  v.so *= step, v.ss *= step, v.zs *= step;
  return v;
}

inline void load_bias(float *to, const moeopt_vector &b, int64_t first, int64_t step, int64_t n, int64_t compute) {
  for (int64_t j = 0; j < n; j++) to[j] = b.data ? round_one(load_one(b.data, b.dtype, (first + j * step) * b.stride), compute) : 0.f;
}

inline void store_up_to(void *p, int64_t dtype, int64_t i, V v, int64_t n) {
  if (n == L) store_as(p, dtype, i, v);
  else store_some(p, dtype, i, v, n);
}

void gather(const Job &job, int64_t row, int64_t end) {
  const moeopt_call &c = *job.call;
  const moeopt_spec &s = *c.spec;
  const int64_t size = c.x_dtype == MOEOPT_F32 ? 4 : 2;
  const int64_t padded = up_to(c.H, PAD), weighted = product_dtype(c.x_dtype, c.weights_dtype);
  for (; row < end; row++) {
    const char *x = (const char *)c.x + job.token[row] * c.x_stride[0] * size;
    const Rows &lie = job.segments[job.segment_of[row]].x;
    const int64_t kept = lie.half ? MOEOPT_BF16 : MOEOPT_F32;
    char *r = (char *)job.r + row * job.step;
    const float w = s.weight_on_input ? weight_of(c, job.token[row], job.slot[row]) : 1.f;
    for (int64_t i = 0; i < padded; i += L) {
      V v{};
      if (i + L <= c.H && c.x_stride[1] == 1) v = load_as(x, c.x_dtype, i);
      else for (int j = 0; j < L && i + j < c.H; j++) v[j] = load_one(x, c.x_dtype, (i + j) * c.x_stride[1]);
      if (s.weight_on_input) v = round_to(v * w, weighted);
      v = round_to(v, s.compute);
      if (i + L > c.H)
        for (int j = 0; j < L; j++) v[j] = i + j < c.H ? v[j] : 0.f;  // 0 * w is a NaN where w is one
      if (lie.by_lane) store_by_lane(r, lie.half, c.H, i, v);
      else if (lie.evens) store_evens_first((float *)r, i, v);
      else store_as(r, kept, i, v);
    }
    if (job.round_x) round_row((float *)r, c.H, job.round_x->dtype == MOEOPT_U4, zero_of(job.round_x->dtype, job.round_x->zeros));
  }
}

void hidden(const Job &job, const Segment &seg, int64_t first, int64_t end, float *scratch) {
  const moeopt_call &c = *job.call;
  const moeopt_spec &s = *c.spec;
  const moeopt_expert &e = *seg.weights;
  const Rows &lie = seg.hidden;
  const int64_t n = end - first, size = lie.half ? 2 : 4, kept = lie.half ? MOEOPT_BF16 : MOEOPT_F32;
  const bool mixed = s.rows == INTERLEAVED || s.rows == INTERLEAVED_UP, gated = s.rows != PLAIN;
  View one = view(e.w_in[0], job, seg.x), g = one, u = one;
  const int64_t half = seg.x.by_lane ? LANE_TASK : up_to(n, 256), ldt = 2 * half + APART;  // a row of sums: gates, then ups, or in turns
  float *bg = scratch, *bu = bg + MOST_COLUMNS, *panel = scratch + BIAS, *hg = panel + PANEL, *hu = hg + half;
  int64_t step = 1;  // from one gate to the next in a row of scratch
  const int64_t gate_at = s.rows == UP_GATE ? seg.I : s.rows == INTERLEAVED_UP ? 1 : 0;
  const int64_t up_at = s.rows == GATE_UP ? seg.I : s.rows == INTERLEAVED ? 1 : 0;
  const bool together = mixed && one.so == 1 && one.si != 1;  // contiguous pairs: one product for both
  if (together) {
    hg = panel + PANEL + gate_at, hu = panel + PANEL + up_at, step = 2;
  } else if (s.rows == SEPARATE) {
    u = view(e.w_in[1], job, seg.x);
  } else if (gated) {
    g = rows_of(one, gate_at, mixed ? 2 : 1), u = rows_of(one, up_at, mixed ? 2 : 1);
  }
  if (s.rows == SEPARATE) {
    load_bias(bg, e.b_in[0], first, 1, n, s.compute), load_bias(bu, e.b_in[1], first, 1, n, s.compute);
  } else {
    const int64_t jump = mixed ? 2 : 1;
    load_bias(bg, e.b_in[0], gate_at + first * jump, jump, n, s.compute);
    if (gated) load_bias(bu, e.b_in[0], up_at + first * jump, jump, n, s.compute);
  }
  const int64_t rows = rows_of_turn(seg.x, seg.count);
  for (int64_t m0 = 0; m0 < seg.count; m0 += rows) {
    const int64_t M = smaller(rows, seg.count - m0);
    const char *x = (const char *)job.r + (seg.row + m0) * job.step;
    if (together) {
      product(one, s.compute, seg.x.half, 2 * first, 2 * n, x, seg.x.ld, c.H, M, panel + PANEL, ldt, panel);
    } else {
      product(g, s.compute, seg.x.half, first, n, x, seg.x.ld, c.H, M, hg, ldt, panel);
      if (gated) product(u, s.compute, seg.x.half, first, n, x, seg.x.ld, c.H, M, hu, ldt, panel);
    }
    for (int64_t m = 0; m < M; m++) {
      char *h = (char *)job.h + seg.h + (m0 + m) * lie.ld * size;
      alignas(64) float whole[RUN_COLUMNS];  // blocks of this task, which no other writes to
      char *kept_row = (char *)c.kept + (seg.row + m0 + m) * c.kept_step * (s.compute == MOEOPT_F32 ? 4 : 2);
      for (int64_t j = 0; j < n; j += L) {
        V gate, up{};
        if (step == 1) {
          gate = load(hg + m * ldt + j);
          if (gated) up = load(hu + m * ldt + j);
        } else {
          for (int i = 0; i < L; i++) {
            const int64_t at = m * ldt + smaller(j + i, n - 1) * 2;
            gate[i] = hg[at], up[i] = hu[at];
          }
        }
        gate = round_to(gate + load(bg + j), s.compute), up = round_to(up + load(bu + j), s.compute);
        if (c.kept) {
          const int64_t left = smaller(L, n - j);
          store_up_to(kept_row, s.compute, first + j, gate, left);
          if (gated) store_up_to(kept_row, s.compute, seg.I + first + j, up, left);
        }
        V a = gate_product(gate, up, s);
        if (lie.by_lane) {
          for (int64_t i = n - j; i < L; i++) a[i] = 0.f;
          store_by_lane(h, lie.half, seg.I, first + j, a);
        } else if (job.round_h) store(whole + j, a);
        else if (lie.evens) store_evens_first((float *)h, first + j, a);  // then I is a multiple of 32, and n one of L
        else store_up_to(h, kept, first + j, a, smaller(L, n - j));
      }
      if (job.round_h) {
        const moeopt_matrix &w = *job.round_h;
        for (int64_t j = 0; j < n; j += ROW_BLOCK)
          round_block((RowBlock *)h + (first + j) / ROW_BLOCK, whole + j, smaller(ROW_BLOCK, n - j), w.dtype == MOEOPT_U4, zero_of(w.dtype, w.zeros));
      } else if (lie.by_lane) {
        for (int64_t j = up_to(n, L); end == seg.I && j < up_to(n, 2 * L); j += L) store_by_lane(h, lie.half, seg.I, first + j, V{});
      } else if (end == seg.I) memset(h + end * size, 0, (up_to(end, PAD) - end) * size);
    }
  }
}

void output(const Job &job, const Segment &seg, int64_t first, int64_t end, float *scratch) {
  const moeopt_call &c = *job.call;
  const moeopt_spec &s = *c.spec;
  const Rows &lie = seg.hidden;
  const int64_t n = end - first, size = lie.half ? 2 : 4;
  const int64_t ldt = (lie.by_lane ? LANE_TASK : up_to(n, 256)) + APART;
  float *bias = scratch, *panel = scratch + BIAS, *to = panel + PANEL;
  const View v = view(seg.weights->w_out, job, lie);
  load_bias(bias, seg.weights->b_out, first, 1, n, s.compute);
  const int64_t rows = rows_of_turn(lie, seg.count);
  for (int64_t m0 = 0; m0 < seg.count; m0 += rows) {
    const int64_t M = smaller(rows, seg.count - m0);
    const char *h = (const char *)job.h + seg.h + m0 * lie.ld * size;
    product(v, s.compute, lie.half, first, n, h, lie.ld, seg.I, M, to, ldt, panel);
    for (int64_t m = 0; m < M; m++) {
      float *o = job.o + (seg.row + m0 + m) * job.ldo + first;
      for (int64_t j = 0; j < n; j += L) {
        const V out = round_to(load(to + m * ldt + j) + load(bias + j), s.compute);
        store_up_to(o, MOEOPT_F32, j, out, smaller(L, n - j));
      }
    }
  }
}

// 1 / sqrt(mean of squares + eps) of a row, in float32
inline float norm_of(const float *o, int64_t D, double eps) {
  V sum{};
  int64_t i = 0;
  for (; i + L <= D; i += L) sum += load(o + i) * load(o + i);
  float total[4];
  sum4(sum, sum, sum, sum, total, false);
  for (; i < D; i++) total[0] += o[i] * o[i];
  return 1.f / sqrtf(total[0] / (float)D + (float)eps);
}

void combine(const Job &job, int64_t token, int64_t end, float *scratch) {
  const moeopt_call &c = *job.call;
  const moeopt_spec &s = *c.spec;
  const int64_t x_size = c.x_dtype == MOEOPT_F32 ? 4 : 2, weighted = product_dtype(c.x_dtype, c.weights_dtype);
  for (; token < end; token++) {
    const int64_t *row = job.row_of + token * c.K, *order = job.order + token * c.K;
    if (s.has_norm)
      for (int64_t k = 0; k < c.K; k++) scratch[k] = row[k] < 0 ? 0.f : norm_of(job.o + row[k] * job.ldo, c.D, s.norm_eps);
    for (int64_t j = 0; j < c.D; j += L) {
      const int64_t n = smaller(L, c.D - j);
      V y{};
      for (int64_t i = 0; i < c.K; i++) {
        const int64_t k = order[i];
        V term;
        if (row[k] >= 0) {
          const float *o = job.o + row[k] * job.ldo;
          term = n == L ? load(o + j) : load_some(o, MOEOPT_F32, j, n);
          if (s.has_norm) {
            const moeopt_vector &w = job.segments[job.segment_of[row[k]]].weights->norm;
            term *= scratch[k];
            if (w.data) {
              V weight{};
              if (n == L && w.stride == 1) weight = load_as(w.data, w.dtype, j);
              else for (int q = 0; q < n; q++) weight[q] = load_one(w.data, w.dtype, (j + q) * w.stride);
              term *= round_to(weight, s.compute);
            }
            term = round_to(term, s.compute);
          }
          if (!s.weight_on_input) term = round_to(term * weight_of(c, token, k), s.term);
        } else if (row[k] == -2) {  // beyond E: the token itself
          const char *x = (const char *)c.x + token * c.x_stride[0] * x_size;
          V v{};
          if (n == L && c.x_stride[1] == 1) v = load_as(x, c.x_dtype, j);
          else for (int q = 0; q < n; q++) v[q] = load_one(x, c.x_dtype, (j + q) * c.x_stride[1]);
          term = round_to(v * weight_of(c, token, k), weighted);
        } else {
          continue;
        }
        y = round_to(y + round_to(term, s.accum), s.accum);
      }
      store_up_to(c.y, c.y_dtype, token * c.D + j, y, n);
    }
  }
}

}  // namespace

const Kernels *MOEOPT_KERNELS() {
#if defined(__AVX512BF16__)
  constexpr bool paired = true;
#else
  constexpr bool paired = false;
#endif
  static const Kernels table = {
      MOEOPT_ISA, L, paired, BIAS + PANEL + 2 * MOST_SUMS + ROWS * APART, gather, hidden, output, combine, false, Outer<F32>::streams, VBYTES == 64, VBYTES == 64, nullptr,
  };
  return &table;
}

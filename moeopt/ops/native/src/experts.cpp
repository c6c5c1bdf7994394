// One call: rows are sorted by expert, cut into segments, and done in stages by one queue of tasks each.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "isa.h"
#include "pool.h"
#include "run.h"
#include "team.h"
#include "workspace.h"

namespace {

constexpr int64_t MOST_ROWS = 256;                 // of a segment
constexpr int64_t MOST_HIDDEN = 64 << 20;          // bytes of hidden rows that are alive at once
constexpr int64_t FEW_PRODUCTS = 1 << 18;          // multiply-adds below which a thread is not worth waking
constexpr int64_t GATHERED = 16, COMBINED = 4;     // rows, tokens of one task

struct Wrong {};  // a size, dtype or index that has no meaning

int64_t padded(int64_t n, int64_t size) {  // rows that do not fall on the same cache sets
  n = (n + 63) / 64 * 64;
  return n * size % 1024 ? n : n + 64 / size;
}

bool is_float(int64_t d) { return d == MOEOPT_F32 || d == MOEOPT_F64 || d == MOEOPT_BF16 || d == MOEOPT_F16; }

// float64 stands beside itself alone, but for the routing weights
bool all_wide(const moeopt_call &c) {
  const moeopt_spec &s = *c.spec;
  for (int64_t d : {c.x_dtype, c.y_dtype, s.compute, s.act, s.accum, s.term})
    if (d != MOEOPT_F64) return false;
  return true;
}
bool none_wide(const moeopt_call &c) {
  const moeopt_spec &s = *c.spec;
  for (int64_t d : {c.x_dtype, c.y_dtype, c.weights_dtype, s.compute, s.act, s.accum, s.term})
    if (d == MOEOPT_F64) return false;
  return true;
}

bool is_weight(const moeopt_matrix &m, bool wide, bool rounds) {
  if (rounds ? m.dtype != MOEOPT_I8 && m.dtype != MOEOPT_U4 : m.zeros != nullptr) return false;
  if (rounds && ((m.block % 32 && m.block < m.in) || (m.zeros && m.dtype != MOEOPT_U4))) return false;
  if (wide || m.dtype == MOEOPT_F64) return wide && m.dtype == MOEOPT_F64;
  if (is_float(m.dtype)) return true;
  if (m.dtype != MOEOPT_I8 && m.dtype != MOEOPT_U4) return false;
  const bool even = m.dtype == MOEOPT_I8 || (m.stride_out % 2 == 0 && (m.block % 2 == 0 || m.block >= m.in));
  return m.scales && is_float(m.scale_dtype) && m.scale_dtype != MOEOPT_F64 && m.block > 0 && m.stride_in == 1 && even;
}

int64_t read_id(const moeopt_call &c, int64_t t, int64_t k) {
  const int64_t at = t * c.ids_stride[0] + k * c.ids_stride[1];
  return c.ids_dtype == MOEOPT_I32 ? ((const int32_t *)c.ids)[at] : ((const int64_t *)c.ids)[at];
}

moeopt_expert entry(const moeopt_call &c, int64_t e) {
  if (c.index) {
    if (c.index[e] < 0) throw Wrong();
    return c.experts[c.index[e]];
  }
  moeopt_expert x = c.experts[0];
  const void **at[7] = {&x.w_in[0].data, &x.w_in[1].data, &x.w_out.data, &x.b_in[0].data,
                        &x.b_in[1].data, &x.b_out.data,   &x.norm.data};
  for (int i = 0; i < 7; i++)
    if (*at[i]) *at[i] = (const char *)*at[i] + e * c.expert_step[i];
  return x;
}

void check(const moeopt_expert &x, const moeopt_call &c, bool wide) {
  const moeopt_spec &s = *c.spec;
  const bool separate = s.rows == SEPARATE;
  if (x.w_in[0].in != c.H || x.w_out.out != c.D) throw Wrong();
  if (x.w_in[0].out != x.w_out.in * (separate || s.rows == PLAIN ? 1 : 2)) throw Wrong();
  if (separate && (x.w_in[1].in != c.H || x.w_in[1].out != x.w_out.in || !is_weight(x.w_in[1], wide, s.rounds))) throw Wrong();
  if (!is_weight(x.w_in[0], wide, s.rounds) || !is_weight(x.w_out, wide, s.rounds)) throw Wrong();
  for (const moeopt_vector *v : {&x.b_in[0], &x.b_in[1], &x.b_out, &x.norm})
    if (v->data && (v->dtype == MOEOPT_F64) != wide) throw Wrong();
}

struct Plan {
  const moeopt_call &c;
  const Kernels &k;
  Job job{};
  std::vector<int64_t> token, slot, segment_of, row_of, order;
  std::vector<Segment> segments;
  std::vector<moeopt_expert> experts;
  std::vector<int64_t> batches;  // first segment of each batch, and the number of segments
  Workspace r, h, o;
  int64_t products = 0, size = 4;  // size: bytes of a number that is kept between

  Plan(const moeopt_call &call, const Kernels &kernels) : c(call), k(kernels) {
    size = k.wide ? 8 : 4;
    sort_rows();
    cut();
    for (int64_t t = 0; t < c.T * c.K; t++) order[t] = t % c.K;
    if (c.spec->by_expert)
      for (int64_t t = 0; t < c.T; t++)
        std::stable_sort(&order[t * c.K], &order[t * c.K] + c.K,
                         [&](int64_t a, int64_t b) { return read_id(c, t, a) < read_id(c, t, b); });
    const int64_t rows = (int64_t)token.size();
    if (c.spec->rounds && !experts.empty()) round_for(experts[0]);
    job.call = &c;
    job.tiles = k.tiles;
    job.rows = rows;
    for (const Segment &seg : segments) job.step = std::max(job.step, padded(c.H, bytes(seg.x)) * bytes(seg.x));
    for (Segment &seg : segments) seg.x.ld = job.step / bytes(seg.x);
    job.ldo = padded(c.D, size);
    place_hidden();
    r = Workspace(rows * job.step);
    o = Workspace(rows * job.ldo * size);
    job.token = token.data(), job.slot = slot.data(), job.segment_of = segment_of.data();
    job.row_of = row_of.data(), job.order = order.data(), job.segments = segments.data();
    job.r = r.data(), job.h = h.data(), job.o = (float *)o.data();
  }

  // rows are rounded once, for what is 0 among the codes that they meet: all experts have the same
  void round_for(const moeopt_expert &first) {
    auto alike = [](const moeopt_matrix &a, const moeopt_matrix &b) { return a.dtype == b.dtype && !a.zeros == !b.zeros; };
    for (const moeopt_expert &x : experts) {
      const bool second = c.spec->rows != SEPARATE || alike(x.w_in[1], first.w_in[0]);
      if (!alike(x.w_in[0], first.w_in[0]) || !second || !alike(x.w_out, first.w_out)) throw Wrong();
    }
    job.round_x = &first.w_in[0], job.round_h = &first.w_out;
  }

  void sort_rows() {
    const int64_t N = c.T * c.K;
    std::vector<int64_t> begin(c.E + 1);
    row_of.assign(N, -1), order.resize(N);
    for (int64_t t = 0; t < c.T; t++)
      for (int64_t i = 0; i < c.K; i++) {
        const int64_t e = read_id(c, t, i);
        if (e >= 0 && e < c.E) begin[e + 1]++;
        else if (e >= c.E && c.spec->identity_beyond) row_of[t * c.K + i] = -2;
      }
    for (int64_t e = 0; e < c.E; e++) begin[e + 1] += begin[e];
    token.resize(begin[c.E]), slot.resize(begin[c.E]), segment_of.resize(begin[c.E]);
    ends = begin;
    for (int64_t t = 0; t < c.T; t++)
      for (int64_t i = 0; i < c.K; i++) {
        const int64_t e = read_id(c, t, i);
        if (e < 0 || e >= c.E) continue;
        const int64_t row = ends[e]++;
        token[row] = t, slot[row] = i, row_of[t * c.K + i] = row;
      }
  }

  void cut() {
    int64_t row = 0, hit = 0;
    for (int64_t e = 0, last = 0; e < c.E; last = ends[e++]) hit += ends[e] > last;
    experts.reserve(hit);  // segments point into it
    for (int64_t e = 0; e < c.E; e++) {
      if (ends[e] == row) continue;
      experts.push_back(entry(c, e));
      check(experts.back(), c, k.wide);
      const moeopt_expert &w = experts.back();
      const int64_t I = w.w_out.in;
      const Rows x = rows_for(w.w_in[0], c.spec->rows == SEPARATE ? w.w_in[1] : w.w_in[0]), hidden = rows_for(w.w_out, w.w_out);
      if (c.kept && I * (c.spec->rows == PLAIN ? 1 : 2) > c.kept_step) throw Wrong();
      const int64_t n = ends[e] - row, parts = (n + MOST_ROWS - 1) / MOST_ROWS;
      products += n * I * (c.H * (c.spec->rows == PLAIN ? 1 : 2) + c.D);
      for (int64_t p = 0; p < parts; p++) {
        const int64_t count = (n - 1) / parts + 1, first = row + p * count;
        if (first >= ends[e]) break;
        segments.push_back({e, first, std::min(count, ends[e] - first), I, 0, x, hidden, &experts.back()});
        Segment &seg = segments.back();
        seg.x.by_lane = by_lane(w.w_in[0], x, seg.count) && (c.spec->rows != SEPARATE || by_lane(w.w_in[1], x, seg.count));
        seg.hidden.by_lane = by_lane(w.w_out, hidden, seg.count);
        for (int64_t i = first; i < first + segments.back().count; i++) segment_of[i] = (int64_t)segments.size() - 1;
      }
      row = ends[e];
    }
  }

  // of rows that both matrices multiply
  Rows rows_for(const moeopt_matrix &one, const moeopt_matrix &other) const {
    const bool halves = k.dot_bf16 && c.spec->compute == MOEOPT_BF16;
    const bool evens = k.evens && c.spec->compute == MOEOPT_F32 && !c.spec->rounds;
    auto paired = [](const moeopt_matrix &m) { return m.dtype == MOEOPT_BF16 && (m.stride_in == 1 || m.stride_out == 1); };
    auto pairs = [](const moeopt_matrix &m) { return m.dtype == MOEOPT_U4 && m.block == 32 && m.in % 32 == 0; };
    return {halves && paired(one) && paired(other), evens && pairs(one) && pairs(other), false, 0};
  }

  bool by_lane(const moeopt_matrix &m, const Rows &rows, int64_t count) const {
    const bool exact = is_float(m.dtype) && (m.dtype == c.spec->compute || c.spec->compute == MOEOPT_F32);
    return c.isa & MOEOPT_BY_LANE && k.by_lane && exact && m.stride_in == 1 && m.in >= LANE_LEAST && count >= LANE_ROWS && !(rows.half && k.tiles);
  }

  int64_t bytes(const Rows &rows) const { return rows.half ? 2 : size; }

  void place_hidden() {
    int64_t at = 0, most = 0;
    for (int64_t i = 0; i < (int64_t)segments.size(); i++) {
      Segment &s = segments[i];
      s.hidden.ld = padded(s.I, bytes(s.hidden));
      const int64_t own = s.count * s.hidden.ld * bytes(s.hidden);
      if (i == 0 || at + own > MOST_HIDDEN) batches.push_back(i), at = 0;
      s.h = at, at += own, most = std::max(most, at);
    }
    batches.push_back((int64_t)segments.size());
    h = Workspace(most);
  }

  std::vector<int64_t> ends;
};

struct Stage {
  enum Kind { GATHER, HIDDEN, OUTPUT, COMBINE } kind;
  int64_t tasks, first, last;  // segments
  std::vector<int64_t> upto;   // tasks up to and with each of these segments
};

struct Work {
  const Plan &plan;
  std::vector<Stage> stages;
  std::unique_ptr<std::atomic<int64_t>[]> next;
  std::vector<Workspace> scratch;
  std::unique_ptr<Progress[]> progress;

  explicit Work(const Plan &p, int64_t threads) : plan(p) {
    const moeopt_call &c = p.c;
    for (int64_t i = 0; i < threads; i++) scratch.emplace_back(4 * std::max(p.k.scratch, c.K));
    stages.push_back({Stage::GATHER, (p.job.rows + GATHERED - 1) / GATHERED, 0, 0, {}});
    for (size_t b = 0; b + 1 < p.batches.size(); b++)
      for (Stage::Kind kind : {Stage::HIDDEN, Stage::OUTPUT}) {
        Stage stage{kind, 0, p.batches[b], p.batches[b + 1], {}};
        for (int64_t i = stage.first; i < stage.last; i++) {
          const int64_t all = kind == Stage::HIDDEN ? p.segments[i].I : c.D, block = columns(kind, p.segments[i]);
          stage.upto.push_back(stage.tasks += (all + block - 1) / block);
        }
        stages.push_back(std::move(stage));
      }
    stages.push_back({Stage::COMBINE, (c.T + COMBINED - 1) / COMBINED, 0, 0, {}});
    next.reset(new std::atomic<int64_t>[stages.size()]());
    progress.reset(new Progress[stages.size()]);
  }

  static bool across(const moeopt_matrix &m) { return m.stride_out == 1 && m.stride_in != 1; }

  int64_t columns(Stage::Kind kind, const Segment &s) const {
    const moeopt_matrix &w = kind == Stage::HIDDEN ? s.weights->w_in[0] : s.weights->w_out;
    if (plan.k.wide) return COLUMNS64;
    if (w.stride_in == 1 && w.in <= TURNED && !plan.job.round_x) return TURNED_COLUMNS;
    const Rows &rows = kind == Stage::HIDDEN ? s.x : s.hidden;
    const int64_t wide = kind == Stage::HIDDEN ? s.I : plan.c.D, all = (int64_t)plan.segments.size() * wide;
    if (!across(w)) {
      if (plan.k.tiles && rows.half) return TILE_COLUMNS;
      if (rows.by_lane || (kind == Stage::HIDDEN && s.hidden.by_lane)) return LANE_TASK;
      const int64_t least = plan.job.round_x ? ROUNDED_COLUMNS : LEAST_COLUMNS;
      if (!plan.job.round_x && !is_float(w.dtype)) return least;
      int64_t run = RUN_COLUMNS;
      while (scratch.size() > 1 && run > least && all < TASKS_EACH * run * (int64_t)scratch.size()) run /= 2;
      return run;
    }
    int64_t block = columns_across(s.count, w.dtype, plan.k.streams);
    while (scratch.size() > 1 && block > 256 && all < 2 * block * (int64_t)scratch.size()) block /= 2;  // work for each thread
    if (wide > block && block > 256) {  // shares of a like size: a narrow one is read in short runs
      const int64_t parts = (wide + block - 1) / block;
      block = ((wide + parts - 1) / parts + 255) / 256 * 256;
    }
    return block;
  }

  void task(const Stage &stage, int64_t t, float *mine) const {
    const Plan &p = plan;
    if (stage.kind == Stage::GATHER) return p.k.gather(p.job, t * GATHERED, std::min((t + 1) * GATHERED, p.job.rows));
    if (stage.kind == Stage::COMBINE)
      return p.k.combine(p.job, t * COMBINED, std::min((t + 1) * COMBINED, p.c.T), mine);
    const int64_t i = std::upper_bound(stage.upto.begin(), stage.upto.end(), t) - stage.upto.begin();
    const Segment &s = p.segments[stage.first + i];
    const int64_t block = columns(stage.kind, s), first = (i ? t - stage.upto[i - 1] : t) * block;
    if (stage.kind == Stage::HIDDEN) p.k.hidden(p.job, s, first, std::min(first + block, s.I), mine);
    else p.k.output(p.job, s, first, std::min(first + block, p.c.D), mine);
  }

  int64_t drain(size_t s, int64_t me) {
    int64_t mine = 0;
    for (int64_t t; (t = next[s].fetch_add(1, std::memory_order_relaxed)) < stages[s].tasks; mine++)
      task(stages[s], t, (float *)scratch[me].data());
    return mine;
  }

  static void body(void *context, int64_t me) {
    Work &w = *(Work *)context;
    for (size_t s = 0; s < w.stages.size(); s++) {
      const int64_t of = w.stages[s].tasks;
      if (const int64_t mine = w.drain(s, me)) w.progress[s].done(mine, of);
      w.progress[s].wait(of);
    }
  }

  // on another's threads, of which some may come when the tasks are done: no barrier, one round for each stage
  void rounds(ParallelFor each, void *threads) {
    for (now = 0; now < stages.size(); now++) {
      const auto share = [](void *work, size_t me) { ((Work *)work)->drain(((Work *)work)->now, (int64_t)me); };
      if (!each(threads, share, scratch.size(), this)) drain(now, 0);
    }
  }
  size_t now = 0;
};

#if defined(MOEOPT_HAVE_AMX_BF16)
// All but products of bfloat16 is as with the instruction set below.
#if defined(MOEOPT_TILES_ON_GENERIC)  // of tests, whose tiles are plain C++
constexpr int64_t UNDER_TILES = ISA_GENERIC;
const Kernels *under_tiles(bool wide) { return wide ? kernels64_generic() : kernels_generic(); }
#else
constexpr int64_t UNDER_TILES = ISA_AVX512_BF16;
const Kernels *under_tiles(bool wide) { return wide ? kernels64_avx512_bf16() : kernels_avx512_bf16(); }
#endif

const Kernels *kernels_with_tiles() {
  static const Kernels table = [] {
    Kernels made = *under_tiles(false);
    made.isa = ISA_AMX_BF16, made.dot_bf16 = true, made.tiles = multiply_by_tiles;
    return made;
  }();
  return &table;
}
#endif

#if defined(__x86_64__)
bool has_avx_vnni() {  // compilers learnt its name later than that of AVX-512's
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

int64_t cpu_isas() {
  __builtin_cpu_init();
  int64_t found = ISA_GENERIC;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= ISA_AVX2;
  if (found & ISA_AVX2 && has_avx_vnni()) found |= ISA_AVX2_VNNI;
  if (found & ISA_AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found |= ISA_AVX512;
#if defined(MOEOPT_HAVE_AVX512_VNNI) || defined(MOEOPT_HAVE_AVX512_BF16)
  if (found & ISA_AVX512 && __builtin_cpu_supports("avx512vnni")) found |= ISA_AVX512_VNNI;
#endif
#if defined(MOEOPT_HAVE_AVX512_BF16)
  if (found & ISA_AVX512_VNNI && __builtin_cpu_supports("avx512bf16")) found |= ISA_AVX512_BF16;
#endif
#if defined(MOEOPT_HAVE_AMX_BF16)
  if (found & UNDER_TILES && tiles_of_this_process() == 0) found |= ISA_AMX_BF16;
#endif
  return found;
}
#elif defined(__aarch64__)
int64_t cpu_isas() { return ISA_GENERIC | ISA_NEON; }  // which each of them has
#else
int64_t cpu_isas() { return ISA_GENERIC; }
#endif

const Kernels *kernels_of(int64_t isa, bool wide = false) {
  (void)isa, (void)wide;
#if defined(MOEOPT_HAVE_AMX_BF16)
  if (isa == ISA_AMX_BF16) return wide ? under_tiles(true) : kernels_with_tiles();
#endif
#if defined(MOEOPT_HAVE_AVX2)
  if (isa == ISA_AVX2) return wide ? kernels64_avx2() : kernels_avx2();
#endif
#if defined(MOEOPT_HAVE_AVX2_VNNI)
  if (isa == ISA_AVX2_VNNI) return wide ? kernels64_avx2_vnni() : kernels_avx2_vnni();
#endif
#if defined(MOEOPT_HAVE_AVX512)
  if (isa == ISA_AVX512) return wide ? kernels64_avx512() : kernels_avx512();
#endif
#if defined(MOEOPT_HAVE_AVX512_VNNI)
  if (isa == ISA_AVX512_VNNI) return wide ? kernels64_avx512_vnni() : kernels_avx512_vnni();
#endif
#if defined(MOEOPT_HAVE_AVX512_BF16)
  if (isa == ISA_AVX512_BF16) return wide ? kernels64_avx512_bf16() : kernels_avx512_bf16();
#endif
#if defined(MOEOPT_HAVE_NEON)
  if (isa == ISA_NEON) return wide ? kernels64_neon() : kernels_neon();
#endif
#if defined(MOEOPT_HAVE_GENERIC)
  if (isa == ISA_GENERIC) return wide ? kernels64_generic() : kernels_generic();
#endif
  return nullptr;
}

}  // namespace

extern "C" int64_t moeopt_abi(void) { return MOEOPT_ABI; }

extern "C" int64_t moeopt_tiles(void) {
#if defined(MOEOPT_HAVE_AMX_BF16)
  return tiles_of_this_process();
#else
  return 1;
#endif
}

extern "C" int64_t moeopt_isas(void) {
  const int64_t here = cpu_isas();
  int64_t found = 0;
  for (int64_t isa = ISA_GENERIC; isa <= ISA_NEON; isa <<= 1)
    if (isa & here && kernels_of(isa)) found |= isa;
  return found;
}

extern "C" int64_t moeopt_experts(const moeopt_call *call) { return run_experts(call, nullptr, nullptr); }

int64_t run_experts(const moeopt_call *call, ParallelFor each, void *threads) {
  if (call->abi != MOEOPT_ABI || !(call->isa & moeopt_isas())) return 1;
  const moeopt_call &c = *call;
  if (c.T < 0 || c.K < 1 || c.E < 1 || c.H < 1 || c.D < 1 || !is_float(c.x_dtype) || !is_float(c.weights_dtype) ||
      !is_float(c.y_dtype) || (c.ids_dtype != MOEOPT_I32 && c.ids_dtype != MOEOPT_I64))
    return 3;
  const bool wide = c.x_dtype == MOEOPT_F64;
  if (!(wide ? all_wide(c) : none_wide(c))) return 3;
  if (!c.T) return 0;
  try {
    const Plan plan(c, *kernels_of(c.isa & ~MOEOPT_BY_LANE, wide));
    int64_t most = std::max<int64_t>(1, std::min(c.threads, 1 + plan.products / FEW_PRODUCTS));
    // all of OpenMP's threads or none: a call of fewer would end the others, and the next one of PyTorch's begin them anew
    const bool team = !each && most > 1 && 2 * most >= c.threads && has_team();
    if (team) most = c.threads;
    Work work(plan, most);
    if (each && most > 1) work.rounds(each, threads);
    else if (team) run_team(most, Work::body, &work);
    else run_parallel(most, Work::body, &work);
  } catch (const std::bad_alloc &) {
    return 2;
  } catch (const Wrong &) {
    return 3;
  }
  return 0;
}

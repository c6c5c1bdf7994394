// The kernel as a custom operator of ONNX Runtime, moeopt::Experts: x (T, H), ids (T, K), weights (T, K) and constants.
//
// Constants, all float32: E of W_in and E of W_out, or with `stacked` one (E, ., .) of each; then a table for each of the
// attributes b_in, b_out and norm that is 1, of E rows or more. Their sizes and the attributes are checked when a session
// is made, those of the other inputs at each call; ids that name no expert are left out, or add the token itself.
//
// moeopt::ExpertsOnCodes takes quantised weights: each matrix is two constants, codes (out, ...) of `codes` bits, whose row
// is one of `hidden` or `inner` weights and what fills its last byte or block, and scales (out, blocks of `block` weights).
// With `rounds` its products read rows rounded to 8 bits (rounded.h).
#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ort_read.h"
#include "run.h"

namespace {

struct Op : ort::CustomOp {
  Api api;
  int64_t isa;
};

struct Ops {
  Op floats, codes;
  ort::Domain *domain = nullptr;
};

struct Node {
  const Api api;
  const int64_t isa;
  moeopt_spec spec{};
  std::vector<moeopt_expert> experts;
  std::vector<int64_t> index;
  int64_t H = 0, D = 0;

  Node(const Op &op, const ort::KernelInfo *info) : api(op.api), isa(op.isa) {
    const Reader read{api, info};
    read_spec(read);
    const int64_t E = read.whole("experts", 0);
    size_t count = 0;
    must(api, api.input_count(info, &count), "its inputs cannot be counted");
    const bool stacked = read.whole("stacked", 0), norm = read.whole("norm", 0);
    const bool b_in = read.whole("b_in", 0), b_out = read.whole("b_out", 0);
    const int64_t bits = read.whole("codes", 0);
    spec.rounds = read.whole("rounds", 0) != 0;
    if (spec.rounds && !bits) throw Bad{"rows are rounded to 8 bits for codes, and its weights are floats"};
    const bool separate = spec.rows == SEPARATE;
    if (separate && !bits) throw Bad{"gate and up in weights of their own are not what a graph of floats holds"};
    const size_t matrices = bits ? (separate ? 6 : 4) * (size_t)E : stacked ? 2 : 2 * (size_t)E;
    if (E < 1 || E > 1 << 20 || count != 3 + matrices + b_in + b_out + norm) throw Bad{"it has more or fewer constants than its attributes say"};
    size_t next = 3;
    experts.resize(E), index.resize(E);
    for (int64_t e = 0; e < E; e++) index[e] = e;
    if (bits) read_codes(read, next, bits, separate);
    else read_floats(read, next, stacked);
    H = experts[0].w_in[0].in, D = experts[0].w_out.out;
    const int64_t I = experts[0].w_out.in, O = I * (spec.rows == PLAIN || separate ? 1 : 2);
    for (const moeopt_expert &x : experts)
      if (x.w_in[0].in != H || x.w_in[0].out != O || (separate && x.w_in[1].out != O) || x.w_out.in != I || x.w_out.out != D || H < 1 || I < 1 || D < 1)
        throw Bad{"the sizes of its weights do not fit one another"};
    if (b_in) table(info, next++, separate ? 2 * O : O, [](moeopt_expert &x) -> moeopt_vector & { return x.b_in[0]; });
    if (b_in && separate)
      for (moeopt_expert &x : experts) x.b_in[1] = {(const float *)x.b_in[0].data + O, MOEOPT_F32, 1};
    if (b_out) table(info, next++, D, [](moeopt_expert &x) -> moeopt_vector & { return x.b_out; });
    if (norm) table(info, next++, D, [](moeopt_expert &x) -> moeopt_vector & { return x.norm; });
    if (spec.identity_beyond && H != D) throw Bad{"an id beyond the experts adds the token, whose width is not the output's"};
  }

  void read_floats(const Reader &read, size_t &next, bool stacked) {
    const int64_t E = (int64_t)experts.size();
    const bool in_io = read.word("w_in", {"oi", "io"}), out_io = read.word("w_out", {"oi", "io"});
    for (const bool out : {false, true})
      for (int64_t e = 0; e < E; e += stacked ? E : 1) {
        const Tensor w = constant(read.info, next++);
        const std::vector<int64_t> &n = w.sizes;
        if (n.size() != (stacked ? 3u : 2u) || (stacked && n[0] != E)) throw Bad{"a weight has another rank or number of experts than it may"};
        const int64_t rows = n[n.size() - 2], columns = n[n.size() - 1];
        const bool io = out ? out_io : in_io;
        for (int64_t i = 0; i < (stacked ? E : 1); i++) {
          moeopt_matrix &to = out ? experts[e + i].w_out : experts[e + i].w_in[0];
          to.data = (const float *)w.data + i * rows * columns;
          to.dtype = MOEOPT_F32;
          to.out = io ? columns : rows, to.in = io ? rows : columns;
          to.stride_out = io ? 1 : columns, to.stride_in = io ? columns : 1;
        }
      }
  }

  void read_codes(const Reader &read, size_t &next, int64_t bits, bool separate) {
    const int64_t hidden = read.whole("hidden", 0), inner = read.whole("inner", 0), block = read.whole("block", 0);
    const int64_t most = int64_t(1) << 40;
    if ((bits != 4 && bits != 8) || hidden < 1 || inner < 1 || block < 0 || hidden > most || inner > most || block > most) throw Bad{"its attributes say nothing that codes can be"};
    for (const bool out : {false, true})
      for (moeopt_expert &x : experts)
        for (int part = 0; part < (separate && !out ? 2 : 1); part++)
          matrix_of_codes(read.info, next, out ? x.w_out : x.w_in[part], bits, out ? inner : hidden, block);
  }

  void matrix_of_codes(const ort::KernelInfo *info, size_t &next, moeopt_matrix &to, int64_t bits, int64_t in, int64_t block) const {
    const Tensor codes = constant(info, next, bits == 8 ? ANY : ort::UINT8), scales = constant(info, next + 1, ANY);
    next += 2;
    if (codes.type != ort::UINT8 && codes.type != ort::INT8) throw Bad{"codes of 8 bits are int8, or uint8 about 128"};
    if (codes.sizes.size() < 2 || scales.sizes.size() < 2) throw Bad{"codes or scales are no matrix"};
    const int64_t a_row = codes.after_first() * (8 / bits), b = block ? block : in, blocks = (in + b - 1) / b;
    if (a_row < in || scales.sizes[0] != codes.sizes[0] || scales.after_first() != blocks) throw Bad{"codes and scales do not fit one another"};
    if (spec.rounds && b % 32 && b < in) throw Bad{"rows are rounded in blocks of 32, which its scales cut"};
    to.data = codes.data, to.dtype = bits == 8 ? MOEOPT_I8 : MOEOPT_U4;
    to.out = codes.sizes[0], to.in = in, to.stride_out = a_row, to.stride_in = 1;
    to.zero_stride = bits == 8 && codes.type == ort::UINT8 ? 128 : 0;
    to.scales = scales.data, to.scale_stride = blocks, to.block = b;
    if (scales.type == ort::FLOAT) to.scale_dtype = MOEOPT_F32;
    else if (scales.type == ort::FLOAT16) to.scale_dtype = MOEOPT_F16;
    else if (scales.type == ort::BFLOAT16) to.scale_dtype = MOEOPT_BF16;
    else throw Bad{"scales are no floats that this kernel reads"};
  }

  void read_spec(const Reader &read) {
    spec.rows = read.word("rows", {"gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"});
    spec.activation = read.word("activation", {"silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "swish", "softcap",
                                               "identity", "leaky_relu", "elu", "mish", "softplus"});
    const char *limits[6] = {"gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max"};
    for (int i = 0; i < 6; i++)
      if (read.number(limits[i], &spec.limits[i])) spec.clamps |= int64_t(1) << i;
    read.number("alpha", &spec.alpha), read.number("up_offset", &spec.up_offset);
    spec.has_norm = read.number("norm_eps", &spec.norm_eps);
    spec.weight_on_input = read.whole("weight_on_input", 0) != 0;
    spec.identity_beyond = read.whole("identity_beyond", 0) != 0;
    spec.by_expert = read.whole("by_expert", 0) != 0;
  }

  Tensor constant(const ort::KernelInfo *info, size_t number, int element = ort::FLOAT) const {
    int is = 0;
    const ort::Value *value = nullptr;
    must(api, api.constant(info, number, &is, &value), "a weight cannot be read");
    if (!is || !value) throw Bad{"a weight is computed in the graph, and is none of its constants"};
    return tensor(api, value, element, "a weight");
  }

  template <class F>
  void table(const ort::KernelInfo *info, size_t number, int64_t width, F place) {
    const Tensor t = constant(info, number);
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < t.sizes.size(); i++) rows *= t.sizes[i];
    const int64_t E = (int64_t)experts.size();
    if (t.sizes.size() < 2 || t.sizes.back() != width || t.sizes[0] < E || rows != t.sizes[0]) throw Bad{"a table of biases or norms does not fit the experts"};
    for (int64_t e = 0; e < E; e++) place(experts[e]) = {(const float *)t.data + e * width, MOEOPT_F32, 1};
  }

  void run(ort::Context *context) const {
    Tensor in[3];
    const char *names[3] = {"x", "ids", "weights"};
    for (size_t i = 0; i < 3; i++) {
      const ort::Value *value = nullptr;
      must(api, api.input(context, i, &value), "an input is missing");
      if (!value) throw Bad{"an input is missing"};
      in[i] = tensor(api, value, i == 1 ? ort::INT64 : ort::FLOAT, names[i]);
      if (in[i].sizes.size() != 2) throw Bad{std::string(names[i]) + " is no matrix"};
    }
    const int64_t T = in[0].sizes[0], K = in[1].sizes[1];
    if (in[0].sizes[1] != H || in[1].sizes[0] != T || in[2].sizes != in[1].sizes || K < 1)
      throw Bad{"x, ids and weights do not fit one another: they are (T, H), (T, K) and (T, K)"};
    const int64_t sizes[2] = {T, D};
    ort::Value *result = nullptr;
    must(api, api.output(context, 0, sizes, 2, &result), "there is no memory for its result");
    void *y = nullptr;
    must(api, api.data(result, &y), "its result has no memory");
    static const int64_t cores = std::max(1u, std::min(64u, std::thread::hardware_concurrency()));
    moeopt_call call{MOEOPT_ABI, &spec, T, K, (int64_t)experts.size(), H, D, in[0].data, MOEOPT_F32, {H, 1},
                     in[1].data, MOEOPT_I64, {K, 1}, in[2].data, MOEOPT_F32, {K, 1}, y, MOEOPT_F32,
                     experts.data(), index.data(), {}, cores, isa, nullptr, 0};
    const std::pair<const Api *, ort::Context *> threads{&api, context};
    const int64_t status = run_experts(&call, in_session, (void *)&threads);
    if (status) throw Bad{status == 2 ? "there is no memory for its rows" : "the kernel refuses the call"};
  }

  static bool in_session(void *threads, void (*f)(void *, size_t), size_t total, void *user) {
    const auto &[api, context] = *(const std::pair<const Api *, ort::Context *> *)threads;
    return had(*api, api->parallel_for(context, f, total, 0, user));
  }
};

template <class F>
Status *guarded(const Api &api, F f) {  // no exception leaves this library
  try {
    f();
    return nullptr;
  } catch (const Bad &bad) {
    return api.status(ort::INVALID_ARGUMENT, ("moeopt::Experts: " + bad.text).c_str());
  } catch (const std::bad_alloc &) {
    return api.status(ort::FAIL, "moeopt::Experts: there is no memory");
  }
}

void describe(Op &op, const Api &api, int64_t isa) {  // all that its two forms share
  op.api = api, op.isa = isa;
  op.version = ort::VERSION;
  op.provider = [](const ort::CustomOp *) { return (const char *)nullptr; };
  op.inputs = [](const ort::CustomOp *) { return (size_t)4; };
  op.outputs = [](const ort::CustomOp *) { return (size_t)1; };
  op.output_type = [](const ort::CustomOp *, size_t) { return (int)ort::FLOAT; };
  op.input_is = [](const ort::CustomOp *, size_t i) { return (int)(i == 3 ? ort::VARIADIC : ort::REQUIRED); };
  op.output_is = [](const ort::CustomOp *, size_t) { return (int)ort::REQUIRED; };
  op.input_memory = [](const ort::CustomOp *, size_t) { return 0; };
  op.variadic_inputs = op.variadic_outputs = [](const ort::CustomOp *) { return 1; };
  op.outputs_alike = [](const ort::CustomOp *) { return 1; };
  op.since = [](const ort::CustomOp *) { return 1; };
  op.until = [](const ort::CustomOp *) { return INT32_MAX; };
  op.destroy = [](void *node) { delete (Node *)node; };
  op.create_checked = [](const ort::CustomOp *own, void *const *, const ort::KernelInfo *info, void **out) {
    const Op &op = *(const Op *)own;
    return guarded(op.api, [&] { *out = new Node(op, info); });
  };
  op.compute_checked = [](void *node, ort::Context *context) {
    return guarded(((Node *)node)->api, [&] { ((Node *)node)->run(context); });
  };
}

Ops *made(const Api &api, int64_t isa) {
  static std::mutex lock;
  static std::map<std::pair<void *const *, int64_t>, std::unique_ptr<Ops>> all;  // sessions read them until the process ends
  std::lock_guard<std::mutex> held(lock);
  std::unique_ptr<Ops> &ops = all[{api.at, isa}];
  if (ops) return ops.get();
  std::unique_ptr<Ops> next(new Ops{});
  for (Op *op : {&next->floats, &next->codes}) describe(*op, api, isa);
  next->floats.name = [](const ort::CustomOp *) { return "Experts"; };
  next->floats.input_type = [](const ort::CustomOp *, size_t i) { return (int)(i == 1 ? ort::INT64 : ort::FLOAT); };
  next->floats.inputs_alike = [](const ort::CustomOp *) { return 1; };
  next->codes.name = [](const ort::CustomOp *) { return "ExpertsOnCodes"; };
  next->codes.input_type = [](const ort::CustomOp *, size_t i) { return (int)(i == 1 ? ort::INT64 : i == 3 ? ort::UNDEFINED : ort::FLOAT); };
  next->codes.inputs_alike = [](const ort::CustomOp *) { return 0; };
  must(api, api.create_domain("moeopt", &next->domain), "its domain cannot be made");
  for (Op *op : {&next->floats, &next->codes}) must(api, api.add_op(next->domain, op), "it cannot be added to its domain");
  ops = std::move(next);
  return ops.get();
}

}  // namespace

// Called by the runtime for each session's options; the option "moeopt.isa" names an instruction set by its bit.
extern "C" MOEOPT_API ort::Status *RegisterCustomOps(ort::SessionOptions *options, const ort::ApiBase *base) {
  const Api api{base->get(ort::VERSION)};
  if (!api.at) return nullptr;  // an older runtime: its session finds no such operator, and says so
  int64_t isa = 0;
  char text[16] = {};
  size_t size = sizeof text;
  if (had(api, api.config(options, "moeopt.isa", text, &size))) isa = strtoll(text, nullptr, 10);
  const int64_t here = moeopt_isas();
  if (!isa)
    for (int64_t one = 1; one <= here; one <<= 1)
      if (here & one) isa = one;
  return guarded(api, [&] {
    if (!(isa & here)) throw Bad{"the instruction set that was asked for is not in this library, or not on this CPU"};
    must(api, api.add_domain(options, made(api, isa)->domain), "its domain cannot be added to the session");
  });
}

// The kernel as a custom operator of ONNX Runtime, moeopt::Experts: x (T, H), ids (T, K), weights (T, K) and constants.
//
// Constants, all float32: E of W_in and E of W_out, or with `stacked` one (E, ., .) of each; then a table for each of the
// attributes b_in, b_out and norm that is 1, of E rows or more. Their sizes and the attributes are checked when a session
// is made, those of the other inputs at each call; ids that name no expert are left out, or add the token itself.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ort_api.h"
#include "run.h"

namespace {

using ort::Api;
using ort::Status;

struct Bad {  // what stands in the way, in words
  std::string text;
};

struct Op : ort::CustomOp {
  Api api;
  int64_t isa;
  ort::Domain *domain = nullptr;
};

void must(const Api &api, Status *status, const char *what) {
  if (!status) return;
  api.release(status);
  throw Bad{what};
}

bool had(const Api &api, Status *status) {
  if (status) api.release(status);
  return !status;
}

struct Tensor {
  const void *data;
  std::vector<int64_t> sizes;
};

Tensor tensor(const Api &api, const ort::Value *value, int element, const char *name) {
  ort::Shape *shape = nullptr;
  must(api, api.shape(value, &shape), "an input is no tensor");
  size_t rank = 0;
  int type = 0;
  Tensor found{};
  const bool read = had(api, api.element(shape, &type)) && had(api, api.rank(shape, &rank));
  if (read && rank <= 4) {
    found.sizes.resize(rank);
    if (!had(api, api.sizes(shape, found.sizes.data(), rank))) type = -1;
  }
  api.release(shape);
  if (!read || rank > 4 || type != element) throw Bad{std::string(name) + " has another rank or element type than it may"};
  void *data = nullptr;
  must(api, api.data(value, &data), "an input has no memory");
  found.data = data;
  return found;
}

struct Reader {  // of a node's attributes
  const Api &api;
  const ort::KernelInfo *info;

  int64_t whole(const char *name, int64_t otherwise) const {
    int64_t value = 0;
    return had(api, api.attribute(info, name, &value)) ? value : otherwise;
  }
  bool number(const char *name, double *to) const {
    float value = 0;
    const bool there = had(api, api.attribute(info, name, &value));
    if (there) *to = value;
    return there;
  }
  int64_t word(const char *name, std::initializer_list<const char *> words) const {
    char text[32] = {};
    size_t size = sizeof text;
    if (had(api, api.attribute(info, name, text, &size)) && size <= sizeof text) {
      int64_t i = 0;
      for (const char *one : words) {
        if (!strncmp(text, one, sizeof text)) return i;
        i++;
      }
    }
    throw Bad{std::string("the attribute ") + name + " is missing, or says what this kernel does not know"};
  }
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
    const size_t matrices = stacked ? 2 : 2 * (size_t)E;
    if (E < 1 || E > 1 << 20 || count != 3 + matrices + b_in + b_out + norm) throw Bad{"it has more or fewer constants than its attributes say"};
    const bool in_io = read.word("w_in", {"oi", "io"}), out_io = read.word("w_out", {"oi", "io"});
    size_t next = 3;
    experts.resize(E), index.resize(E);
    for (int64_t e = 0; e < E; e++) index[e] = e;
    for (const bool out : {false, true})
      for (int64_t e = 0; e < E; e += stacked ? E : 1) {
        const Tensor w = constant(info, next++);
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
    H = experts[0].w_in[0].in, D = experts[0].w_out.out;
    const int64_t I = experts[0].w_out.in, O = I * (spec.rows == PLAIN ? 1 : 2);
    for (const moeopt_expert &x : experts)
      if (x.w_in[0].in != H || x.w_in[0].out != O || x.w_out.in != I || x.w_out.out != D || H < 1 || I < 1 || D < 1)
        throw Bad{"the sizes of its weights do not fit one another"};
    if (b_in) table(info, next++, O, [](moeopt_expert &x) -> moeopt_vector & { return x.b_in[0]; });
    if (b_out) table(info, next++, D, [](moeopt_expert &x) -> moeopt_vector & { return x.b_out; });
    if (norm) table(info, next++, D, [](moeopt_expert &x) -> moeopt_vector & { return x.norm; });
    if (spec.identity_beyond && H != D) throw Bad{"an id beyond the experts adds the token, whose width is not the output's"};
  }

  void read_spec(const Reader &read) {
    spec.rows = read.word("rows", {"gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"});
    if (spec.rows == SEPARATE) throw Bad{"gate and up in weights of their own are not what a graph holds"};
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

  Tensor constant(const ort::KernelInfo *info, size_t number) const {
    int is = 0;
    const ort::Value *value = nullptr;
    must(api, api.constant(info, number, &is, &value), "a weight cannot be read");
    if (!is || !value) throw Bad{"a weight is computed in the graph, and is none of its constants"};
    return tensor(api, value, ort::FLOAT, "a weight");
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
                     experts.data(), index.data(), {}, cores, isa};
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

Op *made(const Api &api, int64_t isa) {
  static std::mutex lock;
  static std::map<std::pair<void *const *, int64_t>, std::unique_ptr<Op>> ops;  // sessions read them until the process ends
  std::lock_guard<std::mutex> held(lock);
  std::unique_ptr<Op> &op = ops[{api.at, isa}];
  if (op) return op.get();
  std::unique_ptr<Op> next(new Op{});
  next->api = api, next->isa = isa;
  next->version = ort::VERSION;
  next->name = [](const ort::CustomOp *) { return "Experts"; };
  next->provider = [](const ort::CustomOp *) { return (const char *)nullptr; };
  next->inputs = [](const ort::CustomOp *) { return (size_t)4; };
  next->outputs = [](const ort::CustomOp *) { return (size_t)1; };
  next->input_type = [](const ort::CustomOp *, size_t i) { return (int)(i == 1 ? ort::INT64 : ort::FLOAT); };
  next->output_type = [](const ort::CustomOp *, size_t) { return (int)ort::FLOAT; };
  next->input_is = [](const ort::CustomOp *, size_t i) { return (int)(i == 3 ? ort::VARIADIC : ort::REQUIRED); };
  next->output_is = [](const ort::CustomOp *, size_t) { return (int)ort::REQUIRED; };
  next->input_memory = [](const ort::CustomOp *, size_t) { return 0; };
  next->variadic_inputs = next->variadic_outputs = [](const ort::CustomOp *) { return 1; };
  next->inputs_alike = next->outputs_alike = [](const ort::CustomOp *) { return 1; };
  next->since = [](const ort::CustomOp *) { return 1; };
  next->until = [](const ort::CustomOp *) { return INT32_MAX; };
  next->destroy = [](void *node) { delete (Node *)node; };
  next->create_checked = [](const ort::CustomOp *own, void *const *, const ort::KernelInfo *info, void **out) {
    const Op &op = *(const Op *)own;
    return guarded(op.api, [&] { *out = new Node(op, info); });
  };
  next->compute_checked = [](void *node, ort::Context *context) {
    return guarded(((Node *)node)->api, [&] { ((Node *)node)->run(context); });
  };
  must(api, api.create_domain("moeopt", &next->domain), "its domain cannot be made");
  must(api, api.add_op(next->domain, next.get()), "it cannot be added to its domain");
  op = std::move(next);
  return op.get();
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

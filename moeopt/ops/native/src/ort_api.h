// The entries of ONNX Runtime's C interface that a custom operator needs. The interface is a table of functions which
// grows at its end only, so a place in the table means the same function in every later version. No package carries its
// header; the places are those of version 17 and were each used by a question with a known answer before any session.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct KernelInfo;
struct Context;
struct Shape;

constexpr uint32_t VERSION = 17;
enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Element { UNDEFINED = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum Characteristic { REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 };

struct Api {  // a table of functions
  void *const *at;
  template <class F> F entry(int place) const { return reinterpret_cast<F>(at[place]); }

  Status *status(Code code, const char *text) const { return entry<Status *(*)(int, const char *)>(0)(code, text); }
  Status *create_domain(const char *name, Domain **out) const { return entry<Status *(*)(const char *, Domain **)>(26)(name, out); }
  Status *add_op(Domain *to, const struct CustomOp *op) const { return entry<Status *(*)(Domain *, const CustomOp *)>(27)(to, op); }
  Status *add_domain(SessionOptions *to, Domain *domain) const { return entry<Status *(*)(SessionOptions *, Domain *)>(28)(to, domain); }
  Status *data(const Value *value, void **out) const { return entry<Status *(*)(const Value *, void **)>(51)(value, out); }
  Status *element(const Shape *shape, int *out) const { return entry<Status *(*)(const Shape *, int *)>(60)(shape, out); }
  Status *rank(const Shape *shape, size_t *out) const { return entry<Status *(*)(const Shape *, size_t *)>(61)(shape, out); }
  Status *sizes(const Shape *shape, int64_t *out, size_t rank) const { return entry<Status *(*)(const Shape *, int64_t *, size_t)>(62)(shape, out, rank); }
  Status *shape(const Value *value, Shape **out) const { return entry<Status *(*)(const Value *, Shape **)>(65)(value, out); }
  Status *attribute(const KernelInfo *of, const char *name, float *out) const { return entry<Status *(*)(const KernelInfo *, const char *, float *)>(85)(of, name, out); }
  Status *attribute(const KernelInfo *of, const char *name, int64_t *out) const { return entry<Status *(*)(const KernelInfo *, const char *, int64_t *)>(86)(of, name, out); }
  Status *attribute(const KernelInfo *of, const char *name, char *out, size_t *size) const { return entry<Status *(*)(const KernelInfo *, const char *, char *, size_t *)>(87)(of, name, out, size); }
  Status *input(const Context *of, size_t number, const Value **out) const { return entry<Status *(*)(const Context *, size_t, const Value **)>(90)(of, number, out); }
  Status *output(Context *of, size_t number, const int64_t *sizes, size_t rank, Value **out) const { return entry<Status *(*)(Context *, size_t, const int64_t *, size_t, Value **)>(91)(of, number, sizes, rank, out); }
  void release(Status *status) const { entry<void (*)(Status *)>(93)(status); }
  void release(Shape *shape) const { entry<void (*)(Shape *)>(99)(shape); }
  Status *input_count(const KernelInfo *of, size_t *out) const { return entry<Status *(*)(const KernelInfo *, size_t *)>(230)(of, out); }
  Status *config(const SessionOptions *of, const char *key, char *out, size_t *size) const { return entry<Status *(*)(const SessionOptions *, const char *, char *, size_t *)>(238)(of, key, out, size); }
  Status *constant(const KernelInfo *of, size_t number, int *is, const Value **out) const { return entry<Status *(*)(const KernelInfo *, size_t, int *, const Value **)>(249)(of, number, is, out); }
  Status *parallel_for(const Context *of, void (*f)(void *, size_t), size_t total, size_t batches, void *user) const { return entry<Status *(*)(const Context *, void (*)(void *, size_t), size_t, size_t, void *)>(274)(of, f, total, batches, user); }
};

struct ApiBase {
  void *const *(*get)(uint32_t version);
  const char *(*version)();
};

// What the runtime asks an operator; grows at its end too, and `version` says how far it may read.
struct CustomOp {
  uint32_t version;
  void *(*create)(const CustomOp *, void *const *, const KernelInfo *);
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t);
  size_t (*inputs)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t);
  size_t (*outputs)(const CustomOp *);
  void (*compute)(void *, Context *);
  void (*destroy)(void *);
  int (*input_is)(const CustomOp *, size_t);
  int (*output_is)(const CustomOp *, size_t);
  int (*input_memory)(const CustomOp *, size_t);
  int (*variadic_inputs)(const CustomOp *);
  int (*inputs_alike)(const CustomOp *);
  int (*variadic_outputs)(const CustomOp *);
  int (*outputs_alike)(const CustomOp *);
  Status *(*create_checked)(const CustomOp *, void *const *, const KernelInfo *, void **);
  Status *(*compute_checked)(void *, Context *);
  Status *(*infer_shape)(const CustomOp *, void *);
  int (*since)(const CustomOp *);
  int (*until)(const CustomOp *);
  size_t (*in_place)(int **, int **);
  void (*free_in_place)(int *, int *);
  size_t (*aliases)(int **, int **);
  void (*free_aliases)(int *, int *);
};

}  // namespace ort

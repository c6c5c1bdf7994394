/* The C interface of moeopt's fused experts kernel: plain pointers, sizes and strides, no header of any framework.
 *
 *   y_TD[t] = sum over k of  w[t,k] * norm(W_out[e] act(W_in[e] x[t] + b_in[e]) + b_out[e])      e = ids[t,k]
 *
 * T tokens, K chosen per token, E experts, H in, I intermediate, D out. The equations and every field are those of
 * moeopt's ExpertsSpec. All fields are 8 bytes wide; strides count elements; weights are read where they lie.
 */
#ifndef MOEOPT_EXPERTS_H
#define MOEOPT_EXPERTS_H
#include <stdint.h>

#define MOEOPT_ABI 6

/* F64: all but the routing weights are of it, or nothing is. I8 and U4 are codes of quantised weights; U4: two in a byte, the first in the low half, less 8 */
enum moeopt_dtype {
  MOEOPT_F32 = 0, MOEOPT_BF16 = 1, MOEOPT_F16 = 2, MOEOPT_I32 = 3, MOEOPT_I64 = 4, MOEOPT_I8 = 5, MOEOPT_U4 = 6,
  MOEOPT_F64 = 7
};
/* Added to an instruction set: an expert's many rows are multiplied lane by lane where they can be, to the same bits; see by_lane.h. */
#define MOEOPT_BY_LANE 65536
enum moeopt_rows { GATE_UP, UP_GATE, INTERLEAVED, INTERLEAVED_UP, SEPARATE, PLAIN };
enum moeopt_activation {
  SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, TANH, SWISH, SOFTCAP, IDENTITY, LEAKY_RELU, ELU, MISH, SOFTPLUS
};
/* bits of moeopt_spec.clamps: which limits apply */
enum moeopt_clamp { GATE_MIN = 1, GATE_MAX = 2, UP_MIN = 4, UP_MAX = 8, ACT_MIN = 16, ACT_MAX = 32 };

typedef struct {
  int64_t rows, activation, clamps, weight_on_input, identity_beyond, by_expert, has_norm;
  int64_t compute, act, accum, term; /* dtypes; term: of an expert's output times its routing weight */
  int64_t rounds; /* 1: both products read rows rounded to 8 bits, in blocks of 32 numbers; see rounded.h. W is of codes then */
  double alpha, limits[6], up_offset, norm_eps; /* limits in the order of moeopt_clamp */
} moeopt_spec;

typedef struct { /* W[o][i] is data + o * stride_out + i * stride_in; of codes times scales[o * scale_stride + i / block] */
  const void *data;
  int64_t dtype, out, in, stride_out, stride_in; /* of codes: stride_in is 1, and stride_out even where two share a byte */
  const void *scales; /* of float32, bfloat16 or float16; NULL where W is of floats */
  int64_t scale_dtype, scale_stride, block;
  const void *zeros; /* NULL, or of U4 what is taken from codes in place of 8, a byte for each scale; where spec.rounds is 1 */
  int64_t zero_stride; /* of I8, which has no zeros: 0, or any other number where its bytes have no sign and are codes about 128 */
} moeopt_matrix;

typedef struct { /* data NULL: absent */
  const void *data;
  int64_t dtype, stride;
} moeopt_vector;

typedef struct { /* the second w_in and b_in only where rows is SEPARATE: up */
  moeopt_matrix w_in[2], w_out;
  moeopt_vector b_in[2], b_out, norm;
} moeopt_expert;

typedef struct {
  int64_t abi;
  const moeopt_spec *spec;
  int64_t T, K, E, H, D;
  const void *x; /* (T, H) */
  int64_t x_dtype, x_stride[2];
  const void *ids; /* (T, K) of int32 or int64 */
  int64_t ids_dtype, ids_stride[2];
  const void *weights; /* (T, K) */
  int64_t weights_dtype, weights_stride[2];
  void *y; /* (T, D), contiguous */
  int64_t y_dtype;
  /* experts: index NULL: one entry for expert 0, and expert_step, in bytes, from one expert to the next for
   * w_in[0], w_in[1], w_out, b_in[0], b_in[1], b_out, norm. Else index[e] is the entry of expert e, or -1 where
   * no token names it. */
  const moeopt_expert *experts;
  const int64_t *index;
  int64_t expert_step[7];
  int64_t threads, isa; /* isa: one that moeopt_isas names, as its bit; with MOEOPT_BY_LANE where that is wanted */
  /* NULL, or where W_in's products are kept for a backward pass, with their bias, in the compute dtype: of each row, the
   * gates, then the ups. Rows are those of pairs (t,k) that name an expert, by their experts, then t, then k. */
  void *kept;
  int64_t kept_step; /* elements from one row to the next */
} moeopt_call;

#if defined(_WIN32)
#define MOEOPT_API __declspec(dllexport)
#else
#define MOEOPT_API __attribute__((visibility("default")))
#endif
#ifdef __cplusplus
extern "C" {
#endif
/* 0: done. 1: another abi or an isa that this library or this CPU lacks. 2: out of memory.
 * 3: a size, dtype or index that has no meaning. */
MOEOPT_API int64_t moeopt_experts(const moeopt_call *call);
/* Bits of the instruction sets in this library that this CPU runs: see isa.h for their names. */
MOEOPT_API int64_t moeopt_isas(void);
/* Whether this process may use the tiles of AMX, which the first call asks the system for. 0: yes. 1: this library, this CPU or the
 * system has none for bfloat16. 2: the system refuses them. */
MOEOPT_API int64_t moeopt_tiles(void);
MOEOPT_API int64_t moeopt_abi(void);
#ifdef __cplusplus
}
#endif
#endif

// The instruction sets a library may carry, weakest first, and what one of them gives to the driver.
#pragma once
#include <cstdint>

#include "moeopt_experts.h"

enum {
  ISA_GENERIC = 1, ISA_AVX2 = 2, ISA_AVX2_VNNI = 4, ISA_AVX512 = 8, ISA_AVX512_VNNI = 16, ISA_AVX512_BF16 = 32, ISA_AMX_BF16 = 64,
  ISA_NEON = 128
};

#if defined(__AVX512F__) || defined(MOEOPT_NEON)
constexpr bool MANY_REGISTERS = true;  // for 32 vectors, else for 16: as many sums has a tile
#else
constexpr bool MANY_REGISTERS = false;
#endif

constexpr int64_t ROWS = 64;  // rows of x of one turn: with their k they stay in the second-level cache
constexpr int64_t MOST_SUMS = 256 * ROWS, MOST_COLUMNS = 2048;

// Columns of a task on W with contiguous rows: the more, the longer are the runs in which W is read, and the fewer, the nearer are
// the sums of all rows of x.
inline int64_t columns_across(int64_t rows, int64_t dtype, bool streams) {
  if (rows == 1 && streams) return MOST_COLUMNS;
  return rows <= 8 && dtype != MOEOPT_F32 ? 1024 : rows <= 16 ? 512 : 256;
}

// How an expert's rows lie. Its own weights alone decide in what order they are summed, which must not depend on the other experts
// that are hit.
struct Rows {
  bool half;      // of bfloat16 instead of float32: both factors of a product stay 16 bits
  bool evens;     // of 32 numbers the 16 of even places come first: W has two codes in a byte
  bool by_lane;   // what one lane of a dot product sums stands together (by_lane.h): the bits are the same, so the number of rows decides
  int64_t ld;     // from one to the next, in numbers of the row's own size
};

struct Segment {  // rows row .. row + count of the sorted rows belong to expert e
  int64_t e, row, count, I, h;   // h: where its hidden rows begin, in bytes
  Rows x, hidden;                // what its first and its second matrix multiply
  const moeopt_expert *weights;  // resolved: pointers are those of e
};

// to[m * ldt + j] = sum over k of W[j][k] * x[m * ldx + k], all of bfloat16; W[j][k] is w[j * so + k * si], and k or its rows are
// contiguous. j < n and m < M; rows of x have zeros behind K, up to a multiple of 64. The columns of `to` behind n are garbage.
struct TileProduct {
  const uint16_t *w;
  int64_t so, si, n;
  const uint16_t *x;
  int64_t ldx, K, M;
  float *to;
  int64_t ldt;
  uint16_t *scratch;  // TILE_SCRATCH bytes, whole cache lines
};
typedef void (*MultiplyByTiles)(const TileProduct &);
constexpr int64_t TILE_SCRATCH = 32768, TILE_COLUMNS = 32;  // columns of a task
void multiply_by_tiles(const TileProduct &product);  // tiles.cpp
int64_t tiles_of_this_process();                     // as moeopt_tiles

struct Job {  // one call, laid out: what every task reads
  const moeopt_call *call;
  int64_t rows, step, ldo;          // sorted rows; bytes from one row of r_RH to the next; stride of o_RD
  const moeopt_matrix *round_x, *round_h;  // a matrix for whose codes rows are rounded to 8 bits (rounded.h), or null
  const int64_t *token, *slot;      // of each sorted row
  const int64_t *segment_of;        // of each sorted row
  const int64_t *row_of;            // (T, K): sorted row; -1: the id adds nothing; -2: it adds the token
  const int64_t *order;             // (T, K): slots in the order of the sum
  Segment *segments;
  void *r, *h;                      // r_RH, and the hidden rows of the segments at work
  float *o;                         // o_RD, each value already rounded to the compute dtype
  MultiplyByTiles tiles;            // what multiplies rows of bfloat16, or null: dot products of pairs
};

struct Kernels {  // one instruction set
  int64_t isa, lanes;
  bool dot_bf16;                                                // has a product of bfloat16 pairs
  int64_t scratch;                                              // floats that a task may use
  void (*gather)(const Job &, int64_t row, int64_t end);        // x -> r
  void (*hidden)(const Job &, const Segment &, int64_t first, int64_t end, float *scratch);  // r -> h, columns of I
  void (*output)(const Job &, const Segment &, int64_t first, int64_t end, float *scratch);  // h -> o, columns of D
  void (*combine)(const Job &, int64_t token, int64_t end, float *scratch);                  // o -> y
  bool wide;                                                    // of float64: what is kept between has 8 bytes
  bool streams;                                                 // one row of x: rows of W from end to end (outer.h)
  bool by_lane;                                                 // has by_lane.h
  bool evens;                                                   // reads the two codes of a byte apart (codes.h)
  MultiplyByTiles tiles;                                        // see Job
};


// Columns of a task on rows of W with contiguous k: gate and up lie apart, so that each task begins two runs of rows anew, and
// long runs are read sooner. Each thread keeps TASKS_EACH tasks at least. Codes that are widened gain nothing from long runs.
constexpr int64_t RUN_COLUMNS = 128, LEAST_COLUMNS = 16, TASKS_EACH = 8;
constexpr int64_t TURNED = 64, TURNED_COLUMNS = 64;  // the longest k of turned.h, and columns of its tasks
// Of by_lane.h: columns of a task; rows of x, and k, from which it is taken; and rows of one turn, for which W is turned once.
constexpr int64_t LANE_TASK = 32, LANE_ROWS = 13, LANE_LEAST = 256, LANE_TURN = 128;
constexpr int64_t COLUMNS64 = 64;  // of a task in float64
constexpr int64_t ROUNDED_COLUMNS = 32;  // the least of a task on rows of 8 bits: whole blocks of the rows that the next product reads

const Kernels *kernels64_generic();
const Kernels *kernels64_neon();
const Kernels *kernels64_avx2();
const Kernels *kernels64_avx2_vnni();
const Kernels *kernels64_avx512();
const Kernels *kernels64_avx512_vnni();
const Kernels *kernels64_avx512_bf16();
const Kernels *kernels_generic();
const Kernels *kernels_neon();
const Kernels *kernels_avx2();
const Kernels *kernels_avx2_vnni();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512_vnni();
const Kernels *kernels_avx512_bf16();

// The MMD ops on the CPU: the interface between checks (mmd.cpp, flow_map_mmd.cpp) and loops (cpu/mmd.cpp).
//
// With d = max(||x - y||, eps), kappa = scale / D per group, and a mean over the bandwidth factors b (k of scale b):
//     laplace  k = exp(-kappa d)          slope = kappa k / d
//     rbf      k = exp(-kappa d^2 / 2)    slope = kappa k
//     imq      k = 1 / (1 + kappa d^2)    slope = 2 kappa k^2
//     energy   k = -kappa d               slope = kappa / d
// dk/dx = -slope (x - y), and slope = 0 for ||x - y|| <= eps. loss_g = weight_g / M^2 sum_jk [k(t_j, t_k) + k(r_j, r_k)
// - 2 k(t_j, r_k)]; unbiased, over j != k with M (M - 1) in place of M^2. python/imm/ops/mmd.py is the reference.
//
// G groups, M particles, D features. Differences and products are float32 (float64 for float64) in vector partial sums,
// lanes are summed in float64, and everything M x M is float64.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"

namespace imm {

enum class MmdKernel { kLaplace, kRbf, kImq, kEnergy };

struct MmdKernelArgs {
  MmdKernel kind;
  const double* bandwidths;
  int64_t bandwidth_count;
  double eps;
};

// [G, M, D]: features of a row are contiguous; groups and rows have any stride, in elements.
struct MmdRows {
  const void* data;
  c10::ScalarType dtype;
  int64_t group_stride;
  int64_t row_stride;
};

// The M particles of each group: the rows of x or, where there is a g, c_skip x + c_out g.
struct MmdParticles {
  int64_t M;
  MmdRows x;
  MmdRows g;             // data is null without
  const double* c_skip;  // [G], with g
  const double* c_out;
};

// How a group is read.
struct MmdPlan {
  bool packed;  // in the arithmetic dtype, `stride` elements between rows; else where it lies
  int64_t stride;
  bool products;     // a loss takes distances by products where it can
  bool gather;       // rows, for the gradient: more than are read where they lie
  bool stream;       // non-temporal stores: the gradient exceeds the caches
  int64_t features;  // whose distances are worked on at a time
};

constexpr int64_t kMmdBlockRows = 32;      // rows whose distances to as many others are worked on together
constexpr int64_t kMmdGatherBytes = 256;   // of a row that are gathered
constexpr int64_t kMmdGradFeatures = 512;  // of a gradient that is not in the arithmetic dtype, worked on at a time

// What one thread needs beside its registers. z is the rows of a group: both sets, one after the other.
struct MmdWork {
  double* values;              // squared distances, then kernel values: loss [2 M, 2 M], gram [Mx, My]
  double* slopes;              // loss [M, 2 M] and before that M (2 M + 1) in a row, gram [Mx, My]
  void* coefficient;           // of the gradient, arithmetic dtype: as many as slopes and 1 a row, gram twice
  const void** rows;           // to each of z
  const void** next_rows;      // to what is fetched meanwhile
  const void** gathered_rows;  // the same, gathered
  void* partial;               // sums of a pair of blocks and of tiles of matched pairs, a vector each
  void* packed;                // z
  void* gathered;              // a few features of z, of many rows
  void* grad;                  // [M, kMmdGradFeatures], gram of the larger set
};

struct MmdLossArgs {
  bool wide;  // arithmetic in float64
  MmdKernelArgs kernel;
  bool unbiased;
  int64_t D;
  MmdParticles y_t, y_r;
  MmdPlan plan;
  const double* scale;        // [G]
  const double* weight;       // [G], of the loss
  const double* grad_weight;  // [G], of the gradient
  const void* saved_slopes;   // [G, M, 2 M] in the arithmetic dtype where they are known: nothing but grad is asked for
  void* loss;                 // [G] in the arithmetic dtype, or null
  void* slopes;               // [G, M, 2 M] in the arithmetic dtype, or null
  void* grad;                 // [G, M, D] contiguous, or null
  c10::ScalarType grad_dtype;
};

struct MmdGramArgs {
  bool wide;
  MmdKernelArgs kernel;
  int64_t D;
  MmdParticles x, y;
  MmdPlan plan;
  const double* scale;  // [G]
  const double* grad;   // [G, Mx, My] contiguous, or null for the forward
  void* gram;           // [G, Mx, My] in the arithmetic dtype, forward only
  void* grad_x;         // contiguous in the particles' dtype, backward only
  void* grad_y;
};

struct MmdFunctions {
  // Groups [begin, end) on the calling thread.
  void (*loss)(const MmdLossArgs& args, const MmdWork& work, int64_t begin, int64_t end);
  void (*gram)(const MmdGramArgs& args, const MmdWork& work, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const MmdFunctions mmd_functions)

// imm::mmd_loss, imm::mmd_loss_grad and imm::mmd_gram on the CPU: the interface between checks (mmd.cpp) and loops
// (cpu/mmd.cpp).
//
// With d = max(||x - y||, eps) and kappa = scale / D per group:
//     laplace  k = exp(-kappa d)          dk/dx = -kappa k (x - y) / d
//     rbf      k = exp(-kappa d^2 / 2)    dk/dx = -kappa k (x - y)
// and dk/dx = 0 for ||x - y|| <= eps. loss_g = weight_g / M^2 sum_jk [k(t_j, t_k) + k(r_j, r_k) - 2 k(t_j, r_k)].
// python/imm/ops/mmd.py is the reference.
//
// G groups, M particles, D features. Differences are float32 (float64 for float64) in vector partial sums, lanes are
// summed in float64, and everything M x M is float64.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"

namespace imm {

enum class MmdKernel { kLaplace, kRbf };

// Features of a row are contiguous; groups and rows have any stride, in elements.
struct Particles {
  const void* data;
  int64_t group_stride;
  int64_t row_stride;
};

// What one thread needs beside its registers.
struct MmdWork {
  double* dist2;          // squared distances, then slopes: [3, M, M], gram [Mx, My]
  void* coefficient;      // of the differences in the gradient, accumulate dtype: [M, 2 M], gram [2, Mx, My]
  const void** pointers;  // to rows: [2 M], gram [Mx + My]
  float* rows;            // 16-bit particles widened: [2, M, D], gram [Mx + My, D]
  float* grad;            // a block of the widened gradient: [M, kMmdBlock], gram [max(Mx, My), kMmdBlock]
};

constexpr int64_t kMmdBlock = 512;  // features of the gradient worked on at a time: 9 rows of float32 fit 24 KiB of L1

struct MmdLossArgs {
  c10::ScalarType dtype;
  MmdKernel kernel;
  double eps;
  int64_t M, D;
  Particles y_t, y_r;    // [G, M, D]
  const double* scale;   // [G]
  const double* weight;  // [G], of the loss and of the gradient
  void* loss;            // [G] in the accumulate dtype, or null
  void* grad;            // [G, M, D] contiguous in dtype, or null
};

struct MmdGramArgs {
  c10::ScalarType dtype;
  MmdKernel kernel;
  double eps;
  int64_t Mx, My, D;
  Particles x, y;       // [G, Mx, D], [G, My, D]
  const double* scale;  // [G]
  const double* grad;   // [G, Mx, My] contiguous, or null for the forward
  void* gram;           // [G, Mx, My] in the accumulate dtype, forward only
  void* grad_x;         // contiguous in dtype, backward only
  void* grad_y;
};

struct MmdFunctions {
  // Groups [begin, end) on the calling thread.
  void (*loss)(const MmdLossArgs& args, const MmdWork& work, int64_t begin, int64_t end);
  void (*gram)(const MmdGramArgs& args, const MmdWork& work, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const MmdFunctions mmd_functions)

// imm::adaln_modulate and imm::gated_residual_adaln on the CPU: the interface between checks (adaln.cpp) and loops
// (cpu/adaln.cpp).
//
//   z = x + gate y             where there is a y
//   h = n (1 + scale) + shift  with n = (z - mean) rstd
//
//   their tangents             dz = dx + dgate y + gate dy, c = dz - mean(dz)
//                              dh = rstd (c - n mean(n c)) (1 + scale) + n dscale + dshift
//
// in float32 (float64 for float64 tokens), the norm that of z before its rounding to x's dtype. A task of the backward
// owns a piece of kAdalnTokens tokens of an image and sums the modulations' gradients over it in their order; the
// pieces are then added in theirs. So neither the split over threads nor their number is in the bits.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"

namespace imm {

constexpr int64_t kAdalnTokens = 64;  // of an image, summed before the sums of pieces are
constexpr int64_t kAdalnRows = 14;    // rows of numbers that a task may keep

// A row of C contiguous numbers per image; stride 0: the same for all images. Null where absent.
struct AdalnModulation {
  const void* data;
  int64_t stride;  // in elements
};

struct AdalnArgs {
  c10::ScalarType x_dtype, y_dtype, modulation_dtype;
  int64_t tokens, features;  // per image, per token
  int64_t row;               // numbers from one row of the scratch memory to the next
  double eps;
  const void *x, *y;  // y null: h is the norm of x
  AdalnModulation gate, shift, scale;
  void *z, *h;  // x_dtype, y_dtype
  // Tangents, of the dtypes of what they are tangents of; dh null: none is asked for.
  const void *dx = nullptr, *dy = nullptr;
  AdalnModulation dgate{}, dshift{}, dscale{};
  void *dz = nullptr, *dh = nullptr;
};

struct AdalnBwdArgs {
  c10::ScalarType x_dtype, y_dtype, modulation_dtype;
  int64_t tokens, features, row;
  double eps;
  const void *grad_z, *grad_h, *z, *y;  // grad_z and y null: z is x, and nothing was added to it
  AdalnModulation gate, scale;
  void *grad_x, *grad_y;
  void* partial;  // [images, pieces, 3 or 2, C] sums of gate (where there is a y), shift, scale, in what z is summed in
};

struct AdalnSumArgs {
  c10::ScalarType compute_dtype, modulation_dtype;
  int64_t features;
  int64_t pieces;  // of each row of the results
  int64_t kinds;   // 3 or 2
  const void* partial;
  void* out[3];  // [rows, C] each
};

struct AdalnFunctions {
  // Tokens [begin, end) of all images; scratch: kAdalnRows rows, aligned for vectors.
  void (*forward)(const AdalnArgs& args, void* scratch, int64_t begin, int64_t end);
  // Pieces [begin, end) of all images.
  void (*backward)(const AdalnBwdArgs& args, void* scratch, int64_t begin, int64_t end);
  // Rows [begin, end) of the results, each kind after the other.
  void (*sum)(const AdalnSumArgs& args, void* scratch, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const AdalnFunctions adaln_functions)

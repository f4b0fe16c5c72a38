// imm::flow_step and imm::sampling_step on the CPU: the interface between checks (flow_step.cpp) and loops
// (cpu/flow_step.cpp).
//
// x_s = c_skip x + c_out (g_u + w (g - g_u)) + c_noise n(seed, step), element by element, in float32 (float64 for a
// float64 state), without fused operations, so that every instruction set gives the bits of
// python/imm/ops/flow_step.py.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"
#include "per_image.h"

namespace imm {

constexpr int64_t kFlowBlock = 1024;  // elements of an image worked on at a time; a multiple of a Philox block

struct FlowStepArgs {
  c10::ScalarType x_dtype, g_dtype;
  int64_t numel;  // per image
  const void *x, *g, *g_uncond;
  PerImage<double> c_skip, c_out, guidance, c_noise;
  PerImage<int64_t> seeds;
  int64_t step;
  void* out;  // x_dtype
  // What the network takes next, c_in x_s in g_dtype, in `copies` blocks of as many elements; or null.
  PerImage<double> c_in;
  void* input;
  int64_t copies, block;
};

struct FlowStepBwdArgs {
  c10::ScalarType x_dtype, g_dtype;
  int64_t numel;     // per image
  const void* grad;  // x_dtype
  PerImage<double> c_skip, c_out, guidance;
  void *grad_x, *grad_g, *grad_uncond;
};

struct FlowStepFunctions {
  // Pieces [begin, end) of the images' pieces of kFlowBlock elements, image after image.
  void (*forward)(const FlowStepArgs& args, int64_t begin, int64_t end);
  void (*backward)(const FlowStepBwdArgs& args, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const FlowStepFunctions flow_step_functions)

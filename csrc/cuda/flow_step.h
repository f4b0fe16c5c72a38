// The launchers of flow_step.cu: raw pointers to contiguous [B, D] memory, sizes in elements, an error code back. No
// torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../per_image.h"

namespace imm::cuda {

enum class Type : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct FlowStepForward {
  const void* x = nullptr;         // [B, D] of type state
  const void* g = nullptr;         // [B, D] of type output
  const void* g_uncond = nullptr;  // [B, D] of type output, or null
  void* x_s = nullptr;             // [B, D] of type state
  void* input = nullptr;           // [copies B, D] of type output: c_in x_s for the network, or null
  PerImage<double> c_skip, c_out, guidance, c_noise, c_in;
  PerImage<int64_t> seeds;  // null where there is no noise
  uint64_t step = 0;
  int64_t B = 0, D = 0, copies = 0;
  Type state = Type::kFloat32, output = Type::kFloat32;
};

struct FlowStepBackward {
  const void* grad = nullptr;   // [B, D] of type state
  void* grad_x = nullptr;       // [B, D] of type state
  void* grad_g = nullptr;       // [B, D] of type output
  void* grad_uncond = nullptr;  // [B, D] of type output, or null
  PerImage<double> c_skip, c_out, guidance;
  int64_t B = 0, D = 0;
  Type state = Type::kFloat32, output = Type::kFloat32;
};

cudaError_t launch_flow_step_fwd_kernel(const FlowStepForward& p, cudaStream_t stream);
cudaError_t launch_flow_step_bwd_kernel(const FlowStepBackward& p, cudaStream_t stream);

}  // namespace imm::cuda

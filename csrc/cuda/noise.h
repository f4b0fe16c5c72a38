// The launcher of noise.cu: raw pointers to contiguous memory, sizes in elements, an error code back. No torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../per_image.h"

namespace imm::cuda {

struct Noise {
  float* normal = nullptr;  // [B, D]
  PerImage<int64_t> seeds;
  uint64_t step = 0;
  float scale = 1;
  int64_t B = 0, D = 0;
};

cudaError_t launch_noise_kernel(const Noise& p, cudaStream_t stream);

}  // namespace imm::cuda

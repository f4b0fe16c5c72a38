// imm::noise on the CPU: the interface between checks (noise.cpp) and loops (cpu/noise.cpp). philox.h has the
// definition.
#pragma once

#include <cstdint>

#include "capability.h"
#include "per_image.h"

namespace imm {

struct NoiseArgs {
  PerImage<int64_t> seeds;
  int64_t numel;  // per image
  int64_t step;
  float scale;
  float* out;  // [B, numel]
};

constexpr int64_t kNoiseBlock = 1024;  // numbers drawn at a time; a multiple of the four of a Philox block

struct NoiseFunctions {
  // Pieces [begin, end) of the images' pieces of kNoiseBlock elements, image after image.
  void (*noise)(const NoiseArgs& args, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const NoiseFunctions noise_functions)

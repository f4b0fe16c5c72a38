// A tensor of one number per image as kernels take it. No torch headers.
#pragma once

#include <cstdint>

namespace imm::cuda {

// One number per image in device memory, or one for all (stride 0).
template <typename T>
struct PerImage {
  const T* ptr = nullptr;
  int64_t stride = 0;
};

}  // namespace imm::cuda

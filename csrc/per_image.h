// A tensor of one number per image as kernels take it. No torch headers.
#pragma once

#include <cstdint>

namespace imm {

// One number per image in the device's memory, or one for all (stride 0); a null pointer where absent.
template <typename T>
struct PerImage {
  const T* ptr = nullptr;
  int64_t stride = 0;
};

}  // namespace imm

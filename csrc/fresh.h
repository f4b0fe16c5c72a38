// Memory for results. On the CPU a first touch of a page of 4 KiB costs more than a kernel takes to fill it, so large
// results ask for large pages, which Linux gives to those who ask.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace imm {

inline void ask_for_large_pages([[maybe_unused]] const at::Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + result.nbytes()) / kLargePage * kLargePage;
  // Where it is refused the pages are small: as without.
  if (end > begin) static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#endif
}

inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device = at::kCPU) {
  at::Tensor result = at::empty(sizes, at::TensorOptions(device).dtype(dtype));
  if (device.is_cpu()) ask_for_large_pages(result);
  return result;
}

}  // namespace imm

// The torch side of a launch: tensors as kernels take them, device guard, current stream, error as an exception.
// Kernels are started by launch.cuh.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <utility>

#include "per_image.h"

namespace imm::cuda {

// A [1] or [B] tensor as the kernels take it; absent is a null pointer.
template <typename T>
PerImage<T> per_image(const std::optional<at::Tensor>& value) {
  if (!value) return {};
  return {value->const_data_ptr<T>(), value->size(0) == 1 ? 0 : value->stride(0)};
}

// Runs launch(stream) -> cudaError_t on the tensor's device and that device's current stream.
template <typename Launch>
void launch_on_device_of(const at::Tensor& tensor, Launch&& launch) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  C10_CUDA_CHECK(std::forward<Launch>(launch)(c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace imm::cuda

// The torch side of a launch: device guard, current stream, error as an exception.
// Kernels are started by launch.cuh.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <utility>

namespace imm::cuda {

// Runs launch(stream) -> cudaError_t on the tensor's device and that device's current stream.
template <typename Launch>
void launch_on_device_of(const at::Tensor& tensor, Launch&& launch) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  C10_CUDA_CHECK(std::forward<Launch>(launch)(c10::cuda::getCurrentCUDAStream().stream()));
}

}  // namespace imm::cuda

// imm::noise on CUDA: checks, allocation, registration. The kernel is in noise.cu.
//
// python/imm/ops/noise.py is the reference, error texts included. Nothing here waits for the device.
#include "noise.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace imm::cuda {
namespace {

using at::Tensor;

// seeds [B] int64 -> [B, numel] float32, N(0, 1).
Tensor noise(const Tensor& seeds, int64_t numel, int64_t step) {
  check_noise(seeds, numel, step);
  Noise p;
  p.seeds = per_image<int64_t>(seeds);
  p.B = seeds.size(0);
  p.D = numel;
  p.step = static_cast<uint64_t>(step);
  Tensor normal = at::empty({p.B, p.D}, seeds.options().dtype(at::kFloat));
  p.normal = normal.mutable_data_ptr<float>();
  launch_on_device_of(seeds, [&](cudaStream_t stream) { return launch_noise_kernel(p, stream); });
  return normal;
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CUDA, m) { m.impl("noise", TORCH_FN(noise)); }

}  // namespace imm::cuda

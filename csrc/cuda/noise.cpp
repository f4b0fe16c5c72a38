// imm::noise on CUDA: checks, allocation, registration. The kernel is in noise.cu.
//
// python/imm/ops/noise.py is the reference, error texts included. Nothing here waits for the device.
#include "noise.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "../checks.h"
#include "launch.h"

namespace imm::cuda {
namespace {

using at::Tensor;

// normal [B, numel] is contiguous; the arguments are checked.
void run(const Tensor& seeds, int64_t numel, int64_t step, const Tensor& normal) {
  Noise p;
  p.seeds = per_image<int64_t>(seeds);
  p.B = seeds.size(0);
  p.D = numel;
  p.step = static_cast<uint64_t>(step);
  p.normal = normal.mutable_data_ptr<float>();
  launch_on_device_of(seeds, [&](cudaStream_t stream) { return launch_noise_kernel(p, stream); });
}

// seeds [B] int64 -> [B, numel] float32, N(0, 1).
Tensor noise(const Tensor& seeds, int64_t numel, int64_t step) {
  check_noise(seeds, numel, step);
  Tensor normal = at::empty({seeds.size(0), numel}, seeds.options().dtype(at::kFloat));
  run(seeds, numel, step, normal);
  return normal;
}

void noise_out(const Tensor& seeds, int64_t numel, int64_t step, const Tensor& out) {
  check_noise(seeds, numel, step);
  const std::array<int64_t, 2> expected{seeds.size(0), numel};
  check_out("out", out, expected, at::kFloat, seeds);
  if (out.is_contiguous() && apart(out, seeds)) {
    run(seeds, numel, step, out);
  } else {
    out.copy_(noise(seeds, numel, step));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CUDA, m) {
  m.impl("noise", TORCH_FN(noise));
  m.impl("noise.out", TORCH_FN(noise_out));
}

}  // namespace imm::cuda

// Checks, allocation and threads of imm::noise on the CPU; the loop is in cpu/noise.cpp.
#include "noise.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "fresh.h"

namespace imm {
namespace {

using at::Tensor;

// Every piece is drawn from its own counters, so any split over threads gives the same bits.
void run(const Tensor& seeds, int64_t numel, int64_t step, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor keys = seeds.contiguous();
  const NoiseArgs args{keys.const_data_ptr<int64_t>(), numel, step, out.mutable_data_ptr<float>()};
  const auto& functions = IMM_CHOOSE(noise_functions);
  at::parallel_for(0, seeds.size(0) * at::divup(numel, kNoiseBlock), 2,
                   [&](int64_t begin, int64_t end) { functions.noise(args, begin, end); });
}

Tensor noise(const Tensor& seeds, int64_t numel, int64_t step) {
  check_noise(seeds, numel, step);
  const Tensor out = fresh({seeds.size(0), numel}, at::kFloat);
  run(seeds, numel, step, out);
  return out;
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

TORCH_LIBRARY_IMPL(imm, CPU, m) {
  m.impl("noise", noise);
  m.impl("noise.out", noise_out);
}

}  // namespace imm

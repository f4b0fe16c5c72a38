// imm::noise on the CPU: threads, registration; the loop is in cpu/noise.cpp.
#include "noise.h"

#include <ATen/Parallel.h>

#include "forms.h"

namespace imm {
namespace {

struct Cpu {
  // Every piece is drawn from its own counters, so any split over threads gives bitwise identical results.
  static void run(const at::Tensor& seeds, int64_t numel, int64_t step, double scale, const at::Tensor& normal) {
    if (normal.numel() == 0) return;
    const NoiseArgs args{per_image<int64_t>(seeds), numel, step, static_cast<float>(scale),
                         normal.mutable_data_ptr<float>()};
    const auto& functions = IMM_CHOOSE(noise_functions);
    at::parallel_for(0, seeds.size(0) * at::divup(numel, kNoiseBlock), 2,
                     [&](int64_t begin, int64_t end) { functions.noise(args, begin, end); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) { NoiseForms<Cpu>::implement(m); }

}  // namespace imm

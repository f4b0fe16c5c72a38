// imm::noise on CUDA: the launch, registration. The kernel is in noise.cu. Nothing here waits for the device.
#include "noise.h"

#include "../forms.h"
#include "launch.h"

namespace imm::cuda {
namespace {

struct Cuda {
  static void run(const at::Tensor& seeds, int64_t numel, int64_t step, double scale, const at::Tensor& normal) {
    Noise p;
    p.seeds = per_image<int64_t>(seeds);
    p.B = seeds.size(0);
    p.D = numel;
    p.step = static_cast<uint64_t>(step);
    p.scale = static_cast<float>(scale);
    p.normal = normal.mutable_data_ptr<float>();
    launch_on_device_of(seeds, [&](cudaStream_t stream) { return launch_noise_kernel(p, stream); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(imm, CUDA, m) { NoiseForms<Cuda>::implement(m); }

}  // namespace imm::cuda

// imm::flow_step on CUDA: the launches, registration. The kernels are in flow_step.cu. Nothing here waits for the
// device.
#include "flow_step.h"

#include "../forms.h"
#include "launch.h"

namespace imm::cuda {
namespace {

using at::Tensor;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Type::kFloat64;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kFloat16;
    default:  // the checks leave float32
      return Type::kFloat32;
  }
}

int64_t row_length(const Tensor& x) { return x.size(0) == 0 ? 0 : x.numel() / x.size(0); }

struct Cuda {
  static void forward(const Step& a, const Tensor& x_s, const NextInput* next) {
    FlowStepForward p;
    p.B = a.x.size(0);
    p.D = row_length(a.x);
    p.state = type_of(a.x);
    p.output = type_of(a.g);
    p.c_skip = per_image<double>(a.c_skip);
    p.c_out = per_image<double>(a.c_out);
    p.guidance = per_image<double>(a.guidance);
    p.c_noise = per_image<double>(a.c_noise);
    p.seeds = per_image<int64_t>(a.seeds);
    p.step = static_cast<uint64_t>(a.step);
    // These hold the contiguous copies, where copies are needed, until the kernel is queued.
    const Tensor x_rows = a.x.contiguous(), g_rows = a.g.contiguous();
    const Tensor g_uncond_rows = a.g_uncond ? a.g_uncond->contiguous() : Tensor();
    p.x = x_rows.const_data_ptr();
    p.g = g_rows.const_data_ptr();
    p.g_uncond = a.g_uncond ? g_uncond_rows.const_data_ptr() : nullptr;
    p.x_s = x_s.mutable_data_ptr();
    if (next) {
      p.c_in = per_image<double>(next->c_in);
      p.input = next->input.mutable_data_ptr();
      p.copies = next->copies;
    }
    launch_on_device_of(a.x, [&](cudaStream_t stream) { return launch_flow_step_fwd_kernel(p, stream); });
  }

  static void backward(const Tensor& grad, const Tensor& c_skip, const Tensor& c_out, const Optional& guidance,
                       const Tensor& grad_x, const Tensor& grad_g, const Tensor& grad_uncond) {
    FlowStepBackward p;
    p.B = grad.size(0);
    p.D = row_length(grad);
    p.state = type_of(grad);
    p.output = type_of(grad_g);
    p.c_skip = per_image<double>(c_skip);
    p.c_out = per_image<double>(c_out);
    p.guidance = per_image<double>(guidance);
    const Tensor grad_rows = grad.contiguous();
    p.grad = grad_rows.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_g = grad_g.mutable_data_ptr();
    p.grad_uncond = grad_uncond.defined() ? grad_uncond.mutable_data_ptr() : nullptr;
    launch_on_device_of(grad, [&](cudaStream_t stream) { return launch_flow_step_bwd_kernel(p, stream); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(imm, CUDA, m) { FlowStepForms<Cuda>::implement(m); }

}  // namespace imm::cuda

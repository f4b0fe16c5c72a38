// imm::flow_step and imm::flow_step_bwd on CUDA: checks, allocation, registration. The kernels are in
// flow_step.cu.
//
// python/imm/ops/flow_step.py is the reference, error texts included. Nothing here waits for the device.
#include "flow_step.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
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

// What sampling_step computes beside flow_step: c_in x_s into input, contiguous.
struct NextInput {
  Tensor c_in, input;
  int64_t copies;
};

// x_s is contiguous; the arguments are checked.
void run(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out, const Optional& g_uncond,
         const Optional& guidance, const Optional& c_noise, const Optional& seeds, int64_t step, const Tensor& x_s,
         const NextInput* next = nullptr) {
  FlowStepForward p;
  p.B = x.size(0);
  p.D = row_length(x);
  p.state = type_of(x);
  p.output = type_of(g);
  p.c_skip = per_image<double>(c_skip);
  p.c_out = per_image<double>(c_out);
  p.guidance = per_image<double>(guidance);
  p.c_noise = per_image<double>(c_noise);
  p.seeds = per_image<int64_t>(seeds);
  p.step = static_cast<uint64_t>(step);
  // These hold the contiguous copies, where copies are needed, until the kernel is queued.
  const Tensor x_rows = x.contiguous(), g_rows = g.contiguous();
  const Tensor g_uncond_rows = g_uncond ? g_uncond->contiguous() : Tensor();
  p.x = x_rows.const_data_ptr();
  p.g = g_rows.const_data_ptr();
  p.g_uncond = g_uncond ? g_uncond_rows.const_data_ptr() : nullptr;
  p.x_s = x_s.mutable_data_ptr();
  if (next) {
    p.c_in = per_image<double>(next->c_in);
    p.input = next->input.mutable_data_ptr();
    p.copies = next->copies;
  }
  launch_on_device_of(x, [&](cudaStream_t stream) { return launch_flow_step_fwd_kernel(p, stream); });
}

// x and g [B, ...] of any two of the four floating dtypes -> [B, ...] of x's dtype, contiguous.
Tensor flow_step(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out, const Optional& g_uncond,
                 const Optional& guidance, const Optional& c_noise, const Optional& seeds, int64_t step) {
  check_flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step);
  Tensor x_s = at::empty(x.sizes(), x.options());
  run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, x_s);
  return x_s;
}

void flow_step_out(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                   const Optional& g_uncond, const Optional& guidance, const Optional& c_noise, const Optional& seeds,
                   int64_t step, const Tensor& out) {
  check_flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step);
  check_out("out", out, x.sizes(), x.scalar_type(), x);
  refuse_gradients("flow_step", {x, g, c_skip, c_out, g_uncond.value_or(Tensor()), guidance.value_or(Tensor()),
                                 c_noise.value_or(Tensor()), out});
  const bool direct =
      writes_flow_step_directly(out, {x, g, g_uncond.value_or(Tensor())}, {c_skip, c_out, guidance, c_noise, seeds});
  const Tensor target = direct ? out : at::empty(x.sizes(), x.options());
  run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, target);
  if (!direct) out.copy_(target);
}

// The same, and c_in x_s as the network takes it: [copies B, ...] of g's dtype, contiguous.
std::tuple<Tensor, Tensor> sampling_step(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                                         const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                                         const Optional& seeds, int64_t step, const Tensor& c_in, int64_t copies) {
  check_flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step);
  check_next_input(x, c_in, copies);
  const Tensor x_s = at::empty(x.sizes(), x.options());
  const Tensor input = at::empty(next_input_sizes(x, copies), g.options());
  const NextInput next{c_in, input, copies};
  run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, x_s, &next);
  return {x_s, input};
}

void sampling_step_out(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                       const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                       const Optional& seeds, int64_t step, const Tensor& c_in, int64_t copies, const Tensor& out,
                       const Tensor& input) {
  check_flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step);
  if (check_sampling_step_out(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, c_in, copies, out, input)) {
    const NextInput next{c_in, input, copies};
    run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, out, &next);
    return;
  }
  const auto [x_s, scaled] = sampling_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, c_in, copies);
  out.copy_(x_s);
  input.copy_(scaled);
}

// The gradients of flow_step to x, g and g_uncond (empty where there is none), contiguous.
std::tuple<Tensor, Tensor, Tensor> flow_step_bwd(const Tensor& grad, const Tensor& g, const Tensor& c_skip,
                                                 const Tensor& c_out, const Optional& g_uncond,
                                                 const Optional& guidance) {
  check_flow_step(grad, g, c_skip, c_out, g_uncond, guidance, std::nullopt, std::nullopt, 0);
  FlowStepBackward p;
  p.B = grad.size(0);
  p.D = row_length(grad);
  p.state = type_of(grad);
  p.output = type_of(g);
  p.c_skip = per_image<double>(c_skip);
  p.c_out = per_image<double>(c_out);
  p.guidance = per_image<double>(guidance);
  const Tensor grad_rows = grad.contiguous();
  Tensor grad_x = at::empty(grad.sizes(), grad.options());
  Tensor grad_g = at::empty(g.sizes(), g.options());
  Tensor grad_uncond = g_uncond ? at::empty(g.sizes(), g.options()) : at::empty({0}, g.options());
  p.grad = grad_rows.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_g = grad_g.mutable_data_ptr();
  p.grad_uncond = g_uncond ? grad_uncond.mutable_data_ptr() : nullptr;
  launch_on_device_of(grad, [&](cudaStream_t stream) { return launch_flow_step_bwd_kernel(p, stream); });
  return {grad_x, grad_g, grad_uncond};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CUDA, m) {
  m.impl("flow_step", TORCH_FN(flow_step));
  m.impl("flow_step.out", TORCH_FN(flow_step_out));
  m.impl("flow_step_bwd", TORCH_FN(flow_step_bwd));
  m.impl("sampling_step", TORCH_FN(sampling_step));
  m.impl("sampling_step.out", TORCH_FN(sampling_step_out));
}

}  // namespace imm::cuda

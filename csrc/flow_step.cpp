// Checks, allocation and threads of imm::flow_step on the CPU; the loops are in cpu/flow_step.cpp.
#include "flow_step.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "fresh.h"

namespace imm {
namespace {

using at::Tensor;

Coefficient coefficient_of(const Tensor& value) {
  return {value.const_data_ptr<double>(), value.size(0) == 1 ? 0 : value.stride(0)};
}

// Elements do not depend on each other, so any split over threads gives the same bits.
template <typename Args>
void run_pieces(void (*loop)(const Args&, int64_t, int64_t), const Args& args, int64_t images, int64_t grain) {
  at::parallel_for(0, images * at::divup(args.numel, kFlowBlock), grain,
                   [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

// What sampling_step computes beside flow_step: c_in x_s into input.
struct NextInput {
  Tensor c_in, input;
  int64_t copies;
};

void run(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out, const Optional& g_uncond,
         const Optional& guidance, const Optional& c_noise, const Optional& seeds, int64_t step, const Tensor& out,
         const NextInput* next = nullptr) {
  if (x.numel() == 0) return;
  const Tensor xs = x.contiguous(), gs = g.contiguous();
  const Tensor base = g_uncond ? g_uncond->contiguous() : Tensor(), keys = seeds ? seeds->contiguous() : Tensor();
  const FlowStepArgs args{.x_dtype = x.scalar_type(),
                          .g_dtype = g.scalar_type(),
                          .numel = x.numel() / x.size(0),
                          .x = xs.const_data_ptr(),
                          .g = gs.const_data_ptr(),
                          .g_uncond = g_uncond ? base.const_data_ptr() : nullptr,
                          .c_skip = coefficient_of(c_skip),
                          .c_out = coefficient_of(c_out),
                          .guidance = guidance ? coefficient_of(*guidance) : Coefficient{},
                          .c_noise = c_noise ? coefficient_of(*c_noise) : Coefficient{},
                          .seeds = seeds ? keys.const_data_ptr<int64_t>() : nullptr,
                          .step = step,
                          .out = out.mutable_data_ptr(),
                          .c_in = next ? coefficient_of(next->c_in) : Coefficient{},
                          .input = next ? next->input.mutable_data_ptr() : nullptr,
                          .copies = next ? next->copies : 0,
                          .block = x.numel()};
  run_pieces(IMM_CHOOSE(flow_step_functions).forward, args, x.size(0), seeds ? 2 : 32);
}

Tensor flow_step(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out, const Optional& g_uncond,
                 const Optional& guidance, const Optional& c_noise, const Optional& seeds, int64_t step) {
  check_flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step);
  const Tensor out = fresh(x.sizes(), x.scalar_type());
  run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, out);
  return out;
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
  const Tensor target = direct ? out : fresh(x.sizes(), x.scalar_type());
  run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, target);
  if (!direct) out.copy_(target);
}

std::tuple<Tensor, Tensor> sampling_step(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                                         const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                                         const Optional& seeds, int64_t step, const Tensor& c_in, int64_t copies) {
  check_flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step);
  check_next_input(x, c_in, copies);
  const Tensor out = fresh(x.sizes(), x.scalar_type());
  const Tensor input = fresh(next_input_sizes(x, copies), g.scalar_type());
  const NextInput next{c_in, input, copies};
  run(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, out, &next);
  return {out, input};
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
  const auto [out_value, input_value] =
      sampling_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, c_in, copies);
  out.copy_(out_value);
  input.copy_(input_value);
}

std::tuple<Tensor, Tensor, Tensor> flow_step_bwd(const Tensor& grad, const Tensor& g, const Tensor& c_skip,
                                                 const Tensor& c_out, const Optional& g_uncond,
                                                 const Optional& guidance) {
  check_flow_step(grad, g, c_skip, c_out, g_uncond, guidance, std::nullopt, std::nullopt, 0);
  const auto empty = [](const Tensor& like) { return fresh(like.sizes(), like.scalar_type()); };
  const Tensor grad_x = empty(grad), grad_g = empty(g);
  const Tensor grad_uncond = g_uncond ? empty(g) : at::empty({0}, g.scalar_type());
  if (grad.numel() == 0) return {grad_x, grad_g, grad_uncond};
  const Tensor up = grad.contiguous();
  const FlowStepBwdArgs args{.x_dtype = grad.scalar_type(),
                             .g_dtype = g.scalar_type(),
                             .numel = grad.numel() / grad.size(0),
                             .grad = up.const_data_ptr(),
                             .c_skip = coefficient_of(c_skip),
                             .c_out = coefficient_of(c_out),
                             .guidance = guidance ? coefficient_of(*guidance) : Coefficient{},
                             .grad_x = grad_x.mutable_data_ptr(),
                             .grad_g = grad_g.mutable_data_ptr(),
                             .grad_uncond = g_uncond ? grad_uncond.mutable_data_ptr() : nullptr};
  run_pieces(IMM_CHOOSE(flow_step_functions).backward, args, grad.size(0), 32);
  return {grad_x, grad_g, grad_uncond};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) {
  m.impl("flow_step", flow_step);
  m.impl("flow_step.out", flow_step_out);
  m.impl("flow_step_bwd", flow_step_bwd);
  m.impl("sampling_step", sampling_step);
  m.impl("sampling_step.out", sampling_step_out);
}

}  // namespace imm

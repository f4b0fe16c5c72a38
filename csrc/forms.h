// The forms of the ops that the CPU and CUDA both have: checks and memory around what runs on the device, which is a
// class of static functions. python/imm/ops has the references, error texts included.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "checks.h"
#include "fresh.h"
#include "per_image.h"

namespace imm {

// A [1] or [B] tensor as kernels take it.
template <typename T>
PerImage<T> per_image(const Optional& value) {
  if (!value) return {};
  return {value->const_data_ptr<T>(), value->size(0) == 1 ? 0 : value->stride(0)};
}

// Device::run(seeds, numel, step, scale, normal) fills [B, numel], which is contiguous.
template <class Device>
struct NoiseForms {
  using Tensor = at::Tensor;

  // seeds [B] int64 -> [B, numel] float32, N(0, scale^2).
  static Tensor noise(const Tensor& seeds, int64_t numel, int64_t step, double scale) {
    check_noise(seeds, numel, step);
    const Tensor normal = fresh({seeds.size(0), numel}, at::kFloat, seeds.device());
    Device::run(seeds, numel, step, scale, normal);
    return normal;
  }

  static void noise_out(const Tensor& seeds, int64_t numel, int64_t step, double scale, const Tensor& out) {
    check_noise(seeds, numel, step);
    const std::array<int64_t, 2> expected{seeds.size(0), numel};
    check_out("out", out, expected, at::kFloat, seeds);
    if (out.is_contiguous() && apart(out, seeds)) {
      Device::run(seeds, numel, step, scale, out);
    } else {
      out.copy_(noise(seeds, numel, step, scale));
    }
  }

  static void implement(torch::Library& m) {
    m.impl("noise", noise);
    m.impl("noise.out", noise_out);
  }
};

// What sampling_step computes beside flow_step: c_in x_s into input, contiguous.
struct NextInput {
  at::Tensor c_in, input;
  int64_t copies;
};

// Device::forward(step, x_s, next) and Device::backward(grad, c_skip, c_out, guidance, grad_x, grad_g, grad_uncond):
// results are contiguous, next may be null, grad_uncond undefined.
template <class Device>
struct FlowStepForms {
  using Tensor = at::Tensor;

  static Tensor like(const Tensor& value) { return fresh(value.sizes(), value.scalar_type(), value.device()); }

  // x and g [B, ...] of any two of the four floating dtypes -> [B, ...] of x's dtype.
  static Tensor flow_step(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                          const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                          const Optional& seeds, int64_t step) {
    const Step a{x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step};
    check_flow_step(a);
    const Tensor x_s = like(x);
    Device::forward(a, x_s, nullptr);
    return x_s;
  }

  static void flow_step_out(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                            const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                            const Optional& seeds, int64_t step, const Tensor& out) {
    const Step a{x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step};
    check_flow_step(a);
    check_out("out", out, x.sizes(), x.scalar_type(), x);
    refuse_gradients("flow_step", {x, g, c_skip, c_out, or_none(g_uncond), or_none(guidance), or_none(c_noise), out});
    const bool direct = writes_flow_step_directly(a, out);
    const Tensor target = direct ? out : like(x);
    Device::forward(a, target, nullptr);
    if (!direct) out.copy_(target);
  }

  // The same, and c_in x_s as the network takes it: [copies B, ...] of g's dtype.
  static std::tuple<Tensor, Tensor> sampling_step(const Tensor& x, const Tensor& g, const Tensor& c_skip,
                                                  const Tensor& c_out, const Optional& g_uncond,
                                                  const Optional& guidance, const Optional& c_noise,
                                                  const Optional& seeds, int64_t step, const Tensor& c_in,
                                                  int64_t copies) {
    const Step a{x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step};
    check_flow_step(a);
    check_next_input(x, c_in, copies);
    return stepped(a, c_in, copies);
  }

  static void sampling_step_out(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                                const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                                const Optional& seeds, int64_t step, const Tensor& c_in, int64_t copies,
                                const Tensor& out, const Tensor& input) {
    const Step a{x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step};
    check_flow_step(a);
    if (check_sampling_step_out(a, c_in, copies, out, input)) {
      const NextInput next{c_in, input, copies};
      Device::forward(a, out, &next);
      return;
    }
    const auto [x_s, scaled] = stepped(a, c_in, copies);
    out.copy_(x_s);
    input.copy_(scaled);
  }

  static std::tuple<Tensor, Tensor> stepped(const Step& a, const Tensor& c_in, int64_t copies) {
    const Tensor x_s = like(a.x);
    const NextInput next{c_in, fresh(next_input_sizes(a.x, copies), a.g.scalar_type(), a.x.device()), copies};
    Device::forward(a, x_s, &next);
    return {x_s, next.input};
  }

  // The gradients of flow_step to x, g and g_uncond (empty where there is none).
  static std::tuple<Tensor, Tensor, Tensor> flow_step_bwd(const Tensor& grad, const Tensor& g, const Tensor& c_skip,
                                                          const Tensor& c_out, const Optional& g_uncond,
                                                          const Optional& guidance) {
    check_flow_step({grad, g, c_skip, c_out, g_uncond, guidance, std::nullopt, std::nullopt, 0});
    const Tensor grad_x = like(grad), grad_g = like(g), grad_uncond = g_uncond ? like(g) : Tensor();
    Device::backward(grad, c_skip, c_out, guidance, grad_x, grad_g, grad_uncond);
    return {grad_x, grad_g, g_uncond ? grad_uncond : at::empty({0}, g.options())};
  }

  static void implement(torch::Library& m) {
    m.impl("flow_step", flow_step);
    m.impl("flow_step.out", flow_step_out);
    m.impl("flow_step_bwd", flow_step_bwd);
    m.impl("sampling_step", sampling_step);
    m.impl("sampling_step.out", sampling_step_out);
  }
};

}  // namespace imm

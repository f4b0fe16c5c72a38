// imm::flow_step, imm::flow_step_bwd and imm::noise on CUDA: checks, allocation, registration. The kernels are in
// flow_step.cu.
//
// python/imm/ops/flow_step.py and noise.py are the reference, error texts included. Nothing here waits for the device.
#include "flow_step.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "launch.h"

namespace imm::cuda {
namespace {

using at::Tensor;

std::string name_of(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat32;
    case at::kDouble:
      return Type::kFloat64;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, float64, bfloat16 or float16, got ",
                       name_of(tensor.scalar_type()));
  }
}

void check_device(const char* name, const Tensor& value, const Tensor& like) {
  TORCH_CHECK_VALUE(value.device() == like.device(), name, ": expected the state's device ", like.device(), ", got ",
                    value.device());
}

void check_output(const char* name, const Tensor& value, const Tensor& g) {
  TORCH_CHECK_VALUE(value.sizes() == g.sizes() && value.scalar_type() == g.scalar_type(), name, ": expected ",
                    g.sizes(), " of ", name_of(g.scalar_type()), ", got ", value.sizes(), " of ",
                    name_of(value.scalar_type()));
  check_device(name, value, g);
}

// A [1] or [B] float64 tensor as the kernels take it; absent is a null pointer.
PerImage<double> coefficient(const char* name, const std::optional<Tensor>& value, const Tensor& x) {
  if (!value) return {};
  TORCH_CHECK_VALUE(value->dim() == 1 && (value->size(0) == 1 || value->size(0) == x.size(0)), name,
                    ": expected [1] or [", x.size(0), "], got ", value->sizes());
  TORCH_CHECK_TYPE(value->scalar_type() == at::kDouble, name, ": expected float64, got ",
                   name_of(value->scalar_type()));
  check_device(name, *value, x);
  return {value->const_data_ptr<double>(), value->size(0) == 1 ? 0 : value->stride(0)};
}

PerImage<int64_t> seeds_of(const Tensor& seeds) {
  TORCH_CHECK_VALUE(seeds.scalar_type() == at::kLong && seeds.dim() == 1, "seeds: expected a [B] int64 tensor, got ",
                    seeds.sizes(), " of ", name_of(seeds.scalar_type()));
  return {seeds.const_data_ptr<int64_t>(), seeds.stride(0)};
}

void check_counts(int64_t numel, int64_t step) {
  TORCH_CHECK_VALUE(numel >= 0 && step >= 0, "numel and step: expected counts >= 0, got ", numel, " and ", step);
}

int64_t row_length(const Tensor& x) { return x.size(0) == 0 ? 0 : x.numel() / x.size(0); }

void check_pair(const char* names, const Tensor& x, const Tensor& g) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && g.sizes() == x.sizes(), names, ": expected the same shape [B, ...], got ",
                    x.sizes(), " and ", g.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()) && at::isFloatingType(g.scalar_type()), names,
                   ": expected floating dtypes, got ", name_of(x.scalar_type()), " and ", name_of(g.scalar_type()));
}

// x and g [B, ...] of any two of the four floating dtypes -> [B, ...] of x's dtype, contiguous.
Tensor flow_step(const Tensor& x, const Tensor& g, const Tensor& c_skip, const Tensor& c_out,
                 const std::optional<Tensor>& g_uncond, const std::optional<Tensor>& guidance,
                 const std::optional<Tensor>& c_noise, const std::optional<Tensor>& seeds, int64_t step) {
  check_pair("x and g", x, g);
  TORCH_CHECK_VALUE(g_uncond.has_value() == guidance.has_value(), "g_uncond and guidance: expected both or neither");
  TORCH_CHECK_VALUE(c_noise.has_value() == seeds.has_value(), "c_noise and seeds: expected both or neither");
  check_device("g", g, x);
  if (g_uncond) check_output("g_uncond", *g_uncond, g);
  FlowStepForward p;
  p.B = x.size(0);
  p.D = row_length(x);
  p.state = type_of("x", x);
  p.output = type_of("g", g);
  p.c_skip = coefficient("c_skip", c_skip, x);
  p.c_out = coefficient("c_out", c_out, x);
  p.guidance = coefficient("guidance", guidance, x);
  p.c_noise = coefficient("c_noise", c_noise, x);
  if (seeds) {
    TORCH_CHECK_VALUE(seeds->dim() == 1 && seeds->size(0) == p.B, "seeds: expected one per image, [", p.B, "], got ",
                      seeds->sizes());
    p.seeds = seeds_of(*seeds);
    check_device("seeds", *seeds, x);
    check_counts(p.D, step);
    p.step = static_cast<uint64_t>(step);
  }
  // These hold the contiguous copies, where copies are needed, until the kernel is queued.
  const Tensor x_rows = x.contiguous(), g_rows = g.contiguous();
  const Tensor g_uncond_rows = g_uncond ? g_uncond->contiguous() : Tensor();
  Tensor x_s = at::empty(x.sizes(), x.options());
  p.x = x_rows.const_data_ptr();
  p.g = g_rows.const_data_ptr();
  p.g_uncond = g_uncond ? g_uncond_rows.const_data_ptr() : nullptr;
  p.x_s = x_s.mutable_data_ptr();
  launch_on_device_of(x, [&](cudaStream_t stream) { return launch_flow_step_fwd_kernel(p, stream); });
  return x_s;
}

// The gradients of flow_step to x, g and g_uncond (empty where there is none), contiguous.
std::tuple<Tensor, Tensor, Tensor> flow_step_bwd(const Tensor& grad, const Tensor& g, const Tensor& c_skip,
                                                 const Tensor& c_out, const std::optional<Tensor>& g_uncond,
                                                 const std::optional<Tensor>& guidance) {
  check_pair("grad and g", grad, g);
  TORCH_CHECK_VALUE(g_uncond.has_value() == guidance.has_value(), "g_uncond and guidance: expected both or neither");
  check_device("g", g, grad);
  if (g_uncond) check_output("g_uncond", *g_uncond, g);
  FlowStepBackward p;
  p.B = grad.size(0);
  p.D = row_length(grad);
  p.state = type_of("grad", grad);
  p.output = type_of("g", g);
  p.c_skip = coefficient("c_skip", c_skip, grad);
  p.c_out = coefficient("c_out", c_out, grad);
  p.guidance = coefficient("guidance", guidance, grad);
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

// seeds [B] int64 -> [B, numel] float32, N(0, 1).
Tensor noise(const Tensor& seeds, int64_t numel, int64_t step) {
  Noise p;
  p.seeds = seeds_of(seeds);
  check_counts(numel, step);
  p.B = seeds.size(0);
  p.D = numel;
  p.step = static_cast<uint64_t>(step);
  Tensor normal = at::empty({p.B, p.D}, seeds.options().dtype(at::kFloat));
  p.normal = normal.mutable_data_ptr<float>();
  launch_on_device_of(seeds, [&](cudaStream_t stream) { return launch_noise_kernel(p, stream); });
  return normal;
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CUDA, m) {
  m.impl("flow_step", TORCH_FN(flow_step));
  m.impl("flow_step_bwd", TORCH_FN(flow_step_bwd));
  m.impl("noise", TORCH_FN(noise));
}

}  // namespace imm::cuda

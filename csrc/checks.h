// What arguments must be, in the words of the Python references.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>

namespace imm {

inline std::string dtype_name(const at::Tensor& tensor) {
  return "torch." + std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

inline at::ScalarType accumulate_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_same_device(const char* name, const at::Tensor& value, const at::Tensor& x) {
  TORCH_CHECK_VALUE(value.device() == x.device(), name, ": expected the device ", x.device(), ", got ", value.device());
}

// The four dtypes that the kernels read and write.
inline bool is_kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_kernel_dtype(const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(is_kernel_dtype(x.scalar_type()), name, ": expected a floating dtype of 16, 32 or 64 bits, got ",
                   dtype_name(x));
}

inline void check_out(const char* name, const at::Tensor& out, at::IntArrayRef sizes, at::ScalarType dtype,
                      const at::Tensor& x) {
  TORCH_CHECK_VALUE(out.sizes() == sizes, name, ": expected ", sizes, ", got ", out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == dtype, name, ": expected torch.", c10::getDtypeNames(dtype).first, ", got ",
                   dtype_name(out));
  check_same_device(name, out, x);
}

inline void refuse_gradients(const char* op, std::initializer_list<at::Tensor> tensors) {
  if (!c10::GradMode::is_enabled()) return;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(!tensor.defined() || !tensor.requires_grad(), op,
                ": the out= form has no derivative; detach the inputs or use no_grad");
  }
}

using Optional = std::optional<at::Tensor>;

inline void check_noise(const at::Tensor& seeds, int64_t numel, int64_t step) {
  TORCH_CHECK_VALUE(seeds.scalar_type() == at::kLong && seeds.dim() == 1, "seeds: expected a [B] int64 tensor, got ",
                    seeds.sizes(), " of ", dtype_name(seeds));
  TORCH_CHECK_VALUE(numel >= 0 && step >= 0, "numel and step: expected counts >= 0, got ", numel, " and ", step);
}

inline void check_coefficient(const char* name, const at::Tensor& value, const at::Tensor& x) {
  TORCH_CHECK_VALUE(value.dim() == 1 && (value.size(0) == 1 || value.size(0) == x.size(0)), name, ": expected [1] or [",
                    x.size(0), "], got ", value.sizes());
  TORCH_CHECK_TYPE(value.scalar_type() == at::kDouble, name, ": expected float64, got ", dtype_name(value));
  check_same_device(name, value, x);
}

// The arguments of imm::flow_step, on any device.
struct Step {
  const at::Tensor &x, &g, &c_skip, &c_out;
  const Optional &g_uncond, &guidance, &c_noise, &seeds;
  int64_t step;
};

// The same checks in the same order as the reference.
inline void check_flow_step(const Step& a) {
  TORCH_CHECK_VALUE(a.x.dim() >= 1 && a.g.sizes() == a.x.sizes(), "x and g: expected the same shape [B, ...], got ",
                    a.x.sizes(), " and ", a.g.sizes());
  check_kernel_dtype("x", a.x);
  check_kernel_dtype("g", a.g);
  check_same_device("g", a.g, a.x);
  TORCH_CHECK_VALUE(a.g_uncond.has_value() == a.guidance.has_value(),
                    "g_uncond and guidance: expected both or neither");
  TORCH_CHECK_VALUE(a.c_noise.has_value() == a.seeds.has_value(), "c_noise and seeds: expected both or neither");
  if (a.g_uncond) {
    TORCH_CHECK_VALUE(a.g_uncond->sizes() == a.g.sizes() && a.g_uncond->scalar_type() == a.g.scalar_type(),
                      "g_uncond: expected ", a.g.sizes(), " of ", dtype_name(a.g), ", got ", a.g_uncond->sizes(),
                      " of ", dtype_name(*a.g_uncond));
    check_same_device("g_uncond", *a.g_uncond, a.x);
  }
  check_coefficient("c_skip", a.c_skip, a.x);
  check_coefficient("c_out", a.c_out, a.x);
  if (a.guidance) check_coefficient("guidance", *a.guidance, a.x);
  if (!a.seeds) return;
  check_coefficient("c_noise", *a.c_noise, a.x);
  TORCH_CHECK_VALUE(a.seeds->dim() == 1 && a.seeds->size(0) == a.x.size(0), "seeds: expected one per image, [",
                    a.x.size(0), "], got ", a.seeds->sizes());
  check_noise(*a.seeds, a.x.numel(), a.step);
  check_same_device("seeds", *a.seeds, a.x);
}

// What imm::sampling_step takes beside those.
inline void check_next_input(const at::Tensor& x, const at::Tensor& c_in, int64_t copies) {
  check_coefficient("c_in", c_in, x);
  TORCH_CHECK_VALUE(copies >= 1, "copies: expected a count >= 1, got ", copies);
}

inline at::DimVector next_input_sizes(const at::Tensor& x, int64_t copies) {
  at::DimVector sizes(x.sizes());
  sizes[0] *= copies;
  return sizes;
}

struct NamedTensor {
  const char* name;
  const at::Tensor& value;
};

// The arguments of imm::adaln_modulate and imm::gated_residual_adaln, on any device; the reference's checks in its
// order.
inline void check_adaln(const at::Tensor& x, const at::Tensor* y, std::initializer_list<NamedTensor> modulations,
                        double eps) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) >= 1, "x: expected tokens [B, T, C] with C > 0, got ", x.sizes());
  TORCH_CHECK_VALUE(!y || y->sizes() == x.sizes(), "y: expected ", x.sizes(), " as x has, got ", y->sizes());
  check_kernel_dtype("x", x);
  if (y) {
    check_kernel_dtype("y", *y);
    check_same_device("y", *y, x);
  }
  for (const auto& [name, value] : modulations) {
    check_kernel_dtype(name, value);
    check_same_device(name, value, x);
  }
  for (const auto& [name, value] : modulations) {
    TORCH_CHECK_VALUE(
        value.dim() == 2 && (value.size(0) == 1 || value.size(0) == x.size(0)) && value.size(1) == x.size(2), name,
        ": expected [", x.size(0), ", ", x.size(2), "] or [1, ", x.size(2), "], got ", value.sizes());
  }
  const at::Tensor& first = modulations.begin()->value;
  for (const auto& [name, value] : modulations) {
    TORCH_CHECK_VALUE(value.sizes() == first.sizes() && value.scalar_type() == first.scalar_type(), name, ": expected ",
                      first.sizes(), " of ", dtype_name(first), " as the other modulations, got ", value.sizes(),
                      " of ", dtype_name(value));
  }
  TORCH_CHECK_VALUE(eps > 0, "eps: expected a positive number, got ", eps);
}

inline void check_adaln_bwd(const at::Tensor& grad_z, const at::Tensor& grad_h, const at::Tensor& z,
                            const at::Tensor& y, const at::Tensor& gate, const at::Tensor& scale, double eps) {
  check_adaln(z, &y, {{"gate", gate}, {"scale", scale}}, eps);
  const auto check = [&](const char* name, const at::Tensor& value, const at::Tensor& like) {
    TORCH_CHECK_VALUE(
        value.sizes() == z.sizes() && value.scalar_type() == like.scalar_type() && value.device() == z.device(), name,
        ": expected ", z.sizes(), " of ", dtype_name(like), " on ", z.device(), ", got ", value.sizes(), " of ",
        dtype_name(value), " on ", value.device());
  };
  check("grad_z", grad_z, z);
  check("grad_h", grad_h, y);
}

// A tangent and what it is the tangent of.
struct NamedTangent {
  const char* name;
  const at::Tensor &value, &of;
};

// What a _jvp op takes beside its op's arguments.
inline void check_tangents(std::initializer_list<NamedTangent> tangents) {
  for (const auto& [name, value, of] : tangents) {
    TORCH_CHECK_VALUE(
        value.sizes() == of.sizes() && value.scalar_type() == of.scalar_type() && value.device() == of.device(), name,
        ": expected ", of.sizes(), " of ", dtype_name(of), " on ", of.device(), " as ", name + 1, " is, got ",
        value.sizes(), " of ", dtype_name(value), " on ", value.device());
  }
}

// The arguments of imm::timestep_attention, on any device.
inline void check_timestep_attention(const at::Tensor& qkv, int64_t heads) {
  constexpr int64_t kTokens = 1024, kFeatures = 128;
  TORCH_CHECK_VALUE(heads >= 1, "heads: expected a positive number, got ", heads);
  TORCH_CHECK_VALUE(qkv.dim() == 3 && qkv.size(2) % (3 * heads) == 0, "qkv: expected [B, T, 3 H d] for H = ", heads,
                    " heads, got ", qkv.sizes());
  TORCH_CHECK_VALUE(qkv.size(1) > 0 && qkv.size(1) <= kTokens, "qkv: expected 1 to ", kTokens, " tokens, got ",
                    qkv.size(1));
  const int64_t features = qkv.size(2) / (3 * heads);
  TORCH_CHECK_VALUE(features > 0 && features % 8 == 0 && features <= kFeatures,
                    "qkv: expected heads of a multiple of 8 features up to ", kFeatures, ", got ", features);
  check_kernel_dtype("qkv", qkv);
}

// The arguments of imm::timestep_embedding, on any device.
inline void check_timestep_embedding(const at::Tensor& t, const at::Tensor& s, int64_t dim, double max_period,
                                     at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.dim() == 1 && s.sizes() == t.sizes(), "t and s: expected the same shape [B], got ", t.sizes(),
                    " and ", s.sizes());
  check_kernel_dtype("t", t);
  check_kernel_dtype("s", s);
  check_same_device("s", s, t);
  TORCH_CHECK_VALUE(dim >= 2 && dim % 2 == 0, "dim: expected a positive even number, got ", dim);
  TORCH_CHECK_VALUE(max_period > 1 && std::isfinite(max_period), "max_period: expected a finite number > 1, got ",
                    max_period);
  TORCH_CHECK_TYPE(is_kernel_dtype(dtype), "dtype: expected a floating dtype of 16, 32 or 64 bits, got torch.",
                   c10::getDtypeNames(dtype).first);
}

inline void check_timestep_embedding_bwd(const at::Tensor& grad, const at::Tensor& t, const at::Tensor& s,
                                         double max_period) {
  const bool fits = t.dim() == 1 && grad.dim() == 3 && grad.size(0) == 2 && grad.size(1) == t.size(0);
  TORCH_CHECK_VALUE(fits, "grad: expected [2, ", t.dim() ? std::to_string(t.size(0)) : "", ", dim], got ",
                    grad.sizes());
  check_timestep_embedding(t, s, grad.size(2), max_period, grad.scalar_type());
  check_same_device("grad", grad, t);
}

// Whether a kernel may write `out` directly while it still reads `input`.
inline bool apart(const at::Tensor& out, const at::Tensor& input) {
  return !input.defined() || at::get_overlap_status(out, input) == at::MemOverlapStatus::No;
}

inline at::Tensor or_none(const Optional& value) { return value.value_or(at::Tensor()); }

// The same for flow_step, on any device: an element is read before it is written, so the state may be stepped in place.
inline bool writes_flow_step_directly(const Step& a, const at::Tensor& out) {
  const auto images = {a.x, a.g, or_none(a.g_uncond)};
  const auto numbers = {a.c_skip, a.c_out, or_none(a.guidance), or_none(a.c_noise), or_none(a.seeds)};
  const auto in_place_or_apart = [&](const at::Tensor& image) { return image.is_same(out) || apart(out, image); };
  return out.is_contiguous() && std::all_of(images.begin(), images.end(), in_place_or_apart) &&
         std::all_of(numbers.begin(), numbers.end(), [&](const at::Tensor& value) { return apart(out, value); });
}

// Checks the arguments of imm::sampling_step.out beside those of flow_step; whether a kernel may write both directly.
// The network's next input is written while all others are read.
inline bool check_sampling_step_out(const Step& a, const at::Tensor& c_in, int64_t copies, const at::Tensor& out,
                                    const at::Tensor& input) {
  check_next_input(a.x, c_in, copies);
  check_out("out", out, a.x.sizes(), a.x.scalar_type(), a.x);
  check_out("input", input, next_input_sizes(a.x, copies), a.g.scalar_type(), a.x);
  const auto others = {a.x,  a.g, or_none(a.g_uncond), a.c_skip, a.c_out, or_none(a.guidance), or_none(a.c_noise),
                       c_in, out};
  refuse_gradients("sampling_step", others);
  refuse_gradients("sampling_step", {input});
  return writes_flow_step_directly(a, out) && apart(out, c_in) && input.is_contiguous() &&
         apart(input, or_none(a.seeds)) &&
         std::all_of(others.begin(), others.end(), [&](const at::Tensor& other) { return apart(input, other); });
}

}  // namespace imm

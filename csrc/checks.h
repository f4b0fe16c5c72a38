// What arguments must be, in the words of the Python references.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>

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

// The arguments of imm::flow_step, on any device; the same checks in the same order as the reference.
inline void check_flow_step(const at::Tensor& x, const at::Tensor& g, const at::Tensor& c_skip, const at::Tensor& c_out,
                            const Optional& g_uncond, const Optional& guidance, const Optional& c_noise,
                            const Optional& seeds, int64_t step) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && g.sizes() == x.sizes(), "x and g: expected the same shape [B, ...], got ",
                    x.sizes(), " and ", g.sizes());
  check_kernel_dtype("x", x);
  check_kernel_dtype("g", g);
  check_same_device("g", g, x);
  TORCH_CHECK_VALUE(g_uncond.has_value() == guidance.has_value(), "g_uncond and guidance: expected both or neither");
  TORCH_CHECK_VALUE(c_noise.has_value() == seeds.has_value(), "c_noise and seeds: expected both or neither");
  if (g_uncond) {
    TORCH_CHECK_VALUE(g_uncond->sizes() == g.sizes() && g_uncond->scalar_type() == g.scalar_type(),
                      "g_uncond: expected ", g.sizes(), " of ", dtype_name(g), ", got ", g_uncond->sizes(), " of ",
                      dtype_name(*g_uncond));
    check_same_device("g_uncond", *g_uncond, x);
  }
  check_coefficient("c_skip", c_skip, x);
  check_coefficient("c_out", c_out, x);
  if (guidance) check_coefficient("guidance", *guidance, x);
  if (!seeds) return;
  check_coefficient("c_noise", *c_noise, x);
  TORCH_CHECK_VALUE(seeds->dim() == 1 && seeds->size(0) == x.size(0), "seeds: expected one per image, [", x.size(0),
                    "], got ", seeds->sizes());
  check_noise(*seeds, x.numel(), step);
  check_same_device("seeds", *seeds, x);
}

// Whether a kernel may write `out` directly while it still reads `input`.
inline bool apart(const at::Tensor& out, const at::Tensor& input) {
  return !input.defined() || at::get_overlap_status(out, input) == at::MemOverlapStatus::No;
}

// The same for flow_step, on any device: an element is read before it is written, so the state may be stepped in place.
inline bool writes_flow_step_directly(const at::Tensor& out, std::initializer_list<at::Tensor> images,
                                      std::initializer_list<Optional> coefficients) {
  if (!out.is_contiguous()) return false;
  for (const at::Tensor& image : images) {
    const bool in_place = image.defined() && image.is_same(out);
    if (!in_place && !apart(out, image)) return false;
  }
  for (const Optional& coefficient : coefficients) {
    if (coefficient && !apart(out, *coefficient)) return false;
  }
  return true;
}

}  // namespace imm

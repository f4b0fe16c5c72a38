// Words for error messages, the same as the Python references use.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>

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
inline void check_kernel_dtype(const char* name, const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   ": expected a floating dtype of 16, 32 or 64 bits, got ", dtype_name(x));
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

// Whether a kernel may write `out` directly while it still reads `input`.
inline bool apart(const at::Tensor& out, const at::Tensor& input) {
  return !input.defined() || at::get_overlap_status(out, input) == at::MemOverlapStatus::No;
}

}  // namespace imm

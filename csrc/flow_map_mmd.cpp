// Checks of imm::flow_map_mmd on the CPU; it is the loss of mmd.cpp on particles that are formed where they are read.
#include <torch/library.h>

#include <tuple>

#include "mmd_loss.h"

namespace imm {
namespace {

using at::Tensor;

void check(const Branch& t, const Branch& r, const LossArguments& arguments) {
  const Tensor& x = t.x;
  check_loss("x_t", "x_r", x, r.x, arguments);
  for (const auto& [name, value] : {std::pair("g_t", t.g), std::pair("g_r", r.g)}) {
    TORCH_CHECK_VALUE(value.sizes() == x.sizes(), name, ": expected the states' shape ", x.sizes(), ", got ",
                      value.sizes());
    check_kernel_dtype(name, value);
    check_same_device(name, value, x);
  }
  for (const auto& [name, value] : {std::pair("c_skip_t", t.c_skip), std::pair("c_out_t", t.c_out),
                                    std::pair("c_skip_r", r.c_skip), std::pair("c_out_r", r.c_out)}) {
    TORCH_CHECK_VALUE(value.dim() == 1 && value.size(0) == x.size(0), name, ": expected one number per group, [",
                      x.size(0), "], got ", value.sizes());
    TORCH_CHECK_TYPE(value.scalar_type() == at::kDouble, name, ": expected float64, got ", dtype_name(value));
    check_same_device(name, value, x);
  }
}

std::tuple<Tensor, Tensor> flow_map_mmd(const Tensor& x_t, const Tensor& x_r, const Tensor& g_t, const Tensor& g_r,
                                        const Tensor& c_skip_t, const Tensor& c_out_t, const Tensor& c_skip_r,
                                        const Tensor& c_out_r, const Tensor& scale, const Optional& weight,
                                        const Optional& upstream, std::string kernel, at::ArrayRef<double> bandwidths,
                                        double eps, bool unbiased) {
  const Branch t{x_t, g_t, c_skip_t, c_out_t}, r{x_r, g_r, c_skip_r, c_out_r};
  const LossArguments arguments{scale, weight, upstream, kernel, bandwidths, eps, unbiased};
  check(t, r, arguments);
  return loss_and_gradient(t, r, arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) { m.impl("flow_map_mmd", flow_map_mmd); }

}  // namespace imm

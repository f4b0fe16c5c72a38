// What mmd.cpp has for flow_map_mmd.cpp and energy_score.cpp: the checks of a loss and its run over groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

#include "checks.h"
#include "mmd.h"

namespace imm {

// A set of particles per group: x or, where g is defined, c_skip x + c_out g with one float64 per group.
struct Branch {
  at::Tensor x, g{}, c_skip{}, c_out{};
};

struct LossArguments {
  at::Tensor scale;
  Optional weight, upstream;
  std::string kernel;
  at::ArrayRef<double> bandwidths;
  double eps;
  bool unbiased;
};

void check_kernel(const std::string& kernel, at::ArrayRef<double> bandwidths, double eps);

MmdKernelArgs kernel_args(const std::string& kernel, at::ArrayRef<double> bandwidths, double eps);

void check_groups(const char* name, const at::Tensor& value, const at::Tensor& x);

void check_loss(const char* t_name, const char* r_name, const at::Tensor& y_t, const at::Tensor& y_r,
                const LossArguments& arguments);

// The loss [G] and its gradient to y_t's x or, where there is one, g.
std::tuple<at::Tensor, at::Tensor> loss_and_gradient(const Branch& y_t, const Branch& y_r, LossArguments arguments);

}  // namespace imm

// Checks, allocation and threads of imm::energy_score on the CPU; the loops are in cpu/energy_score.cpp.
#include "energy_score.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "fresh.h"
#include "mmd_loss.h"

namespace imm {
namespace {

using at::Tensor;

void check_like(const char* name, const Tensor& value, const Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(value.sizes() == sizes, name, ": expected ", sizes, ", got ", value.sizes());
  TORCH_CHECK_TYPE(value.scalar_type() == x.scalar_type(), name, ": expected x's dtype ", dtype_name(x), ", got ",
                   dtype_name(value));
  check_same_device(name, value, x);
}

void check_targets(const Tensor& x, const Tensor& y, const Optional& log_std, const Optional& seed, int64_t draws) {
  const int64_t G = x.size(0), D = x.size(2);
  TORCH_CHECK_VALUE(log_std.has_value() == seed.has_value(), "log_std and seed: expected both or neither");
  if (!log_std) {
    TORCH_CHECK_VALUE(y.dim() == 3 && y.size(1) > 0, "y: expected [G, M, D] with M > 0, got ", y.sizes());
    check_like("y", y, x, std::array{G, y.size(1), D});
    return;
  }
  check_like("mean", y, x, std::array{G, D});
  check_like("log_std", *log_std, x, std::array{G, D});
  TORCH_CHECK_VALUE(draws >= 1, "draws: expected a count >= 1, got ", draws);
  TORCH_CHECK_VALUE(D % 4 == 0, "x: expected D divisible by 4 with drawn targets, got ", D);
  TORCH_CHECK_VALUE(seed->scalar_type() == at::kLong && seed->dim() == 1 && seed->size(0) == 1,
                    "seed: expected one int64, [1], got ", seed->sizes(), " of ", dtype_name(*seed));
  check_same_device("seed", *seed, x);
}

void check_number(const char* name, const Optional& value, const Tensor& x) {
  if (!value) return;
  const bool for_all = value->dim() == 1 && value->size(0) == 1;
  check_groups(name, for_all ? value->expand({x.size(0)}) : *value, x);
}

// [1] or [G] in float64; `kept` keeps it in memory.
PerImage<double> numbers(const Optional& value, Tensor& kept) {
  if (!value) return {};
  kept = value->to(at::kDouble);
  return {kept.const_data_ptr<double>(), kept.size(0) == 1 ? 0 : kept.stride(0)};
}

ScoreRows rows_of(const Tensor& value) {
  const bool one = value.dim() == 2;  // [G, D]
  return {const_cast<void*>(value.const_data_ptr()), value.scalar_type(), value.stride(0), one ? 0 : value.stride(1),
          value.stride(one ? 1 : 2)};
}

std::tuple<Tensor, Tensor> energy_score(const Tensor& x, const Tensor& y, const Optional& log_std, const Optional& seed,
                                        int64_t draws, const Optional& scale, const Optional& weight, double factor,
                                        double alpha, std::optional<double> pair_weight, std::string kernel,
                                        at::ArrayRef<double> bandwidths) {
  check_kernel(kernel, bandwidths, 1.0);
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0, "x: expected [G, N, D] with N, D > 0, got ",
                    x.sizes());
  check_kernel_dtype("x", x);
  check_targets(x, y, log_std, seed, draws);
  check_number("scale", scale, x);
  check_number("weight", weight, x);
  const int64_t G = x.size(0), N = x.size(1), M = log_std ? draws : y.size(1);
  TORCH_CHECK_VALUE(alpha >= 0 && alpha <= 1, "alpha: expected a number in [0, 1], got ", alpha);
  TORCH_CHECK_VALUE(pair_weight || alpha == 0 || N > 1, "alpha: expected 0 for a single member, N = 1, got ", alpha);
  const auto dtype = accumulate_dtype(x.scalar_type());
  const Tensor loss = fresh({G}, dtype), grad = at::empty_like(x);
  ask_for_large_pages(grad);
  if (G == 0) return {loss, grad};
  Tensor kept_scale, kept_weight;
  const auto n = static_cast<double>(N);
  const EnergyScoreArgs args{.wide = dtype == at::kDouble,
                             .N = N,
                             .M = M,
                             .D = x.size(2),
                             .x = rows_of(x),
                             .y = rows_of(y),
                             .log_std = log_std ? rows_of(*log_std) : ScoreRows{},
                             .seed = seed ? *seed->const_data_ptr<int64_t>() : 0,
                             .kernel = kernel_args(kernel, bandwidths, 0.0),
                             .scale = numbers(scale, kept_scale),
                             .weight = numbers(weight, kept_weight),
                             .factor = factor,
                             .pair = pair_weight ? *pair_weight
                                     : N > 1     ? (n - 1 + alpha) / (n * n * (n - 1))
                                                 : 0.0,
                             .loss = loss.mutable_data_ptr(),
                             .grad = rows_of(grad)};
  for (int64_t g = 0; args.scale.ptr && g < kept_scale.numel(); ++g) {
    TORCH_CHECK_VALUE(args.scale.ptr[g * args.scale.stride] >= 0, "scale: expected numbers >= 0, got ",
                      args.scale.ptr[g * args.scale.stride], " for group ", g);
  }
  const bool lines = args.D == 1 && kernel == "energy" && !log_std && N <= kScoreLineMembers;
  const auto& functions = IMM_CHOOSE(energy_score_functions);
  const auto loop = lines ? functions.lines : functions.groups;
  const int64_t space = lines ? line_space(args) : score_space(args);
  constexpr double kWorkWorthAThread = 1 << 18;       // as of the MMD
  const int64_t unit = lines ? kScoreLineGroups : 1;  // of groups
  const double work = n * static_cast<double>((lines ? 1 : 2) * M + N) * static_cast<double>(args.D * unit);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kWorkWorthAThread / work));
  // Groups do not depend on each other, so results are bitwise identical for any number of threads.
  at::parallel_for(0, at::divup(G, unit), grain, [&](int64_t begin, int64_t end) {
    const Tensor own = at::empty({space}, dtype);
    loop(args, own.mutable_data_ptr(), begin * unit, std::min(end * unit, G));
  });
  return {loss, grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) { m.impl("energy_score", energy_score); }

}  // namespace imm

// Checks, allocation and threads of imm::timestep_embedding on the CPU; the loops are in cpu/timestep_embedding.cpp.
#include "timestep_embedding.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "checks.h"

namespace imm {
namespace {

using at::Tensor;

Tensor frequencies_of(int64_t half, double max_period) {
  const Tensor result = at::empty({half}, at::kDouble);
  double* data = result.mutable_data_ptr<double>();
  const double step = -std::log(max_period) / static_cast<double>(half);
  for (int64_t i = 0; i < half; ++i) data[i] = std::exp(step * static_cast<double>(i));
  return result;
}

TimestepTimes times_of(const Tensor& value) { return {value.scalar_type(), value.const_data_ptr(), value.stride(0)}; }

// Rows do not depend on each other, so any split over threads gives bitwise identical results.
template <typename Args>
void run(void (*loop)(const Args&, double*, int64_t, int64_t), const Args& args) {
  at::parallel_for(0, 2 * args.images, std::max<int64_t>(1, 1024 / args.half), [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({kTimestepRows, args.half}, at::kDouble);
    loop(args, scratch.mutable_data_ptr<double>(), begin, end);
  });
}

// The embedding; with its tangent where one is given.
struct Embedding {
  const Tensor &t, &s, &out;
};

void run_forward(const Embedding& of, double max_period, const Embedding* tangents = nullptr) {
  if (of.out.numel() == 0) return;
  const int64_t half = of.out.size(2) / 2;
  const Tensor frequencies = frequencies_of(half, max_period);
  TimestepArgs args{.dtype = of.out.scalar_type(),
                    .images = of.t.size(0),
                    .half = half,
                    .times = {times_of(of.t), times_of(of.s)},
                    .frequencies = frequencies.const_data_ptr<double>(),
                    .out = of.out.mutable_data_ptr()};
  if (tangents) {
    args.tangents[0] = times_of(tangents->t);
    args.tangents[1] = times_of(tangents->s);
    args.tangent = tangents->out.mutable_data_ptr();
  }
  run(IMM_CHOOSE(timestep_functions).forward, args);
}

Tensor timestep_embedding(const Tensor& t, const Tensor& s, int64_t dim, double max_period, at::ScalarType dtype) {
  check_timestep_embedding(t, s, dim, max_period, dtype);
  const Tensor out = at::empty({2, t.size(0), dim}, dtype);
  run_forward({t, s, out}, max_period);
  return out;
}

std::tuple<Tensor, Tensor> timestep_embedding_jvp(const Tensor& t, const Tensor& s, int64_t dim, double max_period,
                                                  at::ScalarType dtype, const Tensor& dt, const Tensor& ds) {
  check_timestep_embedding(t, s, dim, max_period, dtype);
  check_tangents({{"dt", dt, t}, {"ds", ds, s}});
  const Tensor out = at::empty({2, t.size(0), dim}, dtype), tangent = at::empty_like(out);
  const Embedding tangents{dt, ds, tangent};
  run_forward({t, s, out}, max_period, &tangents);
  return {out, tangent};
}

std::tuple<Tensor, Tensor> timestep_embedding_bwd(const Tensor& grad, const Tensor& t, const Tensor& s,
                                                  double max_period) {
  check_timestep_embedding_bwd(grad, t, s, max_period);
  const Tensor grad_t = at::empty(t.sizes(), t.scalar_type()), grad_s = at::empty(s.sizes(), s.scalar_type());
  if (grad.numel() == 0) return {grad_t, grad_s};
  const Tensor up = grad.contiguous(), frequencies = frequencies_of(grad.size(2) / 2, max_period);
  const TimestepBwdArgs args{.dtype = grad.scalar_type(),
                             .images = t.size(0),
                             .half = grad.size(2) / 2,
                             .times = {times_of(t), times_of(s)},
                             .frequencies = frequencies.const_data_ptr<double>(),
                             .grad = up.const_data_ptr(),
                             .grad_time = {grad_t.mutable_data_ptr(), grad_s.mutable_data_ptr()}};
  run(IMM_CHOOSE(timestep_functions).backward, args);
  return {grad_t, grad_s};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) {
  m.impl("timestep_embedding", timestep_embedding);
  m.impl("timestep_embedding_jvp", timestep_embedding_jvp);
  m.impl("timestep_embedding_bwd", timestep_embedding_bwd);
}

}  // namespace imm

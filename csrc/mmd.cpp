// Checks, allocation and threads of the MMD ops on the CPU; the loops are in cpu/mmd.cpp.
#include "mmd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace imm {
namespace {

using at::Tensor;

MmdKernel kernel_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "laplace" || name == "rbf", "kernel: expected one of ['laplace', 'rbf'], got '", name, "'");
  return name == "laplace" ? MmdKernel::kLaplace : MmdKernel::kRbf;
}

void check_groups(const char* name, const Tensor& value, const Tensor& x) {
  TORCH_CHECK_VALUE(value.dim() == 1 && value.size(0) == x.size(0), name, ": expected one number per group, [",
                    x.size(0), "], got ", value.sizes());
  TORCH_CHECK_TYPE(value.is_floating_point(), name, ": expected a floating dtype, got ", dtype_name(value));
  TORCH_CHECK_VALUE(value.device() == x.device(), name, ": expected the particles' device ", x.device(), ", got ",
                    value.device());
}

void check_particles(const char* x_name, const char* y_name, const Tensor& x, const Tensor& y, const Tensor& scale,
                     const std::string& kernel, double eps) {
  kernel_of(kernel);
  TORCH_CHECK_VALUE(eps > 0, "eps: expected a positive floor on the norm, got ", eps);
  for (const auto& [name, value] : {std::pair(x_name, x), std::pair(y_name, y)}) {
    TORCH_CHECK_VALUE(value.dim() == 3 && value.size(1) > 0 && value.size(2) > 0, name,
                      ": expected [G, M, D] with M, D > 0, got ", value.sizes());
    check_kernel_dtype(name, value);
  }
  TORCH_CHECK_VALUE(x.size(0) == y.size(0) && x.size(2) == y.size(2), x_name, " and ", y_name,
                    ": expected the same G and D, got ", x.sizes(), " and ", y.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == y.scalar_type() && x.device() == y.device(), x_name, " and ", y_name,
                   ": expected one dtype and device, got ", dtype_name(x), " on ", x.device(), " and ", dtype_name(y),
                   " on ", y.device());
  check_groups("scale", scale, x);
}

void check_loss(const Tensor& y_t, const Tensor& y_r, const Tensor& scale, const std::optional<Tensor>& weight,
                const std::string& kernel, double eps) {
  check_particles("y_t", "y_r", y_t, y_r, scale, kernel, eps);
  TORCH_CHECK_VALUE(y_t.sizes() == y_r.sizes(), "y_t and y_r: expected the same shape, got ", y_t.sizes(), " and ",
                    y_r.sizes());
  if (weight) check_groups("weight", *weight, y_t);
}

// One float64 per group, contiguous.
Tensor group_numbers(const Tensor& value) { return value.to(at::kDouble).contiguous(); }

void check_scale(const Tensor& numbers) {
  const double* scale = numbers.const_data_ptr<double>();
  for (int64_t g = 0; g < numbers.numel(); ++g) {
    TORCH_CHECK_VALUE(scale[g] >= 0, "scale: expected numbers >= 0, got ", scale[g], " for group ", g);
  }
}

// The tensor itself where features are contiguous within a row, else a contiguous copy.
Tensor with_contiguous_rows(const Tensor& x) { return x.size(2) == 1 || x.stride(2) == 1 ? x : x.contiguous(); }

Particles particles_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

// The work space of every thread that may run, allocated where running out of memory is an ordinary error.
class Workspace {
 public:
  Workspace(c10::ScalarType dtype, int64_t matrices, int64_t Mx, int64_t My, int64_t D) {
    const int64_t threads = at::get_num_threads();
    const bool widened = dtype == at::kBFloat16 || dtype == at::kHalf;
    dist2_ = at::empty({threads, matrices, Mx, My}, at::kDouble);
    coefficient_ = at::empty({threads, 2, Mx, My}, accumulate_dtype(dtype));
    pointers_ = at::empty({threads, Mx + My}, at::kLong);
    rows_ = at::empty({threads, widened ? Mx + My : 0, D}, at::kFloat);
    grad_ = at::empty({threads, widened ? std::max(Mx, My) : 0, kMmdBlock}, at::kFloat);
  }

  MmdWork of_this_thread() const {
    const int64_t thread = at::get_thread_num();
    const auto mine = [thread](const Tensor& all) {
      return static_cast<char*>(all.mutable_data_ptr()) + thread * all.stride(0) * all.element_size();
    };
    return {reinterpret_cast<double*>(mine(dist2_)), mine(coefficient_),
            reinterpret_cast<const void**>(mine(pointers_)), reinterpret_cast<float*>(mine(rows_)),
            reinterpret_cast<float*>(mine(grad_))};
  }

 private:
  Tensor dist2_, coefficient_, pointers_, rows_, grad_;
};

// Runs loop(groups) over threads. Groups do not depend on each other, so any split gives the same bits.
template <typename Args>
void run_groups(void (*loop)(const Args&, const MmdWork&, int64_t, int64_t), const Args& args,
                const Workspace& workspace, int64_t G, double work_per_group) {
  constexpr double kWorkWorthAThread =
      1 << 18;  // differences; about 20 microseconds, a few times what waking a thread costs
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kWorkWorthAThread / work_per_group));
  at::parallel_for(0, G, grain,
                   [&](int64_t begin, int64_t end) { loop(args, workspace.of_this_thread(), begin, end); });
}

// loss and grad are written where they are defined; weight is per group and float64.
void run_loss(const Tensor& y_t, const Tensor& y_r, const Tensor& scale, const Tensor& weight,
              const std::string& kernel, double eps, const Tensor& loss, const Tensor& grad) {
  const int64_t G = y_t.size(0), M = y_t.size(1), D = y_t.size(2);
  if (G == 0) return;
  const Tensor t = with_contiguous_rows(y_t), r = with_contiguous_rows(y_r);
  const Workspace workspace(t.scalar_type(), 3, M, M, D);
  const MmdLossArgs args{.dtype = t.scalar_type(),
                         .kernel = kernel_of(kernel),
                         .eps = eps,
                         .M = M,
                         .D = D,
                         .y_t = particles_of(t),
                         .y_r = particles_of(r),
                         .scale = scale.const_data_ptr<double>(),
                         .weight = weight.const_data_ptr<double>(),
                         .loss = loss.defined() ? loss.mutable_data_ptr() : nullptr,
                         .grad = grad.defined() ? grad.mutable_data_ptr() : nullptr};
  run_groups(IMM_CHOOSE(mmd_functions).loss, args, workspace, G, 4.0 * static_cast<double>(M) * M * D);
}

Tensor weight_or_ones(const std::optional<Tensor>& weight, const Tensor& x) {
  return weight ? group_numbers(*weight) : at::ones({x.size(0)}, at::kDouble);
}

Tensor empty_loss(const Tensor& y_t) { return at::empty({y_t.size(0)}, accumulate_dtype(y_t.scalar_type())); }

Tensor empty_like_particles(const Tensor& x) { return at::empty(x.sizes(), x.scalar_type()); }

Tensor mmd_loss(const Tensor& y_t, const Tensor& y_r, const Tensor& scale, const std::optional<Tensor>& weight,
                std::string kernel, double eps) {
  check_loss(y_t, y_r, scale, weight, kernel, eps);
  const Tensor numbers = group_numbers(scale);
  check_scale(numbers);
  const Tensor loss = empty_loss(y_t);
  run_loss(y_t, y_r, numbers, weight_or_ones(weight, y_t), kernel, eps, loss, Tensor());
  return loss;
}

Tensor mmd_loss_bwd(const Tensor& grad, const Tensor& y_t, const Tensor& y_r, const Tensor& scale,
                    const std::optional<Tensor>& weight, std::string kernel, double eps) {
  check_loss(y_t, y_r, scale, weight, kernel, eps);
  check_groups("grad", grad, y_t);
  Tensor upstream = group_numbers(grad);
  if (weight) upstream = at::mul(upstream, group_numbers(*weight));
  const Tensor grad_y = empty_like_particles(y_t);
  run_loss(y_t, y_r, group_numbers(scale), upstream, kernel, eps, Tensor(), grad_y);
  return grad_y;
}

std::tuple<Tensor, Tensor> mmd_loss_grad(const Tensor& y_t, const Tensor& y_r, const Tensor& scale,
                                         const std::optional<Tensor>& weight, std::string kernel, double eps) {
  check_loss(y_t, y_r, scale, weight, kernel, eps);
  const Tensor numbers = group_numbers(scale);
  check_scale(numbers);
  const Tensor loss = empty_loss(y_t), grad = empty_like_particles(y_t);
  run_loss(y_t, y_r, numbers, weight_or_ones(weight, y_t), kernel, eps, loss, grad);
  return {loss, grad};
}

void mmd_loss_grad_out(const Tensor& y_t, const Tensor& y_r, const Tensor& scale, const std::optional<Tensor>& weight,
                       std::string kernel, double eps, const Tensor& loss, const Tensor& grad) {
  check_loss(y_t, y_r, scale, weight, kernel, eps);
  check_out("loss", loss, y_t.sizes().slice(0, 1), accumulate_dtype(y_t.scalar_type()), y_t);
  check_out("grad", grad, y_t.sizes(), y_t.scalar_type(), y_t);
  refuse_gradients("mmd_loss_grad", {y_t, y_r, scale, weight.value_or(Tensor()), loss, grad});
  const Tensor numbers = group_numbers(scale);
  check_scale(numbers);
  // A gradient row is written while other rows are still read, so memory shared with an input takes a detour.
  const bool direct = grad.is_contiguous() && loss.is_contiguous() && apart(grad, y_t) && apart(grad, y_r) &&
                      apart(loss, y_t) && apart(loss, y_r) && apart(loss, grad) && apart(loss, scale) &&
                      apart(grad, scale) && (!weight || (apart(loss, *weight) && apart(grad, *weight)));
  const Tensor loss_target = direct ? loss : empty_loss(y_t);
  const Tensor grad_target = direct ? grad : empty_like_particles(y_t);
  run_loss(y_t, y_r, numbers, weight_or_ones(weight, y_t), kernel, eps, loss_target, grad_target);
  if (!direct) {
    loss.copy_(loss_target);
    grad.copy_(grad_target);
  }
}

MmdGramArgs gram_args(const Tensor& x, const Tensor& y, const Tensor& scale, const std::string& kernel, double eps) {
  return {.dtype = x.scalar_type(),
          .kernel = kernel_of(kernel),
          .eps = eps,
          .Mx = x.size(1),
          .My = y.size(1),
          .D = x.size(2),
          .x = particles_of(x),
          .y = particles_of(y),
          .scale = scale.const_data_ptr<double>(),
          .grad = nullptr,
          .gram = nullptr,
          .grad_x = nullptr,
          .grad_y = nullptr};
}

void run_gram(const MmdGramArgs& args, int64_t G) {
  const Workspace workspace(args.dtype, 1, args.Mx, args.My, args.D);
  const double pairs = static_cast<double>(args.Mx) * static_cast<double>(args.My);
  run_groups(IMM_CHOOSE(mmd_functions).gram, args, workspace, G, (args.grad ? 3.0 : 1.0) * pairs * args.D);
}

Tensor mmd_gram(const Tensor& x, const Tensor& y, const Tensor& scale, std::string kernel, double eps) {
  check_particles("x", "y", x, y, scale, kernel, eps);
  const Tensor numbers = group_numbers(scale);
  check_scale(numbers);
  const int64_t G = x.size(0);
  const Tensor gram = at::empty({G, x.size(1), y.size(1)}, accumulate_dtype(x.scalar_type()));
  const Tensor xs = with_contiguous_rows(x), ys = with_contiguous_rows(y);
  if (G == 0) return gram;
  MmdGramArgs args = gram_args(xs, ys, numbers, kernel, eps);
  args.gram = gram.mutable_data_ptr();
  run_gram(args, G);
  return gram;
}

std::tuple<Tensor, Tensor> mmd_gram_bwd(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& scale,
                                        std::string kernel, double eps) {
  check_particles("x", "y", x, y, scale, kernel, eps);
  const int64_t G = x.size(0);
  const std::array<int64_t, 3> expected{G, x.size(1), y.size(1)};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(expected), "grad: expected ", at::IntArrayRef(expected), ", got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.is_floating_point(), "grad: expected a floating dtype, got ", dtype_name(grad));
  check_same_device("grad", grad, x);
  const Tensor grad_x = empty_like_particles(x), grad_y = empty_like_particles(y);
  if (G == 0) return {grad_x, grad_y};
  const Tensor numbers = group_numbers(scale), xs = with_contiguous_rows(x), ys = with_contiguous_rows(y);
  const Tensor upstream = grad.to(at::kDouble).contiguous();
  MmdGramArgs args = gram_args(xs, ys, numbers, kernel, eps);
  args.grad = upstream.const_data_ptr<double>();
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_y = grad_y.mutable_data_ptr();
  run_gram(args, G);
  return {grad_x, grad_y};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) {
  m.impl("mmd_loss", mmd_loss);
  m.impl("mmd_loss_bwd", mmd_loss_bwd);
  m.impl("mmd_loss_grad", mmd_loss_grad);
  m.impl("mmd_loss_grad.out", mmd_loss_grad_out);
  m.impl("mmd_gram", mmd_gram);
  m.impl("mmd_gram_bwd", mmd_gram_bwd);
}

}  // namespace imm

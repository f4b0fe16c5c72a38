// Checks, allocation and threads of the MMD ops on the CPU; the loops are in cpu/mmd.cpp.
#include "mmd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "fresh.h"
#include "mmd_loss.h"

namespace imm {
namespace {

using at::Tensor;

constexpr const char* kKernels[] = {"laplace", "rbf", "imq", "energy"};  // in the order of MmdKernel

void check_particles(const char* x_name, const char* y_name, const Tensor& x, const Tensor& y, const Tensor& scale,
                     const char* scale_name = "scale") {
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
  check_groups(scale_name, scale, x);
}

void check_sets(const char* t_name, const char* r_name, const Tensor& y_t, const Tensor& y_r, const Optional& weight,
                bool unbiased) {
  TORCH_CHECK_VALUE(y_t.sizes() == y_r.sizes(), t_name, " and ", r_name, ": expected the same shape, got ", y_t.sizes(),
                    " and ", y_r.sizes());
  TORCH_CHECK_VALUE(!unbiased || y_t.size(1) >= 2, "unbiased: expected M >= 2 particles, got ", y_t.size(1));
  if (weight) check_groups("weight", *weight, y_t);
}

// One float64 per group, contiguous; `value` has one number for each or one for all.
Tensor group_numbers(const Optional& value, int64_t G) {
  return value ? value->to(at::kDouble).expand({G}).contiguous() : at::ones({G}, at::kDouble);
}

// The scale as group_numbers.
Tensor checked_scale(const Tensor& scale) {
  const Tensor numbers = group_numbers(scale, scale.size(0));
  const double* values = numbers.const_data_ptr<double>();
  for (int64_t g = 0; g < numbers.numel(); ++g) {
    TORCH_CHECK_VALUE(values[g] >= 0, "scale: expected numbers >= 0, got ", values[g], " for group ", g);
  }
  return numbers;
}

// A branch as the loops read it, and what keeps that in memory.
class Operand {
 public:
  explicit Operand(const Branch& branch) : x_(with_contiguous_rows(branch.x)) {
    if (!branch.g.defined()) return;
    g_ = with_contiguous_rows(branch.g);
    c_skip_ = branch.c_skip.contiguous();
    c_out_ = branch.c_out.contiguous();
  }

  MmdParticles particles() const {
    MmdParticles result{.M = x_.size(1), .x = rows(x_), .g = {}, .c_skip = nullptr, .c_out = nullptr};
    if (g_.defined()) {
      result.g = rows(g_);
      result.c_skip = c_skip_.const_data_ptr<double>();
      result.c_out = c_out_.const_data_ptr<double>();
    }
    return result;
  }

 private:
  // The tensor itself where features are contiguous within a row, else a contiguous copy.
  static Tensor with_contiguous_rows(const Tensor& x) {
    return x.size(2) == 1 || x.stride(2) == 1 ? x : x.contiguous();
  }

  static MmdRows rows(const Tensor& x) { return {x.const_data_ptr(), x.scalar_type(), x.stride(0), x.stride(1)}; }

  Tensor x_, g_, c_skip_, c_out_;
};

MmdPlan plan_of(const MmdParticles& x, const MmdParticles& y, int64_t G, int64_t D) {
  // Measured with AVX-512 at D = 4096 and 16384: 128 features are as good for 16 rows and 512 for 128, no other is
  // for 32.
  constexpr int64_t kFeatures = 256;
  // Of the second cache of a few cores. Measured at M = 4 and 50 MB of gradient, on a processor with 32 MB of third
  // cache: 15 to 25 % of loss and gradient.
  constexpr int64_t kCacheBytes = 8 << 20;
  constexpr int64_t kOneTile = 8, kFewRows = 16, kSomeRows = 32;
  const auto dtype = accumulate_dtype(x.x.dtype);
  const auto line = 64 / static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t rows = x.M + y.M;
  const bool packed = x.x.dtype != dtype || x.g.data;
  return {.packed = packed,
          .stride = (at::divup(D, line) | 1) * line,  // an odd number of lines: rows begin in different sets of a cache
          .products = rows > kFewRows,
          .gather = rows > kSomeRows && !packed,
          .stream = G * x.M * D * static_cast<int64_t>(c10::elementSize(dtype)) > kCacheBytes,
          .features = rows > kOneTile ? std::min(D, kFeatures) : D};
}

// The work space of every thread that may run, allocated where running out of memory is an ordinary error.
class Workspace {
 public:
  Workspace(const MmdPlan& plan, c10::ScalarType dtype, int64_t rows, at::IntArrayRef values, at::IntArrayRef slopes,
            int64_t coefficients, int64_t grad_rows) {
    const int64_t threads = at::get_num_threads(), block = std::min(rows, kMmdBlockRows);
    values_ = at::empty({threads, values[0], values[1]}, at::kDouble);
    slopes_ = at::empty({threads, slopes[0], slopes[1] + 1}, at::kDouble);
    coefficient_ = at::empty({threads, coefficients, slopes[0], slopes[1] + 1}, dtype);
    rows_ = at::empty({threads, rows}, at::kLong);
    next_rows_ = at::empty({threads, rows}, at::kLong);
    partial_ = at::empty({threads, block + 4, block, 64}, at::kByte);
    if (plan.gather) {
      gathered_rows_ = at::empty({threads, rows}, at::kLong);
      gathered_ = at::empty({threads, rows, kMmdGatherBytes}, at::kByte);
    }
    if (plan.packed) {
      packed_ = at::empty({threads, rows, plan.stride}, dtype);
      grad_ = at::empty({threads, grad_rows, kMmdGradFeatures}, dtype);
    }
  }

  MmdWork of_this_thread() const {
    const int64_t thread = at::get_thread_num();
    const auto mine = [thread](const Tensor& all) {
      if (!all.defined()) return static_cast<char*>(nullptr);
      return static_cast<char*>(all.mutable_data_ptr()) + thread * all.stride(0) * all.element_size();
    };
    return {reinterpret_cast<double*>(mine(values_)),
            reinterpret_cast<double*>(mine(slopes_)),
            mine(coefficient_),
            reinterpret_cast<const void**>(mine(rows_)),
            reinterpret_cast<const void**>(mine(next_rows_)),
            reinterpret_cast<const void**>(mine(gathered_rows_)),
            mine(partial_),
            mine(packed_),
            mine(gathered_),
            mine(grad_)};
  }

 private:
  Tensor values_, slopes_, coefficient_, rows_, next_rows_, gathered_rows_, partial_, packed_, gathered_, grad_;
};

// Runs loop(groups) over threads. Groups do not depend on each other, so any split gives bitwise identical results.
template <typename Args>
void run_groups(void (*loop)(const Args&, const MmdWork&, int64_t, int64_t), const Args& args,
                const Workspace& workspace, int64_t G, double work_per_group) {
  constexpr double kWorkWorthAThread =
      1 << 18;  // differences; about 20 microseconds, a few times what waking a thread costs
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kWorkWorthAThread / work_per_group));
  at::parallel_for(0, G, grain,
                   [&](int64_t begin, int64_t end) { loop(args, workspace.of_this_thread(), begin, end); });
}

// Where to write what; what is not asked for is undefined.
struct LossResults {
  Tensor loss{}, slopes{}, grad{};
};

// arguments.scale is checked_scale; it and the kernel are not read where slopes are saved.
void run_loss(const Branch& y_t, const Branch& y_r, const LossArguments& arguments, const Tensor& saved_slopes,
              const LossResults& results) {
  const int64_t G = y_t.x.size(0), M = y_t.x.size(1), D = y_t.x.size(2);
  if (G == 0) return;
  const auto dtype = accumulate_dtype(y_t.x.scalar_type());
  const Operand t(y_t), r(y_r);
  const Tensor weight = group_numbers(arguments.weight, G);
  Tensor grad_weight = weight;
  if (arguments.upstream) grad_weight = at::mul(grad_weight, group_numbers(arguments.upstream, G));
  if (y_t.g.defined()) grad_weight = at::mul(grad_weight, y_t.c_out);
  const Tensor saved = saved_slopes.defined() ? saved_slopes.contiguous() : Tensor();
  const auto memory = [](const Tensor& result) { return result.defined() ? result.mutable_data_ptr() : nullptr; };
  const MmdParticles first = t.particles(), second = r.particles();
  const MmdLossArgs args{.wide = dtype == at::kDouble,
                         .kernel = kernel_args(arguments.kernel, arguments.bandwidths, arguments.eps),
                         .unbiased = arguments.unbiased,
                         .D = D,
                         .y_t = first,
                         .y_r = second,
                         .plan = plan_of(first, second, G, D),
                         .scale = saved.defined() ? nullptr : arguments.scale.const_data_ptr<double>(),
                         .weight = weight.const_data_ptr<double>(),
                         .grad_weight = grad_weight.const_data_ptr<double>(),
                         .saved_slopes = saved.defined() ? saved.const_data_ptr() : nullptr,
                         .loss = memory(results.loss),
                         .slopes = memory(results.slopes),
                         .grad = memory(results.grad),
                         .grad_dtype = (y_t.g.defined() ? y_t.g : y_t.x).scalar_type()};
  const Workspace workspace(args.plan, dtype, 2 * M, {2 * M, 2 * M}, {M, 2 * M}, 1, M);
  run_groups(IMM_CHOOSE(mmd_functions).loss, args, workspace, G, 4.0 * static_cast<double>(M) * M * D);
}

Tensor empty_loss(const Tensor& y_t) { return at::empty({y_t.size(0)}, accumulate_dtype(y_t.scalar_type())); }

Tensor empty_like_particles(const Tensor& x) { return fresh(x.sizes(), x.scalar_type()); }

std::tuple<Tensor, Tensor> mmd_loss(const Tensor& y_t, const Tensor& y_r, const Tensor& scale, const Optional& weight,
                                    std::string kernel, at::ArrayRef<double> bandwidths, double eps, bool unbiased) {
  LossArguments arguments{scale, weight, std::nullopt, kernel, bandwidths, eps, unbiased};
  check_loss("y_t", "y_r", y_t, y_r, arguments);
  arguments.scale = checked_scale(scale);
  const Tensor loss = empty_loss(y_t), slopes = at::empty({y_t.size(0), y_t.size(1), 2 * y_t.size(1)}, loss.options());
  run_loss({.x = y_t}, {.x = y_r}, arguments, Tensor(), {.loss = loss, .slopes = slopes});
  return {loss, slopes};
}

Tensor mmd_loss_bwd(const Tensor& grad, const Tensor& slopes, const Tensor& y_t, const Tensor& y_r,
                    const Optional& weight, bool unbiased) {
  check_particles("y_t", "y_r", y_t, y_r, grad, "grad");
  check_sets("y_t", "y_r", y_t, y_r, weight, unbiased);
  const std::array<int64_t, 3> expected{y_t.size(0), y_t.size(1), 2 * y_t.size(1)};
  const auto dtype = accumulate_dtype(y_t.scalar_type());
  TORCH_CHECK_VALUE(
      slopes.sizes() == at::IntArrayRef(expected) && slopes.scalar_type() == dtype && slopes.device() == y_t.device(),
      "slopes: expected ", at::IntArrayRef(expected), " of torch.", c10::getDtypeNames(dtype).first, " on ",
      y_t.device(), ", got ", slopes.sizes(), " of ", dtype_name(slopes), " on ", slopes.device());
  const Tensor grad_y = empty_like_particles(y_t);
  const LossArguments arguments{Tensor(), weight, grad, kKernels[0], {}, 1.0, unbiased};
  run_loss({.x = y_t}, {.x = y_r}, arguments, slopes, {.grad = grad_y});
  return grad_y;
}

// Results are undefined where they are not asked for; grad [G, Mx, My] is that of the matrices.
struct GramRun {
  Tensor grad{}, gram{}, grad_x{}, grad_y{};
};

void run_gram(const Tensor& x, const Tensor& y, const Tensor& scale, const MmdKernelArgs& kernel, const GramRun& run) {
  const int64_t G = x.size(0), Mx = x.size(1), My = y.size(1), D = x.size(2);
  if (G == 0) return;
  const auto dtype = accumulate_dtype(x.scalar_type());
  const Operand first({.x = x}), second({.x = y});
  const Tensor grad = run.grad.defined() ? run.grad.to(at::kDouble).contiguous() : Tensor();
  const auto memory = [](const Tensor& result) { return result.defined() ? result.mutable_data_ptr() : nullptr; };
  const MmdParticles xs = first.particles(), ys = second.particles();
  const MmdGramArgs args{.wide = dtype == at::kDouble,
                         .kernel = kernel,
                         .D = D,
                         .x = xs,
                         .y = ys,
                         .plan = plan_of(xs, ys, G, D),
                         .scale = scale.const_data_ptr<double>(),
                         .grad = grad.defined() ? grad.const_data_ptr<double>() : nullptr,
                         .gram = memory(run.gram),
                         .grad_x = memory(run.grad_x),
                         .grad_y = memory(run.grad_y)};
  const Workspace workspace(args.plan, dtype, Mx + My, {Mx, My}, {Mx, My}, 2, std::max(Mx, My));
  const double pairs = static_cast<double>(Mx) * static_cast<double>(My);
  run_groups(IMM_CHOOSE(mmd_functions).gram, args, workspace, G, (args.grad ? 3.0 : 1.0) * pairs * D);
}

Tensor mmd_gram(const Tensor& x, const Tensor& y, const Tensor& scale, std::string kernel,
                at::ArrayRef<double> bandwidths, double eps) {
  check_kernel(kernel, bandwidths, eps);
  check_particles("x", "y", x, y, scale);
  const Tensor numbers = checked_scale(scale);
  const Tensor gram = fresh({x.size(0), x.size(1), y.size(1)}, accumulate_dtype(x.scalar_type()));
  run_gram(x, y, numbers, kernel_args(kernel, bandwidths, eps), {.gram = gram});
  return gram;
}

std::tuple<Tensor, Tensor> mmd_gram_bwd(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& scale,
                                        std::string kernel, at::ArrayRef<double> bandwidths, double eps) {
  check_kernel(kernel, bandwidths, eps);
  check_particles("x", "y", x, y, scale);
  const std::array<int64_t, 3> expected{x.size(0), x.size(1), y.size(1)};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(expected), "grad: expected ", at::IntArrayRef(expected), ", got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.is_floating_point(), "grad: expected a floating dtype, got ", dtype_name(grad));
  check_same_device("grad", grad, x);
  const Tensor grad_x = empty_like_particles(x), grad_y = empty_like_particles(y);
  run_gram(x, y, group_numbers(scale, x.size(0)), kernel_args(kernel, bandwidths, eps),
           {.grad = grad, .grad_x = grad_x, .grad_y = grad_y});
  return {grad_x, grad_y};
}

}  // namespace

void check_kernel(const std::string& kernel, at::ArrayRef<double> bandwidths, double eps) {
  TORCH_CHECK_VALUE(std::find(std::begin(kKernels), std::end(kKernels), kernel) != std::end(kKernels),
                    "kernel: expected one of ['laplace', 'rbf', 'imq', 'energy'], got '", kernel, "'");
  TORCH_CHECK_VALUE(eps > 0, "eps: expected a positive floor on the norm, got ", eps);
  const auto fits = [](double factor) { return factor > 0 && std::isfinite(factor); };
  TORCH_CHECK_VALUE(!bandwidths.empty() && std::all_of(bandwidths.begin(), bandwidths.end(), fits),
                    "bandwidths: expected one or more positive factors, got ", bandwidths);
  TORCH_CHECK_VALUE(kernel != "energy" || bandwidths.size() == 1,
                    "bandwidths: expected one for the energy kernel, which is linear in it, got ", bandwidths);
}

MmdKernelArgs kernel_args(const std::string& kernel, at::ArrayRef<double> bandwidths, double eps) {
  const auto index = std::find(std::begin(kKernels), std::end(kKernels), kernel) - std::begin(kKernels);
  return {static_cast<MmdKernel>(index), bandwidths.data(), static_cast<int64_t>(bandwidths.size()), eps};
}

void check_groups(const char* name, const Tensor& value, const Tensor& x) {
  TORCH_CHECK_VALUE(value.dim() == 1 && value.size(0) == x.size(0), name, ": expected one number per group, [",
                    x.size(0), "], got ", value.sizes());
  TORCH_CHECK_TYPE(value.is_floating_point(), name, ": expected a floating dtype, got ", dtype_name(value));
  TORCH_CHECK_VALUE(value.device() == x.device(), name, ": expected the particles' device ", x.device(), ", got ",
                    value.device());
}

void check_loss(const char* t_name, const char* r_name, const Tensor& y_t, const Tensor& y_r,
                const LossArguments& arguments) {
  check_kernel(arguments.kernel, arguments.bandwidths, arguments.eps);
  check_particles(t_name, r_name, y_t, y_r, arguments.scale);
  check_sets(t_name, r_name, y_t, y_r, arguments.weight, arguments.unbiased);
  if (!arguments.upstream) return;
  const Tensor& upstream = *arguments.upstream;
  const bool for_all = upstream.dim() == 1 && upstream.size(0) == 1;
  check_groups("upstream", for_all ? upstream.expand({y_t.size(0)}) : upstream, y_t);
}

std::tuple<Tensor, Tensor> loss_and_gradient(const Branch& y_t, const Branch& y_r, LossArguments arguments) {
  arguments.scale = checked_scale(arguments.scale);
  const Tensor loss = empty_loss(y_t.x), grad = empty_like_particles(y_t.g.defined() ? y_t.g : y_t.x);
  run_loss(y_t, y_r, arguments, Tensor(), {.loss = loss, .grad = grad});
  return {loss, grad};
}

TORCH_LIBRARY_IMPL(imm, CPU, m) {
  m.impl("mmd_loss", mmd_loss);
  m.impl("mmd_loss_bwd", mmd_loss_bwd);
  m.impl("mmd_gram", mmd_gram);
  m.impl("mmd_gram_bwd", mmd_gram_bwd);
}

}  // namespace imm

// The loops of the MMD ops, compiled once per instruction set (see capability.h).
//
// A group is read twice: once for its distances, once for its gradient; in between its numbers stay in the cache, so
// memory sees one read of the particles and one write of the gradient. Work goes in tiles of pairs whose partial sums
// stay in registers. A pair adds its features in one order wherever its tile lies, so equal particles give equal bits
// and the three terms of the loss cancel exactly.
//
// Few particles (M <= 8) are subtracted from each other directly. Of more, a loss takes distances and gradient by
// products, which is half the arithmetic, and only the matched pairs (t_j, r_j), which are close, directly; a group
// with another close pair is done again without products.
#include "../mmd.h"

#include <algorithm>
#include <cmath>

#include "mmd_distances.h"
#include "mmd_gradient.h"

namespace imm {
namespace {

// Replaces n squared distances by k - 1 (as expm1: the ones of the three terms cancel exactly) or, for energy, k, and
// writes the slopes where there are any to write.
void evaluate(double* values, double* slopes, int64_t n, double kappa, const MmdKernelArgs& kernel) {
  using V = Vectorized<double>;
  const V floor(kernel.eps), zero(0.0), one(1.0), share(1.0 / static_cast<double>(kernel.bandwidth_count));
  for (int64_t i = 0; i < n; i += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), n - i);
    const V dist = V::loadu(values + i, count).sqrt();
    const V floored = at::vec::maximum(dist, floor);  // a NaN stays NaN
    V value_sum = zero, slope_sum = zero;
    for (int64_t b = 0; b < kernel.bandwidth_count; ++b) {
      const V rate(kernel.bandwidths[b] * kappa);
      V value, slope;
      switch (kernel.kind) {
        case MmdKernel::kLaplace:
          value = (rate.neg() * floored).expm1();
          slope = rate * (value + one) / floored;
          break;
        case MmdKernel::kRbf:
          value = (V(-0.5) * rate * (floored * floored)).expm1();
          slope = rate * (value + one);
          break;
        case MmdKernel::kImq: {
          const V u = rate * (floored * floored), denominator = one + u;
          value = u.neg() / denominator;
          slope = V(2.0) * rate / (denominator * denominator);
          break;
        }
        case MmdKernel::kEnergy:
          value = rate.neg() * floored;
          slope = rate / floored;
          break;
      }
      value_sum = value_sum + value;
      slope_sum = slope_sum + slope;
    }
    (share * value_sum).store(values + i, count);
    if (slopes) V::blendv(share * slope_sum, zero, dist <= floor).store(slopes + i, count);
  }
}

// Whether the slopes [M, 2 M] of a group are those of separated_distances: of these the matched pairs' are negative.
template <typename T>
bool marked(const T* slopes, int64_t M) {
  int64_t matched = 0, marks = 0;
  for (int64_t j = 0; j < M; ++j) {
    matched += std::signbit(slopes[j * 2 * M + M + j]);
    for (int64_t k = 0; k < 2 * M; ++k) marks += std::signbit(slopes[j * 2 * M + k]);
  }
  return matched == M && marks == M;
}

template <typename T>
void loss_groups(const MmdLossArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  const int64_t M = args.y_t.M, D = args.D, columns = 2 * M;
  const double pairs = static_cast<double>(args.unbiased ? M * (M - 1) : M * M);
  // Rows t_j, then r_j; columns t_k, then r_k.
  const Matrix<double> tt{work.values, columns}, tr{work.values + M, columns}, rr{tr.row(M), columns};
  for (int64_t g = begin; g < end; ++g) {
    const Group group{args.y_t, args.y_r, g};
    const T* saved = args.saved_slopes ? static_cast<const T*>(args.saved_slopes) + g * M * columns : nullptr;
    const T* const* rows = read_rows<T>(group, D, args.plan, work);
    const bool next = args.plan.stream && !args.plan.packed && !args.plan.products && g + 1 < end;
    const Ahead<T> ahead = ahead_of(rows, group, D, next, args.plan, work);
    bool separated = false;
    if (saved) {
      separated = marked(saved, M);
    } else {
      separated = args.plan.products && separated_distances(rows, ahead, M, D, args.plan, work, tt);
      if (!separated) {
        direct_distances(rows, ahead, columns, D, args.plan, work, tt);
        separated = !args.plan.products && apart(rows, M, D, tt, work.slopes);
      }
      const double kappa = args.scale[g] / static_cast<double>(D);
      const Matrix<double> slopes{args.grad || args.slopes ? work.slopes : nullptr, columns};
      pack_upper(tt, columns);  // fewer and fuller vectors than rows are
      evaluate(tt.data, slopes.data, columns * (columns + 1) / 2, kappa, args.kernel);
      unpack_upper(tt, columns);
      mirror(tt, M);
      mirror(rr, M);
      if (slopes.data) {
        unpack_upper(slopes, M);
        mirror(slopes, M);
      }
      if (args.unbiased) {
        for (const auto& square : {tt, tr, rr}) clear_diagonal(square, M);
        if (slopes.data) {
          clear_diagonal(slopes, M);
          clear_diagonal({work.slopes + M, columns}, M);
        }
      }
      const auto total = [M](const Matrix<double>& square) { return sum(square, M, M); };
      const double loss = (total(tt) + total(rr) - 2.0 * total(tr)) / pairs;
      if (args.loss) static_cast<T*>(args.loss)[g] = static_cast<T>(args.weight[g] * loss);
      if (args.slopes) {
        T* result = static_cast<T*>(args.slopes) + g * M * columns;
        cast(work.slopes, result, M * columns);
        for (int64_t j = 0; separated && j < M; ++j) result[j * columns + M + j] *= T(-1);
      }
    }
    if (!args.grad) continue;
    const double factor = args.grad_weight[g] * (2.0 / pairs);
    const Coefficients<T> coefficients{static_cast<T*>(work.coefficient), columns, separated};
    pack_coefficients<T>(M, coefficients, [&](int64_t j, int64_t k) {
      const int64_t i = j * columns + k;
      const double slope = saved ? std::abs(static_cast<double>(saved[i])) : work.slopes[i];
      return k < M ? -factor * slope : factor * slope;
    });
    void* grad = at_element(args.grad, args.grad_dtype, g * M * D);
    Steps steps;  // the first set of the next group is there already where distances were taken
    if (next) steps = {saved ? group.first.x.group_stride : 0, group.second.x.group_stride};
    write_gradient(rows, columns, {0, M, 0, coefficients, grad, args.grad_dtype, steps}, D, args.plan, work);
  }
}

template <typename T>
void gram_groups(const MmdGramArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  const int64_t Mx = args.x.M, My = args.y.M, D = args.D, pairs = Mx * My;
  T* memory = static_cast<T*>(work.coefficient);
  const Coefficients<T> c_x{memory, My, false}, c_y{memory + pairs, Mx, false};
  for (int64_t g = begin; g < end; ++g) {
    const Group group{args.x, args.y, g};
    const T* const* rows = read_rows<T>(group, D, args.plan, work);
    all_pairs<Sum::kSquares>(rows, Ahead<T>{rows, 0}, Mx + My, Mx, Mx, D, args.plan, work, {work.values, My});
    evaluate(work.values, args.grad ? work.slopes : nullptr, pairs, args.scale[g] / static_cast<double>(D),
             args.kernel);
    if (!args.grad) {
      const double one = args.kernel.kind == MmdKernel::kEnergy ? 0.0 : 1.0;
      T* gram = static_cast<T*>(args.gram) + g * pairs;
      for (int64_t i = 0; i < pairs; ++i) gram[i] = static_cast<T>(work.values[i] + one);
      continue;
    }
    const double* up = args.grad + g * pairs;
    const auto c = [&](int64_t j, int64_t k) { return -up[j * My + k] * work.slopes[j * My + k]; };
    pack_coefficients<T>(Mx, c_x, c);
    pack_coefficients<T>(My, c_y, [&](int64_t k, int64_t j) { return c(j, k); });
    const auto dtype = args.x.x.dtype;
    void* grad_x = at_element(args.grad_x, dtype, g * Mx * D);
    void* grad_y = at_element(args.grad_y, dtype, g * My * D);
    write_gradient(rows, Mx + My, {0, Mx, Mx, c_x, grad_x, dtype}, D, args.plan, work);
    write_gradient(rows, Mx + My, {Mx, My, 0, c_y, grad_y, dtype}, D, args.plan, work);
  }
}

void loss(const MmdLossArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  args.wide ? loss_groups<double>(args, work, begin, end) : loss_groups<float>(args, work, begin, end);
  fence_stores();
}

void gram(const MmdGramArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  args.wide ? gram_groups<double>(args, work, begin, end) : gram_groups<float>(args, work, begin, end);
  fence_stores();
}

}  // namespace

namespace CPU_CAPABILITY {
const MmdFunctions mmd_functions{loss, gram};
}

}  // namespace imm

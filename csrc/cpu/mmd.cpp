// The loops of the MMD ops, compiled once per instruction set (see capability.h).
//
// A group is read twice: once for its distances, once for its gradient; 2 M D numbers stay in L2 in between, so memory
// sees one read of y_t and y_r and one write of the gradient. Pairs are worked on in tiles of at most 4 x 4 rows whose
// partial sums stay in registers. Every pair adds its features in the same order, so equal particles give equal bits
// and the three terms of the loss cancel exactly.
#include "../mmd.h"

#include <type_traits>

#include "convert.h"

namespace imm {
namespace {

template <int kRows>
using Rows = std::integral_constant<int, kRows>;

// Calls f(Rows<R>, first row) for tiles of kLargest, ..., 2, 1 rows that cover [0, n).
template <int kLargest, typename F>
void for_tiles(int64_t n, const F& f, int64_t first = 0) {
  for (; first + kLargest <= n; first += kLargest) f(Rows<kLargest>{}, first);
  if constexpr (kLargest > 1) for_tiles<kLargest / 2>(n, f, first);
}

template <typename T>
struct Matrix {
  T* data;
  int64_t stride;  // between rows, in elements
  T* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
double sum_lanes(const Vectorized<T>& v) {
  T lane[Vectorized<T>::size()];
  v.store(lane);
  double sum = 0.0;
  for (const T value : lane) sum += static_cast<double>(value);
  return sum;
}

// How far ahead rows are fetched. The hardware's own prefetching starts anew at every 4 KiB page, which a row of D =
// 4096 has four of; measured at M = 4 this is worth 10 % of loss and gradient, and 1 to 4 KiB a little less.
constexpr int64_t kPrefetchBytes = 512;

// dist2[j][k] = sum_d (x_jd - y_kd)^2 for a tile of pairs; where x and y are one set's same rows, only k >= j.
template <int R, int C, bool kSameRows, typename T>
void distance_tile(Matrix<const T> x, Matrix<const T> y, int64_t D, Matrix<double> dist2) {
  using V = Vectorized<T>;
  V acc[R][C];
  for (auto& row : acc) {
    for (V& sum : row) sum = V(T(0));
  }
  const auto step = [&](int64_t d, const auto& load) {
    V x_tile[R];
    for (int j = 0; j < R; ++j) x_tile[j] = load(x.row(j) + d);
    for (int k = 0; k < C; ++k) {
      __builtin_prefetch(reinterpret_cast<const char*>(y.row(k) + d) + kPrefetchBytes);
      const V y_row = load(y.row(k) + d);
      for (int j = 0; j < R; ++j) {
        if (kSameRows && k < j) continue;
        const V difference = x_tile[j] - y_row;
        acc[j][k] = at::vec::fmadd(difference, difference, acc[j][k]);
      }
    }
  };
  int64_t d = 0;
  for (; d + V::size() <= D; d += V::size()) step(d, [](const T* p) { return V::loadu(p); });
  if (d < D) step(d, [d, D](const T* p) { return V::loadu(p, D - d); });  // fills with zeros
  for (int j = 0; j < R; ++j) {
    for (int k = kSameRows ? j : 0; k < C; ++k) dist2.row(j)[k] = sum_lanes(acc[j][k]);
  }
}

// Squared distances of all pairs of two sets, [Mx, My].
template <typename T>
void distances(Matrix<const T> x, int64_t Mx, Matrix<const T> y, int64_t My, int64_t D, Matrix<double> dist2) {
  for_tiles<4>(Mx, [&](auto R, int64_t j) {
    for_tiles<4>(My, [&](auto C, int64_t k) {
      distance_tile<R(), C(), false, T>({x.row(j), x.stride}, {y.row(k), y.stride}, D,
                                        {dist2.row(j) + k, dist2.stride});
    });
  });
}

// Squared distances within a set, [M, M]: the upper triangle is computed and mirrored. The diagonal is computed too: it
// is 0 unless the particle is not finite.
template <typename T>
void self_distances(Matrix<const T> x, int64_t M, int64_t D, Matrix<double> dist2) {
  for_tiles<4>(M, [&](auto R, int64_t j) {
    for_tiles<4>(M, [&](auto C, int64_t k) {
      const Matrix<const T> rows{x.row(j), x.stride}, columns{x.row(k), x.stride};
      const Matrix<double> target{dist2.row(j) + k, dist2.stride};
      if (j == k) {
        distance_tile<R(), R(), true, T>(rows, rows, D, target);
      } else if (j < k) {
        distance_tile<R(), C(), false, T>(rows, columns, D, target);
      }
    });
  });
  for (int64_t j = 1; j < M; ++j) {
    for (int64_t k = 0; k < j; ++k) dist2.row(j)[k] = dist2.row(k)[j];
  }
}

enum class Replace { kNothing, kByKernel, kBySlope };

// Sum over n pairs of k - 1 (as expm1: the ones of the three terms cancel exactly), and, in place of the squared
// distances, k or the c of dk/dx = c (x - y).
double evaluate(double* dist2, int64_t n, double kappa, MmdKernel kernel, double eps, Replace replace) {
  using V = Vectorized<double>;
  const V minus_kappa(-kappa), floor(eps), one(1.0), zero(0.0);
  V sum = zero;
  for (int64_t i = 0; i < n; i += V::size()) {
    const int64_t count = n - i < V::size() ? n - i : V::size();
    const V dist = V::loadu(dist2 + i, count).sqrt();
    const V floored = at::vec::maximum(dist, floor);  // a NaN stays NaN
    const bool laplace = kernel == MmdKernel::kLaplace;
    const V exponent = laplace ? minus_kappa * floored : V(0.5) * minus_kappa * (floored * floored);
    const V minus_one = exponent.expm1();
    sum = sum + V::set(zero, minus_one, count);
    if (replace == Replace::kNothing) continue;
    V result = minus_one + one;
    if (replace == Replace::kBySlope) {
      result = minus_kappa * result;
      if (laplace) result = result / floored;
      result = V::blendv(result, zero, dist <= floor);
    }
    result.store(dist2 + i, count);
  }
  return sum_lanes(sum);
}

// grad_j (+)= sum_k c_jk (x_j - y_k) for a tile of rows and features [begin, end); y has a pointer per row, grad starts
// at feature begin.
template <int R, int C, typename T>
void gradient_tile(Matrix<const T> x, const T* const* y, Matrix<const T> coefficient, int64_t begin, int64_t end,
                   Matrix<T> grad, bool fresh) {
  using V = Vectorized<T>;
  T c[C][R];
  for (int k = 0; k < C; ++k) {
    for (int j = 0; j < R; ++j) c[k][j] = coefficient.row(j)[k];
  }
  const auto step = [&](int64_t d, const auto& load, const auto& store) {
    V x_tile[R], sum[R];
    for (int j = 0; j < R; ++j) {
      x_tile[j] = load(x.row(j) + d);
      sum[j] = fresh ? V(T(0)) : load(grad.row(j) + d - begin);
    }
    for (int k = 0; k < C; ++k) {
      const V y_row = load(y[k] + d);
      for (int j = 0; j < R; ++j) sum[j] = at::vec::fmadd(V(c[k][j]), x_tile[j] - y_row, sum[j]);
    }
    for (int j = 0; j < R; ++j) store(sum[j], grad.row(j) + d - begin);
  };
  int64_t d = begin;
  for (; d + V::size() <= end; d += V::size()) {
    step(d, [](const T* p) { return V::loadu(p); }, [](const V& v, T* p) { v.store(p); });
  }
  if (d < end) {
    const int64_t count = end - d;
    step(d, [count](const T* p) { return V::loadu(p, count); }, [count](const V& v, T* p) { v.store(p, count); });
  }
}

// grad_j = sum_k c_jk (x_j - y_k), [M, end - begin], for the given rows y; coefficient is [M, columns].
template <typename T>
void gradient_block(Matrix<const T> x, int64_t M, const T* const* y, int64_t columns, const T* coefficient,
                    int64_t begin, int64_t end, Matrix<T> grad) {
  for_tiles<4>(M, [&](auto R, int64_t j) {
    for_tiles<8>(columns, [&](auto C, int64_t k) {
      gradient_tile<R(), C(), T>({x.row(j), x.stride}, y + k, {coefficient + j * columns + k, columns}, begin, end,
                                 {grad.row(j), grad.stride}, k == 0);
    });
  });
}

template <typename T>
void row_pointers(Matrix<const T> x, int64_t M, const T** rows) {
  for (int64_t j = 0; j < M; ++j) rows[j] = x.row(j);
}

// Calls add(begin, end, block) for blocks of features of a group's gradient [M, D] and brings each to its dtype.
template <typename T, typename F>
void for_gradient_blocks(void* grad, c10::ScalarType dtype, int64_t M, int64_t D, float* buffer, const F& add) {
  const bool direct = dtype == c10::CppTypeToScalarType<T>::value;
  for (int64_t begin = 0; begin < D; begin += kMmdBlock) {
    const int64_t end = D - begin < kMmdBlock ? D : begin + kMmdBlock;
    if (direct) {
      add(begin, end, Matrix<T>{static_cast<T*>(grad) + begin, D});
      continue;
    }
    if constexpr (std::is_same_v<T, float>) {
      const Matrix<T> block{buffer, kMmdBlock};
      add(begin, end, block);
      for (int64_t j = 0; j < M; ++j) finish(block.row(j), at_element(grad, dtype, j * D + begin), dtype, end - begin);
    }
  }
}

// A group's rows as T.
template <typename T>
Matrix<const T> group_rows(const Particles& particles, c10::ScalarType dtype, int64_t g, int64_t M, int64_t D,
                           float* buffer) {
  const void* group = at_element(particles.data, dtype, g * particles.group_stride);
  if constexpr (std::is_same_v<T, float>) {
    if (dtype != c10::kFloat) {
      for (int64_t j = 0; j < M; ++j) {
        as_compute(at_element(group, dtype, j * particles.row_stride), dtype, D, buffer + j * D);
      }
      return {buffer, D};
    }
  }
  return {static_cast<const T*>(group), particles.row_stride};
}

template <typename T>
void loss_groups(const MmdLossArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  const int64_t M = args.M, D = args.D, pairs = M * M;
  double *tt = work.dist2, *tr = tt + pairs, *rr = tr + pairs;
  T* coefficient = static_cast<T*>(work.coefficient);  // [M, 2 M]: of t_j - t_k, of t_j - r_k
  const T** rows = reinterpret_cast<const T**>(work.pointers);
  const Replace replace = args.grad ? Replace::kBySlope : Replace::kNothing;
  for (int64_t g = begin; g < end; ++g) {
    const auto y_t = group_rows<T>(args.y_t, args.dtype, g, M, D, work.rows);
    const auto y_r = group_rows<T>(args.y_r, args.dtype, g, M, D, work.rows + M * D);
    const double kappa = args.scale[g] / static_cast<double>(D);
    self_distances<T>(y_t, M, D, {tt, M});
    distances<T>(y_t, M, y_r, M, D, {tr, M});
    const double sum_tt = evaluate(tt, pairs, kappa, args.kernel, args.eps, replace);
    const double sum_tr = evaluate(tr, pairs, kappa, args.kernel, args.eps, replace);
    const double weight = args.weight[g] / static_cast<double>(pairs);
    if (args.loss) {
      self_distances<T>(y_r, M, D, {rr, M});
      const double sum_rr = evaluate(rr, pairs, kappa, args.kernel, args.eps, Replace::kNothing);
      static_cast<T*>(args.loss)[g] = static_cast<T>(weight * (sum_tt + sum_rr - 2.0 * sum_tr));
    }
    if (!args.grad) continue;
    for (int64_t j = 0; j < M; ++j) {
      for (int64_t k = 0; k < M; ++k) {
        coefficient[j * 2 * M + k] = static_cast<T>(2.0 * weight * tt[j * M + k]);
        coefficient[j * 2 * M + M + k] = static_cast<T>(-2.0 * weight * tr[j * M + k]);
      }
    }
    row_pointers<T>(y_t, M, rows);
    row_pointers<T>(y_r, M, rows + M);
    void* grad = at_element(args.grad, args.dtype, g * M * D);
    for_gradient_blocks<T>(grad, args.dtype, M, D, work.grad, [&](int64_t from, int64_t to, Matrix<T> block) {
      gradient_block<T>(y_t, M, rows, 2 * M, coefficient, from, to, block);
    });
  }
}

template <typename T>
void gram_groups(const MmdGramArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  const int64_t Mx = args.Mx, My = args.My, D = args.D, pairs = Mx * My;
  T* c_xy = static_cast<T*>(work.coefficient);
  T* c_yx = c_xy + pairs;
  const T** rows = reinterpret_cast<const T**>(work.pointers);
  for (int64_t g = begin; g < end; ++g) {
    const auto x = group_rows<T>(args.x, args.dtype, g, Mx, D, work.rows);
    const auto y = group_rows<T>(args.y, args.dtype, g, My, D, work.rows + Mx * D);
    const double kappa = args.scale[g] / static_cast<double>(D);
    distances<T>(x, Mx, y, My, D, {work.dist2, My});
    evaluate(work.dist2, pairs, kappa, args.kernel, args.eps, args.grad ? Replace::kBySlope : Replace::kByKernel);
    if (!args.grad) {
      cast(work.dist2, static_cast<T*>(args.gram) + g * pairs, pairs);
      continue;
    }
    for (int64_t j = 0; j < Mx; ++j) {
      for (int64_t k = 0; k < My; ++k) {
        const double c = args.grad[g * pairs + j * My + k] * work.dist2[j * My + k];
        c_xy[j * My + k] = c_yx[k * Mx + j] = static_cast<T>(c);
      }
    }
    row_pointers<T>(x, Mx, rows);
    row_pointers<T>(y, My, rows + Mx);
    void* grad_x = at_element(args.grad_x, args.dtype, g * Mx * D);
    for_gradient_blocks<T>(grad_x, args.dtype, Mx, D, work.grad, [&](int64_t from, int64_t to, Matrix<T> block) {
      gradient_block<T>(x, Mx, rows + Mx, My, c_xy, from, to, block);
    });
    void* grad_y = at_element(args.grad_y, args.dtype, g * My * D);
    for_gradient_blocks<T>(grad_y, args.dtype, My, D, work.grad, [&](int64_t from, int64_t to, Matrix<T> block) {
      gradient_block<T>(y, My, rows, Mx, c_yx, from, to, block);
    });
  }
}

void loss(const MmdLossArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  args.dtype == c10::kDouble ? loss_groups<double>(args, work, begin, end) : loss_groups<float>(args, work, begin, end);
}

void gram(const MmdGramArgs& args, const MmdWork& work, int64_t begin, int64_t end) {
  args.dtype == c10::kDouble ? gram_groups<double>(args, work, begin, end) : gram_groups<float>(args, work, begin, end);
}

}  // namespace

namespace CPU_CAPABILITY {
const MmdFunctions mmd_functions{loss, gram};
}

}  // namespace imm

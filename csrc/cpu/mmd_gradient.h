// The gradient sum_k c_jk (x_j - y_k) to the rows of a group, in tiles of rows (mmd.cpp).
#pragma once

#include "mmd_distances.h"
#include "streaming.h"

namespace imm {
namespace {

// Rows of a tile of the gradient at most, and vectors of one with R: as many as the registers of the instruction set
// hold.
template <typename T>
constexpr int kGradientRows = sizeof(Vectorized<T>) == 64 ? 8 : 4;
template <typename T, int R = 1>
constexpr int kGradientVectors = sizeof(Vectorized<T>) == 64 ? std::min(4, 16 / R) : 2;

// The coefficients of a gradient, in the order in which tiles of rows read them: for each column those of the tile's
// rows. By products, a tile begins with those of its matched pairs, and a row's coefficient for itself is their sum.
template <typename T>
struct Coefficients {
  T* data;
  int64_t columns;
  bool products;
  T* tile(int64_t row) const { return data + row * (columns + (products ? 1 : 0)); }
};

// Writes the coefficients c(j, k) of rows j < M; by products, columns are two sets of M, the first that of the rows.
template <typename T, typename F>
void pack_coefficients(int64_t M, const Coefficients<T>& coefficients, const F& c) {
  for_tiles<kGradientRows<T>>(0, M, [&](auto R, int64_t first) {
    T* target = coefficients.tile(first);
    T* column = coefficients.products ? target + R() : target;
    for (int j = 0; j < R(); ++j) {
      const int64_t row = first + j;
      double sum = 0.0;
      for (int64_t k = 0; k < coefficients.columns; ++k) {
        const double value = c(row, k);
        if (!coefficients.products) {
          column[k * R() + j] = static_cast<T>(value);
        } else if (k == row + M) {
          target[j] = static_cast<T>(value);
          column[k * R() + j] = T(0);
        } else if (k != row) {
          sum += value;
          column[k * R() + j] = static_cast<T>(-value);
        }
      }
      if (coefficients.products) column[row * R() + j] = static_cast<T>(sum);
    }
  });
}

// From the rows of each set to those fetched meanwhile, in elements; 0 for none.
struct Steps {
  int64_t first = 0, second = 0;
};

// grad_j = sum_k c_jk (x_j - y_k) for a tile of rows and n features. By products, the rows x are the columns from `own`
// on, and those M further the rows whose pairs with x's are taken directly all the same. Meanwhile the columns of each
// set are fetched so many elements `ahead`.
template <int R, typename T>
void gradient_tile(const T* const* x, const T* const* y, int64_t own, const Coefficients<T>& coefficients, const T* c,
                   int64_t from, int64_t n, const Steps& ahead, Matrix<T> grad, bool stream) {
  using V = Vectorized<T>;
  const auto step = [&](auto vectors, int64_t d, const auto& load, const auto& store) __attribute__((always_inline)) {
    constexpr int kVectors = vectors();
    const auto for_tile = [&](const auto& f) __attribute__((always_inline)) {
      repeat<R>([&](auto j) __attribute__((always_inline)) {
        repeat<kVectors>([&](auto v) __attribute__((always_inline)) { f(j(), v()); });
      });
    };
    const auto read = [&](const T* row, V* target) __attribute__((always_inline)) {
      repeat<kVectors>([&](auto v)
                           __attribute__((always_inline)) { target[v] = load(row + from + d + v * V::size()); });
    };
    V sum[R][kVectors], y_row[kVectors];
    for_tile([&](int j, int v) __attribute__((always_inline)) { sum[j][v] = V(T(0)); });
    if (coefficients.products) {
      const int64_t M = coefficients.columns / 2;
      const T* columns = c + R;
      const auto fetch_row = [&](const T* row, int64_t elements) __attribute__((always_inline)) {
        if (elements == 0) return;
        repeat<kVectors>([&](auto v)
                             __attribute__((always_inline)) { fetch(row + elements + from + d + v * V::size()); });
      };
      // Each row is read once: rows whose stride is a power of two, 16 of them, push each other out of the first cache.
      repeat<R>([&](auto i) __attribute__((always_inline)) {
        const int64_t k = own + i;
        V matched[kVectors];
        read(y[k], y_row);
        read(y[k + M], matched);
        fetch_row(y[k], ahead.first);
        fetch_row(y[k + M], ahead.second);
        const T *column = columns + k * R, *matched_column = column + M * R;
        for_tile([&](int j, int v) __attribute__((always_inline)) {
          const bool is_own = j == i();
          sum[j][v] = at::vec::fmadd(V(column[j]), y_row[v], sum[j][v]);
          sum[j][v] = at::vec::fmadd(V(is_own ? c[j] : matched_column[j]), is_own ? y_row[v] - matched[v] : matched[v],
                                     sum[j][v]);
        });
      });
      const auto add = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
        for (int64_t k = begin; k < end; ++k) {
          read(y[k], y_row);
          fetch_row(y[k], k < M ? ahead.first : ahead.second);
          const T* column = columns + k * R;
          for_tile([&](int j, int v) __attribute__((always_inline)) {
            sum[j][v] = at::vec::fmadd(V(column[j]), y_row[v], sum[j][v]);
          });
        }
      };
      add(0, own);
      add(own + R, M + own);
      add(M + own + R, 2 * M);
    } else {
      V x_tile[R][kVectors];
      repeat<R>([&](auto j) __attribute__((always_inline)) { read(x[j], x_tile[j]); });
      for (int64_t k = 0; k < coefficients.columns; ++k) {
        read(y[k], y_row);
        const T* column = c + k * R;
        for_tile([&](int j, int v) __attribute__((always_inline)) {
          sum[j][v] = at::vec::fmadd(V(column[j]), x_tile[j][v] - y_row[v], sum[j][v]);
        });
      }
    }
    for_tile([&](int j, int v) __attribute__((always_inline)) { store(sum[j][v], grad.row(j) + d + v * V::size()); });
  };
  const auto load = [](const T* p) __attribute__((always_inline)) { return V::loadu(p); };
  const auto store = [stream](const V& v, T* p)
                         __attribute__((always_inline)) { stream ? store_around_caches(v, p) : v.store(p); };
  constexpr int kVectors = kGradientVectors<T, R>;
  int64_t d = 0;
  for (; d + kVectors * V::size() <= n; d += kVectors * V::size()) step(Int<kVectors>{}, d, load, store);
  for (; d + V::size() <= n; d += V::size()) step(Int<1>{}, d, load, store);
  if (d < n) {
    const int64_t rest = n - d;
    step(Int<1>{}, d, [rest](const T* p) { return V::loadu(p, rest); }, [rest](const V& v, T* p) { v.store(p, rest); });
  }
}

// Copies n features of rows side by side, a pointer each.
template <typename T>
const T* const* gather(const T* const* rows, int64_t count, int64_t from, int64_t n, int64_t stride,
                       const MmdWork& work) {
  using V = Vectorized<T>;
  const T** gathered = reinterpret_cast<const T**>(work.gathered_rows);
  T* target = static_cast<T*>(work.gathered);
  for (int64_t i = 0; i < count; ++i, target += stride) {
    gathered[i] = target;
    for (int64_t d = 0; d < n; d += V::size()) {
      const int64_t lanes = std::min<int64_t>(V::size(), n - d);
      V::loadu(rows[i] + from + d, lanes).store(target + d, lanes);
    }
  }
  return gathered;
}

// What a gradient is of: the sum of c_jk (x_j - y_k) over k for the rows x = [first, first + M) of a group and its rows
// from `others` on.
template <typename T>
struct Gradient {
  int64_t first, M, others;
  Coefficients<T> coefficients;
  void* target;  // [M, D]
  c10::ScalarType dtype;
  Steps ahead{};
};

template <typename T>
void write_gradient(const T* const* rows, int64_t count, const Gradient<T>& gradient, int64_t D, const MmdPlan& plan,
                    const MmdWork& work) {
  const auto& [first, M, others, coefficients, grad, dtype, ahead] = gradient;
  const bool direct = dtype == c10::CppTypeToScalarType<T>::value;
  const int64_t features = direct ? D : kMmdGradFeatures;
  const bool stream = plan.stream && direct && aligned<T>(grad) && D % Vectorized<T>::size() == 0;
  for (int64_t begin = 0; begin < D; begin += features) {
    const int64_t end = std::min(begin + features, D);
    const Matrix<T> target =
        direct ? Matrix<T>{static_cast<T*>(grad), D} : Matrix<T>{static_cast<T*>(work.grad), features};
    // All rows for a few features at a time: these features stay in the innermost cache.
    constexpr int64_t kFew = kGradientVectors<T> * Vectorized<T>::size();
    static_assert(kFew * sizeof(T) <= kMmdGatherBytes);
    const int64_t few = plan.gather ? kFew : 4 * kFew;
    for (int64_t d = begin; d < end; d += few) {
      const int64_t n = std::min(few, end - d), from = plan.gather ? 0 : d;
      const T* const* z = plan.gather ? gather(rows, count, d, n, kFew, work) : rows;
      for_tiles<kGradientRows<T>>(0, M, [&](auto R, int64_t j) {
        gradient_tile<R()>(z + first + j, z + others, first + j, coefficients, coefficients.tile(j), from, n, ahead,
                           {target.row(j) + d - begin, target.stride}, stream);
      });
    }
    if (direct) continue;
    for (int64_t j = 0; j < M; ++j) finish(target.row(j), at_element(grad, dtype, j * D + begin), dtype, end - begin);
  }
}

}  // namespace
}  // namespace imm

// Squared distances of the rows of a group, in tiles of pairs whose partial sums stay in registers (mmd.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "../mmd.h"
#include "convert.h"

namespace imm {
namespace {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

template <int kValue>
using Int = Constant<kValue>;

// Calls f(Int<R>, first row) for tiles of kLargest, ..., 2, 1 rows that cover [begin, end).
template <int kLargest, typename F>
void for_tiles(int64_t begin, int64_t end, const F& f) {
  for (; begin + kLargest <= end; begin += kLargest) f(Int<kLargest>{}, begin);
  if constexpr (kLargest > 1) for_tiles<kLargest / 2>(begin, end, f);
}

// f(Int<0>), ..., f(Int<kCount - 1>). A loop would be unrolled too late for what it indexes to be kept in registers.
template <int kCount, typename F>
[[gnu::always_inline]] inline void repeat(const F& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>)
      __attribute__((always_inline)) { (f(Int<kIndex>{}), ...); }(std::make_integer_sequence<int, kCount>{});
}

template <typename T>
struct Matrix {
  T* data;
  int64_t stride;  // between rows, in elements
  T* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
double sum_lanes(const Vectorized<T>& v) {
  constexpr int kLanes = Vectorized<T>::size();
  T lane[kLanes];
  v.store(lane);
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = static_cast<double>(lane[i]);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sum[i] += sum[i + n];
  }
  return sum[0];
}

// The rows of a group: those of one set, then those of the other.
struct Group {
  const MmdParticles& first;
  const MmdParticles& second;
  int64_t index;
  int64_t rows() const { return first.M + second.M; }
  const MmdParticles& set(int64_t i) const { return i < first.M ? first : second; }

  // Where row i of its set's x or g begins.
  const void* address(MmdRows MmdParticles::* part, int64_t i) const {
    const MmdRows& rows = set(i).*part;
    const int64_t row = i < first.M ? i : i - first.M;
    return at_element(rows.data, rows.dtype, index * rows.group_stride + row * rows.row_stride);
  }
};

// Brings row i of a group to T.
template <typename T>
void pack_row(const Group& group, int64_t i, int64_t D, T* target) {
  const MmdParticles& set = group.set(i);
  const void* source = group.address(&MmdParticles::x, i);
  if (!set.g.data) {
    const T* x = as_compute(source, set.x.dtype, D, target);
    if (x != target) std::copy(x, x + D, target);
    return;
  }
  const void* g_source = group.address(&MmdParticles::g, i);
  const T c_skip = static_cast<T>(set.c_skip[group.index]), c_out = static_cast<T>(set.c_out[group.index]);
  constexpr int64_t kPiece = 256;
  T x_buffer[kPiece], g_buffer[kPiece];
  for (int64_t begin = 0; begin < D; begin += kPiece) {
    const int64_t n = std::min(kPiece, D - begin);
    const T* x = as_compute(at_element(source, set.x.dtype, begin), set.x.dtype, n, x_buffer);
    const T* g = as_compute(at_element(g_source, set.g.dtype, begin), set.g.dtype, n, g_buffer);
    for (int64_t d = 0; d < n; ++d) target[begin + d] = c_skip * x[d] + c_out * g[d];
  }
}

// The rows of a group as T, a pointer each: where they lie or packed.
template <typename T>
const T* const* read_rows(const Group& group, int64_t D, const MmdPlan& plan, const MmdWork& work) {
  const T** rows = reinterpret_cast<const T**>(work.rows);
  for (int64_t i = 0; i < group.rows(); ++i) {
    if (!plan.packed) {
      rows[i] = static_cast<const T*>(group.address(&MmdParticles::x, i));
      continue;
    }
    T* target = static_cast<T*>(work.packed) + i * plan.stride;
    pack_row(group, i, D, target);
    rows[i] = target;
  }
  return rows;
}

// Rows that are brought to the second cache while distances are added up. A few lines at a time: a core waits for so
// many, and drops what is more.
template <typename T>
struct Ahead {
  const T* const* rows;
  int64_t count;
};

// What comes next: of the next group the first set (the second is left to the gradient), or the next block of features.
// Measured at M = 4 and 8: 5 to 20 % of loss and gradient.
template <typename T>
Ahead<T> ahead_of(const T* const* rows, const Group& group, int64_t D, bool next_group, const MmdPlan& plan,
                  const MmdWork& work) {
  const bool next_block = plan.features < D && group.rows() <= kMmdBlockRows;
  if (plan.packed || !(next_group || next_block)) return {rows, 0};
  const T** next = reinterpret_cast<const T**>(work.next_rows);
  const int64_t count = next_group ? group.first.M : group.rows();
  const int64_t step = next_group ? group.first.x.group_stride : plan.features;
  for (int64_t i = 0; i < count; ++i) next[i] = rows[i] + step;
  return {next, count};
}

template <typename T>
[[gnu::always_inline]] inline void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

enum class Sum { kSquares, kProducts };  // over features, of (x - y)^2 or of x y

// A block of features.
struct Block {
  int64_t begin, end;
  bool first, last;
};

enum class Shape { kAll, kUpper, kDiagonal };  // pairs (j, k) of a tile: all, k > j (of products k >= j), k = j

// Rows that a tile of R rows fetches.
template <int R>
constexpr int kFetched = std::max(1, R / 2);

// Adds a block of features to the sums of a tile of pairs. The sums are kept in `partial` between blocks and end in
// `total`. Meanwhile the same features of the rows `next` are fetched.
template <Sum kSum, Shape kShape, int R, int C, typename T>
void pairs_tile(const T* const* x, const T* const* y, const T* const* next, const Block& block, T* partial,
                Matrix<double> total) {
  using V = Vectorized<T>;
  V acc[R][C];
  const auto for_pairs = [&](const auto& f) __attribute__((always_inline)) {
    repeat<R>([&](auto j) __attribute__((always_inline)) {
      repeat<C>([&](auto k) __attribute__((always_inline)) {
        constexpr bool diagonal = k() == j() && (kShape == Shape::kDiagonal || kSum == Sum::kProducts);
        if constexpr (kShape == Shape::kAll || diagonal || (kShape == Shape::kUpper && k() > j())) f(j(), k());
      });
    });
  };
  for_pairs([&](int j, int k) __attribute__((always_inline)) {
    acc[j][k] = block.first ? V(T(0)) : V::loadu(partial + (j * C + k) * V::size());
  });
  const auto step = [&](int64_t d, const auto& load) __attribute__((always_inline)) {
    V x_tile[R], y_tile[C];
    repeat<R>([&](auto j) __attribute__((always_inline)) { x_tile[j] = load(x[j] + d); });
    repeat<kFetched<R>>([&](auto i) __attribute__((always_inline)) { fetch(next[i] + d); });
    if constexpr (kShape != Shape::kUpper) {
      repeat<C>([&](auto k) __attribute__((always_inline)) { y_tile[k] = load(y[k] + d); });
    }
    for_pairs([&](int j, int k) __attribute__((always_inline)) {
      const V& y_k = kShape == Shape::kUpper ? x_tile[k] : y_tile[k];
      if constexpr (kSum == Sum::kProducts) {
        acc[j][k] = at::vec::fmadd(x_tile[j], y_k, acc[j][k]);
      } else {
        const V difference = x_tile[j] - y_k;
        acc[j][k] = at::vec::fmadd(difference, difference, acc[j][k]);
      }
    });
  };
  int64_t d = block.begin;
  for (; d + V::size() <= block.end; d += V::size()) step(d, [](const T* p) { return V::loadu(p); });
  if (d < block.end) step(d, [n = block.end - d](const T* p) { return V::loadu(p, n); });  // fills with zeros
  if (block.last) {
    for_pairs([&](int j, int k) __attribute__((always_inline)) {
      const V lanes = acc[j][k];  // a reference to it would keep acc out of registers
      total.row(j)[k] = sum_lanes(lanes);
    });
  } else {
    for_pairs([&](int j, int k) __attribute__((always_inline)) { acc[j][k].store(partial + (j * C + k) * V::size()); });
  }
}

// Rows of a tile of all pairs within them. Of eight rows the 28 differences fill the registers of AVX-512.
template <Sum kSum, typename T>
constexpr int kTriangle = kSum == Sum::kSquares && sizeof(Vectorized<T>) == 64 ? 8 : 4;

// Sums of the pairs of the rows i < x_end of a group with its rows k >= y_begin; of a set with itself (y_begin = 0),
// those of i < k. Of kProducts, those of i = k too, and the matched pairs k = i + M have squares of differences all the
// same.
template <Sum kSum, typename T>
void all_pairs(const T* const* rows, const Ahead<T>& ahead, int64_t count, int64_t x_end, int64_t y_begin, int64_t D,
               const MmdPlan& plan, const MmdWork& work, Matrix<double> total) {
  for (int64_t i = 0; i < x_end; i += kMmdBlockRows) {
    const int64_t i_end = std::min(i + kMmdBlockRows, x_end);
    for (int64_t k = std::max(i, y_begin); k < count; k += kMmdBlockRows) {
      const int64_t k_end = std::min(k + kMmdBlockRows, count);
      for (int64_t begin = 0; begin < D; begin += plan.features) {
        const Block block{begin, std::min(begin + plan.features, D), begin == 0, begin + plan.features >= D};
        T* partial = static_cast<T*>(work.partial);
        int64_t fetched = 0;
        const auto tile = [&](auto sum, auto shape, auto R, auto C, int64_t x, int64_t y) {
          const Matrix<double> target{total.row(x) + y - y_begin, total.stride};
          const bool more = fetched + kFetched<R()> <= ahead.count;
          const T* const* next = more ? ahead.rows + fetched : rows + x;  // else what is read anyway
          pairs_tile<sum(), shape(), R(), C()>(rows + x, rows + y, next, block, partial, target);
          partial += R() * C() * Vectorized<T>::size();
          if (more) fetched += kFetched<R()>;
        };
        for_tiles<kTriangle<kSum, T>>(i, i_end, [&](auto triangle, int64_t first) {
          const int64_t end = first + triangle();
          if (k <= first) tile(Constant<kSum>{}, Constant<Shape::kUpper>{}, triangle, triangle, first, first);
          for_tiles<std::min(triangle(), 4)>(first, end, [&](auto R, int64_t x) {
            for_tiles<4>(std::max(k, end), k_end,
                         [&](auto C, int64_t y) { tile(Constant<kSum>{}, Constant<Shape::kAll>{}, R, C, x, y); });
          });
        });
        if constexpr (kSum == Sum::kProducts) {
          const int64_t M = count / 2;
          for_tiles<4>(std::max(i, k - M), std::min({i_end, k_end - M, M}), [&](auto R, int64_t x) {
            tile(Constant<Sum::kSquares>{}, Constant<Shape::kDiagonal>{}, R, R, x, x + M);
          });
        }
      }
    }
  }
}

double sum(Matrix<double> values, int64_t rows, int64_t columns) {
  using V = Vectorized<double>;
  V total(0.0);
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t k = 0; k < columns; k += V::size()) {
      total = total + V::loadu(values.row(j) + k, std::min<int64_t>(V::size(), columns - k));
    }
  }
  return sum_lanes(total);
}

// A pair whose squared distance is below this part of |x|^2 + |y|^2 is close: products would lose digits. At the limit
// slopes have errors of 5e-6 at D = 4096 in float32, as has torch.cdist in general.
constexpr double kClose = 0.05;

// Squared distances [2 M, 2 M] of the rows i <= k of a group by products, |x|^2 + |y|^2 - 2 x.y, the matched pairs'
// directly. False where any other pair is close, or a row not finite.
template <typename T>
bool separated_distances(const T* const* rows, const Ahead<T>& ahead, int64_t M, int64_t D, const MmdPlan& plan,
                         const MmdWork& work, Matrix<double> dist2) {
  all_pairs<Sum::kProducts>(rows, ahead, 2 * M, 2 * M, 0, D, plan, work, dist2);
  double* norms = work.slopes;  // which there are none of yet
  for (int64_t i = 0; i < 2 * M; ++i) norms[i] = dist2.row(i)[i];
  bool separated = std::isfinite(sum({norms, 0}, 1, 2 * M));
  for (int64_t i = 0; i < 2 * M; ++i) {
    double* row = dist2.row(i);
    const double matched = i < M ? row[i + M] : 0.0;
    int close = 0;
    for (int64_t k = i + 1; k < 2 * M; ++k) {
      const double both = norms[i] + norms[k];
      const bool apart = (row[k] = both - 2.0 * row[k]) >= kClose * both;
      close += k != i + M && !apart;
    }
    row[i] = 0.0;
    if (i < M) row[i + M] = matched;
    separated = separated && close == 0;
  }
  return separated;
}

// Squared distances [count, count] of the rows i <= k of a group, directly. A row with a feature that is not finite has
// no distance from itself either.
template <typename T>
void direct_distances(const T* const* rows, const Ahead<T>& ahead, int64_t count, int64_t D, const MmdPlan& plan,
                      const MmdWork& work, Matrix<double> dist2) {
  all_pairs<Sum::kSquares>(rows, ahead, count, count, 0, D, plan, work, dist2);
  double all = 0.0;
  for (int64_t i = 0; i < count; ++i) all = std::accumulate(dist2.row(i) + i + 1, dist2.row(i) + count, all);
  const auto finite = [](T x) { return std::isfinite(x); };
  for (int64_t i = 0; i < count; ++i) {
    const bool proper = std::isfinite(all) || std::all_of(rows[i], rows[i] + D, finite);
    dist2.row(i)[i] = proper ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  }
}

// Whether squared distances [2 M, 2 M] of the rows i <= k of a group are of rows apart from each other, the matched
// pairs aside. By the triangle inequality one row's norm bounds the others'.
template <typename T>
bool apart(const T* const* rows, int64_t M, int64_t D, Matrix<double> dist2, double* norms) {
  using V = Vectorized<T>;
  V squares[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
  int64_t d = 0;
  for (; d + 4 * V::size() <= D; d += 4 * V::size()) {
    repeat<4>([&](auto v) {
      const V x = V::loadu(rows[0] + d + v * V::size());
      squares[v] = at::vec::fmadd(x, x, squares[v]);
    });
  }
  double first = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; d < D; ++d) first += static_cast<double>(rows[0][d]) * static_cast<double>(rows[0][d]);
  for (int64_t k = 0; k < 2 * M; ++k) {
    const double norm = std::sqrt(first) + std::sqrt(dist2.row(0)[k]);
    norms[k] = norm * norm;
  }
  for (int64_t i = 0; i < 2 * M; ++i) {
    for (int64_t k = i + 1; k < 2 * M; ++k) {
      if (k != i + M && !(dist2.row(i)[k] > kClose * (norms[i] + norms[k])))
        return false;  // also where both are infinite
    }
  }
  return true;
}

// The rows i of a square of which those k >= i count, as so many numbers one after the other. In place.
void pack_upper(Matrix<double> square, int64_t rows) {
  double* target = square.row(0) + square.stride;
  for (int64_t i = 1; i < rows; ++i) target = std::copy(square.row(i) + i, square.row(i) + square.stride, target);
}

// The other way, of the first `rows`.
void unpack_upper(Matrix<double> square, int64_t rows) {
  const double* end = square.data + rows * square.stride - rows * (rows - 1) / 2;
  for (int64_t i = rows; i-- > 1;) {
    const double* begin = end - (square.stride - i);
    std::copy_backward(begin, end, square.row(i) + square.stride);
    end = begin;
  }
}

// Copies what is above the diagonal to below.
void mirror(Matrix<double> square, int64_t M) {
  for (int64_t j = 1; j < M; ++j) {
    for (int64_t k = 0; k < j; ++k) square.row(j)[k] = square.row(k)[j];
  }
}

void clear_diagonal(Matrix<double> square, int64_t M) {
  for (int64_t j = 0; j < M; ++j) square.row(j)[j] = 0.0;
}

}  // namespace
}  // namespace imm

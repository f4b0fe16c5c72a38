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
#include <limits>
#include <numeric>
#include <type_traits>

#include "convert.h"
#include "streaming.h"

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

// The loops of imm::energy_score, compiled once per instruction set (see capability.h).
#include "../energy_score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "convert.h"
#include "normals.h"
#include "sums.h"

namespace imm {
namespace {

double number(const PerImage<double>& of, int64_t group) { return of.ptr ? of.ptr[group * of.stride] : 1.0; }

// Row `row` of a group as T: `target` gets its D numbers.
template <typename T>
void load_row(const ScoreRows& of, int64_t group, int64_t row, int64_t D, T* target) {
  const int64_t first = group * of.group_stride + row * of.row_stride;
  with_pointer(of.dtype, [&](auto type) {
    using From = std::remove_pointer_t<decltype(type)>;
    const From* source = static_cast<const From*>(of.data) + first;
    if (of.feature_stride == 1) return cast(source, target, D);
    for (int64_t d = 0; d < D; ++d) target[d] = static_cast<T>(source[d * of.feature_stride]);
  });
}

template <typename T>
void store_row(const T* source, const ScoreRows& of, int64_t group, int64_t row, int64_t D) {
  const int64_t first = group * of.group_stride + row * of.row_stride;
  with_pointer(of.dtype, [&](auto type) {
    auto* target = static_cast<decltype(type)>(of.data) + first;
    if (of.feature_stride == 1) return cast(source, target, D);
    for (int64_t d = 0; d < D; ++d) {
      target[d * of.feature_stride] = static_cast<std::remove_pointer_t<decltype(type)>>(source[d]);
    }
  });
}

// A distance d of the kernel and its slope d'(r) / r, of the square of the norm r.
struct Distance {
  double value, slope;
};

Distance distance(const EnergyScoreArgs& args, double square, double scale) {
  const double r = std::sqrt(square);
  if (args.kernel.kind == MmdKernel::kEnergy) return {scale * r, square == 0 ? 0 : scale / r};  // a NaN stays
  const double kappa = scale / static_cast<double>(args.D),
               share = 1.0 / static_cast<double>(args.kernel.bandwidth_count);
  Distance sum{0, 0};
  for (int64_t i = 0; i < args.kernel.bandwidth_count; ++i) {
    const double rate = kappa * args.kernel.bandwidths[i];
    if (args.kernel.kind == MmdKernel::kLaplace) {
      const double value = -std::expm1(-rate * r);
      sum.value += value;
      sum.slope += square == 0 ? 0 : rate * (1 - value) / r;
    } else if (args.kernel.kind == MmdKernel::kRbf) {
      const double value = -std::expm1(-0.5 * rate * square);
      sum.value += value;
      sum.slope += rate * (1 - value);
    } else {
      const double inverse = 1 / (1 + rate * square);
      sum.value += square == std::numeric_limits<double>::infinity() ? 1 : rate * square * inverse;
      sum.slope += 2 * rate * inverse * inverse;
    }
  }
  return {share * sum.value, share * sum.slope};
}

// The rows of one group, padded with zeros to `stride`.
template <typename T>
struct Members {
  T* x;
  T* grad;
  int64_t stride;
};

// Members [first, N) against a row: adds c d to the loss and c s (x - row) to their gradients, and takes the latter
// from the row's own where it is a member too. kVectors: of a row, known so that differences stay in registers, or 0.
template <int kVectors, typename T>
double against(const EnergyScoreArgs& args, const Members<T>& members, int64_t first, const T* row, double c,
               double scale, T* own) {
  using V = Vectorized<T>;
  constexpr int64_t kStep = V::size();
  double sum = 0;
  for (int64_t j = first; j < args.N; ++j) {
    const T* x = members.x + j * members.stride;
    T* grad = members.grad + j * members.stride;
    V square(T(0)), other(T(0)), difference[kVectors > 0 ? kVectors : 1];
    const auto add = [&](V& to, const V& value) { to = at::vec::fmadd(value, value, to); };
    if constexpr (kVectors > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        difference[i] = V::loadu(x + i * kStep) - V::loadu(row + i * kStep);
        add(i % 2 ? other : square, difference[i]);
      }
    } else {
      for (int64_t d = 0; d < members.stride; d += kStep) {
        add(d / kStep % 2 ? other : square, V::loadu(x + d) - V::loadu(row + d));
      }
    }
    const T total = at::vec::vec_reduce_all<T>([](V& a, V& b) { return a + b; }, square + other);
    const Distance found = distance(args, static_cast<double>(total), scale);
    sum += c * found.value;
    const V slope(static_cast<T>(c * found.slope));
    const auto move = [&](int64_t d, const V& apart) {
      at::vec::fmadd(slope, apart, V::loadu(grad + d)).store(grad + d);
      if (own) at::vec::fmadd(slope.neg(), apart, V::loadu(own + d)).store(own + d);
    };
    if constexpr (kVectors > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) move(i * kStep, difference[i]);
    } else {
      for (int64_t d = 0; d < members.stride; d += kStep) move(d, V::loadu(x + d) - V::loadu(row + d));
    }
  }
  return sum;
}

// The function of rows of so many vectors.
template <typename T, int kVectors = 8>
auto against_function(int64_t vectors) {
  if constexpr (kVectors == 0) {
    return against<0, T>;
  } else {
    return vectors == kVectors ? against<kVectors, T> : against_function<T, kVectors - 1>(vectors);
  }
}

// n normals of a group, from element `first` of its draws on.
inline void draw(uint64_t seed, int64_t first, int64_t n, float* out) { quick_normals(seed, 0, first, n, out); }

inline void draw(uint64_t seed, int64_t first, int64_t n, double* out) {
  float buffer[kScoreDraws];
  for (int64_t i = 0; i < n; i += kScoreDraws) {
    const int64_t count = std::min(n - i, kScoreDraws);
    normals(seed, 0, first + i, count, buffer);
    std::copy(buffer, buffer + count, out + i);
  }
}

// Calls f(row) for every target of a group, [stride] with zeros after D. space: 3 rows, then the draws.
template <typename T, typename F>
void for_targets(const EnergyScoreArgs& args, int64_t group, int64_t stride, T* space, const F& f) {
  T* const row = space;
  std::fill(row, row + stride, T(0));
  if (!args.log_std.data) {
    for (int64_t m = 0; m < args.M; ++m) {
      load_row(args.y, group, m, args.D, row);
      f(row);
    }
    return;
  }
  T *const mean = space + stride, *const std = mean + stride, *const drawn = std + stride;
  load_row(args.y, group, 0, args.D, mean);
  load_row(args.log_std, group, 0, args.D, std);
  for (int64_t d = 0; d < args.D; ++d) std[d] = std::exp(std[d]);
  const int64_t at_once = std::max<int64_t>(1, kScoreDraws / args.D);
  for (int64_t m = 0; m < args.M; m += at_once) {
    const int64_t count = std::min(at_once, args.M - m);
    draw(static_cast<uint64_t>(args.seed) + static_cast<uint64_t>(group), m * args.D, count * args.D, drawn);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < args.D; ++d) row[d] = mean[d] + std[d] * drawn[i * args.D + d];
      f(row);
    }
  }
}

template <typename T>
void groups_as(const EnergyScoreArgs& args, T* space, int64_t begin, int64_t end) {
  const int64_t stride = (args.D + kScoreLane - 1) / kScoreLane * kScoreLane;
  const auto against = against_function<T>(stride / Vectorized<T>::size());
  const Members<T> members{space, space + args.N * stride, stride};
  T* const rest = space + 2 * args.N * stride;
  const double across = 2.0 / (static_cast<double>(args.N) * static_cast<double>(args.M));
  for (int64_t g = begin; g < end; ++g) {
    const double factor = args.factor * number(args.weight, g), scale = number(args.scale, g);
    std::fill(members.x, rest, T(0));
    double loss = 0;
    if (factor != 0) {
      for (int64_t j = 0; j < args.N; ++j) load_row(args.x, g, j, args.D, members.x + j * stride);
      for_targets(args, g, stride, rest,
                  [&](const T* row) { loss += against(args, members, 0, row, across, scale, nullptr); });
      for (int64_t j = 0; j + 1 < args.N; ++j) {
        loss += against(args, members, j + 1, members.x + j * stride, -2 * args.pair, scale, members.grad + j * stride);
      }
      for (T* value = members.grad; value < rest; ++value) *value *= static_cast<T>(factor);
    }
    static_cast<T*>(args.loss)[g] = static_cast<T>(factor * loss);
    for (int64_t j = 0; j < args.N; ++j) store_row(members.grad + j * stride, args.grad, g, j, args.D);
  }
}

// c sign(x), c >= 0; NaN of NaN.
template <typename T>
Vectorized<T> signed_by(const Vectorized<T>& x, const Vectorized<T>& c, const Vectorized<T>& huge) {
  return at::vec::clamp(x * huge, c.neg(), c);
}

// Rows whose groups are neighbours: where they lie or, if they are apart or of another dtype, in a buffer.
template <typename T>
struct Line {
  T* data;
  int64_t stride;  // between rows
  bool direct;
};

// Groups as features, from group `first` on.
inline ScoreRows turned(const ScoreRows& of, int64_t first) {
  return {at_element(of.data, of.dtype, first * of.group_stride), of.dtype, 0, of.row_stride, of.group_stride};
}

template <typename T>
Line<T> line_of(const ScoreRows& of, int64_t first, T* buffer) {
  if (of.dtype == c10::CppTypeToScalarType<T>::value && of.group_stride == 1) {
    return {static_cast<T*>(of.data) + first, of.row_stride, true};
  }
  return {buffer, kScoreLineGroups, false};
}

template <typename T>
Line<T> loaded_line(const ScoreRows& of, int64_t rows, int64_t first, int64_t n, T* buffer) {
  const Line<T> line = line_of(of, first, buffer);
  for (int64_t j = 0; !line.direct && j < rows; ++j) load_row(turned(of, first), 0, j, n, line.data + j * line.stride);
  return line;
}

// Calls f(begin), ..., f(n - 1); with constants where n is known, so that what they index stays in registers.
template <int kN, typename F>
[[gnu::always_inline]] inline void for_members(int64_t begin, int64_t n, const F& f) {
  if constexpr (kN > 0) {
    [&]<int... kJ>(std::integer_sequence<int, kJ...>) __attribute__((always_inline)) {
      ((kJ >= begin ? f(std::integral_constant<int, kJ>{}) : void()), ...);
    }(std::make_integer_sequence<int, kN>{});
  } else {
    for (int64_t j = begin; j < n; ++j) f(j);
  }
}

// Groups [0, n) of a line. kN: the number of members, known so that they stay in registers, or 0.
template <int kN, typename T>
void line_of_members(const EnergyScoreArgs& args, const Line<T>& x, const Line<T>& y, const T* factor, T* loss,
                     const Line<T>& grad, int64_t n) {
  using V = Vectorized<T>;
  const int64_t N = args.N, M = args.M;
  const double pair = 2 * args.pair;
  const V across(static_cast<T>(2.0 / (static_cast<double>(N) * static_cast<double>(M))));
  const V within(static_cast<T>(std::abs(pair))), zero(T(0));
  // Takes every number but denormal ones beyond 1, the largest c that there is.
  constexpr T kHuge = std::numeric_limits<T>::max() / 4;
  const V huge(kHuge), down(pair < 0 ? kHuge : -kHuge);
  for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
    V member[kN > 0 ? kN : kScoreLineMembers], slope[kN > 0 ? kN : kScoreLineMembers];
    V far(T(0)), apart(T(0));
    for_members<kN>(0, N, [&](auto j) __attribute__((always_inline)) {
      member[j] = V::loadu(x.data + j * x.stride + i, count);
      slope[j] = zero;
    });
    for_members<kN>(0, N, [&](auto j) __attribute__((always_inline)) {
      for_members<kN>(j + 1, N, [&](auto k) __attribute__((always_inline)) {
        const V up = signed_by(member[j] - member[k], within, down);
        slope[j] = slope[j] + up;
        slope[k] = slope[k] - up;
      });
    });
    // The sum of all |x_j - x_k| is that of x_j sum_k sign(x_j - x_k), whose signs add up to 0: x_0 may be taken away.
    for_members<kN>(1, N, [&](auto j) __attribute__((always_inline)) {
      apart = at::vec::fmadd(member[j] - member[0], slope[j], apart);
    });
    for (int64_t m = 0; m < M; ++m) {
      const V target = V::loadu(y.data + m * y.stride + i, count);
      for_members<kN>(0, N, [&](auto j) __attribute__((always_inline)) {
        const V difference = member[j] - target;
        far = far + difference.abs();
        slope[j] = slope[j] + signed_by(difference, across, huge);
      });
    }
    const V f = V::loadu(factor + i, count), masked = f == zero;
    V::blendv(f * at::vec::fmadd(across, far, apart), zero, masked).store(loss + i, count);
    for_members<kN>(0, N, [&](auto j) __attribute__((always_inline)) {
      V::blendv(f * slope[j], zero, masked).store(grad.data + j * grad.stride + i, count);
    });
  });
}

// The function of so many members.
template <typename T, int kN = 8>
auto line_function(int64_t N) {
  if constexpr (kN == 0) {
    return line_of_members<0, T>;
  } else {
    return N == kN ? line_of_members<kN, T> : line_function<T, kN - 1>(N);
  }
}

template <typename T>
void lines_as(const EnergyScoreArgs& args, T* space, int64_t begin, int64_t end) {
  const auto line = line_function<T>(args.N);
  const bool numbered = args.weight.ptr || args.scale.ptr;
  T *const x_buffer = space, *const grad_buffer = x_buffer + args.N * kScoreLineGroups;
  T *const y_buffer = grad_buffer + args.N * kScoreLineGroups, *const factor = y_buffer + args.M * kScoreLineGroups;
  for (int64_t first = begin; first < end; first += kScoreLineGroups) {
    const int64_t n = std::min(end - first, kScoreLineGroups);
    const Line<T> x = loaded_line(args.x, args.N, first, n, x_buffer),
                  y = loaded_line(args.y, args.M, first, n, y_buffer);
    const Line<T> grad = line_of(args.grad, first, grad_buffer);
    std::fill(factor, factor + n, static_cast<T>(args.factor));
    for (int64_t i = 0; numbered && i < n; ++i) {
      factor[i] = static_cast<T>(args.factor * number(args.weight, first + i) * number(args.scale, first + i));
    }
    T* const loss = static_cast<T*>(args.loss) + first;
    line(args, x, y, factor, loss, grad, n);
    for (int64_t j = 0; !grad.direct && j < args.N; ++j) {
      store_row(grad.data + j * grad.stride, turned(args.grad, first), 0, j, n);
    }
  }
}

void groups(const EnergyScoreArgs& args, void* space, int64_t begin, int64_t end) {
  args.wide ? groups_as(args, static_cast<double*>(space), begin, end)
            : groups_as(args, static_cast<float*>(space), begin, end);
}

void lines(const EnergyScoreArgs& args, void* space, int64_t begin, int64_t end) {
  args.wide ? lines_as(args, static_cast<double*>(space), begin, end)
            : lines_as(args, static_cast<float*>(space), begin, end);
}

}  // namespace

namespace CPU_CAPABILITY {
const EnergyScoreFunctions energy_score_functions{groups, lines};
}

}  // namespace imm

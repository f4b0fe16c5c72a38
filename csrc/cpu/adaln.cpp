// The loops of imm::adaln_modulate and imm::gated_residual_adaln, compiled once per instruction set (see capability.h).
//
// A token's row is read from memory once; the sums over it and what is made of them find it in the first cache.
#include "../adaln.h"

#include <cmath>

#include "convert.h"
#include "sums.h"

namespace imm {
namespace {

template <typename V>
struct Three {
  V square, up, product;
};

// The same for three sums at once.
template <typename T, typename F>
[[gnu::always_inline]] inline Three<T> sums_of(int64_t n, const F& f) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  constexpr std::integral_constant<int64_t, kLanes> kAll{};
  const Vec zero(T(0));
  Three<Vec> a{zero, zero, zero}, b{zero, zero, zero};
  const auto add = [](Three<Vec>& sum, const Three<Vec>& term) {
    sum.square = sum.square + term.square;
    sum.up = sum.up + term.up;
    sum.product = sum.product + term.product;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    add(a, f(i, kAll));
    add(b, f(i + kLanes, kAll));
  }
  for (; i + kLanes <= n; i += kLanes) add(a, f(i, kAll));
  if (i < n) {
    const Three<Vec> last = f(i, n - i);
    const int64_t count = n - i;
    add(b, {first_lanes<T>(last.square, count), first_lanes<T>(last.up, count), first_lanes<T>(last.product, count)});
  }
  return {sum_lanes<T>(a.square + b.square), sum_lanes<T>(a.up + b.up), sum_lanes<T>(a.product + b.product)};
}

template <typename T>
struct Scratch {
  T* next;
  int64_t stride;
  T* row() {
    T* const row = next;
    next += stride;
    return row;
  }
};

template <typename T>
const T* modulation(const AdalnModulation& m, c10::ScalarType dtype, int64_t image, int64_t n, T* buffer) {
  return as_compute(at_element(m.data, dtype, image * m.stride), dtype, n, buffer);
}

// 1 + scale, in `target`.
template <typename T>
void scale_factor(const AdalnModulation& scale, c10::ScalarType dtype, int64_t image, int64_t n, T* target) {
  const T* value = modulation(scale, dtype, image, n, target);
  for (int64_t i = 0; i < n; ++i) target[i] = T(1) + value[i];
}

template <typename T>
T inverse_deviation(T squares, int64_t n, double eps) {
  return T(1) / std::sqrt(squares / static_cast<T>(n) + static_cast<T>(eps));
}

// What the tangents of a token are made of.
template <typename T>
struct TangentRows {
  T *dx, *dy, *dz, *dh, *dgate, *dshift, *dscale;                                       // buffers
  const T *gate_tangent = nullptr, *shift_tangent = nullptr, *scale_tangent = nullptr;  // of the image

  explicit TangentRows(Scratch<T>& rows)
      : dx(rows.row()),
        dy(rows.row()),
        dz(rows.row()),
        dh(rows.row()),
        dgate(rows.row()),
        dshift(rows.row()),
        dscale(rows.row()) {}

  void read(const AdalnArgs& args, int64_t image) {
    const int64_t n = args.features;
    if (args.y) gate_tangent = modulation(args.dgate, args.modulation_dtype, image, n, dgate);
    shift_tangent = modulation(args.dshift, args.modulation_dtype, image, n, dshift);
    scale_tangent = modulation(args.dscale, args.modulation_dtype, image, n, dscale);
  }
};

// Writes the tangents of a token, of which the norm is (z - mean) rstd.
template <typename T>
void tangents_of(const AdalnArgs& args, const TangentRows<T>& rows, int64_t token, const T* z, const T* y,
                 const T* gate, const T* factor, const Vectorized<T>& mean, T inverse) {
  using Vec = Vectorized<T>;
  const int64_t n = args.features;
  const T* dz = as_compute(at_element(args.dx, args.x_dtype, token * n), args.x_dtype, n, rows.dx);
  T total;
  if (args.y) {
    const T *dx = dz, *dy = as_compute(at_element(args.dy, args.y_dtype, token * n), args.y_dtype, n, rows.dy);
    void* dz_end = at_element(args.dz, args.x_dtype, token * n);
    T* dz_out = compute_target(dz_end, args.x_dtype, rows.dz);
    total = sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec value = Vec::loadu(dx + i, count) +
                        Vec::loadu(rows.gate_tangent + i, count) * Vec::loadu(y + i, count) +
                        Vec::loadu(gate + i, count) * Vec::loadu(dy + i, count);
      value.store(dz_out + i, count);
      return value;
    });
    finish(dz_out, dz_end, args.x_dtype, n);
    dz = dz_out;
  } else {
    total =
        sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) { return Vec::loadu(dz + i, count); });
  }
  const Vec dmean(total / static_cast<T>(n)), rstd(inverse);
  const T product = sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
    return (Vec::loadu(z + i, count) - mean) * (Vec::loadu(dz + i, count) - dmean);
  });
  const Vec slope(product * inverse / static_cast<T>(n));  // mean(n c)
  void* dh_end = at_element(args.dh, args.y_dtype, token * n);
  T* dh = compute_target(dh_end, args.y_dtype, rows.dh);
  for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const Vec normalised = (Vec::loadu(z + i, count) - mean) * rstd, centred = Vec::loadu(dz + i, count) - dmean;
    (rstd * (centred - normalised * slope) * Vec::loadu(factor + i, count) +
     normalised * Vec::loadu(rows.scale_tangent + i, count) + Vec::loadu(rows.shift_tangent + i, count))
        .store(dh + i, count);
  });
  finish(dh, dh_end, args.y_dtype, n);
}

template <typename T>
void forward_as(const AdalnArgs& args, void* scratch, int64_t begin, int64_t end) {
  using Vec = Vectorized<T>;
  const int64_t n = args.features;
  Scratch<T> rows{static_cast<T*>(scratch), args.row};
  T *x_row = rows.row(), *y_row = rows.row(), *z_row = rows.row(), *h_row = rows.row();
  T *gate_row = rows.row(), *shift_row = rows.row(), *factor = rows.row();
  TangentRows<T> tangents(rows);
  const T *gate = nullptr, *shift = nullptr, *y = nullptr;
  for (int64_t token = begin; token < end; ++token) {
    if (token == begin || token % args.tokens == 0) {
      const int64_t image = token / args.tokens;
      if (args.y) gate = modulation(args.gate, args.modulation_dtype, image, n, gate_row);
      shift = modulation(args.shift, args.modulation_dtype, image, n, shift_row);
      scale_factor(args.scale, args.modulation_dtype, image, n, factor);
      if (args.dh) tangents.read(args, image);
    }
    const T* x = as_compute(at_element(args.x, args.x_dtype, token * n), args.x_dtype, n, x_row);
    const T* z = x;
    T total;
    if (args.y) {
      y = as_compute(at_element(args.y, args.y_dtype, token * n), args.y_dtype, n, y_row);
      void* z_end = at_element(args.z, args.x_dtype, token * n);
      T* z_out = compute_target(z_end, args.x_dtype, z_row);
      total = sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Vec value = Vec::loadu(x + i, count) + Vec::loadu(gate + i, count) * Vec::loadu(y + i, count);
        value.store(z_out + i, count);
        return value;
      });
      finish(z_out, z_end, args.x_dtype, n);
      z = z_out;
    } else {
      total =
          sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) { return Vec::loadu(x + i, count); });
    }
    const Vec mean(total / static_cast<T>(n));
    const T squares = sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec centred = Vec::loadu(z + i, count) - mean;
      return centred * centred;
    });
    const T inverse = inverse_deviation(squares, n, args.eps);
    const Vec rstd(inverse);
    void* h_end = at_element(args.h, args.y_dtype, token * n);
    T* h = compute_target(h_end, args.y_dtype, h_row);
    for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec normalised = (Vec::loadu(z + i, count) - mean) * rstd;
      (normalised * Vec::loadu(factor + i, count) + Vec::loadu(shift + i, count)).store(h + i, count);
    });
    finish(h, h_end, args.y_dtype, n);
    if (args.dh) tangents_of(args, tangents, token, z, y, gate, factor, mean, inverse);
  }
}

// Adds to the numbers at `target`.
template <typename T, typename Count>
[[gnu::always_inline]] inline void accumulate(T* target, const Vectorized<T>& value, Count count) {
  (Vectorized<T>::loadu(target, count) + value).store(target, count);
}

template <typename T>
void backward_as(const AdalnBwdArgs& args, void* scratch, int64_t begin, int64_t end) {
  using Vec = Vectorized<T>;
  const int64_t n = args.features, pieces = (args.tokens + kAdalnTokens - 1) / kAdalnTokens, kinds = args.y ? 3 : 2;
  Scratch<T> rows{static_cast<T*>(scratch), args.row};
  T *z_row = rows.row(), *y_row = rows.row(), *grad_z_row = rows.row(), *grad_h_row = rows.row();
  T *grad_x_row = rows.row(), *grad_y_row = rows.row(), *gate_row = rows.row(), *factor = rows.row();
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t image = piece / pieces, first = piece % pieces * kAdalnTokens;
    const int64_t last = first + kAdalnTokens < args.tokens ? first + kAdalnTokens : args.tokens;
    T* sums = static_cast<T*>(args.partial) + piece * kinds * n;
    for (int64_t i = 0; i < kinds * n; ++i) sums[i] = T(0);
    T *gate_sum = sums, *shift_sum = sums + (kinds - 2) * n, *scale_sum = shift_sum + n;
    const T* gate = args.y ? modulation(args.gate, args.modulation_dtype, image, n, gate_row) : nullptr;
    scale_factor(args.scale, args.modulation_dtype, image, n, factor);
    for (int64_t token = image * args.tokens + first; token < image * args.tokens + last; ++token) {
      const auto read = [&](const void* data, c10::ScalarType dtype, T* buffer) {
        return as_compute(at_element(data, dtype, token * n), dtype, n, buffer);
      };
      const T *z = read(args.z, args.x_dtype, z_row), *up = read(args.grad_h, args.y_dtype, grad_h_row);
      const T total =
          sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) { return Vec::loadu(z + i, count); });
      const Vec mean(total / static_cast<T>(n));
      const auto sum = sums_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Vec centred = Vec::loadu(z + i, count) - mean;
        const Vec scaled = Vec::loadu(up + i, count) * Vec::loadu(factor + i, count);
        return Three<Vec>{centred * centred, scaled, scaled * centred};
      });
      const T inverse = inverse_deviation(sum.square, n, args.eps);
      const Vec rstd(inverse), up_mean(sum.up / static_cast<T>(n)), slope(sum.product * inverse / static_cast<T>(n));
      void* grad_x_end = at_element(args.grad_x, args.x_dtype, token * n);
      T* grad_x = compute_target(grad_x_end, args.x_dtype, grad_x_row);
      // The gradient to z of the norm; the sums of shift and scale on the way.
      const auto norm_gradient = [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Vec normalised = (Vec::loadu(z + i, count) - mean) * rstd, above = Vec::loadu(up + i, count);
        accumulate(shift_sum + i, above, count);
        accumulate(scale_sum + i, above * normalised, count);
        return rstd * (above * Vec::loadu(factor + i, count) - up_mean - normalised * slope);
      };
      if (args.y) {
        const T *y = read(args.y, args.y_dtype, y_row), *grad_z = read(args.grad_z, args.x_dtype, grad_z_row);
        void* grad_y_end = at_element(args.grad_y, args.y_dtype, token * n);
        T* grad_y = compute_target(grad_y_end, args.y_dtype, grad_y_row);
        for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Vec sum_of_both = Vec::loadu(grad_z + i, count) + norm_gradient(i, count);
          sum_of_both.store(grad_x + i, count);
          (Vec::loadu(gate + i, count) * sum_of_both).store(grad_y + i, count);
          accumulate(gate_sum + i, sum_of_both * Vec::loadu(y + i, count), count);
        });
        finish(grad_y, grad_y_end, args.y_dtype, n);
      } else {
        for_vectors<T>(n, [&](int64_t i, auto count)
                              __attribute__((always_inline)) { norm_gradient(i, count).store(grad_x + i, count); });
      }
      finish(grad_x, grad_x_end, args.x_dtype, n);
    }
  }
}

template <typename T>
void sum_as(const AdalnSumArgs& args, void* scratch, int64_t begin, int64_t end) {
  const int64_t n = args.features;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index / args.kinds, kind = index % args.kinds;
    T* total = static_cast<T*>(scratch);
    for (int64_t i = 0; i < n; ++i) total[i] = T(0);
    for (int64_t piece = row * args.pieces; piece < (row + 1) * args.pieces; ++piece) {
      const T* part = static_cast<const T*>(args.partial) + (piece * args.kinds + kind) * n;
      for (int64_t i = 0; i < n; ++i) total[i] += part[i];
    }
    void* target = at_element(args.out[kind], args.modulation_dtype, row * n);
    finish(total, target, args.modulation_dtype, n);
  }
}

void forward(const AdalnArgs& args, void* scratch, int64_t begin, int64_t end) {
  args.x_dtype == c10::kDouble ? forward_as<double>(args, scratch, begin, end)
                               : forward_as<float>(args, scratch, begin, end);
}

void backward(const AdalnBwdArgs& args, void* scratch, int64_t begin, int64_t end) {
  args.x_dtype == c10::kDouble ? backward_as<double>(args, scratch, begin, end)
                               : backward_as<float>(args, scratch, begin, end);
}

void sum(const AdalnSumArgs& args, void* scratch, int64_t begin, int64_t end) {
  args.compute_dtype == c10::kDouble ? sum_as<double>(args, scratch, begin, end)
                                     : sum_as<float>(args, scratch, begin, end);
}

}  // namespace

namespace CPU_CAPABILITY {
const AdalnFunctions adaln_functions{forward, backward, sum};
}

}  // namespace imm

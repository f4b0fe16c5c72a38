// Loops over the vectors of a row of numbers, and sums over it.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace imm {
namespace {

using at::vec::Vectorized;

// f(first, count) for vectors that cover n numbers; count is a constant for all but the last.
template <typename T, typename F>
[[gnu::always_inline]] inline void for_vectors(int64_t n, const F& f) {
  constexpr int64_t kLanes = Vectorized<T>::size();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>{});
  if (i < n) f(i, n - i);
}

template <typename T>
T sum_lanes(const Vectorized<T>& v) {
  constexpr int kLanes = Vectorized<T>::size();
  T lane[kLanes];
  v.store(lane);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

// v where count lanes are asked for, 0 elsewhere.
template <typename T>
Vectorized<T> first_lanes(const Vectorized<T>& v, int64_t count) {
  return Vectorized<T>::set(Vectorized<T>(T(0)), v, count);
}

// The sum of the vectors f(first, count); four at a time, since an addition waits for the one before.
template <typename T, typename F>
[[gnu::always_inline]] inline T sum_of(int64_t n, const F& f) {
  using Vec = Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  constexpr std::integral_constant<int64_t, kLanes> kAll{};
  Vec a(T(0)), b(T(0)), c(T(0)), d(T(0));
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = a + f(i, kAll);
    b = b + f(i + kLanes, kAll);
    c = c + f(i + 2 * kLanes, kAll);
    d = d + f(i + 3 * kLanes, kAll);
  }
  for (; i + kLanes <= n; i += kLanes) a = a + f(i, kAll);
  if (i < n) b = b + first_lanes<T>(f(i, n - i), n - i);
  return sum_lanes<T>((a + b) + (c + d));
}

}  // namespace
}  // namespace imm

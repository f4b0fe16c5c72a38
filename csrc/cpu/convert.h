// Rows of any of the four dtypes seen as the dtype that arithmetic runs in.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

namespace imm {
namespace {

using at::vec::Vectorized;

inline int64_t element_size(c10::ScalarType dtype) { return dtype == c10::kDouble ? 8 : dtype == c10::kFloat ? 4 : 2; }

// The address of element `offset` of an array of `dtype`.
inline const void* at_element(const void* data, c10::ScalarType dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * element_size(dtype);
}

inline void* at_element(void* data, c10::ScalarType dtype, int64_t offset) {
  return static_cast<char*>(data) + offset * element_size(dtype);
}

template <typename Narrow>
void widen(const Narrow* source, float* target, int64_t n) {
  constexpr int64_t kLanes = Vectorized<Narrow>::size();
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const auto narrow = Vectorized<Narrow>::loadu(source + i, count);
    const auto [low, high] = at::vec::convert_to_float<Narrow>(narrow);
    const int64_t half = count < kLanes / 2 ? count : kLanes / 2;
    low.store(target + i, half);
    if (count > half) high.store(target + i + half, count - half);
  }
}

template <typename Narrow>
void narrow(const float* source, Narrow* target, int64_t n) {
  constexpr int64_t kLanes = Vectorized<Narrow>::size();
  using Wide = Vectorized<float>;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const int64_t half = count < kLanes / 2 ? count : kLanes / 2;
    const Wide low = Wide::loadu(source + i, half);
    const Wide high = count > half ? Wide::loadu(source + i + half, count - half) : Wide(0.0f);
    at::vec::convert_from_float<Narrow>(low, high).store(target + i, count);
  }
}

template <typename To, typename From>
void cast(const From* source, To* target, int64_t n) {
  if constexpr (std::is_same_v<To, float> && sizeof(From) == 2) {
    widen(source, target, n);
  } else if constexpr (std::is_same_v<From, float> && sizeof(To) == 2) {
    narrow(source, target, n);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = static_cast<To>(source[i]);
  }
}

// Calls f with a null pointer to the type of a dtype.
template <typename F>
void with_pointer(c10::ScalarType dtype, const F& f) {
  if (dtype == c10::kBFloat16) return f(static_cast<c10::BFloat16*>(nullptr));
  if (dtype == c10::kHalf) return f(static_cast<c10::Half*>(nullptr));
  dtype == c10::kFloat ? f(static_cast<float*>(nullptr)) : f(static_cast<double*>(nullptr));
}

// n elements at `source` as T: `source` itself where it holds T, else converted into `buffer`.
template <typename T>
const T* as_compute(const void* source, c10::ScalarType dtype, int64_t n, T* buffer) {
  if (dtype == c10::CppTypeToScalarType<T>::value) return static_cast<const T*>(source);
  with_pointer(dtype,
               [&](auto of) { cast(static_cast<const std::remove_pointer_t<decltype(of)>*>(source), buffer, n); });
  return buffer;
}

// Where to compute n elements of T that end in `target`: `target` itself where it holds T, else `buffer`.
template <typename T>
T* compute_target(void* target, c10::ScalarType dtype, T* buffer) {
  return dtype == c10::CppTypeToScalarType<T>::value ? static_cast<T*>(target) : buffer;
}

// Brings what compute_target gave to its dtype.
template <typename T>
void finish(const T* computed, void* target, c10::ScalarType dtype, int64_t n) {
  if (computed == target) return;
  with_pointer(dtype, [&](auto of) { cast(computed, static_cast<decltype(of)>(target), n); });
}

}  // namespace
}  // namespace imm

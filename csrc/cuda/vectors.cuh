// Number types, coefficients and the memory accesses of one chunk: 16 bytes at a time, or one element at a time with a
// bound.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../per_image.h"

namespace imm::cuda {

// Arithmetic is in float64 for a float64 state and in float32 for everything narrower.
template <typename State>
using Accumulate = std::conditional_t<std::is_same_v<State, double>, double, float>;

// Elements per chunk for types of these sizes: 16 bytes of the narrower one, at least one Philox block of four.
template <typename A, typename B = A>
constexpr int kChunk = std::max<int>(4, 16 / std::min(sizeof(A), sizeof(B)));

template <typename To, typename From>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<From, __nv_bfloat16>) {
    return convert<To>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<From, __half>) {
    return convert<To>(__half2float(value));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

// The number of image b.
template <typename T>
__device__ __forceinline__ T at(const PerImage<T>& values, int64_t b) {
  return values.ptr[b * values.stride];
}

// The elements of chunk q that lie in the row.
template <bool kVector, int N>
__device__ __forceinline__ int count_in_row(int64_t q, int64_t D) {
  if constexpr (kVector) return N;
  return static_cast<int>(D - q * N < N ? D - q * N : N);
}

// Reads value[i] = ptr[i] for i < count, with 16-byte accesses (and count == N) where kVector; the rest is 0.
template <bool kVector, typename T, typename Acc, int N>
__device__ __forceinline__ void load_chunk(const T* __restrict__ ptr, int count, Acc (&value)[N]) {
  if constexpr (kVector) {
    constexpr int kLanes = 16 / sizeof(T);
    static_assert(N % kLanes == 0);
#pragma unroll
    for (int i = 0; i < N; i += kLanes) {
      const uint4 words = *reinterpret_cast<const uint4*>(ptr + i);
      T lanes[kLanes];
      memcpy(lanes, &words, sizeof(words));
#pragma unroll
      for (int j = 0; j < kLanes; ++j) value[i + j] = convert<Acc>(lanes[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = i < count ? convert<Acc>(ptr[i]) : Acc(0);
  }
}

// Writes ptr[i] = value[i] for i < count, with 16-byte accesses (and count == N) where kVector.
template <bool kVector, typename T, typename Acc, int N>
__device__ __forceinline__ void store_chunk(T* __restrict__ ptr, int count, const Acc (&value)[N]) {
  if constexpr (kVector) {
    constexpr int kLanes = 16 / sizeof(T);
    static_assert(N % kLanes == 0);
#pragma unroll
    for (int i = 0; i < N; i += kLanes) {
      T lanes[kLanes];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) lanes[j] = convert<T>(value[i + j]);
      uint4 words;
      memcpy(&words, lanes, sizeof(words));
      __stwb(reinterpret_cast<uint4*>(ptr + i), words);  // as one access, which the compiler splits where more follows
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) ptr[i] = convert<T>(value[i]);
    }
  }
}

}  // namespace imm::cuda

// Launching elementwise kernels over [B, D] rows; no torch headers. launch.h is the torch side (device guard, stream,
// errors).
//
// A row is worked on in chunks of a few elements: one chunk per thread and iteration, grid-stride in both directions,
// 64-bit offsets. Rows are a grid dimension of their own, so that what belongs to a row (coefficients, seed) is read
// once per row and no thread divides an offset.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace imm::cuda {

constexpr int kMaxThreads = 256;
constexpr int64_t kWarp = 32;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// True where 16-byte accesses are allowed: a null pointer (an absent tensor) counts as aligned.
template <typename... Pointers>
bool aligned16(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Starts kernel(args...) on rows x chunks; nothing to do is success. Returns the launch error, if any.
template <typename... Params, typename... Args>
cudaError_t launch_rows(void (*kernel)(Params...), int64_t rows, int64_t chunks, cudaStream_t stream,
                        const Args&... args) {
  if (rows == 0 || chunks == 0) return cudaSuccess;
  const int64_t threads = std::min<int64_t>(kMaxThreads, ceil_div(chunks, kWarp) * kWarp);
  const dim3 grid(static_cast<unsigned>(std::min(ceil_div(chunks, threads), kMaxGridX)),
                  static_cast<unsigned>(std::min(rows, kMaxGridY)));
  kernel<<<grid, static_cast<unsigned>(threads), 0, stream>>>(args...);
  return cudaGetLastError();
}

// Calls launch(std::true_type or std::false_type): a run-time choice between two kernels.
template <typename Launch>
cudaError_t with_flag(bool flag, Launch&& launch) {
  return flag ? launch(std::true_type{}) : launch(std::false_type{});
}

// Calls row(b) for this block's rows.
template <typename Row>
__device__ __forceinline__ void for_each_row(int64_t rows, Row&& row) {
  for (int64_t b = blockIdx.y; b < rows; b += gridDim.y) row(b);
}

// Calls chunk(q) for this thread's chunks of a row.
template <typename Chunk>
__device__ __forceinline__ void for_each_chunk(int64_t chunks, Chunk&& chunk) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; q < chunks; q += stride) chunk(q);
}

}  // namespace imm::cuda

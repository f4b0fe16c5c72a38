// Normals by image seed, scale times n of ../philox.h: seeds [B] -> normal [B, D] float32, written once, 16 bytes at a
// time where rows allow it; a chunk of a row per thread.
#include "launch.cuh"
#include "noise.h"
#include "normals.cuh"
#include "vectors.cuh"

namespace imm::cuda {
namespace {

template <bool kVector>
__global__ void __launch_bounds__(kMaxThreads) noise_kernel(const Noise p) {
  constexpr int N = kChunk<float>;
  for_each_row(p.B, [&](int64_t b) {
    const uint64_t seed = static_cast<uint64_t>(at(p.seeds, b));
    for_each_chunk(ceil_div(p.D, N), [&](int64_t q) {
      float n[N];
      normals(seed, p.step, q, n);
#pragma unroll
      for (int i = 0; i < N; ++i) n[i] *= p.scale;
      store_chunk<kVector>(p.normal + b * p.D + q * N, count_in_row<kVector, N>(q, p.D), n);
    });
  });
}

}  // namespace

cudaError_t launch_noise_kernel(const Noise& p, cudaStream_t stream) {
  constexpr int N = kChunk<float>;
  return with_flag(p.D % N == 0 && aligned16(p.normal), [&](auto wide) {
    return launch_rows(noise_kernel<decltype(wide)::value>, p.B, ceil_div(p.D, N), stream, p);
  });
}

}  // namespace imm::cuda

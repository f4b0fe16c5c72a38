// The Philox noise of a chunk of a row, for the kernels that draw or add it. ../philox.h has the definition.
#pragma once

#include "../philox.h"

namespace imm::cuda {

// n of chunk q, rounded to float32 as imm::noise returns it.
template <int N>
__device__ __forceinline__ void normals(uint64_t seed, uint64_t step, int64_t q, float (&n)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const NormalBlock block = philox_normals(philox_block(seed, step, static_cast<uint64_t>(q * (N / 4) + i / 4)));
#pragma unroll
    for (int j = 0; j < 4; ++j) n[i + j] = static_cast<float>(block.value[j]);
  }
}

}  // namespace imm::cuda

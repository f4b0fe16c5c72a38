// Philox4x32-10 and the mapping from its words to normals: the one definition for C++ and CUDA.
//
// Element e of an image at a sampling step takes lane e % 4 of the block with
//     key     = (seed low 32 bits, seed high 32 bits)
//     counter = (q low, q high, step low, step high),  q = e / 4
// and lanes (a, b) of a block, (0, 1) and (2, 3), become two normals by Box-Muller in float64:
//     radius = sqrt(-2 log((r_a + 1/2) / 2^32)),  angle = 2 pi (r_b + 1/2) / 2^32,
//     n_a = radius cos(angle), n_b = radius sin(angle).
// python/imm/ops/noise.py is the reference. No torch headers: device code includes this file.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define IMM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IMM_HOST_DEVICE inline
#endif

namespace imm {

struct PhiloxBlock {
  uint32_t word[4];
};

struct NormalBlock {
  double value[4];
};

// One round: c0, c2 are multiplied into 64 bits; high halves mix with the other words and the key.
IMM_HOST_DEVICE PhiloxBlock philox_round(PhiloxBlock c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = 0xD2511F53ull * c.word[0];
  const uint64_t p1 = 0xCD9E8D57ull * c.word[2];
  return {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(p1),
           static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(p0)}};
}

// The ten-round block of (seed, step) at element block q.
IMM_HOST_DEVICE PhiloxBlock philox_block(uint64_t seed, uint64_t step, uint64_t q) {
  PhiloxBlock c{{static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), static_cast<uint32_t>(step),
                 static_cast<uint32_t>(step >> 32)}};
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    c = philox_round(c, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The four normals of a block, in element order.
IMM_HOST_DEVICE NormalBlock philox_normals(PhiloxBlock r) {
  constexpr double kUnit = 1.0 / 4294967296.0;
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  NormalBlock n;
  for (int pair = 0; pair < 2; ++pair) {
    const double radius = sqrt(-2.0 * log((r.word[2 * pair] + 0.5) * kUnit));
    const double angle = kTwoPi * ((r.word[2 * pair + 1] + 0.5) * kUnit);
#if defined(__CUDA_ARCH__)
    // True of every angle here; it drops the reduction of large angles, which costs a stack frame and spills.
    __builtin_assume(fabs(angle) < 7.0);
#endif
    n.value[2 * pair] = radius * cos(angle);
    n.value[2 * pair + 1] = radius * sin(angle);
  }
  return n;
}

}  // namespace imm

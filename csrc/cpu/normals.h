// Philox normals in vectors: the numbers of philox.h, with at::vec's logarithm, sine and cosine.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "../philox.h"

namespace imm {
namespace {

// The n normals of (seed, step) from element `first` on, which starts a Philox block.
inline void normals(uint64_t seed, uint64_t step, int64_t first, int64_t n, float* out) {
  using V = at::vec::Vectorized<double>;
  constexpr int64_t kBlocks = 64;  // per batch
  constexpr int64_t kPairs = 2 * kBlocks;
  constexpr double kUnit = 1.0 / 4294967296.0;
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  double u[kPairs], v[kPairs];
  float value[2 * kPairs];
  for (int64_t start = 0; start < n; start += 4 * kBlocks) {
    for (int64_t b = 0; b < kBlocks; ++b) {
      const PhiloxBlock block = philox_block(seed, step, static_cast<uint64_t>((first + start) / 4 + b));
      for (int64_t pair = 0; pair < 2; ++pair) {
        u[2 * b + pair] = (block.word[2 * pair] + 0.5) * kUnit;
        v[2 * b + pair] = (block.word[2 * pair + 1] + 0.5) * kUnit;
      }
    }
    for (int64_t i = 0; i < kPairs; i += V::size()) {
      const V radius = (V(-2.0) * V::loadu(u + i).log()).sqrt();
      const V angle = V(kTwoPi) * V::loadu(v + i);
      (radius * angle.cos()).store(u + i);
      (radius * angle.sin()).store(v + i);
    }
    for (int64_t i = 0; i < kPairs; ++i) {
      value[2 * i] = static_cast<float>(u[i]);
      value[2 * i + 1] = static_cast<float>(v[i]);
    }
    const int64_t count = n - start < 4 * kBlocks ? n - start : 4 * kBlocks;
    for (int64_t i = 0; i < count; ++i) out[start + i] = value[i];
  }
}

}  // namespace
}  // namespace imm

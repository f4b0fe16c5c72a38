// imm::energy_score on the CPU: the interface between checks (energy_score.cpp) and loops (cpu/energy_score.cpp).
//
//     loss_g     = f_g [c sum_jm d(x_j, y_m) - 2 a sum_{j < k} d(x_j, x_k)],  c = 2 / (N M)
//     dloss/dx_j = f_g [c sum_m s_jm (x_j - y_m) - 2 a sum_k s_jk (x_j - x_k)],  s = d'(r) / r, 0 at distance 0
// d = scale r for the energy kernel, else 1 - k of mmd.h; python/imm/ops/energy_score.py is the reference. Differences
// and sums over features are float32 (float64 for float64), the loss of a group and what is done with a distance
// float64.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "capability.h"
#include "mmd.h"
#include "per_image.h"

namespace imm {

// [G, rows, D] of any strides, in elements.
struct ScoreRows {
  void* data;
  c10::ScalarType dtype;
  int64_t group_stride;
  int64_t row_stride;
  int64_t feature_stride;
};

struct EnergyScoreArgs {
  bool wide;  // arithmetic in float64
  int64_t N, M, D;
  ScoreRows x, y;     // y: or the mean, of one row
  ScoreRows log_std;  // data is null where targets are given
  int64_t seed;       // of group 0
  MmdKernelArgs kernel;
  PerImage<double> scale, weight;  // null for 1
  double factor, pair;             // a
  void* loss;                      // [G] in the arithmetic dtype
  ScoreRows grad;
};

constexpr int64_t kScoreLane = 64 / 4;      // rows are padded to a multiple of it, which every vector divides
constexpr int64_t kScoreDraws = 512;        // numbers drawn at a time, or a row
constexpr int64_t kScoreLineMembers = 64;   // most members of a line
constexpr int64_t kScoreLineGroups = 1024;  // of a line that are worked on at a time

// Elements of the arithmetic dtype that a thread needs.
inline int64_t score_space(const EnergyScoreArgs& a) {
  const int64_t stride = (a.D + kScoreLane - 1) / kScoreLane * kScoreLane;
  return (2 * a.N + 3) * stride + std::max(kScoreDraws, a.D);
}

inline int64_t line_space(const EnergyScoreArgs& a) { return (2 * a.N + a.M + 2) * kScoreLineGroups; }

struct EnergyScoreFunctions {
  // Groups [begin, end) on the calling thread, with space of its own.
  void (*groups)(const EnergyScoreArgs& args, void* space, int64_t begin, int64_t end);
  // The same for D = 1 and the energy kernel, given targets and up to kScoreLineMembers members: groups lie side by
  // side.
  void (*lines)(const EnergyScoreArgs& args, void* space, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const EnergyScoreFunctions energy_score_functions)

// imm::timestep_embedding on the CPU: the interface between checks (timestep_embedding.cpp) and loops
// (cpu/timestep_embedding.cpp). Phases, sinusoids and sums are float64.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "capability.h"

namespace imm {

struct TimestepTimes {
  c10::ScalarType dtype;
  const void* data;
  int64_t stride;  // in elements
};

constexpr int64_t kTimestepRows = 4;  // rows of `half` numbers that a task may keep

struct TimestepArgs {
  c10::ScalarType dtype;  // of the embedding
  int64_t images, half;
  TimestepTimes times[2];     // t, s
  const double* frequencies;  // [half]
  void* out;                  // [2, images, 2 half]
  // Of the times and of the embedding; null: none is asked for.
  TimestepTimes tangents[2]{};
  void* tangent = nullptr;
};

struct TimestepBwdArgs {
  c10::ScalarType dtype;
  int64_t images, half;
  TimestepTimes times[2];
  const double* frequencies;
  const void* grad;    // [2, images, 2 half]
  void* grad_time[2];  // [images] of each time's dtype
};

struct TimestepFunctions {
  // Rows [begin, end) of the 2 B of the embedding; scratch: kTimestepRows rows.
  void (*forward)(const TimestepArgs& args, double* scratch, int64_t begin, int64_t end);
  void (*backward)(const TimestepBwdArgs& args, double* scratch, int64_t begin, int64_t end);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const TimestepFunctions timestep_functions)

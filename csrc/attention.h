// imm::timestep_attention_jvp on the CPU: the interface between products (attention.cpp) and softmax
// (cpu/attention.cpp).
//
//   P = softmax(S), lse = log sum_j exp(S_j), dlse = rowsum(P dS), dP = P (dS - dlse)
#pragma once

#include <cstdint>

#include "capability.h"

namespace imm {

struct AttentionRows {
  bool wide;  // float64, else float32
  int64_t queries, keys;
  void* scores;      // [queries, keys] S, which become P
  void* slopes;      // [queries, keys] dS, which become dP
  void *lse, *dlse;  // [queries]
};

struct AttentionFunctions {
  void (*softmax)(const AttentionRows& args);
};

}  // namespace imm

IMM_FOR_EACH_CAPABILITY(extern const AttentionFunctions attention_functions)

// The softmax of imm::timestep_attention_jvp, compiled once per instruction set (see capability.h).
#include "../attention.h"

#include <ATen/cpu/vec/functional.h>

#include <cmath>

#include "sums.h"

namespace imm {
namespace {

template <typename T>
void softmax_as(const AttentionRows& args) {
  using Vec = Vectorized<T>;
  const int64_t n = args.keys;
  for (int64_t row = 0; row < args.queries; ++row) {
    T *const p = static_cast<T*>(args.scores) + row * n, *const slopes = static_cast<T*>(args.slopes) + row * n;
    const T largest = at::vec::reduce_all<T>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, p, n);
    const Vec shift(largest);
    const T total = sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec value = (Vec::loadu(p + i, count) - shift).exp();
      value.store(p + i, count);
      return value;
    });
    const Vec share(T(1) / total);
    const T mean = sum_of<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec value = Vec::loadu(p + i, count) * share;
      value.store(p + i, count);
      return value * Vec::loadu(slopes + i, count);
    });
    const Vec centre(mean);
    for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      (Vec::loadu(p + i, count) * (Vec::loadu(slopes + i, count) - centre)).store(slopes + i, count);
    });
    static_cast<T*>(args.lse)[row] = largest + std::log(total);
    static_cast<T*>(args.dlse)[row] = mean;
  }
}

void softmax(const AttentionRows& args) { args.wide ? softmax_as<double>(args) : softmax_as<float>(args); }

}  // namespace

namespace CPU_CAPABILITY {
const AttentionFunctions attention_functions{softmax};
}

}  // namespace imm

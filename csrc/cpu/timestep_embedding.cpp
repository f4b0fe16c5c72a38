// The loops of imm::timestep_embedding, compiled once per instruction set (see capability.h).
#include "../timestep_embedding.h"

#include "convert.h"

namespace imm {
namespace {

using Vec = Vectorized<double>;
constexpr int64_t kLanes = Vec::size();

double time_of(const TimestepTimes& times, int64_t image) {
  double buffer;
  return *as_compute(at_element(times.data, times.dtype, image * times.stride), times.dtype, 1, &buffer);
}

void forward(const TimestepArgs& args, double* scratch, int64_t begin, int64_t end) {
  const int64_t half = args.half;
  for (int64_t row = begin; row < end; ++row) {
    const Vec time(time_of(args.times[row / args.images], row % args.images));
    void* target = at_element(args.out, args.dtype, row * 2 * half);
    double* out = compute_target(target, args.dtype, scratch);
    void* tangent_target = args.tangent ? at_element(args.tangent, args.dtype, row * 2 * half) : nullptr;
    double* tangent = args.tangent ? compute_target(tangent_target, args.dtype, scratch + 2 * half) : nullptr;
    const Vec rate(args.tangent ? time_of(args.tangents[row / args.images], row % args.images) : 0.0);
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i < kLanes ? half - i : kLanes;
      const Vec frequency = Vec::loadu(args.frequencies + i, count), phase = time * frequency;
      const Vec cos = phase.cos(), sin = phase.sin();
      cos.store(out + i, count);
      sin.store(out + half + i, count);
      if (!args.tangent) continue;
      (sin.neg() * rate * frequency).store(tangent + i, count);
      (cos * rate * frequency).store(tangent + half + i, count);
    }
    finish(out, target, args.dtype, 2 * half);
    if (args.tangent) finish(tangent, tangent_target, args.dtype, 2 * half);
  }
}

void backward(const TimestepBwdArgs& args, double* scratch, int64_t begin, int64_t end) {
  const int64_t half = args.half;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row % args.images;
    const TimestepTimes& times = args.times[row / args.images];
    const Vec time(time_of(times, image));
    const double* up = as_compute(at_element(args.grad, args.dtype, row * 2 * half), args.dtype, 2 * half, scratch);
    Vec sum(0.0);
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i < kLanes ? half - i : kLanes;
      const Vec frequency = Vec::loadu(args.frequencies + i, count), phase = time * frequency;
      const Vec up_cos = Vec::loadu(up + i, count), up_sin = Vec::loadu(up + half + i, count);
      const Vec term = (phase.cos() * up_sin - phase.sin() * up_cos) * frequency;
      sum = sum + Vec::set(Vec(0.0), term, count);
    }
    double lane[kLanes], total = 0;
    sum.store(lane);
    for (const double value : lane) total += value;
    void* target = at_element(args.grad_time[row / args.images], times.dtype, image);
    double* out = compute_target(target, times.dtype, &total);
    *out = total;
    finish(out, target, times.dtype, 1);
  }
}

}  // namespace

namespace CPU_CAPABILITY {
const TimestepFunctions timestep_functions{forward, backward};
}

}  // namespace imm

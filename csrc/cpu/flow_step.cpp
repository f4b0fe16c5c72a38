// The loops of imm::flow_step, compiled once per instruction set (see capability.h).
#include "../flow_step.h"

#include <cstring>

#include "convert.h"
#include "normals.h"

namespace imm {
namespace {

template <typename T>
T coefficient(const PerImage<double>& c, int64_t image) {
  return static_cast<T>(c.ptr[image * c.stride]);
}

// Calls f(image, first element, count) for pieces [begin, end).
template <typename F>
void for_pieces(int64_t numel, int64_t begin, int64_t end, const F& f) {
  const int64_t pieces = (numel + kFlowBlock - 1) / kFlowBlock;  // per image
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / pieces, first = i % pieces * kFlowBlock;
    f(image, first, numel - first < kFlowBlock ? numel - first : kFlowBlock);
  }
}

template <typename T>
void forward_as(const FlowStepArgs& args, int64_t begin, int64_t end) {
  T x_buffer[kFlowBlock], g_buffer[kFlowBlock], uncond_buffer[kFlowBlock], out_buffer[kFlowBlock];
  float normal[kFlowBlock];
  for_pieces(args.numel, begin, end, [&](int64_t image, int64_t first, int64_t n) {
    const int64_t offset = image * args.numel + first;
    const T* x = as_compute(at_element(args.x, args.x_dtype, offset), args.x_dtype, n, x_buffer);
    const T* g = as_compute(at_element(args.g, args.g_dtype, offset), args.g_dtype, n, g_buffer);
    if (args.g_uncond) {
      const T* base = as_compute(at_element(args.g_uncond, args.g_dtype, offset), args.g_dtype, n, uncond_buffer);
      const T w = coefficient<T>(args.guidance, image);
      for (int64_t i = 0; i < n; ++i) g_buffer[i] = base[i] + w * (g[i] - base[i]);
      g = g_buffer;
    }
    void* target = at_element(args.out, args.x_dtype, offset);
    T* out = compute_target(target, args.x_dtype, out_buffer);
    const T c_skip = coefficient<T>(args.c_skip, image), c_out = coefficient<T>(args.c_out, image);
    if (args.seeds.ptr) {
      const T c_noise = coefficient<T>(args.c_noise, image);
      const int64_t seed = args.seeds.ptr[image * args.seeds.stride];
      normals(static_cast<uint64_t>(seed), static_cast<uint64_t>(args.step), first, n, normal);
      for (int64_t i = 0; i < n; ++i) out[i] = c_skip * x[i] + c_out * g[i] + c_noise * static_cast<T>(normal[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = c_skip * x[i] + c_out * g[i];
    }
    finish(out, target, args.x_dtype, n);
    if (!args.input) return;
    const T* x_s = as_compute<T>(target, args.x_dtype, n, out_buffer);  // as rounded
    const T c_in = coefficient<T>(args.c_in, image);
    void* first_copy = at_element(args.input, args.g_dtype, offset);
    T* scaled = compute_target(first_copy, args.g_dtype, g_buffer);
    for (int64_t i = 0; i < n; ++i) scaled[i] = c_in * x_s[i];
    finish(scaled, first_copy, args.g_dtype, n);
    for (int64_t copy = 1; copy < args.copies; ++copy) {
      std::memcpy(at_element(args.input, args.g_dtype, offset + copy * args.block), first_copy,
                  static_cast<size_t>(n * element_size(args.g_dtype)));
    }
  });
}

template <typename T>
void backward_as(const FlowStepBwdArgs& args, int64_t begin, int64_t end) {
  T grad_buffer[kFlowBlock], out_buffer[kFlowBlock];
  for_pieces(args.numel, begin, end, [&](int64_t image, int64_t first, int64_t n) {
    const int64_t offset = image * args.numel + first;
    const T* up = as_compute(at_element(args.grad, args.x_dtype, offset), args.x_dtype, n, grad_buffer);
    const auto write = [&](void* data, c10::ScalarType dtype, const auto& value) {
      void* target = at_element(data, dtype, offset);
      T* out = compute_target(target, dtype, out_buffer);
      for (int64_t i = 0; i < n; ++i) out[i] = value(up[i]);
      finish(out, target, dtype, n);
    };
    const T c_skip = coefficient<T>(args.c_skip, image), c_out = coefficient<T>(args.c_out, image);
    write(args.grad_x, args.x_dtype, [=](T g) { return c_skip * g; });
    if (!args.grad_uncond) return write(args.grad_g, args.g_dtype, [=](T g) { return c_out * g; });
    const T w = coefficient<T>(args.guidance, image);
    write(args.grad_g, args.g_dtype, [=](T g) { return w * (c_out * g); });
    write(args.grad_uncond, args.g_dtype, [=](T g) { return (T(1) - w) * (c_out * g); });
  });
}

void forward(const FlowStepArgs& args, int64_t begin, int64_t end) {
  args.x_dtype == c10::kDouble ? forward_as<double>(args, begin, end) : forward_as<float>(args, begin, end);
}

void backward(const FlowStepBwdArgs& args, int64_t begin, int64_t end) {
  args.x_dtype == c10::kDouble ? backward_as<double>(args, begin, end) : backward_as<float>(args, begin, end);
}

}  // namespace

namespace CPU_CAPABILITY {
const FlowStepFunctions flow_step_functions{forward, backward};
}

}  // namespace imm

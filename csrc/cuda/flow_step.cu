// One step of a flow map, x_s = c_skip x + c_out (g_u + w (g - g_u)) + c_noise n (paper eq. 14, section C.5).
//
// Rows are images: x, x_s [B, D] of the state's type, g, g_u [B, D] of the network's type; coefficients float64, one
// per image or one for all, read from device memory (a captured graph follows them). n is the Philox noise of
// normals.cuh. Arithmetic is float32, float64 for a float64 state. Moves 3 B D elements, 4 with guidance, once; a chunk
// of a row per thread. For the sampling loop it also writes c_in x_s in the network's type, once or twice.
#include "flow_step.h"
#include "launch.cuh"
#include "normals.cuh"
#include "vectors.cuh"

namespace imm::cuda {
namespace {

template <typename State, typename Output, bool kHasNoise, bool kVector>
__global__ void __launch_bounds__(kMaxThreads) flow_step_fwd_kernel(const FlowStepForward p) {
  using Acc = Accumulate<State>;
  constexpr int N = kChunk<State, Output>;
  for_each_row(p.B, [&](int64_t b) {
    const Acc c_skip = convert<Acc>(at(p.c_skip, b));
    const Acc c_out = convert<Acc>(at(p.c_out, b));
    const Acc w = p.g_uncond == nullptr ? Acc(1) : convert<Acc>(at(p.guidance, b));
    const Acc c_noise = kHasNoise ? convert<Acc>(at(p.c_noise, b)) : Acc(0);
    const uint64_t seed = kHasNoise ? static_cast<uint64_t>(at(p.seeds, b)) : 0;
    for_each_chunk(ceil_div(p.D, N), [&](int64_t q) {
      const int64_t offset = b * p.D + q * N;
      const int count = count_in_row<kVector, N>(q, p.D);
      Acc x[N], g[N];
      load_chunk<kVector>(static_cast<const State*>(p.x) + offset, count, x);
      load_chunk<kVector>(static_cast<const Output*>(p.g) + offset, count, g);
      if (p.g_uncond != nullptr) {
        Acc g_uncond[N];
        load_chunk<kVector>(static_cast<const Output*>(p.g_uncond) + offset, count, g_uncond);
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = g_uncond[i] + w * (g[i] - g_uncond[i]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = c_skip * x[i] + c_out * g[i];
      if constexpr (kHasNoise) {
        float n[N];
        normals(seed, p.step, q, n);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] += c_noise * n[i];
      }
      store_chunk<kVector>(static_cast<State*>(p.x_s) + offset, count, x);
      if (p.input == nullptr) return;
      const Acc c_in = convert<Acc>(at(p.c_in, b));
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = c_in * convert<Acc>(convert<State>(x[i]));  // as it was rounded
      Output* input = static_cast<Output*>(p.input) + offset;
#pragma unroll 1
      for (int64_t copy = 0; copy < p.copies; ++copy, input += p.B * p.D) store_chunk<kVector>(input, count, x);
    });
  });
}

// grad_x = c_skip grad, grad_g = w c_out grad, grad_uncond = (1 - w) c_out grad; w = 1 without guidance.
template <typename State, typename Output, bool kVector>
__global__ void __launch_bounds__(kMaxThreads) flow_step_bwd_kernel(const FlowStepBackward p) {
  using Acc = Accumulate<State>;
  constexpr int N = kChunk<State, Output>;
  for_each_row(p.B, [&](int64_t b) {
    const Acc c_skip = convert<Acc>(at(p.c_skip, b));
    const Acc c_out = convert<Acc>(at(p.c_out, b));
    const Acc w = p.grad_uncond == nullptr ? Acc(1) : convert<Acc>(at(p.guidance, b));
    for_each_chunk(ceil_div(p.D, N), [&](int64_t q) {
      const int64_t offset = b * p.D + q * N;
      const int count = count_in_row<kVector, N>(q, p.D);
      Acc grad[N], out[N];
      load_chunk<kVector>(static_cast<const State*>(p.grad) + offset, count, grad);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = c_skip * grad[i];
      store_chunk<kVector>(static_cast<State*>(p.grad_x) + offset, count, out);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = w * (c_out * grad[i]);
      store_chunk<kVector>(static_cast<Output*>(p.grad_g) + offset, count, out);
      if (p.grad_uncond != nullptr) {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = (Acc(1) - w) * (c_out * grad[i]);
        store_chunk<kVector>(static_cast<Output*>(p.grad_uncond) + offset, count, out);
      }
    });
  });
}

// Calls launch(T{}) with the type that a tag names.
template <typename Launch>
cudaError_t with_type(Type type, Launch&& launch) {
  switch (type) {
    case Type::kFloat32:
      return launch(float{});
    case Type::kFloat64:
      return launch(double{});
    case Type::kBFloat16:
      return launch(__nv_bfloat16{});
    case Type::kFloat16:
      return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

// Calls launch(State{}, Output{}) for each of the sixteen pairs.
template <typename Launch>
cudaError_t with_types(Type state, Type output, Launch&& launch) {
  return with_type(state, [&](auto s) { return with_type(output, [&](auto o) { return launch(s, o); }); });
}

}  // namespace

cudaError_t launch_flow_step_fwd_kernel(const FlowStepForward& p, cudaStream_t stream) {
  return with_types(p.state, p.output, [&](auto state, auto output) {
    constexpr int N = kChunk<decltype(state), decltype(output)>;
    const bool vector = p.D % N == 0 && aligned16(p.x, p.g, p.g_uncond, p.x_s, p.input);
    return with_flag(p.seeds.ptr != nullptr, [&](auto noisy) {
      return with_flag(vector, [&](auto wide) {
        const auto kernel =
            flow_step_fwd_kernel<decltype(state), decltype(output), decltype(noisy)::value, decltype(wide)::value>;
        return launch_rows(kernel, p.B, ceil_div(p.D, N), stream, p);
      });
    });
  });
}

cudaError_t launch_flow_step_bwd_kernel(const FlowStepBackward& p, cudaStream_t stream) {
  return with_types(p.state, p.output, [&](auto state, auto output) {
    constexpr int N = kChunk<decltype(state), decltype(output)>;
    const bool vector = p.D % N == 0 && aligned16(p.grad, p.grad_x, p.grad_g, p.grad_uncond);
    return with_flag(vector, [&](auto wide) {
      const auto kernel = flow_step_bwd_kernel<decltype(state), decltype(output), decltype(wide)::value>;
      return launch_rows(kernel, p.B, ceil_div(p.D, N), stream, p);
    });
  });
}

}  // namespace imm::cuda

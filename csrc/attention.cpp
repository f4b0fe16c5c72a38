// imm::timestep_attention_jvp on the CPU: attention and its tangent, a head and a block of queries at a time, whose
// scores stay in the cache. The products are torch's.
//
//   S = q k^T / sqrt(d), dS = (dq k^T + q dk^T) / sqrt(d), out = P v, dout = dP v + P dv
#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "fresh.h"

namespace imm {
namespace {

using at::Tensor;

constexpr int64_t kQueries = 128;

// The heads of packed q, k and v, [B, H, T, d] each, in what the op accumulates in.
std::array<Tensor, 3> heads_of(const Tensor& packed, int64_t heads) {
  const Tensor wide = packed.to(accumulate_dtype(packed.scalar_type()));
  const Tensor rows = wide.stride(2) == 1 ? wide : wide.contiguous();
  const Tensor split = rows.unflatten(2, {3, heads, -1}).transpose(1, 3);  // [B, H, 3, T, d]
  return {split.select(2, 0), split.select(2, 1), split.select(2, 2)};
}

// to = a b, or to + a b, times a factor.
void product(const Tensor& to, const Tensor& a, const Tensor& b, bool add, double factor = 1.0) {
  Tensor target = to;
  at::addmm_out(target, to, a, b, add ? 1.0 : 0.0, factor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> timestep_attention_jvp(const Tensor& qkv, int64_t heads,
                                                                  const Tensor& dqkv) {
  check_timestep_attention(qkv, heads);
  check_tangents({{"dqkv", dqkv, qkv}});
  const auto dtype = accumulate_dtype(qkv.scalar_type());
  const int64_t B = qkv.size(0), T = qkv.size(1), width = qkv.size(2) / 3, d = width / heads;
  const Tensor out = fresh({B, T, width}, dtype), dout = fresh({B, T, width}, dtype);
  const Tensor lse = at::empty({B, heads, T}, dtype), dlse = at::empty({B, heads, T}, dtype);
  const auto primal = heads_of(qkv, heads), tangent = heads_of(dqkv, heads);
  const auto places = [&](const Tensor& of) { return of.view({B, T, heads, d}).transpose(1, 2); };
  const Tensor out_heads = places(out), dout_heads = places(dout);
  const double factor = 1.0 / std::sqrt(static_cast<double>(d));
  const int64_t blocks = at::divup(T, kQueries);
  at::parallel_for(0, B * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd guard;  // a thread of its own has none
    const Tensor scratch = at::empty({2, std::min(T, kQueries), T}, dtype);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t head = piece / blocks, first = piece % blocks * kQueries, queries = std::min(kQueries, T - first);
      const auto of_head = [&](const Tensor& of) { return of.select(0, head / heads).select(0, head % heads); };
      const auto of_block = [&](const Tensor& of) { return of_head(of).narrow(0, first, queries); };
      const Tensor q = of_block(primal[0]), k = of_head(primal[1]), v = of_head(primal[2]);
      const Tensor dq = of_block(tangent[0]), dk = of_head(tangent[1]), dv = of_head(tangent[2]);
      const Tensor scores = scratch.select(0, 0).narrow(0, 0, queries),
                   slopes = scratch.select(0, 1).narrow(0, 0, queries);
      product(scores, q, k.t(), false, factor);
      product(slopes, dq, k.t(), false, factor);
      product(slopes, q, dk.t(), true, factor);
      const AttentionRows rows{.wide = dtype == at::kDouble,
                               .queries = queries,
                               .keys = T,
                               .scores = scores.mutable_data_ptr(),
                               .slopes = slopes.mutable_data_ptr(),
                               .lse = of_block(lse).mutable_data_ptr(),
                               .dlse = of_block(dlse).mutable_data_ptr()};
      IMM_CHOOSE(attention_functions).softmax(rows);
      product(of_block(out_heads), scores, v, false);
      product(of_block(dout_heads), slopes, v, false);
      product(of_block(dout_heads), scores, dv, true);
    }
  });
  return {out.to(qkv.scalar_type()), lse, dout.to(qkv.scalar_type()), dlse};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) { m.impl("timestep_attention_jvp", timestep_attention_jvp); }

}  // namespace imm

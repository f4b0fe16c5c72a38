// Checks, allocation and threads of imm::adaln_modulate and imm::gated_residual_adaln on the CPU; the loops are in
// cpu/adaln.cpp.
#include "adaln.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "fresh.h"

namespace imm {
namespace {

using at::Tensor;

// Keeps a modulation whose rows a kernel can read: a chunk of [B, 6 C] as it is, other layouts as a copy.
class ModulationRows {
 public:
  explicit ModulationRows(const Tensor& value)
      : rows_(value.size(1) == 1 || value.stride(1) == 1 ? value : value.contiguous()) {}
  AdalnModulation argument() const { return {rows_.const_data_ptr(), rows_.size(0) == 1 ? 0 : rows_.stride(0)}; }

 private:
  Tensor rows_;
};

// Numbers between rows of scratch memory: whole cache lines.
int64_t scratch_row(int64_t features) { return at::divup(features, 16) * 16; }

// loop(args, scratch, begin, end) on parts of [0, size), which do not depend on each other.
template <typename Args>
void run(void (*loop)(const Args&, void*, int64_t, int64_t), const Args& args, int64_t size, int64_t grain) {
  at::parallel_for(0, size, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({kAdalnRows, scratch_row(args.features)}, at::kDouble);
    loop(args, scratch.mutable_data_ptr(), begin, end);
  });
}

constexpr int64_t kGrain = 16384;  // numbers worth a thread

// The arguments of a forward, or their tangents, and where its results go; y, gate and z null without a residual.
struct Forward {
  const Tensor &x, *y, *gate, &shift, &scale, *z, &h;
};

// Keeps what a kernel reads.
struct Readable {
  explicit Readable(const Forward& of)
      : x(of.x.contiguous()),
        y(of.y ? of.y->contiguous() : Tensor()),
        gate(of.gate ? *of.gate : of.shift),
        shift(of.shift),
        scale(of.scale) {}
  const void* y_data() const { return y.defined() ? y.const_data_ptr() : nullptr; }

  Tensor x, y;
  ModulationRows gate, shift, scale;
};

void run_forward(const Forward& of, double eps, const Forward* tangents = nullptr) {
  const Tensor& x = of.x;
  if (x.numel() == 0) return;
  const Readable read(of);
  std::optional<Readable> along;
  AdalnArgs args{.x_dtype = x.scalar_type(),
                 .y_dtype = of.h.scalar_type(),
                 .modulation_dtype = of.shift.scalar_type(),
                 .tokens = x.size(1),
                 .features = x.size(2),
                 .row = scratch_row(x.size(2)),
                 .eps = eps,
                 .x = read.x.const_data_ptr(),
                 .y = read.y_data(),
                 .gate = read.gate.argument(),
                 .shift = read.shift.argument(),
                 .scale = read.scale.argument(),
                 .z = of.z ? of.z->mutable_data_ptr() : nullptr,
                 .h = of.h.mutable_data_ptr()};
  if (tangents) {
    along.emplace(*tangents);
    args.dx = along->x.const_data_ptr();
    args.dy = along->y_data();
    args.dgate = along->gate.argument();
    args.dshift = along->shift.argument();
    args.dscale = along->scale.argument();
    args.dz = tangents->z ? tangents->z->mutable_data_ptr() : nullptr;
    args.dh = tangents->h.mutable_data_ptr();
  }
  run(IMM_CHOOSE(adaln_functions).forward, args, x.size(0) * x.size(1), kGrain / x.size(2));
}

// Writes the gradients of x and y; those of the modulations (gate where there is a y, shift, scale) as well.
void run_backward(const Tensor* grad_z, const Tensor& grad_h, const Tensor& z, const Tensor* y, const Tensor* gate,
                  const Tensor& scale, double eps, const Tensor& grad_x, const Tensor* grad_y,
                  std::initializer_list<Tensor> modulations) {
  if (scale.numel() == 0) return;
  const int64_t images = z.size(0), tokens = z.size(1), features = z.size(2);
  const int64_t kinds = static_cast<int64_t>(modulations.size());
  const int64_t pieces = images * at::divup(tokens, kAdalnTokens);
  const at::ScalarType compute_dtype = accumulate_dtype(z.scalar_type());
  const Tensor partial = at::empty({pieces, kinds, features}, compute_dtype);
  const auto& functions = IMM_CHOOSE(adaln_functions);
  if (pieces > 0) {
    const Tensor zs = z.contiguous(), ups = grad_h.contiguous();
    const Tensor ys = y ? y->contiguous() : Tensor(), up_zs = grad_z ? grad_z->contiguous() : Tensor();
    const ModulationRows gates(gate ? *gate : scale), scales(scale);
    const AdalnBwdArgs args{.x_dtype = z.scalar_type(),
                            .y_dtype = grad_h.scalar_type(),
                            .modulation_dtype = scale.scalar_type(),
                            .tokens = tokens,
                            .features = features,
                            .row = scratch_row(features),
                            .eps = eps,
                            .grad_z = grad_z ? up_zs.const_data_ptr() : nullptr,
                            .grad_h = ups.const_data_ptr(),
                            .z = zs.const_data_ptr(),
                            .y = y ? ys.const_data_ptr() : nullptr,
                            .gate = gates.argument(),
                            .scale = scales.argument(),
                            .grad_x = grad_x.mutable_data_ptr(),
                            .grad_y = grad_y ? grad_y->mutable_data_ptr() : nullptr,
                            .partial = partial.mutable_data_ptr()};
    run(functions.backward, args, pieces, kGrain / (kAdalnTokens * features));
  }
  AdalnSumArgs args{.compute_dtype = compute_dtype,
                    .modulation_dtype = scale.scalar_type(),
                    .features = features,
                    .pieces = pieces / scale.size(0),
                    .kinds = kinds,
                    .partial = partial.const_data_ptr(),
                    .out = {}};
  std::transform(modulations.begin(), modulations.end(), args.out,
                 [](const Tensor& t) { return t.mutable_data_ptr(); });
  run(functions.sum, args, scale.size(0) * kinds, kGrain / (std::max<int64_t>(args.pieces, 1) * features));
}

Tensor empty_like(const Tensor& value) { return fresh(value.sizes(), value.scalar_type()); }

Tensor adaln_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  check_adaln(x, nullptr, {{"shift", shift}, {"scale", scale}}, eps);
  const Tensor h = empty_like(x);
  run_forward({x, nullptr, nullptr, shift, scale, nullptr, h}, eps);
  return h;
}

std::tuple<Tensor, Tensor, Tensor> adaln_modulate_bwd(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                      double eps) {
  check_adaln(x, &grad, {{"scale", scale}}, eps);
  const Tensor grad_x = empty_like(x), grad_shift = empty_like(scale), grad_scale = empty_like(scale);
  run_backward(nullptr, grad, x, nullptr, nullptr, scale, eps, grad_x, nullptr, {grad_shift, grad_scale});
  return {grad_x, grad_shift, grad_scale};
}

std::tuple<Tensor, Tensor> gated_residual_adaln(const Tensor& x, const Tensor& y, const Tensor& gate,
                                                const Tensor& shift, const Tensor& scale, double eps) {
  check_adaln(x, &y, {{"gate", gate}, {"shift", shift}, {"scale", scale}}, eps);
  const Tensor z = empty_like(x), h = empty_like(y);
  run_forward({x, &y, &gate, shift, scale, &z, h}, eps);
  return {z, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_bwd(const Tensor& grad_z, const Tensor& grad_h,
                                                                            const Tensor& z, const Tensor& y,
                                                                            const Tensor& gate, const Tensor& scale,
                                                                            double eps) {
  check_adaln_bwd(grad_z, grad_h, z, y, gate, scale, eps);
  const Tensor grad_x = empty_like(z), grad_y = empty_like(y);
  const Tensor grad_gate = empty_like(gate), grad_shift = empty_like(gate), grad_scale = empty_like(gate);
  run_backward(&grad_z, grad_h, z, &y, &gate, scale, eps, grad_x, &grad_y, {grad_gate, grad_shift, grad_scale});
  return {grad_x, grad_y, grad_gate, grad_shift, grad_scale};
}

std::tuple<Tensor, Tensor> adaln_modulate_jvp(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps,
                                              const Tensor& dx, const Tensor& dshift, const Tensor& dscale) {
  check_adaln(x, nullptr, {{"shift", shift}, {"scale", scale}}, eps);
  check_tangents({{"dx", dx, x}, {"dshift", dshift, shift}, {"dscale", dscale, scale}});
  const Tensor h = empty_like(x), dh = empty_like(x);
  const Forward tangents{dx, nullptr, nullptr, dshift, dscale, nullptr, dh};
  run_forward({x, nullptr, nullptr, shift, scale, nullptr, h}, eps, &tangents);
  return {h, dh};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_jvp(const Tensor& x, const Tensor& y,
                                                                    const Tensor& gate, const Tensor& shift,
                                                                    const Tensor& scale, double eps, const Tensor& dx,
                                                                    const Tensor& dy, const Tensor& dgate,
                                                                    const Tensor& dshift, const Tensor& dscale) {
  check_adaln(x, &y, {{"gate", gate}, {"shift", shift}, {"scale", scale}}, eps);
  check_tangents(
      {{"dx", dx, x}, {"dy", dy, y}, {"dgate", dgate, gate}, {"dshift", dshift, shift}, {"dscale", dscale, scale}});
  const Tensor z = empty_like(x), h = empty_like(y), dz = empty_like(x), dh = empty_like(y);
  const Forward tangents{dx, &dy, &dgate, dshift, dscale, &dz, dh};
  run_forward({x, &y, &gate, shift, scale, &z, h}, eps, &tangents);
  return {z, h, dz, dh};
}

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) {
  m.impl("adaln_modulate", adaln_modulate);
  m.impl("adaln_modulate_bwd", adaln_modulate_bwd);
  m.impl("adaln_modulate_jvp", adaln_modulate_jvp);
  m.impl("gated_residual_adaln", gated_residual_adaln);
  m.impl("gated_residual_adaln_bwd", gated_residual_adaln_bwd);
  m.impl("gated_residual_adaln_jvp", gated_residual_adaln_jvp);
}

}  // namespace imm

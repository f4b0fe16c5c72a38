// imm::flow_step on the CPU: threads, registration; the loops are in cpu/flow_step.cpp.
#include "flow_step.h"

#include <ATen/Parallel.h>

#include "forms.h"

namespace imm {
namespace {

using at::Tensor;

// Elements do not depend on each other, so any split over threads gives bitwise identical results.
template <typename Args>
void run_pieces(void (*loop)(const Args&, int64_t, int64_t), const Args& args, int64_t images, int64_t grain) {
  at::parallel_for(0, images * at::divup(args.numel, kFlowBlock), grain,
                   [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

struct Cpu {
  static void forward(const Step& a, const Tensor& x_s, const NextInput* next) {
    if (a.x.numel() == 0) return;
    const Tensor xs = a.x.contiguous(), gs = a.g.contiguous();
    const Tensor base = a.g_uncond ? a.g_uncond->contiguous() : Tensor();
    const FlowStepArgs args{.x_dtype = a.x.scalar_type(),
                            .g_dtype = a.g.scalar_type(),
                            .numel = a.x.numel() / a.x.size(0),
                            .x = xs.const_data_ptr(),
                            .g = gs.const_data_ptr(),
                            .g_uncond = a.g_uncond ? base.const_data_ptr() : nullptr,
                            .c_skip = per_image<double>(a.c_skip),
                            .c_out = per_image<double>(a.c_out),
                            .guidance = per_image<double>(a.guidance),
                            .c_noise = per_image<double>(a.c_noise),
                            .seeds = per_image<int64_t>(a.seeds),
                            .step = a.step,
                            .out = x_s.mutable_data_ptr(),
                            .c_in = next ? per_image<double>(next->c_in) : PerImage<double>{},
                            .input = next ? next->input.mutable_data_ptr() : nullptr,
                            .copies = next ? next->copies : 0,
                            .block = a.x.numel()};
    run_pieces(IMM_CHOOSE(flow_step_functions).forward, args, a.x.size(0), a.seeds ? 2 : 32);
  }

  static void backward(const Tensor& grad, const Tensor& c_skip, const Tensor& c_out, const Optional& guidance,
                       const Tensor& grad_x, const Tensor& grad_g, const Tensor& grad_uncond) {
    if (grad.numel() == 0) return;
    const Tensor up = grad.contiguous();
    const FlowStepBwdArgs args{.x_dtype = grad.scalar_type(),
                               .g_dtype = grad_g.scalar_type(),
                               .numel = grad.numel() / grad.size(0),
                               .grad = up.const_data_ptr(),
                               .c_skip = per_image<double>(c_skip),
                               .c_out = per_image<double>(c_out),
                               .guidance = per_image<double>(guidance),
                               .grad_x = grad_x.mutable_data_ptr(),
                               .grad_g = grad_g.mutable_data_ptr(),
                               .grad_uncond = grad_uncond.defined() ? grad_uncond.mutable_data_ptr() : nullptr};
    run_pieces(IMM_CHOOSE(flow_step_functions).backward, args, grad.size(0), 32);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(imm, CPU, m) { FlowStepForms<Cpu>::implement(m); }

}  // namespace imm

#include "sampling_loop.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <utility>

#include "checks.h"

namespace imm {
namespace {

using at::Tensor;

const auto& flow_step_op() {
  using Signature = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&,
                         const Optional&, const Optional&, int64_t, const Tensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("imm::flow_step", "out").typed<Signature>();
  return op;
}

const auto& sampling_step_op() {
  using Signature =
      void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&,
           const Optional&, const Optional&, int64_t, const Tensor&, int64_t, const Tensor&, const Tensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("imm::sampling_step", "out").typed<Signature>();
  return op;
}

const auto& noise_op() {
  using Signature = void(const Tensor&, int64_t, int64_t, double, const Tensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("imm::noise", "out").typed<Signature>();
  return op;
}

// The noise of a network with a latent, before step i, is that of its seed at this step + i.
constexpr int64_t kLatent = int64_t{1} << 32;

std::vector<int64_t> with_rows(int64_t rows, const std::vector<int64_t>& shape) {
  std::vector<int64_t> sizes{rows};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  return sizes;
}

}  // namespace

SamplingLoop::SamplingLoop(SamplingTable table, SamplingSettings settings, Network network, Prepare prepare,
                           std::shared_ptr<GraphPool> pool)
    : table_(std::move(table)),
      settings_(std::move(settings)),
      network_(std::move(network)),
      prepare_(std::move(prepare)),
      pool_(std::move(pool)),
      copies_(settings_.guided ? 2 : 1) {
  const std::vector<int64_t>& shape = settings_.shape;
  TORCH_CHECK_VALUE(!shape.empty() && *std::min_element(shape.begin(), shape.end()) >= 1,
                    "shape: expected the sizes of an image, got ", shape);
  TORCH_CHECK_TYPE(is_kernel_dtype(settings_.input_dtype),
                   "input dtype: expected a floating dtype of 16, 32 or 64 bits, got ", settings_.input_dtype);
  const c10::InferenceMode off(false);
  const int64_t B = settings_.rows, R = copies_ * B, steps = static_cast<int64_t>(table_.t.size());
  const auto options = at::TensorOptions(settings_.device);
  const auto memory = [&](int64_t rows, at::ScalarType dtype) {
    return at::zeros(with_rows(rows, settings_.shape), options.dtype(dtype));
  };
  state_ = memory(B, settings_.state_dtype);
  input_ = memory(R, settings_.input_dtype);
  table_.c_kept.resize(table_.t.size());  // packages of earlier versions have none
  if (std::any_of(table_.c_kept.begin(), table_.c_kept.end(), [](double c) { return c != 0.0; })) {
    kept_ = memory(B, settings_.state_dtype);
  }
  // Each 16-byte aligned, as the times are; what a call gives begins with the labels after those that are none.
  const auto even = [](int64_t n) { return n + n % 2; };
  const int64_t seeds_first = settings_.num_classes > 0 ? even(R) : 0, guidance_first = seeds_first + even(B);
  const Tensor numbers = at::zeros({guidance_first + B}, options.dtype(at::kLong));
  seeds_ = numbers.narrow(0, seeds_first, B);
  guidance_ = numbers.narrow(0, guidance_first, B).view(at::kDouble);
  if (settings_.num_classes > 0) labels_ = numbers.narrow(0, 0, R).fill_(settings_.num_classes);
  if (settings_.cond_dim > 0) {
    cond_ = at::zeros({R, settings_.cond_dim + settings_.latent_dim}, options.dtype(settings_.input_dtype));
  }
  const int64_t none = settings_.num_classes > 0 ? R - B : 0;
  given_ = numbers.narrow(0, none, numbers.numel() - none);
  const auto column = [](const std::vector<double>& values) { return at::tensor(values, at::kDouble); };
  times_ = at::stack({column(table_.t), column(table_.s)}, 1)
               .to(settings_.device)
               .unsqueeze(2)
               .expand({steps, 2, R + R % 2})  // each 16-byte aligned, which compiled networks may rely on
               .contiguous()
               .narrow(2, 0, R);
  coefficients_ =
      at::stack({column(table_.c_in), column(table_.c_skip), column(table_.c_out), column(table_.c_noise)}, 1)
          .to(settings_.device)
          .unsqueeze(2);  // [steps, 4, 1]
}

SamplingLoop::~SamplingLoop() {
  if (!pool_) return;
  try {
    pool_->synchronize();  // what runs still reads the memory
  } catch (...) {          // a device in error has nothing that runs
  }
}

int64_t SamplingLoop::bytes() const {
  int64_t total = 0;
  for (const Tensor& kept : {state_, input_, times_, coefficients_, given_}) {
    total += static_cast<int64_t>(kept.storage().nbytes());
  }
  for (const auto& kept : {kept_, cond_}) {
    if (kept) total += static_cast<int64_t>(kept->storage().nbytes());
  }
  return total;
}

void SamplingLoop::load(const Tensor& seeds, const std::optional<Tensor>& labels, const std::optional<Tensor>& guidance,
                        const std::optional<Tensor>& x, const std::optional<Tensor>& cond) {
  const int64_t B = settings_.rows;
  const int64_t n = seeds.size(0);
  TORCH_CHECK_VALUE(labels.has_value() == labels_.has_value(), "labels: expected ",
                    labels_ ? "[B] int64" : "None for an unconditional network", ", got ",
                    labels ? "a tensor" : "None");
  TORCH_CHECK_VALUE(guidance.has_value() == settings_.guided, "guidance: expected ",
                    settings_.guided ? "a scale" : "None for a loop without", ", got ", guidance ? "a tensor" : "None");
  // What is in the host's memory goes in one copy, by pinned memory that the allocator keeps until the copy has ended.
  const Tensor host = settings_.device.is_cpu()
                          ? given_
                          : at::zeros_like(given_, at::TensorOptions(at::kCPU).dtype(at::kLong).pinned_memory(true));
  const auto put = [&](const Tensor& kept, const Tensor& value, bool on_host) {
    if (value.is_cpu() != on_host) return;
    const Tensor place = on_host ? host.narrow(0, kept.storage_offset() - given_.storage_offset(), n) : kept;
    place.view(kept.scalar_type()).copy_(value, !on_host);
  };
  const auto put_all = [&](bool on_host) {
    put(seeds_.narrow(0, 0, n), seeds, on_host);
    if (labels) put(labels_->narrow(0, settings_.guided ? B : 0, n), *labels, on_host);
    if (guidance) put(guidance_.narrow(0, 0, n), *guidance, on_host);
  };
  put_all(true);
  if (!settings_.device.is_cpu()) {
    given_.copy_(host, true);
    put_all(false);
  }
  TORCH_CHECK_VALUE(cond.has_value() == cond_.has_value(), "cond: expected ",
                    cond_ ? "what the network is conditioned on" : "None for a network without", ", got ",
                    cond ? "a tensor" : "None");
  if (cond) {
    TORCH_CHECK_VALUE(cond->dim() == 2 && cond->size(0) == n && cond->size(1) == settings_.cond_dim, "cond: expected [",
                      n, ", ", settings_.cond_dim, "], got ", cond->sizes());
    for (int64_t copy = 0; copy < copies_; ++copy) {
      const Tensor z = cond_->narrow(1, 0, settings_.cond_dim).narrow(0, copy * B, B);
      z.narrow(0, 0, n).copy_(*cond);
      if (n < B) z.narrow(0, n, B - n).zero_();
    }
  }
  const Tensor target = state_.narrow(0, 0, n);
  if (n < B) state_.narrow(0, n, B - n).zero_();  // not stepped on and on from run to run
  if (x) {
    // Ordinary memory of the host is read before the call returns; pinned memory would be read later.
    target.copy_(*x, settings_.device.is_cuda() && !(x->is_cpu() && x->is_pinned()));
    return;
  }
  const int64_t numel = state_.numel() / B;
  const Tensor normals = state_.scalar_type() == at::kFloat ? target : at::empty_like(target, at::kFloat);
  noise_op().call(seeds_.narrow(0, 0, n), numel, 0, settings_.sigma_data, normals.view({n, numel}));
  target.copy_(normals);  // nothing where they are the same
}

// c_in x, for a step whose input no sampling_step has written.
void SamplingLoop::scale_input(int64_t step) {
  const at::Scalar c_in(table_.c_in[static_cast<size_t>(step)]);
  for (int64_t copy = 0; copy < copies_; ++copy) {
    Tensor target = input_.narrow(0, copy * settings_.rows, settings_.rows);
    if (settings_.input_dtype == settings_.state_dtype) {
      at::mul_out(target, state_, c_in);
    } else {
      target.copy_(at::mul(state_, c_in));
    }
  }
}

// Noise of the network's own, the same for each copy of an image's row.
void SamplingLoop::draw_latent(int64_t step) {
  const int64_t L = settings_.latent_dim;
  const Tensor normals = at::empty({settings_.rows, L}, cond_->options().dtype(at::kFloat));
  noise_op().call(seeds_, L, kLatent + step, 1.0, normals);
  for (int64_t copy = 0; copy < copies_; ++copy) {
    cond_->narrow(1, settings_.cond_dim, L).narrow(0, copy * settings_.rows, settings_.rows).copy_(normals);
  }
}

void SamplingLoop::body() {
  const int64_t B = settings_.rows, steps = static_cast<int64_t>(table_.t.size());
  if (prepare_) prepare_(labels_);
  scale_input(0);
  for (int64_t i = 0; i < steps; ++i) {
    const bool last = i + 1 == steps;
    const Tensor times = times_.select(0, i), coefficients = coefficients_.select(0, i);
    if (cond_ && settings_.latent_dim > 0) draw_latent(i);
    const Tensor g = network_(i, input_, times.select(0, 0), times.select(0, 1), labels_, cond_);
    TORCH_CHECK_VALUE(g.sizes() == input_.sizes() && g.device() == input_.device(),
                      "network: expected an output of its input's shape ", input_.sizes(), " on ", input_.device(),
                      ", got ", g.sizes(), " on ", g.device());
    const Tensor output = settings_.guided ? g.narrow(0, B, B) : g;
    const Optional uncond = settings_.guided ? Optional(g.narrow(0, 0, B)) : std::nullopt;
    const Optional guidance = settings_.guided ? Optional(guidance_) : std::nullopt;
    const double c_kept = table_.c_kept[static_cast<size_t>(i)];
    if (!last && table_.c_kept[static_cast<size_t>(i + 1)] != 0.0) {
      TORCH_CHECK_VALUE(c_kept == 0.0, "c_kept: expected no two steps in a row that add a kept state");
      kept_->copy_(state_);
    }
    const bool noisy = table_.c_noise[static_cast<size_t>(i)] != 0.0;
    const Optional c_noise = noisy ? Optional(coefficients.select(0, 3)) : std::nullopt;
    const Optional seeds = noisy ? Optional(seeds_) : std::nullopt;
    const Tensor c_skip = coefficients.select(0, 1), c_out = coefficients.select(0, 2);
    if (!last && c_kept == 0.0 && g.scalar_type() == settings_.input_dtype) {
      sampling_step_op().call(state_, output, c_skip, c_out, uncond, guidance, c_noise, seeds, i + 1,
                              coefficients_.select(0, i + 1).select(0, 0), copies_, state_, input_);
    } else {
      flow_step_op().call(state_, output, c_skip, c_out, uncond, guidance, c_noise, seeds, i + 1, state_);
      if (c_kept != 0.0) state_.add_(*kept_, c_kept);
      if (!last) scale_input(i + 1);
    }
  }
}

void SamplingLoop::capture() {
  TORCH_CHECK(pool_ != nullptr, "capture: expected a device with graphs and a library built for them");
  const at::NoGradGuard no_grad;
  const c10::DeviceGuard guard(settings_.device);
  pool_->wait();
  graph_ = pool_->capture([this] { body(); });
  pool_->mark();
}

Tensor SamplingLoop::run(const Tensor& seeds, const std::optional<Tensor>& labels,
                         const std::optional<Tensor>& guidance, const std::optional<Tensor>& x,
                         const std::optional<Tensor>& cond) {
  const at::NoGradGuard no_grad;
  const c10::DeviceGuard guard(settings_.device);
  if (!pool_) return run_here(seeds, labels, guidance, x, cond);
  pool_->wait();
  try {
    const Tensor result = run_here(seeds, labels, guidance, x, cond);
    pool_->mark();
    return result;
  } catch (...) {
    pool_->mark();  // what was queued before
    throw;
  }
}

Tensor SamplingLoop::run_here(const Tensor& seeds, const std::optional<Tensor>& labels,
                              const std::optional<Tensor>& guidance, const std::optional<Tensor>& x,
                              const std::optional<Tensor>& cond) {
  load(seeds, labels, guidance, x, cond);
  if (graph_) {
    graph_->replay();
  } else {
    body();
  }
  return state_.narrow(0, 0, seeds.size(0)).clone();
}

}  // namespace imm

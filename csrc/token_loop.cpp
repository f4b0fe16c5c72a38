#include "token_loop.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <numeric>

namespace imm {
namespace {

using at::Tensor;

const auto& noise_op() {
  using Signature = void(const Tensor&, int64_t, int64_t, double, const Tensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("imm::noise", "out").typed<Signature>();
  return op;
}

void check_z(const Tensor& z, const Tensor& kept, const char* what) {
  TORCH_CHECK_VALUE(z.sizes() == kept.sizes() && z.device() == kept.device(), "backbone: expected z ", kept.sizes(),
                    " on ", kept.device(), " of ", what, ", got ", z.sizes(), " on ", z.device());
}

}  // namespace

TokenLoop::TokenLoop(TokenSettings settings, Prefill prefill, Decode decode, Head head, Cache cache,
                     std::shared_ptr<GraphPool> pool)
    : settings_(std::move(settings)),
      prefill_(std::move(prefill)),
      decode_(std::move(decode)),
      head_(std::move(head)),
      cache_(std::move(cache)),
      pool_(std::move(pool)) {
  const c10::InferenceMode off(false);
  const auto options = at::TensorOptions(settings_.device);
  const auto& widths = settings_.stream_widths;
  const int64_t B = settings_.rows, R = settings_.guided ? 2 * B : B, T = settings_.slots,
                K = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  TORCH_CHECK_VALUE(!settings_.buckets.empty() && settings_.buckets.back() == T,
                    "buckets: expected some up to the slots, ", T, ", got ", settings_.buckets);
  for (const int64_t bucket : settings_.buckets) {
    Cache& view = views_.emplace_back();
    for (const Tensor& memory : cache_) {  // [R, heads, slots, ...]; what has no slots goes as it is
      view.push_back(memory.dim() > 2 && memory.size(2) == T ? memory.narrow(2, 0, bucket) : memory);
    }
  }
  z_ = at::zeros({R, settings_.cond_dim}, options.dtype(settings_.cond_dtype));
  token_ = at::zeros({R, settings_.token_dim}, options.dtype(at::kFloat));
  noise_ = at::zeros({T, B, K}, options.dtype(at::kFloat));
  out_ = at::zeros({T, B, settings_.token_dim}, options.dtype(at::kFloat));
  stopped_ = at::zeros({T, B}, options.dtype(at::kBool));
  index_ = at::zeros({1}, options.dtype(at::kLong));
  position_ = at::zeros({1}, options.dtype(at::kLong));
  if (settings_.guided) guidance_ = at::zeros({B}, options.dtype(at::kDouble));
}

TokenLoop::~TokenLoop() {
  if (!pool_) return;
  try {
    pool_->synchronize();  // what runs still reads the memory
  } catch (...) {          // a device in error has nothing that runs
  }
}

// Of the position of the next token that decode is given.
size_t TokenLoop::bucket() const {
  const int64_t position = taken_ + count_ - left_ - 1;
  const auto& buckets = settings_.buckets;
  return static_cast<size_t>(std::upper_bound(buckets.begin(), buckets.end(), position) - buckets.begin());
}

void TokenLoop::decode(size_t bucket) {
  const Tensor z = decode_(token_, position_, views_[bucket]);
  check_z(z, z_, "decode");
  z_.copy_(z);
}

void TokenLoop::head() {
  const Tensor token = head_(z_, noise_.index_select(0, index_).squeeze(0), guidance_);
  TORCH_CHECK_VALUE(token.sizes() == out_.sizes().slice(1), "head: expected tokens ", out_.sizes().slice(1), ", got ",
                    token.sizes());
  out_.index_copy_(0, index_, token.unsqueeze(0));
  for (int64_t first = 0; first < token_.size(0); first += settings_.rows) {
    token_.narrow(0, first, settings_.rows).copy_(token);
  }
  index_.add_(1);
  position_.add_(1);
}

void TokenLoop::capture() {
  TORCH_CHECK(pool_ != nullptr, "capture: expected a device with graphs and a library built for them");
  const at::NoGradGuard no_grad;
  const c10::DeviceGuard guard(settings_.device);
  left_ = 0;
  pool_->wait();
  std::vector<std::unique_ptr<Graph>> graphs;
  for (size_t bucket = 0; bucket < views_.size(); ++bucket) {
    index_.zero_();
    position_.zero_();
    graphs.push_back(pool_->capture([this, bucket] {
      decode(bucket);
      head();
      index_.remainder_(out_.size(0));  // the runs before the recording stay within the memory
      position_.remainder_(settings_.slots);
    }));
  }
  graphs_ = std::move(graphs);
  pool_->mark();
}

int64_t TokenLoop::begin(const Tensor& seeds, const Tensor& prefix, std::optional<int64_t> tokens,
                         const std::vector<double>& scales, const std::optional<Tensor>& guidance,
                         std::optional<Stop> stop) {
  const at::NoGradGuard no_grad;
  const c10::DeviceGuard guard(settings_.device);
  left_ = 0;
  if (pool_) pool_->wait();
  try {
    count_ = begin_here(seeds, prefix, tokens, scales, guidance);
  } catch (...) {
    if (pool_) pool_->mark();  // what was queued before
    throw;
  }
  if (pool_) pool_->mark();
  stop_ = std::move(stop);
  return left_ = count_;
}

int64_t TokenLoop::begin_here(const Tensor& seeds, const Tensor& prefix, std::optional<int64_t> tokens,
                              const std::vector<double>& scales, const std::optional<Tensor>& guidance) {
  const int64_t B = settings_.rows;
  TORCH_CHECK_VALUE(seeds.dim() == 1 && seeds.size(0) == B, "seeds: expected [", B, "], got ", seeds.sizes());
  TORCH_CHECK_VALUE(guidance.has_value() == settings_.guided, "guidance: expected ",
                    settings_.guided ? "a scale" : "None for a loop without", ", got ", guidance ? "a tensor" : "None");
  TORCH_CHECK_VALUE(scales.size() == settings_.stream_steps.size(), "scales: expected ", settings_.stream_steps.size(),
                    ", got ", scales.size());
  TORCH_CHECK_VALUE(tokens.value_or(1) <= settings_.slots, "tokens: expected at most ", settings_.slots, ", got ",
                    tokens.value_or(1));
  for (const Tensor& memory : cache_) memory.zero_();
  const auto [z, taken] = prefill_(prefix.to(settings_.device), cache_);
  check_z(z, z_, "prefill");
  z_.copy_(z);
  const int64_t most = settings_.slots - taken + 1;
  const int64_t count = tokens.value_or(most);
  TORCH_CHECK_VALUE(1 <= count && count <= most, "tokens: expected at most ", most, " after a prefix of ", taken,
                    ", got ", count);
  const Tensor keys = seeds.to(settings_.device);
  int64_t column = 0;
  for (size_t i = 0; i < scales.size(); ++i) {
    const int64_t width = settings_.stream_widths[i];
    const Tensor normals = at::empty({B, count * width}, noise_.options());
    noise_op().call(keys, count * width, settings_.stream_steps[i], scales[i], normals);
    noise_.narrow(0, 0, count).narrow(2, column, width).copy_(normals.view({B, count, width}).transpose(0, 1));
    column += width;
  }
  if (guidance) guidance_->copy_(*guidance);
  index_.zero_();
  position_.fill_(taken - 1);
  taken_ = taken;
  stopped_.zero_();
  return count;
}

std::tuple<Tensor, Tensor> TokenLoop::next(int64_t count) {
  const at::NoGradGuard no_grad;
  const c10::DeviceGuard guard(settings_.device);
  const int64_t first = count_ - left_;
  count = std::min(count, left_);
  if (pool_) pool_->wait();
  try {
    for (int64_t i = 0; i < count; ++i, --left_) {
      if (left_ == count_) {
        head();  // z of the first token is the prefix's
      } else if (!graphs_.empty()) {
        graphs_[bucket()]->replay();
      } else {
        decode(bucket());
        head();
      }
      if (stop_) stopped_.select(0, count_ - left_).copy_((*stop_)(z_));
    }
  } catch (...) {
    left_ = 0;
    if (pool_) pool_->mark();
    throw;
  }
  const auto part = [&](const Tensor& kept) {
    return kept.narrow(0, first, count).transpose(0, 1).clone(at::MemoryFormat::Contiguous);
  };
  auto result = std::make_tuple(part(out_), part(stopped_));
  if (pool_) pool_->mark();
  return result;
}

}  // namespace imm

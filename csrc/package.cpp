#include "package.h"

#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace imm {
namespace {

using Metadata = std::unordered_map<std::string, std::string>;

const std::string& entry(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find("imm_" + key);
  TORCH_CHECK_VALUE(found != metadata.end(), "package: expected one that `imm export` wrote, got one without imm_",
                    key);
  return found->second;
}

// Numbers with spaces in between.
template <typename T>
std::vector<T> numbers(const Metadata& metadata, const std::string& key) {
  std::istringstream text(entry(metadata, key));
  std::vector<T> values;
  for (std::string word; text >> word;) {
    size_t read = 0;
    if constexpr (std::is_same_v<T, double>) {
      values.push_back(std::stod(word, &read));
    } else {
      values.push_back(std::stoll(word, &read));
    }
    TORCH_CHECK_VALUE(read == word.size(), "package: imm_", key, ": expected numbers, got '", word, "'");
  }
  return values;
}

template <typename T>
T number(const Metadata& metadata, const std::string& key) {
  const std::vector<T> values = numbers<T>(metadata, key);
  TORCH_CHECK_VALUE(values.size() == 1, "package: imm_", key, ": expected one number, got '", entry(metadata, key),
                    "'");
  return values[0];
}

at::ScalarType dtype(const Metadata& metadata, const std::string& key) {
  const std::string& name = entry(metadata, key);
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    if (c10::getDtypeNames(type).first == name) return type;
  }
  TORCH_CHECK_VALUE(false, "package: imm_", key, ": expected a floating dtype of 16, 32 or 64 bits, got '", name, "'");
}

// The device where the loader put the weights.
at::Device device_of(const Metadata& metadata) {
  const at::Device device(entry(metadata, "device"));
  return device.is_cuda() ? c10::impl::VirtualGuardImpl(at::kCUDA).getDevice() : device;
}

}  // namespace

TokenPackage load_token_package(const std::string& path, bool graph) {
  using Loader = torch::inductor::AOTIModelPackageLoader;
  const auto model = [&](const char* name) {
    return std::make_shared<Loader>(path, name, /*run_single_threaded=*/true);
  };
  const auto head = model("head"), prefill = model("prefill"), decode = model("decode");
  const Metadata metadata = head->get_metadata();
  TokenSettings settings{.rows = number<int64_t>(metadata, "rows"),
                         .guided = number<int64_t>(metadata, "guided") != 0,
                         .token_dim = number<int64_t>(metadata, "token_dim"),
                         .cond_dim = number<int64_t>(metadata, "cond_dim"),
                         .slots = number<int64_t>(metadata, "slots"),
                         .stream_steps = numbers<int64_t>(metadata, "stream_steps"),
                         .stream_widths = numbers<int64_t>(metadata, "stream_widths"),
                         .buckets = {number<int64_t>(metadata, "slots")},  // compiled for one number of slots
                         .cond_dtype = dtype(metadata, "cond_dtype"),
                         .device = device_of(metadata)};
  const int64_t taken = number<int64_t>(metadata, "prefix_slots");
  TokenLoop::Cache cache;
  const auto shapes = numbers<int64_t>(metadata, "cache");  // of each tensor its number of sizes and these
  for (size_t at = 0; at < shapes.size(); at += 1 + static_cast<size_t>(shapes[at])) {
    const std::vector<int64_t> sizes(shapes.begin() + static_cast<int64_t>(at) + 1,
                                     shapes.begin() + static_cast<int64_t>(at) + 1 + shapes[at]);
    cache.push_back(at::zeros(sizes, at::TensorOptions(settings.device).dtype(settings.cond_dtype)));
  }
  const auto with = [](std::vector<at::Tensor> inputs, const TokenLoop::Cache& more) {
    inputs.insert(inputs.end(), more.begin(), more.end());
    return inputs;
  };
  const int64_t both = settings.guided ? 2 * settings.rows : settings.rows;
  const auto first = [prefill, with, taken, both](const at::Tensor& prefix, const TokenLoop::Cache& kept) {
    TORCH_CHECK_VALUE(prefix.dim() == 1 && prefix.size(0) == both && prefix.scalar_type() == at::kLong,
                      "prefix: expected classes [", both, "] int64, got ", prefix.sizes(), " of ",
                      prefix.scalar_type());
    return std::make_tuple(prefill->run(with({prefix}, kept)).at(0), taken);
  };
  const auto following = [decode, with](const at::Tensor& token, const at::Tensor& position,
                                        const TokenLoop::Cache& kept) {
    return decode->run(with({token, position}, kept)).at(0);
  };
  const auto token = [head](const at::Tensor& z, const at::Tensor& noise, const std::optional<at::Tensor>& guidance) {
    std::vector<at::Tensor> inputs{z, noise};
    if (guidance) inputs.push_back(*guidance);
    return head->run(inputs).at(0);
  };
  const auto pool = make_graph_pool(settings.device);
  TokenPackage result{.loop = nullptr,
                      .num_classes = number<int64_t>(metadata, "num_classes"),
                      .token_dim = settings.token_dim,
                      .sigma_data = number<double>(metadata, "sigma_data")};
  result.loop = std::make_unique<TokenLoop>(std::move(settings), first, following, token, std::move(cache), pool);
  if (pool && graph) result.loop->capture();
  return result;
}

std::unique_ptr<SamplingLoop> load_package(const std::string& path, bool graph) {
  // A graph is captured from one thread, and the loop calls from one at a time.
  const auto network =
      std::make_shared<torch::inductor::AOTIModelPackageLoader>(path, "model", /*run_single_threaded=*/true);
  const Metadata metadata = network->get_metadata();
  SamplingTable table{numbers<double>(metadata, "t"),
                      numbers<double>(metadata, "s"),
                      numbers<double>(metadata, "c_in"),
                      numbers<double>(metadata, "c_skip"),
                      numbers<double>(metadata, "c_out"),
                      numbers<double>(metadata, "c_noise"),
                      metadata.count("imm_c_kept") ? numbers<double>(metadata, "c_kept") : std::vector<double>{}};
  SamplingSettings settings{.rows = number<int64_t>(metadata, "rows"),
                            .shape = numbers<int64_t>(metadata, "shape"),
                            .guided = number<int64_t>(metadata, "guided") != 0,
                            .num_classes = number<int64_t>(metadata, "num_classes"),
                            .sigma_data = number<double>(metadata, "sigma_data"),
                            .cond_dim = metadata.count("imm_cond_dim") ? number<int64_t>(metadata, "cond_dim") : 0,
                            .latent_dim = metadata.count("imm_cond_dim") ? number<int64_t>(metadata, "latent_dim") : 0,
                            .state_dtype = dtype(metadata, "state_dtype"),
                            .input_dtype = dtype(metadata, "input_dtype"),
                            .device = device_of(metadata)};
  const auto call = [network](int64_t, const at::Tensor& x, const at::Tensor& t, const at::Tensor& s,
                              const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& cond) {
    std::vector<at::Tensor> inputs{x, t, s};
    for (const auto& more : {labels, cond}) {
      if (more) inputs.push_back(*more);
    }
    return network->run(inputs).at(0);
  };
  const auto pool = make_graph_pool(settings.device);
  auto loop = std::make_unique<SamplingLoop>(std::move(table), std::move(settings), call, nullptr, pool);
  if (pool && graph) loop->capture();
  return loop;
}

}  // namespace imm

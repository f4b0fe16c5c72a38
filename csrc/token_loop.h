// Sequences of continuous tokens, on any device: a backbone over the tokens outside, the steps of a head inside, in
// memory that is kept. With a graph pool one token is captured and replayed for each token: what changes from one to
// the next (the position, the row of the noise) is memory of the device that the graph itself moves on.
//
// B sequences (rows), R rows of the backbone: B, or 2 B with guidance, first those without a label.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "graph.h"

namespace imm {

struct TokenSettings {
  int64_t rows;  // B
  bool guided;
  int64_t token_dim;  // D
  int64_t cond_dim;   // C
  int64_t slots;      // of the cache: for the prefix and for every token but the last
  // The noise of a token, side by side: the Philox step and the numbers a token of each stream.
  std::vector<int64_t> stream_steps, stream_widths;
  // How many slots decode sees, ascending up to `slots`: the least that holds the position. A graph each.
  std::vector<int64_t> buckets;
  at::ScalarType cond_dtype;  // of z
  at::Device device = at::kCPU;
};

class IMM_EXPORT TokenLoop {
 public:
  using Cache = std::vector<at::Tensor>;
  // (prefix [R, ...], cache) -> z of the first token [R, C], and the slots that the prefix took.
  using Prefill = std::function<std::tuple<at::Tensor, int64_t>(const at::Tensor& prefix, const Cache& cache)>;
  // (token [R, D], position [1] int64, the first slots of the cache) -> z of the next token [R, C].
  using Decode = std::function<at::Tensor(const at::Tensor& token, const at::Tensor& position, const Cache& cache)>;
  // (z [R, C], noise [B, K], guidance [B] float64 where guided) -> token [B, D] float32.
  using Head = std::function<at::Tensor(const at::Tensor& z, const at::Tensor& noise,
                                        const std::optional<at::Tensor>& guidance)>;
  // z [R, C] -> [B] bool: which sequences end with the token of this z.
  using Stop = std::function<at::Tensor(const at::Tensor& z)>;

  TokenLoop(TokenSettings settings, Prefill prefill, Decode decode, Head head, Cache cache,
            std::shared_ptr<GraphPool> pool);
  ~TokenLoop();
  TokenLoop(const TokenLoop&) = delete;
  TokenLoop& operator=(const TokenLoop&) = delete;

  // Records a token for later calls. Throws where that cannot be; calls then continue step by step.
  void capture();
  bool captured() const { return !graphs_.empty(); }

  // Starts B sequences: seeds [B], prefix [R, ...], at most `tokens` tokens, or as many as the slots take; scales of
  // the streams; guidance [1] or [B] float64 where guided. Returns the number of tokens.
  int64_t begin(const at::Tensor& seeds, const at::Tensor& prefix, std::optional<int64_t> tokens,
                const std::vector<double>& scales, const std::optional<at::Tensor>& guidance, std::optional<Stop> stop);
  // The next tokens [B, count, D] float32, fewer at the end, and where the stop function held [B, count].
  std::tuple<at::Tensor, at::Tensor> next(int64_t count);

  int64_t left() const { return left_; }
  int64_t noises() const { return static_cast<int64_t>(settings_.stream_steps.size()); }
  int64_t rows() const { return settings_.rows; }
  int64_t slots() const { return settings_.slots; }
  bool guided() const { return settings_.guided; }

 private:
  size_t bucket() const;
  void decode(size_t bucket);
  void head();
  int64_t begin_here(const at::Tensor& seeds, const at::Tensor& prefix, std::optional<int64_t> tokens,
                     const std::vector<double>& scales, const std::optional<at::Tensor>& guidance);

  TokenSettings settings_;
  Prefill prefill_;
  Decode decode_;
  Head head_;
  Cache cache_;
  std::vector<Cache> views_;  // of the first slots of the cache, a bucket each
  std::shared_ptr<GraphPool> pool_;
  std::optional<Stop> stop_;
  int64_t count_ = 0, left_ = 0, taken_ = 0;
  at::Tensor z_, token_, noise_, out_, stopped_, index_, position_;
  std::optional<at::Tensor> guidance_;
  std::vector<std::unique_ptr<Graph>> graphs_;
};

}  // namespace imm

// The few-step sampling loop, on any device: every step between an initial state and images, in memory that is kept.
//
// Per step one call of the network and one sampling_step, which combines guidance, steps the state, adds fresh noise
// and scales the network's next input. With a graph pool the whole loop is captured and replayed as one graph; seeds,
// labels, guidance and the initial state are memory that it reads, so that they change without a new capture. One
// thread at a time: the memory is the loop's.
//
// B images (rows), R rows of the network: B, or 2 B with guidance, first those without a label.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "graph.h"

namespace imm {

// One row a step, float64: the times that the network is given (t, s), the coefficient of its input (c_in), those of
// flow_step (c_skip, c_out), that of the fresh noise after the step (c_noise, 0 for none) and that of the state that
// the step before began with, which is added after the step (c_kept, 0 for none).
struct SamplingTable {
  std::vector<double> t, s, c_in, c_skip, c_out, c_noise, c_kept;
};

struct SamplingSettings {
  int64_t rows;                // B
  std::vector<int64_t> shape;  // of an image
  bool guided;
  int64_t num_classes;  // 0: the network takes no labels; else label num_classes means "none"
  double sigma_data;    // of the initial state
  // C and L: numbers z that the network is conditioned on, and after them noise of its own, anew before each step; 0
  // for none.
  int64_t cond_dim, latent_dim;
  at::ScalarType state_dtype, input_dtype;
  at::Device device = at::kCPU;
};

class IMM_EXPORT SamplingLoop {
 public:
  // network(step, x [R, ...], t [R] float64, s [R] float64, labels [R] int64 if it takes any, cond [R, C + L] of the
  // input's dtype if it is conditioned) -> x's shape.
  using Network =
      std::function<at::Tensor(int64_t step, const at::Tensor& x, const at::Tensor& t, const at::Tensor& s,
                               const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& cond)>;
  // Called before the first step of a run with the labels [R].
  using Prepare = std::function<void(const std::optional<at::Tensor>& labels)>;

  // pool: of graphs, or null to run step by step.
  SamplingLoop(SamplingTable table, SamplingSettings settings, Network network, Prepare prepare,
               std::shared_ptr<GraphPool> pool);
  ~SamplingLoop();
  SamplingLoop(const SamplingLoop&) = delete;
  SamplingLoop& operator=(const SamplingLoop&) = delete;

  // Records the loop for later runs. Throws where that cannot be; runs then continue step by step.
  void capture();
  bool captured() const { return graph_ != nullptr; }

  // Images [n, ...] of n <= B seeds [n]; labels [n] where the network takes labels; guidance [1] or [n] float64 where
  // guided; x [n, ...], the state to begin with, else sigma_data times the seeds' noise; cond [n, C] where the network
  // is conditioned. Rows that n leaves are run too.
  at::Tensor run(const at::Tensor& seeds, const std::optional<at::Tensor>& labels,
                 const std::optional<at::Tensor>& guidance, const std::optional<at::Tensor>& x,
                 const std::optional<at::Tensor>& cond);

  int64_t rows() const { return settings_.rows; }
  int64_t num_classes() const { return settings_.num_classes; }
  bool guided() const { return settings_.guided; }
  int64_t cond_dim() const { return settings_.cond_dim; }
  int64_t bytes() const;  // of the memory that is kept, without what a graph keeps

 private:
  at::Tensor run_here(const at::Tensor& seeds, const std::optional<at::Tensor>& labels,
                      const std::optional<at::Tensor>& guidance, const std::optional<at::Tensor>& x,
                      const std::optional<at::Tensor>& cond);
  void body();
  void scale_input(int64_t step);
  void draw_latent(int64_t step);
  void load(const at::Tensor& seeds, const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& guidance,
            const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& cond);

  SamplingTable table_;
  SamplingSettings settings_;
  Network network_;
  Prepare prepare_;
  std::shared_ptr<GraphPool> pool_;
  int64_t copies_;
  at::Tensor state_, input_, times_, coefficients_;
  std::optional<at::Tensor> kept_;       // the state that a step began with, where the next one adds of it
  at::Tensor given_, seeds_, guidance_;  // what a call gives, int64 side by side, and its parts
  std::optional<at::Tensor> labels_, cond_;
  std::unique_ptr<Graph> graph_;
};

}  // namespace imm

#include "graph.h"

namespace imm {

MakeGraphPool& cuda_graph_pools() {
  static MakeGraphPool make = nullptr;
  return make;
}

std::shared_ptr<GraphPool> make_graph_pool(c10::Device device) {
  const MakeGraphPool make = device.is_cuda() ? cuda_graph_pools() : nullptr;
  return make ? make(device) : nullptr;
}

}  // namespace imm

// Captured work, device-neutral: a sequence of launches that is recorded once and replayed as one.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>

// What the Python module takes from the library of the ops, which hides its symbols.
#define IMM_EXPORT __attribute__((visibility("default")))

namespace imm {

class Graph {
 public:
  virtual ~Graph() = default;
  virtual void replay() = 0;  // on the current stream
};

// The memory that graphs of one owner share. They never run at the same time: each run is between wait and mark, on
// whatever stream is current.
class IMM_EXPORT GraphPool {
 public:
  virtual ~GraphPool() = default;

  // Runs body a few times, then records it. Throws what body throws, or where it cannot be recorded (it waits for the
  // device, say); the pool and earlier graphs stay as they were. One capture at a time in the process.
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& body) = 0;

  virtual void wait() = 0;         // the current stream waits for what was marked last
  virtual void mark() = 0;         // what the current stream has been given so far
  virtual void synchronize() = 0;  // the host waits for what was marked last
};

// A pool of a device, or null where the device has no graphs or the library was built without them.
IMM_EXPORT std::shared_ptr<GraphPool> make_graph_pool(c10::Device device);

// csrc/cuda/graph.cpp puts its pools here.
using MakeGraphPool = std::shared_ptr<GraphPool> (*)(c10::Device device);
MakeGraphPool& cuda_graph_pools();

}  // namespace imm

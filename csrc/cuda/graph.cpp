// CUDA graphs for ../graph.h.
#include "../graph.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <utility>

// As in ATen/cuda/CUDAContextLight.h, which includes parts of the toolkit that need not be here. Weak: the first is
// null before torch 2.12, the others may be null after torch 2.11, and are not called there.
namespace at::cuda {
struct WorkspaceMapWithMutex {
  std::map<std::tuple<void*, void*>, at::DataPtr> map;  // by cuBLAS handle and stream
  std::shared_mutex mutex;
};
TORCH_CUDA_CPP_API __attribute__((weak)) void clearCublasWorkspacesForStream(cudaStream_t stream);
TORCH_CUDA_CPP_API __attribute__((weak)) WorkspaceMapWithMutex& cublas_handle_stream_to_workspace();
TORCH_CUDA_CPP_API __attribute__((weak)) WorkspaceMapWithMutex& cublaslt_handle_stream_to_workspace();
}  // namespace at::cuda

namespace imm::cuda {
namespace {

using PoolId = decltype(at::cuda::graph_pool_handle());

// Runs of a body before it is captured: libraries make their handles and workspaces, kernels are compiled and tuned.
constexpr int kWarmUps = 3;

std::mutex& capturing() {
  static std::mutex mutex;
  return mutex;
}

// The stream of a device on which graphs are captured, and nothing else runs: the workspaces that are cleared for it
// are nobody else's. Captures take turns, so one is enough. It is never destroyed: the allocator may hold memory of it.
c10::cuda::CUDAStream capture_stream(c10::DeviceIndex device) {
  static std::map<c10::DeviceIndex, cudaStream_t> streams;  // guarded by capturing()
  cudaStream_t& stream = streams[device];
  if (!stream) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return c10::cuda::getStreamFromExternal(stream, device);
}

// torch keeps one workspace of cuBLAS and of cuBLASLt for each handle and stream, in whatever memory was current when
// it was first needed. Before a capture the stream must have none, so that the graph takes its own from its pool; after
// it torch must forget that one, which stays in the pool, lest a later graph of another pool uses it.
void clear_workspaces(cudaStream_t stream) {
  if (at::cuda::clearCublasWorkspacesForStream != nullptr) {
    at::cuda::clearCublasWorkspacesForStream(stream);
    return;
  }
  for (const auto workspaces :
       {at::cuda::cublas_handle_stream_to_workspace, at::cuda::cublaslt_handle_stream_to_workspace}) {
    at::cuda::WorkspaceMapWithMutex& kept = workspaces();
    const std::unique_lock lock(kept.mutex);
    for (auto entry = kept.map.begin(); entry != kept.map.end();) {
      entry = std::get<1>(entry->first) == stream ? kept.map.erase(entry) : std::next(entry);
    }
  }
}

// Whether something happened rather than threw.
template <class Something>
bool succeeds(const Something& something) {
  try {
    something();
    return true;
  } catch (...) {
    return false;
  }
}

// Whether a stream is being captured, by a capture that is still valid or is not.
bool capturing_now(cudaStream_t stream) {
  auto status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

// Captures body on the current stream, which does not capture any more where this throws. begun: whether the allocators
// were told of the capture.
void record(at::cuda::CUDAGraph& graph, PoolId pool, const std::function<void()>& body, bool& begun) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  begun = false;
  try {
    // Of this thread alone: what others do with the device meanwhile does not end the capture.
    graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    begun = true;
    body();
    graph.capture_end();
  } catch (...) {
    const c10::cuda::CUDAStreamGuard again(stream);  // the body may have left another
    if (capturing_now(stream)) {
      begun = true;
      succeeds([&] { graph.capture_end(); });  // the first error is the one to report
    }
    static_cast<void>(cudaGetLastError());  // of the invalid capture, which later launches must not find
    throw;
  }
}

class CudaGraph final : public Graph {
 public:
  explicit CudaGraph(c10::Device device) : device_(device) {}

  // A graph may be collected while this thread captures another one, which must not end that capture.
  ~CudaGraph() override {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    succeeds([this] { graph.reset(); });
  }

  void replay() override {
    const c10::cuda::CUDAGuard guard(device_);
    graph.replay();
  }

  at::cuda::CUDAGraph graph;
  std::shared_ptr<const PoolId> pool;  // what it shares with the graphs of the same owner

 private:
  c10::Device device_;
};

// An event of its own device, made when it is first recorded.
class Event {
 public:
  Event() = default;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_) C10_CUDA_CHECK_WARN(cudaEventDestroy(event_));
  }

  void record(cudaStream_t stream) {
    if (!event_) C10_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    C10_CUDA_CHECK(cudaEventRecord(event_, stream));
  }

  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaGraphPool final : public GraphPool {
 public:
  explicit CudaGraphPool(c10::Device device)
      : device_(c10::kCUDA, device.has_index() ? device.index() : c10::cuda::current_device()) {}

  std::unique_ptr<Graph> capture(const std::function<void()>& body) override {
    const std::lock_guard lock(capturing());
    const c10::cuda::CUDAGuard guard(device_);
    const auto caller = c10::cuda::getCurrentCUDAStream();
    TORCH_CHECK(!capturing_now(caller),
                "capture: expected a stream that is not being captured itself, since a first run waits for the device; "
                "run once before your own capture");
    const auto side = capture_stream(device_.index());
    Event before;
    before.record(caller);
    C10_CUDA_CHECK(cudaStreamWaitEvent(side, before.get(), 0));
    auto result = std::make_unique<CudaGraph>(device_);
    const c10::cuda::CUDAStreamGuard on_side(side);
    try {
      for (int i = 0; i < kWarmUps; ++i) body();
    } catch (...) {  // what was queued still runs on memory that the caller may now use or free
      static_cast<void>(cudaStreamSynchronize(side));
      throw;
    }
    c10::cuda::device_synchronize();
    clear_workspaces(side);
    c10::cuda::CUDACachingAllocator::emptyCache();  // which a capture may not do
    result->pool = pool_.lock();
    if (!result->pool) {  // the allocators forget a pool with its last graph
      result->pool = std::make_shared<const PoolId>(at::cuda::graph_pool_handle());
      pool_ = result->pool;
    }
    bool begun = false;
    try {
      record(result->graph, *result->pool, body, begun);
    } catch (...) {
      clear_workspaces(side);
      // A graph that ended well, after a body that threw, cleans up itself.
      if (!succeeds([&] { result->graph.pool(); })) abandon(std::move(result), begun);
      throw;
    }
    clear_workspaces(side);
    return result;
  }

  void wait() override {
    const c10::cuda::CUDAGuard guard(device_);
    if (last_.get()) C10_CUDA_CHECK(cudaStreamWaitEvent(c10::cuda::getCurrentCUDAStream(), last_.get(), 0));
  }

  void mark() override {
    const c10::cuda::CUDAGuard guard(device_);
    last_.record(c10::cuda::getCurrentCUDAStream());
  }

  void synchronize() override {
    if (!last_.get()) return;
    // A loop may be collected while this thread captures another one, which must not end that capture.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    C10_CUDA_CHECK(cudaEventSynchronize(last_.get()));
  }

 private:
  // After a capture that did not end well, on its stream: its memory goes back, and its pool is not used again.
  void abandon(std::unique_ptr<CudaGraph> graph, bool begun) {
    const PoolId pool = *graph->pool;
    // Ended here or, since torch 2.13, by capture_end; what never began is not this capture's to release.
    if (succeeds([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device_.index(), pool); }) || begun) {
      succeeds([&] { c10::cuda::CUDACachingAllocator::releasePool(device_.index(), pool); });
    }
    [&](auto& pinned) {
      if constexpr (requires { pinned.release_pool(pool); }) {  // since torch 2.11
        if (succeeds([&] { pinned.end_allocate_to_pool(pool); }) || begun) succeeds([&] { pinned.release_pool(pool); });
      }
    }(*at::getHostAllocator(at::kCUDA));
    pool_.reset();
    static_cast<void>(graph.release());  // kept: its destructor throws where a generator was not told of it
    // Before torch 2.12 a generator that is registered with a capture refuses everything else until the capture ends.
    auto good = std::make_unique<at::cuda::CUDAGraph>();
    const bool ended = succeeds([&] {
      record(*good, at::cuda::graph_pool_handle(), [&] { at::zeros({1}, at::TensorOptions(device_)); }, begun);
    });
    if (!ended) static_cast<void>(good.release());
  }

  c10::Device device_;
  std::weak_ptr<const PoolId> pool_;
  Event last_;
};

const bool registered = [] {
  cuda_graph_pools() = [](c10::Device device) -> std::shared_ptr<GraphPool> {
    return std::make_shared<CudaGraphPool>(device);
  };
  return true;
}();

}  // namespace
}  // namespace imm::cuda

// imm._native._C: what is not an op.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>
#include <vector>

#include "package.h"
#include "sampling_loop.h"
#include "token_loop.h"

namespace py = pybind11;

namespace {

using Column = std::vector<double>;

std::unique_ptr<imm::SamplingLoop> make_loop(Column t, Column s, Column c_in, Column c_skip, Column c_out,
                                             Column c_noise, Column c_kept, int64_t rows, std::vector<int64_t> shape,
                                             bool guided, int64_t num_classes, double sigma_data, int64_t cond_dim,
                                             int64_t latent_dim, at::ScalarType state_dtype, at::ScalarType input_dtype,
                                             const at::Device& device, imm::SamplingLoop::Network network,
                                             imm::SamplingLoop::Prepare prepare, std::shared_ptr<imm::GraphPool> pool) {
  imm::SamplingTable table{std::move(t),     std::move(s),       std::move(c_in),  std::move(c_skip),
                           std::move(c_out), std::move(c_noise), std::move(c_kept)};
  imm::SamplingSettings settings{rows,     std::move(shape), guided,      num_classes, sigma_data,
                                 cond_dim, latent_dim,       state_dtype, input_dtype, device};
  return std::make_unique<imm::SamplingLoop>(std::move(table), std::move(settings), std::move(network),
                                             std::move(prepare), std::move(pool));
}

std::unique_ptr<imm::TokenLoop> make_token_loop(int64_t rows, bool guided, int64_t token_dim, int64_t cond_dim,
                                                int64_t slots, std::vector<int64_t> stream_steps,
                                                std::vector<int64_t> stream_widths, std::vector<int64_t> buckets,
                                                at::ScalarType cond_dtype, const at::Device& device,
                                                imm::TokenLoop::Prefill prefill, imm::TokenLoop::Decode decode,
                                                imm::TokenLoop::Head head, imm::TokenLoop::Cache cache,
                                                std::shared_ptr<imm::GraphPool> pool) {
  imm::TokenSettings settings{rows,
                              guided,
                              token_dim,
                              cond_dim,
                              slots,
                              std::move(stream_steps),
                              std::move(stream_widths),
                              std::move(buckets),
                              cond_dtype,
                              device};
  return std::make_unique<imm::TokenLoop>(std::move(settings), std::move(prefill), std::move(decode), std::move(head),
                                          std::move(cache), std::move(pool));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the native library, and its sampling loop.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = IMM_BUILD_TORCH;
        info["cuda"] = IMM_BUILD_CUDA[0] ? py::object(py::str(IMM_BUILD_CUDA)) : py::none();
        info["capabilities"] = IMM_BUILD_CAPABILITIES;
        info["compiler"] = IMM_BUILD_COMPILER;
        info["flags"] = IMM_BUILD_FLAGS;
        return info;
      },
      "What the library was built for and with: torch, cuda (None without), capabilities, compiler, flags.");

  m.def("load_package", torch::wrap_pybind_function_no_gil(imm::load_package), py::arg("path"), py::arg("graph"),
        "The SamplingLoop of a package that imm export wrote.");

  m.def(
      "load_token_package",
      [](const std::string& path, bool graph) {
        imm::TokenPackage package = [&] {
          const py::gil_scoped_release release;
          return imm::load_token_package(path, graph);
        }();
        return py::make_tuple(std::move(package.loop), package.num_classes, package.token_dim, package.sigma_data);
      },
      py::arg("path"), py::arg("graph"),
      "The TokenLoop of a package of a token sampler, its num_classes, token_dim and sigma_data.");

  py::class_<imm::GraphPool, std::shared_ptr<imm::GraphPool>>(m, "GraphPool", "Memory that captured loops share.");
  m.def("make_graph_pool", &imm::make_graph_pool, py::arg("device"),
        "A GraphPool of a device, or None where there are no graphs.");

  py::class_<imm::TokenLoop>(m, "TokenLoop", "Sequences of tokens for one number of rows; see csrc/token_loop.h.")
      .def(py::init(torch::wrap_pybind_function(make_token_loop)), py::kw_only(), py::arg("rows"), py::arg("guided"),
           py::arg("token_dim"), py::arg("cond_dim"), py::arg("slots"), py::arg("stream_steps"),
           py::arg("stream_widths"), py::arg("buckets"), py::arg("cond_dtype"), py::arg("device"), py::arg("prefill"),
           py::arg("decode"), py::arg("head"), py::arg("cache"), py::arg("pool"))
      .def("capture", torch::wrap_pybind_function_no_gil(&imm::TokenLoop::capture), "Record a token for later calls.")
      .def("begin", torch::wrap_pybind_function_no_gil(&imm::TokenLoop::begin), py::arg("seeds"), py::arg("prefix"),
           py::arg("tokens"), py::arg("scales"), py::arg("guidance"), py::arg("stop"), "Start sequences.")
      .def("next", torch::wrap_pybind_function_no_gil(&imm::TokenLoop::next), py::arg("count"), "The next tokens.")
      .def_property_readonly("captured", &imm::TokenLoop::captured)
      .def_property_readonly("left", &imm::TokenLoop::left)
      .def_property_readonly("noises", &imm::TokenLoop::noises)
      .def_property_readonly("rows", &imm::TokenLoop::rows)
      .def_property_readonly("slots", &imm::TokenLoop::slots)
      .def_property_readonly("guided", &imm::TokenLoop::guided);

  py::class_<imm::SamplingLoop>(m, "SamplingLoop",
                                "The few-step loop for one number of rows; see csrc/sampling_loop.h.")
      .def(py::init(torch::wrap_pybind_function(make_loop)), py::kw_only(), py::arg("t"), py::arg("s"), py::arg("c_in"),
           py::arg("c_skip"), py::arg("c_out"), py::arg("c_noise"), py::arg("c_kept"), py::arg("rows"),
           py::arg("shape"), py::arg("guided"), py::arg("num_classes"), py::arg("sigma_data"), py::arg("cond_dim"),
           py::arg("latent_dim"), py::arg("state_dtype"), py::arg("input_dtype"), py::arg("device"), py::arg("network"),
           py::arg("prepare"), py::arg("pool"))
      .def("capture", torch::wrap_pybind_function_no_gil(&imm::SamplingLoop::capture),
           "Record the loop for later runs.")
      .def("run", torch::wrap_pybind_function_no_gil(&imm::SamplingLoop::run), py::arg("seeds"), py::arg("labels"),
           py::arg("guidance"), py::arg("x"), py::arg("cond") = py::none(),
           "Images for seeds: see csrc/sampling_loop.h.")
      .def_property_readonly("captured", &imm::SamplingLoop::captured)
      .def_property_readonly("rows", &imm::SamplingLoop::rows)
      .def_property_readonly("num_classes", &imm::SamplingLoop::num_classes)
      .def_property_readonly("guided", &imm::SamplingLoop::guided)
      .def_property_readonly("cond_dim", &imm::SamplingLoop::cond_dim)
      .def_property_readonly("bytes", &imm::SamplingLoop::bytes, "Of the memory it keeps, without a graph's.");
}

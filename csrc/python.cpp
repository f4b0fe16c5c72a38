// imm._native._C: what is not an op.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the native library.";
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
}

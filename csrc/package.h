// A sampling loop around a network that AOTInductor compiled ahead of time (`imm export`), without Python.
#pragma once

#include <memory>
#include <string>

#include "sampling_loop.h"

namespace imm {

// The loop that a package describes, on the package's device; captured there where the device has graphs and `graph`
// asks for it. Throws what is missing or wrong in the file.
IMM_EXPORT std::unique_ptr<SamplingLoop> load_package(const std::string& path, bool graph);

}  // namespace imm

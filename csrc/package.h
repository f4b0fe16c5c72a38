// Loops around networks that AOTInductor compiled ahead of time (`imm export`, imm.package), without Python.
#pragma once

#include <memory>
#include <string>

#include "sampling_loop.h"
#include "token_loop.h"

namespace imm {

// The loop that a package describes, on the package's device; captured there where the device has graphs and `graph`
// asks for it. Throws what is missing or wrong in the file.
IMM_EXPORT std::unique_ptr<SamplingLoop> load_package(const std::string& path, bool graph);

// What a package of a token sampler describes: three models, `prefill`, `decode` and `head`.
struct TokenPackage {
  std::unique_ptr<TokenLoop> loop;
  int64_t num_classes;  // the class "none" of a prefix
  int64_t token_dim;
  double sigma_data;
};
IMM_EXPORT TokenPackage load_token_package(const std::string& path, bool graph);

}  // namespace imm

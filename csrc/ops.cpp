// Defines every op from python/imm/ops/schemas.py; each op's file registers its kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <vector>

#include "imm_schemas.h"

namespace {

// Runs an out= form and counts it as a change of what it wrote, so that autograd refuses a saved tensor that was
// overwritten.
void count_writes(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) written.push_back(values[i].toTensor());
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imm, m) {
  for (const char* schema : kSchemas) m.def(schema);
}

TORCH_LIBRARY_IMPL(imm, ADInplaceOrView, m) {
  for (const std::string_view schema : kSchemas) {
    const std::string name(schema.substr(0, schema.find('(')));
    if (name.ends_with(".out")) m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&count_writes>());
  }
}

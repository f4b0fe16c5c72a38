// Defines every op from python/imm/ops/schemas.py; each op's file registers its kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "imm_schemas.h"

namespace {

std::vector<std::string> out_forms() {
  std::vector<std::string> names;
  for (const std::string_view schema : kSchemas) {
    std::string name(schema.substr(0, schema.find('(')));
    if (name.ends_with(".out")) names.push_back(std::move(name));
  }
  return names;
}

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

// Refuses a forward-mode tangent, which an out= form would drop; the other forms do so in python/imm/ops/registry.py.
void refuse_tangents(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !value.isTensor() || !value.toTensor().defined() || !value.toTensor()._fw_grad(0).defined(), op.operator_name(),
        " has no forward-mode derivative (torch.func.jvp, dual numbers): use torch's own operations");
  }
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(imm, m) {
  for (const char* schema : kSchemas) m.def(schema);
}

TORCH_LIBRARY_IMPL(imm, ADInplaceOrView, m) {
  for (const std::string& name : out_forms()) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&count_writes>());
  }
}

TORCH_LIBRARY_IMPL(imm, Autograd, m) {
  for (const std::string& name : out_forms()) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_tangents>());
  }
}

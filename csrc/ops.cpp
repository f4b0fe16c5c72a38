// Defines every op from python/imm/ops/schemas.py; each op's file registers its CPU kernels.
#include <torch/library.h>

#include "imm_schemas.h"

TORCH_LIBRARY_FRAGMENT(imm, m) {
  for (const char* schema : kSchemas) m.def(schema);
}

// The instruction sets that csrc/cpu is compiled for, and the choice between them.
//
// Each file of csrc/cpu is compiled once per set, with CPU_CAPABILITY defined to the set's name, and exports one table
// of functions in namespace imm::CPU_CAPABILITY; all else in it has internal linkage, so that no inline function
// compiled for a newer processor can be linked into code that runs on an older one.
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(IMM_X86_CAPABILITIES)
#define IMM_FOR_EACH_CAPABILITY(declaration) \
  namespace imm::DEFAULT {                   \
  declaration;                               \
  }                                          \
  namespace imm::AVX2 {                      \
  declaration;                               \
  }                                          \
  namespace imm::AVX512 {                    \
  declaration;                               \
  }
#define IMM_CHOOSE(table) \
  (::imm::chosen_capability() == 2 ? AVX512::table : ::imm::chosen_capability() == 1 ? AVX2::table : DEFAULT::table)
#else
#define IMM_FOR_EACH_CAPABILITY(declaration) \
  namespace imm::DEFAULT {                   \
  declaration;                               \
  }
#define IMM_CHOOSE(table) (DEFAULT::table)
#endif

namespace imm {

// 2 for AVX-512, 1 for AVX2, 0 otherwise: torch's own choice, which honours ATEN_CPU_CAPABILITY.
inline int chosen_capability() {
  static const int choice = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? 2 : name == "AVX2" ? 1 : 0;
  }();
  return choice;
}

}  // namespace imm

// The loop of imm::noise, compiled once per instruction set (see capability.h).
#include "../noise.h"

#include "normals.h"

namespace imm {
namespace {

void noise(const NoiseArgs& args, int64_t begin, int64_t end) {
  const int64_t pieces = (args.numel + kNoiseBlock - 1) / kNoiseBlock;  // per image
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / pieces, first = i % pieces * kNoiseBlock;
    const int64_t count = args.numel - first < kNoiseBlock ? args.numel - first : kNoiseBlock;
    float* const out = args.out + image * args.numel + first;
    normals(static_cast<uint64_t>(args.seeds.ptr[image * args.seeds.stride]), static_cast<uint64_t>(args.step), first,
            count, out);
    for (int64_t k = 0; k < count; ++k) out[k] *= args.scale;
  }
}

}  // namespace

namespace CPU_CAPABILITY {
const NoiseFunctions noise_functions{noise};
}

}  // namespace imm

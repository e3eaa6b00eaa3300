// The choice of kernels for this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "tiles.h"

namespace tramontane {

struct InstructionSet {
    const char* name;
    const Kernels& kernels;
    const TileKernels& tiles;
    const CacheKernels& cache;
};

// The instruction sets that were compiled in and that this machine runs, best first: "avx512_vnni", "avx2", "plain", ...
// Emulated ones are apart: slow, for tests, and to be had by name only.
std::vector<std::string> instruction_sets(bool emulated = false);

// Why a better instruction set that the processor has is not among them; empty where there is none.
std::string instruction_set_trouble();

// The kernels of one of them; empty: of the best. Throws std::invalid_argument where the machine does not have it.
const InstructionSet& instruction_set(const std::string& isa);

}  // namespace tramontane

// The choice of kernels for this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tramontane {

// The instruction sets that were compiled in and that this machine runs, best first: "avx512", "avx2", "plain".
std::vector<std::string> instruction_sets();

// The kernels of one of them; empty: the best. Throws std::invalid_argument where the machine does not have it.
const Kernels& kernels_for(const std::string& isa);

}  // namespace tramontane

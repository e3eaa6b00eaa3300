#include "dispatch.h"

#include <stdexcept>

namespace tramontane {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*supported)();
};

// In order of preference. The builtins also ask whether the operating system saves the wide registers.
const Candidate CANDIDATES[] = {
#if defined(TRAMONTANE_HAS_AVX512)
    {&avx512::kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
#endif
#if defined(TRAMONTANE_HAS_AVX2)
    // Every processor with AVX2 has F16C.
    {&avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&plain::kernels, [] { return true; }},
};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Candidate& candidate : CANDIDATES)
        if (candidate.supported()) names.emplace_back(candidate.kernels->name);
    return names;
}

const Kernels& kernels_for(const std::string& isa) {
    for (const Candidate& candidate : CANDIDATES)
        if ((isa.empty() || isa == candidate.kernels->name) && candidate.supported()) return *candidate.kernels;
    std::string names;
    for (const std::string& name : instruction_sets()) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instruction set '" + isa + "' is not available here; choose one of: " + names);
}

}  // namespace tramontane

#include "dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tramontane {
namespace {

struct Candidate {
    InstructionSet set;
    bool (*supported)();
};

#if defined(__x86_64__)
// The builtins also ask whether the operating system saves the wide registers. Every processor with AVX2 has F16C.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
// GCC 12 has no name for this one: leaf 7, subleaf 1, bit 4 of eax.
bool has_avx2_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// In order of preference; a build may have fewer (CMakeLists.txt).
const Candidate CANDIDATES[] = {
#if defined(TRAMONTANE_HAS_avx512_bf16)
    {{avx512_bf16::tiles.name, avx512::kernels, avx512_bf16::tiles}, has_avx512_bf16},
#endif
#if defined(TRAMONTANE_HAS_avx512_vnni)
    {{avx512_vnni::tiles.name, avx512::kernels, avx512_vnni::tiles}, has_avx512_vnni},
#endif
#if defined(TRAMONTANE_HAS_avx512)
    {{avx512::tiles.name, avx512::kernels, avx512::tiles}, has_avx512},
#endif
#if defined(TRAMONTANE_HAS_avx2_vnni)
    {{avx2_vnni::tiles.name, avx2::kernels, avx2_vnni::tiles}, has_avx2_vnni},
#endif
#if defined(TRAMONTANE_HAS_avx2)
    {{avx2::tiles.name, avx2::kernels, avx2::tiles}, has_avx2},
#endif
    {{plain::tiles.name, plain::kernels, plain::tiles}, [] { return true; }},
};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Candidate& candidate : CANDIDATES)
        if (candidate.supported()) names.emplace_back(candidate.set.name);
    return names;
}

const InstructionSet& instruction_set(const std::string& isa) {
    for (const Candidate& candidate : CANDIDATES)
        if ((isa.empty() || isa == candidate.set.name) && candidate.supported()) return candidate.set;
    std::string names;
    for (const std::string& name : instruction_sets()) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instruction set '" + isa + "' is not available here; choose one of: " + names);
}

}  // namespace tramontane

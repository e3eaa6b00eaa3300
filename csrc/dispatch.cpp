#include "dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tramontane {
namespace {

struct Candidate {
    InstructionSet set;
    bool (*supported)();
    bool emulated = false;  // to be named: never the best
};

#if defined(__x86_64__)
// The builtins also ask whether the operating system saves the wide registers. Every processor with AVX2 has F16C.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
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

#if defined(TRAMONTANE_HAS_amx)
enum class Amx { ABSENT, REFUSED, WRONG, WORKS };

// Tiles and their products of bfloat16 and of bytes (leaf 7, bits 24, 22 and 25 of edx), eight tiles of 16 rows of 64
// bytes (leaf 29).
bool has_amx_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & d >> 22 & d >> 25 & 1)) return false;
    if (!__get_cpuid_count(0x1D, 1, &a, &b, &c, &d)) return false;
    return (b & 0xFFFF) >= 64 && b >> 16 >= 8 && (c & 0xFFFF) >= 16;
}

// Asks the system for the tiles once: Linux saves them only for processes that asked.
Amx find_amx() {
    if (!has_amx_tiles()) return Amx::ABSENT;
#if defined(__linux__)
    constexpr long ASK = 0x1023, TILES = 18;
    if (syscall(SYS_arch_prctl, ASK, TILES) != 0) return Amx::REFUSED;
    return amx::computes() ? Amx::WORKS : Amx::WRONG;
#else
    return Amx::REFUSED;
#endif
}

Amx amx_state() {
    static const Amx state = find_amx();
    return state;
}
#endif

#if defined(__aarch64__)
// Linux tells in bits of two words, macOS by name.
bool has_feature([[maybe_unused]] int word, [[maybe_unused]] int bit, [[maybe_unused]] const char* name) {
#if defined(__linux__)
    return getauxval(word) >> bit & 1;
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
#else
    return false;
#endif
}
constexpr int HWCAP = 16, HWCAP2 = 26;
bool has_neon_dotprod() { return has_feature(HWCAP, 20, "hw.optional.arm.FEAT_DotProd"); }
bool has_neon_i8mm() {
    return has_neon_dotprod() && has_feature(HWCAP2, 13, "hw.optional.arm.FEAT_I8MM") &&
           has_feature(HWCAP2, 14, "hw.optional.arm.FEAT_BF16");
}
#endif

// In order of preference; a build may have fewer (CMakeLists.txt).
const Candidate CANDIDATES[] = {
#if defined(TRAMONTANE_HAS_amx)
    {{amx::tiles.name, avx512::kernels, amx::tiles, amx::cache}, [] { return amx_state() == Amx::WORKS; }},
    {{amx::emulated.name, avx512::kernels, amx::emulated, amx::emulated_cache}, has_avx512_bf16, true},
#endif
#if defined(TRAMONTANE_HAS_avx512_bf16)
    {{avx512_bf16::tiles.name, avx512::kernels, avx512_bf16::tiles, avx512_bf16::cache}, has_avx512_bf16},
#endif
#if defined(TRAMONTANE_HAS_avx512_vnni)
    {{avx512_vnni::tiles.name, avx512::kernels, avx512_vnni::tiles, avx512::cache}, has_avx512_vnni},
#endif
#if defined(TRAMONTANE_HAS_avx512)
    {{avx512::tiles.name, avx512::kernels, avx512::tiles, avx512::cache}, has_avx512},
#endif
#if defined(TRAMONTANE_HAS_avx2_vnni)
    {{avx2_vnni::tiles.name, avx2::kernels, avx2_vnni::tiles, avx2::cache}, has_avx2_vnni},
#endif
#if defined(TRAMONTANE_HAS_avx2)
    {{avx2::tiles.name, avx2::kernels, avx2::tiles, avx2::cache}, has_avx2},
#endif
#if defined(TRAMONTANE_HAS_neon_i8mm)
    {{neon_i8mm::tiles.name, neon::kernels, neon_i8mm::tiles, neon::cache}, has_neon_i8mm},
#endif
#if defined(TRAMONTANE_HAS_neon_dotprod)
    {{neon_dotprod::tiles.name, neon::kernels, neon_dotprod::tiles, neon::cache}, has_neon_dotprod},
#endif
#if defined(TRAMONTANE_HAS_neon)
    {{neon::tiles.name, neon::kernels, neon::tiles, neon::cache}, [] { return true; }},
#endif
    {{plain::tiles.name, plain::kernels, plain::tiles, plain::cache}, [] { return true; }},
};

}  // namespace

std::vector<std::string> instruction_sets(bool emulated) {
    std::vector<std::string> names;
    for (const Candidate& candidate : CANDIDATES)
        if (candidate.emulated == emulated && candidate.supported()) names.emplace_back(candidate.set.name);
    return names;
}

std::string instruction_set_trouble() {
#if defined(TRAMONTANE_HAS_amx)
    if (amx_state() == Amx::REFUSED) return "the operating system does not let this process use AMX";
    if (amx_state() == Amx::WRONG) return "AMX does not compute what it should here, so it is not used";
#endif
    return "";
}

const InstructionSet& instruction_set(const std::string& isa) {
    for (const Candidate& candidate : CANDIDATES)
        if ((isa.empty() ? !candidate.emulated : isa == candidate.set.name) && candidate.supported())
            return candidate.set;
    std::string names;
    for (const std::string& name : instruction_sets()) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instruction set '" + isa + "' is not available here; choose one of: " + names);
}

}  // namespace tramontane

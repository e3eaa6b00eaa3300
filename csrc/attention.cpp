// Attention and its cache for one instruction set: as kernels.cpp, and under the same rule.

#include <math.h>
#include <string.h>

#include <type_traits>

#include "isa.h"
#include "kernels.h"
#include "scratch.h"

#if defined(__AVX512BF16__)
#define TRAMONTANE_UNITS 1
#endif

namespace tramontane::ISA {
namespace {

#include "pieces.h"
#include "simd.h"
#include "cache.inc"
#include "attention.inc"

// Calls f with a cache's format.
template <class F>
void with_format(CacheFormat format, const F& f) {
    switch (format) {
        case CacheFormat::F32: return f.template operator()<CacheFormat::F32>();
        case CacheFormat::F16: return f.template operator()<CacheFormat::F16>();
        case CacheFormat::BF16: return f.template operator()<CacheFormat::BF16>();
        case CacheFormat::I8: return f.template operator()<CacheFormat::I8>();
        case CacheFormat::E4M3: return f.template operator()<CacheFormat::E4M3>();
    }
}

void read_all(Pool& pool, const CacheRead& r) {
    with_format(r.format, [&]<CacheFormat F>() { read_all<F>(pool, r); });
}

// Few, Many: the ways of tiles of few rows and of many, where arithmetic is fast.
template <template <CacheFormat> class Few, template <CacheFormat> class Many>
void attend_all(Pool& pool, const Attention& a, Arithmetic arithmetic) {
    with_format(a.format, [&]<CacheFormat F>() {
        if constexpr (F != CacheFormat::F32)  // which is asked for where nothing is to be rounded
            if (arithmetic == Arithmetic::FAST) return attend_all<F, Few<F>, Many<F>>(pool, a);
        attend_all<F, ByFloats<F>, ByFloats<F>>(pool, a);
    });
}

#if defined(TRAMONTANE_UNITS)
#include "dots.h"
#include "tile_unit.h"
#include "attention_tiles.inc"
#include "attention_pairs.inc"

template <CacheFormat F>
using Few = std::conditional_t<F == CacheFormat::BF16, ByPairs, ByFloats<F>>;
template <CacheFormat F>
using Pairs = ByTiles<F, PairsUnit>;
#if defined(TRAMONTANE_AMX)
template <CacheFormat F>
using Amx = ByTiles<F, TileUnit>;
template <CacheFormat F>
using Emulated = ByTiles<F, EmulatedUnit>;
#endif
#endif

}  // namespace

#if defined(TRAMONTANE_UNITS)
extern const CacheKernels cache = {fill, read_all, attend_all<Few, Pairs>};
#else
extern const CacheKernels cache = {fill, read_all, attend_all<ByFloats, ByFloats>};
#endif

}  // namespace tramontane::ISA

#if defined(TRAMONTANE_UNITS) && defined(TRAMONTANE_AMX)
namespace tramontane::amx {
using avx512_bf16::fill, avx512_bf16::read_all;
extern const CacheKernels cache = {fill, read_all, avx512_bf16::attend_all<avx512_bf16::Few, avx512_bf16::Amx>};
extern const CacheKernels emulated_cache = {fill, read_all, avx512_bf16::attend_all<avx512_bf16::Few, avx512_bf16::Emulated>};
}  // namespace tramontane::amx
#endif

// Attention and its cache for one instruction set: as kernels.cpp, and under the same rule.

#include <math.h>
#include <string.h>

#include "isa.h"
#include "kernels.h"
#include "scratch.h"

namespace tramontane::ISA {
namespace {

#include "pieces.h"
#include "simd.h"
#include "cache.inc"
#include "attention.inc"

}  // namespace

void write_cache(Pool& pool, const CacheWrite& w) { fill(pool, w); }

void attention(Pool& pool, const Attention& a) {
    switch (a.format) {
        case CacheFormat::F32: return attend_all<CacheFormat::F32>(pool, a);
        case CacheFormat::F16: return attend_all<CacheFormat::F16>(pool, a);
        case CacheFormat::BF16: return attend_all<CacheFormat::BF16>(pool, a);
        case CacheFormat::I8: return attend_all<CacheFormat::I8>(pool, a);
        case CacheFormat::E4M3: return attend_all<CacheFormat::E4M3>(pool, a);
    }
}

}  // namespace tramontane::ISA

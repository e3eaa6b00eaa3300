// The products of amx.inc on AMX, and on what emulates it, under the rule of tiles.cpp. The instructions of AMX are
// written out, so no flag of the compiler is needed for them.

#include "tiles.h"

#include <math.h>
#include <string.h>

#include <immintrin.h>

#include "scratch.h"

namespace tramontane::amx {
namespace {

#include "pieces.h"
#include "simd.h"
#include "dots.h"
#include "tiles.inc"
#include "tile_unit.h"
#include "amx.inc"

// Tokens that are few, and what is no product, are those kernels' that every machine with AMX runs too.
void rows(Pool& pool, const Rows& m) { avx512_bf16::tiles.rows(pool, m); }

}  // namespace

extern const TileKernels tiles = {"amx", matmul<TileUnit>, rows};
extern const TileKernels emulated = {"amx_emulated", matmul<EmulatedUnit>, rows};

bool computes() {
    return agree<TileUnit, EmulatedUnit, 2, 2>() && agree<TileUnit, EmulatedUnit, 2, 1>() &&
           agree<TileUnit, EmulatedUnit, 1, 2>() && agree<TileUnit, EmulatedUnit, 1, 1>();
}

}  // namespace tramontane::amx

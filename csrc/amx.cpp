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
const TileKernels& usual = avx512_bf16::tiles;
void rows(Pool& pool, const Rows& m) { usual.rows(pool, m); }
void matmul_blocks(Pool& pool, const Matmuls& c, Arithmetic a) { usual.matmul_blocks(pool, c, a); }
void rows_blocks(Pool& pool, const Rows& m) { usual.rows_blocks(pool, m); }
void matmul_coded(Pool& pool, const Matmuls& c, const Coded& w, Arithmetic a) { usual.matmul_coded(pool, c, w, a); }
void rows_coded(Pool& pool, const CodedRows& m) { usual.rows_coded(pool, m); }

}  // namespace

extern const TileKernels tiles = {"amx",         MANY - 1,     matmul<TileUnit>, rows, matmul_blocks,
                                  rows_blocks, matmul_coded, rows_coded};
extern const TileKernels emulated = {"amx_emulated", MANY - 1,     matmul<EmulatedUnit>, rows, matmul_blocks,
                                     rows_blocks,    matmul_coded, rows_coded};

bool computes() {
    return agree<TileUnit, EmulatedUnit, 2, 2>() && agree<TileUnit, EmulatedUnit, 2, 1>() &&
           agree<TileUnit, EmulatedUnit, 1, 2>() && agree<TileUnit, EmulatedUnit, 1, 1>();
}

}  // namespace tramontane::amx

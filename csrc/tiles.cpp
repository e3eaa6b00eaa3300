// The kernels of tile_products.inc for one instruction set. Compiled once for each, with TRAMONTANE_TILE_ISA its name, like
// kernels.cpp and under the same rule: nothing but the final table is visible to the linker.

#include "tiles.h"

#include <math.h>
#include <string.h>

#include <type_traits>

#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)
#include <immintrin.h>
#elif defined(TRAMONTANE_NEON)
#include <arm_neon.h>
#endif

#include "scratch.h"
#include "tables.h"

#define TRAMONTANE_TEXT(name) #name
#define TRAMONTANE_NAME(name) TRAMONTANE_TEXT(name)

namespace tramontane::TRAMONTANE_TILE_ISA {
namespace {

#include "pieces.h"
#include "simd.h"
#include "dots.h"
#include "tiles.inc"
#include "tile_products.inc"
#include "codes.h"
#include "row_blocks.h"
#include "coded.h"
#include "strips.inc"

}  // namespace

extern const TileKernels tiles = {TRAMONTANE_NAME(TRAMONTANE_TILE_ISA), INT64_MAX, matmul, rows, matmul_blocks, rows_blocks, matmul_coded, rows_coded};

}  // namespace tramontane::TRAMONTANE_TILE_ISA

// The products of amx.inc on AMX, and on what emulates it, under the rule of tiles.cpp. The instructions of AMX are
// written out, so no flag of the compiler is needed for them.

#include "tiles.h"

#include <math.h>
#include <string.h>

#include <type_traits>
#include <vector>

#include <immintrin.h>

#include "scratch.h"
#include "tables.h"

namespace tramontane::amx {
namespace {

#include "pieces.h"
#include "simd.h"
#include "dots.h"
#include "tiles.inc"
#include "tile_unit.h"
#include "amx.inc"
#include "amx_pairs.inc"
#include "amx_codes.inc"

template <class Unit, Format F>
void multiply_quantized(Pool& pool, const Matmuls& c) {
    std::vector<Matmul> codes, pairs;
    for (int64_t i = 0; i < c.count;) {
        const Run run = run_at(c, i);
        std::vector<Matmul>& list = run.whole.tokens >= MANY && Codes8::suits(run.whole, c.inputs) ? codes : pairs;
        list.insert(list.end(), c.list + i, c.list + i + run.count);
        i += run.count;
    }
    multiply<Unit>(pool, {codes.data(), int64_t(codes.size()), c.outputs, c.inputs, F}, Codes8{to_codes<F>});
    multiply<Unit>(pool, {pairs.data(), int64_t(pairs.size()), c.outputs, c.inputs, F}, Pairs{to_pairs<F>});
}

// What a file keeps in float32 is little and has its reason: a router, say.
template <class Unit>
void matmul(Pool& pool, const Matmuls& c, Arithmetic arithmetic) {
    const auto run = [&]<Format F>() {
        if constexpr (!DENSE<F>) multiply_quantized<Unit, F>(pool, c);
        else multiply<Unit>(pool, c, Pairs{F == Format::BF16 ? nullptr : to_pairs<F>});
    };
    if (c.format == Format::F32 || arithmetic != Arithmetic::FAST || c.parts)
        return avx512_bf16::tiles.matmul(pool, c, arithmetic);
    switch (c.format) {
#define FORMAT_CASE(name) \
    case Format::name: run.template operator()<Format::name>(); break;
        TRAMONTANE_TILED_FORMATS(FORMAT_CASE)
#undef FORMAT_CASE
        default: break;
    }
    multiply_few(pool, c, arithmetic);
}

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
    return agree<TileUnit, EmulatedUnit, Kind::PAIRS>() && agree<TileUnit, EmulatedUnit, Kind::CODES>();
}

}  // namespace tramontane::amx

// Tiles: how matrices are kept for the kernels of tile_products.inc, and what they hold where.
//
// A panel is 16 rows; a panel is a row of units, each with all that its 16 rows say of UNIT columns. Codes lie four
// columns of a row together, row after row: 64 bytes are 16 rows by 4 columns, which is what one instruction multiplies
// by 4 columns of a token, and lanes never need to be summed. The bytes of a block are those of GGML's formats in another
// order (scales of 6 bits become bytes), so nothing is lost. Rows and columns beyond the matrix are zeros.
#pragma once

#include <vector>

#include <cstdint>

#include "kernels.h"

namespace tramontane {

constexpr int PANEL_ROWS = 16;

// UNIT: columns; BYTES: of a unit; then where in it each thing lies.
template <Format F>
struct Tile {
    static constexpr bool KNOWN = false;
};

template <int COLUMNS, int SIZE>
struct Unit {
    static constexpr bool KNOWN = true;
    static constexpr int UNIT = COLUMNS, BYTES = SIZE;
};

// Dense: [columns][16 rows]; of bfloat16 [columns / 2][16 rows][2], which its products want in pairs.
template <>
struct Tile<Format::F32> : Unit<32, 2048> {};
template <>
struct Tile<Format::F16> : Unit<32, 1024> {};
template <>
struct Tile<Format::BF16> : Unit<32, 1024> {};

// Two blocks of 32: halves [2][16 rows] of scales, then of minima, then codes.
template <>
struct Tile<Format::Q4_0> : Unit<64, 576> {
    static constexpr int CODES = 64;
};
template <>
struct Tile<Format::Q4_1> : Unit<64, 640> {
    static constexpr int MINIMA = 64, CODES = 128;
};
template <>
struct Tile<Format::Q5_0> : Unit<64, 704> {
    static constexpr int HIGH = 64, CODES = 192;
};
template <>
struct Tile<Format::Q5_1> : Unit<64, 768> {
    static constexpr int MINIMA = 64, HIGH = 128, CODES = 256;
};
template <>
struct Tile<Format::Q8_0> : Unit<64, 1088> {
    static constexpr int CODES = 64;
};
template <>
struct Tile<Format::IQ4_NL> : Unit<64, 576> {
    static constexpr int CODES = 64;
};

// Four blocks of 32: bytes [4][16 rows] of exponents, then codes.
template <>
struct Tile<Format::MXFP4> : Unit<128, 1088> {
    static constexpr int CODES = 64;
};

// One block of 256: halves d [16 rows] (and dmin at 32), bytes [groups][16 rows] of scales (and minima), codes. Where those
// have high bits apart, these lie where they are first needed: products read a unit from its front to its end, and leave it
// to the processor to foresee that, which brings more than asking for weights ahead. codes(i), high(i): where words i of
// all rows begin.
template <>
struct Tile<Format::Q2_K> : Unit<256, 1344> {
    static constexpr int SCALES = 64;
    static constexpr int codes(int i) { return 320 + i * 64; }
};
template <>
struct Tile<Format::TQ2_0> : Unit<256, 1088> {
    static constexpr int codes(int i) { return 64 + i * 64; }
};
template <>
struct Tile<Format::Q3_K> : Unit<256, 1856> {
    static constexpr int SCALES = 64;
    static constexpr int high(int i) { return 320 + i * 128; }
    static constexpr int codes(int i) { return i < 8 ? 384 + i * 128 : 832 + i * 64; }
};
template <>
struct Tile<Format::Q4_K> : Unit<256, 2368> {
    static constexpr int SCALES = 64, MINIMA = 192;
    static constexpr int codes(int i) { return 320 + i * 64; }
};
template <>
struct Tile<Format::Q5_K> : Unit<256, 2880> {
    static constexpr int SCALES = 64, MINIMA = 192;
    static constexpr int high(int i) { return 320 + i * 128; }
    static constexpr int codes(int i) { return i < 8 ? 384 + i * 128 : 832 + i * 64; }
};
template <>
struct Tile<Format::Q6_K> : Unit<256, 3392> {
    static constexpr int SCALES = 64;
    static constexpr int high(int i) { return 320 + i / 8 * 1536 + i % 8 * 128; }
    static constexpr int codes(int i) { return 320 + i / 16 * 1536 + (i % 16 < 8 ? 64 + i % 8 * 128 : 1024 + i % 8 * 64); }
};
template <>
struct Tile<Format::IQ4_XS> : Unit<256, 2240> {
    static constexpr int SCALES = 64, CODES = 192;
};
// IQ3 and IQ2 take more than in a row of blocks, 1.24 to 1.64 times that: codes say of each column which of eight or three
// sizes it has, and its sign, where blocks name four or eight columns at once. IQ2's sizes lie and its signs as Q3_K's low
// bits and high ones.
template <>
struct Tile<Format::IQ3_XXS> : Tile<Format::IQ4_XS> {};
template <>
struct Tile<Format::IQ3_S> : Tile<Format::IQ4_XS> {};
template <int SCALES_BYTES>
struct TileOfIQ2 : Unit<256, 64 + SCALES_BYTES + 1536> {
    static constexpr int SCALES = 64, FIRST = 64 + SCALES_BYTES;
    static constexpr int high(int i) { return FIRST + i * 128; }
    static constexpr int codes(int i) { return i < 8 ? FIRST + 64 + i * 128 : FIRST + 512 + i * 64; }
};
template <>
struct Tile<Format::IQ2_XXS> : TileOfIQ2<128> {};
template <>
struct Tile<Format::IQ2_XS> : TileOfIQ2<256> {};
template <>
struct Tile<Format::IQ2_S> : TileOfIQ2<256> {};

// The formats that have tiles.
#define TRAMONTANE_TILED_FORMATS(X)                                                                       \
    X(F32) X(F16) X(BF16) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) \
    X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ4_NL) X(IQ4_XS) X(TQ2_0) X(MXFP4)

// Those that are kept in rows of blocks, which csrc/row_blocks.h reads.
#define TRAMONTANE_ROW_FORMATS(X) \
    X(Q8_1) X(Q8_K) X(IQ1_S) X(IQ1_M) X(TQ1_0) X(NVFP4) X(Q1_0) X(Q2_0)

// What rows become for their products, a panel at a time: floats [groups][16 rows] of scales, then of what is added for
// each unit of activations, then codes of a byte. GROUP: columns with one scale; WIDE: some codes are above 127.
template <int GROUP>
struct Prepared : Unit<32, 32 / GROUP * 128 + 512> {
    static constexpr int MINIMA = 32 / GROUP * 64, CODES = 2 * MINIMA;
};
constexpr Format prepared_format(int group, bool wide) { return static_cast<Format>(1000 + group + wide); }
template <>
struct Tile<prepared_format(16, false)> : Prepared<16> {};
template <>
struct Tile<prepared_format(16, true)> : Prepared<16> {};
template <>
struct Tile<prepared_format(32, false)> : Prepared<32> {};
template <>
struct Tile<prepared_format(32, true)> : Prepared<32> {};

// Packed codes (`CodePacking`), whose scales lie apart, and what they stand for: themselves, signed bytes, entries of a table.
enum class Kept { COUNTED, SIGNED, LOOKED_UP };
constexpr Format kept_format(int bits, Kept kept) { return static_cast<Format>(2000 + bits * 10 + static_cast<int>(kept)); }
template <>
struct Tile<kept_format(4, Kept::COUNTED)> : Unit<32, 256> {};
template <>
struct Tile<kept_format(4, Kept::LOOKED_UP)> : Unit<32, 256> {};
template <>
struct Tile<kept_format(8, Kept::COUNTED)> : Unit<32, 512> {};
template <>
struct Tile<kept_format(8, Kept::SIGNED)> : Unit<32, 512> {};

// Columns and bytes of a unit; zeros for a format without tiles.
struct UnitSize {
    int64_t columns, bytes;
};
inline UnitSize unit_size(Format format) {
    switch (format) {
#define UNIT_CASE(name) \
    case Format::name: return {Tile<Format::name>::UNIT, Tile<Format::name>::BYTES};
        TRAMONTANE_TILED_FORMATS(UNIT_CASE)
#undef UNIT_CASE
        default: return {0, 0};
    }
}

// A matrix [rows, columns] as tiles, `panels` by `units` of them, and as it is stored.
struct Packing {
    uint8_t* tiles;
    uint8_t* stored;
    int64_t rows, columns, panels, units;
    Format format;
};
void pack(Pool& pool, const Packing& packing);
void unpack(Pool& pool, const Packing& packing);
void pack_all(Pool& pool, const std::vector<Packing>& packings);  // as one job, which ends once
void pack_panel(const Packing& packing);  // of one panel

// Codes of 4 or 8 bits, [rows, units * bits * 4] bytes, and as `panels` of `units`, each 32 columns of 16 rows: four
// columns of all rows together, of four bits the second 16 columns above the first.
struct CodePacking {
    uint8_t* tiles;
    uint8_t* codes;
    int64_t rows, panels, units;
    int bits;
};
void pack_codes(Pool& pool, const CodePacking& packing);
void unpack_codes(Pool& pool, const CodePacking& packing);

// Products and lookups of matrices in tiles, for one instruction set.
struct TileKernels {
    const char* name;
    int64_t together;  // tokens that several matrices may meet as parts of one
    void (*matmul)(Pool&, const Matmuls&, Arithmetic);
    void (*rows)(Pool&, const Rows&);
    // Of matrices in rows: quantized blocks, and codes.
    void (*matmul_blocks)(Pool&, const Matmuls&, Arithmetic);
    void (*rows_blocks)(Pool&, const Rows&);
    void (*matmul_coded)(Pool&, const Matmuls&, const Coded&, Arithmetic);
    void (*rows_coded)(Pool&, const CodedRows&);
};

#define TRAMONTANE_TILE_ISAS(X)                                                     \
    X(plain) X(avx2) X(avx2_vnni) X(avx512) X(avx512_vnni) X(avx512_bf16)           \
    X(neon) X(neon_dotprod) X(neon_i8mm)
#define DECLARE_TILES(isa) \
    namespace isa {        \
    extern const TileKernels tiles; \
    }
TRAMONTANE_TILE_ISAS(DECLARE_TILES)
#undef DECLARE_TILES

// Products of many tokens on AMX, and on what emulates it; all else is avx512_bf16's.
namespace amx {
extern const TileKernels tiles, emulated;
// Whether this machine's AMX, which must be there and permitted, computes what the emulation does.
bool computes();
}  // namespace amx

}  // namespace tramontane

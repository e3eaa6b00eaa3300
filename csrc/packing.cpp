// From rows of blocks to tiles and back; see tiles.h. Moves words of four bytes, mostly: fast without special instructions.

#include <algorithm>
#include <cstring>

#include "tables.h"
#include "tiles.h"

namespace tramontane {
namespace {

#include "pieces.h"
#include "grid_blocks.h"

constexpr int R = PANEL_ROWS;

// The bytes of one unit: where its rows begin in the stored matrix, `row_bytes` apart, `rows` of them.
struct Place {
    uint8_t* unit;
    uint8_t* row;
    int64_t row_bytes;
    int rows;
    bool packing;
};

// `count` words from byte `from` of each row, the i-th of all rows together to byte to(i) of the unit; or back.
template <class To>
inline void words(const Place& p, const To& to, int from, int count) {
    for (int r = 0; r < p.rows; r++) {
        uint8_t* row = p.row + r * p.row_bytes + from;
        uint8_t* tile = p.unit + r * 4;
        for (int i = 0; i < count; i++) p.packing ? memcpy(tile + to(i), row + i * 4, 4) : memcpy(row + i * 4, tile + to(i), 4);
    }
}
// To [count][R] words at byte `to`.
inline void words(const Place& p, int to, int from, int count) {
    words(p, [=](int i) { return to + i * R * 4; }, from, count);
}

// A piece of SIZE bytes of each row to [R] pieces at byte `to` of the unit.
template <int SIZE>
inline void pieces(const Place& p, int to, int from) {
    for (int r = 0; r < p.rows; r++) {
        uint8_t* row = p.row + r * p.row_bytes + from;
        uint8_t* tile = p.unit + to + r * SIZE;
        p.packing ? memcpy(tile, row, SIZE) : memcpy(row, tile, SIZE);
    }
}

// What lies in a row as bytes `count`, each to [count][R] at byte `to`, changed on the way.
template <class ToTile, class ToRow>
inline void bytes(const Place& p, int to, int count, const ToTile& to_tile, const ToRow& to_row) {
    for (int r = 0; r < p.rows; r++) {
        uint8_t* row = p.row + r * p.row_bytes;
        uint8_t values[32];
        if (p.packing) {
            to_tile(values, row);
            for (int i = 0; i < count; i++) p.unit[to + i * R + r] = values[i];
        } else {
            for (int i = 0; i < count; i++) values[i] = p.unit[to + i * R + r];
            to_row(row, values);
        }
    }
}

// Bits 0, 4, 8, ... of a word to its lowest byte, and back.
inline uint32_t gather_bits(uint32_t x) {
    x &= 0x11111111;
    x = (x | x >> 3) & 0x03030303;
    x = (x | x >> 6) & 0x000F000F;
    return (x | x >> 12) & 0xFF;
}
inline uint32_t spread_bits(uint32_t x) {
    x = (x | x << 12) & 0x000F000F;
    x = (x | x << 6) & 0x03030303;
    return (x | x << 3) & 0x11111111;
}

// The 32 high bits of a block: bit b of byte j of a row's word stands for column 4 b + j.
inline void high_bits(const Place& p, int to, int from) {
    for (int r = 0; r < p.rows; r++) {
        uint8_t* row = p.row + r * p.row_bytes + from;
        uint8_t* tile = p.unit + to + r * 4;
        uint32_t bits = 0;
        if (p.packing) {
            memcpy(&bits, row, 4);
            for (int j = 0; j < 4; j++) tile[j] = uint8_t(gather_bits(bits >> j));
        } else {
            for (int j = 0; j < 4; j++) bits |= spread_bits(tile[j]) << j;
            memcpy(row, &bits, 4);
        }
    }
}

// Signed bytes to those plus 128, or back: the same.
inline void flip_signs(uint8_t* codes, int count) {
    for (int i = 0; i < count; i++) codes[i] ^= 0x80;
}

// Eight scales and eight minima of 6 bits in 12 bytes at `from`.
template <int FROM>
inline void scales_k4(const Place& p, int to) {
    bytes(
        p, to, 16,
        [](uint8_t* values, const uint8_t* row) {
            const uint8_t* s = row + FROM;
            for (int i = 0; i < 4; i++) {
                values[i] = s[i] & 63;
                values[8 + i] = s[4 + i] & 63;
                values[4 + i] = uint8_t((s[8 + i] & 15) | s[i] >> 6 << 4);
                values[12 + i] = uint8_t(s[8 + i] >> 4 | s[4 + i] >> 6 << 4);
            }
        },
        [](uint8_t* row, const uint8_t* values) {
            uint8_t* s = row + FROM;
            for (int i = 0; i < 4; i++) {
                s[i] = uint8_t(values[i] | values[4 + i] >> 4 << 6);
                s[4 + i] = uint8_t(values[8 + i] | values[12 + i] >> 4 << 6);
                s[8 + i] = uint8_t((values[4 + i] & 15) | values[12 + i] << 4);
            }
        });
}

// Sixteen scales of 6 bits in 12 bytes at 96 of a Q3_K block, less 32.
inline void scales_k3(const Place& p, int to) {
    bytes(
        p, to, 16,
        [](uint8_t* values, const uint8_t* row) {
            const uint8_t* s = row + 96;
            for (int i = 0; i < 16; i++) {
                const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4, high = s[8 + i % 4] >> (i / 4 * 2) & 3;
                values[i] = uint8_t((low | high << 4) - 32);
            }
        },
        [](uint8_t* row, const uint8_t* values) {
            uint8_t* s = row + 96;
            memset(s, 0, 12);
            for (int i = 0; i < 16; i++) {
                const int scale = uint8_t(values[i] + 32);
                s[i % 8] |= uint8_t((scale & 15) << (i / 8 * 4));
                s[8 + i % 4] |= uint8_t((scale >> 4 & 3) << (i / 4 * 2));
            }
        });
}

// Eight scales of 6 bits of an IQ4_XS block, less 32: two high bits each from byte 2 on, low nibbles from byte 4 on.
inline void scales_xs(const Place& p, int to) {
    bytes(
        p, to, 8,
        [](uint8_t* values, const uint8_t* row) {
            for (int i = 0; i < 8; i++)
                values[i] = uint8_t(((row[4 + i / 2] >> i % 2 * 4 & 15) | (row[2 + i / 4] >> i % 4 * 2 & 3) << 4) - 32);
        },
        [](uint8_t* row, const uint8_t* values) {
            memset(row + 2, 0, 6);
            for (int i = 0; i < 8; i++) {
                const int scale = uint8_t(values[i] + 32);
                row[4 + i / 2] |= uint8_t((scale & 15) << i % 2 * 4);
                row[2 + i / 4] |= uint8_t((scale >> 4 & 3) << i % 4 * 2);
            }
        });
}

inline void scales_plain(const Place& p, int to, int from) {
    bytes(
        p, to, 16, [=](uint8_t* values, const uint8_t* row) { memcpy(values, row + from, 16); },
        [=](uint8_t* row, const uint8_t* values) { memcpy(row + from, values, 16); });
}

// Four bits to the lowest of a byte each, and back.
inline uint32_t spread_four(uint32_t four) { return four * 0x00204081 & 0x01010101; }
inline uint32_t gather_four(uint32_t bytes) { return (bytes & 0x01010101) * 0x01020408 >> 24; }

// A row's levels and signs of 32 columns: words of four columns.
template <class B>
inline void named(const Place& p, int r, int j, uint32_t (&levels)[8], uint32_t (&signs)[8]) {
    const Named n = B::get(p.row + r * p.row_bytes, j);
#pragma GCC unroll 8
    for (int w = 0; w < 8; w++) {
        levels[w] = B::GRID.levels[n.places[w / B::GRID.WORDS]][w % B::GRID.WORDS];
        signs[w] = spread_four(n.signs >> 4 * w & 15);
    }
}
template <class B>
inline void name(const Place& p, int r, int j, const uint32_t (&levels)[8], const uint32_t (&signs)[8]) {
    Named n = {};
    for (int w = 0; w < 8; w += B::GRID.WORDS) n.places[w / B::GRID.WORDS] = B::GRID.place(levels + w);
    for (int w = 0; w < 8; w++) n.signs |= gather_four(signs[w]) << 4 * w;
    B::put(p.row + r * p.row_bytes, j, n);
}

// IQ3's nibbles at byte `to`.
template <class B>
inline void thirds(const Place& p, int to) {
    for (int r = 0; r < p.rows; r++)
        for (int j = 0; j < 8; j++) {
            uint8_t* tile = p.unit + to + j * 256 + r * 4;
            uint32_t levels[8], signs[8];
            if (p.packing) {
                named<B>(p, r, j, levels, signs);
                for (int w = 0; w < 4; w++) {
                    const uint32_t both = levels[w] | signs[w] << 3 | levels[w + 4] << 4 | signs[w + 4] << 7;
                    memcpy(tile + w * R * 4, &both, 4);
                }
                continue;
            }
            for (int w = 0; w < 8; w++) {
                uint32_t both;
                memcpy(&both, tile + w % 4 * R * 4, 4);
                levels[w] = both >> w / 4 * 4 & 0x07070707;
                signs[w] = both >> (w / 4 * 4 + 3) & 0x01010101;
            }
            name<B>(p, r, j, levels, signs);
        }
}

// IQ2's pairs of bits and its signs, which four and eight times 32 columns share.
template <Format F>
inline void quarters(const Place& p) {
    using T = Tile<F>;
    using B = GridBlock<F>;
    for (int r = 0; r < p.rows; r++) {
        uint8_t* tile = p.unit + r * 4;
        uint32_t pairs[2][8] = {}, bits[8] = {}, levels[8], signs[8];
        if (p.packing) {
            for (int j = 0; j < 8; j++) {
                named<B>(p, r, j, levels, signs);
                for (int w = 0; w < 8; w++) {
                    pairs[j / 4][w] |= levels[w] << j % 4 * 2;
                    bits[w] |= signs[w] << j;
                }
            }
            for (int w = 0; w < 8; w++) {
                memcpy(tile + T::codes(w), &pairs[0][w], 4);
                memcpy(tile + T::codes(8 + w), &pairs[1][w], 4);
                memcpy(tile + T::high(w), &bits[w], 4);
            }
            continue;
        }
        for (int w = 0; w < 8; w++) {
            memcpy(&pairs[0][w], tile + T::codes(w), 4);
            memcpy(&pairs[1][w], tile + T::codes(8 + w), 4);
            memcpy(&bits[w], tile + T::high(w), 4);
        }
        for (int j = 0; j < 8; j++) {
            for (int w = 0; w < 8; w++) {
                levels[w] = pairs[j / 4][w] >> j % 4 * 2 & 0x03030303;
                signs[w] = bits[w] >> j & 0x01010101;
            }
            name<B>(p, r, j, levels, signs);
        }
    }
}

// Scales of four bits as bytes, twice each and 1. On top of words that are `apart` bytes apart, the first's last byte
// at `from`: where the way back leaves zeros in the words.
inline void scales_on_top(const Place& p, int to, int from, int apart) {
    bytes(
        p, to, 8,
        [=](uint8_t* values, const uint8_t* row) {
            for (int i = 0; i < 8; i++) values[i] = uint8_t((row[from + apart * i] >> 4) * 2 + 1);
        },
        [=](uint8_t* row, const uint8_t* values) {
            for (int i = 0; i < 8; i++) {
                const uint32_t word = uint32_t(values[i] >> 1) << 28;
                memcpy(row + from - 3 + apart * i, &word, 4);
            }
        });
}
// Two in a byte.
inline void scales_in_pairs(const Place& p, int to, int from, int count) {
    bytes(
        p, to, count,
        [=](uint8_t* values, const uint8_t* row) {
            for (int i = 0; i < count; i++) values[i] = uint8_t((row[from + i / 2] >> i % 2 * 4 & 15) * 2 + 1);
        },
        [=](uint8_t* row, const uint8_t* values) {
            for (int i = 0; i < count; i += 2) row[from + i / 2] = uint8_t(values[i] >> 1 | values[i + 1] >> 1 << 4);
        });
}

// One block of each row; `b` is which of its unit.
template <Format F>
void block(const Place& p, int b) {
    using T = Tile<F>;
    if constexpr (F == Format::F32) {
        words(p, 0, 0, 32);
    } else if constexpr (F == Format::F16) {
        for (int k = 0; k < 32; k++) pieces<2>(p, k * R * 2, k * 2);
    } else if constexpr (F == Format::BF16) {
        words(p, 0, 0, 16);
    } else if constexpr (F == Format::Q4_0) {
        pieces<2>(p, b * 32, 0);
        words(p, T::CODES + b * 256, 2, 4);
    } else if constexpr (F == Format::Q4_1) {
        pieces<2>(p, b * 32, 0);
        pieces<2>(p, T::MINIMA + b * 32, 2);
        words(p, T::CODES + b * 256, 4, 4);
    } else if constexpr (F == Format::Q5_0) {
        pieces<2>(p, b * 32, 0);
        high_bits(p, T::HIGH + b * 64, 2);
        words(p, T::CODES + b * 256, 6, 4);
    } else if constexpr (F == Format::Q5_1) {
        pieces<2>(p, b * 32, 0);
        pieces<2>(p, T::MINIMA + b * 32, 2);
        high_bits(p, T::HIGH + b * 64, 4);
        words(p, T::CODES + b * 256, 8, 4);
    } else if constexpr (F == Format::Q8_0) {
        pieces<2>(p, b * 32, 0);
        words(p, T::CODES + b * 512, 2, 8);
        if (p.packing)
            flip_signs(p.unit + T::CODES + b * 512, 512);
        else
            for (int r = 0; r < p.rows; r++) flip_signs(p.row + r * p.row_bytes + 2, 32);
    } else if constexpr (F == Format::IQ4_NL) {
        pieces<2>(p, b * 32, 0);
        words(p, T::CODES + b * 256, 2, 4);
    } else if constexpr (F == Format::MXFP4) {
        pieces<1>(p, b * R, 0);
        words(p, T::CODES + b * 256, 1, 4);
    } else if constexpr (F == Format::IQ4_XS) {
        pieces<2>(p, 0, 0);
        scales_xs(p, T::SCALES);
        for (int j = 0; j < 8; j++) words(p, T::CODES + j * 256, 8 + j * 16, 4);
    } else if constexpr (F == Format::IQ3_XXS) {
        pieces<2>(p, 0, 0);
        scales_on_top(p, T::SCALES, 69, 4);
        thirds<GridBlock<Format::IQ3_XXS>>(p, T::CODES);
    } else if constexpr (F == Format::IQ3_S) {
        pieces<2>(p, 0, 0);
        scales_in_pairs(p, T::SCALES, 106, 8);
        thirds<GridBlock<Format::IQ3_S>>(p, T::CODES);
    } else if constexpr (F == Format::IQ2_XXS) {
        pieces<2>(p, 0, 0);
        scales_on_top(p, T::SCALES, 9, 8);
        quarters<F>(p);
    } else if constexpr (F == Format::IQ2_XS) {
        pieces<2>(p, 0, 0);
        scales_in_pairs(p, T::SCALES, 66, 16);
        quarters<F>(p);
    } else if constexpr (F == Format::IQ2_S) {
        pieces<2>(p, 0, 0);
        scales_in_pairs(p, T::SCALES, 74, 16);
        quarters<F>(p);
    } else if constexpr (F == Format::TQ2_0) {
        words(p, T::codes, 0, 16);
        pieces<2>(p, 0, 64);
    } else if constexpr (F == Format::Q2_K) {
        scales_plain(p, T::SCALES, 0);
        words(p, T::codes, 16, 16);
        pieces<2>(p, 0, 80);
        pieces<2>(p, 32, 82);
    } else if constexpr (F == Format::Q3_K) {
        words(p, T::high, 0, 8);
        words(p, T::codes, 32, 16);
        scales_k3(p, T::SCALES);
        pieces<2>(p, 0, 108);
    } else if constexpr (F == Format::Q4_K) {
        pieces<2>(p, 0, 0);
        pieces<2>(p, 32, 2);
        scales_k4<4>(p, T::SCALES);
        words(p, T::codes, 16, 32);
    } else if constexpr (F == Format::Q5_K) {
        pieces<2>(p, 0, 0);
        pieces<2>(p, 32, 2);
        scales_k4<4>(p, T::SCALES);
        words(p, T::high, 16, 8);
        words(p, T::codes, 48, 32);
    } else if constexpr (F == Format::Q6_K) {
        words(p, T::codes, 0, 32);
        words(p, T::high, 128, 16);
        scales_plain(p, T::SCALES, 192);
        pieces<2>(p, 0, 208);
    }
}

// Elements and bytes of what `block` moves: a format's block, or a unit of a dense one.
template <Format F>
constexpr UnitSize stored() {
    if constexpr (F == Format::F32) return {32, 128};
    if constexpr (F == Format::F16 || F == Format::BF16) return {32, 64};
    switch (F) {
#define STORED_CASE(name, elements, bytes) \
    case Format::name: return {elements, bytes};
        TRAMONTANE_BLOCK_FORMATS(STORED_CASE)
#undef STORED_CASE
        default: return {1, 1};
    }
}

template <Format F>
void panels(const Packing& m, bool packing, int64_t begin, int64_t end) {
    constexpr UnitSize size = stored<F>();
    const int64_t width = row_bytes(F, m.columns);
    uint8_t padded[R * 128];
    for (int64_t n = begin; n < end; n++) {
        const int rows = int(m.rows - n * R < R ? m.rows - n * R : R);
        for (int64_t u = 0; u < m.units; u++) {
            uint8_t* unit = m.tiles + (n * m.units + u) * Tile<F>::BYTES;
            if (packing) memset(unit, 0, Tile<F>::BYTES);
            for (int b = 0; b < Tile<F>::UNIT / size.columns; b++) {
                const int64_t k = u * Tile<F>::UNIT + b * size.columns, left = m.columns - k;
                if (left <= 0) break;
                uint8_t* row = m.stored + n * R * width + row_bytes(F, k);
                if (left >= size.columns) {
                    block<F>({unit, row, width, rows, packing}, b);
                    continue;
                }
                // Only rows of dense formats end within a block.
                const int64_t some = row_bytes(F, left);
                memset(padded, 0, sizeof padded);
                if (packing)
                    for (int r = 0; r < rows; r++) memcpy(padded + r * size.bytes, row + r * width, some);
                block<F>({unit, padded, size.bytes, rows, packing}, b);
                if (!packing)
                    for (int r = 0; r < rows; r++) memcpy(row + r * width, padded + r * size.bytes, some);
            }
        }
    }
}

void panels(const Packing& m, bool packing, int64_t begin, int64_t end) {
    switch (m.format) {
#define PANELS_CASE(name) \
    case Format::name: return panels<Format::name>(m, packing, begin, end);
        TRAMONTANE_TILED_FORMATS(PANELS_CASE)
#undef PANELS_CASE
        default: return;
    }
}

void move(Pool& pool, const Packing& m, bool packing) {
    parallel(pool, m.panels, 1, [&](int64_t begin, int64_t end) { panels(m, packing, begin, end); });
}

// Four nibbles to a byte each, and back.
inline uint32_t spread_nibbles(uint32_t x) {
    x = (x | x << 8) & 0x00FF00FF;
    return (x | x << 4) & 0x0F0F0F0F;
}
inline uint32_t gather_nibbles(uint32_t x) {
    x &= 0x0F0F0F0F;
    x = (x | x >> 4) & 0x00FF00FF;
    return (x | x >> 8) & 0xFFFF;
}

void code_panel(const CodePacking& m, bool packing, int64_t n) {
    const int64_t row_bytes = m.bits * 4, unit_bytes = row_bytes * R;
    const int rows = int(m.rows - n * R < R ? m.rows - n * R : R);
    for (int64_t u = 0; u < m.units; u++) {
        uint8_t* unit = m.tiles + (n * m.units + u) * unit_bytes;
        uint8_t* first = m.codes + (n * R * m.units + u) * row_bytes;
        if (packing && rows < R) memset(unit, 0, unit_bytes);
        if (m.bits == 8) {
            words({unit, first, m.units * row_bytes, rows, packing}, 0, 0, 8);
            continue;
        }
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < 4; w++) {
                uint8_t* tile = unit + (w * R + r) * 4;
                uint8_t* row = first + r * m.units * row_bytes + w * 2;
                uint16_t low, high;
                uint32_t both;
                if (packing) {
                    memcpy(&low, row, 2);
                    memcpy(&high, row + 8, 2);
                    both = spread_nibbles(low) | spread_nibbles(high) << 4;
                    memcpy(tile, &both, 4);
                } else {
                    memcpy(&both, tile, 4);
                    low = uint16_t(gather_nibbles(both));
                    high = uint16_t(gather_nibbles(both >> 4));
                    memcpy(row, &low, 2);
                    memcpy(row + 8, &high, 2);
                }
            }
    }
}

void move_codes(Pool& pool, const CodePacking& m, bool packing) {
    parallel(pool, m.panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) code_panel(m, packing, n);
    });
}

}  // namespace

void pack_codes(Pool& pool, const CodePacking& packing) { move_codes(pool, packing, true); }
void unpack_codes(Pool& pool, const CodePacking& packing) { move_codes(pool, packing, false); }
void pack(Pool& pool, const Packing& packing) { move(pool, packing, true); }
void unpack(Pool& pool, const Packing& packing) { move(pool, packing, false); }
void pack_all(Pool& pool, const std::vector<Packing>& packings) {
    std::vector<int64_t> ends;  // of each, in panels of them all
    for (const Packing& m : packings) ends.push_back((ends.empty() ? 0 : ends.back()) + m.panels);
    parallel(pool, ends.empty() ? 0 : ends.back(), 1, [&](int64_t begin, int64_t end) {
        for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; i++) {
            const int64_t first = ends[i] - packings[i].panels, last = least(end, ends[i]);
            panels(packings[i], true, begin - first, last - first);
            begin = last;
        }
    });
}
void pack_panel(const Packing& packing) { panels(packing, true, 0, 1); }

}  // namespace tramontane

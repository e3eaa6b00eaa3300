// What the codes of lookup formats stand for. The numbers come from kernels/tables.py, which says their source.
#pragma once

#include <cstdint>

namespace tramontane {

constexpr int IQ4_ZERO = 128, E2M1_ZERO = 12, IQ2_ZERO = 64, IQ3_XXS_ZERO = 64, IQ3_S_ZERO = 16;  // what stands for 0

// A grid of entries of WIDTH numbers, of LEVELS sizes: which of these each number of an entry has, a byte each, and the way
// back. The sizes, then from SIGN on what is as much below 0, counted from ZERO.
template <int ENTRIES, int WIDTH, int LEVELS, int ZERO>
struct Grid {
    static_assert((WIDTH == 4 && LEVELS == 8) || (WIDTH == 8 && LEVELS == 3));
    static constexpr int WORDS = WIDTH / 4, SIGN = LEVELS == 8 ? 8 : 4;
    uint32_t levels[ENTRIES][WORDS];
    uint16_t places[WIDTH == 4 ? 8 * 8 * 8 * 8 : 3 * 3 * 3 * 3 * 3 * 3 * 3 * 3];
    uint8_t sizes[16];

    bool fill(const float* values, int64_t count);
    // The entry that has these levels.
    int place(const uint32_t* words) const { return places[number(words)]; }
    // With levels as digits.
    static int number(const uint32_t* words) {
        int number = 0;
        for (int i = WIDTH - 1; i >= 0; i--) {
            const int level = int(words[i / 4] >> i % 4 * 8 & 255);
            number = number * LEVELS + (level < LEVELS ? level : 0);
        }
        return number;
    }
};

struct Tables {
    int8_t iq1_s[2048][8];      // eight times the numbers
    uint8_t iq4[16], e2m1[16];  // so much more that they have no sign
    Grid<256, 8, 3, IQ2_ZERO> iq2_xxs;
    Grid<512, 8, 3, IQ2_ZERO> iq2_xs;
    Grid<1024, 8, 3, IQ2_ZERO> iq2_s;
    Grid<256, 4, 8, IQ3_XXS_ZERO> iq3_xxs;
    Grid<512, 4, 8, IQ3_S_ZERO> iq3_s;
    float e8m0[256], ue4m3[256];
};

// Filled once, before any kernel runs.
extern Tables tables;

// Sets the table of that name of kernels/tables.py; false where the name or the number of values is another.
bool set_table(const char* name, const float* values, int64_t count);

}  // namespace tramontane

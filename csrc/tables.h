// What the codes of lookup formats stand for. The numbers come from kernels/tables.py, which says their source.
#pragma once

#include <cstdint>

namespace tramontane {

constexpr int IQ4_ZERO = 128, E2M1_ZERO = 12, IQ3_XXS_ZERO = 64, IQ3_S_ZERO = 16;  // what stands for 0

// A grid of IQ3, whose numbers are eight: which of them each entry's four are, a byte each, and back, 12 bits being those
// of four. The eight, then what is as much below 0, counted from ZERO.
template <int SIZE, int ZERO>
struct Levels {
    uint32_t entries[SIZE];
    uint16_t places[4096];
    uint8_t sizes[16];

    bool fill(const float* values, int64_t count);
};

struct Tables {
    int8_t iq2_xxs[256][8], iq2_xs[512][8], iq2_s[1024][8], iq1_s[2048][8];
    // iq1_s: eight times the numbers.
    uint8_t iq4[16], e2m1[16];  // so much more that they have no sign
    Levels<256, IQ3_XXS_ZERO> iq3_xxs;
    Levels<512, IQ3_S_ZERO> iq3_s;
    uint64_t signs[128];  // bytes of 1 where a bit is set, the last where their number is odd
    float e8m0[256], ue4m3[256];
};

// Filled once, before any kernel runs.
extern Tables tables;

// Sets the table of that name of kernels/tables.py; false where the name or the number of values is another.
bool set_table(const char* name, const float* values, int64_t count);

}  // namespace tramontane

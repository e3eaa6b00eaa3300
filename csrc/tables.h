// What the codes of lookup formats stand for. The numbers come from kernels/tables.py, which says their source.
#pragma once

#include <cstdint>

namespace tramontane {

constexpr int IQ4_ZERO = 128, E2M1_ZERO = 12;  // what stands for 0

struct Tables {
    int8_t iq2_xxs[256][8], iq2_xs[512][8], iq2_s[1024][8], iq3_xxs[256][4], iq3_s[512][4], iq1_s[2048][8];
    // iq1_s: eight times the numbers.
    uint8_t iq4[16], e2m1[16];  // so much more that they have no sign
    float e8m0[256], ue4m3[256];
};

// Filled once, before any kernel runs.
extern Tables tables;

// Sets the table of that name of kernels/tables.py; false where the name or the number of values is another.
bool set_table(const char* name, const float* values, int64_t count);

}  // namespace tramontane

#include "tables.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <vector>

namespace tramontane {

namespace {

template <class T>
bool fill(T* target, int64_t size, const float* values, int64_t count, float factor = 1, float more = 0) {
    if (count != size) return false;
    for (int64_t i = 0; i < count; i++) target[i] = static_cast<T>(values[i] * factor + more);
    return true;
}

// Bytes of 1 for the bits of `seven`, and an eighth that makes their number even.
constexpr uint64_t even_signs(uint32_t seven) {
    uint64_t bytes = 0, odd = 0;
    for (int i = 0; i < 7; i++) {
        bytes |= uint64_t(seven >> i & 1) << 8 * i;
        odd ^= seven >> i & 1;
    }
    return bytes | odd << 56;
}

Tables with_signs() {
    Tables made = {};
    for (uint32_t i = 0; i < 128; i++) made.signs[i] = even_signs(i);
    return made;
}

}  // namespace

Tables tables = with_signs();

template <int SIZE, int ZERO>
bool Levels<SIZE, ZERO>::fill(const float* values, int64_t count) {
    if (count != 4 * SIZE) return false;
    std::set<float> different(values, values + count);
    if (different.size() != 8) return false;
    const std::vector<float> levels(different.begin(), different.end());
    for (int i = 0; i < 8; i++) {
        sizes[i] = static_cast<uint8_t>(ZERO + levels[i]);
        sizes[8 + i] = static_cast<uint8_t>(ZERO - levels[i]);
    }
    for (int i = 0; i < SIZE; i++) {
        entries[i] = 0;
        int place = 0;
        for (int j = 0; j < 4; j++) {
            const auto level = std::lower_bound(levels.begin(), levels.end(), values[4 * i + j]) - levels.begin();
            entries[i] |= static_cast<uint32_t>(level) << 8 * j;
            place |= static_cast<int>(level) << 3 * j;
        }
        places[place] = static_cast<uint16_t>(i);
    }
    return true;
}

bool set_table(const char* name, const float* values, int64_t count) {
    struct Grid {
        const char* name;
        int8_t* target;
        int64_t size;
    };
    const Grid grids[] = {
        {"IQ2_XXS", tables.iq2_xxs[0], sizeof tables.iq2_xxs}, {"IQ2_XS", tables.iq2_xs[0], sizeof tables.iq2_xs},
        {"IQ2_S", tables.iq2_s[0], sizeof tables.iq2_s},
    };
    for (const Grid& g : grids)
        if (strcmp(g.name, name) == 0) return fill(g.target, g.size, values, count);
    if (strcmp(name, "IQ1_S") == 0) return fill(tables.iq1_s[0], sizeof tables.iq1_s, values, count, 8);
    if (strcmp(name, "IQ3_XXS") == 0) return tables.iq3_xxs.fill(values, count);
    if (strcmp(name, "IQ3_S") == 0) return tables.iq3_s.fill(values, count);
    if (strcmp(name, "IQ4") == 0) return fill(tables.iq4, 16, values, count, 1, IQ4_ZERO);
    if (strcmp(name, "E2M1") == 0) return fill(tables.e2m1, 16, values, count, 1, E2M1_ZERO);
    if (strcmp(name, "E8M0") == 0) return fill(tables.e8m0, 256, values, count);
    if (strcmp(name, "UE4M3") == 0) return fill(tables.ue4m3, 256, values, count);
    return false;
}

}  // namespace tramontane

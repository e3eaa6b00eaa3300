#include "tables.h"

#include <cstring>
#include <iterator>
#include <set>

namespace tramontane {
namespace {

template <class T>
bool fill(T* target, int64_t size, const float* values, int64_t count, float factor = 1, float more = 0) {
    if (count != size) return false;
    for (int64_t i = 0; i < count; i++) target[i] = static_cast<T>(values[i] * factor + more);
    return true;
}

}  // namespace

Tables tables;

template <int ENTRIES, int WIDTH, int LEVELS, int ZERO>
bool Grid<ENTRIES, WIDTH, LEVELS, ZERO>::fill(const float* values, int64_t count) {
    const std::set<float> different(values, values + count);
    if (count != ENTRIES * WIDTH || different.size() != LEVELS) return false;
    for (int level = 0; const float size : different) {
        sizes[level] = static_cast<uint8_t>(ZERO + size);
        sizes[SIGN + level++] = static_cast<uint8_t>(ZERO - size);
    }
    for (int i = 0; i < ENTRIES; i++) {
        for (int j = 0; j < WIDTH; j++) {
            const auto level = std::distance(different.begin(), different.find(values[WIDTH * i + j]));
            levels[i][j / 4] |= static_cast<uint32_t>(level) << j % 4 * 8;
        }
        places[number(levels[i])] = static_cast<uint16_t>(i);
    }
    return true;
}

bool set_table(const char* name, const float* values, int64_t count) {
    if (strcmp(name, "IQ1_S") == 0) return fill(tables.iq1_s[0], sizeof tables.iq1_s, values, count, 8);
    if (strcmp(name, "IQ2_XXS") == 0) return tables.iq2_xxs.fill(values, count);
    if (strcmp(name, "IQ2_XS") == 0) return tables.iq2_xs.fill(values, count);
    if (strcmp(name, "IQ2_S") == 0) return tables.iq2_s.fill(values, count);
    if (strcmp(name, "IQ3_XXS") == 0) return tables.iq3_xxs.fill(values, count);
    if (strcmp(name, "IQ3_S") == 0) return tables.iq3_s.fill(values, count);
    if (strcmp(name, "IQ4") == 0) return fill(tables.iq4, 16, values, count, 1, IQ4_ZERO);
    if (strcmp(name, "E2M1") == 0) return fill(tables.e2m1, 16, values, count, 1, E2M1_ZERO);
    if (strcmp(name, "E8M0") == 0) return fill(tables.e8m0, 256, values, count);
    if (strcmp(name, "UE4M3") == 0) return fill(tables.ue4m3, 256, values, count);
    return false;
}

}  // namespace tramontane

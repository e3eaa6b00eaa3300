#include "tables.h"

#include <cstring>

namespace tramontane {

Tables tables;

namespace {

template <class T>
bool fill(T* target, int64_t size, const float* values, int64_t count, float factor = 1, float more = 0) {
    if (count != size) return false;
    for (int64_t i = 0; i < count; i++) target[i] = static_cast<T>(values[i] * factor + more);
    return true;
}

}  // namespace

bool set_table(const char* name, const float* values, int64_t count) {
    struct Grid {
        const char* name;
        int8_t* target;
        int64_t size;
    };
    const Grid grids[] = {
        {"IQ2_XXS", tables.iq2_xxs[0], sizeof tables.iq2_xxs}, {"IQ2_XS", tables.iq2_xs[0], sizeof tables.iq2_xs},
        {"IQ2_S", tables.iq2_s[0], sizeof tables.iq2_s},       {"IQ3_XXS", tables.iq3_xxs[0], sizeof tables.iq3_xxs},
        {"IQ3_S", tables.iq3_s[0], sizeof tables.iq3_s},
    };
    for (const Grid& g : grids)
        if (strcmp(g.name, name) == 0) return fill(g.target, g.size, values, count);
    if (strcmp(name, "IQ1_S") == 0) return fill(tables.iq1_s[0], sizeof tables.iq1_s, values, count, 8);
    if (strcmp(name, "IQ4") == 0) return fill(tables.iq4, 16, values, count, 1, IQ4_ZERO);
    if (strcmp(name, "E2M1") == 0) return fill(tables.e2m1, 16, values, count, 1, E2M1_ZERO);
    if (strcmp(name, "E8M0") == 0) return fill(tables.e8m0, 256, values, count);
    if (strcmp(name, "UE4M3") == 0) return fill(tables.ue4m3, 256, values, count);
    return false;
}

}  // namespace tramontane

// One draw from a row of logits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tramontane {

struct Sampling {
    float temperature;
    int32_t top_k;  // 0: all
    float top_p, min_p;
    float uniform;                   // in [0, 1)
    float typical_p, xtc_threshold;  // 1: off
};

int32_t sample(const Kernels& kernels, const float* logits, int64_t vocabulary, const Sampling& how);

}  // namespace tramontane

// Which experts a token goes to.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tramontane {

enum class Score : int { SOFTMAX, SIGMOID, SPARSEMIXER };

// See kernels/base.py.
struct Routing {
    float* weights;           // [tokens, chosen]
    int32_t* experts;         // [tokens, chosen]
    const float* logits;      // [tokens, count]
    const float* correction;  // [count] or null
    int64_t chosen, count, groups, top_groups;
    Score score;
    bool normalize, best_two;  // a group is worth its best two experts, or its best one
    float scale, jitter;
};

void route(const Kernels& kernels, const Routing& r, int64_t token);

}  // namespace tramontane

#include "routing.h"

#include <algorithm>
#include <cmath>

#include "scratch.h"

namespace tramontane {
namespace {

constexpr float NEVER = -INFINITY;

// The place of the highest of what has not been taken, the lower one on ties. Some is left.
int64_t highest(const float* values, const float* taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (taken[i] == 0 && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

// Takes all experts but those of the best groups.
void close_groups(const Routing& r, const float* choice, float* taken, float* worth, float* chosen) {
    const int64_t size = r.count / r.groups;
    for (int64_t g = 0; g < r.groups; g++) {
        float best = NEVER, second = NEVER;
        for (const float* v = choice + g * size; v < choice + (g + 1) * size; v++) {
            second = std::max(second, std::min(best, *v));
            best = std::max(best, *v);
        }
        worth[g] = r.best_two ? best + second : best;
        chosen[g] = 0;
    }
    for (int64_t i = 0; i < r.top_groups; i++) chosen[highest(worth, chosen, r.groups)] = 1;
    for (int64_t e = 0; e < r.count; e++) taken[e] = chosen[e / size] == 0;
}

// The weight of the highest of the logits left, among those that are not far below it.
float share_of_highest(const Routing& r, const float* logits, const float* taken, float top) {
    float total = 0;
    for (int64_t e = 0; e < r.count; e++) {
        const float l = logits[e];
        const bool far = (top - l) / std::max(std::fabs(l), top) > 2 * r.jitter;
        if (taken[e] == 0 && !far) total += std::exp(l - top);
    }
    return 1 / total;
}

}  // namespace

void route(const Kernels& kernels, const Routing& r, int64_t token) {
    const float* logits = r.logits + token * r.count;
    float* weights = r.weights + token * r.chosen;
    int32_t* experts = r.experts + token * r.chosen;
    float* scores = scratch(Scratch::PIECE, 3 * r.count + 2 * r.groups);
    float *choice = scores + r.count, *taken = choice + r.count, *of_groups = taken + r.count;
    double total = 1;
    if (r.score == Score::SOFTMAX) kernels.softmax_weights(choice, scores, &total, logits, r.count, 1);
    for (int64_t e = 0; e < r.count; e++) {
        if (r.score == Score::SOFTMAX) scores[e] = static_cast<float>(scores[e] / total);
        if (r.score == Score::SIGMOID) scores[e] = 1 / (1 + std::exp(-logits[e]));
        if (r.score == Score::SPARSEMIXER) scores[e] = logits[e];
        choice[e] = r.correction ? scores[e] + r.correction[e] : scores[e];
        taken[e] = 0;
    }
    if (r.groups > 1) close_groups(r, choice, taken, of_groups, of_groups + r.groups);
    float sum = 0;
    for (int64_t j = 0; j < r.chosen; j++) {
        const int64_t e = highest(choice, taken, r.count);
        experts[j] = static_cast<int32_t>(e);
        weights[j] = r.score == Score::SPARSEMIXER ? share_of_highest(r, logits, taken, logits[e]) : scores[e];
        taken[e] = 1;
        sum += weights[j];
    }
    const float divisor = r.normalize ? sum + 1e-20f : 1;
    for (int64_t j = 0; j < r.chosen; j++) weights[j] = weights[j] / divisor * r.scale;
}

}  // namespace tramontane

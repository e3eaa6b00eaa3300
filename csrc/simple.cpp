#include "simple.h"

#include <cmath>
#include <cstring>

namespace tramontane {

void take_rows(float* out, const float* x, const int32_t* rows, int64_t count, int64_t columns) {
    for (int64_t i = 0; i < count; i++)
        std::memcpy(out + i * columns, x + rows[i] * columns, columns * sizeof(float));
}

void copy_blocks(uint8_t* cache, const int32_t* source, const int32_t* target, int64_t count, int64_t block_bytes) {
    for (int64_t i = 0; i < count; i++)
        std::memcpy(cache + target[i] * block_bytes, cache + source[i] * block_bytes, block_bytes);
}

void apply_edits(float* logits, int64_t vocabulary, const int32_t* rows, const int32_t* ids, const float* penalties,
                 const float* biases, int64_t count) {
    for (int64_t e = 0; e < count; e++) {
        float& logit = logits[rows[e] * vocabulary + ids[e]];
        logit = (logit > 0 ? logit / penalties[e] : logit * penalties[e]) + biases[e];
    }
}

void rope_angles(float* cos, float* sin, const int32_t* positions, const float* inv_freq, int64_t tokens, int64_t half,
                 float scale) {
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < half; i++) {
            const double angle = static_cast<float>(positions[t]) * inv_freq[i];
            cos[t * half + i] = scale * static_cast<float>(std::cos(angle));
            sin[t * half + i] = scale * static_cast<float>(std::sin(angle));
        }
    }
}

}  // namespace tramontane

#include "simple.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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

void mask(float* logits, int64_t vocabulary, const int32_t* rows, const int32_t* masks, int64_t count) {
    constexpr int64_t BITS = 32;
    const int64_t words = (vocabulary + BITS - 1) / BITS;
    for (int64_t i = 0; i < count; i++) {
        float* row = logits + rows[i] * vocabulary;
        for (int64_t w = 0; w < words; w++) {
            const auto word = static_cast<uint32_t>(masks[i * words + w]);
            if (word == UINT32_MAX) continue;
            const int64_t end = std::min(vocabulary, (w + 1) * BITS);
            for (int64_t v = w * BITS; v < end; v++)
                if ((word >> (v - w * BITS) & 1) == 0) row[v] = -std::numeric_limits<float>::infinity();
        }
    }
}

void shift(float* x, const float* by, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++, x += columns)
        for (int64_t i = 0; i < columns; i++) x[i] += by[i];
}

void multiply(float* out, const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] *= x[i];
}

void place(float* out, int64_t out_size, const float* x, int64_t x_size, int64_t tokens, int64_t heads, int64_t x_heads,
           int64_t width) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            std::memcpy(out + (t * heads + h) * out_size, x + (t * x_heads + (x_heads == 1 ? 0 : h)) * x_size,
                        width * sizeof(float));
}

void swap(float* out, int64_t out_size, const float* x, int64_t x_size, int64_t tokens, int64_t heads, int64_t width) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            std::memcpy(out + (h * tokens + t) * out_size, x + (t * heads + h) * x_size, width * sizeof(float));
}

void group_rows(int32_t* rows, int32_t* slots, int32_t* offsets, const int32_t* experts, int64_t pairs, int64_t chosen,
                int64_t count) {
    std::memset(offsets, 0, (count + 1) * sizeof(int32_t));
    // Numbers of pairs, one place further than their expert; then where its places begin, moved on as they fill.
    for (int64_t i = 0; i < pairs; i++) offsets[experts[i] + 1]++;
    for (int64_t e = 0; e < count; e++) offsets[e + 1] += offsets[e];
    for (int64_t i = 0; i < pairs; i++) {
        const int32_t at = offsets[experts[i]]++;
        rows[at] = static_cast<int32_t>(i / chosen);
        slots[i] = at;
    }
    // Each now stands where the next began.
    std::memmove(offsets + 1, offsets, count * sizeof(int32_t));
    offsets[0] = 0;
}

void rope_angles(float* cos, float* sin, const int32_t* positions, const float* inv_freq, int64_t row_stride,
                 int64_t tokens, int64_t half, float scale) {
    for (int64_t t = 0; t < tokens; t++, inv_freq += row_stride) {
        for (int64_t i = 0; i < half; i++) {
            const double angle = static_cast<float>(positions[t]) * inv_freq[i];
            cos[t * half + i] = scale * static_cast<float>(std::cos(angle));
            sin[t * half + i] = scale * static_cast<float>(std::sin(angle));
        }
    }
}

}  // namespace tramontane

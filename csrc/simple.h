// Ops that move memory or compute little: no instruction set makes a difference to them.
#pragma once

#include <cstdint>

namespace tramontane {

void take_rows(float* out, const float* x, const int32_t* rows, int64_t count, int64_t columns);

void copy_blocks(uint8_t* cache, const int32_t* source, const int32_t* target, int64_t count, int64_t block_bytes);

void apply_edits(float* logits, int64_t vocabulary, const int32_t* rows, const int32_t* ids, const float* penalties,
                 const float* biases, int64_t count);

void rope_angles(float* cos, float* sin, const int32_t* positions, const float* inv_freq, int64_t tokens, int64_t half,
                 float scale);

}  // namespace tramontane

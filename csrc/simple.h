// Ops that move memory or compute little: no instruction set makes a difference to them.
#pragma once

#include <cstdint>

namespace tramontane {

void take_rows(float* out, const float* x, const int32_t* rows, int64_t count, int64_t columns);

void copy_blocks(uint8_t* cache, const int32_t* source, const int32_t* target, int64_t count, int64_t block_bytes);

void apply_edits(float* logits, int64_t vocabulary, const int32_t* rows, const int32_t* ids, const float* penalties,
                 const float* biases, int64_t count);

// -inf where a row's bit is 0; `count` rows, whose masks have a word for each 32 tokens.
void mask(float* logits, int64_t vocabulary, const int32_t* rows, const int32_t* masks, int64_t count);

// out *= x
void shift(float* x, const float* by, int64_t rows, int64_t columns);
void multiply(float* out, const float* x, int64_t count);

// Copies `width` elements a head, from heads of `x_size` elements (all of them the same where x has one) to heads of
// `out_size`.
void place(float* out, int64_t out_size, const float* x, int64_t x_size, int64_t tokens, int64_t heads, int64_t x_heads,
           int64_t width);

// The same from [tokens, heads] to [heads, tokens].
void swap(float* out, int64_t out_size, const float* x, int64_t x_size, int64_t tokens, int64_t heads, int64_t width);

// Sorts (token, choice) pairs by expert, of `count`; see kernels/base.py.
void group_rows(int32_t* rows, int32_t* slots, int32_t* offsets, const int32_t* experts, int64_t pairs, int64_t chosen,
                int64_t count);

// Frequencies of the next token lie `row_stride` further.
void rope_angles(float* cos, float* sin, const int32_t* positions, const float* inv_freq, int64_t row_stride,
                 int64_t tokens, int64_t half, float scale);

}  // namespace tramontane

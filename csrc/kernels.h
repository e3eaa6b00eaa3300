// The kernels of one instruction set, as plain functions over raw pointers. Shapes have been checked by the caller.
#pragma once

#include <cstdint>

#include "pool.h"

namespace tramontane {

// How the elements of a matrix or of a cache are stored.
enum class Format : int { F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K };

// Bytes of a row of `columns` elements; columns are a multiple of the format's block.
inline int64_t row_bytes(Format format, int64_t columns) {
    switch (format) {
        case Format::F32: return columns * 4;
        case Format::F16: return columns * 2;
        case Format::BF16: return columns * 2;
        case Format::Q4_0: return columns / 32 * 18;
        case Format::Q4_1: return columns / 32 * 20;
        case Format::Q8_0: return columns / 32 * 34;
        case Format::Q4_K: return columns / 256 * 144;
        case Format::Q6_K: return columns / 256 * 210;
    }
    return 0;
}

enum class Activation : int { SILU, GELU, GELU_TANH, RELU };

struct Matmul {
    float* out;             // [tokens, outputs]
    const float* x;         // [tokens, inputs]
    const uint8_t* weight;  // [outputs, inputs] in `format`
    const float* bias;      // [outputs] or null
    int64_t tokens, outputs, inputs;
    Format format;
};

struct Rows {
    float* out;  // [count, columns]
    const int32_t* ids;
    const uint8_t* weight;
    int64_t count, columns;
    Format format;
};

struct CacheWrite {
    uint8_t* k_cache;  // [blocks, heads, block_size, head_size] in `format`
    uint8_t* v_cache;
    const float* k;  // [tokens, heads, head_size]
    const float* v;
    const int32_t* slots;
    int64_t tokens, heads, head_size, block_size;
    Format format;
};

struct Attention {
    float* out;      // [tokens, q_heads, head_size]
    const float* q;  // [tokens, q_heads, head_size]
    const uint8_t* k_cache;
    const uint8_t* v_cache;
    const int32_t* tables;  // [sequences, table_size]
    const int32_t* query_start;
    const int32_t* context_lens;
    int64_t sequences, table_size, q_heads, kv_heads, head_size, block_size;
    int64_t window;  // 0: none
    float scale;
    Format format;
};

struct Kernels {
    const char* name;
    void (*matmul)(Pool&, const Matmul&);
    void (*rows)(Pool&, const Rows&);
    void (*rms_norm)(Pool&, float* out, const float* x, const float* weight, int64_t rows, int64_t columns, float eps);
    void (*add)(Pool&, float* out, const float* x, int64_t count);
    void (*rope)(Pool&, float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t head_size,
                 int64_t half, bool interleaved);
    void (*write_cache)(Pool&, const CacheWrite&);
    void (*attention)(Pool&, const Attention&);
    void (*gated_activation)(Pool&, float* out, const float* gate, const float* up, int64_t count, Activation);
    void (*log_softmax)(Pool&, float* out, const float* logits, int64_t rows, int64_t columns);
    int64_t (*argmax)(const float* x, int64_t count);
    // scaled = x / divisor, weights = exp(scaled - max(scaled)), total = sum(weights); returns the maximum.
    float (*softmax_weights)(float* scaled, float* weights, double* total, const float* x, int64_t count, float divisor);
};

namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace tramontane

// The kernels of one instruction set, as plain functions over raw pointers. Shapes have been checked by the caller.
#pragma once

#include <cstdint>

#include "pool.h"

namespace tramontane {

// How the elements of a matrix or of a cache are stored.
//
// Name, elements of a block, bytes of a block: dense formats, then those of quantized blocks.
#define TRAMONTANE_DENSE_FORMATS(X) X(F32, 1, 4) X(F16, 1, 2) X(BF16, 1, 2)
#define TRAMONTANE_BLOCK_FORMATS(X)                                                                                 \
    X(Q4_0, 32, 18) X(Q4_1, 32, 20) X(Q5_0, 32, 22) X(Q5_1, 32, 24) X(Q8_0, 32, 34) X(Q8_1, 32, 36)                 \
    X(Q2_K, 256, 84) X(Q3_K, 256, 110) X(Q4_K, 256, 144) X(Q5_K, 256, 176) X(Q6_K, 256, 210) X(Q8_K, 256, 292)      \
    X(IQ1_S, 256, 50) X(IQ1_M, 256, 56) X(IQ2_XXS, 256, 66) X(IQ2_XS, 256, 74) X(IQ2_S, 256, 82)                    \
    X(IQ3_XXS, 256, 98) X(IQ3_S, 256, 110) X(IQ4_NL, 32, 18) X(IQ4_XS, 256, 136) X(TQ1_0, 256, 54)                  \
    X(TQ2_0, 256, 66) X(MXFP4, 32, 17) X(NVFP4, 64, 36) X(Q1_0, 128, 18) X(Q2_0, 64, 18)
#define TRAMONTANE_FORMATS(X) TRAMONTANE_DENSE_FORMATS(X) TRAMONTANE_BLOCK_FORMATS(X)

enum class Format : int {
#define FORMAT_NAME(name, elements, bytes) name,
    TRAMONTANE_FORMATS(FORMAT_NAME)
#undef FORMAT_NAME
};

// Bytes of a row of `columns` elements; columns are a multiple of the format's block.
inline int64_t row_bytes(Format format, int64_t columns) {
    switch (format) {
#define FORMAT_CASE(name, elements, bytes) \
    case Format::name: return columns / elements * bytes;
        TRAMONTANE_FORMATS(FORMAT_CASE)
#undef FORMAT_CASE
    }
    return 0;
}

// What a product may do to its activations. UNIFORM: make them 8-bit integers, a scale for each 32, where weights are
// integers too, or bfloat16 where they are that. FAST: the same, or something else where there are many tokens: they and
// the weights may become bfloat16, or integers with a scale for each 256; so may all that attention multiplies become
// bfloat16, of few rows where the cache is that. EXACT: keep them in float.
enum class Arithmetic : int { FAST, UNIFORM, EXACT };

enum class Activation : int { SILU, GELU, GELU_TANH, GELU_QUICK, RELU, RELU_SQUARED, SIGMOID };
constexpr const char* ACTIVATIONS[] = {"silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "sigmoid"};

// What a number does to each element: x * n; x within [-n, n]; n * tanh(x / n).
enum class Transform : int { SCALE, CLIP, SOFTCAP };

// Up to this many tokens are multiplied by a matrix at a time.
constexpr int64_t TOKEN_BLOCK = 256;

struct Matmul {
    float* out;             // [tokens, outputs]
    const float* x;         // [tokens, inputs]
    const uint8_t* weight;  // [outputs, inputs]
    const float* bias;      // [outputs] or null
    int64_t tokens;         // at most TOKEN_BLOCK
};

// Some of the outputs of a product, in an array of their own.
struct Part {
    float* out;             // [tokens, outputs]
    const uint8_t* weight;  // [outputs, inputs]
    const float* bias;      // [outputs] or null
    int64_t outputs;
};

// Products of matrices of one shape and format, each with rows of its own. The list's order is not kept.
struct Matmuls {
    Matmul* list;
    int64_t count, outputs, inputs;
    Format format;  // of the weights
    // Where there are parts, which only matrices in tiles have, they are the matrix of the one product.
    const Part* parts = nullptr;
    int64_t part_count = 0;
    const int32_t* order = nullptr;  // [inputs]: the weights' columns in terms of x's; null: the same
};

struct Rows {
    float* out;  // [count, columns]
    const int32_t* ids;
    const uint8_t* weight;
    int64_t count, columns;
    Format format;
};

// How the numbers of a grid are stored.
enum class Number : int { F32, F16, BF16, U8 };

// A coded matrix; see kernels/coded.py. Row n takes line n / row_block % lines of the grids [lines, groups]. Where they are
// `turned`, they are [panels, groups, 16 rows], a line a row.
struct Coded {
    const uint8_t* codes;  // [rows, row_bytes], or as `CodePacking` of tiles.h has them
    const float* table;    // [2^bits]
    const uint8_t *scales, *zeros, *offsets;  // grids; zeros and offsets may be null
    const float* scale_table;                 // [256] with scales of bytes, or null
    const int32_t* order;                     // [columns]: stored column k is column order[k]; or null
    int64_t rows, row_bytes, columns, lines, groups, group, row_block;
    Number scale_type, zero_type, offset_type;
    float factor;
    int bits;
    bool packed, turned;
};

// out [count, columns] = act(gate) * up, or where `clamped` the bounded form of kernels/base.py.
struct Gated {
    float* out;
    const float *gate, *up;
    int64_t count;
    Activation kind;
    bool clamped;
    float limit;
};

// Row t of a norm has row t % repeat of weight and bias [repeat, columns]; each may be null.
struct Norm {
    float* out;
    const float *x, *weight, *bias;
    int64_t rows, columns, repeat;
    float eps;
};

struct CodedRows {
    float* out;  // [count, weight.columns]
    const int32_t* ids;
    int64_t count;
    Coded weight;
};

// How the numbers of a cache are stored. Those of I8 and E4M3 are codes, and have a scale a token and head.
enum class CacheFormat : int { F32, F16, BF16, I8, E4M3 };
constexpr bool has_scales(CacheFormat format) { return format == CacheFormat::I8 || format == CacheFormat::E4M3; }
constexpr int64_t cell_bytes(CacheFormat format) { return format == CacheFormat::F32 ? 4 : has_scales(format) ? 1 : 2; }
// Elements that a token takes of a head, its scale among them.
constexpr int64_t cells_of(CacheFormat format, int64_t size) { return has_scales(format) ? size + 2 : size; }

// Of keys a block's head is [head_size, block_size], of values [block_size, head_size]; where these are codes, their
// scales in bfloat16 [block_size] follow.
struct CacheWrite {
    uint8_t* cache;  // [blocks, heads, bytes of a block's head]
    const float* x;  // [tokens, heads, head_size]
    const int32_t* slots;
    int64_t tokens, heads, head_size, block_size;
    CacheFormat format;
    bool keys;
};

// The way back: what the cache has of the tokens from `first` on of the context that lies in the blocks of `table`.
struct CacheRead {
    float* out;            // [tokens, heads, head_size]
    const uint8_t* cache;  // of blocks as `CacheWrite` fills them
    const int32_t* table;
    int64_t first, tokens, heads, head_size, block_size;
    CacheFormat format;
    bool keys;
};

struct Attention {
    float* out;              // [tokens, q_heads, value_size]
    const float* q;          // [tokens, q_heads, head_size]
    const uint8_t* k_cache;  // of blocks as `CacheWrite` fills them
    const uint8_t* v_cache;
    const int32_t* tables;  // [sequences, table_size]
    const int32_t* query_start;
    const int32_t* context_lens;
    int64_t sequences, table_size, q_heads, kv_heads, head_size, value_size, block_size;
    CacheFormat format;
    float scale;
    int64_t window;  // 0: none
    bool causal;
    float softcap;        // 0: none
    const float* sinks;   // [q_heads] or null
    const float* slopes;  // [q_heads] or null
    bool latent;          // k_cache: values and the first value_size elements of keys; v_cache: the others
    float* totals;        // [tokens, q_heads] or null: log(sum(exp(scores)))
    bool joins;           // out and totals hold what other keys gave
};

struct Kernels {
    const char* name;
    void (*matmul)(Pool&, const Matmuls&);  // of dense matrices in rows
    void (*rows)(Pool&, const Rows&);
    void (*rms_norm)(Pool&, const Norm&);
    void (*layer_norm)(Pool&, const Norm&);
    void (*add)(Pool&, float* out, const float* x, int64_t count, float factor);
    void (*add_gated)(Pool&, float* out, const float* x, const float* gate, int64_t rows, int64_t columns);
    void (*transform)(Pool&, float* x, int64_t count, Transform, float number);
    void (*rope)(Pool&, float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t head_size,
                 int64_t half, bool interleaved);
    void (*activation)(Pool&, float* out, const float* x, int64_t count, Activation);
    void (*gated_activation)(Pool&, const Gated&);
    // out[t] = the sum over j of weights[t, j] * x[slots[t, j]], j < chosen
    void (*combine)(Pool&, float* out, const float* x, const int32_t* slots, const float* weights, int64_t tokens,
                    int64_t chosen, int64_t columns);
    void (*log_softmax)(Pool&, float* out, const float* logits, int64_t rows, int64_t columns);
    int64_t (*argmax)(const float* x, int64_t count);
    // scaled = x / divisor, weights = exp(scaled - max(scaled)), total = sum(weights); returns the maximum.
    float (*softmax_weights)(float* scaled, float* weights, double* total, const float* x, int64_t count, float divisor);
};

// What is done with the cache.
struct CacheKernels {
    void (*write)(Pool&, const CacheWrite&);
    void (*read)(Pool&, const CacheRead&);
    void (*attention)(Pool&, const Attention&, Arithmetic);
};

#define DECLARE_KERNELS(isa)           \
    namespace isa {                    \
    extern const Kernels kernels;      \
    extern const CacheKernels cache;   \
    }
DECLARE_KERNELS(plain)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)
DECLARE_KERNELS(neon)
#undef DECLARE_KERNELS
// Of the instruction sets that multiply matrices of bfloat16.
namespace avx512_bf16 {
extern const CacheKernels cache;
}
namespace amx {
extern const CacheKernels cache, emulated_cache;
}

}  // namespace tramontane

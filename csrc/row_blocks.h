// GGML's formats that are kept in rows of blocks: whole numbers of a byte, and scales, as kernels/blocks.py tells.
// Included inside an anonymous namespace, after codes.h.
//
// Each RowBlocks<F> has ELEMENTS and BYTES of a block, SUB, the elements with one scale, and CENTER, by which all its
// numbers are at least -CENTER and below 256 - CENTER. An element is its number times its scale, which rounds once;
// scales(b, s) writes those of a block, numbers(b, j) gives elements 32 j to 32 j + 31.

inline uint16_t load_u16(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}
inline float half_at(const uint8_t* p) { return half_to_float(load_u16(p)); }

template <Format F>
struct RowBlocks;

template <int E, int B, int S, int C = 64>
struct RowBlock {
    static constexpr int ELEMENTS = E, BYTES = B, SUB = S, CENTER = C;
};
// With a half at byte AT that is the scale of the whole block.
template <int E, int B, int AT, int C = 64>
struct HalfBlock : RowBlock<E, B, 32, C> {
    static void scales(const uint8_t* b, float* s) {
        const float d = half_at(b + AT);
        for (int i = 0; i < E / 32; i++) s[i] = d;
    }
};

template <>
struct RowBlocks<Format::Q8_1> : HalfBlock<32, 36, 0, 128> {
    static Bytes32 numbers(const uint8_t* b, int) { return load_bytes(b + 4); }
};

template <>
struct RowBlocks<Format::Q8_K> : RowBlock<256, 292, 32, 128> {
    static void scales(const uint8_t* b, float* s) {
        for (int i = 0; i < 8; i++) memcpy(s + i, b, 4);
    }
    static Bytes32 numbers(const uint8_t* b, int j) { return load_bytes(b + 4 + j * 32); }
};

template <>
struct RowBlocks<Format::NVFP4> : RowBlock<64, 36, 16> {
    static void scales(const uint8_t* b, float* s) {
        for (int i = 0; i < 4; i++) s[i] = tables.ue4m3[b[i]];
    }
    static Bytes32 numbers(const uint8_t* b, int j) { return look(tables.e2m1, nibbles_in_eights(b + 4 + j * 16)) + -E2M1_ZERO; }
};

#define TRAMONTANE_16(n) n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n
#define TRAMONTANE_32(n) TRAMONTANE_16(n), TRAMONTANE_16(n)
template <>
struct RowBlocks<Format::TQ1_0> : HalfBlock<256, 54, 52> {
    static Bytes32 numbers(const uint8_t* b, int j) {
        // 32 bytes of five digits, 16 of five, 4 of four: the first digits of all, then the second, ...
        static constexpr uint8_t POWERS[8][32] = {
            {TRAMONTANE_32(1)},
            {TRAMONTANE_32(3)},
            {TRAMONTANE_32(9)},
            {TRAMONTANE_32(27)},
            {TRAMONTANE_32(81)},
            {TRAMONTANE_16(1), TRAMONTANE_16(3)},
            {TRAMONTANE_16(9), TRAMONTANE_16(27)},
            {TRAMONTANE_16(81), 1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27},
        };
        uint8_t last[16];
        for (int i = 0; i < 16; i += 4) memcpy(last + i, b + 48, 4);
        const Bytes32 bytes = j < 5 ? load_bytes(b) : two_halves(b + 32, j < 7 ? b + 32 : last);
        return ternary(bytes, load_bytes(POWERS[j])) + -1;
    }
};
#undef TRAMONTANE_16
#undef TRAMONTANE_32

template <>
struct RowBlocks<Format::Q1_0> : HalfBlock<128, 18, 0> {
    static Bytes32 numbers(const uint8_t* b, int j) { return raised(bits(b + 2 + j * 4), 1) + -1; }
};

template <>
struct RowBlocks<Format::Q2_0> : HalfBlock<64, 18, 0> {
    static Bytes32 numbers(const uint8_t* b, int j) {
        return codes_in_turn<2>(b + 2 + j * 8) + -1;
    }
};

// IQ1's vectors are of -1, 0 and 1, moved by an eighth. Here they are eight times that, whole numbers, and their scales
// an eighth: no rounding is another, since no scale is so small that an eighth of it is not exact.
template <>
struct RowBlocks<Format::IQ1_S> : RowBlock<256, 50, 32> {
    static void scales(const uint8_t* b, float* s) {
        const float d = half_at(b);
        for (int i = 0; i < 8; i++) s[i] = d * float((b[35 + 2 * i] >> 4 & 7) * 2 + 1) * 0.125f;
    }
    static Bytes32 numbers(const uint8_t* b, int j) {
        const int word = load_u16(b + 34 + 2 * j);
        int indices[4];
        for (int i = 0; i < 4; i++) indices[i] = b[2 + 4 * j + i] | (word >> 3 * i & 7) << 8;
        return entries(tables.iq1_s, indices) + (word >> 15 ? -1 : 1);
    }
};

template <>
struct RowBlocks<Format::IQ1_M> : RowBlock<256, 56, 16> {
    static void scales(const uint8_t* b, float* s) {
        const uint8_t* packed = b + 48;
        int half = 0;
        for (int i = 0; i < 4; i++) half |= (packed[2 * i + 1] >> 4) << 4 * i;
        const float d = half_to_float(static_cast<uint16_t>(half));
        for (int i = 0; i < 16; i++) s[i] = d * float((load_u16(packed + i / 4 * 2) >> i % 4 * 3 & 7) * 2 + 1) * 0.125f;
    }
    static Bytes32 numbers(const uint8_t* b, int j) {
        static constexpr int8_t MOVES[2][8] = {{1, 1, 1, 1, 1, 1, 1, 1}, {-1, -1, -1, -1, -1, -1, -1, -1}};
        int indices[4], moves[4];
        for (int i = 0; i < 4; i++) {
            const int nibble = b[32 + 2 * j + i / 2] >> i % 2 * 4 & 15;
            indices[i] = b[4 * j + i] | (nibble & 7) << 8;
            moves[i] = nibble >> 3;
        }
        return entries(tables.iq1_s, indices) + entries(MOVES, moves);
    }
};

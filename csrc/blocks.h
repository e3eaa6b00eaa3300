// Dense formats: how 32 elements at a time become floats. Included inside an anonymous namespace, after simd.h.
//
// Each Blocks<F> has ELEMENTS and BYTES of a block, a Header with what its parts share, and part(block, header, j, w):
// elements 32 j to 32 j + 31 of the block as floats.

constexpr int PART = 32;
constexpr int VECS = PART / LANES;
constexpr int64_t PREFETCH_BYTES = 4096;  // weights are read from memory this far ahead, at least

template <Format F>
struct Blocks;

template <>
struct Blocks<Format::F32> {
    static constexpr int ELEMENTS = 32, BYTES = 128;
    struct Header {};
    static Header header(const uint8_t*) { return {}; }
    static void part(const uint8_t* block, const Header&, int, Vec* w) {
        for (int i = 0; i < VECS; i++) w[i] = load(reinterpret_cast<const float*>(block) + i * LANES);
    }
};

template <>
struct Blocks<Format::F16> {
    static constexpr int ELEMENTS = 32, BYTES = 64;
    struct Header {};
    static Header header(const uint8_t*) { return {}; }
    static void part(const uint8_t* block, const Header&, int, Vec* w) {
        for (int i = 0; i < VECS; i++) w[i] = load_f16(reinterpret_cast<const uint16_t*>(block) + i * LANES);
    }
};

template <>
struct Blocks<Format::BF16> {
    static constexpr int ELEMENTS = 32, BYTES = 64;
    struct Header {};
    static Header header(const uint8_t*) { return {}; }
    static void part(const uint8_t* block, const Header&, int, Vec* w) {
        for (int i = 0; i < VECS; i++) w[i] = load_bf16(reinterpret_cast<const uint16_t*>(block) + i * LANES);
    }
};

// Elements [begin, begin + count) of a row as floats; begin is a multiple of the block. Where count is not (dense
// formats only), `out` is filled with zeros up to the next multiple of PART.
template <Format F>
inline void expand(float* out, const uint8_t* row, int64_t begin, int64_t count) {
    using B = Blocks<F>;
    const uint8_t* block = row + begin / B::ELEMENTS * B::BYTES;
    int64_t k = 0;
    for (; k + B::ELEMENTS <= count; k += B::ELEMENTS, block += B::BYTES) {
        for (int i = 0; i < B::BYTES; i += 64) prefetch(block + PREFETCH_BYTES + i);
        const auto header = B::header(block);
        for (int j = 0; j < B::ELEMENTS / PART; j++) {
            Vec w[VECS];
            B::part(block, header, j, w);
            for (int i = 0; i < VECS; i++) store(out + k + j * PART + i * LANES, w[i]);
        }
    }
    if (k < count) {
        uint8_t padded[B::BYTES] = {};
        memcpy(padded, block, (count - k) * (B::BYTES / B::ELEMENTS));
        Vec w[VECS];
        B::part(padded, B::header(padded), 0, w);
        for (int i = 0; i < VECS; i++) store(out + k + i * LANES, w[i]);
    }
}

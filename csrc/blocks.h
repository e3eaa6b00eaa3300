// The formats of weights: how 32 elements at a time become floats, exactly as the format says.
// Included inside an anonymous namespace, after simd.h.
//
// Each Blocks<F> has ELEMENTS and BYTES of a block, a Header with what its parts share (scales), and
// part(block, header, j, w): elements 32 j to 32 j + 31 of the block as floats, d * q + m with each operation rounded.
// The layouts are GGML's, as its `gguf` package documents them; dense formats count as blocks of 32 elements.

constexpr int PART = 32;
constexpr int VECS = PART / LANES;
constexpr int64_t PREFETCH_BYTES = 4096;  // weights are read from memory this far ahead, at least

inline uint16_t load_u16(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}
inline uint32_t load_u32(const uint8_t* p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return u;
}

// The values that 4-bit codes stand for: (code - center) * d + m, and how to read 16 codes.
#if defined(TRAMONTANE_AVX512)

inline Vec broadcast_half(const uint8_t* p) {
    return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(load_u16(p))))};
}

struct Levels {
    Vec table;  // all sixteen values: decoding is a lookup
};
inline Levels levels(float center, Vec d, Vec m) {
    const Vec codes = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    return {(codes - broadcast(center)) * d + m};
}
template <int SHIFT>
inline void decode16(const uint8_t* p, const Levels& l, Vec* w) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    w[0] = {_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, SHIFT), l.table.v)};  // the lookup ignores higher bits
}

#else

inline Vec broadcast_half(const uint8_t* p) { return broadcast(half_to_float(load_u16(p))); }

struct Levels {
    float center;
    Vec d, m;
};
inline Levels levels(float center, Vec d, Vec m) { return {center, d, m}; }

#if defined(TRAMONTANE_AVX2)
template <int SHIFT>
inline void codes16(const uint8_t* p, Vec* q) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i codes = _mm_and_si128(_mm_srli_epi16(bytes, SHIFT), _mm_set1_epi8(15));
    q[0] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes))};
    q[1] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(codes, codes)))};
}
#else
template <int SHIFT>
inline void codes16(const uint8_t* p, Vec* q) {
    int8_t codes[16];
    for (int i = 0; i < 16; i++) codes[i] = int8_t(p[i] >> SHIFT & 15);
    for (int i = 0; i < 16 / LANES; i++) q[i] = load_i8(codes + i * LANES);
}
#endif

template <int SHIFT>
inline void decode16(const uint8_t* p, const Levels& l, Vec* w) {
    codes16<SHIFT>(p, w);
    for (int i = 0; i < 16 / LANES; i++) w[i] = (w[i] - broadcast(l.center)) * l.d + l.m;
}

#endif

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

template <>
struct Blocks<Format::Q4_0> {  // half d, 16 bytes of codes: (q - 8) * d
    static constexpr int ELEMENTS = 32, BYTES = 18;
    using Header = Levels;
    static Header header(const uint8_t* block) { return levels(8, broadcast_half(block), broadcast(-0.0f)); }
    static void part(const uint8_t* block, const Header& l, int, Vec* w) {
        decode16<0>(block + 2, l, w);
        decode16<4>(block + 2, l, w + VECS / 2);
    }
};

template <>
struct Blocks<Format::Q4_1> {  // half d, half m, 16 bytes of codes: q * d + m
    static constexpr int ELEMENTS = 32, BYTES = 20;
    using Header = Levels;
    static Header header(const uint8_t* block) { return levels(0, broadcast_half(block), broadcast_half(block + 2)); }
    static void part(const uint8_t* block, const Header& l, int, Vec* w) {
        decode16<0>(block + 4, l, w);
        decode16<4>(block + 4, l, w + VECS / 2);
    }
};

template <>
struct Blocks<Format::Q8_0> {  // half d, 32 signed bytes: q * d
    static constexpr int ELEMENTS = 32, BYTES = 34;
    using Header = Vec;
    static Header header(const uint8_t* block) { return broadcast_half(block); }
    static void part(const uint8_t* block, const Header& d, int, Vec* w) {
        for (int i = 0; i < VECS; i++) w[i] = load_i8(reinterpret_cast<const int8_t*>(block) + 2 + i * LANES) * d;
    }
};

template <>
struct Blocks<Format::Q4_K> {
    // half d, half dmin, eight 6-bit scales and minima in 12 bytes, 128 bytes of codes: q * (d * scale) - dmin * minimum
    static constexpr int ELEMENTS = 256, BYTES = 144;
    struct Header {
        float scales[16];  // eight of codes, then eight constants
    };
    static Header header(const uint8_t* block) {
        const Vec d = broadcast_half(block), m = broadcast(-0.0f) - broadcast_half(block + 2);
        const uint32_t a = load_u32(block + 4), b = load_u32(block + 8), c = load_u32(block + 12);
        const uint32_t packed[4] = {
            a & 0x3F3F3F3F,
            (c & 0x0F0F0F0F) | (a >> 6 & 0x03030303) << 4,
            b & 0x3F3F3F3F,
            (c >> 4 & 0x0F0F0F0F) | (b >> 6 & 0x03030303) << 4,
        };
        int8_t bytes[16];
        memcpy(bytes, packed, 16);
        Header h;
        for (int i = 0; i < 16; i += LANES)
            store(h.scales + i, load_i8(bytes + i) * select_lanes(0, i < 8 ? 8 : 0, d, m));
        return h;
    }
    static void part(const uint8_t* block, const Header& h, int j, Vec* w) {
        const uint8_t* codes = block + 16 + j / 2 * 32;
        const Levels l = levels(0, broadcast(h.scales[j]), broadcast(h.scales[8 + j]));
        if (j % 2 == 0) {
            decode16<0>(codes, l, w);
            decode16<0>(codes + 16, l, w + VECS / 2);
        } else {
            decode16<4>(codes, l, w);
            decode16<4>(codes + 16, l, w + VECS / 2);
        }
    }
};

template <>
struct Blocks<Format::Q6_K> {
    // 128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, half d: (q - 32) * (d * scale), scales of 16
    static constexpr int ELEMENTS = 256, BYTES = 210;
    struct Header {
        float scales[16];
    };
    static Header header(const uint8_t* block) {
        const Vec d = broadcast_half(block + 208);
        const int8_t* scales = reinterpret_cast<const int8_t*>(block) + 192;
        Header h;
        for (int i = 0; i < 16; i += LANES) store(h.scales + i, load_i8(scales + i) * d);
        return h;
    }
    static void part(const uint8_t* block, const Header& h, int j, Vec* w) {
        const uint8_t* low = block + j / 4 * 64 + j % 2 * 32;
        const uint8_t* high = block + 128 + j / 4 * 32;
        const int low_shift = j / 2 % 2 * 4, high_shift = j % 4 * 2;
        alignas(32) int8_t q[32];
#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)
        const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
        const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
        const __m256i nibbles = _mm256_and_si256(_mm256_srli_epi16(l, low_shift), _mm256_set1_epi8(0x0F));
        const __m256i pairs = _mm256_and_si256(_mm256_srli_epi16(u, high_shift), _mm256_set1_epi8(0x03));
        const __m256i codes = _mm256_or_si256(nibbles, _mm256_slli_epi16(pairs, 4));
        _mm256_store_si256(reinterpret_cast<__m256i*>(q), _mm256_sub_epi8(codes, _mm256_set1_epi8(32)));
#else
        for (int i = 0; i < 32; i++) q[i] = int8_t(((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32);
#endif
        for (int i = 0; i < VECS; i++) w[i] = load_i8(q + i * LANES) * broadcast(h.scales[j * 2 + i * LANES / 16]);
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

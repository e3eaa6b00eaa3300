// 32 bytes: neighbouring codes of a row, out of packed bytes.
// Included inside an anonymous namespace, after simd.h.

#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)

struct Bytes32 {
    __m256i v;
};

inline Bytes32 load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Bytes32 operator+(Bytes32 a, int b) { return {_mm256_add_epi8(a.v, _mm256_set1_epi8(static_cast<char>(b)))}; }
// a << shift, where nothing leaves a byte.
inline Bytes32 raised(Bytes32 a, int shift) { return {_mm256_slli_epi16(a.v, shift)}; }
// 16 bytes: their low nibbles, then their high ones.
inline Bytes32 nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15))};
}
// Four bytes: 1 where a bit is set, from the lowest bit of the first byte.
inline Bytes32 bits(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    const __m256i which = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101, 0x0202020202020202,
                                             0x0303030303030303);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), which);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return {_mm256_and_si256(set, _mm256_set1_epi8(1))};
}
// The entries of a table of 16 bytes that codes below 16 name.
inline Bytes32 look(const uint8_t* table, Bytes32 a) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), a.v)};
}
// The same in turn: the low nibble of the first byte, its high one, those of the next.
inline Bytes32 nibbles_in_turn(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15))};
}
// In eights: the low nibbles of 8 bytes, their high ones, those of the next 8 bytes.
inline Bytes32 nibbles_in_eights(const uint8_t* p) { return {_mm256_permute4x64_epi64(nibbles(p).v, 0xD8)}; }
// Four entries of a table of vectors of eight.
inline Bytes32 entries(const int8_t (*table)[8], const int* i) {
    int64_t v[4];
    for (int k = 0; k < 4; k++) memcpy(&v[k], table[i[k]], 8);
    return {_mm256_setr_epi64x(v[0], v[1], v[2], v[3])};
}
inline Bytes32 operator+(Bytes32 a, Bytes32 b) { return {_mm256_add_epi8(a.v, b.v)}; }
template <class F>
inline Bytes32 four_words(const F& f) {
    return {_mm256_setr_epi64x(int64_t(f(0)), int64_t(f(1)), int64_t(f(2)), int64_t(f(3)))};
}
inline Bytes32 two_halves(const uint8_t* first, const uint8_t* second) {
    return {_mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(second)),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(first)))};
}
// The ternary digits, 0 to 2, of fractions of 256, behind as many of theirs as the powers of three say.
inline Bytes32 ternary(Bytes32 a, Bytes32 powers) {
    const __m256i low = _mm256_set1_epi16(255), three = _mm256_set1_epi16(3);
    const auto digit = [&](__m256i b, __m256i p) {
        return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_and_si256(_mm256_mullo_epi16(b, p), low), three), 8);
    };
    const __m256i even = digit(a.v, _mm256_and_si256(powers.v, low));
    const __m256i odd = digit(_mm256_srli_epi16(a.v, 8), _mm256_srli_epi16(powers.v, 8));
    return {_mm256_or_si256(even, _mm256_slli_epi16(odd, 8))};
}
// Each half of the bytes to a place of its own.
inline void store_halves(uint8_t* first, uint8_t* second, Bytes32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(a.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(a.v, 1));
}

#else

struct Bytes32 {
    uint8_t v[32];
};

template <class F>
inline Bytes32 each(const F& f) {
    Bytes32 c;
    for (int i = 0; i < 32; i++) c.v[i] = static_cast<uint8_t>(f(i));
    return c;
}
inline Bytes32 load_bytes(const uint8_t* p) {
    return each([&](int i) { return p[i]; });
}
inline Bytes32 operator+(Bytes32 a, int b) {
    return each([&](int i) { return a.v[i] + b; });
}
inline Bytes32 raised(Bytes32 a, int shift) {
    return each([&](int i) { return a.v[i] << shift; });
}
inline Bytes32 nibbles(const uint8_t* p) {
    return each([&](int i) { return i < 16 ? p[i] & 15 : p[i - 16] >> 4; });
}
inline Bytes32 bits(const uint8_t* p) {
    return each([&](int i) { return p[i / 8] >> i % 8 & 1; });
}
inline Bytes32 look(const uint8_t* table, Bytes32 a) {
    return each([&](int i) { return table[a.v[i]]; });
}
inline Bytes32 nibbles_in_turn(const uint8_t* p) {
    return each([&](int i) { return p[i / 2] >> i % 2 * 4 & 15; });
}
inline Bytes32 nibbles_in_eights(const uint8_t* p) {
    return each([&](int i) { return p[i / 16 * 8 + i % 8] >> i / 8 % 2 * 4 & 15; });
}
inline Bytes32 entries(const int8_t (*table)[8], const int* i) {
    return each([&](int k) { return table[i[k / 8]][k % 8]; });
}
inline Bytes32 operator+(Bytes32 a, Bytes32 b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
template <class F>
inline Bytes32 four_words(const F& f) {
    Bytes32 c;
    for (int i = 0; i < 4; i++) {
        const uint64_t word = f(i);
        memcpy(c.v + 8 * i, &word, 8);
    }
    return c;
}
inline Bytes32 two_halves(const uint8_t* first, const uint8_t* second) {
    return each([&](int i) { return i < 16 ? first[i] : second[i - 16]; });
}
inline Bytes32 ternary(Bytes32 a, Bytes32 powers) {
    return each([&](int i) { return uint8_t(a.v[i] * powers.v[i]) * 3 >> 8; });
}
inline void store_halves(uint8_t* first, uint8_t* second, Bytes32 a) {
    memcpy(first, a.v, 16);
    memcpy(second, a.v + 16, 16);
}

#endif

// The lowest eight codes of BITS bits to a byte each.
template <int BITS>
inline uint64_t spread_codes(uint64_t word) {
#if defined(__BMI2__)
    return _pdep_u64(word, 0x0101010101010101u * ((1 << BITS) - 1));
#else
    uint64_t out = 0;
    for (int j = 0; j < 8; j++) out |= (word >> j * BITS & ((1 << BITS) - 1)) << 8 * j;
    return out;
#endif
}
template <int BITS>
inline Bytes32 codes_in_turn(const uint8_t* p) {
    if constexpr (BITS == 8) return load_bytes(p);
    if constexpr (BITS == 4) return nibbles_in_turn(p);
    return four_words([p](int i) {
        // Whole words are read where the codes have them: no byte behind the last code's.
        constexpr int SIZE = BITS == 1 ? 4 : 8, LAST = 4 * BITS - SIZE;
        const int from = i * BITS < LAST ? i * BITS : LAST;
        uint64_t word = 0;
        memcpy(&word, p + from, SIZE);
        return spread_codes<BITS>(word >> 8 * (i * BITS - from));
    });
}

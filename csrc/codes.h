// PART (32) codes of a byte each, out of packed bytes, and what they become as floats.
// Included inside an anonymous namespace, after simd.h.

#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)

struct Codes {
    __m256i v;
};

inline Codes load_codes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Codes operator|(Codes a, Codes b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Codes operator-(Codes a, int b) { return {_mm256_sub_epi8(a.v, _mm256_set1_epi8(static_cast<char>(b)))}; }
// (a >> shift) & mask, for masks of at most 8 - shift bits.
inline Codes field(Codes a, int shift, int mask) {
    return {_mm256_and_si256(_mm256_srli_epi16(a.v, shift), _mm256_set1_epi8(static_cast<char>(mask)))};
}
// a << shift, where nothing leaves a byte.
inline Codes raised(Codes a, int shift) { return {_mm256_slli_epi16(a.v, shift)}; }
// 16 bytes: their low nibbles, then their high ones.
inline Codes nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15))};
}
// Four bytes: 1 where a bit is set, from the lowest bit of the first byte.
inline Codes bits(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    const __m256i which = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101, 0x0202020202020202,
                                             0x0303030303030303);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), which);
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return {_mm256_and_si256(set, _mm256_set1_epi8(1))};
}
// The entries of a table of 16 signed bytes that codes below 16 name.
inline Codes look(const int8_t* table, Codes a) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), a.v)};
}
// The same in eights: the low nibbles of 8 bytes, their high ones, those of the next 8 bytes.
inline Codes nibbles_in_eights(const uint8_t* p) { return {_mm256_permute4x64_epi64(nibbles(p).v, 0xD8)}; }
// Four entries of a table of vectors of eight, or eight of vectors of four.
inline Codes entries(const int8_t (*table)[8], const int* i) {
    int64_t v[4];
    for (int k = 0; k < 4; k++) memcpy(&v[k], table[i[k]], 8);
    return {_mm256_setr_epi64x(v[0], v[1], v[2], v[3])};
}
inline Codes entries(const int8_t (*table)[4], const int* i) {
    int32_t v[8];
    for (int k = 0; k < 8; k++) memcpy(&v[k], table[i[k]], 4);
    return {_mm256_setr_epi32(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])};
}
inline Codes operator+(Codes a, Codes b) { return {_mm256_add_epi8(a.v, b.v)}; }
// -a where `negative` is 1, a where it is 0.
inline Codes flipped(Codes a, Codes negative) {
    const __m256i mask = _mm256_sub_epi8(_mm256_setzero_si256(), negative.v);
    return {_mm256_sub_epi8(_mm256_xor_si256(a.v, mask), mask)};
}
// The codes as signed numbers, VECS vectors.
inline void floats(Codes a, Vec* w) {
    const __m128i halves[2] = {_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1)};
    for (int i = 0; i < 2; i++) {
#if defined(TRAMONTANE_AVX512)
        w[i] = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(halves[i]))};
#else
        w[2 * i] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(halves[i]))};
        w[2 * i + 1] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(halves[i], halves[i])))};
#endif
    }
}

#else

struct Codes {
    uint8_t v[PART];
};

template <class F>
inline Codes each(const F& f) {
    Codes c;
    for (int i = 0; i < PART; i++) c.v[i] = static_cast<uint8_t>(f(i));
    return c;
}
inline Codes load_codes(const uint8_t* p) {
    return each([&](int i) { return p[i]; });
}
inline Codes operator|(Codes a, Codes b) {
    return each([&](int i) { return a.v[i] | b.v[i]; });
}
inline Codes operator-(Codes a, int b) {
    return each([&](int i) { return a.v[i] - b; });
}
inline Codes field(Codes a, int shift, int mask) {
    return each([&](int i) { return a.v[i] >> shift & mask; });
}
inline Codes raised(Codes a, int shift) {
    return each([&](int i) { return a.v[i] << shift; });
}
inline Codes nibbles(const uint8_t* p) {
    return each([&](int i) { return i < PART / 2 ? p[i] & 15 : p[i - PART / 2] >> 4; });
}
inline Codes bits(const uint8_t* p) {
    return each([&](int i) { return p[i / 8] >> i % 8 & 1; });
}
inline Codes look(const int8_t* table, Codes a) {
    return each([&](int i) { return table[a.v[i]]; });
}
inline Codes nibbles_in_eights(const uint8_t* p) {
    return each([&](int i) { return p[i / 16 * 8 + i % 8] >> i / 8 % 2 * 4 & 15; });
}
template <int N>
inline Codes entries(const int8_t (*table)[N], const int* i) {
    return each([&](int k) { return table[i[k / N]][k % N]; });
}
inline Codes operator+(Codes a, Codes b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Codes flipped(Codes a, Codes negative) {
    return each([&](int i) { return (a.v[i] ^ -negative.v[i]) + negative.v[i]; });
}
inline void floats(Codes a, Vec* w) {
    for (int i = 0; i < VECS; i++) w[i] = load_i8(reinterpret_cast<const int8_t*>(a.v) + i * LANES);
}

#endif

// The codes times one scale.
inline void scaled(Codes a, Vec scale, Vec* w) {
    floats(a, w);
    for (int i = 0; i < VECS; i++) w[i] = w[i] * scale;
}
// The codes times one scale, plus a constant.
inline void scaled(Codes a, Vec scale, Vec constant, Vec* w) {
    floats(a, w);
    for (int i = 0; i < VECS; i++) w[i] = w[i] * scale + constant;
}
// The two halves of the codes times a scale each.
inline void scaled(Codes a, const float* scales, Vec* w) {
    floats(a, w);
    for (int i = 0; i < VECS; i++) w[i] = w[i] * broadcast(scales[i * LANES / 16]);
}

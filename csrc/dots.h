// Vectors of codes and what is done with them: 4 * LANES bytes, four columns of each of LANES rows, and LANES sums.
// Included inside an anonymous namespace, after simd.h.

#if defined(TRAMONTANE_AVX512)

struct Codes {
    __m512i v;
};
struct Sums {
    __m512i v;
};

inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Sums no_sums() { return {_mm512_setzero_si512()}; }
inline Sums sums_from(const float* bits) { return {_mm512_castps_si512(_mm512_set1_ps(*bits))}; }
inline Vec to_floats(Sums a) { return {_mm512_cvtepi32_ps(a.v)}; }

// BITS bits of each byte, from bit `shift` on.
template <int BITS>
inline Codes bits_of(Codes a, int shift) {
    const __m512i moved = _mm512_srl_epi16(a.v, _mm_cvtsi32_si128(shift));
    return {_mm512_and_si512(moved, _mm512_set1_epi8((1 << BITS) - 1))};
}
// The entries of a table of 16 bytes that codes below 16 name.
inline Codes look(const uint8_t* table, Codes a) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), a.v)};
}
// `low` with BITS bits of each byte of `high`, from bit `shift` on, put at bit AT, where it has none.
template <int BITS, int AT>
inline Codes with_bits(Codes low, Codes high, int shift) {
    const __m512i moved = _mm512_slli_epi16(_mm512_srl_epi16(high.v, _mm_cvtsi32_si128(shift)), AT);
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << BITS) - 1) << AT));
    return {_mm512_ternarylogic_epi32(low.v, moved, mask, 0xF8)};  // low | moved & mask
}
// Byte J of each row's four, as floats.
template <int J>
inline Vec to_floats(Codes a) {
    const __m512i moved = J ? _mm512_srli_epi32(a.v, 8 * J) : a.v;
    return {_mm512_cvtepi32_ps(J == 3 ? moved : _mm512_and_si512(moved, _mm512_set1_epi32(255)))};
}
// a + the dot product of each row's four codes with four numbers from -127 to 127. WIDE: codes may be above 127.
template <bool WIDE>
inline Sums dot(Sums a, Codes w, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    const __m512i b = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(a.v, w.v, b)};
#else
    // Pairs of products fit in 16 bits where one factor is at most 127; what is above, half of it twice.
    const __m512i ones = _mm512_set1_epi16(1);
    if constexpr (WIDE) {
        const __m512i low = _mm512_and_si512(w.v, _mm512_set1_epi8(127));
        const __m512i top = _mm512_and_si512(_mm512_srli_epi16(w.v, 7), _mm512_set1_epi8(1));
        const __m512i tops = _mm512_slli_epi32(_mm512_madd_epi16(_mm512_maddubs_epi16(top, b), ones), 7);
        return {_mm512_add_epi32(_mm512_add_epi32(a.v, tops), _mm512_madd_epi16(_mm512_maddubs_epi16(low, b), ones))};
    }
    return {_mm512_add_epi32(a.v, _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, b), ones))};
#endif
}
// LANES floats, at most 127 in size, as bytes.
inline void store_i8(int8_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.v)}; }
// Two bfloat16 of each row.
inline void split_bf16(Codes a, Vec* w) {
    w[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
    w[1] = {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(-65536)))};
}

#if defined(__AVX512BF16__)
#define TRAMONTANE_PAIRS 1
constexpr bool HAS_PAIRS = true;
// a + the dot product of each row's two bfloat16 with two of a token's.
inline Vec dot_pairs(Vec a, Codes w, const uint16_t* x) {
    int32_t two;
    memcpy(&two, x, 4);
    return {_mm512_dpbf16_ps(a.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(two))};
}
inline void store_bf16(uint16_t* p, Vec a) {
    const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
    memcpy(p, &rounded, sizeof rounded);
}
#endif

#elif defined(TRAMONTANE_AVX2)

struct Codes {
    __m256i v;
};
struct Sums {
    __m256i v;
};

inline Codes load_codes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Sums no_sums() { return {_mm256_setzero_si256()}; }
inline Sums sums_from(const float* bits) { return {_mm256_castps_si256(_mm256_set1_ps(*bits))}; }
inline Vec to_floats(Sums a) { return {_mm256_cvtepi32_ps(a.v)}; }

template <int BITS>
inline Codes bits_of(Codes a, int shift) {
    const __m256i moved = _mm256_srl_epi16(a.v, _mm_cvtsi32_si128(shift));
    return {_mm256_and_si256(moved, _mm256_set1_epi8((1 << BITS) - 1))};
}
inline Codes look(const uint8_t* table, Codes a) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), a.v)};
}
template <int BITS, int AT>
inline Codes with_bits(Codes low, Codes high, int shift) {
    const __m256i moved = _mm256_slli_epi16(_mm256_srl_epi16(high.v, _mm_cvtsi32_si128(shift)), AT);
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << BITS) - 1) << AT));
    return {_mm256_or_si256(low.v, _mm256_and_si256(moved, mask))};
}
template <int J>
inline Vec to_floats(Codes a) {
    const __m256i moved = J ? _mm256_srli_epi32(a.v, 8 * J) : a.v;
    return {_mm256_cvtepi32_ps(J == 3 ? moved : _mm256_and_si256(moved, _mm256_set1_epi32(255)))};
}
template <bool WIDE>
inline Sums dot(Sums a, Codes w, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    const __m256i b = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
    return {_mm256_dpbusd_avx_epi32(a.v, w.v, b)};
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (WIDE) {
        const __m256i low = _mm256_and_si256(w.v, _mm256_set1_epi8(127));
        const __m256i top = _mm256_and_si256(_mm256_srli_epi16(w.v, 7), _mm256_set1_epi8(1));
        const __m256i tops = _mm256_slli_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(top, b), ones), 7);
        return {_mm256_add_epi32(_mm256_add_epi32(a.v, tops), _mm256_madd_epi16(_mm256_maddubs_epi16(low, b), ones))};
    }
    return {_mm256_add_epi32(a.v, _mm256_madd_epi16(_mm256_maddubs_epi16(w.v, b), ones))};
#endif
}
inline void store_i8(int8_t* p, Vec a) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline void split_bf16(Codes a, Vec* w) {
    w[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))};
    w[1] = {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(-65536)))};
}

#elif defined(TRAMONTANE_NEON)

#include "dots_neon.h"

#else

typedef uint8_t CodeBytes __attribute__((vector_size(4 * LANES)));
struct Codes {
    CodeBytes v;
};
struct Sums {
    Ints v;
};

inline Codes load_codes(const uint8_t* p) {
    Codes a;
    memcpy(&a.v, p, sizeof a.v);
    return a;
}
inline Sums no_sums() { return {Ints{}}; }
inline Sums sums_from(const float* bits) { return {int32_t(float_to_bits(*bits)) - Ints{}}; }
inline Vec to_floats(Sums a) { return {__builtin_convertvector(a.v, Floats)}; }

template <int BITS>
inline Codes bits_of(Codes a, int shift) {
    return {a.v >> uint8_t(shift) & uint8_t((1 << BITS) - 1)};
}
inline Codes look(const uint8_t* table, Codes a) {
    for (int i = 0; i < 4 * LANES; i++) a.v[i] = table[a.v[i]];
    return a;
}
template <int BITS, int AT>
inline Codes with_bits(Codes low, Codes high, int shift) {
    return {low.v | (high.v >> uint8_t(shift) << AT & uint8_t(((1 << BITS) - 1) << AT))};
}
template <int J>
inline Vec to_floats(Codes a) {
    Ints words;
    memcpy(&words, &a.v, sizeof words);
    return {__builtin_convertvector(words >> 8 * J & 255, Floats)};
}
template <bool WIDE>
inline Sums dot(Sums a, Codes w, const int8_t* x) {
    Ints words;
    memcpy(&words, &w.v, sizeof words);
    return {a.v + (words & 255) * x[0] + (words >> 8 & 255) * x[1] + (words >> 16 & 255) * x[2] +
            (words >> 24 & 255) * x[3]};
}
inline void store_i8(int8_t* p, Vec a) {
    const Vec whole = round(a);
    for (int i = 0; i < LANES; i++) p[i] = int8_t(whole.v[i]);
}
inline Vec absolute(Vec a) { return {a.v < 0.0f ? -a.v : a.v}; }
inline void split_bf16(Codes a, Vec* w) {
    Ints words;
    memcpy(&words, &a.v, sizeof words);
    w[0] = {(Floats)(words << 16)};
    w[1] = {(Floats)(words & -65536)};
}

#endif

#if !defined(TRAMONTANE_PAIRS)
constexpr bool HAS_PAIRS = false;
inline Vec dot_pairs(Vec a, Codes, const uint16_t*) { return a; }
inline void store_bf16(uint16_t*, Vec) {}
#endif

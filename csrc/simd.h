// A vector of LANES floats for the instruction set of this compilation, and the operations that the kernels need.
// Included inside an anonymous namespace, so that no instruction set's code can be linked in place of another's.

#if defined(TRAMONTANE_AVX512)

constexpr int LANES = 16;
struct Vec {
    __m512 v;
};

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c, rounded once where the machine can.
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; b where either is not a number.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// a where lane >= from and lane < to, else b.
inline Vec select_lanes(int from, int to, Vec a, Vec b) {
    const __mmask16 mask = static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
    return {_mm512_mask_mov_ps(b.v, mask, a.v)};
}

inline Vec load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store_f16(uint16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline __m512i wide_codes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_u8(const uint8_t* p) { return {_mm512_cvtepi32_ps(wide_codes(p))}; }
// Numbers of 8 bits with 4 of exponent, over 256: as halves they have the same bits, moved.
inline Vec load_e4m3(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xBF80))))};
}

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

// Sums of lanes pair lane i with i + 8, then i + 4, i + 2, i + 1: one order, alone or four vectors at a time.
inline float sum(Vec a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xEE));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4E));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xB1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
}
inline float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }
// The lanes of a and b in turn: those of their first halves, and those of their second.
inline void interleave(Vec a, Vec b, Vec& first, Vec& second) {
    const __m512i firsts = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    first.v = _mm512_permutex2var_ps(a.v, firsts, b.v);
    second.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(firsts, _mm512_set1_epi32(8)), b.v);
}

// 2^n for whole n, times a; n may leave the range of exponents.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#elif defined(TRAMONTANE_AVX2)

constexpr int LANES = 8;
struct Vec {
    __m256 v;
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec select_lanes(int from, int to, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from - 1)),
                                          _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(mask))};
}

inline Vec load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline void store_f16(uint16_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline __m256i wide_codes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_u8(const uint8_t* p) { return {_mm256_cvtepi32_ps(wide_codes(p))}; }
inline Vec load_e4m3(const uint8_t* p) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xBF80))))};
}

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

inline float sum(Vec a) {
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
    const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a.v, b.v, 0x20), _mm256_permute2f128_ps(a.v, b.v, 0x31));
    const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c.v, d.v, 0x20), _mm256_permute2f128_ps(c.v, d.v, 0x31));
    const __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    const __m256 t = _mm256_add_ps(s, _mm256_permute_ps(s, 0xB1));
    // 128-bit halves now hold the sums (a, a, c, c) and (b, b, d, d).
    const __m128 low = _mm256_castps256_ps128(t), high = _mm256_extractf128_ps(t, 1);
    const __m128 acbd = _mm_shuffle_ps(low, high, 0x88);
    _mm_storeu_ps(out, _mm_shuffle_ps(acbd, acbd, 0xD8));
}
inline float max_lane(Vec a) {
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline void interleave(Vec a, Vec b, Vec& first, Vec& second) {
    const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
    first.v = _mm256_permute2f128_ps(low, high, 0x20);
    second.v = _mm256_permute2f128_ps(low, high, 0x31);
}

// In two halves, so that results below the normal range stay exact.
inline Vec scale_by_power(Vec a, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, p), q)};
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#elif defined(TRAMONTANE_NEON)

#include "simd_neon.h"

#else  // any machine: the compiler's own vectors, two or more of the machine's to one of ours

constexpr int LANES = 8;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
struct Vec {
    Floats v;
};

inline float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

inline Vec load(const float* p) {
    Vec a;
    memcpy(&a.v, p, sizeof a.v);
    return a;
}
inline void store(float* p, Vec a) { memcpy(p, &a.v, sizeof a.v); }
inline Vec broadcast(float a) { return {a - Floats{}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec select_lanes(int from, int to, Vec a, Vec b) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return {((lane >= from) & (lane < to)) ? a.v : b.v};
}

inline float half_to_float(uint16_t h) {
    const uint32_t rest = h & 0x7FFF;
    const uint32_t finite = float_to_bits(bits_to_float(rest << 13) * 0x1p112f), special = rest << 13 | 0x7F800000;
    return bits_to_float((rest >= 0x7C00 ? special : finite) | uint32_t(h & 0x8000) << 16);
}
inline uint16_t float_to_half(float f) {
    const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (rest >= 0x477FF000) return uint16_t(sign | 0x7C00);
    if (rest < 0x38800000) {  // below 2^-14: let an addition do the rounding to a multiple of 2^-24
        return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3F000000));
    }
    return uint16_t(sign | ((rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13));
}
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

inline Ints load_u16s(const uint16_t* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Ints);
}
// The exponent moves by a multiplication, which sees to numbers below the normal range too.
inline Vec load_f16(const uint16_t* p) {
    const Ints h = load_u16s(p), rest = (h & 0x7FFF) << 13;
    const Floats finite = (Floats)rest * 0x1p112f;
    const Ints special = h << 13 | 0x7F800000;
    const Ints bits = (h & 0x7C00) == 0x7C00 ? special : (Ints)finite;
    return {(Floats)(bits | (h & 0x8000) << 16)};
}
inline Vec load_bf16(const uint16_t* p) { return {(Floats)(load_u16s(p) << 16)}; }
inline void store_f16(uint16_t* p, Vec a) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(a.v[i]);
}
inline Vec load_i8(const int8_t* p) {
    Bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return {__builtin_convertvector(bytes, Floats)};
}
typedef uint8_t UnsignedBytes __attribute__((vector_size(LANES)));
inline Vec load_u8(const uint8_t* p) {
    UnsignedBytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return {__builtin_convertvector(bytes, Floats)};
}

inline Vec load_e4m3(const uint8_t* p) {
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++) halves[i] = uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7);
    return load_f16(halves);
}

inline float sum(Vec a) {
    const float c[4] = {a.v[0] + a.v[4], a.v[1] + a.v[5], a.v[2] + a.v[6], a.v[3] + a.v[7]};
    return (c[0] + c[2]) + (c[1] + c[3]);
}
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
}
inline float max_lane(Vec a) {
    float m = a.v[0];
    for (int i = 1; i < LANES; i++) m = a.v[i] > m ? a.v[i] : m;
    return m;
}
inline void interleave(Vec a, Vec b, Vec& first, Vec& second) {
    constexpr int HALF = LANES / 2;
    for (int i = 0; i < HALF; i++) {
        first.v[2 * i] = a.v[i];
        first.v[2 * i + 1] = b.v[i];
        second.v[2 * i] = a.v[HALF + i];
        second.v[2 * i + 1] = b.v[HALF + i];
    }
}

inline Vec scale_by_power(Vec a, Vec n) {
    const Ints whole = __builtin_convertvector(n.v, Ints), half = whole >> 1;
    const Ints p = (half + 127) << 23, q = (whole - half + 127) << 23;
    return {a.v * (Floats)p * (Floats)q};
}
// Adding 1.5 * 2^23 leaves no bits for a fraction.
inline Vec round(Vec a) { return {(a.v + 12582912.0f) - 12582912.0f}; }

#endif

// Asks for the cache line of p, which need not be a valid address.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline Vec zero() { return broadcast(0.0f); }

// v[i][j] becomes v[j][i].
[[gnu::always_inline]] inline void transpose(Vec (&v)[LANES]) {
    for (int step = 1; step < LANES; step *= 2) {
        Vec turned[LANES];
        for (int i = 0; i < LANES / 2; i++) interleave(v[i], v[i + LANES / 2], turned[2 * i], turned[2 * i + 1]);
        for (int i = 0; i < LANES; i++) v[i] = turned[i];
    }
}

// x = n ln 2 + r, |r| <= ln 2 / 2, and q = (e^r - 1) / r by its series.
struct Power {
    Vec n, r, q;
};
[[gnu::always_inline]] inline Power power(Vec x) {
    x = max(broadcast(-104.0f), x);
    x = min(broadcast(88.8f), x);
    const Vec n = round(x * broadcast(1.44269504f));
    // ln 2 in two parts, the first short enough for its product with n to be exact.
    Vec r = x - n * broadcast(0.693359375f);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec q = broadcast(1.0f / 5040);
    q = fma(q, r, broadcast(1.0f / 720));
    q = fma(q, r, broadcast(1.0f / 120));
    q = fma(q, r, broadcast(1.0f / 24));
    q = fma(q, r, broadcast(1.0f / 6));
    q = fma(q, r, broadcast(0.5f));
    q = fma(q, r, broadcast(1.0f));
    return {n, r, q};
}

// e^x to about one unit in the last place.
[[gnu::always_inline]] inline Vec exp(Vec x) {
    const Power p = power(x);
    return scale_by_power(fma(p.q, p.r, broadcast(1.0f)), p.n);
}

// The same to a few millionths, in half the time.
[[gnu::always_inline]] inline Vec exp_roughly(Vec x) {
    x = max(broadcast(-160.0f), x * broadcast(1.44269504f));
    const Vec n = round(x), r = x - n;
    Vec p = broadcast(0.00957009103f);  // 2^r, |r| <= 1/2
    p = fma(p, r, broadcast(0.0559178628f));
    p = fma(p, r, broadcast(0.240247458f));
    p = fma(p, r, broadcast(0.693121791f));
    return scale_by_power(fma(p, r, broadcast(0.999999285f)), n);
}

// t / (t + 2) with t = e^2x - 1, which keeps what is small exact.
inline Vec tanh(Vec x) {
    const Power p = power(min(broadcast(40.0f), max(broadcast(-40.0f), x + x)));
    const Vec whole = scale_by_power(broadcast(1.0f), p.n), t = fma(whole, p.q * p.r, whole - broadcast(1.0f));
    return t / (t + broadcast(2.0f));
}

// The first `n` floats from p, zeros behind them; a whole vector where n >= LANES.
inline Vec load_some(const float* p, int64_t n) {
    if (n >= LANES) return load(p);
    float buffer[LANES] = {};
    for (int i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
}
inline void store_some(float* p, int64_t n, Vec a) {
    if (n >= LANES) return store(p, a);
    float buffer[LANES];
    store(buffer, a);
    for (int i = 0; i < n; i++) p[i] = buffer[i];
}

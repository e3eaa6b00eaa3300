// dots.h for aarch64. Included by it.

struct Codes {
    uint8x16_t v[2];
};
struct Sums {
    int32x4_t v[2];
};

inline Codes load_codes(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline Sums no_sums() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Sums sums_from(const float* bits) {
    int32_t value;
    memcpy(&value, bits, 4);
    return {vdupq_n_s32(value), vdupq_n_s32(value)};
}
inline Vec to_floats(Sums a) { return {vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1])}; }

template <int BITS>
inline Codes bits_of(Codes a, int shift) {
    const int8x16_t down = vdupq_n_s8(int8_t(-shift));
    const uint8x16_t mask = vdupq_n_u8((1 << BITS) - 1);
    return {vandq_u8(vshlq_u8(a.v[0], down), mask), vandq_u8(vshlq_u8(a.v[1], down), mask)};
}
inline Codes look(const uint8_t* table, Codes a) {
    const uint8x16_t entries = vld1q_u8(table);
    return {vqtbl1q_u8(entries, a.v[0]), vqtbl1q_u8(entries, a.v[1])};
}
template <int BITS, int AT>
inline Codes with_bits(Codes low, Codes high, int shift) {
    const int8x16_t down = vdupq_n_s8(int8_t(AT - shift));  // up, where the bits lie below AT
    const uint8x16_t mask = vdupq_n_u8(uint8_t(((1 << BITS) - 1) << AT));
    return {vorrq_u8(low.v[0], vandq_u8(vshlq_u8(high.v[0], down), mask)),
            vorrq_u8(low.v[1], vandq_u8(vshlq_u8(high.v[1], down), mask))};
}
template <int J>
inline Vec to_floats(Codes a) {
    Vec w;
    for (int i = 0; i < 2; i++) {
        uint32x4_t words = vreinterpretq_u32_u8(a.v[i]);
        if constexpr (J > 0) words = vshrq_n_u32(words, 8 * J);
        w.v[i] = vcvtq_f32_u32(vandq_u32(words, vdupq_n_u32(255)));
    }
    return w;
}

// Four rows' dot products of four codes, which are signed or (not WIDE) below 128, with x.
inline int32x4_t dot4(int32x4_t a, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(a, w, x);
#else
    // Two products of bytes fit in 16 bits, since x is at least -127.
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vaddq_s32(a, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
template <bool WIDE>
inline Sums dot(Sums a, Codes w, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(four));
    for (int i = 0; i < 2; i++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        a.v[i] = vusdotq_s32(a.v[i], w.v[i], b);
#else
        if constexpr (WIDE) {  // less 128, which x meets apart
            const int32_t most = 128 * (x[0] + x[1] + x[2] + x[3]);
            const uint8x16_t less = veorq_u8(w.v[i], vdupq_n_u8(128));
            a.v[i] = dot4(vaddq_s32(a.v[i], vdupq_n_s32(most)), vreinterpretq_s8_u8(less), b);
        } else {
            a.v[i] = dot4(a.v[i], vreinterpretq_s8_u8(w.v[i]), b);
        }
#endif
    }
    return a;
}
inline void store_i8(int8_t* p, Vec a) {
    const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(a.v[0])), high = vqmovn_s32(vcvtnq_s32_f32(a.v[1]));
    vst1_s8(p, vqmovn_s16(vcombine_s16(low, high)));
}
inline Vec absolute(Vec a) { return {vabsq_f32(a.v[0]), vabsq_f32(a.v[1])}; }
inline void split_bf16(Codes a, Vec* w) {
    for (int i = 0; i < 2; i++) {
        const uint32x4_t words = vreinterpretq_u32_u8(a.v[i]);
        w[0].v[i] = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
        w[1].v[i] = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xFFFF0000)));
    }
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TRAMONTANE_PAIRS 1
constexpr bool HAS_PAIRS = true;
inline Vec dot_pairs(Vec a, Codes w, const uint16_t* x) {
    int32_t two;
    memcpy(&two, x, 4);
    const bfloat16x8_t b = vreinterpretq_bf16_s32(vdupq_n_s32(two));
    return {vbfdotq_f32(a.v[0], vreinterpretq_bf16_u8(w.v[0]), b), vbfdotq_f32(a.v[1], vreinterpretq_bf16_u8(w.v[1]), b)};
}
inline void store_bf16(uint16_t* p, Vec a) {
    const bfloat16x4_t low = vcvt_bf16_f32(a.v[0]), high = vcvt_bf16_f32(a.v[1]);
    memcpy(p, &low, 8);
    memcpy(p + 4, &high, 8);
}
#endif

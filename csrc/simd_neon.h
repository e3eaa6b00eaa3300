// simd.h for aarch64: a vector is two of the machine's. Included by it.

constexpr int LANES = 8;
struct Vec {
    float32x4_t v[2];
};

inline Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, Vec a) {
    vst1q_f32(p, a.v[0]);
    vst1q_f32(p + 4, a.v[1]);
}
inline Vec broadcast(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v[0], b.v[0]), vaddq_f32(a.v[1], b.v[1])}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v[0], b.v[0]), vsubq_f32(a.v[1], b.v[1])}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1])}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v[0], b.v[0]), vdivq_f32(a.v[1], b.v[1])}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1])};
}
// Not the machine's own, which give neither operand where one is not a number.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec max(Vec a, Vec b) { return {larger(a.v[0], b.v[0]), larger(a.v[1], b.v[1])}; }
inline Vec min(Vec a, Vec b) {
    return {vbslq_f32(vcltq_f32(a.v[0], b.v[0]), a.v[0], b.v[0]), vbslq_f32(vcltq_f32(a.v[1], b.v[1]), a.v[1], b.v[1])};
}
inline Vec select_lanes(int from, int to, Vec a, Vec b) {
    const int32_t lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
    Vec chosen;
    for (int i = 0; i < 2; i++) {
        const int32x4_t lane = vld1q_s32(lanes + 4 * i);
        const uint32x4_t mask = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(from)), vcltq_s32(lane, vdupq_n_s32(to)));
        chosen.v[i] = vbslq_f32(mask, a.v[i], b.v[i]);
    }
    return chosen;
}

inline Vec load_f16(const uint16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4)))};
}
inline Vec load_bf16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4), 16))};
}
inline void store_f16(uint16_t* p, Vec a) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v[0])));
    vst1_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(a.v[1])));
}
inline Vec load_i8(const int8_t* p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}
inline Vec load_u8(const uint8_t* p) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)))};
}
// Numbers of 8 bits with 4 of exponent, over 256: as halves they have the same bits, moved.
inline Vec load_e4m3(const uint8_t* p) {
    const int16x8_t wide = vshlq_n_s16(vmovl_s8(vld1_s8(reinterpret_cast<const int8_t*>(p))), 7);
    const uint16x8_t halves = vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xBF80));
    return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))),
            vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves)))};
}

inline float half_to_float(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

inline float sum(Vec a) {
    const float32x4_t c = vaddq_f32(a.v[0], a.v[1]);
    const float32x2_t d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
inline void sum4(float* out, Vec a, Vec b, Vec c, Vec d) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
}
inline void interleave(Vec a, Vec b, Vec& first, Vec& second) {
    first = {vzip1q_f32(a.v[0], b.v[0]), vzip2q_f32(a.v[0], b.v[0])};
    second = {vzip1q_f32(a.v[1], b.v[1]), vzip2q_f32(a.v[1], b.v[1])};
}
inline float max_lane(Vec a) {
    float32x4_t c = larger(a.v[0], a.v[1]);
    c = larger(c, vextq_f32(c, c, 2));
    return vgetq_lane_f32(larger(c, vextq_f32(c, c, 1)), 0);
}

// In two halves, so that results below the normal range stay exact.
inline Vec scale_by_power(Vec a, Vec n) {
    const int32x4_t bias = vdupq_n_s32(127);
    for (int i = 0; i < 2; i++) {
        const int32x4_t whole = vcvtnq_s32_f32(n.v[i]), half = vshrq_n_s32(whole, 1);
        const float32x4_t p = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
        const float32x4_t q = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23));
        a.v[i] = vmulq_f32(vmulq_f32(a.v[i], p), q);
    }
    return a;
}
inline Vec round(Vec a) { return {vrndnq_f32(a.v[0]), vrndnq_f32(a.v[1])}; }

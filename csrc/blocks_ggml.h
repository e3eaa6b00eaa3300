// The rest of GGML's formats: `Blocks` as in blocks.h, with the layouts that kernels/blocks.py tells.
// Included inside an anonymous namespace, after blocks.h and codes.h.
//
// Two that are rare are expanded a block at a time by plain code.

inline float half_at(const uint8_t* p) { return half_to_float(load_u16(p)); }

template <>
struct Blocks<Format::Q5_0> {
    static constexpr int ELEMENTS = 32, BYTES = 22;
    using Header = Vec;
    static Header header(const uint8_t* b) { return broadcast_half(b); }
    static void part(const uint8_t* b, const Header& d, int, Vec* w) {
        scaled((nibbles(b + 6) | raised(bits(b + 2), 4)) - 16, d, w);
    }
};

template <>
struct Blocks<Format::Q5_1> {
    static constexpr int ELEMENTS = 32, BYTES = 24;
    struct Header {
        Vec d, m;
    };
    static Header header(const uint8_t* b) { return {broadcast_half(b), broadcast_half(b + 2)}; }
    static void part(const uint8_t* b, const Header& h, int, Vec* w) {
        scaled(nibbles(b + 8) | raised(bits(b + 4), 4), h.d, h.m, w);
    }
};

template <>
struct Blocks<Format::Q8_1> {
    static constexpr int ELEMENTS = 32, BYTES = 36;
    using Header = Vec;
    static Header header(const uint8_t* b) { return broadcast_half(b); }
    static void part(const uint8_t* b, const Header& d, int, Vec* w) { scaled(load_codes(b + 4), d, w); }
};

template <>
struct Blocks<Format::Q2_K> {
    static constexpr int ELEMENTS = 256, BYTES = 84;
    struct Header {
        float scales[16], constants[16];
    };
    static Header header(const uint8_t* b) {
        const float d = half_at(b + 80), m = half_at(b + 82);
        Header h;
        for (int i = 0; i < 16; i++) {
            h.scales[i] = d * float(b[i] & 15);
            h.constants[i] = -(m * float(b[i] >> 4));
        }
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        scaled(field(load_codes(b + 16 + j / 4 * 32), j % 4 * 2, 3), h.scales + 2 * j, w);
        for (int i = 0; i < VECS; i++) w[i] = w[i] + broadcast(h.constants[2 * j + i * LANES / 16]);
    }
};

template <>
struct Blocks<Format::Q3_K> {
    static constexpr int ELEMENTS = 256, BYTES = 110;
    struct Header {
        float scales[16];
    };
    static Header header(const uint8_t* b) {
        const uint8_t* packed = b + 96;
        const float d = half_at(b + 108);
        Header h;
        for (int i = 0; i < 16; i++) {
            const int low = packed[i % 8] >> i / 8 * 4 & 15, high = packed[8 + i % 4] >> i / 4 * 2 & 3;
            h.scales[i] = d * float((low | high << 4) - 32);
        }
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        const Codes low = field(load_codes(b + 32 + j / 4 * 32), j % 4 * 2, 3), high = field(load_codes(b), j, 1);
        scaled((low | raised(high, 2)) - 4, h.scales + 2 * j, w);
    }
};

template <>
struct Blocks<Format::Q5_K> {
    static constexpr int ELEMENTS = 256, BYTES = 176;
    using Header = Blocks<Format::Q4_K>::Header;
    static Header header(const uint8_t* b) { return Blocks<Format::Q4_K>::header(b); }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        const Codes low = field(load_codes(b + 48 + j / 2 * 32), j % 2 * 4, 15), high = field(load_codes(b + 16), j, 1);
        scaled(low | raised(high, 4), broadcast(h.scales[j]), broadcast(h.scales[8 + j]), w);
    }
};

template <>
struct Blocks<Format::Q8_K> {
    static constexpr int ELEMENTS = 256, BYTES = 292;
    using Header = Vec;
    static Header header(const uint8_t* b) {
        float d;
        memcpy(&d, b, 4);
        return broadcast(d);
    }
    static void part(const uint8_t* b, const Header& d, int j, Vec* w) { scaled(load_codes(b + 4 + j * PART), d, w); }
};

template <>
struct Blocks<Format::IQ4_NL> {
    static constexpr int ELEMENTS = 32, BYTES = 18;
    using Header = Vec;
    static Header header(const uint8_t* b) { return broadcast_half(b); }
    static void part(const uint8_t* b, const Header& d, int, Vec* w) { scaled(look(tables.iq4, nibbles(b + 2)), d, w); }
};

template <>
struct Blocks<Format::IQ4_XS> {
    static constexpr int ELEMENTS = 256, BYTES = 136;
    struct Header {
        float scales[8];
    };
    static Header header(const uint8_t* b) {
        const float d = half_at(b);
        const uint16_t high = load_u16(b + 2);
        Header h;
        for (int i = 0; i < 8; i++)
            h.scales[i] = d * float(((b[4 + i / 2] >> i % 2 * 4 & 15) | (high >> 2 * i & 3) << 4) - 32);
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        scaled(look(tables.iq4, nibbles(b + 8 + j * 16)), broadcast(h.scales[j]), w);
    }
};

template <>
struct Blocks<Format::MXFP4> {
    static constexpr int ELEMENTS = 32, BYTES = 17;
    using Header = Vec;
    static Header header(const uint8_t* b) { return broadcast(tables.e8m0[b[0]]); }
    static void part(const uint8_t* b, const Header& d, int, Vec* w) {
        scaled(look(tables.e2m1, nibbles(b + 1)), d, w);
    }
};

template <>
struct Blocks<Format::TQ2_0> {
    static constexpr int ELEMENTS = 256, BYTES = 66;
    using Header = Vec;
    static Header header(const uint8_t* b) { return broadcast_half(b + 64); }
    static void part(const uint8_t* b, const Header& d, int j, Vec* w) {
        scaled(field(load_codes(b + j / 4 * 32), j % 4 * 2, 3) - 1, d, w);
    }
};

template <>
struct Blocks<Format::Q1_0> {
    static constexpr int ELEMENTS = 128, BYTES = 18;
    using Header = Vec;
    static Header header(const uint8_t* b) { return broadcast_half(b); }
    static void part(const uint8_t* b, const Header& d, int j, Vec* w) {
        scaled(raised(bits(b + 2 + j * 4), 1) - 1, d, w);
    }
};

template <>
struct Blocks<Format::NVFP4> {
    static constexpr int ELEMENTS = 64, BYTES = 36;
    struct Header {
        float scales[4];
    };
    static Header header(const uint8_t* b) {
        Header h;
        for (int i = 0; i < 4; i++) h.scales[i] = tables.ue4m3[b[i]];
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        scaled(look(tables.e2m1, nibbles_in_eights(b + 4 + j * 16)), h.scales + 2 * j, w);
    }
};

// ---- grids

// A sub-block of 16 or 32 elements has a scale, a nibble or less: SUBS of them.
template <int SUBS>
struct SubScales {
    float scales[SUBS];
};

// The signs of four times seven bits; an eighth bit makes their number even.
inline Codes even_signs(uint32_t word) {
    uint8_t signs[4];
    for (int i = 0; i < 4; i++) {
        const uint32_t seven = word >> 7 * i & 127;
        signs[i] = static_cast<uint8_t>(seven | static_cast<uint32_t>(__builtin_parity(seven)) << 7);
    }
    return bits(signs);
}

template <>
struct Blocks<Format::IQ2_XXS> {
    static constexpr int ELEMENTS = 256, BYTES = 66;
    using Header = SubScales<8>;
    static Header header(const uint8_t* b) {
        const float d = half_at(b);
        Header h;
        for (int i = 0; i < 8; i++) h.scales[i] = d * (float(b[9 + 8 * i] >> 4) + 0.5f) * 0.25f;
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        const uint8_t* p = b + 2 + 8 * j;
        const int indices[4] = {p[0], p[1], p[2], p[3]};
        scaled(flipped(entries(tables.iq2_xxs, indices), even_signs(load_u32(p + 4))), broadcast(h.scales[j]), w);
    }
};

// Scales of 16 nibbles: d * (scale + 1/2) / 4.
inline SubScales<16> quarter_scales(float d, const uint8_t* packed) {
    SubScales<16> h;
    for (int i = 0; i < 16; i++) h.scales[i] = d * (float(packed[i / 2] >> i % 2 * 4 & 15) + 0.5f) * 0.25f;
    return h;
}

template <>
struct Blocks<Format::IQ2_XS> {
    static constexpr int ELEMENTS = 256, BYTES = 74;
    using Header = SubScales<16>;
    static Header header(const uint8_t* b) { return quarter_scales(half_at(b), b + 66); }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        int indices[4];
        uint32_t signs = 0;
        for (int i = 0; i < 4; i++) {
            const uint32_t word = load_u16(b + 2 + 8 * j + 2 * i);
            indices[i] = static_cast<int>(word & 511);
            signs |= word >> 9 << 7 * i;
        }
        scaled(flipped(entries(tables.iq2_xs, indices), even_signs(signs)), h.scales + 2 * j, w);
    }
};

template <>
struct Blocks<Format::IQ2_S> {
    static constexpr int ELEMENTS = 256, BYTES = 82;
    using Header = SubScales<16>;
    static Header header(const uint8_t* b) { return quarter_scales(half_at(b), b + 74); }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        int indices[4];
        for (int i = 0; i < 4; i++) indices[i] = b[2 + 4 * j + i] | (b[66 + j] >> 2 * i & 3) << 8;
        scaled(flipped(entries(tables.iq2_s, indices), bits(b + 34 + 4 * j)), h.scales + 2 * j, w);
    }
};

template <>
struct Blocks<Format::IQ3_XXS> {
    static constexpr int ELEMENTS = 256, BYTES = 98;
    using Header = SubScales<8>;
    static Header header(const uint8_t* b) {
        const float d = half_at(b);
        Header h;
        for (int i = 0; i < 8; i++) h.scales[i] = d * (float(b[69 + 4 * i] >> 4) + 0.5f) * 0.5f;
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        int indices[8];
        for (int i = 0; i < 8; i++) indices[i] = b[2 + 8 * j + i];
        const Codes signs = even_signs(load_u32(b + 66 + 4 * j));
        scaled(flipped(entries(tables.iq3_xxs, indices), signs), broadcast(h.scales[j]), w);
    }
};

template <>
struct Blocks<Format::IQ3_S> {
    static constexpr int ELEMENTS = 256, BYTES = 110;
    using Header = SubScales<8>;
    static Header header(const uint8_t* b) {
        const float d = half_at(b);
        Header h;
        for (int i = 0; i < 8; i++) h.scales[i] = d * float((b[106 + i / 2] >> i % 2 * 4 & 15) * 2 + 1);
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        int indices[8];
        for (int i = 0; i < 8; i++) indices[i] = b[2 + 8 * j + i] | (b[66 + j] >> i & 1) << 8;
        scaled(flipped(entries(tables.iq3_s, indices), bits(b + 74 + 4 * j)), broadcast(h.scales[j]), w);
    }
};

// IQ1's vectors are of -1, 0 and 1, moved by an eighth. Here they are eight times that, whole numbers, and their scales
// an eighth: no rounding is another, since no scale is so small that an eighth of it is not exact.
template <>
struct Blocks<Format::IQ1_S> {
    static constexpr int ELEMENTS = 256, BYTES = 50;
    using Header = SubScales<8>;
    static Header header(const uint8_t* b) {
        const float d = half_at(b);
        Header h;
        for (int i = 0; i < 8; i++) h.scales[i] = d * float((b[35 + 2 * i] >> 4 & 7) * 2 + 1) * 0.125f;
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        const int word = load_u16(b + 34 + 2 * j);
        int indices[4];
        for (int i = 0; i < 4; i++) indices[i] = b[2 + 4 * j + i] | (word >> 3 * i & 7) << 8;
        scaled(entries(tables.iq1_s, indices) - (word >> 15 ? 1 : -1), broadcast(h.scales[j]), w);
    }
};

template <>
struct Blocks<Format::IQ1_M> {
    static constexpr int ELEMENTS = 256, BYTES = 56;
    using Header = SubScales<16>;
    static Header header(const uint8_t* b) {
        const uint8_t* packed = b + 48;
        int half = 0;
        for (int i = 0; i < 4; i++) half |= (packed[2 * i + 1] >> 4) << 4 * i;
        const float d = half_to_float(static_cast<uint16_t>(half));
        Header h;
        for (int i = 0; i < 16; i++)
            h.scales[i] = d * float((load_u16(packed + i / 4 * 2) >> i % 4 * 3 & 7) * 2 + 1) * 0.125f;
        return h;
    }
    static void part(const uint8_t* b, const Header& h, int j, Vec* w) {
        static constexpr int8_t MOVES[2][8] = {{1, 1, 1, 1, 1, 1, 1, 1}, {-1, -1, -1, -1, -1, -1, -1, -1}};
        int indices[4], moves[4];
        for (int i = 0; i < 4; i++) {
            const int nibble = b[32 + 2 * j + i / 2] >> i % 2 * 4 & 15;
            indices[i] = b[4 * j + i] | (nibble & 7) << 8;
            moves[i] = nibble >> 3;
        }
        scaled(entries(tables.iq1_s, indices) + entries(MOVES, moves), h.scales + 2 * j, w);
    }
};

// ---- a block at a time

// `Blocks` over a function that writes the values of a block.
template <int E, int B, void (*EXPAND)(const uint8_t*, float*)>
struct Expanded {
    static constexpr int ELEMENTS = E, BYTES = B;
    struct Header {
        float values[E];
    };
    static Header header(const uint8_t* b) {
        Header h;
        EXPAND(b, h.values);
        return h;
    }
    static void part(const uint8_t*, const Header& h, int j, Vec* w) {
        for (int i = 0; i < VECS; i++) w[i] = load(h.values + j * PART + i * LANES);
    }
};

inline void expand_q2_0(const uint8_t* b, float* out) {
    const float d = half_at(b);
    for (int i = 0; i < 64; i++) out[i] = float((b[2 + i / 4] >> i % 4 * 2 & 3) - 1) * d;
}
template <>
struct Blocks<Format::Q2_0> : Expanded<64, 18, expand_q2_0> {};

inline void expand_tq1_0(const uint8_t* b, float* out) {
    constexpr struct {
        int start, count, digits;
    } RUNS[3] = {{0, 32, 5}, {32, 16, 5}, {48, 4, 4}};
    const float d = half_at(b + 52);
    for (const auto& run : RUNS) {
        uint8_t power = 1;
        for (int k = 0; k < run.digits; k++, power *= 3)
            for (int i = 0; i < run.count; i++)
                *out++ = float((uint8_t(b[run.start + i] * power) * 3 >> 8) - 1) * d;
    }
}
template <>
struct Blocks<Format::TQ1_0> : Expanded<256, 54, expand_tq1_0> {};

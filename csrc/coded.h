// Coded matrices: codes of 1 to 8 bits, a table of values, and grids of scales, zero points and offsets; what they
// stand for is told in kernels/coded.py. Included inside an anonymous namespace, after simd.h and blocks.h.

constexpr int64_t CODED_PANEL = 2048;  // codes expanded at a time, at most

// Codes of BITS bits to bytes, eight at a time. Reads no byte beyond the last code's.
template <int BITS>
void unpack_codes(uint8_t* codes, const uint8_t* packed, int64_t count) {
    const auto eight = [](uint8_t* out, uint64_t word) {
        for (int j = 0; j < 8; j++) out[j] = uint8_t(word >> (j * BITS)) & ((1 << BITS) - 1);
    };
    uint64_t word = 0;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8, packed += BITS) {
        memcpy(&word, packed, BITS);
        eight(codes + i, word);
    }
    if (i == count) return;
    memcpy(&word, packed, divide_up((count - i) * BITS, 8));
    eight(codes + i, word);
}
template <>
void unpack_codes<4>(uint8_t* codes, const uint8_t* packed, int64_t count) {
    for (int64_t i = 0; i < divide_up(count, 2); i++) {
        codes[2 * i] = packed[i] & 15;
        codes[2 * i + 1] = packed[i] >> 4;
    }
}
template <>
void unpack_codes<8>(uint8_t* codes, const uint8_t* packed, int64_t count) {
    memcpy(codes, packed, count);
}

#if defined(TRAMONTANE_AVX512)
inline Vec look_up(const float* table, const uint8_t* p) { return {_mm512_i32gather_ps(wide_codes(p), table, 4)}; }
inline Vec look_up16(Vec table, const float*, const uint8_t* p) {
    return {_mm512_permutexvar_ps(wide_codes(p), table.v)};
}
#elif defined(TRAMONTANE_AVX2)
inline Vec look_up(const float* table, const uint8_t* p) { return {_mm256_i32gather_ps(table, wide_codes(p), 4)}; }
inline Vec look_up16(Vec, const float* table, const uint8_t* p) { return look_up(table, p); }
#else
inline Vec look_up(const float* table, const uint8_t* p) {
    float values[LANES];
    for (int i = 0; i < LANES; i++) values[i] = table[p[i]];
    return load(values);
}
inline Vec look_up16(Vec, const float* table, const uint8_t* p) { return look_up(table, p); }
#endif

// What a table holds, so that the common ones need no lookup.
enum class Values { COUNTED, SIGNED, FEW, MANY };  // table[0] + code; two's complement bytes; 16 at most; others

inline Values kind_of(const Coded& m) {
    bool counted = true, wrapped = m.bits == 8;
    for (int i = 0; i < 1 << m.bits; i++) {
        counted = counted && m.table[i] == m.table[0] + float(i);
        wrapped = wrapped && m.table[i] == float(static_cast<int8_t>(i));
    }
    return counted ? Values::COUNTED : wrapped ? Values::SIGNED : m.bits <= 4 ? Values::FEW : Values::MANY;
}

// A coded matrix as a source of rows of floats; see `BlockSource` in matmul.inc.
struct CodedSource {
    static constexpr int64_t ELEMENTS = 32;  // of any width, they begin at a whole byte
    Coded m;
    Values kind;
    float few[16];  // the table, repeated where it is shorter

    explicit CodedSource(const Coded& coded) : m(coded), kind(kind_of(coded)) {
        for (int i = 0; i < 16; i++) few[i] = coded.table[i % (1 << coded.bits)];
    }

    static float number(const uint8_t* grid, Number type, int64_t i) {
        switch (type) {
            case Number::F32: return reinterpret_cast<const float*>(grid)[i];
            case Number::F16: return half_to_float(reinterpret_cast<const uint16_t*>(grid)[i]);
            case Number::BF16: {
                const uint32_t bits = uint32_t(reinterpret_cast<const uint16_t*>(grid)[i]) << 16;
                float value;
                memcpy(&value, &bits, 4);
                return value;
            }
            case Number::U8: return float(grid[i]);
        }
        return 0;
    }

    // Up to LANES numbers, one a lane.
    template <class F>
    static Vec several(int64_t count, const F& f) {
        float values[LANES] = {};
        for (int j = 0; j < least(count, LANES); j++) values[j] = f(j);
        return load(values);
    }
    static Vec numbers(const uint8_t* grid, Number type, int64_t i, int64_t left) {
        if (left >= LANES) switch (type) {
                case Number::F32: return load(reinterpret_cast<const float*>(grid) + i);
                case Number::F16: return load_f16(reinterpret_cast<const uint16_t*>(grid) + i);
                case Number::BF16: return load_bf16(reinterpret_cast<const uint16_t*>(grid) + i);
                case Number::U8: return load_u8(grid + i);
            }
        return several(left, [&](int64_t j) { return number(grid, type, i + j); });
    }

    float scale(int64_t i) const { return m.scale_table ? m.scale_table[m.scales[i]] : number(m.scales, m.scale_type, i); }
    // Neutral where there are none: x - 0 and x + -0 are x, whatever x is.
    float zero_point(int64_t i) const { return m.zeros ? number(m.zeros, m.zero_type, i) : 0.0f; }
    float offset(int64_t i) const { return m.offsets ? number(m.offsets, m.offset_type, i) : -0.0f; }

    void unpack(uint8_t* codes, const uint8_t* packed, int64_t count) const {
        switch (m.bits) {
            case 1: return unpack_codes<1>(codes, packed, count);
            case 2: return unpack_codes<2>(codes, packed, count);
            case 3: return unpack_codes<3>(codes, packed, count);
            case 4: return unpack_codes<4>(codes, packed, count);
            case 5: return unpack_codes<5>(codes, packed, count);
            case 6: return unpack_codes<6>(codes, packed, count);
            case 7: return unpack_codes<7>(codes, packed, count);
            default: return unpack_codes<8>(codes, packed, count);
        }
    }

    template <class Look>
    void spread(float* out, const uint8_t* codes, int64_t line, int64_t begin, int64_t count, const Look& look) const {
        const Vec factor = broadcast(m.factor);
        if (m.group == 1) {
            for (int64_t i = 0; i < count; i += LANES) {
                const int64_t at = line + begin + i, left = m.columns - begin - i;
                const Vec s = m.scale_table ? several(left, [&](int64_t j) { return m.scale_table[m.scales[at + j]]; })
                                            : numbers(m.scales, m.scale_type, at, left);
                const Vec z = m.zeros ? numbers(m.zeros, m.zero_type, at, left) : broadcast(0.0f);
                const Vec o = m.offsets ? numbers(m.offsets, m.offset_type, at, left) : broadcast(-0.0f);
                store(out + i, ((look(codes + i) - z) * s + o) * factor);
            }
            return;
        }
        // Whole vectors: what is written beyond a group's end the next group writes again.
        for (int64_t i = 0; i < count;) {
            const int64_t g = (begin + i) / m.group, end = least(count, (g + 1) * m.group - begin);
            const Vec s = broadcast(scale(line + g)), z = broadcast(zero_point(line + g)), o = broadcast(offset(line + g));
            for (; i < end; i += LANES) store(out + i, ((look(codes + i) - z) * s + o) * factor);
            i = end;
        }
    }

    // Columns [begin, begin + count) of a row as floats, then zeros up to a multiple of PART; begin is a multiple of
    // ELEMENTS. `out` has LANES floats more than that.
    void expand(float* out, int64_t row, int64_t begin, int64_t count) const {
        const int64_t line = row / m.row_block % m.lines * m.groups;
        for (int64_t k = 0; k < count; k += CODED_PANEL) {
            const int64_t part = least(CODED_PANEL, count - k);
            const uint8_t* packed = m.codes + row * m.row_bytes + (begin + k) * m.bits / 8;
            uint8_t codes[CODED_PANEL + 64];
            unpack(codes, packed, part);
            memset(codes + part, 0, 64);
            const Vec first = broadcast(m.table[0]), table = load(few);
            const float* values = m.table;
            switch (kind) {
                case Values::COUNTED:
                    spread(out + k, codes, line, begin + k, part, [=](const uint8_t* p) { return load_u8(p) + first; });
                    break;
                case Values::SIGNED:
                    spread(out + k, codes, line, begin + k, part,
                           [](const uint8_t* p) { return load_i8(reinterpret_cast<const int8_t*>(p)); });
                    break;
                case Values::FEW:
                    spread(out + k, codes, line, begin + k, part,
                           [=](const uint8_t* p) { return look_up16(table, values, p); });
                    break;
                case Values::MANY:
                    spread(out + k, codes, line, begin + k, part,
                           [=](const uint8_t* p) { return look_up(values, p); });
                    break;
            }
        }
        for (int64_t k = count; k < round_up(count, PART); k++) out[k] = 0;
    }
};

// Coded matrices: codes of 1 to 8 bits, a table of values, and grids of scales, zero points and offsets; what they
// stand for is told in kernels/coded.py. Included inside an anonymous namespace, after codes.h.

constexpr int STRIP = 512;  // columns that are expanded at a time

// Calls f(i, codes) for each 32 of `count` codes of BITS bits, the i-th, zeros behind the last.
template <int BITS, class F>
inline void each_codes(const uint8_t* packed, int64_t count, const F& f) {
    int64_t i = 0;
    for (; (i + 1) * 32 <= count; i++, packed += 4 * BITS) f(i, codes_in_turn<BITS>(packed));
    if (i * 32 == count) return;
    uint8_t padded[32] = {};
    memcpy(padded, packed, divide_up((count - i * 32) * BITS, 8));
    f(i, codes_in_turn<BITS>(padded));
}
template <class F>
inline void each_codes(int bits, const uint8_t* packed, int64_t count, const F& f) {
    switch (bits) {
        case 1: return each_codes<1>(packed, count, f);
        case 2: return each_codes<2>(packed, count, f);
        case 3: return each_codes<3>(packed, count, f);
        case 4: return each_codes<4>(packed, count, f);
        case 5: return each_codes<5>(packed, count, f);
        case 6: return each_codes<6>(packed, count, f);
        case 7: return each_codes<7>(packed, count, f);
        default: return each_codes<8>(packed, count, f);
    }
}

#if defined(TRAMONTANE_AVX512)
inline Vec look_up(const float* table, const uint8_t* p) { return {_mm512_i32gather_ps(wide_codes(p), table, 4)}; }
inline Vec look_up16(Vec table, const float*, const uint8_t* p) {
    return {_mm512_permutexvar_ps(wide_codes(p), table.v)};
}
// Small floats: the sign of a byte and its other seven bits as a float has them, seven from bit `shift` on.
inline Vec small_bits(const uint8_t* p, int shift) {
    const __m512i c = wide_codes(p), low = _mm512_and_si512(c, _mm512_set1_epi32(127));
    const __m512i bits = _mm512_sll_epi32(low, _mm_cvtsi32_si128(shift));
    return {_mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_slli_epi32(_mm512_srli_epi32(c, 7), 31)))};
}
#elif defined(TRAMONTANE_AVX2)
inline Vec look_up(const float* table, const uint8_t* p) { return {_mm256_i32gather_ps(table, wide_codes(p), 4)}; }
inline Vec look_up16(Vec, const float* table, const uint8_t* p) { return look_up(table, p); }
inline Vec small_bits(const uint8_t* p, int shift) {
    const __m256i c = wide_codes(p), low = _mm256_and_si256(c, _mm256_set1_epi32(127));
    const __m256i bits = _mm256_sll_epi32(low, _mm_cvtsi32_si128(shift));
    return {_mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_slli_epi32(_mm256_srli_epi32(c, 7), 31)))};
}
#else
inline Vec look_up(const float* table, const uint8_t* p) {
    float values[LANES];
    for (int i = 0; i < LANES; i++) values[i] = table[p[i]];
    return load(values);
}
inline Vec look_up16(Vec, const float* table, const uint8_t* p) { return look_up(table, p); }
inline Vec small_bits(const uint8_t* p, int shift) {
    uint32_t bits[LANES];
    for (int i = 0; i < LANES; i++) bits[i] = uint32_t(p[i] & 127) << shift | uint32_t(p[i] >> 7) << 31;
    Vec a;
    memcpy(&a.v, bits, sizeof a.v);
    return a;
}
#endif

// What a table holds, so that the common ones need no lookup: table[0] + code; bytes of two's complement; floats of
// eight bits, which are a larger one's bits times a power of two; 16 values at most; others.
enum class Values { COUNTED, SIGNED, SMALL, FEW, MANY };

// A coded matrix, and what is to be known of its table.
struct CodedSource {
    Coded m;
    Values kind;
    float few[16];                 // the table, repeated where it is shorter
    int shift = 0, special = 128;  // of SMALL: where the seven bits go; from which on the table says something else
    float power = 1;
    // Of tables that are whole numbers: a value is `step` times what stands for its code in `numbers`, plus `base`.
    uint8_t bytes[16];
    float step = 1, base;

    explicit CodedSource(const Coded& coded) : m(coded) {
        for (int i = 0; i < 16; i++) few[i] = m.table[i % (1 << m.bits)];
        kind = kind_of_table();
        base = kind == Values::SIGNED ? -128.0f : m.table[0];
        if (kind == Values::FEW) find_numbers();
    }

    // Whether products may take whole numbers for values. Not where values would be rounded to that: of NF4 and FP8 it
    // moved perplexity by a percent and more.
    bool whole() const {
        return kind == Values::COUNTED || kind == Values::SIGNED || (kind == Values::FEW && step > 0);
    }
    // Whether some of them are above 127.
    bool wide() const { return kind != Values::FEW && m.bits == 8; }

    // Where a row's grids have its first group, and how far behind it the next.
    int64_t line(int64_t row) const {
        if (m.turned) return row / PANEL_ROWS * m.groups * PANEL_ROWS + row % PANEL_ROWS;
        return row / m.row_block % m.lines * m.groups;
    }
    int64_t step_of_groups() const { return m.turned ? PANEL_ROWS : 1; }

    // Of packed codes, those of 32 columns from column k on of a panel.
    const uint8_t* panel_codes(int64_t panel, int64_t k) const {
        return m.codes + (panel * (m.columns / 32) + k / 32) * m.bits * 64;
    }

    // Calls f(i, numbers) for the i-th 32 of packed codes.
    template <class F>
    [[gnu::always_inline]] void numbers(const uint8_t* packed, int64_t count, const F& f) const {
        switch (kind) {
            case Values::SIGNED: return each_codes<8>(packed, count, [&](int64_t i, Bytes32 c) { f(i, c + 128); });
            case Values::FEW:
                return each_codes(m.bits, packed, count, [&](int64_t i, Bytes32 c) { f(i, look(bytes, c)); });
            default: return each_codes(m.bits, packed, count, [&](int64_t i, Bytes32 c) { f(i, c); });
        }
    }

    // For LANES lines the scale of a group's numbers, and what is added once for each unit of activations.
    void scales(const int64_t* lines, int64_t g, Vec& scale, Vec& minimum) const {
        const int64_t more = g * step_of_groups();
        scales_by([&](int lane) { return lines[lane] + more; },
                  [&](const uint8_t* grid, Number type) { return gathered(grid, type, lines, more); }, scale, minimum);
    }
    // The same of turned grids, for rows that lie together from place `first` on.
    void scales_at(int64_t first, Vec& scale, Vec& minimum) const {
        scales_by([=](int lane) { return first + lane; },
                  [=](const uint8_t* grid, Number type) { return together(grid, type, first); }, scale, minimum);
    }

    // Columns [k, k + count) of a row as floats; k is a multiple of 32. Writes whole vectors.
    void expand(float* out, int64_t row, int64_t k, int64_t count) const {
        uint8_t codes[STRIP + 32];
        if (m.packed)
            row_of_panel(codes, row, k, count);
        else
            each_codes(m.bits, m.codes + row * m.row_bytes + k * m.bits / 8, count,
                       [&](int64_t i, Bytes32 c) { store_halves(codes + i * 32, codes + i * 32 + 16, c); });
        const Vec first = broadcast(m.table[0]), table = load(few), times = broadcast(power);
        const float* values = m.table;
        const int64_t at = line(row);
        switch (kind) {
            case Values::COUNTED: return spread(out, codes, at, k, count, [=](const uint8_t* p) { return load_u8(p) + first; });
            case Values::SIGNED:
                return spread(out, codes, at, k, count, [](const uint8_t* p) { return load_i8(reinterpret_cast<const int8_t*>(p)); });
            case Values::FEW:
                return spread(out, codes, at, k, count, [=](const uint8_t* p) { return look_up16(table, values, p); });
            case Values::SMALL: {
                const uint8_t limit = static_cast<uint8_t>(special);
                uint8_t others = 0;
                for (int64_t i = 0; i < round_up(count, 32); i++) others |= uint8_t((codes[i] & 127) >= limit);
                if (!others)
                    return spread(out, codes, at, k, count, [=, this](const uint8_t* p) { return small_bits(p, shift) * times; });
                break;
            }
            case Values::MANY: break;
        }
        spread(out, codes, at, k, count, [=](const uint8_t* p) { return look_up(values, p); });
    }

   private:
    // place(lane): where a lane's number lies in its grid; take(grid, type): those of all lanes.
    template <class Place, class Take>
    void scales_by(const Place& place, const Take& take, Vec& scale, Vec& minimum) const {
        const Vec factor = broadcast(m.factor);
        const Vec s = m.scale_table ? gathered([&](int lane) { return m.scale_table[m.scales[place(lane)]]; })
                                    : take(m.scales, m.scale_type);
        const Vec z = m.zeros ? take(m.zeros, m.zero_type) : broadcast(0.0f);
        const Vec o = m.offsets ? take(m.offsets, m.offset_type) : broadcast(-0.0f);
        scale = s * factor * broadcast(step);
        minimum = ((broadcast(base) - z) * s + o) * factor;
    }

    void row_of_panel(uint8_t* codes, int64_t row, int64_t k, int64_t count) const {
        for (int64_t i = 0; i < count; i += 32, codes += 32)
            for (int w = 0; w < m.bits; w++) {
                const uint8_t* word = panel_codes(row / PANEL_ROWS, k + i) + (w * PANEL_ROWS + row % PANEL_ROWS) * 4;
                if (m.bits == 8) {
                    memcpy(codes + w * 4, word, 4);
                } else {
                    for (int j = 0; j < 4; j++) codes[w * 4 + j] = word[j] & 15, codes[16 + w * 4 + j] = word[j] >> 4;
                }
            }
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

    // One number a lane.
    template <class F>
    static Vec gathered(const F& f) {
        float values[LANES];
        for (int i = 0; i < LANES; i++) values[i] = f(i);
        return load(values);
    }
    static Vec gathered(const uint8_t* grid, Number type, const int64_t* lines, int64_t more) {
        if (type == Number::F32) return gathered([&](int i) { return reinterpret_cast<const float*>(grid)[lines[i] + more]; });
        if (type == Number::U8) {
            uint8_t bytes[LANES];
            for (int i = 0; i < LANES; i++) bytes[i] = grid[lines[i] + more];
            return load_u8(bytes);
        }
        uint16_t halves[LANES];
        for (int i = 0; i < LANES; i++) halves[i] = reinterpret_cast<const uint16_t*>(grid)[lines[i] + more];
        return type == Number::F16 ? load_f16(halves) : load_bf16(halves);
    }
    // LANES numbers that lie together.
    static Vec together(const uint8_t* grid, Number type, int64_t i) {
        switch (type) {
            case Number::F16: return load_f16(reinterpret_cast<const uint16_t*>(grid) + i);
            case Number::BF16: return load_bf16(reinterpret_cast<const uint16_t*>(grid) + i);
            case Number::U8: return load_u8(grid + i);
            default: return load(reinterpret_cast<const float*>(grid) + i);
        }
    }
    // The next LANES numbers of a line, of which there are `left`.
    static Vec in_line(const uint8_t* grid, Number type, int64_t i, int64_t left) {
        if (left >= LANES) return together(grid, type, i);
        return gathered([&](int j) { return j < left ? number(grid, type, i + j) : 0.0f; });
    }

    float scale(int64_t i) const { return m.scale_table ? m.scale_table[m.scales[i]] : number(m.scales, m.scale_type, i); }
    // Neutral where there are none: x - 0 and x + -0 are x, whatever x is.
    float zero_point(int64_t i) const { return m.zeros ? number(m.zeros, m.zero_type, i) : 0.0f; }
    float offset(int64_t i) const { return m.offsets ? number(m.offsets, m.offset_type, i) : -0.0f; }

    template <class Look>
    void spread(float* out, const uint8_t* codes, int64_t line, int64_t begin, int64_t count, const Look& look) const {
        const Vec factor = broadcast(m.factor);
        if (m.group == 1) {
            for (int64_t i = 0; i < count; i += LANES) {
                const int64_t at = line + begin + i, left = m.columns - begin - i;
                const Vec s = m.scale_table ? gathered([&](int j) { return j < left ? m.scale_table[m.scales[at + j]] : 0.0f; })
                                            : in_line(m.scales, m.scale_type, at, left);
                const Vec z = m.zeros ? in_line(m.zeros, m.zero_type, at, left) : broadcast(0.0f);
                const Vec o = m.offsets ? in_line(m.offsets, m.offset_type, at, left) : broadcast(-0.0f);
                store(out + i, ((look(codes + i) - z) * s + o) * factor);
            }
            return;
        }
        // Whole vectors: what is written beyond a group's end the next group writes again.
        for (int64_t i = 0; i < count;) {
            const int64_t g = (begin + i) / m.group, end = least(count, (g + 1) * m.group - begin);
            const int64_t at = line + g * step_of_groups();
            const Vec s = broadcast(scale(at)), z = broadcast(zero_point(at)), o = broadcast(offset(at));
            for (; i < end; i += LANES) store(out + i, ((look(codes + i) - z) * s + o) * factor);
            i = end;
        }
    }

    Values kind_of_table() {
        bool counted = true, wrapped = m.bits == 8;
        for (int i = 0; i < 1 << m.bits; i++) {
            counted = counted && m.table[i] == m.table[0] + float(i);
            wrapped = wrapped && m.table[i] == float(static_cast<int8_t>(i));
        }
        if (counted) return Values::COUNTED;
        if (wrapped) return Values::SIGNED;
        if (m.bits <= 4) return Values::FEW;
        return m.bits == 8 && (is_small(20, 0x1p120f) || is_small(21, 0x1p112f)) ? Values::SMALL : Values::MANY;
    }

    bool is_small(int at, float times) {
        special = 128;
        for (int i = 0; i < 256; i++) {
            const uint32_t bits = uint32_t(i & 127) << at | uint32_t(i >> 7) << 31;
            float value;
            memcpy(&value, &bits, 4);
            if (value * times == m.table[i]) continue;
            if ((i & 127) < 120) return false;
            special = static_cast<int>(least(special, i & 127));
        }
        shift = at;
        power = times;
        return true;
    }

    // The smallest of a few values as the unit of all, where they are up to 63 times that.
    void find_numbers() {
        float smallest = 0, largest = 0;
        for (float value : few) {
            const float size = value < 0 ? -value : value;
            if (!(size < 1e30f)) largest = 1e30f;
            if (size > largest) largest = size;
            if (size > 0 && (smallest == 0 || size < smallest)) smallest = size;
        }
        step = 0;
        if (!(largest > 1e-30f && largest < 1e30f)) return;  // not such as anybody quantizes to
        if (largest > 63 * smallest) return;
        for (float value : few)
            if (value != smallest * float(int(value / smallest))) return;
        step = smallest;
        base = -64 * step;
        for (int i = 0; i < 16; i++) bytes[i] = static_cast<uint8_t>(int(few[i] / step) + 64);
    }
};

// GGML's blocks of IQ2 and IQ3: how they name 32 columns by entries of a grid, and signs. Included inside an anonymous
// namespace, after tables.h.
//
// Each GridBlock<F> has its GRID; get(row, j) gives what a block says of its j-th 32 columns, put(row, j, named) writes it.

// Places in the grid, and signs, the lowest bit the first column's.
struct Named {
    int places[8];
    uint32_t signs;
};

// Four times seven bits of `word` as bytes, with an eighth that makes each one's bits even in number.
inline uint32_t even_signs(uint32_t word) {
    const uint32_t sevens = (word & 127) | (word & 127 << 7) << 1 | (word & 127 << 14) << 2 | (word & 127 << 21) << 3;
    uint32_t odd = sevens ^ sevens >> 4;
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return sevens | (odd & 0x01010101) << 7;
}
// Back, but for the top four bits.
inline uint32_t without_eighths(uint32_t bytes) {
    return (bytes & 127) | (bytes >> 1 & 127 << 7) | (bytes >> 2 & 127 << 14) | (bytes >> 3 & 127 << 21);
}

template <Format F>
struct GridBlock;

// COUNT places of a byte; seven of eight signs, in words that are APART bytes apart from byte WORDS on. On top of these is
// a scale, beside which the others are put.
template <int COUNT, int WORDS, int APART>
struct SevenSigns {
    static Named get(const uint8_t* row, int j) {
        Named n = {};
        for (int i = 0; i < COUNT; i++) n.places[i] = row[2 + 8 * j + i];
        uint32_t word;
        memcpy(&word, row + WORDS + APART * j, 4);
        n.signs = even_signs(word);
        return n;
    }
    static void put(uint8_t* row, int j, const Named& n) {
        for (int i = 0; i < COUNT; i++) row[2 + 8 * j + i] = uint8_t(n.places[i]);
        uint32_t word;
        memcpy(&word, row + WORDS + APART * j, 4);
        word |= without_eighths(n.signs);
        memcpy(row + WORDS + APART * j, &word, 4);
    }
};
template <>
struct GridBlock<Format::IQ2_XXS> : SevenSigns<4, 6, 8> {
    static constexpr const auto& GRID = tables.iq2_xxs;
};
template <>
struct GridBlock<Format::IQ3_XXS> : SevenSigns<8, 66, 4> {
    static constexpr const auto& GRID = tables.iq3_xxs;
};

// COUNT places of a byte and 8 / COUNT bits, which 32 columns have in a byte from byte 66 on; all signs, from SIGNS on.
template <int COUNT, int SIGNS>
struct HighBits {
    static constexpr int BITS = 8 / COUNT;
    static Named get(const uint8_t* row, int j) {
        Named n = {};
        for (int i = 0; i < COUNT; i++)
            n.places[i] = row[2 + COUNT * j + i] | (row[66 + j] >> BITS * i & ((1 << BITS) - 1)) << 8;
        memcpy(&n.signs, row + SIGNS + 4 * j, 4);
        return n;
    }
    static void put(uint8_t* row, int j, const Named& n) {
        row[66 + j] = 0;
        for (int i = 0; i < COUNT; i++) {
            row[2 + COUNT * j + i] = uint8_t(n.places[i]);
            row[66 + j] |= uint8_t(n.places[i] >> 8 << BITS * i);
        }
        memcpy(row + SIGNS + 4 * j, &n.signs, 4);
    }
};
template <>
struct GridBlock<Format::IQ2_S> : HighBits<4, 34> {
    static constexpr const auto& GRID = tables.iq2_s;
};
template <>
struct GridBlock<Format::IQ3_S> : HighBits<8, 74> {
    static constexpr const auto& GRID = tables.iq3_s;
};

// Places of nine bits and seven signs in one word.
template <>
struct GridBlock<Format::IQ2_XS> {
    static constexpr const auto& GRID = tables.iq2_xs;
    static Named get(const uint8_t* row, int j) {
        Named n = {};
        uint16_t words[4];
        memcpy(words, row + 2 + 8 * j, 8);
        uint32_t signs = 0;
        for (int i = 0; i < 4; i++) {
            n.places[i] = words[i] & 511;
            signs |= uint32_t(words[i] >> 9) << 7 * i;
        }
        n.signs = even_signs(signs);
        return n;
    }
    static void put(uint8_t* row, int j, const Named& n) {
        uint16_t words[4];
        for (int i = 0; i < 4; i++) words[i] = uint16_t(n.places[i] | (n.signs >> 8 * i & 127) << 9);
        memcpy(row + 2 + 8 * j, words, 8);
    }
};

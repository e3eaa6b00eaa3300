// A unit that multiplies matrices: AMX's; one of vectors that computes the same, by which all but a few instructions
// are tested on machines without it; and one of vectors that multiply pairs, for machines that have no better. Included
// inside an anonymous namespace.
//
// Tiles are of 1 KB. Of PAIRS: tokens [16][32 columns] and weights [16 pairs of columns][16 rows][2] of bfloat16, sums
// [16 tokens][16 rows] of float. Of CODES: tokens [16][64 columns] and weights [16 fours of columns][16 rows][4] of signed
// bytes, sums of int32. `multiply` adds to M by N tiles of sums, which lie as `at` says, the products of `depth` tiles of
// each of M times 16 tokens and N times 16 rows, which lie `a_stride` and `b_stride` bytes apart; `fresh` sums start as
// zeros. Every thread begins and ends what it does with the unit.

enum class Kind { PAIRS, CODES };

constexpr int64_t TILE = 1024;  // bytes
constexpr int64_t SUMS = 256;

// How many sums lie between those of one token and the next, of one tile and that of the next 16 rows, of the next 16
// tokens.
struct Spread {
    int64_t token, right, below;
};
constexpr Spread PACKED = {16, SUMS, 2 * SUMS};  // tile behind tile
inline Spread in_rows(int64_t width) { return {width, 16, 16 * width}; }

// Two columns of 16 rows as a tile of weights has them: from two vectors, one behind the other.
inline __m512i in_pairs(__m512i both) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}
inline void store_pairs(uint16_t* to, __m512i both) { _mm512_store_si512(to, in_pairs(both)); }
inline void store_pairs(uint16_t* to, Vec even, Vec odd) {
    store_pairs(to, (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v));
}
// 32 columns of a token.
inline void store_columns(uint16_t* to, Vec low, Vec high) {
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}

struct TileUnit {
    // All eight tiles alike, 16 rows of 64 bytes.
    struct alignas(64) Config {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static constexpr Config CONFIG = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

    // The whole configuration is an operand: the intrinsics of GCC 12 name eight bytes of it, and the rest may be lost.
    static void begin() { asm volatile("ldtilecfg %0" ::"m"(CONFIG)); }
    static void end() { asm volatile("tilerelease"); }

    template <int T>
    [[gnu::always_inline]] static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    [[gnu::always_inline]] static void load(const void* p, int64_t row = 64) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row), "i"(T) : "memory");
    }
    template <int T>
    [[gnu::always_inline]] static void store(void* p, int64_t row) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row), "i"(T) : "memory");
    }
    template <Kind K, int C, int A, int B>
    [[gnu::always_inline]] static void dot() {
        if constexpr (K == Kind::PAIRS)
            asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
        else
            asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }

    // Sums in tiles 0 to 3, tokens in 4 and 5, weights in 6 and 7.
    template <Kind K, int M, int N, class Sum>
    static void multiply(Sum* sums, Spread at, const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                         int64_t depth, bool fresh) {
        const int64_t row = at.token * int64_t(sizeof(Sum));
        if (fresh) {
            zero<0>();
            if constexpr (N > 1) zero<1>();
            if constexpr (M > 1) zero<2>();
            if constexpr (M > 1 && N > 1) zero<3>();
        } else {
            load<0>(sums, row);
            if constexpr (N > 1) load<1>(sums + at.right, row);
            if constexpr (M > 1) load<2>(sums + at.below, row);
            if constexpr (M > 1 && N > 1) load<3>(sums + at.below + at.right, row);
        }
        for (int64_t k = 0; k < depth; k++, a += TILE, b += TILE) {
            load<6>(b);
            load<4>(a);
            dot<K, 0, 4, 6>();
            if constexpr (N > 1) {
                load<7>(b + b_stride);
                dot<K, 1, 4, 7>();
            }
            if constexpr (M > 1) {
                load<5>(a + a_stride);
                dot<K, 2, 5, 6>();
            }
            if constexpr (M > 1 && N > 1) dot<K, 3, 5, 7>();
        }
        store<0>(sums, row);
        if constexpr (N > 1) store<1>(sums + at.right, row);
        if constexpr (M > 1) store<2>(sums + at.below, row);
        if constexpr (M > 1 && N > 1) store<3>(sums + at.below + at.right, row);
    }
};

// As the manual defines TDPBF16PS: even and odd columns of a tile are summed apart, each product fused with its addition,
// then both to the sum; numbers below the normal range are zeros. Sums of TDPBSSD are exact.
struct EmulatedUnit {
    static void begin() {}
    static void end() {}

    // Of 8 tokens with 16 rows.
    [[gnu::always_inline]] static void eight(float* sums, int64_t row, const uint8_t* a, const uint8_t* b) {
        __m512 even[8], odd[8];
        for (int t = 0; t < 8; t++) even[t] = odd[t] = _mm512_setzero_ps();
        for (int p = 0; p < 16; p++) {
            Vec w[2];
            split_bf16(load_codes(b + p * 64), w);
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++) {
                int32_t pair;
                memcpy(&pair, a + t * 64 + p * 4, 4);
                const __m512i two = _mm512_set1_epi32(pair);
                even[t] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), w[0].v, even[t]);
                odd[t] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(two, _mm512_set1_epi32(-65536))), w[1].v,
                                         odd[t]);
            }
        }
        for (int t = 0; t < 8; t++) {
            float* own = sums + t * row;
            _mm512_storeu_ps(own, _mm512_add_ps(_mm512_loadu_ps(own), _mm512_add_ps(even[t], odd[t])));
        }
    }

    // The vectors' instruction wants tokens without sign: they are 128 more, and so many times the weights is taken away.
    [[gnu::always_inline]] static void eight(int32_t* sums, int64_t row, const uint8_t* a, const uint8_t* b) {
        const __m512i more = _mm512_set1_epi8(-128);
        __m512i with[8], weights = _mm512_setzero_si512();
        for (int t = 0; t < 8; t++) with[t] = _mm512_loadu_si512(sums + t * row);
        for (int p = 0; p < 16; p++) {
            const __m512i w = _mm512_loadu_si512(b + p * 64);
            weights = _mm512_dpbusd_epi32(weights, more, w);
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++) {
                int32_t four;
                memcpy(&four, a + t * 64 + p * 4, 4);
                with[t] = _mm512_dpbusd_epi32(with[t], _mm512_xor_si512(_mm512_set1_epi32(four), more), w);
            }
        }
        for (int t = 0; t < 8; t++) _mm512_storeu_si512(sums + t * row, _mm512_sub_epi32(with[t], weights));
    }

    template <Kind K, int M, int N, class Sum>
    static void multiply(Sum* sums, Spread at, const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                         int64_t depth, bool fresh) {
        const unsigned before = _mm_getcsr();
        _mm_setcsr(before | _MM_FLUSH_ZERO_ON | 0x40);  // 0x40: operands below the normal range are zeros
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                Sum* own = sums + m * at.below + n * at.right;
                for (int t = 0; fresh && t < 16; t++) memset(own + t * at.token, 0, 16 * sizeof(Sum));
                for (int64_t k = 0; k < depth; k++)
                    for (int t = 0; t < 16; t += 8)
                        eight(own + t * at.token, at.token, a + m * a_stride + k * TILE + t * 64,
                              b + n * b_stride + k * TILE);
            }
        _mm_setcsr(before);
    }
};

// Each pair of products is added to its sum before the next.
struct PairsUnit {
    static void begin() {}
    static void end() {}

    // Of 8 tokens with N times 16 rows.
    template <int N>
    static void eight(float* sums, Spread at, const uint8_t* a, const uint8_t* b, int64_t b_stride, int64_t depth,
                      bool fresh) {
        Vec acc[8][N];
        for (int t = 0; t < 8; t++)
            for (int n = 0; n < N; n++) acc[t][n] = fresh ? zero() : load(sums + t * at.token + n * at.right);
        for (int64_t k = 0; k < depth; k++, a += TILE, b += TILE)
#pragma GCC unroll 2
            for (int p = 0; p < 16; p++) {
                Codes w[N];
                for (int n = 0; n < N; n++) w[n] = load_codes(b + n * b_stride + p * 64);
#pragma GCC unroll 8
                for (int t = 0; t < 8; t++)
                    for (int n = 0; n < N; n++)
                        acc[t][n] = dot_pairs(acc[t][n], w[n], reinterpret_cast<const uint16_t*>(a + t * 64 + p * 4));
            }
        for (int t = 0; t < 8; t++)
            for (int n = 0; n < N; n++) store(sums + t * at.token + n * at.right, acc[t][n]);
    }

    template <Kind K, int M, int N>
    static void multiply(float* sums, Spread at, const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                         int64_t depth, bool fresh) {
        static_assert(K == Kind::PAIRS);
        for (int m = 0; m < M; m++)
            for (int t = 0; t < 16; t += 8)
                eight<N>(sums + m * at.below + t * at.token, at, a + m * a_stride + t * 64, b, b_stride, depth, fresh);
    }
};

// `multiply` for as many of m and n as it takes at once: two of each.
template <class Unit, Kind K, class Sum>
inline void multiply_tiles(int64_t m, int64_t n, Sum* sums, Spread at, const uint8_t* a, int64_t a_stride, const uint8_t* b,
                           int64_t b_stride, int64_t depth, bool fresh) {
    const auto run = [&]<int M, int N>() {
        Unit::template multiply<K, M, N>(sums, at, a, a_stride, b, b_stride, depth, fresh);
    };
    if (m > 1)
        n > 1 ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
    else
        n > 1 ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
}

// Whether a unit computes what the other does: whole numbers, whose sums are exact in any order.
template <class Unit, class Other, Kind K, int M, int N>
bool agree() {
    constexpr int DEPTH = 3, SIZE = 2 * DEPTH * TILE;
    using Sum = std::conditional_t<K == Kind::PAIRS, float, int32_t>;
    alignas(64) uint8_t a[SIZE], b[SIZE];
    constexpr int64_t WIDTH = 48;
    alignas(64) Sum ours[32 * WIDTH] = {}, theirs[32 * WIDTH] = {};
    uint32_t state = 7;
    const auto fill = [&](uint8_t* numbers) {
        for (int i = 0; i < SIZE; i += 2) {
            state = state * 1664525 + 1013904223;
            const float small = float(int(state >> 27) - 16);
            uint32_t bits;
            memcpy(&bits, &small, 4);
            bits = K == Kind::PAIRS ? bits >> 16 : state >> 8;
            memcpy(numbers + i, &bits, 2);
        }
    };
    fill(a);
    fill(b);
    for (const bool fresh : {true, false}) {
        Unit::begin();
        Unit::template multiply<K, M, N>(ours, in_rows(WIDTH), a, DEPTH * TILE, b, DEPTH * TILE, DEPTH, fresh);
        Unit::end();
        Other::begin();
        Other::template multiply<K, M, N>(theirs, in_rows(WIDTH), a, DEPTH * TILE, b, DEPTH * TILE, DEPTH, fresh);
        Other::end();
    }
    return memcmp(ours, theirs, sizeof ours) == 0;
}

template <class Unit, class Other, Kind K>
bool agree() {
    return agree<Unit, Other, K, 2, 2>() && agree<Unit, Other, K, 2, 1>() && agree<Unit, Other, K, 1, 2>() &&
           agree<Unit, Other, K, 1, 1>();
}

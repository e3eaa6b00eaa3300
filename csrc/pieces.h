// Work cut into pieces for the pool, and whole numbers. Included inside an anonymous namespace.

// Runs f(begin, end) over pieces of [0, count) on the pool.
template <class F>
void parallel(Pool& pool, int64_t count, int64_t grain, const F& f) {
    pool.run(
        count, grain,
        [](const void* context, int64_t begin, int64_t end) {
            const F own = *static_cast<const F*>(context);  // which no store of a vector can change, for the compiler
            own(begin, end);
        },
        &f);
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Calls f with `count`, at most MOST, as a constant.
template <int MOST, class F>
inline void with_constant(int64_t count, const F& f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_constant<MOST - 1>(count, f);
    f.template operator()<MOST>();
}

// All kernels of one instruction set. Compiled once for each, with TRAMONTANE_<ISA> and its compiler flags.
//
// Everything but the final table has internal linkage, and no inline function of the standard library is called: the
// linker keeps one copy of such functions for the whole module, which must not be one that needs a newer processor.

#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)
#include <immintrin.h>
#endif

#include "scratch.h"
#include "tables.h"

#if defined(TRAMONTANE_AVX512)
#define ISA avx512
#define ISA_NAME "avx512"
#elif defined(TRAMONTANE_AVX2)
#define ISA avx2
#define ISA_NAME "avx2"
#else
#define ISA plain
#define ISA_NAME "plain"
#endif

namespace tramontane::ISA {
namespace {

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

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

#include "simd.h"
#include "blocks.h"
#include "codes.h"
#include "blocks_ggml.h"
#include "coded.h"
#include "matmul.inc"
#include "attention.inc"
#include "elementwise.inc"

}  // namespace

extern const Kernels kernels = {
    ISA_NAME,  matmul,    rows, matmul_coded, rows_coded, rms_norm,   layer_norm,       add,     add_gated,
    transform, rope,      write_cache,        attention,  activation, gated_activation, combine, log_softmax,
    argmax,    softmax_weights,
};

}  // namespace tramontane::ISA

// All kernels of one instruction set. Compiled once for each, with TRAMONTANE_<ISA> and its compiler flags.
//
// Everything but the final table has internal linkage, and no inline function of the standard library is called: the
// linker keeps one copy of such functions for the whole module, which must not be one that needs a newer processor.

#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)
#include <immintrin.h>
#elif defined(TRAMONTANE_NEON)
#include <arm_neon.h>
#endif

#include "scratch.h"

#if defined(TRAMONTANE_AVX512)
#define ISA avx512
#define ISA_NAME "avx512"
#elif defined(TRAMONTANE_AVX2)
#define ISA avx2
#define ISA_NAME "avx2"
#elif defined(TRAMONTANE_NEON)
#define ISA neon
#define ISA_NAME "neon"
#else
#define ISA plain
#define ISA_NAME "plain"
#endif

namespace tramontane::ISA {
namespace {

#include "pieces.h"
#include "simd.h"
#include "blocks.h"
#include "matmul.inc"
#include "attention.inc"
#include "elementwise.inc"

}  // namespace

extern const Kernels kernels = {
    ISA_NAME,  matmul,    rows, rms_norm,    layer_norm, add,        add_gated,
    transform, rope, write_cache, attention,   activation, gated_activation, combine, log_softmax,
    argmax,    softmax_weights,
};

}  // namespace tramontane::ISA

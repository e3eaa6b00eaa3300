// The kernels of one instruction set, but for those of attention.cpp and tiles.cpp. Compiled once for each, with
// TRAMONTANE_<ISA> and its compiler flags.
//
// Everything but the final table has internal linkage, and no inline function of the standard library is called: the
// linker keeps one copy of such functions for the whole module, which must not be one that needs a newer processor.

#include "kernels.h"

#include <math.h>
#include <string.h>

#include "isa.h"
#include "scratch.h"

namespace tramontane::ISA {
namespace {

#include "pieces.h"
#include "simd.h"
#include "blocks.h"
#include "matmul.inc"
#include "elementwise.inc"

}  // namespace

extern const Kernels kernels = {
    ISA_NAME, matmul, rows, rms_norm, layer_norm, add, add_gated, transform, rope, activation, gated_activation, combine,
    log_softmax, argmax, softmax_weights,
};

}  // namespace tramontane::ISA

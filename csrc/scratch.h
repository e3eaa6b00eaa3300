// Memory that a thread keeps from op to op for intermediate values.
#pragma once

#include <cstdint>

namespace tramontane {

enum class Scratch { CALL, PIECE, COUNT };  // of the op that a thread called, and of the piece of one that it computes

// At least `count` floats, aligned to 64 bytes, with any values; the same memory until a larger count is asked for.
float* scratch(Scratch kind, int64_t count);

}  // namespace tramontane

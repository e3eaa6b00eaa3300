// Memory that a thread keeps from op to op for intermediate values.
#pragma once

#include <cstdint>

namespace tramontane {

// Of the op that a thread called; of the piece of one that it computes, and its panel.
enum class Scratch { CALL, PIECE, PANEL, COUNT };

// At least `count` floats, aligned to 64 bytes, with any values; the same memory until a larger count is asked for.
float* scratch(Scratch kind, int64_t count);

}  // namespace tramontane

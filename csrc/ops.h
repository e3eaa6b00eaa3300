// What the ops share that Python calls: checks, the interpreter's lock, and what they compute with.
// This header and those of the ops are included by module.cpp alone.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "dispatch.h"
#include "kernels.h"
#include "plan.h"
#include "pool.h"

namespace tramontane {

using nanobind::handle;

// Lets other Python threads run while an op computes, unless it is over sooner than they could be woken: a thread that
// gives the lock away may wait milliseconds to get it back.
class Unlocked {
   public:
    static constexpr int64_t WORTH_IT = 1 << 16;  // elements touched

    explicit Unlocked(int64_t work) {
        if (work >= WORTH_IT) release_.emplace();
    }

   private:
    std::optional<nanobind::gil_scoped_release> release_;
};

// What a `Cpu` computes with.
struct Device {
    Pool pool;
    const InstructionSet& set;
    Arithmetic arithmetic;

    // Runs what an op computes once its arguments are checked, and keeps it where a plan is recorded: so `f` holds all
    // that it needs, and checks values itself.
    template <class F>
    void compute(int64_t work, F f) {
        if (Plan* plan = Plan::recording()) plan->add(f);
        const Unlocked unlocked(work);
        f();
    }
};

constexpr int64_t ANY = Array::ANY;

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// The place of a name among `names`.
template <class Kind, size_t N>
Kind kind_of(const char* name, const char* const (&names)[N], const char* what) {
    for (size_t i = 0; i < N; i++)
        if (strcmp(names[i], name) == 0) return static_cast<Kind>(i);
    throw std::invalid_argument(std::string(what) + " " + name + " is unknown");
}
// The elements of an optional array.
inline const float* floats_or_null(handle array, const char* name, std::initializer_list<int64_t> shape) {
    return array.is_none() ? nullptr : Array(array, name, FLOAT32, shape).data<const float>();
}

}  // namespace tramontane

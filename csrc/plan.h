// A list of ops that have been asked for once, to be computed again. Included by ops.h alone.
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace tramontane {

// What a thread's ops compute, in their order, with their arguments checked: addresses and sizes are those of the first
// time, values are read anew. It keeps the arrays alive that it points to.
class Plan {
   public:
    ~Plan() { end(); }

    // The plan that this thread's ops are added to; null: none.
    static Plan*& recording() {
        thread_local Plan* plan = nullptr;
        return plan;
    }

    // Something is computed that no plan can hold.
    static void spoil() {
        if (Plan* plan = recording()) plan->whole_ = false;
    }

    void begin() {
        if (recording()) throw std::invalid_argument("this thread records a plan already");
        recording() = this;
    }

    // Whether all that was computed since `begin` is in the plan.
    bool end() {
        if (recording() == this) recording() = nullptr;
        return whole_;
    }

    // The next `add` belongs to the op of this name. Of its arguments the objects are kept.
    template <class... A>
    void enter(const char* name, const A&... arguments) {
        name_ = name;
        (keep(arguments), ...);
    }

    void add(std::function<void()> computation) { ops_.push_back({name_, std::move(computation)}); }

    // Throws std::invalid_argument where ids or lengths are now out of bounds.
    void run() {
        const nanobind::gil_scoped_release release;
        for (const Op& op : ops_) {
            try {
                op.compute();
            } catch (const std::invalid_argument& error) {
                throw std::invalid_argument(std::string(op.name) + ": " + error.what());
            }
        }
    }

    size_t size() const { return ops_.size(); }

   private:
    struct Op {
        const char* name;
        std::function<void()> compute;
    };

    template <class T>
    void keep(const T& argument) {
        if constexpr (std::is_base_of_v<nanobind::handle, T>)
            kept_.push_back(nanobind::borrow<nanobind::object>(argument));
    }

    const char* name_ = "";
    std::vector<Op> ops_;
    std::vector<nanobind::object> kept_;
    bool whole_ = true;
};

}  // namespace tramontane

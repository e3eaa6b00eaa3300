// The Python module: the ops of kernels/base.py over numpy arrays. Each checks its arguments, lets the interpreter lock
// go where that pays, and calls the kernels.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "choices.h"
#include "dispatch.h"
#include "layers.h"
#include "products.h"
#include "tables.h"
#include "texts.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tramontane {
namespace {

// The ops of one pool and one instruction set.
struct Cpu {
    Cpu(int threads, const std::string& isa, bool exact, bool deterministic)
        : device{Pool(threads), instruction_set(isa),
                 exact ? Arithmetic::EXACT : deterministic ? Arithmetic::UNIFORM : Arithmetic::FAST} {}

    Device device;
    Products products{device};
    Layers layers{device};
    Choices choices{device};
};

// Binds an op of a part; what is wrong with its arguments becomes a ValueError that names it. Where a plan is recorded,
// it gets the name and keeps the arguments.
template <class Part, class... A, class... Names>
void define(nb::class_<Cpu>& cls, const char* name, Part Cpu::* part, void (Part::*op)(A...), const Names&... names) {
    const auto call = [name, part, op](Cpu& cpu, A... arguments) {
        if (Plan* plan = Plan::recording()) plan->enter(name, nb::find(cpu), arguments...);
        try {
            (cpu.*part.*op)(arguments...);
        } catch (const std::invalid_argument& error) {
            throw std::invalid_argument(std::string(name) + ": " + error.what());
        }
    };
    cls.def(name, call, names...);
}

}  // namespace

NB_MODULE(_native, m) {
    // A program may end with an answer still open on a daemon thread, which then holds our objects: no leak to report.
    nb::set_leak_warnings(false);
    import_numpy();
    m.def("instruction_sets", &instruction_sets, "emulated"_a = false);
    m.def("instruction_set_trouble", &instruction_set_trouble);
    m.def("set_table", [](const char* name, handle values_) {
        const Array values(values_, "values", FLOAT32, {});
        if (!set_table(name, values.data<const float>(), values.size()))
            throw std::invalid_argument(std::string("table ") + name + " is unknown, or of another size");
    });
    m.def("read_strings", &read_strings, "data"_a, "at"_a, "end"_a, "count"_a, "width"_a);
    nb::class_<Plan>(m, "Plan")
        .def(nb::init<>())
        .def("begin", &Plan::begin)
        .def("end", &Plan::end)
        .def("run", &Plan::run)
        .def("__len__", &Plan::size);
    m.def("spoil", &Plan::spoil);
    nb::class_<Cpu> cpu(m, "Cpu");
    cpu.def(nb::init<int, const std::string&, bool, bool>(), "threads"_a, "isa"_a = "", "exact"_a = false,
            "deterministic"_a = false);
    cpu.def_prop_ro("isa", [](const Cpu& cpu) { return std::string(cpu.device.set.name); });
    cpu.def("pin", [](Cpu& cpu, std::vector<int> processors) { cpu.device.pool.pin(std::move(processors)); });
    cpu.def_prop_ro("turns", [](const Cpu& cpu) { return cpu.device.pool.turns(); });
    const auto binder = [&](auto part) {
        return [&cpu, part](const char* name, auto op, const auto&... names) { define(cpu, name, part, op, names...); };
    };
    const auto products = binder(&Cpu::products);
    const auto layers = binder(&Cpu::layers);
    const auto choices = binder(&Cpu::choices);
    products("matmul", &Products::matmul, "out"_a, "x"_a, "weight"_a, "bias"_a.none());
    products("matmul_blocks", &Products::matmul_blocks, "out"_a, "x"_a, "blocks"_a, "format"_a, "bias"_a.none());
    products("matmul_together", &Products::matmul_together, "outs"_a, "x"_a, "weights"_a, "format"_a, "biases"_a);
    m.def("tiles_shape", &Products::tiles_shape, "format"_a, "rows"_a, "columns"_a);
    products("pack", &Products::pack, "tiles"_a, "stored"_a, "format"_a);
    products("pack_all", &Products::pack_all, "matrices"_a);
    products("unpack", &Products::unpack, "stored"_a, "tiles"_a, "format"_a);
    products("pack_codes", &Products::pack_codes, "tiles"_a, "codes"_a, "bits"_a);
    products("unpack_codes", &Products::unpack_codes, "codes"_a, "tiles"_a, "bits"_a);
    products("rows", &Products::rows);
    products("rows_blocks", &Products::rows_blocks);
    products("matmul_coded", &Products::matmul_coded, "out"_a, "x"_a, "bias"_a.none(), "codes"_a, "table"_a, "scales"_a,
             "scale_table"_a.none(), "zeros"_a.none(), "offsets"_a.none(), "order"_a.none(), "bits"_a, "group"_a,
             "row_block"_a, "factor"_a);
    products("rows_coded", &Products::rows_coded, "out"_a, "ids"_a, "codes"_a, "table"_a, "scales"_a,
             "scale_table"_a.none(), "zeros"_a.none(), "offsets"_a.none(), "order"_a.none(), "bits"_a, "group"_a,
             "row_block"_a, "factor"_a);
    products("matmul_experts", &Products::matmul_experts, "out"_a, "x"_a, "offsets"_a.none(), "weights"_a, "format"_a,
             "bias"_a.none());
    layers("rms_norm", &Layers::rms_norm, "out"_a, "x"_a, "weight"_a.none(), "eps"_a);
    layers("layer_norm", &Layers::layer_norm, "out"_a, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);
    layers("add", &Layers::add);
    layers("add_gated", &Layers::add_gated);
    layers("multiply", &Layers::multiply);
    layers("scale", &Layers::scale);
    layers("clip", &Layers::clip);
    layers("softcap", &Layers::softcap);
    layers("shift", &Layers::shift);
    layers("place", &Layers::place);
    layers("swap", &Layers::swap);
    layers("copy", &Layers::copy);
    layers("rope_angles", &Layers::rope_angles);
    layers("rope", &Layers::rope);
    layers("write_cache", &Layers::write_cache);
    layers("read_cache", &Layers::read_cache);
    layers("copy_blocks", &Layers::copy_blocks);
    layers("attention", &Layers::attention, "out"_a, "q"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a, "query_start"_a,
           "context_lens"_a, "scale"_a, "window"_a, "causal"_a, "softcap"_a, "sinks"_a.none(), "slopes"_a.none(),
           "latent"_a, "totals"_a.none(), "joins"_a);
    layers("activation", &Layers::activation);
    layers("gated_activation", &Layers::gated_activation);
    choices("route", &Choices::route, "weights"_a, "experts"_a, "logits"_a, "correction"_a.none(), "score"_a,
            "normalize"_a, "scale"_a, "groups"_a, "top_groups"_a, "group_score"_a, "jitter"_a);
    choices("group_rows", &Choices::group_rows);
    choices("combine", &Choices::combine);
    choices("take_rows", &Choices::take_rows);
    choices("apply_edits", &Choices::apply_edits);
    choices("mask", &Choices::mask);
    choices("log_softmax", &Choices::log_softmax);
    choices("sample", &Choices::sample, "tokens"_a, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
            "uniform"_a, "typical_p"_a.none(), "xtc_threshold"_a.none());
}

}  // namespace tramontane

// The Python module: checks arguments, lets the interpreter lock go where that pays, and calls the kernels.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "dispatch.h"
#include "kernels.h"
#include "pool.h"
#include "sampling.h"
#include "simple.h"
#include "tables.h"

namespace nb = nanobind;
using nb::handle;
using namespace nb::literals;

namespace tramontane {
namespace {

// Lets other Python threads run while an op computes, unless it is over sooner than they could be woken: a thread that
// gives the lock away may wait milliseconds to get it back.
class Unlocked {
   public:
    static constexpr int64_t WORTH_IT = 1 << 16;  // elements touched

    explicit Unlocked(int64_t work) {
        if (work >= WORTH_IT) release_.emplace();
    }

   private:
    std::optional<nb::gil_scoped_release> release_;
};

constexpr int64_t ANY = Array::ANY;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

struct BlockFormat {
    const char* name;
    Format format;
    int64_t elements;
};
constexpr BlockFormat BLOCK_FORMATS[] = {
#define BLOCK_FORMAT(name, elements, bytes) {#name, Format::name, elements},
    TRAMONTANE_BLOCK_FORMATS(BLOCK_FORMAT)
#undef BLOCK_FORMAT
};

// The format of that name, for rows of `columns` elements.
Format block_format(const char* name, int64_t columns) {
    for (const BlockFormat& f : BLOCK_FORMATS) {
        if (strcmp(f.name, name) != 0) continue;
        if (columns % f.elements)
            throw std::invalid_argument("rows of " + std::to_string(columns) + " elements do not divide into " + name +
                                        " blocks of " + std::to_string(f.elements));
        return f.format;
    }
    throw std::invalid_argument(std::string("format ") + name + " is unknown");
}

Activation activation(const char* name) {
    constexpr const char* NAMES[] = {"silu", "gelu", "gelu_tanh", "relu"};
    for (int i = 0; i < 4; i++)
        if (strcmp(NAMES[i], name) == 0) return static_cast<Activation>(i);
    throw std::invalid_argument(std::string("kind ") + name + " is unknown");
}

// The ops of one pool and one instruction set; see kernels/base.py for what each does.
class Cpu {
   public:
    Cpu(int threads, const std::string& isa) : pool_(threads), kernels_(kernels_for(isa)) {}

    std::string isa() const { return kernels_.name; }

    void matmul(handle out_, handle x_, handle weight_, handle bias_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), weight(weight_, "weight", FLOATS, {ANY, x[1]});
        multiply(out_, x, weight.data<const uint8_t>(), weight[0], weight.format(), bias_);
    }

    void matmul_blocks(handle out_, handle x_, handle blocks_, const char* name, handle bias_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY});
        const Format format = block_format(name, x[1]);
        const Array blocks(blocks_, "blocks", UINT8, {ANY, row_bytes(format, x[1])});
        multiply(out_, x, blocks.data<const uint8_t>(), blocks[0], format, bias_);
    }

    void rows(handle out_, handle ids_, handle weight_) {
        const Array weight(weight_, "weight", FLOATS, {ANY, ANY});
        take(out_, ids_, weight.data<const uint8_t>(), weight[0], weight[1], weight.format());
    }

    void rows_blocks(handle out_, handle ids_, handle blocks_, const char* name) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY}, true);
        const Format format = block_format(name, out[1]);
        const Array blocks(blocks_, "blocks", UINT8, {ANY, row_bytes(format, out[1])});
        take(out_, ids_, blocks.data<const uint8_t>(), blocks[0], out[1], format);
    }

    void matmul_coded(handle out_, handle x_, handle bias_, handle codes_, handle table_, handle scales_,
                      handle scale_table_, handle zeros_, handle offsets_, handle order_, int bits, int64_t group,
                      int64_t row_block, float factor) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY});
        const Coded weight = coded(codes_, table_, scales_, scale_table_, zeros_, offsets_, order_, bits, x[1], group,
                                   row_block, factor);
        const Array out(out_, "out", FLOAT32, {x[0], weight.rows}, true);
        const float* bias = nullptr;
        if (!bias_.is_none()) bias = Array(bias_, "bias", FLOAT32, {weight.rows}).data<const float>();
        if (out.size() == 0) return;
        const Unlocked unlocked(out.size() * x[1]);
        kernels_.matmul_coded(pool_, {out.data<float>(), x.data<const float>(), bias, x[0], weight});
    }

    void rows_coded(handle out_, handle ids_, handle codes_, handle table_, handle scales_, handle scale_table_,
                    handle zeros_, handle offsets_, handle order_, int bits, int64_t group, int64_t row_block,
                    float factor) {
        const Array ids(ids_, "ids", INT32, {ANY}), out(out_, "out", FLOAT32, {ids[0], ANY}, true);
        const Coded weight = coded(codes_, table_, scales_, scale_table_, zeros_, offsets_, order_, bits, out[1],
                                   group, row_block, factor);
        check_ids(ids, "ids", weight.rows);
        if (out.size() == 0) return;
        const Unlocked unlocked(out.size());
        kernels_.rows_coded(pool_, {out.data<float>(), ids.data<const int32_t>(), ids[0], weight});
    }

    void rms_norm(handle out_, handle x_, handle weight_, float eps) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), out(out_, "out", FLOAT32, {x[0], x[1]}, true);
        const Array weight(weight_, "weight", FLOAT32, {x[1]});
        if (x.size() == 0) return;
        const Unlocked unlocked(x.size());
        kernels_.rms_norm(pool_, out.data<float>(), x.data<const float>(), weight.data<const float>(), x[0], x[1], eps);
    }

    void add(handle out_, handle x_) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        const Unlocked unlocked(out.size());
        kernels_.add(pool_, out.data<float>(), x.data<const float>(), out.size());
    }

    void rope_angles(handle cos_, handle sin_, handle positions_, handle inv_freq_, float scale) {
        const Array positions(positions_, "positions", INT32, {ANY}), inv_freq(inv_freq_, "inv_freq", FLOAT32, {ANY});
        const Array cos(cos_, "cos", FLOAT32, {positions[0], inv_freq[0]}, true);
        const Array sin(sin_, "sin", FLOAT32, {positions[0], inv_freq[0]}, true);
        const Unlocked unlocked(cos.size() * 32);
        tramontane::rope_angles(cos.data<float>(), sin.data<float>(), positions.data<const int32_t>(),
                                inv_freq.data<const float>(), positions[0], inv_freq[0], scale);
    }

    void rope(handle x_, handle cos_, handle sin_, bool interleaved) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY, ANY}, true), cos(cos_, "cos", FLOAT32, {x[0], ANY});
        const Array sin(sin_, "sin", FLOAT32, {x[0], cos[1]});
        require(2 * cos[1] <= x[2], "cos has more than half a head's elements");
        if (x.size() == 0) return;
        const Unlocked unlocked(x.size());
        kernels_.rope(pool_, x.data<float>(), cos.data<const float>(), sin.data<const float>(), x[0], x[1], x[2],
                      cos[1], interleaved);
    }

    void write_cache(handle k_cache_, handle v_cache_, handle k_, handle v_, handle slots_) {
        const Array k(k_, "k", FLOAT32, {ANY, ANY, ANY}), v(v_, "v", FLOAT32, {k[0], k[1], k[2]});
        const Array k_cache(k_cache_, "k_cache", FLOATS, {ANY, k[1], ANY, k[2]}, true);
        const Array v_cache(v_cache_, "v_cache", bit(k_cache.dtype()), {k_cache[0], k[1], k_cache[2], k[2]}, true);
        const Array slots(slots_, "slots", INT32, {k[0]});
        check_ids(slots, "slots", k_cache[0] * k_cache[2]);
        if (k.size() == 0) return;
        const Unlocked unlocked(k.size());
        kernels_.write_cache(pool_, {k_cache.data<uint8_t>(), v_cache.data<uint8_t>(), k.data<const float>(),
                                     v.data<const float>(), slots.data<const int32_t>(), k[0], k[1], k[2], k_cache[2],
                                     k_cache.format()});
    }

    void copy_blocks(handle cache_, handle source_, handle target_) {
        const Array cache(cache_, "cache", FLOATS, {ANY, ANY, ANY, ANY}, true);
        const Array source(source_, "source", INT32, {ANY}), target(target_, "target", INT32, {source[0]});
        check_ids(source, "source", cache[0]);
        check_ids(target, "target", cache[0]);
        const int64_t bytes = row_bytes(cache.format(), cache[1] * cache[2] * cache[3]);
        const Unlocked unlocked(source[0] * bytes);
        tramontane::copy_blocks(cache.data<uint8_t>(), source.data<const int32_t>(), target.data<const int32_t>(),
                                source[0], bytes);
    }

    void attention(handle out_, handle q_, handle k_cache_, handle v_cache_, handle tables_, handle query_start_,
                   handle context_lens_, float scale, int64_t window) {
        const Array q(q_, "q", FLOAT32, {ANY, ANY, ANY}), out(out_, "out", FLOAT32, {q[0], q[1], q[2]}, true);
        const Array k_cache(k_cache_, "k_cache", FLOATS, {ANY, ANY, ANY, q[2]});
        const Array v_cache(v_cache_, "v_cache", bit(k_cache.dtype()), {k_cache[0], k_cache[1], k_cache[2], q[2]});
        const Array context_lens(context_lens_, "context_lens", INT32, {ANY});
        const Array tables(tables_, "block_tables", INT32, {context_lens[0], ANY});
        const Array query_start(query_start_, "query_start", INT32, {context_lens[0] + 1});
        const Attention a = {out.data<float>(),         q.data<const float>(),
                             k_cache.data<uint8_t>(),   v_cache.data<uint8_t>(),
                             tables.data<int32_t>(),    query_start.data<int32_t>(),
                             context_lens.data<int32_t>(), context_lens[0], tables[1],
                             q[1], k_cache[1], q[2], k_cache[2], window, scale, k_cache.format()};
        require(a.kv_heads > 0 && a.q_heads % a.kv_heads == 0, "query heads must be a multiple of key-value heads");
        require(window >= 0, "window must not be negative");
        const int64_t work = check_sequences(a, q[0], k_cache[0]);
        if (q.size() == 0) return;
        const Unlocked unlocked(work);
        kernels_.attention(pool_, a);
    }

    void gated_activation(handle out_, handle gate_, handle up_, const char* kind) {
        const Array out(out_, "out", FLOAT32, {}, true), gate(gate_, "gate", FLOAT32, {}), up(up_, "up", FLOAT32, {});
        require(out.same_shape(gate) && out.same_shape(up), "out, gate and up must have the same shape");
        const Activation activation = tramontane::activation(kind);
        const Unlocked unlocked(out.size());
        kernels_.gated_activation(pool_, out.data<float>(), gate.data<const float>(), up.data<const float>(),
                                  out.size(), activation);
    }

    void take_rows(handle out_, handle x_, handle rows_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), rows(rows_, "rows", INT32, {ANY});
        const Array out(out_, "out", FLOAT32, {rows[0], x[1]}, true);
        check_ids(rows, "rows", x[0]);
        tramontane::take_rows(out.data<float>(), x.data<const float>(), rows.data<const int32_t>(), rows[0], x[1]);
    }

    void apply_edits(handle logits_, handle rows_, handle ids_, handle penalties_, handle biases_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY}, true), rows(rows_, "rows", INT32, {ANY});
        const Array ids(ids_, "ids", INT32, {rows[0]}), penalties(penalties_, "penalties", FLOAT32, {rows[0]});
        const Array biases(biases_, "biases", FLOAT32, {rows[0]});
        check_ids(rows, "rows", logits[0]);
        check_ids(ids, "ids", logits[1]);
        tramontane::apply_edits(logits.data<float>(), logits[1], rows.data<const int32_t>(), ids.data<const int32_t>(),
                                penalties.data<const float>(), biases.data<const float>(), rows[0]);
    }

    void log_softmax(handle out_, handle logits_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY});
        const Array out(out_, "out", FLOAT32, {logits[0], logits[1]}, true);
        if (logits.size() == 0) return;
        const Unlocked unlocked(logits.size());
        kernels_.log_softmax(pool_, out.data<float>(), logits.data<const float>(), logits[0], logits[1]);
    }

    void sample(handle tokens_, handle logits_, handle temperature_, handle top_k_, handle top_p_, handle min_p_,
                handle uniform_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY}), tokens(tokens_, "tokens", INT32, {logits[0]}, true);
        const Array temperature(temperature_, "temperature", FLOAT32, {logits[0]});
        const Array top_k(top_k_, "top_k", INT32, {logits[0]}), top_p(top_p_, "top_p", FLOAT32, {logits[0]});
        const Array min_p(min_p_, "min_p", FLOAT32, {logits[0]}), uniform(uniform_, "uniform", FLOAT32, {logits[0]});
        if (logits[0] == 0) return;
        require(logits[1] > 0, "logits must have columns");
        struct Call {
            const Kernels& kernels;
            const Array &tokens, &logits, &temperature, &top_k, &top_p, &min_p, &uniform;
        } const call{kernels_, tokens, logits, temperature, top_k, top_p, min_p, uniform};
        const Unlocked unlocked(logits.size());
        pool_.run(
            logits[0], 1,
            [](const void* context, int64_t begin, int64_t end) {
                const Call& c = *static_cast<const Call*>(context);
                for (int64_t r = begin; r < end; r++) {
                    const Sampling how = {c.temperature.data<float>()[r], c.top_k.data<int32_t>()[r],
                                          c.top_p.data<float>()[r], c.min_p.data<float>()[r],
                                          c.uniform.data<float>()[r]};
                    const float* row = c.logits.data<const float>() + r * c.logits[1];
                    c.tokens.data<int32_t>()[r] = tramontane::sample(c.kernels, row, c.logits[1], how);
                }
            },
            &call);
    }

   private:
    static Number number(const Array& grid) {
        switch (grid.dtype()) {
            case DType::FLOAT16: return Number::F16;
            case DType::BFLOAT16: return Number::BF16;
            case DType::UINT8: return Number::U8;
            default: return Number::F32;
        }
    }

    // The coded matrix of these arrays, checked to be one of rows of `columns`.
    static Coded coded(handle codes_, handle table_, handle scales_, handle scale_table_, handle zeros_,
                       handle offsets_, handle order_, int bits, int64_t columns, int64_t group, int64_t row_block,
                       float factor) {
        require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
        require(group >= 1 && row_block >= 1 && columns >= 1, "group, row_block and columns must be positive");
        const int64_t groups = (columns - 1) / group + 1;
        const Array codes(codes_, "codes", UINT8, {ANY, ANY}), table(table_, "table", FLOAT32, {int64_t{1} << bits});
        require(codes[1] >= (columns * bits + 7) / 8, "codes are too few bytes for x");
        const bool looked_up = !scale_table_.is_none();
        const Array scales(scales_, "scales", looked_up ? UINT8 : FLOATS, {ANY, groups});
        require(scales[0] >= 1, "scales must have rows");
        Coded m = {};
        m.codes = codes.data<const uint8_t>();
        m.table = table.data<const float>();
        m.scales = scales.data<const uint8_t>();
        m.scale_type = number(scales);
        if (looked_up) m.scale_table = Array(scale_table_, "scale_table", FLOAT32, {256}).data<const float>();
        if (!zeros_.is_none()) {
            const Array zeros(zeros_, "zeros", FLOATS | UINT8, {scales[0], groups});
            m.zeros = zeros.data<const uint8_t>();
            m.zero_type = number(zeros);
        }
        if (!offsets_.is_none()) {
            const Array offsets(offsets_, "offsets", FLOATS, {scales[0], groups});
            m.offsets = offsets.data<const uint8_t>();
            m.offset_type = number(offsets);
        }
        if (!order_.is_none()) {
            const Array order(order_, "order", INT32, {columns});
            check_ids(order, "order", columns);
            m.order = order.data<const int32_t>();
        }
        m.rows = codes[0];
        m.row_bytes = codes[1];
        m.columns = columns;
        m.lines = scales[0];
        m.groups = groups;
        m.group = group;
        m.row_block = row_block;
        m.factor = factor;
        m.bits = bits;
        return m;
    }

    void multiply(handle out_, const Array& x, const uint8_t* weight, int64_t outputs, Format format, handle bias_) {
        const Array out(out_, "out", FLOAT32, {x[0], outputs}, true);
        const float* bias = nullptr;
        if (!bias_.is_none()) bias = Array(bias_, "bias", FLOAT32, {outputs}).data<const float>();
        if (out.size() == 0) return;
        require(x[1] > 0, "x must have columns");
        const Unlocked unlocked(out.size() * x[1]);
        kernels_.matmul(pool_, {out.data<float>(), x.data<const float>(), weight, bias, x[0], outputs, x[1], format});
    }

    void take(handle out_, handle ids_, const uint8_t* weight, int64_t count, int64_t columns, Format format) {
        const Array ids(ids_, "ids", INT32, {ANY}), out(out_, "out", FLOAT32, {ids[0], columns}, true);
        check_ids(ids, "ids", count);
        if (out.size() == 0) return;
        const Unlocked unlocked(out.size());
        kernels_.rows(pool_, {out.data<float>(), ids.data<const int32_t>(), weight, ids[0], columns, format});
    }

    // Proves that a step reads only blocks that exist; returns the products to compute.
    static int64_t check_sequences(const Attention& a, int64_t tokens, int64_t blocks) {
        int64_t work = 0;
        require(a.query_start[0] == 0 && a.query_start[a.sequences] == tokens, "query_start must span the tokens of q");
        for (int64_t s = 0; s < a.sequences; s++) {
            const int64_t queries = a.query_start[s + 1] - a.query_start[s], context = a.context_lens[s];
            require(queries >= 0, "query_start must not descend");
            require(context >= queries, "context_lens must count the tokens of this step");
            require((context + a.block_size - 1) / a.block_size <= a.table_size, "block_tables are too short");
            if (queries == 0) continue;
            const int64_t lowest = a.window ? context - queries - a.window + 1 : 0;
            for (int64_t b = lowest > 0 ? lowest / a.block_size : 0; b * a.block_size < context; b++) {
                const int32_t id = a.tables[s * a.table_size + b];
                if (id < 0 || id >= blocks)
                    throw std::invalid_argument("block_tables hold " + std::to_string(id) + ", outside [0, " +
                                                std::to_string(blocks) + ")");
            }
            work += queries * context * a.q_heads * a.head_size;
        }
        return work;
    }

    Pool pool_;
    const Kernels& kernels_;
};

// Binds an op; what is wrong with its arguments becomes a ValueError that names it.
template <class... A, class... Names>
void define(nb::class_<Cpu>& cls, const char* name, void (Cpu::*op)(A...), const Names&... names) {
    const auto call = [name, op](Cpu& cpu, A... arguments) {
        try {
            (cpu.*op)(arguments...);
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
    m.def("instruction_sets", &instruction_sets);
    m.def("set_table", [](const char* name, handle values_) {
        const Array values(values_, "values", FLOAT32, {});
        if (!set_table(name, values.data<const float>(), values.size()))
            throw std::invalid_argument(std::string("table ") + name + " is unknown, or of another size");
    });
    nb::class_<Cpu> cpu(m, "Cpu");
    cpu.def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("isa") = "");
    cpu.def_prop_ro("isa", &Cpu::isa);
    define(cpu, "matmul", &Cpu::matmul, "out"_a, "x"_a, "weight"_a, "bias"_a.none());
    define(cpu, "matmul_blocks", &Cpu::matmul_blocks, "out"_a, "x"_a, "blocks"_a, "format"_a, "bias"_a.none());
    define(cpu, "rows", &Cpu::rows);
    define(cpu, "rows_blocks", &Cpu::rows_blocks);
    define(cpu, "matmul_coded", &Cpu::matmul_coded, "out"_a, "x"_a, "bias"_a.none(), "codes"_a, "table"_a, "scales"_a,
           "scale_table"_a.none(), "zeros"_a.none(), "offsets"_a.none(), "order"_a.none(), "bits"_a, "group"_a,
           "row_block"_a, "factor"_a);
    define(cpu, "rows_coded", &Cpu::rows_coded, "out"_a, "ids"_a, "codes"_a, "table"_a, "scales"_a,
           "scale_table"_a.none(), "zeros"_a.none(), "offsets"_a.none(), "order"_a.none(), "bits"_a, "group"_a,
           "row_block"_a, "factor"_a);
    define(cpu, "rms_norm", &Cpu::rms_norm);
    define(cpu, "add", &Cpu::add);
    define(cpu, "rope_angles", &Cpu::rope_angles);
    define(cpu, "rope", &Cpu::rope);
    define(cpu, "write_cache", &Cpu::write_cache);
    define(cpu, "copy_blocks", &Cpu::copy_blocks);
    define(cpu, "attention", &Cpu::attention);
    define(cpu, "gated_activation", &Cpu::gated_activation);
    define(cpu, "take_rows", &Cpu::take_rows);
    define(cpu, "apply_edits", &Cpu::apply_edits);
    define(cpu, "log_softmax", &Cpu::log_softmax);
    define(cpu, "sample", &Cpu::sample);
}

}  // namespace tramontane

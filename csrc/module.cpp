// The Python module: checks arguments, lets the interpreter lock go where that pays, and calls the kernels.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "dispatch.h"
#include "kernels.h"
#include "pool.h"
#include "routing.h"
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

// The place of a name among `names`.
template <class Kind, size_t N>
Kind kind_of(const char* name, const char* const (&names)[N], const char* what) {
    for (size_t i = 0; i < N; i++)
        if (strcmp(names[i], name) == 0) return static_cast<Kind>(i);
    throw std::invalid_argument(std::string(what) + " " + name + " is unknown");
}
constexpr const char* SCORES[] = {"softmax", "sigmoid", "sparsemixer"};
constexpr const char* GROUP_SCORES[] = {"max", "top2"};

const float* floats_or_null(handle array, const char* name, std::initializer_list<int64_t> shape) {
    return array.is_none() ? nullptr : Array(array, name, FLOAT32, shape).data<const float>();
}

// Adds a product of any number of tokens to a list, cut where it must be.
void add_product(std::vector<Matmul>& list, Matmul m, int64_t outputs, int64_t inputs) {
    for (int64_t left = m.tokens; left > 0; left -= TOKEN_BLOCK) {
        m.tokens = left < TOKEN_BLOCK ? left : TOKEN_BLOCK;
        list.push_back(m);
        m.out += m.tokens * outputs;
        m.x += m.tokens * inputs;
    }
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
        const float* bias = floats_or_null(bias_, "bias", {weight.rows});
        if (out.size() == 0) return;
        std::vector<Matmul> list;
        add_product(list, {out.data<float>(), x.data<const float>(), nullptr, bias, x[0]}, weight.rows, x[1]);
        const Unlocked unlocked(out.size() * x[1]);
        kernels_.matmul_coded(pool_, {list.data(), ssize(list), weight.rows, x[1], Format::F32}, weight);
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

    // Rows of x that are grouped by matrix: those from offsets[e] to offsets[e + 1] meet the e-th.
    void matmul_experts(handle out_, handle x_, handle offsets_, nb::tuple weights, const char* name, handle bias_) {
        const int64_t count = static_cast<int64_t>(weights.size());
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), out(out_, "out", FLOAT32, {x[0], ANY}, true);
        const Array offsets(offsets_, "offsets", INT32, {count + 1});
        const float* bias = floats_or_null(bias_, "bias", {count, out[1]});
        const bool dense = !*name;
        require(x[1] > 0, "x must have columns");
        Format format = dense ? Format::F32 : block_format(name, x[1]);
        unsigned types = dense ? FLOATS : UINT8;
        std::vector<Matmul> list;
        for (int64_t e = 0; e < count; e++) {
            const int64_t start = offsets.data<const int32_t>()[e], stop = offsets.data<const int32_t>()[e + 1];
            require(0 <= start && start <= stop && stop <= x[0], "offsets must ascend within the rows of x");
            if (start == stop) continue;
            const nb::object weight_ = weights[e];
            const Array weight(weight_, "weights", types, {out[1], dense ? x[1] : row_bytes(format, x[1])});
            if (dense) {
                format = weight.format();
                types = bit(weight.dtype());
            }
            add_product(list,
                        {out.data<float>() + start * out[1], x.data<const float>() + start * x[1],
                         weight.data<const uint8_t>(), bias ? bias + e * out[1] : nullptr, stop - start},
                        out[1], x[1]);
        }
        if (out.size() == 0) return;
        const Unlocked unlocked(out.size() * x[1]);
        kernels_.matmul(pool_, {list.data(), ssize(list), out[1], x[1], format});
    }

    void rms_norm(handle out_, handle x_, handle weight_, float eps) {
        normalize(kernels_.rms_norm, out_, x_, weight_, nb::none(), eps);
    }

    void layer_norm(handle out_, handle x_, handle weight_, handle bias_, float eps) {
        normalize(kernels_.layer_norm, out_, x_, weight_, bias_, eps);
    }

    void add(handle out_, handle x_, float factor) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        const Unlocked unlocked(out.size());
        kernels_.add(pool_, out.data<float>(), x.data<const float>(), out.size(), factor);
    }

    void add_gated(handle out_, handle x_, handle gate_) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY}, true), x(x_, "x", FLOAT32, {out[0], out[1]});
        const Array gate(gate_, "gate", FLOAT32, {out[0], 1});
        if (out.size() == 0) return;
        const Unlocked unlocked(out.size());
        kernels_.add_gated(pool_, out.data<float>(), x.data<const float>(), gate.data<const float>(), out[0], out[1]);
    }

    void scale(handle x_, float factor) { transform(x_, Transform::SCALE, factor); }

    void clip(handle x_, float limit) { transform(x_, Transform::CLIP, limit); }

    void softcap(handle x_, float cap) { transform(x_, Transform::SOFTCAP, cap); }

    void place(handle out_, handle x_, int64_t to, int64_t start, int64_t width) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY, ANY}, true), x(x_, "x", FLOAT32, {out[0], ANY, ANY});
        require(x[1] == 1 || x[1] == out[1], "x must have one head or as many as out");
        require(width >= 0 && to >= 0 && to <= out[2] - width && start >= 0 && start <= x[2] - width,
                "the elements must lie within the heads of x and out");
        const Unlocked unlocked(out[0] * out[1] * width);
        tramontane::place(out.data<float>() + to, out[2], x.data<const float>() + start, x[2], out[0], out[1], x[1],
                          width);
    }

    void copy(handle out_, handle x_) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        const Unlocked unlocked(out.size());
        memcpy(out.data<float>(), x.data<const float>(), out.size() * sizeof(float));
    }

    void rope_angles(handle cos_, handle sin_, handle positions_, handle inv_freq_, float scale) {
        const Array positions(positions_, "positions", INT32, {ANY}), cos(cos_, "cos", FLOAT32, {positions[0], ANY}, true);
        const Array sin(sin_, "sin", FLOAT32, {positions[0], cos[1]}, true), inv_freq(inv_freq_, "inv_freq", FLOAT32, {});
        const bool by_row = inv_freq.rank() == 2;
        if (by_row)
            inv_freq.expect("inv_freq", {positions[0], cos[1]});
        else
            inv_freq.expect("inv_freq", {cos[1]});
        const Unlocked unlocked(cos.size() * 32);
        tramontane::rope_angles(cos.data<float>(), sin.data<float>(), positions.data<const int32_t>(),
                                inv_freq.data<const float>(), by_row ? cos[1] : 0, positions[0], cos[1], scale);
    }

    void rope(handle x_, handle cos_, handle sin_, bool interleaved, int64_t offset) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY, ANY}, true), cos(cos_, "cos", FLOAT32, {x[0], ANY});
        const Array sin(sin_, "sin", FLOAT32, {x[0], cos[1]});
        require(offset >= 0 && offset <= x[2] - 2 * cos[1], "the elements from offset on must lie within the heads of x");
        if (x.size() == 0) return;
        const Unlocked unlocked(x.size());
        kernels_.rope(pool_, x.data<float>() + offset, cos.data<const float>(), sin.data<const float>(), x[0], x[1],
                      x[2], cos[1], interleaved);
    }

    void write_cache(handle k_cache_, handle v_cache_, handle k_, handle v_, handle slots_) {
        const Array k(k_, "k", FLOAT32, {ANY, ANY, ANY}), v(v_, "v", FLOAT32, {k[0], k[1], ANY});
        const Array k_cache(k_cache_, "k_cache", FLOATS, {ANY, k[1], ANY, k[2]}, true);
        const Array v_cache(v_cache_, "v_cache", bit(k_cache.dtype()), {k_cache[0], k[1], k_cache[2], v[2]}, true);
        const Array slots(slots_, "slots", INT32, {k[0]});
        check_ids(slots, "slots", k_cache[0] * k_cache[2]);
        const Unlocked unlocked(k.size() + v.size());
        for (const auto& [cache, x] : {std::pair{&k_cache, &k}, {&v_cache, &v}}) {
            if (x->size() == 0) continue;
            kernels_.write_cache(pool_, {cache->data<uint8_t>(), x->data<const float>(), slots.data<const int32_t>(),
                                         (*x)[0], (*x)[1], (*x)[2], (*cache)[2], cache->format()});
        }
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
                   handle context_lens_, float scale, int64_t window, bool causal, float softcap, handle sinks_,
                   handle slopes_) {
        const Array q(q_, "q", FLOAT32, {ANY, ANY, ANY}), out(out_, "out", FLOAT32, {q[0], q[1], ANY}, true);
        const Array k_cache(k_cache_, "k_cache", FLOATS, {ANY, ANY, ANY, q[2]});
        const Array v_cache(v_cache_, "v_cache", bit(k_cache.dtype()), {k_cache[0], k_cache[1], k_cache[2], out[2]});
        const Array context_lens(context_lens_, "context_lens", INT32, {ANY});
        const Array tables(tables_, "block_tables", INT32, {context_lens[0], ANY});
        const Array query_start(query_start_, "query_start", INT32, {context_lens[0] + 1});
        const Attention a = {
            .out = out.data<float>(),
            .q = q.data<const float>(),
            .k_cache = k_cache.data<const uint8_t>(),
            .v_cache = v_cache.data<const uint8_t>(),
            .tables = tables.data<const int32_t>(),
            .query_start = query_start.data<const int32_t>(),
            .context_lens = context_lens.data<const int32_t>(),
            .sequences = context_lens[0],
            .table_size = tables[1],
            .q_heads = q[1],
            .kv_heads = k_cache[1],
            .head_size = q[2],
            .value_size = out[2],
            .block_size = k_cache[2],
            .format = k_cache.format(),
            .scale = scale,
            .window = window,
            .causal = causal,
            .softcap = softcap,
            .sinks = floats_or_null(sinks_, "sinks", {q[1]}),
            .slopes = floats_or_null(slopes_, "slopes", {q[1]}),
        };
        require(a.kv_heads > 0 && a.q_heads % a.kv_heads == 0, "query heads must be a multiple of key-value heads");
        require(a.block_size > 0, "k_cache must have places in its blocks");
        require(window >= 0, "window must not be negative");
        require(causal || !a.slopes, "slopes go with causal attention");
        const int64_t work = check_sequences(a, q[0], k_cache[0]);
        if (out.size() == 0) return;
        require(q[2] > 0, "q must have elements");
        const Unlocked unlocked(work);
        kernels_.attention(pool_, a);
    }

    void activation(handle out_, handle x_, const char* kind) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        const Activation activation = kind_of<Activation>(kind, ACTIVATIONS, "kind");
        const Unlocked unlocked(out.size());
        kernels_.activation(pool_, out.data<float>(), x.data<const float>(), out.size(), activation);
    }

    void gated_activation(handle out_, handle gate_, handle up_, const char* kind, float limit) {
        const Array out(out_, "out", FLOAT32, {}, true), gate(gate_, "gate", FLOAT32, {}), up(up_, "up", FLOAT32, {});
        require(out.same_shape(gate) && out.same_shape(up), "out, gate and up must have the same shape");
        const bool clamped = strcmp(kind, "swiglu_clamped") == 0;
        const Activation activation = clamped ? Activation::SILU : kind_of<Activation>(kind, ACTIVATIONS, "kind");
        const Unlocked unlocked(out.size());
        kernels_.gated_activation(pool_, {out.data<float>(), gate.data<const float>(), up.data<const float>(),
                                          out.size(), activation, clamped, limit});
    }

    void route(handle weights_, handle experts_, handle logits_, handle correction_, const char* score, bool normalize,
               float scale, int64_t groups, int64_t top_groups, const char* group_score, float jitter) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY});
        const Array weights(weights_, "weights", FLOAT32, {logits[0], ANY}, true);
        const Array experts(experts_, "experts", INT32, {logits[0], weights[1]}, true);
        const bool best_two = kind_of<int>(group_score, GROUP_SCORES, "group_score") == 1;
        const Routing r = {weights.data<float>(), experts.data<int32_t>(), logits.data<const float>(),
                           floats_or_null(correction_, "correction", {logits[1]}), weights[1], logits[1], groups,
                           top_groups, kind_of<Score>(score, SCORES, "score"), normalize, best_two, scale, jitter};
        require(0 < top_groups && top_groups <= groups && r.count % groups == 0, "groups must divide the experts");
        require(!best_two || r.count / groups >= 2, "groups must have two experts");
        require(r.chosen <= r.count / groups * top_groups, "experts must be fewer than are to choose from");
        require(r.score != Score::SPARSEMIXER || (r.chosen == 2 && groups == 1), "sparsemixer chooses 2, without groups");
        struct Call {
            const Kernels& kernels;
            const Routing& routing;
        } const call{kernels_, r};
        const Unlocked unlocked(logits.size());
        pool_.run(
            logits[0], r.count < ROUTED ? ROUTED / (r.count + 1) : 1,
            [](const void* context, int64_t begin, int64_t end) {
                const Call& c = *static_cast<const Call*>(context);
                for (int64_t t = begin; t < end; t++) tramontane::route(c.kernels, c.routing, t);
            },
            &call);
    }

    void group_rows(handle rows_, handle slots_, handle offsets_, handle experts_) {
        const Array experts(experts_, "experts", INT32, {ANY, ANY}), rows(rows_, "rows", INT32, {experts.size()}, true);
        const Array slots(slots_, "slots", INT32, {experts[0], experts[1]}, true);
        const Array offsets(offsets_, "offsets", INT32, {ANY}, true);
        require(offsets[0] > 0, "offsets must have one place more than there are experts");
        check_ids(experts, "experts", offsets[0] - 1);
        tramontane::group_rows(rows.data<int32_t>(), slots.data<int32_t>(), offsets.data<int32_t>(),
                               experts.data<const int32_t>(), experts.size(), experts[1], offsets[0] - 1);
    }

    void combine(handle out_, handle x_, handle slots_, handle weights_) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY}, true), x(x_, "x", FLOAT32, {ANY, out[1]});
        const Array slots(slots_, "slots", INT32, {out[0], ANY});
        const Array weights(weights_, "weights", FLOAT32, {out[0], slots[1]});
        check_ids(slots, "slots", x[0]);
        if (out.size() == 0) return;
        const Unlocked unlocked(x.size());
        kernels_.combine(pool_, out.data<float>(), x.data<const float>(), slots.data<const int32_t>(),
                         weights.data<const float>(), out[0], slots[1], out[1]);
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
        const float* bias = floats_or_null(bias_, "bias", {outputs});
        if (out.size() == 0) return;
        require(x[1] > 0, "x must have columns");
        std::vector<Matmul> list;
        add_product(list, {out.data<float>(), x.data<const float>(), weight, bias, x[0]}, outputs, x[1]);
        const Unlocked unlocked(out.size() * x[1]);
        kernels_.matmul(pool_, {list.data(), ssize(list), outputs, x[1], format});
    }

    void normalize(void (*kernel)(Pool&, const Norm&), handle out_, handle x_, handle weight_, handle bias_, float eps) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), out(out_, "out", FLOAT32, {x[0], x[1]}, true);
        Norm n = {out.data<float>(), x.data<const float>(), nullptr, nullptr, x[0], x[1], 1, eps};
        const auto rows_of = [&](handle array, const char* name) {
            const Array weight(array, name, FLOAT32, {});
            const int64_t repeat = weight.rank() == 2 ? weight[0] : 1;
            if (weight.rank() == 2)
                weight.expect(name, {ANY, x[1]});
            else
                weight.expect(name, {x[1]});
            require(repeat > 0 && x[0] % repeat == 0, "the rows of x must repeat those of weight and bias");
            n.repeat = repeat;
            return weight.data<const float>();
        };
        if (!weight_.is_none()) n.weight = rows_of(weight_, "weight");
        const int64_t repeat = n.repeat;
        if (!bias_.is_none()) n.bias = rows_of(bias_, "bias");
        require(!n.weight || repeat == n.repeat, "weight and bias must have the same shape");
        if (x.size() == 0) return;
        const Unlocked unlocked(x.size());
        kernel(pool_, n);
    }

    void transform(handle x_, Transform kind, float number) {
        const Array x(x_, "x", FLOAT32, {}, true);
        const Unlocked unlocked(x.size());
        kernels_.transform(pool_, x.data<float>(), x.size(), kind, number);
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

    template <class T>
    static int64_t ssize(const std::vector<T>& list) {
        return static_cast<int64_t>(list.size());
    }

    static constexpr int64_t ROUTED = 4096;  // logits of tokens worth another thread

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
    define(cpu, "matmul_experts", &Cpu::matmul_experts, "out"_a, "x"_a, "offsets"_a, "weights"_a, "format"_a,
           "bias"_a.none());
    define(cpu, "rms_norm", &Cpu::rms_norm, "out"_a, "x"_a, "weight"_a.none(), "eps"_a);
    define(cpu, "layer_norm", &Cpu::layer_norm, "out"_a, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);
    define(cpu, "add", &Cpu::add);
    define(cpu, "add_gated", &Cpu::add_gated);
    define(cpu, "scale", &Cpu::scale);
    define(cpu, "clip", &Cpu::clip);
    define(cpu, "softcap", &Cpu::softcap);
    define(cpu, "place", &Cpu::place);
    define(cpu, "copy", &Cpu::copy);
    define(cpu, "rope_angles", &Cpu::rope_angles);
    define(cpu, "rope", &Cpu::rope);
    define(cpu, "write_cache", &Cpu::write_cache);
    define(cpu, "copy_blocks", &Cpu::copy_blocks);
    define(cpu, "attention", &Cpu::attention, "out"_a, "q"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a,
           "query_start"_a, "context_lens"_a, "scale"_a, "window"_a, "causal"_a, "softcap"_a, "sinks"_a.none(),
           "slopes"_a.none());
    define(cpu, "activation", &Cpu::activation);
    define(cpu, "gated_activation", &Cpu::gated_activation);
    define(cpu, "route", &Cpu::route, "weights"_a, "experts"_a, "logits"_a, "correction"_a.none(), "score"_a,
           "normalize"_a, "scale"_a, "groups"_a, "top_groups"_a, "group_score"_a, "jitter"_a);
    define(cpu, "group_rows", &Cpu::group_rows);
    define(cpu, "combine", &Cpu::combine);
    define(cpu, "take_rows", &Cpu::take_rows);
    define(cpu, "apply_edits", &Cpu::apply_edits);
    define(cpu, "log_softmax", &Cpu::log_softmax);
    define(cpu, "sample", &Cpu::sample);
}

}  // namespace tramontane

// What layers do besides products, as Python calls it; see kernels/base.py for what each op does.
#pragma once

#include <utility>

#include "ops.h"
#include "simple.h"

namespace tramontane {

class Layers {
   public:
    explicit Layers(Device& device)
        : device_(device), pool_(device.pool), kernels_(device.set.kernels), cache_(device.set.cache) {}

    void rms_norm(handle out_, handle x_, handle weight_, float eps) {
        normalize(kernels_.rms_norm, out_, x_, weight_, nanobind::none(), eps);
    }

    void layer_norm(handle out_, handle x_, handle weight_, handle bias_, float eps) {
        normalize(kernels_.layer_norm, out_, x_, weight_, bias_, eps);
    }

    void add(handle out_, handle x_, float factor) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        device_.compute(out.size(), [=, this] {
            kernels_.add(pool_, out.data<float>(), x.data<const float>(), out.size(), factor);
        });
    }

    void add_gated(handle out_, handle x_, handle gate_) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY}, true), x(x_, "x", FLOAT32, {out[0], out[1]});
        const Array gate(gate_, "gate", FLOAT32, {out[0], 1});
        if (out.size() == 0) return;
        device_.compute(out.size(), [=, this] {
            kernels_.add_gated(pool_, out.data<float>(), x.data<const float>(), gate.data<const float>(), out[0],
                               out[1]);
        });
    }

    void multiply(handle out_, handle x_) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        device_.compute(out.size(), [=] {
            tramontane::multiply(out.data<float>(), x.data<const float>(), out.size());
        });
    }

    void scale(handle x_, float factor) { transform(x_, Transform::SCALE, factor); }

    void clip(handle x_, float limit) { transform(x_, Transform::CLIP, limit); }

    void softcap(handle x_, float cap) { transform(x_, Transform::SOFTCAP, cap); }

    void shift(handle x_, handle by_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}, true), by(by_, "by", FLOAT32, {x[1]});
        device_.compute(x.size(), [=] {
            tramontane::shift(x.data<float>(), by.data<const float>(), x[0], x[1]);
        });
    }

    void place(handle out_, handle x_, int64_t to, int64_t start, int64_t width) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY, ANY}, true), x(x_, "x", FLOAT32, {out[0], ANY, ANY});
        require(x[1] == 1 || x[1] == out[1], "x must have one head or as many as out");
        require(width >= 0 && to >= 0 && to <= out[2] - width && start >= 0 && start <= x[2] - width,
                "the elements must lie within the heads of x and out");
        device_.compute(out[0] * out[1] * width, [=] {
            tramontane::place(out.data<float>() + to, out[2], x.data<const float>() + start, x[2], out[0], out[1], x[1],
                              width);
        });
    }

    void swap(handle out_, handle x_, int64_t to, int64_t start, int64_t width) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY, ANY}, true), x(x_, "x", FLOAT32, {out[1], out[0], ANY});
        require(width >= 0 && to >= 0 && to <= out[2] - width && start >= 0 && start <= x[2] - width,
                "the elements must lie within the heads of x and out");
        device_.compute(out[0] * out[1] * width, [=] {
            tramontane::swap(out.data<float>() + to, out[2], x.data<const float>() + start, x[2], x[0], x[1], width);
        });
    }

    void copy(handle out_, handle x_) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        device_.compute(out.size(), [=] {
            memcpy(out.data<float>(), x.data<const float>(), out.size() * sizeof(float));
        });
    }

    void rope_angles(handle cos_, handle sin_, handle positions_, handle inv_freq_, float scale) {
        const Array positions(positions_, "positions", INT32, {ANY}), inv_freq(inv_freq_, "inv_freq", FLOAT32, {});
        const Array cos(cos_, "cos", FLOAT32, {positions[0], ANY}, true);
        const Array sin(sin_, "sin", FLOAT32, {positions[0], cos[1]}, true);
        const bool by_row = inv_freq.rank() == 2;
        if (by_row)
            inv_freq.expect("inv_freq", {positions[0], cos[1]});
        else
            inv_freq.expect("inv_freq", {cos[1]});
        device_.compute(cos.size() * 32, [=] {
            tramontane::rope_angles(cos.data<float>(), sin.data<float>(), positions.data<const int32_t>(),
                                    inv_freq.data<const float>(), by_row ? cos[1] : 0, positions[0], cos[1], scale);
        });
    }

    void rope(handle x_, handle cos_, handle sin_, bool interleaved, int64_t offset) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY, ANY}, true), cos(cos_, "cos", FLOAT32, {x[0], ANY});
        const Array sin(sin_, "sin", FLOAT32, {x[0], cos[1]});
        require(offset >= 0 && offset <= x[2] - 2 * cos[1], "elements from offset on must lie within the heads of x");
        if (x.size() == 0) return;
        device_.compute(x.size(), [=, this] {
            kernels_.rope(pool_, x.data<float>() + offset, cos.data<const float>(), sin.data<const float>(), x[0], x[1],
                          x[2], cos[1], interleaved);
        });
    }

    void write_cache(handle k_cache_, handle v_cache_, handle k_, handle v_, handle slots_) {
        const Array k(k_, "k", FLOAT32, {ANY, ANY, ANY}), v(v_, "v", FLOAT32, {k[0], k[1], ANY});
        const Array k_cache(k_cache_, "k_cache", CELLS, {}, true), v_cache(v_cache_, "v_cache", CELLS, {}, true);
        check_caches(k_cache, v_cache, k[1], k[2], v[2]);
        const Array slots(slots_, "slots", INT32, {k[0]});
        device_.compute(k.size() + v.size(), [=, this] {
            check_ids(slots, "slots", k_cache[0] * k_cache[3]);
            for (const auto& [cache, x] : {std::pair{&k_cache, &k}, {&v_cache, &v}}) {
                if (x->size() == 0) continue;
                cache_.write(pool_, {cache->data<uint8_t>(), x->data<const float>(), slots.data<const int32_t>(), (*x)[0],
                                     (*x)[1], (*x)[2], k_cache[3], cache->cache_format(), cache == &k_cache});
            }
        });
    }

    void read_cache(handle k_, handle v_, handle k_cache_, handle v_cache_, handle table_, int64_t first) {
        const Array k(k_, "k", FLOAT32, {ANY, ANY, ANY}, true), v(v_, "v", FLOAT32, {k[0], k[1], ANY}, true);
        const Array k_cache(k_cache_, "k_cache", CELLS, {}), v_cache(v_cache_, "v_cache", CELLS, {});
        check_caches(k_cache, v_cache, k[1], k[2], v[2]);
        const Array table(table_, "table", INT32, {ANY});
        const int64_t size = k_cache[3], tokens = k[0], blocks = k_cache[0];
        require(size > 0 && first >= 0 && (first + tokens + size - 1) / size <= table[0], "table is too short");
        device_.compute(k.size() + v.size(), [=, this] {
            for (int64_t i = first / size; i * size < first + tokens; i++) {
                const int32_t id = table.data<const int32_t>()[i];
                require(id >= 0 && id < blocks, "table must name blocks of the cache");
            }
            for (const auto& [cache, x] : {std::pair{&k_cache, &k}, {&v_cache, &v}})
                if (x->size() > 0)
                    cache_.read(pool_, {x->data<float>(), cache->data<const uint8_t>(), table.data<const int32_t>(),
                                        first, tokens, (*x)[1], (*x)[2], size, cache->cache_format(),
                                        cache == &k_cache});
        });
    }

    void copy_blocks(handle cache_, handle source_, handle target_) {
        const Array cache(cache_, "cache", CELLS, {ANY, ANY, ANY, ANY}, true);
        const Array source(source_, "source", INT32, {ANY}), target(target_, "target", INT32, {source[0]});
        const int64_t bytes = cell_bytes(cache.cache_format()) * cache[1] * cache[2] * cache[3];
        device_.compute(source[0] * bytes, [=] {
            check_ids(source, "source", cache[0]);
            check_ids(target, "target", cache[0]);
            tramontane::copy_blocks(cache.data<uint8_t>(), source.data<const int32_t>(), target.data<const int32_t>(),
                                    source[0], bytes);
        });
    }

    void attention(handle out_, handle q_, handle k_cache_, handle v_cache_, handle tables_, handle query_start_,
                   handle context_lens_, float scale, int64_t window, bool causal, float softcap, handle sinks_,
                   handle slopes_, bool latent, handle totals_, bool joins) {
        const Array q(q_, "q", FLOAT32, {ANY, ANY, ANY}), out(out_, "out", FLOAT32, {q[0], q[1], ANY}, true);
        const Array k_cache(k_cache_, "k_cache", CELLS, {}), v_cache(v_cache_, "v_cache", CELLS, {});
        check_caches(k_cache, v_cache, ANY, latent ? out[2] : q[2], latent ? q[2] - out[2] : out[2]);
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
            .block_size = k_cache[3],
            .format = k_cache.cache_format(),
            .scale = scale,
            .window = window,
            .causal = causal,
            .softcap = softcap,
            .sinks = floats_or_null(sinks_, "sinks", {q[1]}),
            .slopes = floats_or_null(slopes_, "slopes", {q[1]}),
            .latent = latent,
            .totals = totals_.is_none() ? nullptr
                                        : Array(totals_, "totals", FLOAT32, {q[0], q[1]}, true).data<float>(),
            .joins = joins,
        };
        require(a.kv_heads > 0 && a.q_heads % a.kv_heads == 0, "query heads must be a multiple of key-value heads");
        require(a.block_size > 0, "k_cache must have places in its blocks");
        require(window >= 0, "window must not be negative");
        require(causal || !a.slopes, "slopes go with causal attention");
        require(!joins || a.totals, "what is joined has totals");
        require(!joins || !a.sinks, "sinks are joined once: in the first call");
        require(out.size() == 0 || q[2] > 0, "q must have elements");
        const int64_t longest = a.table_size * a.block_size, tokens = q[0], blocks = k_cache[0];
        device_.compute(q.size() * longest, [=, this] {
            check_sequences(a, tokens, blocks);
            if (tokens * a.q_heads * a.value_size > 0) cache_.attention(pool_, a, device_.arithmetic);
        });
    }

    void activation(handle out_, handle x_, const char* kind) {
        const Array out(out_, "out", FLOAT32, {}, true), x(x_, "x", FLOAT32, {});
        require(out.same_shape(x), "out and x must have the same shape");
        const Activation activation = kind_of<Activation>(kind, ACTIVATIONS, "kind");
        device_.compute(out.size(), [=, this] {
            kernels_.activation(pool_, out.data<float>(), x.data<const float>(), out.size(), activation);
        });
    }

    void gated_activation(handle out_, handle gate_, handle up_, const char* kind, float limit) {
        const Array out(out_, "out", FLOAT32, {}, true), gate(gate_, "gate", FLOAT32, {}), up(up_, "up", FLOAT32, {});
        require(out.same_shape(gate) && out.same_shape(up), "out, gate and up must have the same shape");
        const bool clamped = strcmp(kind, "swiglu_clamped") == 0;
        const Activation activation = clamped ? Activation::SILU : kind_of<Activation>(kind, ACTIVATIONS, "kind");
        device_.compute(out.size(), [=, this] {
            kernels_.gated_activation(pool_, {out.data<float>(), gate.data<const float>(), up.data<const float>(),
                                              out.size(), activation, clamped, limit});
        });
    }

   private:
    void normalize(void (*kernel)(Pool&, const Norm&), handle out_, handle x_, handle weight_, handle bias_,
                   float eps) {
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
        device_.compute(x.size(), [=, this] { kernel(pool_, n); });
    }

    void transform(handle x_, Transform kind, float number) {
        const Array x(x_, "x", FLOAT32, {}, true);
        device_.compute(x.size(), [=, this] {
            kernels_.transform(pool_, x.data<float>(), x.size(), kind, number);
        });
    }

    // Holds keys [blocks, heads, key_size, block_size] and values [blocks, heads, block_size, value_size] to each other.
    static void check_caches(const Array& keys, const Array& values, int64_t heads, int64_t key_size, int64_t value_size) {
        const CacheFormat format = keys.cache_format();
        keys.expect("k_cache", {ANY, heads, cells_of(format, key_size), ANY});
        values.expect("v_cache", {keys[0], keys[1], keys[3], cells_of(format, value_size)});
        require(keys.dtype() == values.dtype(), "k_cache and v_cache must have the same dtype");
    }

    // Proves that a step reads only blocks that exist.
    static void check_sequences(const Attention& a, int64_t tokens, int64_t blocks) {
        require(a.query_start[0] == 0 && a.query_start[a.sequences] == tokens, "query_start must span the tokens of q");
        for (int64_t s = 0; s < a.sequences; s++) {
            const int64_t queries = a.query_start[s + 1] - a.query_start[s], context = a.context_lens[s];
            require(queries >= 0, "query_start must not descend");
            require(context >= queries || (!a.causal && !a.window), "context_lens must count the tokens of this step");
            require((context + a.block_size - 1) / a.block_size <= a.table_size, "block_tables are too short");
            if (queries == 0) continue;
            const int64_t lowest = a.window ? context - queries - a.window + 1 : 0;
            for (int64_t b = lowest > 0 ? lowest / a.block_size : 0; b * a.block_size < context; b++) {
                const int32_t id = a.tables[s * a.table_size + b];
                if (id < 0 || id >= blocks)
                    throw std::invalid_argument("block_tables hold " + std::to_string(id) + ", outside [0, " +
                                                std::to_string(blocks) + ")");
            }
        }
    }

    Device& device_;
    Pool& pool_;
    const Kernels& kernels_;
    const CacheKernels& cache_;
};

}  // namespace tramontane

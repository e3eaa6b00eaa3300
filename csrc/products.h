// Products with matrices and lookups of their rows, as Python calls them; see kernels/base.py for what each does.
#pragma once

#include <vector>

#include "ops.h"
#include "tiles.h"

namespace tramontane {

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
inline Format block_format(const char* name, int64_t columns) {
    for (const BlockFormat& f : BLOCK_FORMATS) {
        if (strcmp(f.name, name) != 0) continue;
        if (columns % f.elements)
            throw std::invalid_argument("rows of " + std::to_string(columns) + " elements do not divide into " + name +
                                        " blocks of " + std::to_string(f.elements));
        return f.format;
    }
    throw std::invalid_argument(std::string("format ") + name + " is unknown");
}

// Elements and bytes of a block of the format of that name.
inline UnitSize block_size(const char* name) {
    for (const BlockFormat& f : BLOCK_FORMATS)
        if (strcmp(f.name, name) == 0) return {f.elements, row_bytes(f.format, f.elements)};
    throw std::invalid_argument(std::string("format ") + name + " is unknown");
}

// Adds a product of any number of tokens to a list, cut where it must be.
inline void add_product(std::vector<Matmul>& list, Matmul m, int64_t outputs, int64_t inputs) {
    for (int64_t left = m.tokens; left > 0; left -= TOKEN_BLOCK) {
        m.tokens = left < TOKEN_BLOCK ? left : TOKEN_BLOCK;
        list.push_back(m);
        m.out += m.tokens * outputs;
        m.x += m.tokens * inputs;
    }
}

class Products {
   public:
    explicit Products(Device& device)
        : device_(device),
          pool_(device.pool),
          kernels_(device.set.kernels),
          tiles_(device.set.tiles),
          arithmetic_(device.arithmetic) {}

    void matmul(handle out_, handle x_, handle weight_, handle bias_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), out(out_, "out", FLOAT32, {x[0], ANY}, true);
        multiply(out, x, stored(weight_, "weight", nullptr, out[1], x[1]), bias_);
    }

    void matmul_blocks(handle out_, handle x_, handle blocks_, const char* name, handle bias_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), out(out_, "out", FLOAT32, {x[0], ANY}, true);
        multiply(out, x, stored(blocks_, "blocks", name, out[1], x[1]), bias_);
    }

    // One x by several matrices: what tokens are laid out as serves them all, and so does one turn of the pool.
    void matmul_together(nanobind::tuple outs, handle x_, nanobind::tuple weights, const char* name,
                         nanobind::tuple biases) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY});
        require(outs.size() > 0 && outs.size() == weights.size() && outs.size() == biases.size(),
                "outs, weights and biases must be as many");
        require(x[1] > 0, "x must have columns");
        const int64_t tokens = x[0], inputs = x[1];
        const float* rows = x.data<const float>();
        std::vector<Part> parts;
        std::optional<Stored> first;
        int64_t work = 0;
        for (size_t i = 0; i < outs.size(); i++) {
            const nanobind::object out_ = outs[i], weight_ = weights[i], bias_ = biases[i];
            const Array out(out_, "outs", FLOAT32, {tokens, ANY}, true);
            const Stored weight = stored(weight_, "weights", *name ? name : nullptr, out[1], inputs);
            if (!first) first = weight;
            require(weight.format == first->format && weight.tiled == first->tiled, "weights must be stored alike");
            parts.push_back({out.data<float>(), weight.data, floats_or_null(bias_, "biases", {out[1]}), out[1]});
            work += out.size() * inputs;
        }
        if (work == 0) return;
        device_.compute(work, [=, this, parts = std::move(parts)] {
            if (first->tiled && tokens <= tiles_.together) return run_together(parts, rows, tokens, inputs, first->format);
            for (const Part& p : parts) {
                std::vector<Matmul> list;
                add_product(list, {p.out, rows, p.weight, p.bias, tokens}, p.outputs, inputs);
                if (p.outputs > 0) run(*first, list, p.outputs, inputs);
            }
        });
    }

    void rows(handle out_, handle ids_, handle weight_) { take(out_, ids_, weight_, "weight", nullptr); }

    void rows_blocks(handle out_, handle ids_, handle blocks_, const char* name) {
        take(out_, ids_, blocks_, "blocks", name);
    }

    // What `tiles` must be the shape of, [panels, units, what a unit holds]; empty for a format that has no tiles.
    static std::vector<int64_t> tiles_shape(const char* name, int64_t rows, int64_t columns) {
        const Format format = format_of(name, columns);
        const UnitSize unit = unit_size(format);
        if (!unit.columns) return {};
        return {blocks_of(rows, PANEL_ROWS), blocks_of(columns, unit.columns), unit.bytes / element(format)};
    }

    void pack(handle tiles_, handle stored_, const char* name) { move(tiles_, stored_, name, true); }
    void unpack(handle stored_, handle tiles_, const char* name) { move(tiles_, stored_, name, false); }
    // Several matrices, each a tuple of what `pack` takes, in one stretch without Python's lock.
    void pack_all(nanobind::list matrices) {
        std::vector<Packing> all;
        int64_t work = 0;
        for (const handle matrix : matrices) {
            const auto [tiles, stored, name] = nanobind::cast<std::tuple<nanobind::object, nanobind::object, std::string>>(matrix);
            all.push_back(moved(tiles, stored, name.c_str(), true));
            work += all.back().rows * all.back().columns;
        }
        Plan::spoil();
        const Unlocked unlocked(work);
        tramontane::pack_all(pool_, all);
    }

    void pack_codes(handle tiles_, handle codes_, int bits) { move_codes(tiles_, codes_, bits, true); }
    void unpack_codes(handle codes_, handle tiles_, int bits) { move_codes(tiles_, codes_, bits, false); }

    void matmul_coded(handle out_, handle x_, handle bias_, handle codes_, handle table_, handle scales_,
                      handle scale_table_, handle zeros_, handle offsets_, handle order_, int bits, int64_t group,
                      int64_t row_block, float factor) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY});
        const Array out(out_, "out", FLOAT32, {x[0], ANY}, true);
        const Coded weight = coded(codes_, table_, scales_, scale_table_, zeros_, offsets_, order_, bits, x[1], group,
                                   row_block, factor, out[1]);
        out.expect("out", {x[0], weight.rows});
        const float* bias = floats_or_null(bias_, "bias", {weight.rows});
        if (out.size() == 0) return;
        std::vector<Matmul> list;
        add_product(list, {out.data<float>(), x.data<const float>(), nullptr, bias, x[0]}, weight.rows, x[1]);
        const int64_t columns = x[1];
        device_.compute(out.size() * columns, [=, this, list = std::move(list)] {
            std::vector<Matmul> own = list;  // a plan computes it again
            const Matmuls products = {own.data(), ssize(own), weight.rows, columns, Format::F32};
            tiles_.matmul_coded(pool_, products, weight, arithmetic_);
        });
    }

    void rows_coded(handle out_, handle ids_, handle codes_, handle table_, handle scales_, handle scale_table_,
                    handle zeros_, handle offsets_, handle order_, int bits, int64_t group, int64_t row_block,
                    float factor) {
        const Array ids(ids_, "ids", INT32, {ANY}), out(out_, "out", FLOAT32, {ids[0], ANY}, true);
        const Coded weight = coded(codes_, table_, scales_, scale_table_, zeros_, offsets_, order_, bits, out[1],
                                   group, row_block, factor, ANY);
        device_.compute(out.size(), [=, this] {
            check_ids(ids, "ids", weight.rows);
            if (out.size() == 0) return;
            tiles_.rows_coded(pool_, {out.data<float>(), ids.data<const int32_t>(), ids[0], weight});
        });
    }

    // Rows of x that are grouped by matrix: those from offsets[e] to offsets[e + 1] meet the e-th.
    void matmul_experts(handle out_, handle x_, handle offsets_, nanobind::tuple weights, const char* name,
                        handle bias_) {
        const int64_t count = static_cast<int64_t>(weights.size());
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), out(out_, "out", FLOAT32, {x[0], ANY}, true);
        std::optional<Array> bounds;
        if (!offsets_.is_none()) bounds = Array(offsets_, "offsets", INT32, {count + 1});
        const int32_t* offsets = bounds ? bounds->data<const int32_t>() : nullptr;
        const float* bias = floats_or_null(bias_, "bias", {count, out[1]});
        const bool dense = !*name;
        require(x[1] > 0, "x must have columns");
        require(offsets || (count > 0 && x[0] % count == 0), "without offsets, each of the weights must have equally many rows");
        const auto begin = [=](int64_t e) { return offsets ? offsets[e] : x[0] / count * e; };  // of its rows
        std::optional<Stored> first;
        std::vector<Stored> experts(count);
        for (int64_t e = 0; e < count; e++) {
            if (begin(e) == begin(e + 1) && !Plan::recording()) continue;  // a plan's next rows may be those of any
            const nanobind::object weight = weights[e];
            experts[e] = stored(weight, "weights", dense ? nullptr : name, out[1], x[1]);
            if (!first) first = experts[e];
            const bool alike = experts[e].format == first->format && experts[e].tiled == first->tiled;
            require(alike, "weights must be stored alike");
        }
        if (out.size() == 0 || !first) return;
        device_.compute(out.size() * x[1], [=, this, experts = std::move(experts)] {
            std::vector<Matmul> list;
            for (int64_t e = 0; e < count; e++) {
                const int64_t start = begin(e), stop = begin(e + 1);
                require(0 <= start && start <= stop && stop <= x[0], "offsets must ascend within the rows of x");
                add_product(list,
                            {out.data<float>() + start * out[1], x.data<const float>() + start * x[1],
                             experts[e].data, bias ? bias + e * out[1] : nullptr, stop - start},
                            out[1], x[1]);
            }
            if (!list.empty()) run(*first, list, out[1], x[1]);
        });
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

    // The coded matrix of these arrays, checked to be one of rows of `columns`. How many rows packed codes have `rows`
    // tells; where it does not, those that fill the last panel count too.
    static Coded coded(handle codes_, handle table_, handle scales_, handle scale_table_, handle zeros_,
                       handle offsets_, handle order_, int bits, int64_t columns, int64_t group, int64_t row_block,
                       float factor, int64_t rows) {
        require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
        require(group >= 1 && row_block >= 1 && columns >= 1, "group, row_block and columns must be positive");
        const int64_t groups = (columns - 1) / group + 1;
        const Array codes(codes_, "codes", UINT8, {}), table(table_, "table", FLOAT32, {int64_t{1} << bits});
        const bool packed = codes.rank() == 3;
        if (packed) {
            require(columns % 32 == 0 && (bits == 4 || bits == 8), "such codes are not packed");
            codes.expect("codes", {rows == ANY ? ANY : blocks_of(rows, PANEL_ROWS), columns / 32, bits * 64});
            if (rows == ANY) rows = codes[0] * PANEL_ROWS;
        } else {
            codes.expect("codes", {ANY, ANY});
            require(codes[1] >= (columns * bits + 7) / 8, "codes are too few bytes for x");
            rows = codes[0];
        }
        const bool looked_up = !scale_table_.is_none();
        const Array scales(scales_, "scales", looked_up ? UINT8 : FLOATS, {});
        const bool turned = scales.rank() == 3;
        require(!turned || (packed && row_block == 1), "only grids of packed codes, a line a row, are turned");
        turned ? scales.expect("scales", {codes[0], groups, PANEL_ROWS}) : scales.expect("scales", {ANY, groups});
        require(scales[0] >= 1, "scales must have rows");
        Coded m = {};
        m.codes = codes.data<const uint8_t>();
        m.table = table.data<const float>();
        m.scales = scales.data<const uint8_t>();
        m.scale_type = number(scales);
        if (looked_up) m.scale_table = Array(scale_table_, "scale_table", FLOAT32, {256}).data<const float>();
        if (!zeros_.is_none()) {
            const Array zeros(zeros_, "zeros", FLOATS | UINT8, {});
            require(zeros.same_shape(scales), "zeros must have the shape of scales");
            m.zeros = zeros.data<const uint8_t>();
            m.zero_type = number(zeros);
        }
        if (!offsets_.is_none()) {
            const Array offsets(offsets_, "offsets", FLOATS, {});
            require(offsets.same_shape(scales), "offsets must have the shape of scales");
            m.offsets = offsets.data<const uint8_t>();
            m.offset_type = number(offsets);
        }
        if (!order_.is_none()) {
            const Array order(order_, "order", INT32, {columns});
            check_ids(order, "order", columns);
            m.order = order.data<const int32_t>();
        }
        m.rows = rows;
        m.packed = packed;
        m.turned = turned;
        m.row_bytes = codes[1];
        m.columns = columns;
        m.lines = turned ? rows : scales[0];
        m.groups = groups;
        m.group = group;
        m.row_block = row_block;
        m.factor = factor;
        m.bits = bits;
        return m;
    }

    // A matrix in rows or in tiles.
    struct Stored {
        const uint8_t* data;
        Format format;
        bool tiled;
    };

    // Without a name a dense format, which the dtype tells. Three axes are tiles.
    static Stored stored(handle array_, const char* what, const char* name, int64_t rows, int64_t columns) {
        const Array array(array_, what, name ? UINT8 : FLOATS, {});
        const Format format = name ? block_format(name, columns) : array.format();
        const bool tiled = array.rank() == 3;
        if (tiled) {
            const UnitSize unit = unit_size(format);
            require(unit.columns > 0, "this format has no tiles");
            array.expect(what, {blocks_of(rows, PANEL_ROWS), blocks_of(columns, unit.columns), unit.bytes / element(format)});
        } else {
            array.expect(what, {rows, name ? row_bytes(format, columns) : columns});
        }
        return {array.data<const uint8_t>(), format, tiled};
    }

    static Format format_of(const char* name, int64_t columns) {
        constexpr const char* DENSE[] = {"F32", "F16", "BF16"};
        for (int i = 0; i < 3; i++)
            if (strcmp(name, DENSE[i]) == 0) return static_cast<Format>(i);
        return block_format(name, columns);
    }
    static bool is_dense(Format format) {
        return format == Format::F32 || format == Format::F16 || format == Format::BF16;
    }
    // Bytes of an element of the arrays that hold a format.
    static int64_t element(Format format) {
        return format == Format::F32 ? 4 : format == Format::F16 || format == Format::BF16 ? 2 : 1;
    }
    static int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

    void move_codes(handle tiles_, handle codes_, int bits, bool packing) {
        require(bits == 4 || bits == 8, "codes of such a width are not packed");
        const Array codes(codes_, "codes", UINT8, {ANY, ANY}, !packing);
        require(codes[1] % (bits * 4) == 0, "rows of codes do not divide into 32");
        const int64_t units = codes[1] / (bits * 4);
        const Array tiles(tiles_, "tiles", UINT8, {blocks_of(codes[0], PANEL_ROWS), units, bits * 64}, packing);
        Plan::spoil();
        const Unlocked unlocked(codes.size());
        const CodePacking call = {tiles.data<uint8_t>(), codes.data<uint8_t>(), codes[0], tiles[0], units, bits};
        packing ? tramontane::pack_codes(pool_, call) : tramontane::unpack_codes(pool_, call);
    }

    void move(handle tiles_, handle stored_, const char* name, bool packing) {
        const Packing own = moved(tiles_, stored_, name, packing);
        Plan::spoil();  // what is made once a model needs no plan
        const Unlocked unlocked(own.rows * own.columns);
        packing ? tramontane::pack(pool_, own) : tramontane::unpack(pool_, own);
    }

    // A matrix of these arrays, checked, of which one is to be written.
    Packing moved(handle tiles_, handle stored_, const char* name, bool packing) {
        const Array rows(stored_, "stored", FLOATS | UINT8, {ANY, ANY}, !packing);
        const Array tiles(tiles_, "tiles", FLOATS | UINT8, {ANY, ANY, ANY}, packing);
        require(rows.dtype() == tiles.dtype(), "tiles must have the dtype of what they are made of");
        const bool dense = rows.dtype() != DType::UINT8;
        int64_t columns = rows[1];
        if (!dense) {
            const UnitSize block = block_size(name);
            require(rows[1] % block.bytes == 0, "rows do not divide into blocks");
            columns = rows[1] / block.bytes * block.columns;
        }
        const Stored own = stored(tiles_, "tiles", dense ? nullptr : name, rows[0], columns);
        return {const_cast<uint8_t*>(own.data), rows.data<uint8_t>(), rows[0], columns, tiles[0], tiles[1], own.format};
    }

    void multiply(const Array& out, const Array& x, const Stored& weight, handle bias_) {
        const float* bias = floats_or_null(bias_, "bias", {out[1]});
        if (out.size() == 0) return;
        require(x[1] > 0, "x must have columns");
        std::vector<Matmul> list;
        add_product(list, {out.data<float>(), x.data<const float>(), weight.data, bias, x[0]}, out[1], x[1]);
        const int64_t outputs = out[1], inputs = x[1];
        device_.compute(out.size() * inputs, [=, this, list = std::move(list)] { run(weight, list, outputs, inputs); });
    }

    // Products of the same rows by several matrices in tiles, as many of them at a time as one product may have.
    void run_together(std::vector<Part> parts, const float* x, int64_t tokens, int64_t inputs, Format format) {
        for (int64_t left = tokens; left > 0; left -= TOKEN_BLOCK) {
            Matmul one = {nullptr, x, nullptr, nullptr, left < TOKEN_BLOCK ? left : TOKEN_BLOCK};
            tiles_.matmul(pool_, {&one, 1, 0, inputs, format, parts.data(), ssize(parts)}, arithmetic_);
            x += TOKEN_BLOCK * inputs;
            for (Part& p : parts) p.out += TOKEN_BLOCK * p.outputs;
        }
    }

    // Takes a copy of the list, which kernels change.
    void run(const Stored& weight, std::vector<Matmul> list, int64_t outputs, int64_t inputs) {
        const Matmuls products = {list.data(), ssize(list), outputs, inputs, weight.format};
        if (weight.tiled) return tiles_.matmul(pool_, products, arithmetic_);
        is_dense(weight.format) ? kernels_.matmul(pool_, products) : tiles_.matmul_blocks(pool_, products, arithmetic_);
    }

    void take(handle out_, handle ids_, handle array_, const char* what, const char* name) {
        const Array ids(ids_, "ids", INT32, {ANY}), out(out_, "out", FLOAT32, {ids[0], ANY}, true);
        const Array array(array_, what, name ? UINT8 : FLOATS, {});
        require(array.rank() == 2 || array.rank() == 3, "a matrix has two axes, tiles have three");
        // Of tiles the rows are not known exactly: those that fill the last panel are zeros.
        const int64_t rows = array[0] * (array.rank() == 3 ? PANEL_ROWS : 1);
        const Stored matrix = stored(array_, what, name, rows, out[1]);
        const Rows call = {out.data<float>(), ids.data<const int32_t>(), matrix.data, ids[0], out[1], matrix.format};
        device_.compute(out.size(), [=, this] {
            check_ids(ids, "ids", rows);
            if (ids[0] * call.columns == 0) return;
            if (matrix.tiled) return tiles_.rows(pool_, call);
            is_dense(matrix.format) ? kernels_.rows(pool_, call) : tiles_.rows_blocks(pool_, call);
        });
    }

    template <class T>
    static int64_t ssize(const std::vector<T>& list) {
        return static_cast<int64_t>(list.size());
    }

    Device& device_;
    Pool& pool_;
    const Kernels& kernels_;
    const TileKernels& tiles_;
    const Arithmetic arithmetic_;
};

}  // namespace tramontane

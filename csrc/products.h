// Products with matrices and lookups of their rows, as Python calls them; see kernels/base.py for what each does.
#pragma once

#include <vector>

#include "ops.h"

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
    explicit Products(Device& device) : pool_(device.pool), kernels_(device.kernels) {}

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
    void matmul_experts(handle out_, handle x_, handle offsets_, nanobind::tuple weights, const char* name,
                        handle bias_) {
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
            const nanobind::object weight_ = weights[e];
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

    void take(handle out_, handle ids_, const uint8_t* weight, int64_t count, int64_t columns, Format format) {
        const Array ids(ids_, "ids", INT32, {ANY}), out(out_, "out", FLOAT32, {ids[0], columns}, true);
        check_ids(ids, "ids", count);
        if (out.size() == 0) return;
        const Unlocked unlocked(out.size());
        kernels_.rows(pool_, {out.data<float>(), ids.data<const int32_t>(), weight, ids[0], columns, format});
    }

    template <class T>
    static int64_t ssize(const std::vector<T>& list) {
        return static_cast<int64_t>(list.size());
    }

    Pool& pool_;
    const Kernels& kernels_;
};

}  // namespace tramontane

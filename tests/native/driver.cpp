// Runs kernels on cases from a file: for machines without Python, real or emulated, and for sanitizers.
// tests/kernels/driver.py builds it, writes the cases and judges the results.
//
//     driver                      the instruction sets of this machine, best first, then those that it can imitate
//     driver ISA CASES RESULTS    computes every case on one of them
//
// A case: an op, what it is of (a format, a kind, or nothing), integers, floats and arrays, each behind its length in a
// 64-bit integer; then the length of the result, which begins as the first array where that is as long. Arrays lie in
// memory of exactly their size, so that a sanitizer sees what is touched beyond; empty ones are null. An op below says in
// which order it takes its arguments.

#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "tables.h"
#include "tiles.h"

using namespace tramontane;

namespace {

using Bytes = std::vector<uint8_t>;

struct Case {
    std::string op, of;
    std::vector<int64_t> ints;
    std::vector<float> floats;
    std::vector<Bytes> arrays;
    Bytes out;
    size_t next = 0;

    int64_t integer() { return ints.at(next++); }
    Format format() const {
#define FORMAT_NAMED(name, elements, bytes) \
    if (of == #name) return Format::name;
        TRAMONTANE_FORMATS(FORMAT_NAMED)
#undef FORMAT_NAMED
        throw std::runtime_error("there is no format " + of);
    }
    CacheFormat cache_format() const {
        for (const auto& [name, format] : {std::pair{"I8", CacheFormat::I8}, {"E4M3", CacheFormat::E4M3}})
            if (of == name) return format;
        return static_cast<CacheFormat>(format());
    }
    Activation activation() const {
        for (size_t i = 0; i < std::size(ACTIVATIONS); i++)
            if (of == ACTIVATIONS[i]) return static_cast<Activation>(i);
        throw std::runtime_error("there is no activation " + of);
    }
    template <class T>
    const T* array(size_t i) const {
        return arrays.at(i).empty() ? nullptr : reinterpret_cast<const T*>(arrays[i].data());
    }
    template <class T = float>
    T* result() {
        return reinterpret_cast<T*>(out.data());
    }
};

class Reader {
   public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) {}

    bool more() { return file_ && file_.peek() != std::ifstream::traits_type::eof(); }

    Case read() {
        Case c;
        c.op = list<std::string>();
        c.of = list<std::string>();
        c.ints = list<std::vector<int64_t>>();
        c.floats = list<std::vector<float>>();
        for (int64_t left = integer(); left > 0; left--) c.arrays.push_back(list<Bytes>());
        c.out = Bytes(integer(), 0xFF);
        if (!c.arrays.empty() && c.arrays[0].size() == c.out.size()) c.out = c.arrays[0];
        return c;
    }

   private:
    void bytes(void* to, int64_t count) {
        if (!file_.read(static_cast<char*>(to), count)) throw std::runtime_error("the file of cases ends early");
    }
    int64_t integer() {
        int64_t value = 0;
        bytes(&value, sizeof value);
        return value;
    }
    template <class List>
    List list() {
        List values(integer(), {});
        bytes(values.data(), values.size() * sizeof(values[0]));
        return values;
    }

    std::ifstream file_;
};

// Up to TOKEN_BLOCK tokens at a time, as products.h cuts them.
std::vector<Matmul> cut(Matmul m, int64_t outputs, int64_t inputs) {
    std::vector<Matmul> list;
    for (int64_t left = m.tokens; left > 0; left -= TOKEN_BLOCK) {
        m.tokens = std::min(left, TOKEN_BLOCK);
        list.push_back(m);
        m.out += m.tokens * outputs;
        m.x += m.tokens * inputs;
    }
    return list;
}

bool dense(Format format) { return format == Format::F32 || format == Format::F16 || format == Format::BF16; }

// A matrix as tiles; throws where they do not give back what was packed.
Bytes packed(Pool& pool, const Bytes& stored, Format format, int64_t rows, int64_t columns) {
    const UnitSize unit = unit_size(format);
    const int64_t panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS, units = (columns + unit.columns - 1) / unit.columns;
    Bytes tiles(panels * units * unit.bytes), source = stored, back(stored.size());
    pack(pool, {tiles.data(), source.data(), rows, columns, panels, units, format});
    unpack(pool, {tiles.data(), back.data(), rows, columns, panels, units, format});
    if (back != stored) throw std::runtime_error("tiles do not give back what was packed");
    return tiles;
}

class Runner {
   public:
    explicit Runner(const InstructionSet& set) : kernels_(set.kernels), tiles_(set.tiles), cache_(set.cache) {}

    void run(Case& c) {
        const auto op = OPS.find(c.op);
        if (op == OPS.end()) throw std::runtime_error("there is no such op");
        (this->*op->second)(c);
    }

   private:
    // values.
    void table(Case& c) {
        if (!set_table(c.of.c_str(), c.array<float>(0), c.arrays.at(0).size() / sizeof(float)))
            throw std::runtime_error("table " + c.of + " is unknown, or of another size");
    }
    // x, weight, bias.
    void matmul(Case& c) {
        const Format format = c.format();
        const int64_t tokens = c.integer(), outputs = c.integer(), inputs = c.integer();
        const bool tiled = c.integer();
        const Arithmetic arithmetic = static_cast<Arithmetic>(c.integer());
        const Bytes tiles = tiled ? packed(pool_, c.arrays.at(1), format, outputs, inputs) : Bytes();
        const uint8_t* weight = tiled ? tiles.data() : c.array<uint8_t>(1);
        auto list = cut({c.result(), c.array<float>(0), weight, c.array<float>(2), tokens}, outputs, inputs);
        const Matmuls products = {list.data(), int64_t(list.size()), outputs, inputs, format};
        if (tiled) return tiles_.matmul(pool_, products, arithmetic);
        dense(format) ? kernels_.matmul(pool_, products) : tiles_.matmul_blocks(pool_, products, arithmetic);
    }
    // ids, weight.
    void rows(Case& c) {
        const Format format = c.format();
        const int64_t count = c.integer(), rows = c.integer(), columns = c.integer();
        const bool tiled = c.integer();
        const Bytes tiles = tiled ? packed(pool_, c.arrays.at(1), format, rows, columns) : Bytes();
        const uint8_t* weight = tiled ? tiles.data() : c.array<uint8_t>(1);
        const Rows call = {c.result(), c.array<int32_t>(0), weight, count, columns, format};
        if (tiled) return tiles_.rows(pool_, call);
        dense(format) ? kernels_.rows(pool_, call) : tiles_.rows_blocks(pool_, call);
    }
    // x, weight, bias.
    void norm(Case& c) {
        const bool centred = c.integer();
        const int64_t rows = c.integer(), columns = c.integer();
        const Norm n = {c.result(), c.array<float>(0), c.array<float>(1), c.array<float>(2), rows, columns, 1,
                        c.floats.at(0)};
        centred ? kernels_.layer_norm(pool_, n) : kernels_.rms_norm(pool_, n);
    }
    // x.
    void activation(Case& c) {
        const int64_t count = c.integer();
        kernels_.activation(pool_, c.result(), c.array<float>(0), count, c.activation());
    }
    // gate, up.
    void gated_activation(Case& c) {
        const int64_t count = c.integer();
        const Activation kind = c.activation();
        kernels_.gated_activation(pool_, {c.result(), c.array<float>(0), c.array<float>(1), count, kind, false, 0});
    }
    // x, cos, sin.
    void rope(Case& c) {
        const int64_t tokens = c.integer(), heads = c.integer(), size = c.integer(), half = c.integer();
        kernels_.rope(pool_, c.result(), c.array<float>(1), c.array<float>(2), tokens, heads, size, half, c.integer());
    }
    // cache, x, slots.
    void write_cache(Case& c) {
        const CacheFormat format = c.cache_format();
        const int64_t tokens = c.integer(), heads = c.integer(), size = c.integer(), block = c.integer();
        cache_.write(pool_, {c.result<uint8_t>(), c.array<float>(1), c.array<int32_t>(2), tokens, heads, size, block,
                             format, c.integer() != 0});
    }
    // cache, table.
    void read_cache(Case& c) {
        const int64_t first = c.integer(), tokens = c.integer(), heads = c.integer(), size = c.integer();
        const int64_t block = c.integer();
        cache_.read(pool_, {c.result(), c.array<uint8_t>(0), c.array<int32_t>(1), first, tokens, heads, size, block,
                            c.cache_format(), c.integer() != 0});
    }
    // q, keys, values, tables, query starts, context lengths, sinks, slopes.
    void attention(Case& c) {
        Attention a = {};
        a.out = c.result();
        a.q = c.array<float>(0);
        a.k_cache = c.array<uint8_t>(1);
        a.v_cache = c.array<uint8_t>(2);
        a.tables = c.array<int32_t>(3);
        a.query_start = c.array<int32_t>(4);
        a.context_lens = c.array<int32_t>(5);
        a.sinks = c.array<float>(6);
        a.slopes = c.array<float>(7);
        a.format = c.cache_format();
        for (int64_t* size : {&a.sequences, &a.table_size, &a.q_heads, &a.kv_heads, &a.head_size, &a.value_size,
                              &a.block_size, &a.window})
            *size = c.integer();
        a.causal = c.integer();
        a.latent = c.integer();
        a.scale = c.floats.at(0);
        a.softcap = c.floats.at(1);
        const int64_t cut = c.integer();
        const auto arithmetic = static_cast<Arithmetic>(c.integer());
        cut ? attend_twice(a, cut, arithmetic) : cache_.attention(pool_, a, arithmetic);
    }
    // To the tokens from `cut` on, then to those before it, which all rows see.
    void attend_twice(const Attention& a, int64_t cut, Arithmetic arithmetic) {
        std::vector<float> totals(a.query_start[a.sequences] * a.q_heads);
        std::vector<int32_t> later(a.context_lens, a.context_lens + a.sequences), before(a.sequences, int32_t(cut));
        for (int32_t& context : later) context -= int32_t(cut);
        Attention part = a;
        part.totals = totals.data();
        part.tables = a.tables + cut / a.block_size;
        part.context_lens = later.data();
        cache_.attention(pool_, part, arithmetic);
        part.tables = a.tables;
        part.context_lens = before.data();
        part.causal = false;
        part.sinks = nullptr;
        part.joins = true;
        cache_.attention(pool_, part, arithmetic);
    }
    // logits.
    void log_softmax(Case& c) {
        const int64_t rows = c.integer();
        kernels_.log_softmax(pool_, c.result(), c.array<float>(0), rows, c.integer());
    }

    static const std::map<std::string, void (Runner::*)(Case&)> OPS;

    Pool pool_{2};
    const Kernels& kernels_;
    const TileKernels& tiles_;
    const CacheKernels& cache_;
};

const std::map<std::string, void (Runner::*)(Case&)> Runner::OPS = {
    {"matmul", &Runner::matmul},           {"rows", &Runner::rows},
    {"norm", &Runner::norm},               {"activation", &Runner::activation},
    {"rope", &Runner::rope},               {"gated_activation", &Runner::gated_activation},
    {"write_cache", &Runner::write_cache}, {"attention", &Runner::attention},
    {"log_softmax", &Runner::log_softmax}, {"table", &Runner::table},
    {"read_cache", &Runner::read_cache},
};

int run(const char* isa, const char* cases, const char* results) {
    Runner runner(instruction_set(isa));
    std::ofstream out(results, std::ios::binary);
    Reader reader(cases);
    for (int64_t i = 0; reader.more(); i++) {
        Case c = reader.read();
        try {
            runner.run(c);
        } catch (const std::exception& error) {
            std::cerr << "case " << i << ", " << c.op << ": " << error.what() << "\n";
            return 1;
        }
        out.write(reinterpret_cast<const char*>(c.out.data()), c.out.size());
    }
    return out.flush() ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 4) return run(arguments[1], arguments[2], arguments[3]);
    for (const bool emulated : {false, true})
        for (const std::string& isa : instruction_sets(emulated)) std::cout << isa << "\n";
    return 0;
}

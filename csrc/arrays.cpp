#include "arrays.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace nb = nanobind;

namespace tramontane {
namespace {

// The start of numpy's array object. Its layout is part of numpy's binary interface, the same in versions 1 and 2;
// reading it costs nanoseconds where the buffer protocol costs a hundred, and knows bfloat16, which that does not.
struct NumpyArray {
    PyObject_HEAD
    char* data;
    int rank;
    intptr_t* shape;
    intptr_t* strides;
    PyObject* base;
    PyObject* dtype;
    int flags;
};
constexpr int CONTIGUOUS = 0x0001, WRITEABLE = 0x0400;

constexpr const char* NAMES[] = {"float32", "float16", "bfloat16", "int32", "uint8", "int8", "float8_e4m3fn"};
constexpr int KNOWN = 7;

PyTypeObject* array_type = nullptr;
std::array<PyObject*, KNOWN> dtypes{};

DType dtype_of(PyObject* dtype) {
    for (int i = 0; i < KNOWN; i++)
        if (dtype == dtypes[i]) return static_cast<DType>(i);
    for (int i = 0; i < KNOWN; i++)  // equal objects exist: read from pickles, or with metadata
        if (PyObject_RichCompareBool(dtype, dtypes[i], Py_EQ) == 1) return static_cast<DType>(i);
    PyErr_Clear();
    return DType::OTHER;
}

std::string describe(const intptr_t* shape, int rank) {
    std::string text = "[";
    for (int i = 0; i < rank; i++) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

[[noreturn]] void fail_type(const char* name, unsigned types, nb::handle found) {
    std::string wanted;
    for (int i = 0; i < KNOWN; i++)
        if (types & 1u << i) wanted += (wanted.empty() ? "" : " or ") + std::string(NAMES[i]);
    throw std::invalid_argument(std::string(name) + " must be a numpy array of " + wanted + ", not " +
                                nb::str(found).c_str());
}

[[noreturn]] void fail_shape(const char* name, const intptr_t* found, int rank, std::initializer_list<int64_t> shape) {
    std::string wanted = "[";
    for (int64_t size : shape) wanted += (wanted.size() > 1 ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
    throw std::invalid_argument(std::string(name) + " must have the shape " + wanted + "], not " +
                                describe(found, rank));
}

}  // namespace

void import_numpy() {
    const nb::module_ numpy = nb::module_::import_("numpy"), ml_dtypes = nb::module_::import_("ml_dtypes");
    array_type = reinterpret_cast<PyTypeObject*>(nb::object(numpy.attr("ndarray")).release().ptr());
    for (int i = 0; i < KNOWN; i++) {
        nb::object name = nb::str(NAMES[i]);
        if (nb::hasattr(ml_dtypes, name)) name = ml_dtypes.attr(name);
        dtypes[i] = numpy.attr("dtype")(name).release().ptr();
    }
}

Array::Array(nb::handle object, const char* name, unsigned types, std::initializer_list<int64_t> shape, bool written) {
    if (!PyObject_TypeCheck(object.ptr(), array_type)) fail_type(name, types, object.type());
    const NumpyArray& array = *reinterpret_cast<const NumpyArray*>(object.ptr());
    data_ = array.data;
    shape_ = array.shape;
    rank_ = array.rank;
    dtype_ = dtype_of(array.dtype);
    if (!(bit(dtype_) & types)) fail_type(name, types, array.dtype);
    if (!(array.flags & CONTIGUOUS)) throw std::invalid_argument(std::string(name) + " must be contiguous");
    if (written && !(array.flags & WRITEABLE))
        throw std::invalid_argument(std::string(name) + " is read-only, and is to be written");
    if (shape.size() != 0) expect(name, shape);
}

void Array::expect(const char* name, std::initializer_list<int64_t> shape) const {
    if (rank_ != static_cast<int>(shape.size())) fail_shape(name, shape_, rank_, shape);
    int axis = 0;
    for (int64_t size : shape) {
        if (size != ANY && shape_[axis] != size) fail_shape(name, shape_, rank_, shape);
        axis++;
    }
}

int64_t Array::size() const {
    int64_t size = 1;
    for (int i = 0; i < rank_; i++) size *= shape_[i];
    return size;
}

bool Array::same_shape(const Array& other) const {
    return rank_ == other.rank_ && std::equal(shape_, shape_ + rank_, other.shape_);
}

Format Array::format() const {
    switch (dtype_) {
        case DType::FLOAT16: return Format::F16;
        case DType::BFLOAT16: return Format::BF16;
        default: return Format::F32;
    }
}

CacheFormat Array::cache_format() const {
    switch (dtype_) {
        case DType::FLOAT16: return CacheFormat::F16;
        case DType::BFLOAT16: return CacheFormat::BF16;
        case DType::INT8: return CacheFormat::I8;
        case DType::FLOAT8_E4M3: return CacheFormat::E4M3;
        default: return CacheFormat::F32;
    }
}

void check_ids(const Array& ids, const char* name, int64_t limit) {
    const int32_t* id = ids.data<const int32_t>();
    for (int64_t i = 0; i < ids.size(); i++) {
        if (id[i] >= 0 && id[i] < limit) continue;
        throw std::invalid_argument(std::string(name) + " holds " + std::to_string(id[i]) + ", outside [0, " +
                                    std::to_string(limit) + ")");
    }
}

}  // namespace tramontane

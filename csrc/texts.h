// Strings out of files' headers, which have hundreds of thousands. Included by module.cpp alone.
#pragma once

#include <nanobind/nanobind.h>

#include <cstring>
#include <stdexcept>

namespace tramontane {

// The memory of an object that has such, for as long as this lives.
class Bytes {
   public:
    explicit Bytes(nanobind::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nanobind::python_error();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    const char* data() const { return static_cast<const char*>(view_.buf); }
    uint64_t size() const { return uint64_t(view_.len); }

   private:
    Py_buffer view_;
};

// Reads up to `count` strings, each behind its length in `width` bytes of this machine's order, from byte `at` on, and
// no further than byte `end`. Returns them and where the next begins: fewer than `count` where one is not inside.
// Bytes that are not UTF-8 become lone surrogates.
inline nanobind::tuple read_strings(nanobind::handle data, uint64_t at, uint64_t end, uint64_t count, uint64_t width) {
    const Bytes bytes(data);
    if (end > bytes.size() || at > end || (width != 4 && width != 8)) throw std::invalid_argument("no such strings");
    nanobind::list strings;
    for (uint64_t i = 0; i < count && end - at >= width; i++) {
        uint64_t length = 0;
        if (width == 8)
            memcpy(&length, bytes.data() + at, 8);
        else {
            uint32_t narrow;
            memcpy(&narrow, bytes.data() + at, 4);
            length = narrow;
        }
        if (length > end - at - width) break;
        const auto text = nanobind::steal(PyUnicode_DecodeUTF8(bytes.data() + at + width, Py_ssize_t(length), "surrogateescape"));
        if (!text.is_valid()) throw nanobind::python_error();
        strings.append(text);
        at += width + length;
    }
    return nanobind::make_tuple(strings, at);
}

}  // namespace tramontane

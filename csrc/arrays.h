// numpy arrays as checked pointers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>

#include "kernels.h"

namespace tramontane {

enum class DType : int { FLOAT32, FLOAT16, BFLOAT16, INT32, UINT8, INT8, FLOAT8_E4M3, OTHER };

// A set of dtypes.
constexpr unsigned bit(DType type) { return 1u << static_cast<int>(type); }
constexpr unsigned FLOAT32 = bit(DType::FLOAT32), INT32 = bit(DType::INT32), UINT8 = bit(DType::UINT8);
constexpr unsigned FLOATS = FLOAT32 | bit(DType::FLOAT16) | bit(DType::BFLOAT16);
constexpr unsigned CELLS = FLOATS | bit(DType::INT8) | bit(DType::FLOAT8_E4M3);  // what caches are made of

// Reads numpy and ml_dtypes once; to be called when the module is imported.
void import_numpy();

// A contiguous array whose shape and dtype have been checked. It does not own the memory: the caller's argument does.
class Array {
   public:
    static constexpr int64_t ANY = -1;

    // Throws std::invalid_argument for what is not a numpy array of one of `types`, not contiguous, read-only where it
    // is to be written, or not of `shape` (ANY: any size; an empty shape: any shape).
    Array(nanobind::handle object, const char* name, unsigned types, std::initializer_list<int64_t> shape,
          bool written = false);

    template <class T>
    T* data() const {
        return reinterpret_cast<T*>(data_);
    }
    int64_t operator[](int axis) const { return shape_[axis]; }
    int rank() const { return rank_; }
    // Throws std::invalid_argument where the shape is another.
    void expect(const char* name, std::initializer_list<int64_t> shape) const;
    int64_t size() const;
    bool same_shape(const Array& other) const;
    DType dtype() const { return dtype_; }
    Format format() const;  // of floating dtypes
    CacheFormat cache_format() const;  // of `CELLS`

   private:
    char* data_;
    const intptr_t* shape_;
    int rank_;
    DType dtype_;
};

// Throws std::invalid_argument where one of the ids is outside [0, limit).
void check_ids(const Array& ids, const char* name, int64_t limit);

}  // namespace tramontane

#include "scratch.h"

#include <new>

namespace tramontane {
namespace {

constexpr std::align_val_t ALIGNMENT{64};

struct Buffer {
    float* data = nullptr;
    int64_t count = 0;

    ~Buffer() { ::operator delete(data, ALIGNMENT); }

    float* at_least(int64_t wanted) {
        if (wanted > count) {
            ::operator delete(data, ALIGNMENT);
            data = nullptr;
            count = 0;
            data = static_cast<float*>(::operator new(wanted * sizeof(float), ALIGNMENT));
            count = wanted;
        }
        return data;
    }
};

}  // namespace

float* scratch(Scratch kind, int64_t count) {
    thread_local Buffer buffers[static_cast<int>(Scratch::COUNT)];
    return buffers[static_cast<int>(kind)].at_least(count);
}

}  // namespace tramontane

// Shares random counts among pools of some threads, and ends with 1 where an item was not done exactly once or a piece
// was not cut at a multiple of its grain. Threads take pieces of uneven length, and some jobs find them asleep.
#include "../../csrc/pool.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace {

struct Job {
    std::vector<std::atomic<int>> done;
    int64_t grain;
    int work;
    std::atomic<bool> wrong{false};
};

void piece(const void* context, int64_t begin, int64_t end) {
    Job& job = *static_cast<Job*>(const_cast<void*>(context));
    const int64_t count = static_cast<int64_t>(job.done.size());
    if (begin >= end || end > count || begin % job.grain || (end % job.grain && end != count)) job.wrong = true;
    for (int64_t i = begin; i < end && i < count; i++) job.done[i]++;
    std::atomic<int> turns{0};
    while (turns < job.work) turns++;
}

}  // namespace

int main() {
    std::mt19937 draw(7);
    for (int threads : {1, 2, 3, 5, 8}) {
        tramontane::Pool pool(threads);
        for (int round = 0; round < 3000; round++) {
            Job job{std::vector<std::atomic<int>>(draw() % (round % 97 ? 1000 : 50000)), 1 + draw() % (round % 3 ? 8 : 64),
                    static_cast<int>(draw() % 256)};
            if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
            pool.run(static_cast<int64_t>(job.done.size()), job.grain, piece, &job);
            for (const auto& times : job.done) job.wrong = job.wrong || times != 1;
            if (job.wrong) {
                printf("%d threads, %zu items in grains of %d\n", threads, job.done.size(), static_cast<int>(job.grain));
                return 1;
            }
        }
    }
}

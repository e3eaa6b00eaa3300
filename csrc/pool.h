// Threads that share the work of one op at a time. Knows nothing of arrays or kernels.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace tramontane {

// A pool of `threads` threads, the calling one included. `run` may be called from several threads: one of them gets the
// workers, the others compute alone, with the same results. Workers spin briefly after a job, since the next op of a
// model follows within microseconds, and then sleep. After a fork the child starts workers of its own on first use.
class Pool {
   public:
    using Body = void (*)(const void* context, int64_t begin, int64_t end);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    int64_t turns() const { return turns_; }  // jobs that the threads have shared

    // Binds the workers, which must not have started, each to one of `processors`; the calling thread is the caller's to
    // bind. A system that binds no threads must not be asked to.
    void pin(std::vector<int> processors) { processors_ = std::move(processors); }

    // Calls body on pieces that together cover [0, count), each of a multiple of `grain`; returns when all are
    // done. Up to `grain` items are computed by the caller alone, and wake nobody.
    void run(int64_t count, int64_t grain, Body body, const void* context);

   private:
    struct Workers;

    const int threads_;
    std::vector<int> processors_;  // of the workers; empty: they run where the system likes
    std::mutex owner_;
    Workers* workers_ = nullptr;
    int64_t turns_ = 0;
};

}  // namespace tramontane

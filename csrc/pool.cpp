#include "pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#include <pthread.h>
#endif

namespace tramontane {
namespace {

constexpr auto SPIN = std::chrono::microseconds(60);
constexpr int PAUSES_A_CLOCK = 32;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    __asm__ __volatile__("yield");
#endif
}

// Spins until `done()`; false when it is not so after SPIN.
template <class Done>
bool spin(Done done) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < PAUSES_A_CLOCK; i++) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < SPIN);
    return done();
}

// Counts the forks that led to this process: threads of an older count are not in it.
std::atomic<int> forks{0};

void watch_forks() {
#if !defined(_WIN32)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
    (void)registered;
#endif
}

// Binds a thread. A processor that the process has lost since it was chosen is not had: the thread then runs
// where it may, as the system has it with threads that were bound already.
void bind(std::thread& thread, int processor) {
#if defined(__linux__)
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(processor, &only);
    pthread_setaffinity_np(thread.native_handle(), sizeof only, &only);
#else
    (void)thread, (void)processor;
#endif
}

}  // namespace

// The workers of a pool and the job that they share.
//
// `state_` holds an epoch (high half), whether the epoch's job is open, and how many workers are in it. A worker may
// enter only while it is open; the caller closes it once no piece is left and waits for those inside. So a worker that
// wakes late never holds up a job, nor sees the fields of the next one change.
struct Pool::Workers {
    static constexpr uint64_t EPOCH = uint64_t(1) << 32, OPEN = uint64_t(1) << 31, INSIDE = OPEN - 1;
    static constexpr uint64_t REST = EPOCH - 1;

    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };

    Workers(int count, const std::vector<int>& processors) : born(forks.load()), shares(count + 1) {
        threads.reserve(count);
        try {
            for (int i = 0; i < count; i++) {
                threads.emplace_back([this, i] { serve(i + 1); });
                if (i < static_cast<int>(processors.size())) bind(threads.back(), processors[i]);
            }
        } catch (const std::system_error&) {
            // The system has no more threads: those that started, and the caller, do the work.
        }
    }

    ~Workers() {
        {
            std::lock_guard lock(mutex);
            stop.store(true);
        }
        wake.notify_all();
        for (auto& thread : threads) thread.join();
    }

    void run(int64_t items, int64_t piece, Body work, const void* with) {
        count = items;
        grain = piece;
        body = work;
        context = with;
        const int64_t all = (items + piece - 1) / piece, members = static_cast<int64_t>(shares.size());
        for (int64_t i = 0; i < members; i++)
            shares[i].left.store(range(all * i / members, all * (i + 1) / members), std::memory_order_relaxed);
        const uint64_t epoch = (state.load() & ~(EPOCH - 1)) + EPOCH;
        state.store(epoch | OPEN);
        if (sleepers.load() > 0) {
            { std::lock_guard lock(mutex); }
            wake.notify_all();
        }
        take_pieces(0);
        state.fetch_and(~OPEN);
        const auto empty = [this] { return (state.load(std::memory_order_acquire) & INSIDE) == 0; };
        while (!spin(empty)) std::this_thread::yield();
    }

    // Grains [begin, end) that a thread has yet to do, in one word, so that they change at once.
    static uint64_t range(uint64_t begin, uint64_t end) { return begin << 32 | end; }

    // A thread walks through its own share from the front, so that what it reads lies in one row, for the processor to
    // fetch ahead; then it takes the rear half of what another has left, which may be all where that one is late.
    void take_pieces(size_t me) {
        std::atomic<uint64_t>& own = shares[me].left;
        do {
            uint64_t left = own.load(std::memory_order_relaxed);
            while (const uint64_t size = (left & REST) - (left >> 32)) {
                const uint64_t begin = left >> 32, end = begin + (size + 3) / 4;
                if (!own.compare_exchange_weak(left, range(end, left & REST), std::memory_order_relaxed)) continue;
                body(context, static_cast<int64_t>(begin) * grain, std::min(static_cast<int64_t>(end) * grain, count));
                left = own.load(std::memory_order_relaxed);
            }
        } while (take_over(me));
    }

    bool take_over(size_t me) {
        for (size_t i = 1; i < shares.size(); i++) {
            std::atomic<uint64_t>& other = shares[(me + i) % shares.size()].left;
            uint64_t left = other.load(std::memory_order_relaxed);
            while (const uint64_t size = (left & REST) - (left >> 32)) {
                const uint64_t end = left & REST, middle = end - (size + 1) / 2;
                if (!other.compare_exchange_weak(left, range(left >> 32, middle), std::memory_order_relaxed)) continue;
                shares[me].left.store(range(middle, end), std::memory_order_relaxed);
                return true;
            }
        }
        return false;
    }

    void serve(size_t me) {
        uint64_t seen = 0;
        const auto news = [&] { return stop.load() || (state.load() & ~(EPOCH - 1)) != seen; };
        for (;;) {
            if (!spin(news)) {
                std::unique_lock lock(mutex);
                sleepers.fetch_add(1);
                wake.wait(lock, news);
                sleepers.fetch_sub(1);
            }
            if (stop.load()) return;
            uint64_t now = state.load();
            seen = now & ~(EPOCH - 1);
            while ((now & OPEN) && (now & ~(EPOCH - 1)) == seen) {
                if (!state.compare_exchange_weak(now, now + 1)) continue;
                take_pieces(me);
                state.fetch_sub(1, std::memory_order_release);
                break;
            }
        }
    }

    const int born;
    int64_t count = 0, grain = 1;
    Body body = nullptr;
    const void* context = nullptr;
    std::vector<Share> shares;  // the caller's first
    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<int> sleepers{0};
    std::atomic<bool> stop{false};
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
};

Pool::Pool(int threads) : threads_(threads) { watch_forks(); }

Pool::~Pool() {
    // After a fork the threads are not ours to join: their record is left behind.
    if (workers_ && workers_->born == forks.load()) delete workers_;
}

void Pool::run(int64_t count, int64_t grain, Body body, const void* context) {
    if (count <= 0) return;
    if (threads_ > 1 && count > grain && owner_.try_lock()) {
        std::lock_guard lock(owner_, std::adopt_lock);
        if (!workers_ || workers_->born != forks.load()) workers_ = new Workers(threads_ - 1, processors_);
        turns_++;
        workers_->run(count, grain, body, context);
        return;
    }
    body(context, 0, count);
}

}  // namespace tramontane

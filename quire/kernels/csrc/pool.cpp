#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire {

namespace {

constexpr uint64_t MOST_TASKS = 0xffff;
constexpr int SPINS = 4000;  // some 50 microseconds: longer than Python takes from kernel to kernel

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

thread_local bool in_task = false;

class Pool {
  public:
    explicit Pool(int64_t count) {
        for (int64_t i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        stopping_ = true;
        state_ += uint64_t(1) << 32;  // a new loop without tasks
        signal_ += 1;
        signal_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int64_t size() const { return int64_t(workers_.size()) + 1; }

    // After a fork only the calling thread exists; the others must be neither joined nor counted.
    void forget_workers() { new std::vector<std::thread>(std::move(workers_)); }

    void run(uint64_t count, void (*task)(const void*, int64_t), const void* context) {
        std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
        if (in_task || workers_.empty() || count < 2 || !mine.try_lock()) {
            for (uint64_t i = 0; i < count; ++i) task(context, int64_t(i));
            return;
        }
        task_ = task;
        context_ = context;
        done_ = 0;
        const uint64_t loop = (state_ >> 32) + 1;
        state_ = loop << 32 | count << 16;
        if (sleeping_ > 0) {
            signal_ += 1;
            signal_.notify_all();
        }
        while (take()) {
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins)
            spins < SPINS ? pause() : std::this_thread::yield();
    }

  private:
    // Takes and runs one task of the current loop. The loop cannot change between the exchange
    // that takes a task and the end of that task, so `task_` and `context_` belong to it.
    bool take() {
        uint64_t state = state_;
        do {
            if ((state & MOST_TASKS) >= (state >> 16 & MOST_TASKS)) return false;
        } while (!state_.compare_exchange_weak(state, state + 1));
        in_task = true;
        task_(context_, int64_t(state & MOST_TASKS));
        in_task = false;
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    void work() {
        uint64_t seen = 0;
        while (!stopping_) {
            while (take()) {
            }
            seen = state_ >> 32;
            int spins = 0;
            while (state_ >> 32 == seen && spins < SPINS) {
                pause();
                ++spins;
            }
            if (spins < SPINS) continue;
            const uint32_t before = signal_;
            sleeping_ += 1;
            if (state_ >> 32 == seen && !stopping_) signal_.wait(before);
            sleeping_ -= 1;
        }
    }

    std::vector<std::thread> workers_;
    std::mutex busy_;
    std::atomic<uint64_t> state_{0};  // loop number, its tasks, tasks taken: 32, 16 and 16 bits
    std::atomic<uint64_t> done_{0};
    std::atomic<uint32_t> signal_{0}, sleeping_{0};
    std::atomic<bool> stopping_{false};
    void (*task_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
};

std::unique_ptr<Pool>& pool() {
    static auto& found = *new std::unique_ptr<Pool>(new Pool(1));  // outlives static destructors
    return found;
}

}  // namespace

void set_threads(int64_t count) {
    static std::once_flag once;
    std::call_once(once, [] {
        pthread_atfork(nullptr, nullptr, [] {
            pool()->forget_workers();
            pool().release();
            pool().reset(new Pool(1));
        });
    });
    if (pool()->size() != count) pool().reset(new Pool(std::max<int64_t>(1, count)));
}

int64_t threads() { return pool()->size(); }

void run_tasks(int64_t count, void (*task)(const void*, int64_t), const void* context) {
    struct Part {
        void (*task)(const void*, int64_t);
        const void* context;
        int64_t first;
    };
    for (int64_t first = 0; first < count; first += int64_t(MOST_TASKS)) {
        const Part part{task, context, first};
        pool()->run(
            uint64_t(std::min(count - first, int64_t(MOST_TASKS))),
            [](const void* at, int64_t i) {
                const auto* p = static_cast<const Part*>(at);
                p->task(p->context, p->first + i);
            },
            &part);
    }
}

}  // namespace quire

// The threads of the kernels: a team that works in step and never spins for long.
//
// A step of a model is hundreds of small pieces of work with a meeting after each. Threads that sleep at each meeting
// wake too late, and threads that spin between steps take the cores from the processes that serve HTTP. So members spin
// (and soon yield) while a job runs and for a moment after it, and sleep otherwise.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Calls `done` until it is true. Another process may want the core of the thread that is waited for, so after a while
// the core is offered to it.
template <class Done>
inline void spin_until(Done done) {
    for (int i = 0; !done(); ++i) {
        if (i < 2000) relax();
        else sched_yield();
    }
}

class Team {
  public:
    explicit Team(int size) : size_(size) {
        for (int rank = 1; rank < size; ++rank) std::thread([this] { member(); }).detach();
    }

    int size() const { return size_; }

    // Runs `job(context)` on all members, the caller among them.
    void run(void (*job)(void*), void* context) {
        if (size_ == 1) return job(context);
        job_ = job;
        context_ = context;
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        job(context);
        meet();
    }

    // All members call this; it returns once all have.
    void meet() {
        if (size_ == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
        }
    }

    // All members call this with the same size: memory that is theirs until the next call.
    char* scratch(size_t bytes) {
        if (scratch_.size() < bytes) {
            meet();  // all have looked at the size before one changes it
            share(1, 1, [&](int64_t) { scratch_.resize(bytes); });
        }
        return scratch_.data();
    }

    // All members call this with the same arguments: they share the numbers 0..count and meet at the end. Whoever is
    // free takes a part of what is left, at least `grain` numbers: long runs first, because memory is read fastest in
    // order, and short ones at the end, so that nobody waits long. What a number computes does not depend on who does it.
    template <class Work>
    void share(int64_t count, int64_t grain, Work work) {
        int64_t begin = next_.load(std::memory_order_relaxed);
        while (begin < count) {
            const int64_t part = size_ == 1 ? count : (count - begin) / (2 * size_);
            const int64_t end = std::min(begin + std::max(part, grain), count);
            if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
            for (int64_t i = begin; i < end; ++i) work(i);
            begin = next_.load(std::memory_order_relaxed);
        }
        meet();
    }

  private:
    static constexpr auto LINGER = std::chrono::microseconds(100);

    void member() {
        uint64_t seen = 0;
        for (;;) {
            wait(seen);
            ++seen;
            job_(context_);
            meet();
        }
    }

    void wait(uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + LINGER;
        do {
            for (int i = 0; i < 64; ++i) {
                if (epoch_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
        asleep_.fetch_sub(1, std::memory_order_relaxed);
    }

    const int size_;
    void (*job_)(void*) = nullptr;
    void* context_ = nullptr;
    // On cache lines of their own: each is written by one member while others look at another.
    alignas(64) std::atomic<uint64_t> epoch_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<char> scratch_;
};

// Made at the first use and never torn down: its threads live as long as the process.
inline Team*& team_slot() {
    static Team* team = nullptr;
    return team;
}

inline Team& team() {
    if (!team_slot()) team_slot() = new Team(1);
    return *team_slot();
}

// Whether this thread does its work by itself: where several threads do the same, a team is in their way.
inline thread_local bool alone = false;

// Of the team, whose members work for one caller at a time.
inline std::mutex& team_mutex() {
    static std::mutex mutex;
    return mutex;
}

// Runs `work` (called as work(Team&)) on all members, or on the caller alone while the team works for another thread.
template <class Work>
inline void on_team(Work work) {
    std::unique_lock<std::mutex> lock(team_mutex(), std::defer_lock);
    if (alone || !lock.try_lock()) {
        Team single(1);
        work(single);
        return;
    }
    auto call = [](void* context) { (*static_cast<Work*>(context))(team()); };
    team().run(call, &work);
}

}  // namespace

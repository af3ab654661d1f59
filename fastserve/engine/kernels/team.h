// The thread pool of the kernels: a team with barriers that never spins for long.
//
// A step of a model is hundreds of small jobs with a barrier after each. Threads that sleep at each barrier wake too
// late, and threads that spin between steps take the cores from the processes that serve HTTP. So members spin (and
// soon yield) while a job runs and for a moment after it, and sleep otherwise.
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

// Calls `done` until it is true. Yields after a while, because the thread that is waited for may need this core.
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

    // Barrier: all members call this; it returns once all have.
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

    // All members call this with the same size. Returns shared memory that is valid until the next call.
    char* scratch(size_t bytes) {
        if (scratch_.size() < bytes) {
            meet();  // all have read the size before one changes it
            share(1, 1, [&](int64_t) { scratch_.resize(bytes); });
        }
        return scratch_.data();
    }

    // All members call this with the same arguments: runs work(0) to work(count - 1) on them, and meets at the end. A
    // free member takes a part of the remaining range, at least `grain` items: long parts first, because memory is read
    // fastest in order, and short ones at the end, so that no member waits long. Results do not depend on the member.
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
    // On separate cache lines: one is written by a member while others read another.
    alignas(64) std::atomic<uint64_t> epoch_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<char> scratch_;
};

// The team of the next job. Teams are never destroyed: another thread may still run its job on the one before.
inline std::atomic<Team*>& team_slot() {
    static std::atomic<Team*> team{new Team(1)};
    return team;
}

// Whether this thread runs kernels without the team, because several threads share the work.
inline thread_local bool alone = false;

// Held by the caller that uses the team, which serves one at a time.
inline std::mutex& team_mutex() {
    static std::mutex mutex;
    return mutex;
}

// Runs work(Team&) on all members, or on the caller alone while another thread uses the team.
template <class Work>
inline void on_team(Work work) {
    std::unique_lock<std::mutex> lock(team_mutex(), std::defer_lock);
    if (alone || !lock.try_lock()) {
        Team single(1);
        work(single);
        return;
    }
    // All members work on the team of the job, whatever the slot holds meanwhile.
    struct Job {
        Work& work;
        Team& team;
    } job{work, *team_slot().load()};
    job.team.run(
        [](void* context) {
            Job& job = *static_cast<Job*>(context);
            job.work(job.team);
        },
        &job);
}

}  // namespace

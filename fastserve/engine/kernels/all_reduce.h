// Exchanges between the ranks of a model, which are processes of one machine, over shared memory. Ranks of other machines
// have slots here too: a relay (ranks/network.py) sends the parts of this machine's ranks and writes those of the others.
//
// Each rank writes its part into its own slot, says so in its own word, waits for the words of the others, and reads all
// slots in rank order: so all ranks get the same bits. Two sets of slots alternate, so one barrier is enough: a rank can
// be at most one exchange ahead, since it passes the next barrier only when all others have read the last slots.
//
// A wait ends when the others have arrived, when a rank has been declared lost, or at the deadline. In the last two cases
// this and all later waits of the process fail at once. The caller finishes its work with whatever the slots hold, and
// reports the loss at its end: so threads of a team that learn of it at different points still meet at all barriers.
#pragma once

#include <climits>

#include "simd.h"
#include "team.h"

#ifdef __linux__
#include <ctime>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int MAX_RANKS = 64;
constexpr int64_t HEADER_BYTES = 16384;
// About 50 us. Spinning without yielding was not faster where each rank has cores of its own, and keeps the core from the
// other rank where they share one. A rank that waits longer leaves its core to whoever keeps the other from its own.
constexpr int YIELDS_BEFORE_SLEEP = 200;
constexpr int64_t SLEEP_NS = 50'000'000;

enum Loss { NONE = 0, DECLARED = 1, TOO_LATE = 2, DIFFERENT_CALLS = 3 };

// In shared memory, zero at first. The words that a rank writes are on cache lines of its own.
struct RankWords {
    alignas(CACHE_LINE) std::atomic<uint32_t> arrived;  // exchanges that this rank has written its part of
    std::atomic<int64_t> sizes[2];                      // of the last two exchanges, the same on all ranks
    std::atomic<int64_t> num_bytes[2];                  // of its parts in its slots
    alignas(CACHE_LINE) uint64_t progress[2];           // written and read by segment.py
};
struct Header {
    alignas(CACHE_LINE) std::atomic<uint32_t> lost;     // not 0: a rank has been declared lost
    alignas(CACHE_LINE) std::atomic<uint32_t> asleep;   // threads that sleep until a rank arrives
    RankWords ranks[MAX_RANKS];
};
static_assert(sizeof(Header) <= HEADER_BYTES && sizeof(RankWords) == 2 * CACHE_LINE);  // as in segment.py
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

// This process's end.
struct Ranks {
    Header* header;              // followed by slots [2][size][capacity]
    int64_t rank, size;
    int64_t capacity;            // bytes of a slot
    double timeout_s;            // longest wait for another rank
    std::atomic<uint32_t> done;  // exchanges so far
    std::atomic<int32_t> loss;
};

inline char* slot_of(const Ranks& ranks, uint32_t exchange, int64_t rank) {
    return (char*)ranks.header + HEADER_BYTES + ((exchange & 1) * ranks.size + rank) * ranks.capacity;
}

inline void sleep_on(std::atomic<uint32_t>& word, uint32_t seen) {
#ifdef __linux__
    const timespec most = {0, SLEEP_NS};
    syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAIT, seen, &most, nullptr, 0);
#else
    std::this_thread::sleep_for(std::chrono::microseconds(100));
#endif
}

inline void wake_all(std::atomic<uint32_t>& word) {
#ifdef __linux__
    syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

inline bool wait_for(Ranks& ranks, int64_t rank, uint32_t exchange) {
    Header& header = *ranks.header;
    std::atomic<uint32_t>& word = header.ranks[rank].arrived;
    // The difference, because the count wraps around.
    const auto has_arrived = [&] { return int32_t(word.load(std::memory_order_acquire) - exchange) > 0; };
    // A process that was itself stopped or frozen counts that as one sleep: meanwhile others could not be heard.
    auto last = std::chrono::steady_clock::now();
    double waited_s = 0;
    for (int i = 0;; ++i) {
        if (has_arrived()) return true;
        if (ranks.loss.load(std::memory_order_relaxed)) return false;
        if (header.lost.load(std::memory_order_relaxed)) {
            ranks.loss.store(DECLARED, std::memory_order_relaxed);
            return false;
        }
        if (i < YIELDS_BEFORE_SLEEP) {
            sched_yield();
            continue;
        }
        const auto now = std::chrono::steady_clock::now();
        waited_s += std::min(std::chrono::duration<double>(now - last).count(), 2e-9 * SLEEP_NS);
        last = now;
        if (waited_s > ranks.timeout_s) {
            ranks.loss.store(TOO_LATE, std::memory_order_relaxed);
            return false;
        }
        header.asleep.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t seen = word.load(std::memory_order_seq_cst);
        if (int32_t(seen - exchange) <= 0) sleep_on(word, seen);
        header.asleep.fetch_sub(1, std::memory_order_relaxed);
    }
}

// A rank's part of an exchange is in its slot.
inline void announce_part(Ranks& ranks, int64_t rank, uint32_t exchange, int64_t size, int64_t num_bytes) {
    RankWords& words = ranks.header->ranks[rank];
    words.sizes[exchange & 1].store(size, std::memory_order_relaxed);
    words.num_bytes[exchange & 1].store(num_bytes, std::memory_order_relaxed);
    words.arrived.store(exchange + 1, std::memory_order_seq_cst);
    if (ranks.header->asleep.load(std::memory_order_seq_cst)) wake_all(words.arrived);
}

// Barrier of an exchange: this rank's part, of so many bytes, is in its slot; returns once all parts are. `size` must be
// the same on all ranks. All threads of a team call it, after they have met.
inline void meet_ranks(Ranks& ranks, uint32_t exchange, int64_t size, int64_t num_bytes) {
    if (ranks.loss.load(std::memory_order_relaxed)) return;
    announce_part(ranks, ranks.rank, exchange, size, num_bytes);
    for (int64_t r = 0; r < ranks.size; ++r) {
        if (r == ranks.rank) continue;
        if (!wait_for(ranks, r, exchange)) return;
        if (ranks.header->ranks[r].sizes[exchange & 1].load(std::memory_order_relaxed) != size)
            ranks.loss.store(DIFFERENT_CALLS, std::memory_order_relaxed);
    }
}

// Sum over ranks, in rank order, of 16 floats at an index of the parts of an exchange.
inline Vec sum_of_parts(const Ranks& ranks, uint32_t exchange, int64_t at, int count) {
    Vec sum = load_some((const float*)slot_of(ranks, exchange, 0) + at, count);
    for (int64_t r = 1; r < ranks.size; ++r) sum += load_some((const float*)slot_of(ranks, exchange, r) + at, count);
    return sum;
}

// Sums of `count` floats over all ranks.
inline void all_reduce_of(Ranks& ranks, const float* part, float* sums, int64_t count) {
    constexpr int64_t AT_ONCE = 1024;
    const int64_t most = ranks.capacity / int64_t(sizeof(float));
    on_team([&](Team& team) {
        uint32_t exchange = ranks.done.load(std::memory_order_relaxed);
        for (int64_t begin = 0; begin < count; begin += most, ++exchange) {
            const int64_t here = std::min(most, count - begin);
            float* slot = (float*)slot_of(ranks, exchange, ranks.rank);
            const auto each = [&](auto work) {
                team.share((here + AT_ONCE - 1) / AT_ONCE, 8, [&](int64_t i) {
                    work(i * AT_ONCE, std::min((i + 1) * AT_ONCE, here));
                });
            };
            each([&](int64_t from, int64_t to) {
                std::memcpy(slot + from, part + begin + from, (to - from) * sizeof(float));
            });
            meet_ranks(ranks, exchange, here, here * int64_t(sizeof(float)));
            each([&](int64_t from, int64_t to) {
                for (int64_t i = from; i < to; i += LANES) {
                    const int some = int(std::min<int64_t>(LANES, to - i));
                    store_some(sums + begin + i, sum_of_parts(ranks, exchange, i, some), some);
                }
            });
        }
        ranks.done.store(exchange, std::memory_order_relaxed);
    });
}

// Each rank's bytes, one after the other. `sizes`: bytes of each rank's part.
inline void all_gather_of(Ranks& ranks, const char* part, char* all, const int64_t* sizes) {
    const int64_t longest = *std::max_element(sizes, sizes + ranks.size);
    uint32_t exchange = ranks.done.load(std::memory_order_relaxed);
    const auto rest_of = [&](int64_t r, int64_t begin) {
        return std::max<int64_t>(0, std::min(ranks.capacity, sizes[r] - begin));
    };
    int64_t begin = 0;
    do {
        std::memcpy(slot_of(ranks, exchange, ranks.rank), part + begin, rest_of(ranks.rank, begin));
        meet_ranks(ranks, exchange, longest, rest_of(ranks.rank, begin));
        char* to = all;
        for (int64_t r = 0; r < ranks.size; to += sizes[r++])
            std::memcpy(to + begin, slot_of(ranks, exchange, r), rest_of(r, begin));
        begin += ranks.capacity;
        ++exchange;
    } while (begin < longest);
    ranks.done.store(exchange, std::memory_order_relaxed);
}

// For a relay: wait for a rank's part of an exchange. False if a rank was lost.
inline bool find_part(Ranks& ranks, int64_t rank, uint32_t exchange, int64_t* size, int64_t* num_bytes) {
    if (!wait_for(ranks, rank, exchange)) return false;
    *size = ranks.header->ranks[rank].sizes[exchange & 1].load(std::memory_order_relaxed);
    *num_bytes = ranks.header->ranks[rank].num_bytes[exchange & 1].load(std::memory_order_relaxed);
    return true;
}

// For a relay: write the part of a rank of another machine. That rank sends its part of an exchange once it has all parts
// of the one before, so no rank reads the slot any more.
inline void deliver_part(Ranks& ranks, int64_t rank, uint32_t exchange, int64_t size, const char* part,
                         int64_t num_bytes) {
    std::memcpy(slot_of(ranks, exchange, rank), part, num_bytes);
    announce_part(ranks, rank, exchange, size, num_bytes);
}

}  // namespace

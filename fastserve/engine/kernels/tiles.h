// Weight layout, and tiles: some tokens times some outputs, with the sums in registers.
//
// A dense weight (out, in) is stored in groups of 16 outputs: [out / 16][in / PAIR][16][PAIR]. A vector register holds
// the same input (or pair of inputs, where the processor multiplies pairs of bfloat16) of 16 outputs. With one token each
// group is read once, in order, at memory bandwidth; with many tokens they share a group that is in the caches.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;  // with 2 groups: 24 of 32 registers are sums
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 3;   // a group is 4 registers of 32
#else
constexpr int TILE_ROWS = 1;   // a group is 2 registers of 16
#endif

constexpr int64_t CHUNK_ROWS = 8 * TILE_ROWS;  // maximum tokens in one work item

constexpr int UNIT = 4;  // groups of 16 outputs of a quantized weight that are computed together

template <class T> constexpr int PAIR = 1;
#ifdef __AVX512BF16__
template <> inline constexpr int PAIR<BFloat16> = 2;
#endif

struct Weight {
    const void* data;      // dense in the layout above, or codes in that of quantized.h
    const void* bias;      // [out] or null
    int64_t out, in;
    int64_t bits;          // bits of a code, 8 or 4; 0: dense. The other fields are for quantized weights only
    int64_t group;         // inputs that share a scale; the last group may have fewer
    const float* scales;   // [out / 64][groups][64]
    const float* offsets;  // the same, or null
    const float* table;    // value of each code: 16, or 128 magnitudes, with the sign in the code's highest bit
    const int32_t* order;  // [in] the input to which each column of codes belongs, or null
};

template <class T>
inline void multiply_add(Vec& sum, const T* weight, const T* x) {
#ifdef __AVX512BF16__
    if constexpr (PAIR<T> == 2) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_set1_epi32(pair));
        return;
    }
#endif
    sum += to_float(*x) * load(weight);
}

// Memory to prefetch while a tile computes: weights so many elements further on (0: none), and cache lines of pages
// anywhere, from `line` to `end`, counted from the first page's.
struct Ahead {
    int64_t weights = 0;
    const char* const* pages = nullptr;
    int64_t line = 0, end = 0;
    int shift = 0;  // a page has 2^shift lines

    void prefetch_line() {
        __builtin_prefetch(pages[line >> shift] + (line & ((int64_t(1) << shift) - 1)) * CACHE_LINE, 0, 2);
        ++line;
    }
};

// GROUPS groups times ROWS tokens: sums[ROWS][GROUPS], starting from `out` with ON, else from zero. With FETCH, `ahead` is
// prefetched, a line of the pages for each input: many at once would wait for each other. Not inlined, so that compilers
// keep all sums in registers.
template <class T, int GROUPS, int ROWS, bool ON, bool FETCH>
__attribute__((noinline)) void tile(const T* x, int64_t x_stride, const T* const* weights, int64_t in, Vec* out,
                                    Ahead ahead) {
    if (FETCH)
        while (ahead.line + in / PAIR<T> < ahead.end) ahead.prefetch_line();
    Vec sums[ROWS][GROUPS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) sums[r][g] = ON ? out[r * GROUPS + g] : Vec{};
    for (int64_t i = 0; i < in; i += PAIR<T>) {
        if (FETCH) {
            for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(weights[g] + ahead.weights + i * LANES, 0, 2);
            if (ahead.line < ahead.end) ahead.prefetch_line();
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; ++g) multiply_add(sums[r][g], weights[g] + i * LANES, x + r * x_stride + i);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) out[r * GROUPS + g] = sums[r][g];
}

template <class T, int GROUPS, bool ON, bool FETCH = false, int ROWS = TILE_ROWS>
inline void tile_of(int64_t rows, const T* x, int64_t x_stride, const T* const* weights, int64_t in, Vec* sums,
                    const Ahead& ahead = {}) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS)
            return tile_of<T, GROUPS, ON, FETCH, ROWS - 1>(rows, x, x_stride, weights, in, sums, ahead);
    }
    tile<T, GROUPS, ROWS, ON, FETCH>(x, x_stride, weights, in, sums, ahead);
}

// Calls work(first row, rows) for tiles of nearly the same size.
template <int MAX_TILE = TILE_ROWS, class Work>
inline void for_tiles(int64_t rows, Work work) {
    const int64_t count = (rows + MAX_TILE - 1) / MAX_TILE;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = rows * i / count;
        work(begin, rows * (i + 1) / count - begin);
    }
}

// The pages that products with nothing to add prefetch.
struct NoPages {
    Ahead operator()(int64_t, int64_t) const { return {}; }
};

// `rows` tokens; calls put(row, group, sums). The first tile is bound by memory, the others by computing; so the last
// one, if it is not the first, prefetches the weights `ahead` (0: none), with which the next call begins. Each
// prefetches the lines of find_pages(first row, rows).
template <class T, int GROUPS, class Put, class FindPages = NoPages>
inline void tiles(const T* x, int64_t x_stride, int64_t rows, const T* const* weights, int64_t in, int64_t ahead, Put put,
                  FindPages find_pages = {}) {
    for_tiles(rows, [&](int64_t begin, int64_t count) {
        Vec sums[TILE_ROWS * GROUPS];
        const T* from = x + begin * x_stride;
        Ahead fetched = find_pages(begin, count);
        if (begin && begin + count == rows) fetched.weights = ahead;
        if (fetched.weights || fetched.line < fetched.end)
            tile_of<T, GROUPS, false, true>(count, from, x_stride, weights, in, sums, fetched);
        else tile_of<T, GROUPS, false>(count, from, x_stride, weights, in, sums);
        for (int i = 0; i < count * GROUPS; ++i) put(begin + i / GROUPS, i % GROUPS, sums[i]);
    });
}

}  // namespace

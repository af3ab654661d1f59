// Products with weights, y = x W^T, for any number of tokens from one layout of the weight.
//
// A weight of (out, in) lies in groups of 16 outputs: [out / 16][in / PAIR][16][PAIR]. A vector register holds the same
// input (or pair of inputs, where the processor multiplies pairs of bfloat16) of 16 outputs. One token reads each group
// once, in order, as fast as memory gives it; many tokens share a group that has come to the caches, in tiles that keep
// their sums in registers. Each output is one sum in the order of the inputs, whatever the tile, so a token's result
// does not depend on the tokens beside it.
#pragma once

#include "simd.h"
#include "team.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;  // with 2 groups: 24 of 32 registers are sums
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 3;   // a group is 4 registers of 32
#else
constexpr int TILE_ROWS = 1;   // a group is 2 registers of 16
#endif
constexpr int64_t CHUNK_ROWS = 8 * TILE_ROWS;  // of many tokens, what one piece of work takes on

template <class T> constexpr int PAIR = 1;
#ifdef __AVX512BF16__
template <> inline constexpr int PAIR<BFloat16> = 2;
#endif

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

// GROUPS groups times ROWS tokens: sums[ROWS][GROUPS]. Not inlined: compilers then keep all sums in registers.
template <class T, int GROUPS, int ROWS>
__attribute__((noinline)) void tile(const T* x, int64_t x_stride, const T* const* weights, int64_t in, Vec* out) {
    Vec sums[ROWS][GROUPS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) sums[r][g] = Vec{};
    for (int64_t i = 0; i < in; i += PAIR<T>)
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; ++g) multiply_add(sums[r][g], weights[g] + i * LANES, x + r * x_stride + i);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) out[r * GROUPS + g] = sums[r][g];
}

template <class T, int GROUPS, int ROWS = TILE_ROWS, class Put>
inline void tile_of(int64_t rows, const T* x, int64_t x_stride, const T* const* weights, int64_t in, Put put) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return tile_of<T, GROUPS, ROWS - 1>(rows, x, x_stride, weights, in, put);
    }
    Vec sums[ROWS * GROUPS];
    tile<T, GROUPS, ROWS>(x, x_stride, weights, in, sums);
    for (int i = 0; i < ROWS * GROUPS; ++i) put(i / GROUPS, i % GROUPS, sums[i]);
}

// `rows` tokens in tiles of nearly the same size.
template <class T, int GROUPS, class Put>
inline void tiles(const T* x, int64_t x_stride, int64_t rows, const T* const* weights, int64_t in, Put put) {
    const int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
        tile_of<T, GROUPS>(end - begin, x + begin * x_stride, x_stride, weights, in,
                           [&](int r, int g, Vec sums) { put(begin + r, g, sums); });
    }
}

struct Weight {
    const void* data;  // in the layout above
    const void* bias;  // [out] or null
    int64_t out, in;
};

// The products of one input with `count` weights. Calls put(which, row, first output, sums, outputs) for each 16.
template <class T, class Put>
inline void products(Team& team, const T* x, int64_t x_stride, int64_t rows, const Weight* weights, int count, Put put) {
    int64_t begins[9] = {0};
    for (int w = 0; w < count; ++w) begins[w + 1] = begins[w] + (weights[w].out + 2 * LANES - 1) / (2 * LANES);
    const int64_t chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    team.share(begins[count] * chunks, 1, [&](int64_t i) {
        const int64_t unit = i / chunks, chunk = i % chunks;
        int which = 0;
        while (unit >= begins[which + 1]) ++which;
        const Weight& weight = weights[which];
        const int64_t first = (unit - begins[which]) * 2 * LANES;
        const T* from = (const T*)weight.data + first * weight.in;
        const T* both[2] = {from, from + LANES * weight.in};
        const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks;
        auto done = [&](int64_t r, int g, Vec sums) {
            const int64_t at = first + g * LANES;
            const int outs = int(std::min<int64_t>(LANES, weight.out - at));
            if (weight.bias) sums += load_some((const T*)weight.bias + at, outs);
            put(which, begin + r, at, sums, outs);
        };
        if (weight.out - first > LANES) tiles<T, 2>(x + begin * x_stride, x_stride, end - begin, both, weight.in, done);
        else tiles<T, 1>(x + begin * x_stride, x_stride, end - begin, both, weight.in, done);
    });
}

// The products with two weights of the same shape, side by side: put(row, first output, gate sums, up sums, outputs).
template <class T, class Put>
inline void gated_products(Team& team, const T* x, int64_t x_stride, int64_t rows, const Weight& gate, const Weight& up,
                           Put put) {
    const int64_t groups = (gate.out + LANES - 1) / LANES;
    const int64_t chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    team.share(groups * chunks, 1, [&](int64_t i) {
        const int64_t first = i / chunks * LANES, chunk = i % chunks;
        const T* both[2] = {(const T*)gate.data + first * gate.in, (const T*)up.data + first * gate.in};
        const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks;
        const int outs = int(std::min<int64_t>(LANES, gate.out - first));
        Vec gate_sums;
        tiles<T, 2>(x + begin * x_stride, x_stride, end - begin, both, gate.in, [&](int64_t r, int g, Vec sums) {
            if (g == 0) gate_sums = sums;
            else put(begin + r, first, gate_sums, sums, outs);
        });
    });
}

// PAIR inputs of one output, moved as one.
template <class T> struct Pair { T values[PAIR<T>]; };

// (out, in) as a checkpoint has it -> the layout above. Outputs beyond the last are zero. `in` is a multiple of PAIR.
template <class T>
inline void pack(Team& team, const T* weight, T* to, int64_t out, int64_t in) {
    const int64_t pairs = in / PAIR<T>;
    team.share((out + LANES - 1) / LANES, 1, [&](int64_t group) {
        Pair<T>* base = (Pair<T>*)to + group * LANES * pairs;
        const Pair<T>* from = (const Pair<T>*)weight + group * LANES * pairs;
        const int lanes = int(std::min<int64_t>(LANES, out - group * LANES));
        if (lanes < LANES) std::memset((void*)base, 0, LANES * pairs * sizeof(Pair<T>));
        for (int64_t i = 0; i < pairs; ++i)
            for (int lane = 0; lane < lanes; ++lane) base[i * LANES + lane] = from[lane * pairs + i];
    });
}

template <class T>
inline void unpack(Team& team, const T* from, T* weight, int64_t out, int64_t in) {
    const int64_t pairs = in / PAIR<T>;
    team.share((out + LANES - 1) / LANES, 1, [&](int64_t group) {
        const Pair<T>* base = (const Pair<T>*)from + group * LANES * pairs;
        Pair<T>* to = (Pair<T>*)weight + group * LANES * pairs;
        const int lanes = int(std::min<int64_t>(LANES, out - group * LANES));
        for (int lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < pairs; ++i) to[lane * pairs + i] = base[i * LANES + lane];
    });
}

template <class T>
inline void linear_of(const T* x, int64_t x_stride, int64_t rows, const Weight& weight, T* y) {
    on_team([&](Team& team) {
        products(team, x, x_stride, rows, &weight, 1, [&](int, int64_t row, int64_t at, Vec sums, int outs) {
            store_some(y + row * weight.out + at, sums, outs);
        });
    });
}

}  // namespace

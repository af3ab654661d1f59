// Matrix products with weights, y = x W^T, for any number of tokens with the same weight layout.
//
// Each output is one sum in the order of the inputs, whatever the tile, so a token's result does not depend on other
// tokens.
#pragma once

#include "quantized.h"
#include "team.h"
#include "tiles.h"

namespace {

inline int64_t lanes_of(const Weight& weight) { return (weight.out + LANES - 1) / LANES; }
inline int unit_of(const Weight& weight) { return weight.bits ? UNIT : 2; }

// `rows` tokens times `count` groups of 16 outputs of a unit, from group `first` on. Calls put(row, group, sums).
template <class T, class Put, class FindPages = NoPages>
inline void unit_sums(const Weight& weight, int64_t first, int count, const Input<T>& input, int64_t rows, Put put,
                      FindPages find_pages = {}) {
    if (weight.bits)
        for (Ahead ahead = find_pages(0, rows); ahead.line < ahead.end;) ahead.prefetch_line();
    if (weight.bits == 8) return code_sums<T, 8>(weight, first / UNIT, count, input, rows, put);
    if (weight.bits == 4) return code_sums<T, 4>(weight, first / UNIT, count, input, rows, put);
    for (int g = 0; g < count; g += 2) {
        const T* from = (const T*)weight.data + (first + g) * LANES * weight.in;
        const T* both[2] = {from, from + LANES * weight.in};
        auto done = [&](int64_t r, int one, Vec sums) { put(r, g + one, sums); };
        if (count - g >= 2) tiles<T, 2>(input.x, input.stride, rows, both, weight.in, 2 * LANES * weight.in, done, find_pages);
        else tiles<T, 1>(input.x, input.stride, rows, both, weight.in, 0, done, find_pages);
    }
}

// Some rows and outputs of products: those of `sites` weights from the `first_site`th on, up to `columns` times 16 outputs
// of each from `output` on. `unit` of `units`: its place in the order of all outputs. `all_rows`: of the products.
struct Region {
    int first_site, sites;
    int64_t begin, end, output, columns, unit, units, all_rows;
};

// What products ask for values that `put` adds, where there are none.
struct NoAddend {
    void find(const Region&) {}
    Ahead pages(int64_t, int64_t) const { return {}; }
};

// Products of one input with `count` weights. Calls put(which, row, first output, sums, outputs) for each 16 outputs, and
// before those of a region addend.find(region), then addend.pages(first row, rows) for what to prefetch.
template <class T, class Put, class Addend>
inline void products(Team& team, const T* x, int64_t x_stride, int64_t rows, const Weight* weights, int count, Put put,
                     Addend& addend) {
    Input<T> inputs[8];
    make_inputs(team, x, x_stride, rows, weights, count, inputs);
    int64_t begins[9] = {0};
    for (int w = 0; w < count; ++w)
        begins[w + 1] = begins[w] + (lanes_of(weights[w]) + unit_of(weights[w]) - 1) / unit_of(weights[w]);
    const int64_t chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    team.share(begins[count] * chunks, 1, [&](int64_t i) {
        const int64_t unit = i / chunks, chunk = i % chunks;
        int which = 0;
        while (unit >= begins[which + 1]) ++which;
        const Weight& weight = weights[which];
        const int64_t first = (unit - begins[which]) * unit_of(weight);
        const int groups = int(std::min<int64_t>(unit_of(weight), lanes_of(weight) - first));
        const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks;
        auto done = [&](int64_t r, int g, Vec sums) {
            const int64_t at = (first + g) * LANES;
            const int outs = int(std::min<int64_t>(LANES, weight.out - at));
            if (weight.bias) sums += load_some((const T*)weight.bias + at, outs);
            put(which, begin + r, at, sums, outs);
        };
        addend.find({which, 1, begin, end, first * LANES, unit_of(weight), unit, begins[count], rows});
        unit_sums(weight, first, groups, inputs[which].from(begin, weight), end - begin, done,
                  [&](int64_t row, int64_t some) { return addend.pages(begin + row, some); });
    });
}

// Products of one input with two weights of the same shape. Calls put(row, first output, gate sums, up sums, outputs), and
// those of the addend as above.
template <class T, class Put, class Addend>
inline void gated_products(Team& team, const T* x, int64_t x_stride, int64_t rows, const Weight& gate, const Weight& up,
                           Put put, Addend& addend) {
    const Weight weights[2] = {gate, up};
    Input<T> inputs[2];
    make_inputs(team, x, x_stride, rows, weights, 2, inputs);
    const bool are_dense = !gate.bits && !up.bits;
    const int unit = are_dense ? 1 : UNIT;
    const int64_t groups = lanes_of(gate);
    const int64_t chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    team.share((groups + unit - 1) / unit * chunks, 1, [&](int64_t i) {
        const int64_t first = i / chunks * unit, chunk = i % chunks;
        const int64_t begin = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - begin;
        auto done = [&](int64_t r, int64_t g, Vec gate_sums, Vec up_sums) {
            const int64_t at = (first + g) * LANES;
            put(begin + r, at, gate_sums, up_sums, int(std::min<int64_t>(LANES, gate.out - at)));
        };
        addend.find({0, 2, begin, begin + count, first * LANES, unit, i / chunks, (groups + unit - 1) / unit, rows});
        const auto find_pages = [&](int64_t row, int64_t some) { return addend.pages(begin + row, some); };
        if (are_dense) {
            const T* both[2] = {(const T*)gate.data + first * LANES * gate.in, (const T*)up.data + first * LANES * gate.in};
            Vec gate_sums;
            auto take = [&](int64_t r, int g, Vec sums) {
                if (g == 0) gate_sums = sums;
                else done(r, 0, gate_sums, sums);
            };
            tiles<T, 2>(x + begin * x_stride, x_stride, count, both, gate.in, LANES * gate.in, take, find_pages);
            return;
        }
        Vec gate_sums[CHUNK_ROWS * UNIT];
        const int here = int(std::min<int64_t>(unit, groups - first));
        unit_sums(gate, first, here, inputs[0].from(begin, gate), count,
                  [&](int64_t r, int g, Vec sums) { gate_sums[r * UNIT + g] = sums; }, find_pages);
        unit_sums(up, first, here, inputs[1].from(begin, up), count,
                  [&](int64_t r, int g, Vec sums) { done(r, g, gate_sums[r * UNIT + g], sums); });
    });
}

// PAIR inputs of one output, copied together.
template <class T> struct Pair { T values[PAIR<T>]; };

// (out, in) as in a checkpoint -> the layout of tiles.h, with zeros for the padding outputs. `in`: a multiple of PAIR.
template <class T>
inline void pack(Team& team, const T* weight, T* to, int64_t out, int64_t in) {
    const int64_t pairs = in / PAIR<T>;
    team.share((out + LANES - 1) / LANES, 1, [&](int64_t group) {
        Pair<T>* base = (Pair<T>*)to + group * LANES * pairs;
        const Pair<T>* from = (const Pair<T>*)weight + group * LANES * pairs;
        const int lanes = int(std::min<int64_t>(LANES, out - group * LANES));
        if (lanes < LANES) std::memset((void*)base, 0, LANES * pairs * sizeof(Pair<T>));
        int64_t i = 0;
        if constexpr (sizeof(Pair<T>) == 4)
            for (; lanes == LANES && i + LANES <= pairs; i += LANES)
                transpose((const uint32_t*)(from + i), pairs, (uint32_t*)(base + i * LANES), LANES);
        for (; i < pairs; ++i)
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
        int64_t i = 0;
        if constexpr (sizeof(Pair<T>) == 4)
            for (; lanes == LANES && i + LANES <= pairs; i += LANES)
                transpose((const uint32_t*)(base + i * LANES), LANES, (uint32_t*)(to + i), pairs);
        for (; i < pairs; ++i)
            for (int lane = 0; lane < lanes; ++lane) to[lane * pairs + i] = base[i * LANES + lane];
    });
}

// The weights of one output, in the order of the inputs.
template <class T>
inline void row_of(const Weight& weight, int64_t output, T* to) {
    if (weight.bits == 8) return code_row<T, 8>(weight, output, to);
    if (weight.bits == 4) return code_row<T, 4>(weight, output, to);
    const int64_t pairs = weight.in / PAIR<T>;
    const Pair<T>* from = (const Pair<T>*)weight.data + output / LANES * LANES * pairs + output % LANES;
    for (int64_t i = 0; i < pairs; ++i) ((Pair<T>*)to)[i] = from[i * LANES];
}

template <class T, class Out>
inline void linear_of(const T* x, int64_t x_stride, int64_t rows, const Weight& weight, Out* y) {
    on_team([&](Team& team) {
        NoAddend none;
        products(team, x, x_stride, rows, &weight, 1, [&](int, int64_t row, int64_t at, Vec sums, int outs) {
            store_some(y + row * weight.out + at, sums, outs);
        }, none);
    });
}

}  // namespace

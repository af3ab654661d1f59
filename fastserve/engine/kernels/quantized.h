// Quantized weights of 8 or 4 bits: value = table[code] * scale - offset, with a scale (and perhaps an offset) for each
// group of inputs of an output. Activations are not quantized.
//
// Tables of integers are exact in bfloat16, so codes become bfloat16 in registers, table values times activations are
// summed as with a dense weight, and each group's sum is scaled in float32:
//     y = sum over groups of (scale * sum(table[code] x) - offset * sum(x)).
//
// Codes are stored in blocks of 64 bytes for 16 outputs and 4 inputs (8 bits) or 8 inputs (4 bits), with four groups of
// outputs adjacent: [out / 64][in / inputs][4][64]. The four are computed together, so one token reads memory in order.
// A block of 4 bits is a word of 32 bits for each output: bits 4n.. are input 2n, bits 16 + 4n.. are input 2n + 1.
// A block of 8 bits is [4][2 pairs of inputs][4 outputs][2 inputs].
#pragma once

#include "team.h"
#include "tiles.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define DECODES_IN_REGISTERS 1
#else
#define DECODES_IN_REGISTERS 0
#endif

namespace {

constexpr int BLOCK = 64;
template <int BITS> constexpr int BLOCK_INPUTS = 32 / BITS;
constexpr int CODE_TILE_ROWS = 6;    // times UNIT: 24 of 32 registers are sums
constexpr int64_t SPREAD = 64;       // inputs that are decoded at a time where codes are not decoded in registers

// Position of the code of (output, input) in its block: the byte, and the shift in it.
template <int BITS>
inline int byte_of(int lane, int input) {
    if (BITS == 4) return lane * 4 + input % 2 * 2 + input / 4;
    return lane / 4 * 16 + input / 2 * 8 + lane % 4 * 2 + input % 2;
}
template <int BITS>
inline int shift_of(int input) {
    return BITS == 4 ? input / 2 % 2 * 4 : 0;
}

inline int64_t groups_of(const Weight& weight) { return (weight.in + weight.group - 1) / weight.group; }
inline int64_t code_bytes(const Weight& weight) { return UNIT * LANES * weight.in * weight.bits / 8; }  // of a unit

// ---- codes to values ------------------------------------------------------------------------------------------------

#if DECODES_IN_REGISTERS
// A block as pairs of bfloat16, as dense weights have them.
template <int BITS> struct Codebook;

template <>
struct Codebook<4> {
    __m512i table;  // stored twice, so that the lowest bit of the next code does not matter

    explicit Codebook(const float* values) {
        BFloat16 both[32];
        store(both, load(values));
        store(both + LANES, load(values));
        table = _mm512_loadu_si512(both);
    }
    void operator()(const uint8_t* block, __m512bh* pairs) const {
        const __m512i codes = _mm512_loadu_si512(block);
        pairs[0] = (__m512bh)_mm512_permutexvar_epi16(codes, table);
        pairs[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        pairs[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        pairs[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    }
};

template <>
struct Codebook<8> {
    __m512i low[2], high[2];  // bytes of the magnitudes

    explicit Codebook(const float* values) {
        uint8_t bytes[2][128];
        for (int i = 0; i < 128; i += 2 * LANES) {
            BFloat16 some[2 * LANES];
            store(some, load(values + i));
            store(some + LANES, load(values + i + LANES));
            const __m512i words = _mm512_loadu_si512(some);
            _mm256_storeu_si256((__m256i*)(bytes[0] + i), _mm512_cvtepi16_epi8(words));
            _mm256_storeu_si256((__m256i*)(bytes[1] + i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
        }
        for (int half = 0; half < 2; ++half) {
            low[half] = _mm512_loadu_si512(bytes[0] + half * 64);
            high[half] = _mm512_loadu_si512(bytes[1] + half * 64);
        }
    }
    void operator()(const uint8_t* block, __m512bh* pairs) const {
        const __m512i codes = _mm512_loadu_si512(block);
        const __m512i lows = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        __m512i highs = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        highs = _mm512_ternarylogic_epi32(highs, codes, _mm512_set1_epi8(-128), 0xf8);  // | (codes & sign)
        pairs[0] = (__m512bh)_mm512_unpacklo_epi8(lows, highs);
        pairs[1] = (__m512bh)_mm512_unpackhi_epi8(lows, highs);
    }
};
#endif

// Bits above those of the code do not matter.
template <int BITS>
inline float code_value(const float* table, int code) {
    if (BITS == 4) return table[code & 15];
    return code & 128 ? -table[code & 127] : table[code & 127];
}

// Codes of `inputs` inputs of a unit as dense weights, UNIT groups of `inputs` inputs.
template <class T, int BITS>
struct Spread {
    const float* table;

    explicit Spread(const float* table) : table(table) {}

    __attribute__((noinline)) void operator()(const uint8_t* codes, int64_t inputs, T* to) const {
        constexpr int N = BLOCK_INPUTS<BITS>;
        for (int64_t i = 0; i < inputs; i += N)
            for (int g = 0; g < UNIT; ++g, codes += BLOCK)
                for (int k = 0; k < N; ++k) {
                    T row[LANES];
                    store(row, values(codes, k));
                    T* at = to + g * inputs * LANES + (i + k) / PAIR<T> * PAIR<T> * LANES + k % PAIR<T>;
                    for (int lane = 0; lane < LANES; ++lane) at[lane * PAIR<T>] = row[lane];
                }
    }
    Vec values(const uint8_t* block, int k) const {
        Vec out;
        for (int lane = 0; lane < LANES; ++lane) {
            out[lane] = code_value<BITS>(table, block[byte_of<BITS>(lane, k)] >> shift_of<BITS>(k));
        }
        return out;
    }
};

// ---- inputs ---------------------------------------------------------------------------------------------------------

// Inputs of a product: tokens with their inputs in the order of the weight's columns, and the sums of each group.
template <class T>
struct Input {
    const T* x;
    int64_t stride;
    const float* sums;  // [rows][groups], or null where the weight has no offsets

    Input from(int64_t row, const Weight& weight) const {
        return {x + row * stride, stride, sums ? sums + row * groups_of(weight) : nullptr};
    }
};

template <class T>
inline void fill_input(const Input<T>& input, const Weight& weight, const T* x, int64_t r) {
    if (weight.order) {
        T* to = (T*)input.x + r * input.stride;
        for (int64_t i = 0; i < weight.in; ++i) to[i] = x[weight.order[i]];
        x = to;
    }
    if (!weight.offsets) return;
    float* sums = (float*)input.sums + r * groups_of(weight);
    for (int64_t begin = 0; begin < weight.in; begin += weight.group) {
        const int64_t end = std::min(weight.in, begin + weight.group);
        Vec sum = {};
        for (int64_t i = begin; i < end; i += LANES) sum += load_some(x + i, int(std::min<int64_t>(LANES, end - i)));
        *sums++ = sum_of(sum);
    }
}

// Called by all members of the team. The inputs are valid until the members meet at the end of the product.
template <class T>
inline void make_inputs(Team& team, const T* x, int64_t x_stride, int64_t rows, const Weight* weights, int count,
                        Input<T>* inputs) {
    const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const auto size = [&](const Weight& w) { return w.order ? padded(rows * w.in * int64_t(sizeof(T))) : 0; };
    const auto sums_size = [&](const Weight& w) { return w.offsets ? padded(rows * groups_of(w) * 4) : 0; };
    int64_t bytes = 0;
    for (int w = 0; w < count; ++w) bytes += size(weights[w]) + sums_size(weights[w]);
    char* space = bytes ? team.scratch(bytes) : nullptr;
    for (int w = 0; w < count; ++w) {
        inputs[w] = {weights[w].order ? (const T*)space : x, weights[w].order ? weights[w].in : x_stride, nullptr};
        space += size(weights[w]);
        if (weights[w].offsets) inputs[w].sums = (const float*)space;
        space += sums_size(weights[w]);
    }
    if (bytes)
        team.share(rows, 1, [&](int64_t r) {
            for (int w = 0; w < count; ++w) fill_input(inputs[w], weights[w], x + r * x_stride, r);
        });
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// Pointers to a unit's codes and scales.
struct Unit {
    const uint8_t* codes;
    const float* scales;
    const float* offsets;
    int64_t groups;

    Unit(const Weight& weight, int64_t unit) : groups(groups_of(weight)) {
        const int64_t at = unit * groups * UNIT * LANES;
        codes = (const uint8_t*)weight.data + unit * code_bytes(weight);
        scales = weight.scales + at;
        offsets = weight.offsets ? weight.offsets + at : nullptr;
    }

    // total += the scaled sum of one group of inputs of a row. One function for all tiles, so that a token's result is
    // the same in each.
    template <class T>
    void add(Vec& total, Vec sum, const Input<T>& input, int64_t row, int g, int64_t group) const {
        const int64_t at = (group * UNIT + g) * LANES;
        total = multiplied(sum, load(scales + at), total);
        if (offsets) total = multiplied(load(offsets + at), Vec{} - input.sums[row * groups + group], total);
    }
    static Vec multiplied(Vec a, Vec b, Vec c) {
#ifdef __AVX512F__
        return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
        return a * b + c;
#endif
    }
};

#if DECODES_IN_REGISTERS
// Decodes in registers, once for each tile of rows, which is faster than storing and loading decoded values.
template <int BITS, int ROWS>
__attribute__((noinline)) void code_tile(const Input<BFloat16>& input, const Weight& weight, const Unit& unit,
                                         Vec* out) {
    constexpr int N = BLOCK_INPUTS<BITS>;
    const Codebook<BITS> decode(weight.table);
    const int64_t stride = input.stride, in = weight.in;
    const BFloat16* x = input.x;
    const uint8_t* codes = unit.codes;
    for (int i = 0; i < ROWS * UNIT; ++i) out[i] = Vec{};
    for (int64_t group = 0; group < unit.groups; ++group) {
        Vec sums[ROWS][UNIT];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int g = 0; g < UNIT; ++g) sums[r][g] = Vec{};
        const int64_t end = std::min(in, (group + 1) * weight.group);
        for (int64_t i = group * weight.group; i < end; i += N, codes += UNIT * BLOCK)
#pragma GCC unroll 4
            for (int g = 0; g < UNIT; ++g) {
                __m512bh pairs[N / 2];
                decode(codes + g * BLOCK, pairs);
#pragma GCC unroll 4
                for (int p = 0; p < N / 2; ++p)
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; ++r) {
                        int32_t both;
                        std::memcpy(&both, x + r * stride + i + 2 * p, sizeof both);
                        const __m512bh inputs = (__m512bh)_mm512_set1_epi32(both);
                        sums[r][g] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][g], pairs[p], inputs);
                    }
            }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int g = 0; g < UNIT; ++g) unit.add(out[r * UNIT + g], sums[r][g], input, r, g, group);
    }
}

template <int BITS, int ROWS = CODE_TILE_ROWS>
inline void code_tile_of(int64_t rows, const Input<BFloat16>& input, const Weight& weight, const Unit& unit, Vec* out) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return code_tile_of<BITS, ROWS - 1>(rows, input, weight, unit, out);
    }
    code_tile<BITS, ROWS>(input, weight, unit, out);
}
#endif

// Decodes once for all tokens, SPREAD inputs at a time, into a buffer in the cache.
template <class T, int BITS>
__attribute__((noinline)) void spread_sums(const Weight& weight, const Unit& unit, const Input<T>& input, int64_t rows,
                                           Vec* totals) {
    alignas(64) T dense[UNIT * SPREAD * LANES];
    Vec sums[UNIT / 2][CHUNK_ROWS * 2];
    const Spread<T, BITS> spread(weight.table);
    for (int64_t i = 0; i < rows * UNIT; ++i) totals[i] = Vec{};
    for (int64_t group = 0; group < unit.groups; ++group) {
        const int64_t begin = group * weight.group, end = std::min(weight.in, begin + weight.group);
        for (int64_t at = begin; at < end; at += SPREAD) {
            const int64_t inputs = std::min(SPREAD, end - at);
            spread(unit.codes + at / BLOCK_INPUTS<BITS> * UNIT * BLOCK, inputs, dense);
            for (int half = 0; half < UNIT / 2; ++half) {
                const T* const both[2] = {dense + 2 * half * inputs * LANES, dense + (2 * half + 1) * inputs * LANES};
                for_tiles(rows, [&](int64_t row, int64_t in_tile) {
                    const T* x = input.x + row * input.stride + at;
                    Vec* to = sums[half] + row * 2;
                    if (at == begin) tile_of<T, 2, false>(in_tile, x, input.stride, both, inputs, to);
                    else tile_of<T, 2, true>(in_tile, x, input.stride, both, inputs, to);
                });
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int g = 0; g < UNIT; ++g)
                unit.add(totals[r * UNIT + g], sums[g / 2][r * 2 + g % 2], input, r, g, group);
    }
}

// `rows` (at most CHUNK_ROWS) tokens times the first `count` groups of 16 outputs of a unit. Calls put(row, group, sums).
template <class T, int BITS, class Put>
inline void code_sums(const Weight& weight, int64_t which, int count, const Input<T>& input, int64_t rows, Put put) {
    const Unit unit(weight, which);
#if DECODES_IN_REGISTERS
    if constexpr (PAIR<T> == 2) {
        for_tiles<CODE_TILE_ROWS>(rows, [&](int64_t row, int64_t in_tile) {
            Vec sums[CODE_TILE_ROWS * UNIT];
            code_tile_of<BITS>(in_tile, input.from(row, weight), weight, unit, sums);
            for (int64_t r = 0; r < in_tile; ++r)
                for (int g = 0; g < count; ++g) put(row + r, g, sums[r * UNIT + g]);
        });
        return;
    }
#endif
    Vec totals[CHUNK_ROWS * UNIT];
    spread_sums<T, BITS>(weight, unit, input, rows, totals);
    for (int64_t r = 0; r < rows; ++r)
        for (int g = 0; g < count; ++g) put(r, g, totals[r * UNIT + g]);
}

// The weights of one output, in the order of the inputs.
template <class T, int BITS>
inline void code_row(const Weight& weight, int64_t output, T* to) {
    constexpr int N = BLOCK_INPUTS<BITS>;
    const Unit unit(weight, output / (UNIT * LANES));
    const int in_unit = int(output % (UNIT * LANES)), group = in_unit / LANES, lane = in_unit % LANES;
    for (int64_t i = 0; i < weight.in; ++i) {
        const uint8_t* block = unit.codes + (i / N * UNIT + group) * BLOCK;
        const int code = block[byte_of<BITS>(lane, int(i % N))] >> shift_of<BITS>(int(i % N));
        const int64_t at = i / weight.group * UNIT * LANES + in_unit;
        const float value = code_value<BITS>(weight.table, code) * unit.scales[at];
        store_one(to + (weight.order ? weight.order[i] : i), unit.offsets ? value - unit.offsets[at] : value);
    }
}

// ---- layout ---------------------------------------------------------------------------------------------------------

// Calls work(output, input, byte, shift) for each code.
template <int BITS, class Work>
inline void for_codes(Team& team, int64_t out, int64_t in, Work work) {
    constexpr int N = BLOCK_INPUTS<BITS>;
    team.share((out + LANES - 1) / LANES, 1, [&](int64_t group) {
        const int lanes = int(std::min<int64_t>(LANES, out - group * LANES));
        for (int64_t i = 0; i < in; i += N) {
            const int64_t block = ((group / UNIT * in + i) / N * UNIT + group % UNIT) * BLOCK;
            for (int lane = 0; lane < lanes; ++lane)
                for (int k = 0; k < N; ++k)
                    work(group * LANES + lane, i + k, block + byte_of<BITS>(lane, k), shift_of<BITS>(k));
        }
    });
}

// Packs codes (out, in), a byte each, into blocks that are zero before.
template <int BITS>
inline void pack_codes(Team& team, const uint8_t* codes, uint8_t* to, int64_t out, int64_t in) {
    for_codes<BITS>(team, out, in, [&](int64_t output, int64_t input, int64_t at, int shift) {
        to[at] |= codes[output * in + input] << shift;
    });
}

template <int BITS>
inline void unpack_codes(Team& team, const uint8_t* from, uint8_t* codes, int64_t out, int64_t in) {
    for_codes<BITS>(team, out, in, [&](int64_t output, int64_t input, int64_t at, int shift) {
        codes[output * in + input] = uint8_t(from[at] >> shift & (BITS == 4 ? 15 : 255));
    });
}

}  // namespace

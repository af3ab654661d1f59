// Vectors of 16 floats, and loading and storing them from float32, bfloat16 and float16.
// They are an extension of GCC and Clang, which compile them to AVX-512, AVX2 or NEON.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int64_t CACHE_LINE = 64;  // bytes

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UintVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));
typedef _Float16 Float16Vec __attribute__((vector_size(32)));

struct BFloat16 { uint16_t bits; };

inline Vec load(const float* from) { Vec out; std::memcpy(&out, from, sizeof out); return out; }
inline Vec load(const BFloat16* from) {
    HalfVec half;
    std::memcpy(&half, from, sizeof half);
    UintVec wide = __builtin_convertvector(half, UintVec) << 16;
    return (Vec)wide;
}
inline Vec load(const _Float16* from) {
    Float16Vec half;
    std::memcpy(&half, from, sizeof half);
    return __builtin_convertvector(half, Vec);
}
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(_Float16* to, Vec x) {
    Float16Vec half = __builtin_convertvector(x, Float16Vec);
    std::memcpy(to, &half, sizeof half);
}
inline void store(BFloat16* to, Vec x) {
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &half, sizeof half);
#else
    // Rounds to even; a NaN stays one because its upper bits do.
    UintVec bits = (UintVec)x;
    UintVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    IntVec is_nan = x != x;
    rounded = (UintVec)(((IntVec)rounded & ~is_nan) | ((IntVec)(bits | 0x400000u) & is_nan));
    HalfVec half = __builtin_convertvector(rounded >> 16, HalfVec);
    std::memcpy(to, &half, sizeof half);
#endif
}
inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return float(x); }
inline float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline void store_one(float* to, float x) { *to = x; }
inline void store_one(_Float16* to, float x) { *to = _Float16(x); }
inline void store_one(BFloat16* to, float x) {
    BFloat16 row[LANES];
    store(row, Vec{} + x);
    *to = row[0];
}

// The first `count` of 16; the others read as 0.
template <class T>
inline Vec load_some(const T* from, int count) {
    if (count == LANES) return load(from);
    T row[LANES] = {};
    std::memcpy(row, from, count * sizeof(T));
    return load(row);
}
template <class T>
inline void store_some(T* to, Vec x, int count) {
    if (count == LANES) return store(to, x);
    T row[LANES];
    store(row, x);
    std::memcpy(to, row, count * sizeof(T));
}

// Halves are folded onto each other, in an order that does not depend on the processor.
inline float max_of(Vec x) {
    float row[LANES];
    store(row, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) row[i] = row[i] > row[i + half] ? row[i] : row[i + half];
    return row[0];
}
inline float sum_of(Vec x) {
    float row[LANES];
    store(row, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) row[i] += row[i + half];
    return row[0];
}

// Transposes 16 rows of 16 items of 32 bits, row r at from + r * stride: item i of row r becomes item r of row i at `to`,
// whose rows follow each other at `to_stride`. Strides are in items.
inline void transpose(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
    UintVec rows[LANES], other[LANES];
    for (int r = 0; r < LANES; ++r) std::memcpy(&rows[r], from + r * stride, sizeof rows[r]);
    // Item i of row r moves to item r of row i, one bit of both numbers after the other.
    const auto exchange = [](const UintVec* in, UintVec* out, int bit, auto low, auto high) {
        for (int r = 0; r < LANES; ++r)
            if (!(r & bit)) {
                out[r] = low(in[r], in[r | bit]);
                out[r | bit] = high(in[r], in[r | bit]);
            }
    };
    exchange(rows, other, 8,
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
             },
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
             });
    exchange(other, rows, 4,
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
             },
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
             });
    exchange(rows, other, 2,
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
             },
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
             });
    exchange(other, rows, 1,
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
             },
             [](UintVec a, UintVec b) {
                 return __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
             });
    for (int r = 0; r < LANES; ++r) std::memcpy(to + r * to_stride, &rows[r], sizeof rows[r]);
}

// e^x for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients); 0 below the range of floats.
inline Vec exp_of(Vec x) {
    IntVec tiny = x < -87.0f;
    Vec n = x * 1.44269504f;
    IntVec whole = __builtin_convertvector(n - 0.5f, IntVec);
    n = __builtin_convertvector(whole, Vec);
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    IntVec power = (whole + 127) << 23;
    Vec out = p * (Vec)power;
    return (Vec)((IntVec)out & ~tiny);
}

}  // namespace

// Fused elementwise operations, each in one pass over memory where model code takes five to ten.
#pragma once

#include "simd.h"
#include "team.h"

namespace {

// Minimum rows for one thread at a time: with fewer, synchronising costs more than it gains.
inline int64_t rows_at_once(int64_t size) { return std::max<int64_t>(1, (1 << 13) / size); }

// x / sqrt(mean(x^2) + eps) * (weight + offset) (Zhang and Sennrich, 2019)
template <class T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps, float offset) {
    Vec squares = {};
    float total = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const Vec part = load(x + i);
        squares += part * part;
    }
    for (; i < size; ++i) total += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / std::sqrt((total + sum_of(squares)) / float(size) + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(x + i) * scale * (load(weight + i) + offset));
    for (; i < size; ++i) store_one(out + i, to_float(x[i]) * scale * (to_float(weight[i]) + offset));
}

inline Vec silu(Vec x) {
    // With e = exp(-|x|), sigmoid(x) is 1 / (1 + e) for x >= 0 and e / (1 + e) below: nothing overflows.
    const IntVec negative = x < 0.0f;
    const Vec e = exp_of((Vec)((IntVec)x | (int32_t)0x80000000));
    const Vec top = (Vec)(((IntVec)e & negative) | ((IntVec)(Vec{} + 1.0f) & ~negative));
    return x * top / (e + 1.0f);
}

// GELU by tanh (Hendrycks and Gimpel, 2016): x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
inline Vec gelu_tanh(Vec x) {
    const Vec inner = 1.5957691216f * (x + 0.044715f * x * x * x);
    const IntVec negative = inner < 0.0f;
    const Vec e = exp_of((Vec)((IntVec)inner | (int32_t)0x80000000));
    const Vec top = (Vec)(((IntVec)e & negative) | ((IntVec)(Vec{} + 1.0f) & ~negative));
    return x * top / (e + 1.0f);
}

// silu(gate) * up for a row that holds gate and up side by side: x (2 * size) -> out (size)
template <class T>
inline void silu_times_row(const T* x, T* out, int64_t size) {
    const T* up = x + size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, silu(load(x + i)) * load(up + i));
    if (i < size) {
        const int rest = int(size - i);
        store_some(out + i, silu(load_some(x + i, rest)) * load_some(up + i, rest), rest);
    }
}

// Rotary embedding by halves (GPT-NeoX style): out[i] = x[i] cos[i] -+ x[i +- dim / 2] sin[i]; may be done in place.
template <class T>
inline void rotate_head(const T* x, const T* cos, const T* sin, T* out, int64_t dim) {
    const int64_t half = dim / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Vec low = load(x + i), high = load(x + half + i);
        store(out + i, low * load(cos + i) - high * load(sin + i));
        store(out + half + i, high * load(cos + half + i) + low * load(sin + half + i));
    }
    for (; i < half; ++i) {
        const float low = to_float(x[i]), high = to_float(x[half + i]);
        store_one(out + i, low * to_float(cos[i]) - high * to_float(sin[i]));
        store_one(out + half + i, high * to_float(cos[half + i]) + low * to_float(sin[half + i]));
    }
}

template <class T>
inline void norm_of(const T* x, const T* weight, T* out, int64_t rows, int64_t size, int64_t stride, float eps,
                    float offset) {
    on_team([&](Team& team) {
        team.share(rows, rows_at_once(size),
                   [&](int64_t r) { norm_row(x + r * stride, weight, out + r * size, size, eps, offset); });
    });
}

template <class T>
inline void silu_of(const T* x, T* out, int64_t rows, int64_t size) {
    on_team([&](Team& team) {
        team.share(rows, rows_at_once(size), [&](int64_t r) { silu_times_row(x + r * 2 * size, out + r * size, size); });
    });
}

// x (tokens, heads, dim) with strides; cos and sin (tokens, dim); out (tokens, heads, dim), contiguous
template <class T>
inline void rotate_of(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads, int64_t dim,
                      int64_t token_stride, int64_t head_stride) {
    on_team([&](Team& team) {
        team.share(tokens, rows_at_once(heads * dim), [&](int64_t t) {
            for (int64_t h = 0; h < heads; ++h)
                rotate_head(x + t * token_stride + h * head_stride, cos + t * dim, sin + t * dim,
                            out + (t * heads + h) * dim, dim);
        });
    });
}

}  // namespace

// The small steps between the matrix products, each in one pass over memory where model code takes five to ten.

#include "simd.h"

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 15;  // elements; below that, waking threads costs more than it brings

// x / sqrt(mean(x^2) + eps) * (weight + offset), row by row (Zhang and Sennrich, 2019)
template <class T>
void norm_rows(const T* x, const T* weight, T* out, int64_t rows, int64_t size, int64_t stride, float eps, float offset) {
#pragma omp parallel for schedule(static) if (rows * size >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = x + r * stride;
        T* to = out + r * size;
        Vec squares = {};
        float total = 0;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const Vec part = load(from + i);
            squares += part * part;
        }
        for (; i < size; ++i) total += to_float(from[i]) * to_float(from[i]);
        const float scale = 1.0f / std::sqrt((total + sum_of(squares)) / float(size) + eps);
        for (i = 0; i + LANES <= size; i += LANES) store(to + i, load(from + i) * scale * (load(weight + i) + offset));
        for (; i < size; ++i) store_one(to + i, to_float(from[i]) * scale * (to_float(weight[i]) + offset));
    }
}

// silu(gate) * up for rows that hold gate and up side by side: x (rows, 2 * size) -> out (rows, size)
template <class T>
void silu_times(const T* x, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; ++r) {
        const T* gate = x + r * 2 * size;
        const T* up = gate + size;
        T* to = out + r * size;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const Vec g = load(gate + i);
            // With e = exp(-|g|), sigmoid(g) is 1 / (1 + e) for g >= 0 and e / (1 + e) below: nothing overflows.
            const IntVec negative = g < 0.0f;
            const Vec e = exp_of((Vec)((IntVec)g | (int32_t)0x80000000));
            const Vec top = (Vec)(((IntVec)e & negative) | ((IntVec)(Vec{} + 1.0f) & ~negative));
            store(to + i, g * top / (e + 1.0f) * load(up + i));
        }
        for (; i < size; ++i) {
            const float g = to_float(gate[i]);
            store_one(to + i, g / (1.0f + std::exp(-g)) * to_float(up[i]));
        }
    }
}

// Rotary embedding by halves (GPT-NeoX's form): out[i] = x[i] cos[i] -+ x[i +- dim / 2] sin[i]
// x (tokens, heads, dim) with strides; cos and sin (tokens, dim); out (tokens, heads, dim), contiguous
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads, int64_t dim,
            int64_t token_stride, int64_t head_stride) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * dim >= PARALLEL_FROM)
    for (int64_t t = 0; t < tokens; ++t) {
        const T* c = cos + t * dim;
        const T* s = sin + t * dim;
        for (int64_t h = 0; h < heads; ++h) {
            const T* from = x + t * token_stride + h * head_stride;
            T* to = out + (t * heads + h) * dim;
            int64_t i = 0;
            for (; i + LANES <= half; i += LANES) {
                const Vec low = load(from + i), high = load(from + half + i);
                store(to + i, low * load(c + i) - high * load(s + i));
                store(to + half + i, high * load(c + half + i) + low * load(s + half + i));
            }
            for (; i < half; ++i) {
                const float low = to_float(from[i]), high = to_float(from[half + i]);
                store_one(to + i, low * to_float(c[i]) - high * to_float(s[i]));
                store_one(to + half + i, high * to_float(c[half + i]) + low * to_float(s[half + i]));
            }
        }
    }
}

template <class T>
void norm_of(const void* x, const void* weight, void* out, int64_t rows, int64_t size, int64_t stride, float eps, float offset) {
    norm_rows((const T*)x, (const T*)weight, (T*)out, rows, size, stride, eps, offset);
}

template <class T>
void silu_of(const void* x, void* out, int64_t rows, int64_t size) { silu_times((const T*)x, (T*)out, rows, size); }

template <class T>
void rotate_of(const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim,
               int64_t token_stride, int64_t head_stride) {
    rotate((const T*)x, (const T*)cos, (const T*)sin, (T*)out, tokens, heads, dim, token_stride, head_stride);
}

}  // namespace

extern "C" {

int rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t size, int64_t stride, float eps,
             float offset, int dtype) {
    FOR_DTYPE(dtype, norm_of, x, weight, out, rows, size, stride, eps, offset);
}

int silu_and_mul(const void* x, void* out, int64_t rows, int64_t size, int dtype) {
    FOR_DTYPE(dtype, silu_of, x, out, rows, size);
}

int rotary(const void* x, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t dim,
           int64_t token_stride, int64_t head_stride, int dtype) {
    FOR_DTYPE(dtype, rotate_of, x, cos, sin, out, tokens, heads, dim, token_stride, head_stride);
}

}

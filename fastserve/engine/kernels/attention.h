// Paged attention.
//
// A block of the KV cache (block size: a multiple of 16) holds groups of 16 tokens for each KV head. Layout of a group:
//   keys   [key dim / PAIR][16][PAIR]                    like a weight with tokens as outputs (linear.h)
//   values [value dim / 16][16 / PAIR][16][PAIR]         like weights with dimensions as outputs and tokens as inputs
// so scores and weighted sums are computed like products with weights. Dims are padded to multiples of PAIR and of 16.
// The query heads that share a KV head, and a few neighbouring tokens of a chunk, are rows of one work item: the KV
// cache is read once for all of them. Softmax is computed online (Milakov and Gimelshein, 2018), so memory does not
// grow with the context. The result of a row does not depend on the other rows.
#pragma once

#include "linear.h"

namespace {

constexpr int MAX_ROWS = 2 * TILE_ROWS > 16 ? 2 * TILE_ROWS : 16;
constexpr int MAX_DIM = 512;
constexpr int SPAN = 4;  // groups of 16 tokens that are processed together
constexpr float MASKED = -1e30f;

}  // namespace

struct Step {
    const int32_t* item_token;      // [items] first row of the batch
    const int32_t* item_count;      // [items] neighbouring tokens of one sequence
    const int32_t* item_position;   // [items] position of the first of them
    const int32_t* item_sequence;   // [items] row of the block table
    const int32_t* block_table;     // [sequences][table_stride]
    const int32_t* token_block;     // [tokens] block of each new token
    const int32_t* token_offset;    // [tokens] offset in the block
    int64_t items, tokens, table_stride;
};

struct Layer {
    const void* query;              // [tokens][heads][key dim] by the strides below, in elements
    const void* key;
    const void* value;
    void* out;                      // [tokens][heads][value dim], contiguous
    void* keys;                     // KV cache in the layout above
    void* values;
    const float* sinks;             // [heads] or null
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    int64_t heads, kv_heads, key_dim, value_dim, block_size;
    int64_t window, chunk;          // 0: none
    float scaling, softcap;         // softcap 0: none
};


namespace {

template <class T>
struct CacheLayout {
    // Elements of a group of 16 tokens, for keys and for values.
    int64_t key_group, value_group, groups, kv_heads;

    explicit CacheLayout(const Layer& layer)
        : key_group((layer.key_dim + PAIR<T> - 1) / PAIR<T> * PAIR<T> * LANES),
          value_group((layer.value_dim + LANES - 1) / LANES * LANES * LANES), groups(layer.block_size / LANES),
          kv_heads(layer.kv_heads) {}

    T* keys(const Layer& layer, int64_t block, int64_t head, int64_t group) const {
        return (T*)layer.keys + ((block * kv_heads + head) * groups + group) * key_group;
    }
    T* values(const Layer& layer, int64_t block, int64_t head, int64_t group) const {
        return (T*)layer.values + ((block * kv_heads + head) * groups + group) * value_group;
    }
};

// The first position that a token attends to.
inline int64_t first_visible(const Layer& layer, int64_t position) {
    const int64_t in_window = layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
    return layer.chunk ? std::max(in_window, position / layer.chunk * layer.chunk) : in_window;
}

// Stores key and value of one new token in the KV cache.
template <class T>
inline void store_token(const Step& step, const Layer& layer, int64_t t) {
    constexpr int P = PAIR<T>;
    const CacheLayout<T> cache(layer);
    const int64_t block = step.token_block[t], lane = step.token_offset[t] % LANES, group = step.token_offset[t] / LANES;
    for (int64_t h = 0; h < layer.kv_heads; ++h) {
        const T* key = (const T*)layer.key + t * layer.key_token + h * layer.key_head;
        T* keys = cache.keys(layer, block, h, group) + lane * P;
        for (int64_t d = 0; d < layer.key_dim; ++d) keys[d / P * P * LANES + d % P] = key[d];
        const T* value = (const T*)layer.value + t * layer.value_token + h * layer.value_head;
        T* values = cache.values(layer, block, h, group) + lane / P * P * LANES + lane % P;
        for (int64_t e = 0; e < layer.value_dim; ++e) values[e / LANES * LANES * LANES + e % LANES * P] = value[e];
    }
}

// out[ROWS][2] += weighted sums of 2 x 16 dimensions of the values of `count` groups of tokens. `weights`: ROWS rows,
// in the order of the tokens.
template <class T, int ROWS>
__attribute__((noinline)) void add_values(const T* weights, const T* const* values, int count, float* out, int both) {
    Vec sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < 2; ++g) sums[r][g] = load(out + r * MAX_DIM + g * LANES * both);
    for (int group = 0; group < count; ++group, weights += LANES) {
        const T* from = values[group];
        for (int i = 0; i < LANES; i += PAIR<T>, from += PAIR<T> * LANES)
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                multiply_add(sums[r][0], from, weights + r * SPAN * LANES + i);
                multiply_add(sums[r][1], from + LANES * LANES * both, weights + r * SPAN * LANES + i);
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < 2; ++g) store(out + r * MAX_DIM + g * LANES * both, sums[r][g]);
}

template <class T, int ROWS = TILE_ROWS>
inline void add_values(int rows, const T* weights, const T* const* values, int count, float* out, int both) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return add_values<T, ROWS - 1>(rows, weights, values, count, out, both);
    }
    add_values<T, ROWS>(weights, values, count, out, both);
    if (rows > ROWS)
        add_values<T>(rows - ROWS, weights + ROWS * SPAN * LANES, values, count, out + ROWS * MAX_DIM, both);
}

template <class T>
inline void fetch_ahead(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// The first `count` tokens of a group, and zeros for the others.
template <class T>
inline void copy_values(const T* from, T* to, int64_t depth, int count) {
    constexpr int P = PAIR<T>;
    const int whole = count / P * P * LANES;  // elements of full pairs, for 16 dimensions
    for (int64_t base = 0; base < depth * LANES; base += LANES * LANES) {
        std::memcpy((void*)(to + base), from + base, whole * sizeof(T));
        std::memset((void*)(to + base + whole), 0, (LANES * LANES - whole) * sizeof(T));
        for (int e = 0; e < LANES && count % P; ++e) to[base + whole + e * P] = from[base + whole + e * P];
    }
}

template <class T>
void attend(const Step& step, const Layer& layer, int64_t item, int64_t h) {
    alignas(64) T query[MAX_ROWS * MAX_DIM];
    alignas(64) float out[MAX_ROWS * MAX_DIM];
    alignas(64) T weights[MAX_ROWS * SPAN * LANES];
    alignas(64) T partial[LANES * MAX_DIM];
    Vec scores[MAX_ROWS][SPAN];
    Vec totals[MAX_ROWS];
    float best[MAX_ROWS];
    const CacheLayout<T> cache(layer);
    const int64_t D = layer.key_dim, E = layer.value_dim, heads_here = layer.heads / layer.kv_heads;
    const int64_t width = cache.key_group / LANES, depth = cache.value_group / LANES;
    const int64_t first = step.item_position[item], token = step.item_token[item], count = step.item_count[item];
    const int32_t* table = step.block_table + step.item_sequence[item] * step.table_stride;
    const int rows = int(count * heads_here);
    const int64_t last = first + count - 1;
    for (int r = 0; r < rows; ++r) {
        const int64_t head = h * heads_here + r % heads_here;
        const T* from = (const T*)layer.query + (token + r / heads_here) * layer.query_token + head * layer.query_head;
        std::memcpy(query + r * width, from, D * sizeof(T));
        for (int64_t d = D; d < width; ++d) query[r * width + d] = T{};
        for (int64_t e = 0; e < depth; ++e) out[r * MAX_DIM + e] = 0.0f;
        best[r] = layer.sinks ? layer.sinks[head] : MASKED;
        totals[r] = Vec{};
        totals[r][0] = layer.sinks ? 1.0f : 0.0f;
    }
    const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t begin = first_visible(layer, first) / LANES * LANES;
    for (int64_t base = begin; base <= last; base += SPAN * LANES) {
        const int groups = int(std::min<int64_t>(SPAN, (last - base) / LANES + 1));
        const T* keys[SPAN];
        const T* values[SPAN];
        for (int g = 0; g < groups; ++g) {
            const int64_t at = base + g * LANES, block = table[at / layer.block_size];
            keys[g] = cache.keys(layer, block, h, at % layer.block_size / LANES);
            values[g] = cache.values(layer, block, h, at % layer.block_size / LANES);
        }
        // Blocks are small and scattered, so hardware prefetching does not find the next ones.
        for (int64_t at = base + SPAN * LANES; at <= std::min(last, base + 2 * SPAN * LANES - 1); at += LANES) {
            const int64_t block = table[at / layer.block_size], group = at % layer.block_size / LANES;
            fetch_ahead(cache.keys(layer, block, h, group), cache.key_group);
            fetch_ahead(cache.values(layer, block, h, group), cache.value_group);
        }
        for (int g = 0; g < groups; g += 2) {
            auto keep = [&](int64_t r, int which, Vec sums) { scores[r][g + which] = sums * layer.scaling; };
            if (g + 1 < groups) tiles<T, 2>(query, width, rows, keys + g, width, 0, keep);
            else tiles<T, 1>(query, width, rows, keys + g, width, 0, keep);
        }
        for (int r = 0; r < rows; ++r) {
            const int64_t position = first + r / heads_here, lowest = first_visible(layer, position);
            const bool whole = base + groups * LANES - 1 <= position && base >= lowest;
            Vec top = Vec{} + MASKED;
            for (int g = 0; g < groups; ++g) {
                Vec& score = scores[r][g];
                if (layer.softcap != 0.0f)
                    for (int i = 0; i < LANES; ++i) score[i] = std::tanh(score[i] / layer.softcap) * layer.softcap;
                if (!whole) {
                    const IntVec key_position = lane + int32_t(base + g * LANES);
                    const IntVec seen = (key_position <= int32_t(position)) & (key_position >= int32_t(lowest));
                    score = (Vec)(((IntVec)score & seen) | ((IntVec)(Vec{} + MASKED) & ~seen));
                }
                const IntVec higher = score > top;
                top = (Vec)(((IntVec)score & higher) | ((IntVec)top & ~higher));
            }
            const float highest = max_of(top);
            T* row = weights + r * SPAN * LANES;
            if (highest <= MASKED) {
                std::memset((void*)row, 0, SPAN * LANES * sizeof(T));
                continue;
            }
            if (highest > best[r]) {
                const float fade = std::exp(best[r] - highest);
                totals[r] *= fade;
                for (int64_t e = 0; e < depth; e += LANES) store(out + r * MAX_DIM + e, load(out + r * MAX_DIM + e) * fade);
                best[r] = highest;
            }
            for (int g = 0; g < groups; ++g) {
                const Vec weight = exp_of(scores[r][g] - best[r]);
                totals[r] += weight;
                store(row + g * LANES, weight);
            }
        }
        // Beyond the last token a group may hold anything, even NaN, which a weight of 0 would not cancel.
        const int valid = int(last + 1 - (base + (groups - 1) * LANES));
        if (valid < LANES) {
            copy_values(values[groups - 1], partial, depth, valid);
            values[groups - 1] = partial;
        }
        for (int64_t e = 0; e < depth; e += 2 * LANES) {
            const T* from[SPAN];
            for (int g = 0; g < groups; ++g) from[g] = values[g] + e * LANES;
            add_values<T>(rows, weights, from, groups, out + e, e + LANES < depth);
        }
    }
    for (int r = 0; r < rows; ++r) {
        T* to = (T*)layer.out + ((token + r / heads_here) * layer.heads + h * heads_here + r % heads_here) * E;
        const float total = sum_of(totals[r]);
        const float scale = total > 0.0f ? 1.0f / total : 0.0f;
        for (int64_t e = 0; e < E; e += LANES)
            store_some(to + e, load(out + r * MAX_DIM + e) * scale, int(std::min<int64_t>(LANES, E - e)));
    }
}

template <class T>
inline void attend_all(Team& team, const Step& step, const Layer& layer) {
    team.share(step.items * layer.kv_heads, 1,
               [&](int64_t i) { attend<T>(step, layer, i / layer.kv_heads, i % layer.kv_heads); });
}

inline bool is_supported(const Layer& layer) {
    return layer.key_dim <= MAX_DIM && layer.value_dim <= MAX_DIM && layer.block_size % LANES == 0 &&
           layer.heads / layer.kv_heads <= MAX_ROWS;
}

template <class T>
void attention_of(const Step& step, const Layer& layer) {
    on_team([&](Team& team) {
        team.share(step.tokens, 8, [&](int64_t t) { store_token<T>(step, layer, t); });
        attend_all<T>(team, step, layer);
    });
}

}  // namespace

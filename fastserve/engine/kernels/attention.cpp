// Paged attention for CPUs. Built at the first start by build.py, called through ctypes by paged.py.
//
// Layout of a layer's pages, for B blocks of S tokens (S a multiple of 16), K key/value heads:
//   keys   [B][K][key dim][S]     the tokens of a block lie side by side, so 16 scores are one vector of the keys
//   values [B][K][S][value dim]   the value's dimensions lie side by side, so a row of the output is a sum of vectors
// The query heads that share a key/value head are rows of one item of work, and so are a few neighbouring tokens of a
// chunk: the pages are read once for all of them. Softmax is computed online (Milakov and Gimelshein, 2018), so memory
// does not grow with the context.

#include "simd.h"

namespace {

constexpr int MAX_ROWS = 16;
constexpr int MAX_DIM = 512;
constexpr float MASKED = -1e30f;

}  // namespace

extern "C" {

struct Step {
    const int32_t* item_token;      // [items] first row of the batch
    const int32_t* item_count;      // [items] neighbouring tokens of one sequence
    const int32_t* item_position;   // [items] position of the first of them
    const int32_t* item_sequence;   // [items] row of the block table
    const int32_t* block_table;     // [sequences][table_stride]
    const int32_t* token_block;     // [tokens] where each new token goes
    const int32_t* token_offset;    // [tokens]
    int64_t items, tokens, table_stride;
};

struct Layer {
    const void* query;              // [tokens][heads][key dim] by the strides below, in elements
    const void* key;
    const void* value;
    void* out;                      // [tokens][heads][value dim], contiguous
    void* keys;
    void* values;
    const float* sinks;             // [heads] or null
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    int64_t heads, kv_heads, key_dim, value_dim, block_size;
    int64_t window;                 // 0: none
    float scaling, softcap;         // softcap 0: none
};

}

namespace {

template <class T>
void store_new(const Step& step, const Layer& layer) {
    const int64_t K = layer.kv_heads, D = layer.key_dim, E = layer.value_dim, S = layer.block_size;
#pragma omp parallel for schedule(static) if (step.tokens > 16)
    for (int64_t t = 0; t < step.tokens; ++t) {
        const int64_t block = step.token_block[t], offset = step.token_offset[t];
        for (int64_t h = 0; h < K; ++h) {
            const T* key = (const T*)layer.key + t * layer.key_token + h * layer.key_head;
            T* keys = (T*)layer.keys + (block * K + h) * D * S + offset;
            for (int64_t d = 0; d < D; ++d) keys[d * S] = key[d];
            const T* value = (const T*)layer.value + t * layer.value_token + h * layer.value_head;
            std::memcpy((T*)layer.values + ((block * K + h) * S + offset) * E, value, E * sizeof(T));
        }
    }
}

template <class T, int R>
inline void scores_of(Vec* scores, const float* query, const T* keys, int64_t D, int64_t S) {
    Vec sum[R];
    for (int r = 0; r < R; ++r) sum[r] = Vec{};
    for (int64_t d = 0; d < D; ++d) {
        const Vec key = load(keys + d * S);
        for (int r = 0; r < R; ++r) sum[r] += query[r * MAX_DIM + d] * key;
    }
    for (int r = 0; r < R; ++r) scores[r] = sum[r];
}

template <class T>
void scores_of(Vec* scores, const float* query, int rows, const T* keys, int64_t D, int64_t S) {
    for (; rows >= 8; rows -= 8, scores += 8, query += 8 * MAX_DIM) scores_of<T, 8>(scores, query, keys, D, S);
    switch (rows) {
        case 7: return scores_of<T, 7>(scores, query, keys, D, S);
        case 6: return scores_of<T, 6>(scores, query, keys, D, S);
        case 5: return scores_of<T, 5>(scores, query, keys, D, S);
        case 4: return scores_of<T, 4>(scores, query, keys, D, S);
        case 3: return scores_of<T, 3>(scores, query, keys, D, S);
        case 2: return scores_of<T, 2>(scores, query, keys, D, S);
        case 1: return scores_of<T, 1>(scores, query, keys, D, S);
    }
}

template <class T>
void attend(const Step& step, const Layer& layer, int64_t item, int64_t h) {
    alignas(64) float query[MAX_ROWS * MAX_DIM];
    alignas(64) float out[MAX_ROWS * MAX_DIM];
    alignas(64) float tile[LANES * MAX_DIM];
    Vec scores[MAX_ROWS];
    float best[MAX_ROWS], total[MAX_ROWS];
    const int64_t D = layer.key_dim, E = layer.value_dim, S = layer.block_size, K = layer.kv_heads;
    const int64_t group = layer.heads / K;
    const int64_t first = step.item_position[item], token = step.item_token[item], count = step.item_count[item];
    const int32_t* table = step.block_table + step.item_sequence[item] * step.table_stride;
    const int rows = int(count * group);
    const int64_t last = first + count - 1;
    for (int r = 0; r < rows; ++r) {
        const int64_t head = h * group + r % group;
        const T* from = (const T*)layer.query + (token + r / group) * layer.query_token + head * layer.query_head;
        for (int64_t d = 0; d < D; ++d) query[r * MAX_DIM + d] = to_float(from[d]) * layer.scaling;
        for (int64_t e = 0; e < E; ++e) out[r * MAX_DIM + e] = 0.0f;
        best[r] = layer.sinks ? layer.sinks[head] : MASKED;
        total[r] = layer.sinks ? 1.0f : 0.0f;
    }
    const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t begin = layer.window ? std::max<int64_t>(0, first - layer.window + 1) / LANES * LANES : 0;
    for (int64_t base = begin; base <= last; base += LANES) {
        const int64_t block = table[base / S], offset = base % S;
        scores_of<T>(scores, query, rows, (const T*)layer.keys + (block * K + h) * D * S + offset, D, S);
        const T* values = (const T*)layer.values + ((block * K + h) * S + offset) * E;
        const int valid = int(std::min<int64_t>(LANES, last - base + 1));
        for (int j = 0; j < valid; ++j)
            for (int64_t e = 0; e + LANES <= E; e += LANES) {
                const Vec value = load(values + j * E + e);
                std::memcpy(tile + j * MAX_DIM + e, &value, sizeof value);
            }
        for (int j = 0; j < valid; ++j)
            for (int64_t e = E / LANES * LANES; e < E; ++e) tile[j * MAX_DIM + e] = to_float(values[j * E + e]);
        for (int r = 0; r < rows; ++r) {
            const int64_t position = first + r / group;
            Vec score = scores[r];
            if (layer.softcap != 0.0f)
                for (int i = 0; i < LANES; ++i) score[i] = std::tanh(score[i] / layer.softcap) * layer.softcap;
            const IntVec place = lane + int32_t(base);
            IntVec seen = place <= int32_t(position);
            if (layer.window) seen &= place > int32_t(position - layer.window);
            score = (Vec)(((IntVec)score & seen) | ((IntVec)(Vec{} + MASKED) & ~seen));
            const float top = max_of(score);
            if (top <= MASKED) continue;
            float* row = out + r * MAX_DIM;
            if (top > best[r]) {
                const float fade = std::exp(best[r] - top);
                total[r] *= fade;
                for (int64_t e = 0; e < E; ++e) row[e] *= fade;
                best[r] = top;
            }
            const Vec weight = exp_of(score - best[r]);
            total[r] += sum_of(weight);
            for (int64_t e = 0; e + LANES <= E; e += LANES) {
                Vec sum;
                std::memcpy(&sum, row + e, sizeof sum);
                for (int j = 0; j < valid; ++j) {
                    Vec value;
                    std::memcpy(&value, tile + j * MAX_DIM + e, sizeof value);
                    sum += weight[j] * value;
                }
                std::memcpy(row + e, &sum, sizeof sum);
            }
            for (int64_t e = E / LANES * LANES; e < E; ++e)
                for (int j = 0; j < valid; ++j) row[e] += weight[j] * tile[j * MAX_DIM + e];
        }
    }
    for (int r = 0; r < rows; ++r) {
        T* to = (T*)layer.out + ((token + r / group) * layer.heads + h * group + r % group) * E;
        const float scale = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
        int64_t e = 0;
        for (; e + LANES <= E; e += LANES) store(to + e, load(out + r * MAX_DIM + e) * scale);
        for (; e < E; ++e) store_one(to + e, out[r * MAX_DIM + e] * scale);
    }
}

template <class T>
void run(const Step& step, const Layer& layer) {
    store_new<T>(step, layer);
    const int64_t work = step.items * layer.kv_heads;
#pragma omp parallel for schedule(dynamic, 1) if (work > 1)
    for (int64_t i = 0; i < work; ++i) attend<T>(step, layer, i / layer.kv_heads, i % layer.kv_heads);
}

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 when the shape is beyond what the kernel was made for.
int paged_attention(const Step* step, const Layer* layer, int dtype) {
    if (layer->key_dim > MAX_DIM || layer->value_dim > MAX_DIM || layer->block_size % LANES) return 1;
    if (layer->heads / layer->kv_heads > MAX_ROWS) return 1;
    FOR_DTYPE(dtype, run, *step, *layer);
}

int max_rows() { return MAX_ROWS; }

}

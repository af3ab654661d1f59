// A whole step of a decoder-only model: token ids in, logits out. The team's threads synchronise between operations.
//
// One call for a step, because between calls from Python all threads but one are idle: that would take most of the time
// of a step of few tokens, where matrix products already run at memory bandwidth.
#pragma once

#include "all_reduce.h"
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "lora_embedding.h"

namespace {

struct DecoderLayer {
    Weight query, key, value, output, gate, up, down;
    // Norms before and after attention and MLP; any may be null. Norms of queries and keys are over each head, or over
    // all heads of a token.
    const void *attention_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm, *query_norm, *key_norm;
    int64_t query_norm_size, key_norm_size;
    void *keys, *values;          // KV cache, as in Layer
    const void *cos, *sin;        // [positions][rotary dim]
    int64_t window;               // 0: none
    // Adapters' weights for the products above, or null.
    const LoraSite *query_lora, *key_lora, *value_lora, *output_lora, *gate_lora, *up_lora, *down_lora;
};

struct Decoder {
    DecoderLayer* layers;
    Weight head;
    const void *embedding, *norm;  // [vocabulary][hidden], or null if tied to the head's weight; [hidden]
    int64_t num_layers, hidden, heads, kv_heads, head_dim, rotary_dim, intermediate, block_size, activation;
    float eps, norm_offset, embedding_scale, scaling, softcap, logit_softcap;
    // The sizes above are this rank's, but for the hidden size. Its products of `output` and `down` are partial sums, and
    // it has `vocabulary` rows of the embedding from `first_token` on. `ranks` is null if one rank has the whole model.
    Ranks* ranks;
    int64_t first_token, vocabulary;
    const LoraSite *head_lora, *embedding_lora;  // or null
};

// Activations of a step.
struct Workspace {
    void *hidden;      // [tokens][hidden] the residual stream
    void *kept;        // [tokens][max(hidden, heads * head dim)] logit rows, in the last layer
    void *normed;      // [tokens][max(hidden, heads * head dim)]
    void *query;       // [tokens][heads * head dim]
    void *key, *value; // [tokens][KV heads * head dim]
    void *inner;       // [tokens][intermediate]
};

template <class T>
class Run {
  public:
    Run(Team& team, const Decoder& model, const Step& step, const Workspace& space, const int64_t* tokens,
        const int64_t* positions, const int64_t* logit_rows, int64_t num_logit_rows, float* logits, LoraSpace* lora)
        : team(team), m(model), step(step), hidden((T*)space.hidden), kept((T*)space.kept), normed((T*)space.normed),
          query((T*)space.query), key((T*)space.key), value((T*)space.value), inner((T*)space.inner), tokens(tokens),
          positions(positions), logit_rows(logit_rows), num_logit_rows(num_logit_rows), logits(logits),
          rows(step.tokens), lora(lora), view(lora ? &lora->all : nullptr),
          exchange(m.ranks ? m.ranks->done.load(std::memory_order_relaxed) : 0) {}

    void operator()() {
        embed();
        for (int64_t i = 0; i < m.num_layers; ++i) {
            const DecoderLayer& layer = m.layers[i];
            attention(layer);
            // After the keys and values of the last layer, only the logit rows are needed.
            if (i + 1 == m.num_layers) keep_logit_rows();
            add(query, layer.output, layer.output_lora, layer.attention_out_norm, {layer.gate_lora, layer.up_lora});
            if (i + 1 == m.num_layers) mlp(layer, {m.head_lora});
            else mlp(layer, {(&layer)[1].query_lora, (&layer)[1].key_lora, (&layer)[1].value_lora});
        }
        head();
        if (m.ranks) m.ranks->done.store(exchange, std::memory_order_relaxed);
    }

  private:
    Team& team;
    const Decoder& m;
    const Step& step;
    T *hidden, *kept, *normed, *query, *key, *value, *inner;
    const int64_t *tokens, *positions, *logit_rows;
    const int64_t num_logit_rows;
    float* logits;
    int64_t rows;
    LoraSpace* const lora;  // null: no row of the step has an adapter
    const LoraView* view;   // adapters of the rows above
    uint32_t exchange;  // number of the next exchange with the other ranks

    // This rank's slot for its sums of the next exchange; null if it has no others.
    float* partial_sums() { return m.ranks ? (float*)slot_of(*m.ranks, exchange, m.ranks->rank) : nullptr; }

    // Calls put(row, first index, sums, count) with the sums of all ranks, for each 16 of the hidden size.
    template <class Put>
    void all_reduce(Put put) {
        meet_ranks(*m.ranks, exchange, rows * m.hidden, rows * m.hidden * int64_t(sizeof(float)));
        team.share(rows, rows_at_once(m.hidden), [&](int64_t r) {
            for (int64_t at = 0; at < m.hidden; at += LANES) {
                const int count = int(std::min<int64_t>(LANES, m.hidden - at));
                put(r, at, sum_of_parts(*m.ranks, exchange, r * m.hidden + at, count), count);
            }
        });
        ++exchange;
    }

    // `next`: sites of the products that follow.
    LoraProducts<T> lora_products(std::initializer_list<const LoraSite*> sites, std::initializer_list<const LoraSite*> next,
                                  const T* x, int64_t x_stride) {
        if (!view) return {};
        return LoraProducts<T>(team, *lora, *view, sites.begin(), int(sites.size()), x, x_stride, next);
    }

    void embed() {
        const float scale = m.embedding_scale;
        const bool is_cut = m.ranks && m.vocabulary;
        team.share(rows, rows_at_once(m.hidden), [&](int64_t r) {
            T* to = hidden + r * m.hidden;
            const int64_t token = tokens[r] - (is_cut ? m.first_token : 0);
            if (is_cut && (token < 0 || token >= m.vocabulary)) {
                std::memset((void*)to, 0, m.hidden * sizeof(T));
                return;
            }
            if (m.embedding) std::memcpy(to, (const T*)m.embedding + token * m.hidden, m.hidden * sizeof(T));
            else row_of(m.head, token, to);
            if (scale != 1.0f)
                for (int64_t i = 0; i < m.hidden; ++i) store_one(to + i, to_float(to[i]) * scale);
            if (view && m.embedding_lora && view->places[r].at >= 0)
                add_embedding_lora(*m.embedding_lora, view->places[r].slot, token, to);
        });
        if (!is_cut) return;
        float* partial = partial_sums();
        team.share(rows, rows_at_once(m.hidden), [&](int64_t r) {
            for (int64_t i = 0; i < m.hidden; ++i) partial[r * m.hidden + i] = to_float(hidden[r * m.hidden + i]);
        });
        all_reduce([&](int64_t r, int64_t at, Vec sums, int count) {
            store_some(hidden + r * m.hidden + at, sums, count);
        });
    }

    // The residual stream, normalised if there is a norm.
    const T* before(const void* norm) {
        if (!norm) return hidden;
        team.share(rows, rows_at_once(m.hidden), [&](int64_t r) {
            norm_row(hidden + r * m.hidden, (const T*)norm, normed + r * m.hidden, m.hidden, m.eps, m.norm_offset);
        });
        return normed;
    }

    // Adds a product to the residual stream, through a norm or none.
    void add(const T* x, const Weight& weight, const LoraSite* site, const void* norm,
             std::initializer_list<const LoraSite*> next) {
        T* to = norm ? normed : hidden;
        const auto put = [&](int64_t r, int64_t at, Vec sums, int outs) {
            T* out = to + r * m.hidden + at;
            // Rounded before it is added, as in the model's own code.
            if (!norm) {
                T rounded[LANES];
                store(rounded, sums);
                sums = load(rounded) + load_some(out, outs);
            }
            store_some(out, sums, outs);
        };
        LoraProducts<T> adapters = lora_products({site}, next, x, weight.in);
        float* partial = partial_sums();
        products(team, x, weight.in, rows, &weight, 1, [&](int, int64_t r, int64_t at, Vec sums, int outs) {
            adapters.add_to(sums, 0, r, at);
            if (partial) store_some(partial + r * m.hidden + at, sums, outs);
            else put(r, at, sums, outs);
        }, adapters);
        if (partial) all_reduce(put);
        if (!norm) return;
        team.share(rows, rows_at_once(m.hidden), [&](int64_t r) {
            T* row = normed + r * m.hidden;
            T* out = hidden + r * m.hidden;
            norm_row(row, (const T*)norm, row, m.hidden, m.eps, m.norm_offset);
            for (int64_t i = 0; i < m.hidden; i += LANES) {
                const int outs = int(std::min<int64_t>(LANES, m.hidden - i));
                store_some(out + i, load_some(out + i, outs) + load_some(row + i, outs), outs);
            }
        });
    }

    void attention(const DecoderLayer& layer) {
        const int64_t D = m.head_dim, Q = m.heads * D, K = m.kv_heads * D;
        const T* x = before(layer.attention_norm);
        const Weight weights[3] = {layer.query, layer.key, layer.value};
        T* const to[3] = {query, key, value};
        const int64_t strides[3] = {Q, K, K};
        LoraProducts<T> adapters = lora_products({layer.query_lora, layer.key_lora, layer.value_lora}, {layer.output_lora},
                                                 x, m.hidden);
        products(team, x, m.hidden, rows, weights, 3, [&](int which, int64_t r, int64_t at, Vec sums, int outs) {
            adapters.add_to(sums, which, r, at);
            store_some(to[which] + r * strides[which] + at, sums, outs);
        }, adapters);
        const Layer call = {query, key, value, normed, layer.keys, layer.values, nullptr, Q, D, K, D, K, D,
                             m.heads, m.kv_heads, D, D, m.block_size, layer.window, 0, m.scaling, m.softcap};
        team.share(rows, rows_at_once(Q), [&](int64_t r) {
            apply_rotary(query + r * Q, m.heads, layer.query_norm, layer.query_norm_size, layer, r);
            apply_rotary(key + r * K, m.kv_heads, layer.key_norm, layer.key_norm_size, layer, r);
            store_token<T>(step, call, r);
        });
        attend_all<T>(team, step, call);
        // The output is in the buffer that a following norm writes to, so it is swapped with that of the queries.
        std::swap(normed, query);
    }

    void keep_logit_rows() {
        const int64_t Q = m.heads * m.head_dim;
        rows = num_logit_rows;
        if (lora) view = &lora->kept;
        // The rows may be in any order, so they are not copied in place.
        keep(query, Q);
        std::swap(query, kept);
        keep(hidden, m.hidden);
        std::swap(hidden, kept);
    }

    void keep(const T* from, int64_t size) {
        team.share(rows, rows_at_once(size), [&](int64_t i) {
            std::memcpy((void*)(kept + i * size), from + logit_rows[i] * size, size * sizeof(T));
        });
    }

    void apply_rotary(T* x, int64_t heads, const void* norm, int64_t norm_size, const DecoderLayer& layer, int64_t r) {
        if (norm)
            for (int64_t at = 0; at < heads * m.head_dim; at += norm_size)
                norm_row(x + at, (const T*)norm, x + at, norm_size, m.eps, m.norm_offset);
        if (!m.rotary_dim) return;
        const T* cos = (const T*)layer.cos + positions[r] * m.rotary_dim;
        const T* sin = (const T*)layer.sin + positions[r] * m.rotary_dim;
        for (int64_t h = 0; h < heads; ++h)
            rotate_head(x + h * m.head_dim, cos, sin, x + h * m.head_dim, m.rotary_dim);
    }

    void mlp(const DecoderLayer& layer, std::initializer_list<const LoraSite*> next) {
        const T* x = before(layer.mlp_norm);
        const bool gelu = m.activation == 1;
        LoraProducts<T> adapters = lora_products({layer.gate_lora, layer.up_lora}, {layer.down_lora}, x, m.hidden);
        gated_products(team, x, m.hidden, rows, layer.gate, layer.up,
                       [&](int64_t r, int64_t at, Vec gate, Vec up, int outs) {
                           adapters.add_to(gate, 0, r, at);
                           adapters.add_to(up, 1, r, at);
                           T* out = inner + r * m.intermediate + at;
                           store_some(out, (gelu ? gelu_tanh(gate) : silu(gate)) * up, outs);
                       },
                       adapters);
        add(inner, layer.down, layer.down_lora, layer.mlp_out_norm, next);
    }

    void head() {
        team.share(num_logit_rows, rows_at_once(m.hidden), [&](int64_t i) {
            norm_row(hidden + i * m.hidden, (const T*)m.norm, normed + i * m.hidden, m.hidden, m.eps, m.norm_offset);
        });
        LoraProducts<T> adapters = lora_products({m.head_lora}, {}, normed, m.hidden);
        const float cap = m.logit_softcap;
        products(team, normed, m.hidden, num_logit_rows, &m.head, 1, [&](int, int64_t r, int64_t at, Vec sums, int outs) {
            adapters.add_to(sums, 0, r, at);
            if (cap != 0.0f)
                for (int i = 0; i < LANES; ++i) sums[i] = std::tanh(sums[i] / cap) * cap;
            store_some(logits + r * m.head.out + at, sums, outs);
        }, adapters);
    }
};

}  // namespace

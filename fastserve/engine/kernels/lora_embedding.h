// Adapters of an embedding: y += B a, where a is the token's column of A. The site's inputs are the tokens. See lora.h for
// the order of tiles.
#pragma once

#include "lora.h"

namespace {

constexpr int MAX_RANK_GROUPS = 32;  // --max-lora-rank allows 256

// Adds to one row `y` the product of a slot's adapter for `token`.
template <class T>
inline void add_embedding_lora(const LoraSite& site, int32_t slot, int64_t token, T* y) {
    const int64_t groups = std::min<int64_t>(site.groups[slot], MAX_RANK_GROUPS);
    if (!groups) return;
    constexpr int C = CHUNK<T>;
    const int64_t slices = in_slices(site), at = token % site.width, first = groups * slices, outs = out_slices(site);
    T column[MAX_RANK_GROUPS * RANK_GROUP];
    for (int64_t g = 0; g < groups; ++g) {
        const T* a = tile_at<T>(site, slot, g * slices + token / site.width) + at / C * C * RANK_GROUP + at % C;
        for (int rank = 0; rank < RANK_GROUP; ++rank) column[g * RANK_GROUP + rank] = a[rank * C];
    }
    for (int64_t output = 0; output < site.out; output += LANES) {
        const int count = int(std::min<int64_t>(LANES, site.out - output));
        Vec sums = load_some(y + output, count);
        for (int64_t g = 0; g < groups; ++g) {
            const T* b = tile_at<T>(site, slot, first + g * outs + output / site.width) + output % site.width * RANK_GROUP;
            for (int rank = 0; rank < RANK_GROUP; rank += PAIR<T>)
                multiply_add(sums, b + rank * LANES, column + g * RANK_GROUP + rank);
        }
        store_some(y + output, sums, count);
    }
}

// Adds to the rows `y` of the tokens `ids` the products of their adapters. Other ranks may have a token's column; its id
// is any of this rank's then, and the row is not used.
template <class T>
inline void add_embedding_lora_of(const int64_t* ids, const LoraSite& site, const LoraRows& batch, T* y, int64_t y_stride) {
    on_team([&](Team& team) {
        for (int64_t s = 0; s < batch.segments; ++s) {
            const int64_t begin = batch.segment_start[s], end = batch.segment_start[s + 1];
            team.share(end - begin, 1, [&](int64_t i) {
                const int64_t row = batch.row_index[begin + i];
                add_embedding_lora(site, batch.segment_slot[s], ids[row], y + row * y_stride);
            });
        }
    });
}

}  // namespace

// LoRA adapters of a batch, many of them at once: shrink, xa = x A^T, and expand, y += xa B^T.
//
// An adapter's weights for a layer are tiles of RANK_GROUP ranks times W inputs or outputs, each at an address of its own;
// ranks are padded with zeros to a multiple of RANK_GROUP. The factor alpha / rank is part of B. Order in a tile:
//   A  [W / CHUNK][RANK_GROUP][CHUNK]               a register holds CHUNK inputs of all ranks of the group
//   B  [W / 16][RANK_GROUP / PAIR][16][PAIR]        like a weight with ranks as inputs (tiles.h)
// Order of tiles: those of A by rank group and slice of W inputs, then those of B by rank group and slice of W outputs.
// They lie in planes: parts of blocks of the KV cache that have room for some tiles each.
//
// A sum over inputs is made of parts of PART inputs, which are added in order, whoever computes them. So a row's result
// depends neither on other rows nor on the number of threads.
#pragma once

#include <memory>

#include "linear.h"

namespace {

constexpr int RANK_GROUP = 8;
constexpr int64_t PART = 512;
constexpr int64_t PIECE_ROWS = 32;
constexpr int SHRINK_ROWS = 4;
constexpr int MAX_SITES = 8;
template <class T> constexpr int CHUNK = 2 * PAIR<T>;

}  // namespace

// A linear layer, or a part of one, that adapters may have weights for.
struct LoraSite {
    const int64_t* planes;     // [slots] address of the addresses of a slot's planes
    const int32_t* first;      // [slots] a slot's first tile
    const int32_t* groups;     // [slots] rank groups; 0: the slot's adapter has no weights for this site
    int64_t in, out, width;    // width: W
    int64_t plane_tiles;
    int64_t shift;             // the site's output o is output o + shift of the layer
};

// Rows of a step that have an adapter, sorted by adapter.
struct LoraRows {
    const int32_t* row_index;      // [segment_start[segments]]
    const int32_t* segment_start;  // [segments + 1]
    const int32_t* segment_slot;   // [segments]
    int64_t segments;
};

namespace {

// At most PIECE_ROWS rows of one adapter.
struct Piece {
    int32_t slot, begin, end;
};

// Place of a row among the sorted rows; -1: the row has no adapter.
struct Place {
    int32_t at, slot;
};

struct LoraView {
    std::vector<int32_t> rows;  // sorted by adapter
    std::vector<Place> places;  // [rows of the input]
    std::vector<Piece> pieces;

    // The rows of a step of `count` rows.
    void set(const LoraRows& batch, int64_t count) {
        clear(count);
        for (int64_t s = 0; s < batch.segments; ++s)
            for (int32_t i = batch.segment_start[s]; i < batch.segment_start[s + 1]; ++i)
                append(batch.row_index[i], batch.segment_slot[s]);
    }

    // Some rows of another view; the new row i is its row kept[i].
    void select(const LoraView& from, const int64_t* kept, int64_t count) {
        clear(count);
        std::vector<std::pair<int32_t, int32_t>> order;
        for (int64_t i = 0; i < count; ++i)
            if (from.places[kept[i]].at >= 0) order.emplace_back(from.places[kept[i]].at, int32_t(i));
        std::sort(order.begin(), order.end());
        for (const auto& one : order) append(one.second, from.places[kept[one.second]].slot);
    }

  private:
    void clear(int64_t count) {
        rows.clear();
        pieces.clear();
        places.assign(count, {-1, 0});
    }

    void append(int32_t row, int32_t slot) {
        const int32_t at = int32_t(rows.size());
        rows.push_back(row);
        places[row] = {at, slot};
        if (pieces.empty() || pieces.back().slot != slot || at - pieces.back().begin == PIECE_ROWS)
            pieces.push_back({slot, at, at});
        pieces.back().end = at + 1;
    }
};

// The rows of a step, and memory for their products, which grows and is used again.
class LoraSpace {
  public:
    LoraView all, kept;

    char* products() { return aligned(products_); }
    Vec* parts() { return (Vec*)aligned(parts_); }
    // Zeros, which every user leaves behind.
    std::atomic<uint32_t>* counters() { return counters_.get(); }

    // All members of the team call this with the same sizes.
    void grow(Team& team, size_t product_bytes, size_t part_bytes, size_t num_counters) {
        if (product_bytes <= products_.size && part_bytes <= parts_.size && num_counters <= num_counters_) return;
        team.meet();  // all have read the sizes before one changes them
        team.share(1, 1, [&](int64_t) {
            resize(products_, product_bytes);
            resize(parts_, part_bytes);
            if (num_counters <= num_counters_) return;
            counters_.reset(new std::atomic<uint32_t>[num_counters]());
            num_counters_ = num_counters;
        });
    }

  private:
    struct Buffer {
        std::unique_ptr<char[]> data;
        size_t size = 0;
    };
    Buffer products_, parts_;
    std::unique_ptr<std::atomic<uint32_t>[]> counters_;
    size_t num_counters_ = 0;

    static void resize(Buffer& buffer, size_t size) {
        if (size <= buffer.size) return;
        buffer.data.reset(new char[size + 64]);
        buffer.size = size;
    }
    static char* aligned(const Buffer& buffer) { return (char*)(((uintptr_t)buffer.data.get() + 63) / 64 * 64); }
};

// One for each thread that calls kernels.
inline LoraSpace& lora_space() {
    static thread_local LoraSpace space;
    return space;
}

inline int64_t in_slices(const LoraSite& site) { return (site.in + site.width - 1) / site.width; }
inline int64_t out_slices(const LoraSite& site) { return (site.out + site.width - 1) / site.width; }

template <class T>
inline const T* tile_at(const LoraSite& site, int32_t slot, int64_t number) {
    const uint32_t tile = uint32_t(site.first[slot] + number), per_plane = uint32_t(site.plane_tiles);
    const T* plane = (const T*)((const int64_t*)site.planes[slot])[tile / per_plane];
    return plane + tile % per_plane * RANK_GROUP * site.width;
}

template <class T>
inline void multiply_add_chunk(Vec& sum, const T* a, const T* x) {
#ifdef __AVX512BF16__
    if constexpr (PAIR<T> == 2) {
        int64_t four;
        std::memcpy(&four, x, sizeof four);
        sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_set1_epi64(four));
        return;
    }
#endif
    const float e = to_float(x[0]), o = to_float(x[1]);
    sum += load(a) * Vec{e, o, e, o, e, o, e, o, e, o, e, o, e, o, e, o};
}

// Sums of ROWS rows and GROUPS rank groups from `group` on over the slices `begin` to `end`; two adjacent lanes belong to one rank.
template <class T, int GROUPS, int ROWS>
__attribute__((noinline)) void shrink_tile(const LoraSite& site, int32_t slot, int64_t group, int64_t begin,
                                           int64_t end, const T* const* x, Vec* out) {
    constexpr int C = CHUNK<T>;
    Vec sums[2][ROWS][GROUPS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; ++g) sums[0][r][g] = sums[1][r][g] = Vec{};
    for (int64_t slice = begin; slice < end; ++slice) {
        const int64_t from = slice * site.width, count = std::min(site.width, site.in - from);
        const T* a[GROUPS];
        for (int g = 0; g < GROUPS; ++g) a[g] = tile_at<T>(site, slot, (group + g) * in_slices(site) + slice);
        int64_t i = 0;
        for (; i + 2 * C <= count; i += 2 * C)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                    for (int g = 0; g < GROUPS; ++g)
                        multiply_add_chunk(sums[half][r][g], a[g] + (i + half * C) * RANK_GROUP, x[r] + from + i + half * C);
        for (; i < count; i += C) {
            const int some = int(std::min<int64_t>(C, count - i));
            for (int r = 0; r < ROWS; ++r) {
                T last[C] = {};
                std::memcpy(last, x[r] + from + i, some * sizeof(T));
                for (int g = 0; g < GROUPS; ++g) multiply_add_chunk(sums[0][r][g], a[g] + i * RANK_GROUP, last);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < GROUPS; ++g) out[r * GROUPS + g] = sums[0][r][g] + sums[1][r][g];
}

template <class T, int GROUPS, int ROWS = SHRINK_ROWS>
inline void shrink_tile_of(int64_t rows, const LoraSite& site, int32_t slot, int64_t group, int64_t begin, int64_t end,
                           const T* const* x, Vec* out) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return shrink_tile_of<T, GROUPS, ROWS - 1>(rows, site, slot, group, begin, end, x, out);
    }
    shrink_tile<T, GROUPS, ROWS>(site, slot, group, begin, end, x, out);
}


inline int64_t parts_of(const LoraSite& site) { return (site.in + PART - 1) / PART; }

// The products x A^T of a layer's input with the adapters of its rows, for at most MAX_SITES sites; null: no site.
template <class T>
class LoraProducts {
  public:
    // None: no row has an adapter.
    LoraProducts() = default;

    // All members of the team call this; it returns when the products are there. `next`: sites of the products after these,
    // whose A is prefetched while the layer's own products are computed.
    LoraProducts(Team& team, LoraSpace& space, const LoraView& view, const LoraSite* const* sites, int count, const T* x,
                 int64_t x_stride, std::initializer_list<const LoraSite*> next = {})
        : view_(&view), found_(&found_here()), count_(count) {
        found_->now.first_site = found_->later.first_site = -1;
        set_next(next);
        for (int s = 0; s < count; ++s)
            if (sites[s]) width_ = sites[s]->width;
        if (found_->next.size()) width_ = found_->next[0].site->width;
        if (!width_) view_ = nullptr;
        else page_shift_ = __builtin_ctzll(width_ * RANK_GROUP * sizeof(T) / CACHE_LINE);
        int64_t most = 0, parts = 1;
        for (int s = 0; s < count; ++s) {
            sites_[s] = sites[s];
            if (!sites[s]) continue;
            for (const Piece& piece : view.pieces) most = std::max<int64_t>(most, sites[s]->groups[piece.slot]);
            parts = std::max(parts, parts_of(*sites[s]));
        }
        if (!most) return;
        stride_ = most * RANK_GROUP;
        const int64_t pieces = int64_t(view.pieces.size()), pairs = (most + 1) / 2, units = count * pieces * pairs;
        // Several members compute the parts of a unit only where there are few units.
        if (units >= 8 * team.size()) parts = 1;
        space.grow(team, count * view.rows.size() * stride_ * sizeof(T),
                   parts > 1 ? units * parts * PIECE_ROWS * 2 * sizeof(Vec) : 0, parts > 1 ? units : 0);
        products_ = (T*)space.products();
        team.share(units * parts, 1, [&](int64_t i) {
            const int64_t unit = i / parts, part = i % parts, pair = unit % pairs;
            const int s = int(unit / pairs / pieces);
            const Piece& piece = view.pieces[unit / pairs % pieces];
            if (!sites_[s]) return;
            const int64_t groups = sites_[s]->groups[piece.slot] - 2 * pair;
            if (groups >= 2) compute<2>(space, s, piece, 2 * pair, x, x_stride, unit, part, parts);
            else if (groups == 1) compute<1>(space, s, piece, 2 * pair, x, x_stride, unit, part, parts);
        });
    }

    // Finds what `add_to` adds in a region: tiles of B. Those of the region's block are used for several regions; those of the
    // next block and of the next products' A are prefetched meanwhile.
    void find(const Region& region) {
        if (!view_) return;
        region_ = region;
        const int64_t columns = region.columns * LANES;
        span_ = std::max(width_, columns);
        const int64_t number = region.output / span_, rows = region.end - region.begin;
        Found& found = *found_;
        if (!found.now.is(region.first_site, number, region.begin, span_)) {
            was_prefetched_ = found.later.is(region.first_site, number, region.begin, span_);
            if (was_prefetched_) std::swap(found.now, found.later);
            else locate(found.now, region, region.first_site, number);
            found.later.first_site = -1;
            found.queue.clear();
            if (rows == region.all_rows) {
                const int64_t end = std::min((number + 1) * span_, outputs_of(region.first_site));
                const int64_t left = std::max<int64_t>(1, (end - region.output + columns - 1) / columns);
                enqueue(region, number, left);
                queue_rows_ = left * rows;
                queued_rows_ = 0;
            }
        }
        if (!was_prefetched_) prefetch_region();
    }

    // What to prefetch while products of so many rows of the region are computed.
    Ahead pages(int64_t, int64_t rows) {
        if (!view_ || found_->queue.empty()) return {};
        const int64_t lines = int64_t(found_->queue.size()) << page_shift_, done = queued_rows_;
        queued_rows_ = std::min(queue_rows_, done + rows);
        return {0, found_->queue.data(), lines * done / queue_rows_, lines * queued_rows_ / queue_rows_, page_shift_};
    }

    // Adds a row's product with B for 16 outputs of the layer from `at` on, in the region of `find`.
    void add_to(Vec& sums, int s, int64_t row, int64_t at) const {
        if (!view_) return;
        const Block& block = found_->now;
        const int64_t output = at - block.number * span_, slice = output / width_;
        const int64_t index = ((row - block.begin) * region_.sites + s - block.first_site) * (span_ / width_) + slice;
        const int32_t begin = block.starts[index], count = block.starts[index + 1] - begin;
        if (!count) return;
        add(sums, block.tiles.data() + begin, count, (output - slice * width_) * RANK_GROUP,
            product(s, view_->places[row].at));
    }

    // Adds the products of a piece to 16 outputs of the layer from `at` on: calls update(row, add), where add(sums) adds.
    template <class Update>
    void add_to_piece(int s, const Piece& piece, int64_t at, Update update) const {
        if (!view_ || !sites_[s]) return;
        std::vector<const T*>& tiles = found_->now.tiles;
        tiles.resize(std::max<size_t>(tiles.size(), stride_ / RANK_GROUP));
        const int64_t output = at - sites_[s]->shift;
        const int64_t count = find_b(*sites_[s], piece.slot, output / width_, tiles.data());
        if (!count) return;
        for (int32_t i = piece.begin; i < piece.end; ++i)
            update(view_->rows[i], [&](Vec& sums) {
                add(sums, tiles.data(), count, output % width_ * RANK_GROUP, product(s, i));
            });
    }

  private:
    // Tiles of A of an adapter.
    struct NextTiles {
        const LoraSite* site;
        int32_t slot;
        int64_t end;  // number of tiles up to their last
    };

    // B of some outputs of one or more sites for some rows.
    struct Block {
        int first_site = -1;  // -1: none
        int64_t number = 0, begin = 0, span = 0;
        std::vector<const T*> tiles;  // [rows][sites][slices of outputs][rank groups of the row]
        int64_t count = 0;            // of tiles
        std::vector<int32_t> starts;  // [rows][sites][slices of outputs] first of those tiles, and their end

        bool is(int site, int64_t block, int64_t row, int64_t outputs) const {
            return first_site == site && number == block && begin == row && span == outputs;
        }
    };

    // Its vectors grow and are used again by the next products of the thread.
    struct Found {
        Block now, later;
        std::vector<const char*> queue;  // tiles to prefetch
        std::vector<NextTiles> next;
    };

    const LoraView* view_ = nullptr;  // null: no row has an adapter
    const LoraSite* sites_[MAX_SITES];
    T* products_ = nullptr;  // [sites][sorted rows][stride]
    int64_t stride_ = 0;
    int64_t width_ = 0, span_ = 0;  // outputs of a tile and of a block
    Found* found_ = nullptr;
    Region region_{};
    bool was_prefetched_ = false;   // the block that contains the region
    int count_ = 0, page_shift_ = 0;
    int64_t queue_rows_ = 1, queued_rows_ = 0;  // rows of products that prefetch the queue, and those that have

    static Found& found_here() {
        static thread_local Found found;
        return found;
    }

    void set_next(std::initializer_list<const LoraSite*> sites) {
        found_->next.clear();
        int64_t end = 0;
        for (const LoraSite* site : sites) {
            if (!site) continue;
            int32_t last = -1;
            for (const Piece& piece : view_->pieces) {
                if (piece.slot == last) continue;
                last = piece.slot;
                end += site->groups[last] * in_slices(*site);
                found_->next.push_back({site, last, end});
            }
        }
    }

    int64_t outputs_of(int s) const { return sites_[s] ? sites_[s]->out : 0; }

    void locate(Block& block, const Region& region, int first_site, int64_t number) const {
        block.first_site = first_site;
        block.number = number;
        block.begin = region.begin;
        block.span = span_;
        const int64_t rows = region.end - region.begin, slices = span_ / width_;
        const size_t most = rows * region.sites * slices * (stride_ / RANK_GROUP), starts = rows * region.sites * slices + 1;
        if (block.tiles.size() < most) block.tiles.resize(most);
        if (block.starts.size() < starts) block.starts.resize(starts);
        const T** tile = block.tiles.data();
        int32_t* start = block.starts.data();
        for (int64_t row = region.begin; row < region.end; ++row) {
            const Place place = view_->places[row];
            for (int s = first_site; s < first_site + region.sites; ++s)
                for (int64_t slice = number * slices; slice < (number + 1) * slices; ++slice) {
                    *start++ = int32_t(tile - block.tiles.data());
                    if (place.at >= 0 && sites_[s] && slice < out_slices(*sites_[s]))
                        tile += find_b(*sites_[s], place.slot, slice, tile);
                }
        }
        *start = int32_t(tile - block.tiles.data());
        block.count = tile - block.tiles.data();
    }

    // Sets the queue: the block after `number`, and the share of the next products' tiles of `left` units.
    void enqueue(const Region& region, int64_t number, int64_t left) {
        Found& found = *found_;
        int site = region.first_site;
        int64_t later = number + 1;
        if (later * span_ >= outputs_of(site)) site += region.sites, later = 0;
        if (site + region.sites <= count_ && outputs_of(site)) {
            locate(found.later, region, site, later);
            const T* last = nullptr;
            for (int64_t i = 0; i < found.later.count; ++i) {
                if (found.later.tiles[i] != last) found.queue.push_back((const char*)found.later.tiles[i]);
                last = found.later.tiles[i];
            }
        }
        if (found.next.empty()) return;
        const int64_t all = found.next.back().end, end = all * std::min(region.unit + left, region.units) / region.units;
        auto one = found.next.begin();
        for (int64_t tile = all * region.unit / region.units; tile < end; ++tile) {
            while (one->end <= tile) ++one;
            const int64_t first = one == found.next.begin() ? 0 : one[-1].end;
            found.queue.push_back((const char*)tile_at<T>(*one->site, one->slot, tile - first));
        }
    }

    // Prefetches B of the region, all at once.
    void prefetch_region() const {
        const Block& block = found_->now;
        const int64_t bytes = std::min(width_, region_.columns * LANES) * RANK_GROUP * int64_t(sizeof(T));
        const int64_t offset = (region_.output - block.number * span_) % width_ * RANK_GROUP;
        for (int64_t i = 0; i < block.count; ++i)
            for (int64_t at = 0; at < bytes; at += CACHE_LINE)
                __builtin_prefetch((const char*)(block.tiles[i] + offset) + at, 0, 2);
    }

    // Addresses of an adapter's B for a slice of a site's outputs, one for each rank group; returns their number.
    static int64_t find_b(const LoraSite& site, int32_t slot, int64_t slice, const T** to) {
        const int64_t groups = site.groups[slot];
        if (!groups) return 0;
        const int64_t slices = out_slices(site), first = groups * in_slices(site) + slice;
        for (int64_t g = 0; g < groups; ++g) to[g] = tile_at<T>(site, slot, first + g * slices);
        return groups;
    }

    static void add(Vec& sums, const T* const* tiles, int64_t groups, int64_t offset, const T* product) {
        for (int64_t g = 0; g < groups; ++g, product += RANK_GROUP)
#pragma GCC unroll 8
            for (int rank = 0; rank < RANK_GROUP; rank += PAIR<T>)
                multiply_add(sums, tiles[g] + offset + rank * LANES, product + rank);
    }

    T* product(int s, int64_t at) const { return products_ + (s * int64_t(view_->rows.size()) + at) * stride_; }

    // One part, or all if they are not shared, of the sums of a piece for GROUPS rank groups from `group` on.
    template <int GROUPS>
    void compute(LoraSpace& space, int s, const Piece& piece, int64_t group, const T* x, int64_t x_stride, int64_t unit,
                 int64_t part, int64_t shared_parts) const {
        const LoraSite& site = *sites_[s];
        const int64_t rows = piece.end - piece.begin;
        const int64_t parts = parts_of(site), slices = in_slices(site), per_part = std::max<int64_t>(1, PART / site.width);
        const int32_t* row = view_->rows.data() + piece.begin;
        const auto sums_of = [&](int64_t p, Vec* sums) {
            const int64_t begin = p * per_part, end = std::min(slices, begin + per_part);
            for_tiles<SHRINK_ROWS>(rows, [&](int64_t first, int64_t count) {
                const T* from[SHRINK_ROWS];
                for (int64_t r = 0; r < count; ++r) from[r] = x + row[first + r] * x_stride;
                shrink_tile_of<T, GROUPS>(count, site, piece.slot, group, begin, end, from, sums + first * GROUPS);
            });
        };
        const auto put = [&](const Vec* totals) {
            for (int64_t i = 0; i < rows * GROUPS; ++i) {
                float lanes[LANES], ranks[LANES];
                store(lanes, totals[i]);
                for (int rank = 0; rank < RANK_GROUP; ++rank) ranks[rank] = lanes[2 * rank] + lanes[2 * rank + 1];
                T* to = product(s, piece.begin + i / GROUPS) + (group + i % GROUPS) * RANK_GROUP;
                store_some(to, load_some(ranks, RANK_GROUP), RANK_GROUP);
            }
        };
        const auto add = [&](Vec* totals, const Vec* sums) {
            for (int64_t i = 0; i < rows * GROUPS; ++i) totals[i] += sums[i];
        };
        Vec totals[PIECE_ROWS * 2], sums[PIECE_ROWS * 2];
        if (shared_parts == 1) {
            sums_of(0, totals);
            for (int64_t p = 1; p < parts; ++p) {
                sums_of(p, sums);
                add(totals, sums);
            }
            return put(totals);
        }
        if (part >= parts) return;
        Vec* const all = space.parts() + unit * shared_parts * PIECE_ROWS * 2;
        sums_of(part, all + part * PIECE_ROWS * 2);
        // The last member to finish a part adds them all, in their order.
        std::atomic<uint32_t>& done = space.counters()[unit];
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 != parts) return;
        done.store(0, std::memory_order_relaxed);
        std::memcpy((void*)totals, all, rows * GROUPS * sizeof(Vec));
        for (int64_t p = 1; p < parts; ++p) add(totals, all + p * PIECE_ROWS * 2);
        put(totals);
    }
};

// Adds the products of a layer's input with its adapters to the layer's output, which may be a partial sum in float.
template <class T, class Y>
inline void add_lora_of(const T* x, int64_t x_stride, int64_t rows, const LoraSite* const* sites, int count,
                        const LoraRows& batch, Y* y, int64_t y_stride) {
    LoraSpace& space = lora_space();
    space.all.set(batch, rows);
    on_team([&](Team& team) {
        const LoraProducts<T> products(team, space, space.all, sites, count, x, x_stride);
        int64_t groups = 0;
        for (int s = 0; s < count; ++s) groups = std::max(groups, (sites[s]->out + LANES - 1) / LANES);
        const LoraView& view = space.all;
        const int64_t pieces = int64_t(view.pieces.size());
        team.share(count * pieces * groups, 8, [&](int64_t i) {
            const int s = int(i / groups / pieces);
            const Piece& piece = view.pieces[i / groups % pieces];
            const int64_t output = i % groups * LANES;
            const int outs = int(std::min<int64_t>(LANES, sites[s]->out - output));
            if (outs <= 0) return;
            const int64_t to = output + sites[s]->shift;
            products.add_to_piece(s, piece, to, [&](int64_t row, auto add) {
                Vec sums = load_some(y + row * y_stride + to, outs);
                add(sums);
                store_some(y + row * y_stride + to, sums, outs);
            });
        });
    });
}

}  // namespace

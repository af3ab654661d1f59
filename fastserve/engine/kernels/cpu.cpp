// The kernels for CPUs and one dtype, behind a C interface: built at the first start by build.py, called through ctypes.
// SCALAR names the type: float, BFloat16 or _Float16.

#include "all_reduce.h"
#include "attention.h"
#include "decoder.h"
#include "elementwise.h"
#include "linear.h"
#include "lora.h"
#include "lora_embedding.h"
#include "quantized.h"

typedef SCALAR Scalar;

extern "C" {

void set_threads(int count) {
    if (team_slot().load()->size() != count) team_slot().store(new Team(count));
}

int num_threads() { return team_slot().load()->size(); }

// Make kernels that the calling thread runs use no other threads of the team.
void work_alone(int yes) { alone = yes; }

int max_rows() { return MAX_ROWS; }

int paged_attention(const Step* step, const Layer* layer) {
    if (!is_supported(*layer)) return 1;
    attention_of<Scalar>(*step, *layer);
    return 0;
}

void rms_norm(const Scalar* x, const Scalar* weight, Scalar* out, int64_t rows, int64_t size, int64_t stride, float eps,
              float offset) {
    norm_of(x, weight, out, rows, size, stride, eps, offset);
}

void silu_and_mul(const Scalar* x, Scalar* out, int64_t rows, int64_t size) { silu_of(x, out, rows, size); }

void rotary(const Scalar* x, const Scalar* cos, const Scalar* sin, Scalar* out, int64_t tokens, int64_t heads,
            int64_t dim, int64_t token_stride, int64_t head_stride) {
    rotate_of(x, cos, sin, out, tokens, heads, dim, token_stride, head_stride);
}

// Whether the tiles of linear.h fit this processor's registers. Where they do not, oneDNN is faster.
int has_fast_products() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

// Number of inputs of an output that are adjacent in a packed weight; `in` must be a multiple of it.
int pair() { return PAIR<Scalar>; }

void pack_weight(const Scalar* weight, Scalar* to, int64_t out, int64_t in) {
    on_team([&](Team& team) { pack(team, weight, to, out, in); });
}

void unpack_weight(const Scalar* from, Scalar* weight, int64_t out, int64_t in) {
    on_team([&](Team& team) { unpack(team, from, weight, out, in); });
}

// Codes of 8 or 4 bits in the layout of quantized.h; `in` and the group size must be multiples of 32 / bits.
void pack_codes(const uint8_t* codes, uint8_t* to, int64_t out, int64_t in, int bits) {
    on_team([&](Team& team) {
        if (bits == 8) pack_codes<8>(team, codes, to, out, in);
        else pack_codes<4>(team, codes, to, out, in);
    });
}

void unpack_codes(const uint8_t* from, uint8_t* codes, int64_t out, int64_t in, int bits) {
    on_team([&](Team& team) {
        if (bits == 8) unpack_codes<8>(team, from, codes, out, in);
        else unpack_codes<4>(team, from, codes, out, in);
    });
}

void linear(const Scalar* x, int64_t x_stride, int64_t rows, const Weight* weight, Scalar* y) {
    linear_of(x, x_stride, rows, *weight, y);
}

// Not rounded: for sums over ranks, which are rounded once.
void linear_in_float32(const Scalar* x, int64_t x_stride, int64_t rows, const Weight* weight, float* y) {
    linear_of(x, x_stride, rows, *weight, y);
}

// Dense rows of a weight (out, in).
void weight_rows(const Weight* weight, const int64_t* rows, int64_t count, Scalar* to) {
    on_team([&](Team& team) {
        team.share(count, rows_at_once(weight->in), [&](int64_t i) { row_of(*weight, rows[i], to + i * weight->in); });
    });
}

// Exchanges with other ranks. They return why the others were lost (all_reduce.h), 0 if they were not.
int all_reduce(Ranks* ranks, const float* part, float* sums, int64_t count) {
    all_reduce_of(*ranks, part, sums, count);
    return ranks->loss;
}

int all_gather(Ranks* ranks, const char* part, char* all, const int64_t* sizes) {
    all_gather_of(*ranks, part, all, sizes);
    return ranks->loss;
}

// For a relay between machines. Returns why ranks were lost, as above.
int wait_for_part(Ranks* ranks, int64_t rank, uint32_t exchange, int64_t* size, int64_t* num_bytes) {
    return find_part(*ranks, rank, exchange, size, num_bytes) ? 0 : ranks->loss.load();
}

// Address of a rank's slot.
const char* part_of(Ranks* ranks, int64_t rank, uint32_t exchange) { return slot_of(*ranks, exchange, rank); }

void write_part(Ranks* ranks, int64_t rank, uint32_t exchange, int64_t size, const char* part, int64_t num_bytes) {
    deliver_part(*ranks, rank, exchange, size, part, num_bytes);
}

// Adds the products of a layer's input with the adapters of its rows to the layer's output, of floats if `in_float`; 1 if
// there are too many sites.
int add_lora(const Scalar* x, int64_t x_stride, int64_t rows, const LoraSite* const* sites, int count,
             const LoraRows* batch, void* y, int64_t y_stride, int in_float) {
    if (count > MAX_SITES) return 1;
    if (in_float)
        add_lora_of(x, x_stride, rows, sites, count, *batch, (float*)y, y_stride);
    else
        add_lora_of(x, x_stride, rows, sites, count, *batch, (Scalar*)y, y_stride);
    return 0;
}

// `ids`: the tokens of all rows.
void add_embedding_lora(const int64_t* ids, const LoraSite* site, const LoraRows* batch, void* y, int64_t y_stride) {
    add_embedding_lora_of(ids, *site, *batch, (Scalar*)y, y_stride);
}

// `adapters` are those of the step's rows, or null. Returns why other ranks were lost, as above.
int decode(const Decoder* model, const Step* step, const Workspace* space, const int64_t* tokens,
           const int64_t* positions, const int64_t* logit_rows, int64_t num_logit_rows, float* logits,
           const LoraRows* adapters) {
    LoraSpace* lora = nullptr;
    if (adapters) {
        lora = &lora_space();
        lora->all.set(*adapters, step->tokens);
        lora->kept.select(lora->all, logit_rows, num_logit_rows);
    }
    on_team([&](Team& team) {
        Run<Scalar>(team, *model, *step, *space, tokens, positions, logit_rows, num_logit_rows, logits, lora)();
    });
    return model->ranks ? model->ranks->loss.load() : 0;
}

}

// The C ABI of halfbyte's CPU kernels: plain pointers, no torch, no Python, no exceptions across it.
//
// A weight is bitsandbytes' bytes as they lie (docs/design.md, "formats"): blocks over the flat row-major weight,
// two codes to a byte, the first in the HIGH nibble. Tables are handed in by the caller; none is typed here.
// Every function takes the number of threads; no result depends on it.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define HB_API extern "C" __declspec(dllexport)
#else
#define HB_API extern "C" __attribute__((visibility("default")))
#endif

enum { HB_ABI_VERSION = 12, HB_MAX_MEMBERS = 8 };
enum hb_dtype { HB_F32 = 0, HB_BF16 = 1, HB_F16 = 2, HB_I8 = 3 };  // HB_I8 only where a weight with scales may be
enum { HB_INT8_BLOCK = 64 };                                       // columns of a row in int8 that share a scale
enum hb_isa { HB_BASELINE = 0, HB_AVX2 = 1, HB_AVX512 = 2, HB_AVX512_BF16 = 3, HB_NEON = 4 };
enum hb_activation { HB_SILU = 0, HB_GELU_TANH = 1 };
enum hb_status { HB_OK = 0, HB_UNSUPPORTED = 1, HB_NO_MEMORY = 2 };

struct hb_weight {
    const uint8_t* codes;
    const void* absmax;          // float[constants * blocks], or uint8_t[] when nested_absmax is set
    const float* nested_absmax;  // NULL: absmax holds the scales themselves
    const float* dynamic_map;    // [256]; read only with nested_absmax
    const float* codebook;       // [16]; not read with 8 bits
    int64_t blocksize;           // a power of two from 32 on
    int64_t nested_blocksize;    // a power of two
    int64_t rows;                // out_features; the linear functions need cols % blocksize == 0
    int64_t cols;                // in_features
    float nested_offset;         // added to scales
    int32_t constants;  // of a block: 1, its scale; or 2, and its offset after it: a weight is value * scale + offset
    int32_t bits;  // of a code: 4, which all functions read; 8 (two's complement), 3 or 2, which hb_dequantize reads
};

// A map of 256 ascending values for 8-bit states, and how to find the nearest one: bounds[i] lies between values i and
// i + 1, bounds[255] is infinite. cells[s][c] counts the bounds below every number of sign s (1: negative) whose
// magnitude has the top 16 bits HB_FIRST_CELL + c, the ends taking what lies beyond; no cell holds two bounds.
enum { HB_FIRST_CELL = 0x3400, HB_LAST_CELL = 0x3f80, HB_CELLS = HB_LAST_CELL - HB_FIRST_CELL + 1 };
struct hb_state_map {
    const float* values;   // [256]
    const float* bounds;   // [256]
    const uint8_t* cells;  // [2][HB_CELLS]
};

struct hb_adamw_numbers {
    float beta1, rest1, beta2, rest2;  // rest = 1 - beta
    float keep;                        // 1 - lr * weight_decay
    float step_size;                   // lr / (1 - beta1^step)
    float root_scale;                  // 1 / sqrt(1 - beta2^step)
    float eps;
};

// n elements of a parameter. Moments are float, or uint8_t codes with a scale for each 256 elements.
struct hb_adamw_page {
    float* param;
    const void* grad;  // HB_F32 or HB_BF16
    void* exp_avg;
    float* exp_avg_absmax;  // NULL: 32-bit moments
    void* exp_avg_sq;
    float* exp_avg_sq_absmax;
    int64_t n;
    int64_t grad_dtype;
};

// Sequences laid end to end, and how their tokens attend to each other: causally, each sequence to itself and to those it
// goes on from. A sequence directly follows its parent or what goes on from that.
struct hb_packed {
    const void* qkv;            // (tokens, (heads + 2 kv_heads) * head_dim) of `dtype`: queries, keys, values
    const int32_t* seq_starts;  // [sequences + 1], rising from 0 to tokens
    const int32_t* key_starts;  // [sequences + 1], likewise of their keys: a sequence's own, after those of its parent
    const int32_t* parents;     // [sequences]: the sequence that each goes on from, or -1; not read where none does
    int64_t tokens;
    int64_t sequences;
    int64_t heads;     // a multiple of kv_heads
    int64_t kv_heads;  // heads / kv_heads neighbouring query heads share one
    int64_t head_dim;  // a multiple of 8, up to 256
    int64_t window;    // keys a token sees, itself included; 0: all before it
    float scale;       // of the scores
    int dtype;
};

// One linear layer of a group that reads the same x, and its LoRA adapter: y = x W^T + bias + scaling (x A^T) B^T. Weights
// of a group have blocks of one size, and all of them offsets or none.
struct hb_member {
    hb_weight weight;
    const void* bias;     // (rows,) in the dtype of x, or NULL
    const float* lora_A;  // (rank, cols)
    const float* lora_B;  // (rows, rank)
    float* grad_A;        // written by hb_linear_backward
    float* grad_B;
    int64_t rank;  // 0: no adapter
    float scaling;
};

HB_API int hb_abi_version(void);
HB_API int hb_isa_supported(int isa);  // 1 when it was built and this CPU runs it
HB_API int hb_isa_current(void);
HB_API int hb_isa_force(int isa);      // HB_OK or HB_UNSUPPORTED
HB_API int hb_has_fused_linear(void);  // does the current ISA have the two linear functions, and the token step?
HB_API int hb_has_attention(int64_t head_dim);  // does the current ISA have the two attention functions for it?
HB_API int hb_fast_bf16(void);                  // does this CPU multiply bf16 natively, and the current ISA allow it?
HB_API int hb_openmp(void);                     // 1 when built with OpenMP
HB_API void hb_release_workspace(void);         // gives the linear functions' kept buffers back to the system

// n elements -> codes[(n + 1) / 2], absmax[ceil(n / blocksize)]. `bounds` are the 15 ascending midpoints, `order` the code
// of each interval. A block with a NaN or Inf gets a NaN or Inf absmax, so that the caller can find it without a pass.
HB_API int hb_quantize(const void* w, int dtype, int64_t n, int64_t blocksize, const float* bounds,
                       const uint8_t* order, uint8_t* codes, float* absmax, int threads);

// n elements, scales[ceil(n / blocksize)] -> codes[(n + 1) / 2], each the nearest under its scale, which may be negative;
// with 2 `constants` an offset follows each scale.
HB_API int hb_codes_for_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* scales,
                               int constants, const float* bounds, const uint8_t* order, uint8_t* codes, int threads);

HB_API int64_t hb_count_nonfinite(const void* x, int dtype, int64_t n, int threads);

// Elements [first, first + n) of the flat weight; `first` is a multiple of the block size. Exact: one fp32 multiply, with
// offsets one add, one round-to-nearest-even cast.
HB_API int hb_dequantize(const hb_weight* w, int64_t first, int64_t n, int dtype, void* out, int threads);

// n floats -> codes[n] of `map`, absmax[ceil(n / 256)]: each block of 256 times the reciprocal of its largest magnitude.
HB_API int hb_quantize_8bit(const float* x, int64_t n, const hb_state_map* map, uint8_t* codes, float* absmax,
                            int threads);

// n elements -> scales[ceil(n / blocksize)], each of least sum of importance times squared error among those that the codes
// of `count` candidates, factors[c] times the largest magnitude, would like best. `importance` is of the cols columns of W,
// or NULL; count is at most 32; `levels` are the 16 ascending values, `bounds` their midpoints. What is not finite makes its scale so.
HB_API int hb_least_error_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance,
                                 int64_t cols, const float* levels, const float* bounds, const float* factors,
                                 int count, float* scales, int threads);

// The same for a scale and an offset of each block, constants[2 ceil(n / blocksize)]: a candidate's codes are those of
// (weight - least - shifts[c] width) / (steps[c] width), width being that between a block's least and largest weight.
HB_API int hb_least_error_constants(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance,
                                    int64_t cols, const float* levels, const float* bounds, const float* steps,
                                    const float* shifts, int count, float* constants, int threads);

// Ranks of the `count` ascending levels for `rows` columns of a weight's codes, at most 128, and what each is off by, both
// [rows * cols] as all but `factor` are, whose row i begins at i * stride: src/halfbyte/quant/choose.py says how.
// `bounds` are the midpoints of the levels.
HB_API int hb_choose_codes(const float* state, const float* scales, int64_t rows, int64_t cols, const float* factor,
                           int64_t stride, const float* levels, const float* bounds, int count, uint8_t* ranks,
                           float* errors, int threads);

// One step in place; maps[0] is exp_avg's, maps[1] exp_avg_sq's, read only where moments have 8 bits.
HB_API int hb_adamw(const hb_adamw_numbers* numbers, const hb_adamw_page* pages, int64_t count,
                    const hb_state_map* maps, int threads);

// Up to HB_MAX_MEMBERS layers of the same cols at once, `rows` and `rank` below being their sums: y(m, rows) of all
// members side by side, and u(m, rank) = x A^T of all adapters, unscaled. Accumulated in fp32. x, y, g and dx are
// contiguous and share `dtype`.
HB_API int hb_linear(const hb_member* members, int count, const void* x, int dtype, int64_t m, void* y, float* u,
                     int threads);
// dx(m, cols) of g(m, rows), or no dx when it is NULL, and the members' grad_A and grad_B. v(m, rank) is scratch; x, u
// and v are not read without adapters.
HB_API int hb_linear_backward(const hb_member* members, int count, const void* g, const void* x, const float* u,
                              int dtype, int64_t m, void* dx, float* v, int threads);

// The same products with a weight(rows, cols) as it is stored, contiguous, of `w_dtype`; HB_I8 with
// scales(rows, ceil(cols / HB_INT8_BLOCK)), else NULL. HB_UNSUPPORTED where the ISA lacks them.
HB_API int hb_linear_frozen(const void* w, const float* scales, int w_dtype, int64_t rows, int64_t cols, const void* x,
                            int dtype, int64_t m, const void* bias, void* y, int threads);
HB_API int hb_linear_frozen_dx(const void* w, const float* scales, int w_dtype, int64_t rows, int64_t cols,
                               const void* g, int dtype, int64_t m, void* dx, int threads);
// sums(m, n) += alpha a(m, depth) b(depth, n): a and b of `dtype`, rows `stride` numbers apart; where a processor
// multiplies bf16, so are these, and else in fp32.
HB_API int hb_add_product(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int dtype, int64_t m,
                          int64_t depth, int64_t n, float alpha, float* sums, int64_t stride, int threads);
// *loss = the cross-entropy of logits(n, vocab), contiguous, summed over rows; with `write` they are overwritten by
// softmax - onehot. Targets lie in [0, vocab): the caller has checked.
typedef struct {
    int32_t column;
    float by;
} hb_change;

// One sweep over all columns of ranks, values and pull [rows * cols], in place; moments [cols * cols] are symmetric, and
// `changes` [rows * cols] and `ends` [rows * (1 + ceil(cols / 128))] are scratch. HB_UNSUPPORTED where the ISA lacks it.
HB_API int hb_improve_codes(uint8_t* ranks, float* values, float* pull, const float* scales, int64_t rows, int64_t cols,
                            const float* moments, const float* levels, const float* bounds, int count,
                            hb_change* changes, int32_t* ends, int threads);

HB_API int hb_softmax_cross_entropy(void* logits, int dtype, int64_t n, int64_t vocab, const int64_t* targets,
                                    double* loss, int write, int threads);
// The kernels below are elementwise over contiguous rows: float32 inside, one rounding to `dtype`. Weights and angles may
// have another type. An ISA may lack them: HB_UNSUPPORTED.
//
// y(rows, n) = x rstd (offset + weight) with rstd(rows) = 1 / sqrt(mean(x^2) + eps). With `delta` (may be NULL), of
// sum = x + delta, rounded and stored, in place of x.
HB_API int hb_rms_norm(const void* x, const void* delta, const void* weight, int dtype, int weight_dtype, int64_t rows,
                       int64_t n, float eps, float offset, void* sum, void* y, float* rstd, int threads);
// dx(rows, n), plus `add` unless that is NULL.
HB_API int hb_rms_norm_backward(const void* g, const void* x, const void* weight, int dtype, int weight_dtype,
                                const float* rstd, const void* add, int64_t rows, int64_t n, float offset, void* dx,
                                int threads);
// qkv(rows, (heads + 2 kv_heads) head_dim): queries and keys are normed head by head with a weight each, values copied;
// rstd(rows, heads + kv_heads). The backward pass works in place.
HB_API int hb_rms_norm_heads(const void* qkv, const void* q_weight, const void* k_weight, int dtype, int weight_dtype,
                             int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps, float offset,
                             void* out, float* rstd, int threads);
HB_API int hb_rms_norm_heads_backward(void* dqkv, const void* qkv, const void* q_weight, const void* k_weight,
                                      int dtype, int weight_dtype, const float* rstd, int64_t rows, int64_t heads,
                                      int64_t kv_heads, int64_t head_dim, float offset, int threads);
// Turns the first `heads` heads of rows of `width` numbers in place; cos and sin are (rows, rotary_dim), rotary_dim <=
// head_dim (and 512: else HB_UNSUPPORTED). `inverse` is the transposed rotation.
HB_API int hb_rope(void* qkv, int dtype, const void* cos, const void* sin, int angle_dtype, int64_t rows, int64_t width,
                   int64_t heads, int64_t head_dim, int64_t rotary_dim, int inverse, int threads);
// gate_up(rows, 2 n) is gates, then ups: out(rows, n) = act(gate) up, and the gradient, which makes that again as h.
HB_API int hb_gated(const void* gate_up, int dtype, int64_t rows, int64_t n, int activation, void* out, int threads);
HB_API int hb_gated_backward(const void* g, const void* gate_up, int dtype, int64_t rows, int64_t n, int activation,
                             void* d_gate_up, void* h, int threads);

// out (tokens, heads * head_dim) of p->dtype, and lse (heads, tokens): the logarithm of each row's sum of e^score.
HB_API int hb_attention(const hb_packed* p, void* out, float* lse, int threads);
// dqkv, shaped as qkv, from g, the gradient of out; every element is written.
HB_API int hb_attention_backward(const hb_packed* p, const void* g, const void* out, const float* lse, void* dqkv,
                                 int threads);

// ---- one token through all layers of a decoder (generation) ----

struct hb_matrix {               // a frozen linear layer, and the adapter on it
    const struct hb_weight* w4;  // the weight in 4 bits; NULL: `dense` holds it
    const void* dense;           // (rows, cols) in `dtype`
    const float* scales;         // of HB_I8, as for hb_linear_frozen; else NULL
    const float* bias;           // (rows) or NULL
    const float* lora_A;         // (rank, cols)
    const float* lora_B;         // (rows, rank)
    int64_t rank;                // 0: no adapter
    int64_t rows;
    int64_t cols;
    int32_t dtype;
    float scaling;
};

struct hb_norm {         // x / sqrt(mean(x^2) + eps) * scale
    const float* scale;  // NULL: no norm in this place
    float eps;
};

enum { HB_KEY_BLOCK = 16 };  // keys lie in blocks of so many positions, feature by feature

struct hb_layer {
    hb_norm input_norm, q_norm, k_norm, post_attention_norm, mlp_norm, post_mlp_norm;
    hb_matrix qkv[3];      // their rows, side by side, are queries, keys, values
    hb_matrix gate_up[2];  // their rows, side by side, are gate, up
    hb_matrix o, down;
    int32_t num_qkv, num_gate_up;
    int32_t heads, kv_heads, head_dim;  // head_dim is a multiple of 16
    int32_t rotary_dim;                 // features of a head that turn, "rotate_half"
    int32_t activation;                 // hb_activation
    int32_t cache_dtype;                // HB_F32 or HB_BF16
    int64_t window;                     // positions a token sees, itself included; 0: all
    float scale;                        // of the attention scores
    const float* cos;                   // (capacity, rotary_dim), a row for each position
    const float* sin;
    void* keys;    // (kv_heads, capacity / HB_KEY_BLOCK, head_dim, HB_KEY_BLOCK)
    void* values;  // (kv_heads, capacity, head_dim)
};

struct hb_decoder {
    const hb_layer* layers;
    int64_t num_layers;
    int64_t hidden_size;
    int64_t capacity;  // positions the caches have room for, a multiple of HB_KEY_BLOCK
    hb_norm final_norm;
    hb_matrix head;
};

// The token at `position`, its embedding x(hidden_size): logits(head.rows), and the token's keys and values into the
// caches, which hold positions 0 to position - 1. Everything is computed in fp32.
HB_API int hb_token_step(const hb_decoder* decoder, int64_t position, const float* x, float* logits, int threads);

// ---- tokens of several sequences through all layers (serving) ----

struct hb_low_rank {  // an adapter on one matrix
    const void* A;    // (rank, cols)
    const void* B;    // (ceil(rows / 16), rank, 16): blocks of 16 rows, transposed, zeros past the end
    int64_t rank;     // 0: nothing on this matrix
    float scaling;
    int32_t dtype;  // of A and B: HB_F32 or HB_BF16
};

// Where a layer's matrices stand in an adapter: qkv, o, gate_up, down.
enum { HB_QKV = 0, HB_O = 3, HB_GATE = 4, HB_DOWN = 6, HB_ADAPTED = 7 };

struct hb_row {
    int64_t position;            // below the decoder's capacity
    const int32_t* blocks;       // of the cache that hold positions 0 to `position`, HB_KEY_BLOCK each
    const hb_low_rank* adapter;  // (num_layers, HB_ADAPTED), or NULL for the base; rows of one are best neighbours
};

struct hb_batch {
    const hb_row* rows;  // those of one sequence in the order of their positions
    int64_t count;
    int64_t num_blocks;     // of the cache
    const float* x;         // (count, hidden_size) embeddings
    const int64_t* wanted;  // rows whose logits are wanted
    int64_t num_wanted;
    float* logits;  // (num_wanted, head.rows)
};

// As hb_token_step for all rows at once, without the adapters of hb_matrix; a row's logits are the same to the bit in
// every batch. Other than there, capacity counts the rows of cos and sin, and each layer's keys and values are pools:
// (num_blocks, kv_heads, head_dim, HB_KEY_BLOCK) and (num_blocks, kv_heads, HB_KEY_BLOCK, head_dim).
HB_API int hb_batch_step(const hb_decoder* decoder, const hb_batch* batch, int threads);

// For measuring the machine: multiply-adds in registers (returns how many floating-point operations each of
// `iterations` is, on all threads together; 0 where the ISA has no vectors), and the sum of n floats.
HB_API int64_t hb_multiply_add(int64_t iterations, int threads);
HB_API float hb_read_all(const float* x, int64_t n, int threads);

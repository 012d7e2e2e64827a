// Run-time choice of the ISA, and the exported functions. Compiled without ISA flags: it runs on any CPU.
#include "table.h"

namespace {

const hb_table* table_of(int isa) {
    switch (isa) {
        case HB_BASELINE: return &hb_table_baseline;
#if defined(HB_X86)
        case HB_AVX2: return &hb_table_avx2;
        case HB_AVX512: return &hb_table_avx512;
        case HB_AVX512_BF16: return &hb_table_avx512_bf16;
#elif defined(HB_ARM64)
        case HB_NEON: return &hb_table_neon;
#endif
        default: return nullptr;
    }
}

bool cpu_runs(int isa) {
    if (isa == HB_BASELINE) return true;
#if defined(HB_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == HB_AVX2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == HB_AVX512) return avx512;
    if (isa == HB_AVX512_BF16) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(HB_ARM64)
    if (isa == HB_NEON) return true;  // a part of the architecture
#endif
    return false;
}

int best_isa() {
    int isa = HB_NEON;
    while (!table_of(isa) || !cpu_runs(isa)) --isa;
    return isa;
}

bool power_of_two(int64_t x, int64_t least) { return x >= least && (x & (x - 1)) == 0; }

bool decodable(const hb_weight* w) {
    const bool known = w->bits == 4 || ((w->bits == 8 || w->bits == 3 || w->bits == 2) && w->blocksize <= 4096);
    return known && power_of_two(w->blocksize, 32) && (!w->nested_absmax || power_of_two(w->nested_blocksize, 1));
}

int current_isa = -1;  // -1: not chosen yet. Choosing twice from two threads gives the same answer.

const hb_table* current() {
    if (current_isa < 0) current_isa = best_isa();
    return table_of(current_isa);
}

}  // namespace

int hb_abi_version(void) { return HB_ABI_VERSION; }

int hb_isa_supported(int isa) { return table_of(isa) && cpu_runs(isa); }

int hb_isa_current(void) {
    current();
    return current_isa;
}

int hb_isa_force(int isa) {
    if (!hb_isa_supported(isa)) return HB_UNSUPPORTED;
    current_isa = isa;
    return HB_OK;
}

int hb_has_fused_linear(void) { return current()->linear != nullptr; }

int hb_has_attention(int64_t head_dim) { return current()->attention && head_dim % 8 == 0 && head_dim <= 256; }

int hb_fast_bf16(void) { return hb_isa_current() == HB_AVX512_BF16; }

int hb_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

int hb_quantize(const void* w, int dtype, int64_t n, int64_t blocksize, const float* bounds, const uint8_t* order,
                uint8_t* codes, float* absmax, int threads) {
    if (!power_of_two(blocksize, 32)) return HB_UNSUPPORTED;
    current()->quantize(w, dtype, n, blocksize, bounds, order, codes, absmax, threads);
    return HB_OK;
}

int hb_codes_for_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* scales, int constants,
                        const float* bounds, const uint8_t* order, uint8_t* codes, int threads) {
    if (!power_of_two(blocksize, 32) || constants < 1 || constants > 2) return HB_UNSUPPORTED;
    current()->codes_for_scales(w, dtype, n, blocksize, scales, constants, bounds, order, codes, threads);
    return HB_OK;
}

int64_t hb_count_nonfinite(const void* x, int dtype, int64_t n, int threads) {
    return current()->count_nonfinite(x, dtype, n, threads);
}

int hb_dequantize(const hb_weight* w, int64_t first, int64_t n, int dtype, void* out, int threads) {
    if (!decodable(w) || first % w->blocksize) return HB_UNSUPPORTED;
    hb_prefer_huge_pages(out, n * (dtype == HB_F32 ? 4 : 2));
    current()->dequantize(w, first, n, dtype, out, threads);
    return HB_OK;
}

int hb_quantize_8bit(const float* x, int64_t n, const hb_state_map* map, uint8_t* codes, float* absmax, int threads) {
    current()->quantize_8bit(x, n, map, codes, absmax, threads);
    return HB_OK;
}

int hb_least_error_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance, int64_t cols,
                          const float* levels, const float* bounds, const float* factors, int count, float* scales,
                          int threads) {
    if (!power_of_two(blocksize, 32) || blocksize > 4096 || cols < 1 || count < 1 || count > 32) return HB_UNSUPPORTED;
    current()->least_error_scales(w, dtype, n, blocksize, importance, cols, levels, bounds, factors, count, scales,
                                  threads);
    return HB_OK;
}

int hb_least_error_constants(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance,
                             int64_t cols, const float* levels, const float* bounds, const float* steps,
                             const float* shifts, int count, float* constants, int threads) {
    if (!power_of_two(blocksize, 32) || blocksize > 4096 || cols < 1 || count < 1 || count > 32) return HB_UNSUPPORTED;
    current()->least_error_constants(w, dtype, n, blocksize, importance, cols, levels, bounds, steps, shifts, count,
                                     constants, threads);
    return HB_OK;
}

int hb_choose_codes(const float* state, const float* scales, int64_t rows, int64_t cols, const float* factor,
                    int64_t stride, const float* levels, const float* bounds, int count, uint8_t* ranks, float* errors,
                    int threads) {
    if (rows > 128 || count < 1 || count > 256) return HB_UNSUPPORTED;
    current()->choose_codes(state, scales, rows, cols, factor, stride, levels, bounds, count, ranks, errors, threads);
    return HB_OK;
}

int hb_adamw(const hb_adamw_numbers* numbers, const hb_adamw_page* pages, int64_t count, const hb_state_map* maps,
             int threads) {
    current()->adamw(numbers, pages, count, maps, threads);
    return HB_OK;
}

static bool multiplies(const hb_member* members, int count) {
    if (count < 1 || count > HB_MAX_MEMBERS) return false;
    for (const hb_member* member = members; member < members + count; ++member) {
        const hb_weight* w = &member->weight;
        if (!decodable(w) || w->bits != 4 || w->cols % w->blocksize || w->cols != members->weight.cols) return false;
    }
    return true;
}

int hb_linear(const hb_member* members, int count, const void* x, int dtype, int64_t m, void* y, float* u,
              int threads) {
    const hb_table* table = current();
    if (!table->linear || !multiplies(members, count)) return HB_UNSUPPORTED;
    int64_t rows = 0;
    for (int i = 0; i < count; ++i) rows += members[i].weight.rows;
    hb_prefer_huge_pages(y, m * rows * (dtype == HB_F32 ? 4 : 2));
    return table->linear(members, count, x, dtype, m, y, u, threads);
}

int hb_linear_backward(const hb_member* members, int count, const void* g, const void* x, const float* u, int dtype,
                       int64_t m, void* dx, float* v, int threads) {
    const hb_table* table = current();
    if (!table->linear_backward || !multiplies(members, count)) return HB_UNSUPPORTED;
    if (dx) hb_prefer_huge_pages(dx, m * members->weight.cols * (dtype == HB_F32 ? 4 : 2));
    return table->linear_backward(members, count, g, x, u, dtype, m, dx, v, threads);
}

int hb_linear_frozen(const void* w, const float* scales, int w_dtype, int64_t rows, int64_t cols, const void* x,
                     int dtype, int64_t m, const void* bias, void* y, int threads) {
    const auto function = current()->linear_frozen;
    if (!function) return HB_UNSUPPORTED;
    hb_prefer_huge_pages(y, m * rows * (dtype == HB_F32 ? 4 : 2));
    return function(w, scales, w_dtype, rows, cols, x, dtype, m, bias, y, threads);
}

int hb_linear_frozen_dx(const void* w, const float* scales, int w_dtype, int64_t rows, int64_t cols, const void* g,
                        int dtype, int64_t m, void* dx, int threads) {
    const auto function = current()->linear_frozen_dx;
    if (!function) return HB_UNSUPPORTED;
    hb_prefer_huge_pages(dx, m * cols * (dtype == HB_F32 ? 4 : 2));
    return function(w, scales, w_dtype, rows, cols, g, dtype, m, dx, threads);
}

int hb_add_product(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int dtype, int64_t m,
                   int64_t depth, int64_t n, float alpha, float* sums, int64_t stride, int threads) {
    const auto function = current()->add_product;
    return function ? function(a, a_stride, b, b_stride, dtype, m, depth, n, alpha, sums, stride, threads)
                    : HB_UNSUPPORTED;
}

int hb_improve_codes(uint8_t* ranks, float* values, float* pull, const float* scales, int64_t rows, int64_t cols,
                     const float* moments, const float* levels, const float* bounds, int count, hb_change* changes,
                     int32_t* ends, int threads) {
    const auto function = current()->improve_codes;
    if (!function || count < 1 || count > 256) return HB_UNSUPPORTED;
    return function(ranks, values, pull, scales, rows, cols, moments, levels, bounds, count, changes, ends, threads);
}

int hb_softmax_cross_entropy(void* logits, int dtype, int64_t n, int64_t vocab, const int64_t* targets, double* loss,
                             int write, int threads) {
    const auto function = current()->softmax_cross_entropy;
    return function ? function(logits, dtype, n, vocab, targets, loss, write, threads) : HB_UNSUPPORTED;
}

int hb_rms_norm(const void* x, const void* delta, const void* weight, int dtype, int weight_dtype, int64_t rows,
                int64_t n, float eps, float offset, void* sum, void* y, float* rstd, int threads) {
    const auto function = current()->rms_norm;
    return function ? function(x, delta, weight, dtype, weight_dtype, rows, n, eps, offset, sum, y, rstd, threads)
                    : HB_UNSUPPORTED;
}

int hb_rms_norm_backward(const void* g, const void* x, const void* weight, int dtype, int weight_dtype,
                         const float* rstd, const void* add, int64_t rows, int64_t n, float offset, void* dx,
                         int threads) {
    const auto function = current()->rms_norm_backward;
    return function ? function(g, x, weight, dtype, weight_dtype, rstd, add, rows, n, offset, dx, threads)
                    : HB_UNSUPPORTED;
}

int hb_rms_norm_heads(const void* qkv, const void* q_weight, const void* k_weight, int dtype, int weight_dtype,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps, float offset,
                      void* out, float* rstd, int threads) {
    const auto function = current()->rms_norm_heads;
    return function ? function(qkv, q_weight, k_weight, dtype, weight_dtype, rows, heads, kv_heads, head_dim, eps,
                               offset, out, rstd, threads)
                    : HB_UNSUPPORTED;
}

int hb_rms_norm_heads_backward(void* dqkv, const void* qkv, const void* q_weight, const void* k_weight, int dtype,
                               int weight_dtype, const float* rstd, int64_t rows, int64_t heads, int64_t kv_heads,
                               int64_t head_dim, float offset, int threads) {
    const auto function = current()->rms_norm_heads_backward;
    return function ? function(dqkv, qkv, q_weight, k_weight, dtype, weight_dtype, rstd, rows, heads, kv_heads,
                               head_dim, offset, threads)
                    : HB_UNSUPPORTED;
}

int hb_rope(void* qkv, int dtype, const void* cos, const void* sin, int angle_dtype, int64_t rows, int64_t width,
            int64_t heads, int64_t head_dim, int64_t rotary_dim, int inverse, int threads) {
    const auto function = current()->rope;
    return function
               ? function(qkv, dtype, cos, sin, angle_dtype, rows, width, heads, head_dim, rotary_dim, inverse, threads)
               : HB_UNSUPPORTED;
}

int hb_gated(const void* gate_up, int dtype, int64_t rows, int64_t n, int activation, void* out, int threads) {
    const auto function = current()->gated;
    return function ? function(gate_up, dtype, rows, n, activation, out, threads) : HB_UNSUPPORTED;
}

int hb_gated_backward(const void* g, const void* gate_up, int dtype, int64_t rows, int64_t n, int activation,
                      void* d_gate_up, void* h, int threads) {
    const auto function = current()->gated_backward;
    return function ? function(g, gate_up, dtype, rows, n, activation, d_gate_up, h, threads) : HB_UNSUPPORTED;
}

int hb_attention(const hb_packed* p, void* out, float* lse, int threads) {
    return hb_has_attention(p->head_dim) ? current()->attention(p, out, lse, threads) : HB_UNSUPPORTED;
}

int hb_attention_backward(const hb_packed* p, const void* g, const void* out, const float* lse, void* dqkv,
                          int threads) {
    if (!hb_has_attention(p->head_dim)) return HB_UNSUPPORTED;
    return current()->attention_backward(p, g, out, lse, dqkv, threads);
}

namespace {

bool usable(const hb_matrix& m) {
    const bool fits =
        !m.w4 || (m.w4->bits == 4 && m.w4->cols % m.w4->blocksize == 0 && m.w4->rows == m.rows && m.w4->cols == m.cols);
    return fits && m.cols % 16 == 0 && (!m.w4 || decodable(m.w4));
}

bool usable(const hb_layer& layer) {
    bool all = usable(layer.o) && usable(layer.down);
    for (int i = 0; i < layer.num_qkv; ++i) all = all && usable(layer.qkv[i]);
    for (int i = 0; i < layer.num_gate_up; ++i) all = all && usable(layer.gate_up[i]);
    return all && layer.head_dim % 16 == 0 && layer.rotary_dim % 2 == 0 && layer.rotary_dim <= layer.head_dim &&
           layer.rotary_dim <= 512 && layer.heads % layer.kv_heads == 0 && layer.cache_dtype != HB_F16;
}

bool usable(const hb_decoder& decoder) {
    bool all = usable(decoder.head) && decoder.hidden_size % 16 == 0;
    for (int64_t i = 0; i < decoder.num_layers; ++i) all = all && usable(decoder.layers[i]);
    return all;
}

bool usable(const hb_batch& batch, int64_t capacity) {
    bool all = batch.count > 0;
    for (const hb_row* row = batch.rows; row < batch.rows + batch.count; ++row) {
        if (row->position < 0 || row->position >= capacity) return false;
        for (int64_t i = 0; i <= row->position / HB_KEY_BLOCK; ++i)
            all = all && row->blocks[i] >= 0 && row->blocks[i] < batch.num_blocks;
    }
    for (int64_t i = 0; i < batch.num_wanted; ++i) all = all && batch.wanted[i] >= 0 && batch.wanted[i] < batch.count;
    return all;
}

}  // namespace

int hb_token_step(const hb_decoder* decoder, int64_t position, const float* x, float* logits, int threads) {
    const hb_table* table = current();
    if (!table->token_step || position < 0 || position >= decoder->capacity || decoder->capacity % HB_KEY_BLOCK ||
        !usable(*decoder))
        return HB_UNSUPPORTED;
    return table->token_step(decoder, position, x, logits, threads);
}

int hb_batch_step(const hb_decoder* decoder, const hb_batch* batch, int threads) {
    const hb_table* table = current();
    if (!table->batch_step || !usable(*decoder) || !usable(*batch, decoder->capacity)) return HB_UNSUPPORTED;
    return table->batch_step(decoder, batch, threads);
}

int64_t hb_multiply_add(int64_t iterations, int threads) {
    const hb_table* table = current();
    if (!table->multiply_add || threads < 1) return 0;
    // The sum of the chains is never NaN; asking keeps the compiler from dropping them.
    const float total = table->multiply_add(iterations, threads);
    return total == total ? 2 * 12 * table->lanes * threads : 0;
}

float hb_read_all(const float* x, int64_t n, int threads) {
    return current()->read_all && threads >= 1 ? current()->read_all(x, n, threads) : 0.0f;
}

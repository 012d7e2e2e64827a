// AdamW on pages, blocks of 256 elements: decode both moments, update, find their new scales, encode. Plain loops, which
// the compiler vectorises for each ISA: memory bounds them. Every operation is rounded by itself, as the specification
// in halfbyte/kernels/adamw.py has it, so the result is the same to the bit on every ISA.

constexpr int64_t state_block = 256;

inline void decode_states(const uint8_t* codes, float absmax, const hb_state_map& map, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = map.values[codes[i]] * absmax;
}

// The code of a number is how many of the 255 bounds lie below it. Its top 16 bits name a cell that holds one bound at
// most, so one look-up leaves one comparison. Naming the cells first, in a loop that vectorises, halves the time; gathers
// and a search in registers (AVX-512) were not faster.
inline void encode_states(const float* x, const hb_state_map& map, int64_t n, uint8_t* codes, float* absmax) {
    uint32_t peak = 0;  // over the bits: NaN and Inf survive
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        peak = magnitude > peak ? magnitude : peak;
    }
    *absmax = float_of(peak);
    const float inverse = 1.0f / (*absmax < 1e-38f ? 1e-38f : *absmax);
    alignas(64) float scaled[state_block];
    alignas(64) int32_t cells[state_block];
    for (int64_t i = 0; i < n; ++i) {
        scaled[i] = x[i] * inverse;
        const int32_t bits = int32_t(bits_of(scaled[i])), top = bits >> 16 & 0x7fff;
        const int32_t low = top < HB_FIRST_CELL ? HB_FIRST_CELL : top, both = low > HB_LAST_CELL ? HB_LAST_CELL : low;
        cells[i] = both - HB_FIRST_CELL + (bits < 0 ? HB_CELLS : 0);
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t below = map.cells[cells[i]];
        codes[i] = uint8_t(below + (scaled[i] > map.bounds[below]));
    }
}

void quantize_8bit(const float* x, int64_t n, const hb_state_map* map, uint8_t* codes, float* absmax, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(n * 4, threads))
    for (int64_t block = 0; block < divide_up(n, state_block); ++block) {
        const int64_t start = block * state_block;
        encode_states(x + start, *map, at_most(state_block, n - start), codes + start, absmax + block);
    }
}

template <class T>
inline void adamw_elements(const hb_adamw_numbers& a, const T* grad, int64_t n, float* __restrict param,
                           float* __restrict exp_avg, float* __restrict exp_avg_sq) {
    for (int64_t i = 0; i < n; ++i) {
        const float g = widen(grad[i]);
        const float first = exp_avg[i] * a.beta1 + g * a.rest1;
        const float second = exp_avg_sq[i] * a.beta2 + g * a.rest2 * g;
        exp_avg[i] = first;
        exp_avg_sq[i] = second;
        const float denominator = __builtin_sqrtf(second) * a.root_scale + a.eps;
        param[i] = param[i] * a.keep - first * a.step_size / denominator;
    }
}

inline void adamw_numbers(const hb_adamw_numbers& a, const hb_adamw_page& page, int64_t start, int64_t n,
                          float* exp_avg, float* exp_avg_sq) {
    if (page.grad_dtype == HB_BF16)
        adamw_elements(a, static_cast<const bf16*>(page.grad) + start, n, page.param + start, exp_avg, exp_avg_sq);
    else
        adamw_elements(a, static_cast<const float*>(page.grad) + start, n, page.param + start, exp_avg, exp_avg_sq);
}

// The arithmetic of a block is long enough to hide the way of the next one's lines, which the hardware would not fetch.
inline void prefetch_block(const hb_adamw_page& page, int64_t start) {
    const int64_t grad_bytes = page.grad_dtype == HB_BF16 ? 2 : 4;
    for (int64_t i = 0; i < state_block; i += 16) {
        __builtin_prefetch(page.param + start + i, 1);
        __builtin_prefetch(static_cast<const char*>(page.grad) + (start + i) * grad_bytes);
    }
    for (int64_t i = 0; i < state_block; i += 64) {
        __builtin_prefetch(static_cast<uint8_t*>(page.exp_avg) + start + i, 1);
        __builtin_prefetch(static_cast<uint8_t*>(page.exp_avg_sq) + start + i, 1);
    }
}

inline void adamw_block(const hb_adamw_numbers& a, const hb_adamw_page& page, const hb_state_map* maps, int64_t block) {
    const int64_t start = block * state_block, n = at_most(state_block, page.n - start);
    if (!page.exp_avg_absmax) {
        adamw_numbers(a, page, start, n, static_cast<float*>(page.exp_avg) + start,
                      static_cast<float*>(page.exp_avg_sq) + start);
        return;
    }
    if (start + state_block < page.n) prefetch_block(page, start + state_block);
    alignas(64) float exp_avg[state_block], exp_avg_sq[state_block];
    uint8_t* codes = static_cast<uint8_t*>(page.exp_avg) + start;
    uint8_t* codes_sq = static_cast<uint8_t*>(page.exp_avg_sq) + start;
    decode_states(codes, page.exp_avg_absmax[block], maps[0], n, exp_avg);
    decode_states(codes_sq, page.exp_avg_sq_absmax[block], maps[1], n, exp_avg_sq);
    adamw_numbers(a, page, start, n, exp_avg, exp_avg_sq);
    encode_states(exp_avg, maps[0], n, codes, page.exp_avg_absmax + block);
    encode_states(exp_avg_sq, maps[1], n, codes_sq, page.exp_avg_sq_absmax + block);
}

// The blocks of all pages are dealt out in equal runs, so many small parameters keep the threads as busy as one large.
void adamw(const hb_adamw_numbers* a, const hb_adamw_page* pages, int64_t count, const hb_state_map* maps,
           int threads) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) blocks += divide_up(pages[i].n, state_block);
    const int useful = threads_for(blocks * state_block * 4, threads);
#pragma omp parallel num_threads(useful)
    {
        const int64_t from = blocks * thread_number() / team_size();
        const int64_t to = blocks * (thread_number() + 1) / team_size();
        int64_t first = 0;  // block of the page, counted over all pages
        for (int64_t i = 0; i < count && first < to; ++i) {
            const int64_t last = first + divide_up(pages[i].n, state_block);
            for (int64_t b = at_least(from, first); b < at_most(to, last); ++b)
                adamw_block(*a, pages[i], maps, b - first);
            first = last;
        }
    }
}

// The scale of least squared error for each block: of every candidate's codes, the best scale for them in closed form.
// Candidates are lanes, so nothing is summed across lanes, and every instruction set gives the same scales.

constexpr int64_t most_block = 4096, added_at_once = 64;
constexpr int most_factors = 32;
constexpr float least_peak = 1e-36f;  // so that its reciprocal is a number

// Of the candidates, factors times the peak, the scale of most gain. `factors` are whole vectors; `w` times the importance
// `h` stands in `hw`.
template <bool WEIGHTED>
float best_scale(const float* w, const float* h, const float* hw, int64_t n, float peak, const float* factors,
                 int64_t count, const Nearest& nearest) {
    float wished[most_factors], gain[most_factors];
    for (int64_t c = 0; c < count; c += vec_width) {
        const vec inverse = vdiv(vset(1.0f), vmul(vload(factors + c), vset(peak)));
        vec along = vzero(), norm = vzero();  // of weight times value, and of value times value
        for (int64_t start = 0; start < n; start += added_at_once) {
            vec some_along = vzero(), some_norm = vzero();
            for (int64_t i = start; i < at_most(start + added_at_once, n); ++i) {
                const vec x = vset(w[i]), value = vnearest(vmul(x, inverse), nearest);
                some_along = vadd(some_along, vmul(WEIGHTED ? vset(hw[i]) : x, value));
                some_norm = vadd(some_norm, vmul(WEIGHTED ? vmul(vset(h[i]), value) : value, value));
            }
            along = vadd(along, some_along), norm = vadd(norm, some_norm);
        }
        const vec scale = vdiv(along, vmax(norm, vset(1e-38f)));
        vstore(wished + c, scale);
        vstore(gain + c, vmul(along, scale));
    }
    int64_t best = 0;
    for (int64_t c = 1; c < count; ++c) best = gain[c] > gain[best] ? c : best;
    return wished[best];
}

template <class T>
void least_error_scales_typed(const T* all, int64_t n, int64_t blocksize, const float* importance, int64_t cols,
                              const Nearest& nearest, const float* factors, int64_t count, float* scales, int threads) {
#pragma omp parallel for schedule(dynamic, serial_elements / most_block) num_threads(threads_for(n, threads))
    for (int64_t block = 0; block < divide_up(n, blocksize); ++block) {
        float w[most_block], h[most_block], hw[most_block];
        const int64_t start = block * blocksize, length = at_most(blocksize, n - start);
        uint32_t peak_bits = 0;
        for (int64_t i = 0; i < length; ++i) {
            w[i] = widen(all[start + i]);
            const uint32_t magnitude = bits_of(w[i]) & 0x7fffffffu;
            peak_bits = magnitude > peak_bits ? magnitude : peak_bits;
        }
        const float peak = scales[block] = float_of(peak_bits);  // what is not finite shows; a block of zeros keeps 0
        if (peak < least_peak || peak_bits >= 0x7f800000u) continue;
        for (int64_t i = 0, column = start % cols; importance && i < length; ++i) {
            h[i] = importance[column];
            hw[i] = h[i] * w[i];
            column = column + 1 == cols ? 0 : column + 1;
        }
        const auto best = importance ? best_scale<true> : best_scale<false>;
        scales[block] = best(w, h, hw, length, peak, factors, count, nearest);
    }
}

void least_error_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance, int64_t cols,
                        const float* levels, const float* bounds, const float* factors, int count, float* scales,
                        int threads) {
    const Nearest nearest(levels, bounds);
    float whole[most_factors];  // vectors, the last candidate repeated
    const int64_t most = divide_up(count, vec_width) * vec_width;
    for (int64_t c = 0; c < most; ++c) whole[c] = factors[at_most(c, count - 1)];
    switch (dtype) {
        case HB_BF16:
            return least_error_scales_typed(static_cast<const bf16*>(w), n, blocksize, importance, cols, nearest, whole,
                                            most, scales, threads);
        case HB_F16:
            return least_error_scales_typed(static_cast<const fp16*>(w), n, blocksize, importance, cols, nearest, whole,
                                            most, scales, threads);
        default:
            return least_error_scales_typed(static_cast<const float*>(w), n, blocksize, importance, cols, nearest,
                                            whole, most, scales, threads);
    }
}

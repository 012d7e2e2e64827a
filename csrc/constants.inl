// Scale and offset of least squared error for each block: of every candidate's codes the best pair in closed form. As in
// scales.inl candidates are lanes, and every instruction set gives the same numbers.

// Of the candidates, which take weights to the values of (weight - low - shift) / step. `w` is the block less its mean, `low`
// its least, `steps` and `shifts` are parts of its width; `h` its importance, or NULL; `mass` the sum of that.
template <bool WEIGHTED>
void best_constants(const float* w, const float* h, int64_t n, float mass, float mean, float low, float width,
                    const float* steps, const float* shifts, int64_t count, const Nearest& nearest, float* out) {
    float wished[most_factors], sums[most_factors], gain[most_factors];
    for (int64_t c = 0; c < count; c += vec_width) {
        const vec inverse = vdiv(vset(1.0f), vmul(vload(steps + c), vset(width)));
        const vec move = vmul(vadd(vmul(vload(shifts + c), vset(width)), vset(low)), vset(-1.0f));
        vec along = vzero(), norm = vzero(), sum = vzero();  // of weight times value, value times value, and value
        for (int64_t start = 0; start < n; start += added_at_once) {
            vec some_along = vzero(), some_norm = vzero(), some = vzero();
            for (int64_t i = start; i < at_most(start + added_at_once, n); ++i) {
                const vec x = vset(w[i]), value = vnearest(vmul(vadd(x, move), inverse), nearest);
                const vec counted = WEIGHTED ? vmul(vset(h[i]), value) : value;
                some_along = vadd(some_along, vmul(x, counted));
                some_norm = vadd(some_norm, vmul(value, counted));
                some = vadd(some, counted);
            }
            along = vadd(along, some_along), norm = vadd(norm, some_norm), sum = vadd(sum, some);
        }
        norm = vadd(norm, vmul(vmul(sum, sum), vset(-1.0f / mass)));
        const vec scale = vdiv(along, vmax(norm, vset(1e-38f)));
        vstore(wished + c, scale);
        vstore(sums + c, sum);
        vstore(gain + c, vmul(along, scale));
    }
    int64_t best = 0;
    for (int64_t c = 1; c < count; ++c) best = gain[c] > gain[best] ? c : best;
    out[0] = wished[best];
    out[1] = mean - wished[best] * (sums[best] / mass);
}

template <class T>
void least_error_constants_typed(const T* all, int64_t n, int64_t blocksize, const float* importance, int64_t cols,
                                 const Nearest& nearest, const float* steps, const float* shifts, int64_t count,
                                 float* constants, int threads) {
#pragma omp parallel for schedule(dynamic, serial_elements / most_block) num_threads(threads_for(n, threads))
    for (int64_t block = 0; block < divide_up(n, blocksize); ++block) {
        float w[most_block], h[most_block];
        const int64_t start = block * blocksize, length = at_most(blocksize, n - start);
        uint32_t peak_bits = 0;
        float low = widen(all[start]), high = low, mass = 0.0f, sum = 0.0f;
        for (int64_t i = 0, column = start % cols; i < length; ++i) {
            const float x = widen(all[start + i]);
            const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
            peak_bits = magnitude > peak_bits ? magnitude : peak_bits;
            w[i] = x, low = x < low ? x : low, high = x > high ? x : high;
            h[i] = importance ? importance[column] : 1.0f;
            mass += h[i], sum += h[i] * x;
            column = column + 1 == cols ? 0 : column + 1;
        }
        float* out = constants + 2 * block;
        const float width = high - low, mean = sum / mass;
        if (peak_bits >= 0x7f800000u || width < least_peak) {  // what is not finite shows; a block of zeros gets zeros
            out[0] = peak_bits >= 0x7f800000u ? float_of(peak_bits) : 0.0f, out[1] = low;
            continue;
        }
        for (int64_t i = 0; i < length; ++i) w[i] -= mean;
        const auto best = importance ? best_constants<true> : best_constants<false>;
        best(w, h, length, mass, mean, low - mean, width, steps, shifts, count, nearest, out);
    }
}

void least_error_constants(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance,
                           int64_t cols, const float* levels, const float* bounds, const float* steps,
                           const float* shifts, int count, float* constants, int threads) {
    const Nearest nearest(levels, bounds);
    float whole[2][most_factors];  // vectors, the last candidate repeated
    const int64_t most = divide_up(count, vec_width) * vec_width;
    for (int64_t c = 0; c < most; ++c)
        whole[0][c] = steps[at_most(c, count - 1)], whole[1][c] = shifts[at_most(c, count - 1)];
    const auto run = [&](const auto* all) {
        least_error_constants_typed(all, n, blocksize, importance, cols, nearest, whole[0], whole[1], most, constants,
                                    threads);
    };
    switch (dtype) {
        case HB_BF16: return run(static_cast<const bf16*>(w));
        case HB_F16: return run(static_cast<const fp16*>(w));
        default: return run(static_cast<const float*>(w));
    }
}

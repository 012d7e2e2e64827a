// The scale of least squared error for each block: of every candidate's codes, the best scale for them in closed form.
// Plain loops that the compiler makes vectors of; the value of a code is the lowest level and the steps above it.

constexpr int64_t most_block = 4096, scale_lanes = 64;

struct Levels {
    float lowest, bounds[15], steps[15];
    Levels(const float* levels, const float* midpoints) : lowest(levels[0]) {
        for (int k = 0; k < 15; ++k) {
            bounds[k] = midpoints[k];
            steps[k] = levels[k + 1] - levels[k];
        }
    }
};

struct ScaleSums {
    float along, norm;  // of weight times value, and of value times value
};

// `w` times the importance `h` stands in `hw`; all three are zeros up to a multiple of scale_lanes.
inline ScaleSums scale_sums(const float* w, const float* h, const float* hw, int64_t n, float inverse,
                            const Levels& levels) {
    float along[scale_lanes] = {}, norm[scale_lanes] = {}, x[scale_lanes], value[scale_lanes];
    for (int64_t start = 0; start < n; start += scale_lanes) {
        for (int i = 0; i < scale_lanes; ++i) {
            x[i] = w[start + i] * inverse;
            value[i] = levels.lowest;
        }
        for (int k = 0; k < 15; ++k) {
            const float bound = levels.bounds[k], step = levels.steps[k];
            for (int i = 0; i < scale_lanes; ++i) value[i] += x[i] > bound ? step : 0.0f;
        }
        for (int i = 0; i < scale_lanes; ++i) {
            along[i] += hw[start + i] * value[i];
            norm[i] += h[start + i] * value[i] * value[i];
        }
    }
    for (int64_t half = scale_lanes / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) {
            along[i] += along[i + half];
            norm[i] += norm[i + half];
        }
    return {along[0], norm[0]};
}

template <class T>
void least_error_scales_typed(const T* all, int64_t n, int64_t blocksize, const float* importance, int64_t cols,
                              const Levels& levels, const float* factors, int count, float* scales, int threads) {
#pragma omp parallel for schedule(dynamic, serial_elements / most_block) num_threads(threads_for(n, threads))
    for (int64_t block = 0; block < divide_up(n, blocksize); ++block) {
        float w[most_block], h[most_block], hw[most_block];
        const int64_t start = block * blocksize, length = at_most(blocksize, n - start);
        uint32_t peak_bits = 0;
        for (int64_t i = 0, column = start % cols; i < length; ++i) {
            w[i] = widen(all[start + i]);
            h[i] = importance ? importance[column] : 1.0f;
            hw[i] = h[i] * w[i];
            column = column + 1 == cols ? 0 : column + 1;
            const uint32_t magnitude = bits_of(w[i]) & 0x7fffffffu;
            peak_bits = magnitude > peak_bits ? magnitude : peak_bits;
        }
        for (int64_t i = length; i < divide_up(length, scale_lanes) * scale_lanes; ++i) w[i] = h[i] = hw[i] = 0.0f;
        const float peak = float_of(peak_bits);
        scales[block] = peak;  // what is not finite shows; a block of zeros keeps 0
        if (peak_bits == 0 || peak_bits >= 0x7f800000u) continue;
        float best = -1.0f;
        for (int c = 0; c < count; ++c) {
            const ScaleSums sums = scale_sums(w, h, hw, length, 1.0f / (factors[c] * peak), levels);
            const float norm = sums.norm < 1e-38f ? 1e-38f : sums.norm;
            const float gain = sums.along * (sums.along / norm);
            if (gain > best) {
                best = gain;
                scales[block] = sums.along / norm;
            }
        }
    }
}

void least_error_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* importance, int64_t cols,
                        const float* levels, const float* bounds, const float* factors, int count, float* scales,
                        int threads) {
    const Levels steps(levels, bounds);
    switch (dtype) {
        case HB_BF16:
            return least_error_scales_typed(static_cast<const bf16*>(w), n, blocksize, importance, cols, steps, factors,
                                            count, scales, threads);
        case HB_F16:
            return least_error_scales_typed(static_cast<const fp16*>(w), n, blocksize, importance, cols, steps, factors,
                                            count, scales, threads);
        default:
            return least_error_scales_typed(static_cast<const float*>(w), n, blocksize, importance, cols, steps,
                                            factors, count, scales, threads);
    }
}

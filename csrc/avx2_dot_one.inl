// AVX2: rows of W times one x, the product that generation is made of.

inline void order_one(const float* x, int64_t cols, float* out) { order_row(x, cols, out); }

// y = rows [first, last) of W, in blocks of 64, times x, which order_one has ordered. Four sums hide the adder's latency.
HB_NOINLINE void dot_one_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                            float* y) {
    const int64_t blocks = w.cols / 64;
    float scales[max_row_scales];
    for (int64_t row = first; row < last; ++row) {
        scales_of_row(w, row * blocks, blocks, scales);
        const uint8_t* codes = w.codes + row * (w.cols / 2);
        __m256 total = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; ++b) {
            __m256i nibbles[2];
            nibbles_of(codes + b * 32, true, nibbles, nibbles + 1);
            __m256 sums[4];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                __m256 v[4];
                lookup32(nibbles[h], d.plane, v);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m256 from = _mm256_loadu_ps(x + b * 64 + 32 * h + 8 * j);
                    sums[j] = h ? _mm256_fmadd_ps(v[j], from, sums[j]) : _mm256_mul_ps(v[j], from);
                }
            }
            const __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
            total = _mm256_fmadd_ps(sum, _mm256_broadcast_ss(scales + b), total);
        }
        y[row] = sum_of(total);
    }
}

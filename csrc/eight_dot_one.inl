// Vectors of eight: rows of W times one x, the product that generation is made of.

inline void order_one(const float* x, int64_t cols, float* out) { order_row(x, cols, out); }

// y = rows [first, last) of W, in blocks of 64, times x, which order_one has ordered. Four sums hide the adder's latency.
HB_NOINLINE void dot_one_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                            float* y) {
    const int64_t blocks = w.cols / 64;
    float scales[max_row_scales];
    for (int64_t row = first; row < last; ++row) {
        scales_of_row(w, row * blocks, blocks, scales);
        const uint8_t* codes = w.codes + row * (w.cols / 2);
        vec total = vzero();
        for (int64_t b = 0; b < blocks; ++b) {
            codes32 nibbles[2];
            nibbles_of(codes + b * 32, true, nibbles, nibbles + 1);
            vec sums[4];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                vec v[4];
                lookup32(nibbles[h], d.plane, v);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const vec from = vload(x + b * 64 + 32 * h + 8 * j);
                    sums[j] = h ? vfma(v[j], from, sums[j]) : vmul(v[j], from);
                }
            }
            const vec sum = vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3]));
            total = vfma(sum, vbroadcast(scales + b), total);
        }
        y[row] = vsum(total);
    }
}

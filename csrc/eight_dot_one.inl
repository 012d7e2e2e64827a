// Vectors of eight: rows of W times one x, or a few, the product that generation is made of. Each x is multiplied as if
// it were the only one.

constexpr int64_t few_rows = 4;  // of x at a time: 64 weights and the sums of one fill the registers

inline void order_one(const float* x, int64_t cols, float* out) { order_row(x, cols, out); }

// y(M, y_stride) = rows [first, last) of W, in blocks of 64, times x(M, stride), which order_one has ordered. Four sums
// hide the adder's latency.
template <int M>
HB_NOINLINE void dot_few_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                            int64_t stride, float* y, int64_t y_stride) {
    const int64_t blocks = w.cols / 64;
    float scales[max_row_scales];
    for (int64_t row = first; row < last; ++row) {
        scales_of_row(w, row * blocks, blocks, scales);
        const uint8_t* codes = w.codes + row * (w.cols / 2);
        vec total[M];
        for (int m = 0; m < M; ++m) total[m] = vzero();
        for (int64_t b = 0; b < blocks; ++b) {
            codes32 nibbles[2];
            nibbles_of(codes + b * 32, true, nibbles, nibbles + 1);
            vec v[2][4];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) lookup32(nibbles[h], d.plane, v[h]);
            const vec scale = vbroadcast(scales + b);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const float* from = x + m * stride + b * 64;
                vec sums[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    sums[j] = vfma(v[1][j], vload(from + 32 + 8 * j), vmul(v[0][j], vload(from + 8 * j)));
                total[m] = vfma(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])), scale, total[m]);
            }
        }
        for (int m = 0; m < M; ++m) y[m * y_stride + row] = vsum(total[m]);
    }
}

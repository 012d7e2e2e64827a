// Offsets of blocks in products with a few rows of x: each is multiplied by the sum of its block of x, and of the transposed
// product added to all columns of its block.

// sums[m, blocks] of x(m, cols), block by block; blocks lie within rows.
template <class T>
void block_sums(const T* x, int64_t cols, int64_t blocksize, float* sums) {
    for (int64_t start = 0; start < cols; start += blocksize, ++sums) {
        float sum = 0.0f;
        for (int64_t i = 0; i < blocksize; ++i) sum += widen(x[start + i]);
        *sums = sum;
    }
}

// y(M), y_stride apart, += row `row` of the offsets of W times sums(M, stride).
template <int M>
HB_NOINLINE void add_offsets(const hb_weight& w, int64_t row, const float* sums, int64_t stride, float* y,
                             int64_t y_stride) {
    const int64_t blocks = w.cols / w.blocksize;
    float offsets[max_row_scales];
    for (int64_t first = 0; first < blocks; first += max_row_scales) {
        const int64_t count = at_most(max_row_scales, blocks - first);
        offsets_of_row(w, row * blocks + first, count, offsets);
        for (int m = 0; m < M; ++m) {
            const float* from = sums + m * stride + first;
            y[m * y_stride] += sum_lanes(count, [&](int64_t i, auto lanes, vec sum) {
                return vfma(lanes.load(offsets + i), lanes.load(from + i), sum);
            });
        }
    }
}

// sums(M, blocks of a row) = g(M, g_stride) times the offsets of rows [row, row + rows) of W.
template <int M>
void sum_offsets(const hb_weight& w, int64_t row, int64_t rows, const float* g, int64_t g_stride, float* sums) {
    const int64_t blocks = w.cols / w.blocksize;
    float offsets[max_row_scales];
    for (int64_t i = 0; i < M * blocks; ++i) sums[i] = 0.0f;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t first = 0; first < blocks; first += max_row_scales) {
            const int64_t count = at_most(max_row_scales, blocks - first);
            offsets_of_row(w, (row + r) * blocks + first, count, offsets);
            for (int m = 0; m < M; ++m) {
                const float factor = g[m * g_stride + r];
                float* to = sums + m * blocks + first;
                for (int64_t b = 0; b < count; ++b) to[b] += factor * offsets[b];
            }
        }
}

// Vectors of eight: one row of W times a few rows of x, decoding in registers.
// x is put once into the order in which two byte-plane look-ups give the weights, so the weights need no shuffle.

constexpr int64_t max_dot_rows = 6;  // from 7 on the tile kernel is as fast

inline int64_t ordered_length(int64_t cols) { return divide_up(cols, 64) * 64; }

// Bytes i and i + 16 of a 64-block's codes come out of the look-up together, first all high nibbles, then all low ones:
// out[nibble][j][lane][i] = x[32 lane + 8 j + 2 i + nibble]. `cols` is a multiple of 32; zeros past the end.
template <class T>
void order_row(const T* x, int64_t cols, float* out) {
    for (int64_t start = 0; start < cols; start += 64)
        for (int64_t k = start; k < start + 32; k += 8) {
            const vec a = vload(x + k), b = start + 64 <= cols ? vload(x + k + 32) : vzero();
            vec even, odd;
            separate(a, b, &even, &odd);
            vstore(out + k, even);
            vstore(out + k + 32, odd);
        }
}

// What order_row has put into order, n numbers (a multiple of 32).
inline void restore_order(const float* ordered, int64_t n, float* out) {
    for (int64_t start = 0; start < n; start += 64)
        for (int64_t k = start; k < start + 32; k += 8) {
            const vec even = vload(ordered + k), odd = vload(ordered + k + 32);
            vec a, b;
            interleave(even, odd, &a, &b);
            vstore(out + k, a);
            if (start + 64 <= n) vstore(out + k + 32, b);
        }
}

// The scales of weights [first, first + count), 32 or 64 of them: those of the first 32 in the low half.
inline vec scales_of(const hb_weight& w, int64_t first, int64_t count) {
    const int64_t block = over(first, w.blocksize);
    const vec scale = vset(scale_of(w, block));
    if (w.blocksize > 32 || count <= 32) return scale;
    return with_high(scale, scale_of(w, block + 1));
}

// sums[M] = row `row` of W times the M ordered rows of x, `stride` floats apart.
template <int M>
void dot_row(const hb_weight& w, const Decoder& d, int64_t row, const float* x, int64_t stride, float* sums) {
    constexpr int chains = M <= 2 ? 2 : 1;
    const uint8_t* codes = w.codes + row * (w.cols / 2);
    vec total[M];
    for (int m = 0; m < M; ++m) total[m] = vzero();
    for (int64_t k = 0; k < w.cols; k += 64) {
        const int64_t count = at_most(64, w.cols - k);
        vec part[M][chains];
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < chains; ++c) part[m][c] = vzero();
        codes32 nibbles[2];
        nibbles_of(codes + k / 2, count == 64, nibbles, nibbles + 1);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            vec v[4];
            lookup32(nibbles[h], d.plane, v);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    part[m][j % chains] = vfma(v[j], vload(x + m * stride + k + 32 * h + 8 * j), part[m][j % chains]);
        }
        const vec scales = scales_of(w, row * w.cols + k, count);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const vec sum = chains == 2 ? vadd(part[m][0], part[m][chains - 1]) : part[m][0];
            total[m] = vfma(sum, scales, total[m]);
        }
    }
    for (int m = 0; m < M; ++m) sums[m] = vsum(total[m]);
}

// ---- and the transposed product for a few rows: sums += g W, row of W by row of W ----

constexpr int64_t max_sum_rows = 6;
constexpr int64_t rows_at_once = 2;

// sums[M], `stride` floats apart, += g(M, ROWS) W in columns [column, column + columns), of rows `row` and on of W.
// `sums` are in the order of order_row; g's rows are g_stride apart.
template <int M, int ROWS>
void add_rows(const hb_weight& w, const Decoder& d, int64_t row, int64_t column, int64_t columns, const float* g,
              int64_t g_stride, float* sums, int64_t stride) {
    for (int64_t k = column; k < column + columns; k += 64) {
        const int64_t count = at_most(64, column + columns - k);
        codes32 nibbles[ROWS][2];
        vec scaled[ROWS][M];
        for (int r = 0; r < ROWS; ++r) {
            const int64_t first = (row + r) * w.cols + k;
            nibbles_of(w.codes + first / 2, count == 64, nibbles[r], nibbles[r] + 1);
            const vec scales = scales_of(w, first, count);
            for (int m = 0; m < M; ++m) scaled[r][m] = vmul(scales, vset(g[m * g_stride + r]));
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            vec v[ROWS][4];
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; ++r) lookup32(nibbles[r][h], d.plane, v[r]);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    float* to = sums + m * stride + k + 32 * h + 8 * j;
                    vec sum = vload(to);
#pragma GCC unroll 2
                    for (int r = 0; r < ROWS; ++r) sum = vfma(v[r][j], scaled[r][m], sum);
                    vstore(to, sum);
                }
        }
    }
}

// AVX2: one row of W times a few rows of x, decoding in registers.
// x is put once into the order in which two byte-plane look-ups give the weights, so the weights need no shuffle.

constexpr int64_t max_dot_rows = 6;  // from 7 on the tile kernel is as fast

inline int64_t ordered_length(int64_t cols) { return cols; }

// Each eight numbers as 0 2 4 6 1 3 5 7: lane 0 of the codes holds high nibbles, lane 1 low ones.
template <class T>
void order_row(const T* x, int64_t cols, float* out) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int64_t i = 0; i < cols; i += 8) _mm256_storeu_ps(out + i, _mm256_permutevar8x32_ps(load8(x + i), order));
}

// sums[M] = row `row` of W times the M ordered rows of x, `stride` floats apart.
template <int M>
void dot_row(const hb_weight& w, const Decoder& d, int64_t row, const float* x, int64_t stride, float* sums) {
    constexpr int chains = M <= 2 ? 2 : 1;
    const __m256i nibbles = _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    const uint8_t* codes = w.codes + row * (w.cols / 2);
    int64_t block = row * (w.cols / w.blocksize);
    __m256 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
    for (int64_t start = 0; start < w.cols; start += w.blocksize, ++block) {
        __m256 part[M][chains];
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < chains; ++c) part[m][c] = _mm256_setzero_ps();
        for (int64_t k = start; k < start + w.blocksize; k += 32) {
            const __m256i packed =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k / 2)));
            __m256 v[4];
            lookup32(_mm256_and_si256(_mm256_srlv_epi32(packed, nibbles), _mm256_set1_epi8(15)), d.plane, v);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    part[m][j % chains] =
                        _mm256_fmadd_ps(v[j], _mm256_loadu_ps(x + m * stride + k + 8 * j), part[m][j % chains]);
        }
        const __m256 scale = _mm256_set1_ps(scale_of(w, block));
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const __m256 sum = chains == 2 ? _mm256_add_ps(part[m][0], part[m][chains - 1]) : part[m][0];
            total[m] = _mm256_fmadd_ps(sum, scale, total[m]);
        }
    }
    for (int m = 0; m < M; ++m) sums[m] = sum_of(total[m]);
}

// ---- and the transposed product for a few rows: sums += g W, row of W by row of W ----

constexpr int64_t max_sum_rows = 6;
constexpr int64_t rows_at_once = 2;

// What order_row has put into order, n numbers (a multiple of 8).
inline void restore_order(const float* ordered, int64_t n, float* out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_permutevar8x32_ps(_mm256_loadu_ps(ordered + i), order));
}

// sums[M], `stride` floats apart, += g(M, ROWS) W in columns [column, column + columns), of rows `row` and on of W.
// `sums` are in the order of order_row; g's rows are g_stride apart.
template <int M, int ROWS>
void add_rows(const hb_weight& w, const Decoder& d, int64_t row, int64_t column, int64_t columns, const float* g,
              int64_t g_stride, float* sums, int64_t stride) {
    const __m256i nibbles = _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    const int64_t step = at_most(w.blocksize, 64);
    for (int64_t start = column; start < column + columns; start += step) {
        float scaled[ROWS][M];
        for (int r = 0; r < ROWS; ++r) {
            const float scale = scale_of(w, over((row + r) * w.cols + start, w.blocksize));
            for (int m = 0; m < M; ++m) scaled[r][m] = g[m * g_stride + r] * scale;
        }
        for (int64_t k = start; k < start + step; k += 32) {
            __m256 v[ROWS][4];
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; ++r) {
                const uint8_t* codes = w.codes + ((row + r) * w.cols + k) / 2;
                const __m256i packed =
                    _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
                lookup32(_mm256_and_si256(_mm256_srlv_epi32(packed, nibbles), _mm256_set1_epi8(15)), d.plane, v[r]);
            }
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    float* to = sums + m * stride + k + 8 * j;
                    __m256 sum = _mm256_loadu_ps(to);
#pragma GCC unroll 2
                    for (int r = 0; r < ROWS; ++r) sum = _mm256_fmadd_ps(v[r][j], _mm256_set1_ps(scaled[r][m]), sum);
                    _mm256_storeu_ps(to, sum);
                }
        }
    }
}

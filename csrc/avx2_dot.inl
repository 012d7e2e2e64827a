// AVX2: one row of W times a few rows of x, decoding in registers.
// x is put once into the order in which two byte-plane look-ups give the weights, so the weights need no shuffle.

constexpr int64_t max_dot_rows = 6;  // from 7 on the tile kernel is as fast

inline int64_t ordered_length(int64_t cols) { return divide_up(cols, 64) * 64; }

// Bytes i and i + 16 of a 64-block's codes come out of the look-up together, first all high nibbles, then all low ones:
// out[nibble][j][lane][i] = x[32 lane + 8 j + 2 i + nibble]. `cols` is a multiple of 32; zeros past the end.
template <class T>
void order_row(const T* x, int64_t cols, float* out) {
    for (int64_t start = 0; start < cols; start += 64)
        for (int64_t k = start; k < start + 32; k += 8) {
            const __m256 a = load8(x + k), b = start + 64 <= cols ? load8(x + k + 32) : _mm256_setzero_ps();
            const __m256 p = _mm256_permute2f128_ps(a, b, 0x20), q = _mm256_permute2f128_ps(a, b, 0x31);
            _mm256_storeu_ps(out + k, _mm256_shuffle_ps(p, q, 0x88));
            _mm256_storeu_ps(out + k + 32, _mm256_shuffle_ps(p, q, 0xdd));
        }
}

// What order_row has put into order, n numbers (a multiple of 32).
inline void restore_order(const float* ordered, int64_t n, float* out) {
    for (int64_t start = 0; start < n; start += 64)
        for (int64_t k = start; k < start + 32; k += 8) {
            const __m256 even = _mm256_loadu_ps(ordered + k), odd = _mm256_loadu_ps(ordered + k + 32);
            const __m256 p = _mm256_unpacklo_ps(even, odd), q = _mm256_unpackhi_ps(even, odd);
            _mm256_storeu_ps(out + k, _mm256_permute2f128_ps(p, q, 0x20));
            if (start + 64 <= n) _mm256_storeu_ps(out + k + 32, _mm256_permute2f128_ps(p, q, 0x31));
        }
}

// 64 codes, the high nibbles and the low ones; the second half as zeros when there are only 32.
inline void nibbles_of(const uint8_t* codes, bool whole, __m256i* high, __m256i* low) {
    const __m256i bytes = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
                                : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    *high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    *low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}

// The scales of weights [first, first + count), 32 or 64 of them: those of the first 32 in the low lane.
inline __m256 scales_of(const hb_weight& w, int64_t first, int64_t count) {
    const int64_t block = over(first, w.blocksize);
    const __m256 scale = _mm256_set1_ps(scale_of(w, block));
    if (w.blocksize > 32 || count <= 32) return scale;
    return _mm256_insertf128_ps(scale, _mm_set1_ps(scale_of(w, block + 1)), 1);
}

// sums[M] = row `row` of W times the M ordered rows of x, `stride` floats apart.
template <int M>
void dot_row(const hb_weight& w, const Decoder& d, int64_t row, const float* x, int64_t stride, float* sums) {
    constexpr int chains = M <= 2 ? 2 : 1;
    const uint8_t* codes = w.codes + row * (w.cols / 2);
    __m256 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
    for (int64_t k = 0; k < w.cols; k += 64) {
        const int64_t count = at_most(64, w.cols - k);
        __m256 part[M][chains];
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < chains; ++c) part[m][c] = _mm256_setzero_ps();
        __m256i nibbles[2];
        nibbles_of(codes + k / 2, count == 64, nibbles, nibbles + 1);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            __m256 v[4];
            lookup32(nibbles[h], d.plane, v);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    part[m][j % chains] = _mm256_fmadd_ps(v[j], _mm256_loadu_ps(x + m * stride + k + 32 * h + 8 * j),
                                                          part[m][j % chains]);
        }
        const __m256 scales = scales_of(w, row * w.cols + k, count);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const __m256 sum = chains == 2 ? _mm256_add_ps(part[m][0], part[m][chains - 1]) : part[m][0];
            total[m] = _mm256_fmadd_ps(sum, scales, total[m]);
        }
    }
    for (int m = 0; m < M; ++m) sums[m] = sum_of(total[m]);
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
        __m256i nibbles[ROWS][2];
        __m256 scaled[ROWS][M];
        for (int r = 0; r < ROWS; ++r) {
            const int64_t first = (row + r) * w.cols + k;
            nibbles_of(w.codes + first / 2, count == 64, nibbles[r], nibbles[r] + 1);
            const __m256 scales = scales_of(w, first, count);
            for (int m = 0; m < M; ++m) scaled[r][m] = _mm256_mul_ps(scales, _mm256_set1_ps(g[m * g_stride + r]));
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            __m256 v[ROWS][4];
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; ++r) lookup32(nibbles[r][h], d.plane, v[r]);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    float* to = sums + m * stride + k + 32 * h + 8 * j;
                    __m256 sum = _mm256_loadu_ps(to);
#pragma GCC unroll 2
                    for (int r = 0; r < ROWS; ++r) sum = _mm256_fmadd_ps(v[r][j], scaled[r][m], sum);
                    _mm256_storeu_ps(to, sum);
                }
        }
    }
}

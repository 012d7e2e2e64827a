// AVX-512: one row of W times a few rows of x, decoding in registers.
// 64 bytes are 16 dwords of eight codes; shifting all dwords by one nibble and looking up gives 16 weights, eight apart.
// x is put once into that order, so the weights need no shuffle at all.

constexpr int64_t max_dot_rows = 8;

inline int64_t ordered_length(int64_t cols) { return divide_up(cols, 128) * 128; }

// Weight 8 d + e of 128 is nibble e of dword d: out[e][d], zeros past the end.
template <class T>
void order_row(const T* x, int64_t cols, float* out) {
    for (int64_t start = 0; start < cols; start += 128)
        for (int64_t e = 0; e < 8; ++e)
            for (int64_t d = 0; d < 16; ++d)
                out[start + e * 16 + d] = start + 8 * d + e < cols ? widen(x[start + 8 * d + e]) : 0.0f;
}

// The scales of up to 128 weights from `first` on, eight weights to a lane. No array in memory: reading back at once
// what was stored in parts would stall.
inline __m512 scales_of(const hb_weight& w, int64_t first, int64_t count) {
    const int64_t block = over(first, w.blocksize);
    __m512 scales = _mm512_set1_ps(scale_of(w, block));
    if (w.blocksize == 64) {
        if (count > 64) scales = _mm512_mask_blend_ps(0xff00, scales, _mm512_set1_ps(scale_of(w, block + 1)));
    } else if (w.blocksize == 32) {
        for (int i = 1; i < count / 32; ++i)
            scales = _mm512_mask_blend_ps(__mmask16(0xf << 4 * i), scales, _mm512_set1_ps(scale_of(w, block + i)));
    }
    return scales;
}

// sums[M] = row `row` of W times the M ordered rows of x, `stride` floats apart.
template <int M>
void dot_row(const hb_weight& w, const Decoder& d, int64_t row, const float* x, int64_t stride, float* sums) {
    const __m512 table = _mm512_loadu_ps(d.codebook);
    const uint8_t* codes = w.codes + row * (w.cols / 2);
    __m512 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.cols; k += 128) {
        const int64_t count = at_most(128, w.cols - k);
        // Masked only at the end of a row: on Zen 5 masked loads from cold memory ran 4 times slower (prefetching).
        const __m512i dwords = count == 128
                                   ? _mm512_loadu_si512(codes + k / 2)
                                   : _mm512_maskz_loadu_epi32(__mmask16((1u << (count / 8)) - 1u), codes + k / 2);
        __m512 part[M];
#define HB_ELEMENT(e, bit)                                                             \
    {                                                                                  \
        const __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(dwords, bit), table); \
        _Pragma("GCC unroll 8") for (int m = 0; m < M; ++m) {                          \
            const __m512 y = _mm512_loadu_ps(x + m * stride + k + 16 * e);             \
            part[m] = e == 0 ? _mm512_mul_ps(v, y) : _mm512_fmadd_ps(v, y, part[m]);   \
        }                                                                              \
    }
        HB_ELEMENT(0, 4)
        HB_ELEMENT(1, 0)
        HB_ELEMENT(2, 12)
        HB_ELEMENT(3, 8)
        HB_ELEMENT(4, 20)
        HB_ELEMENT(5, 16)
        HB_ELEMENT(6, 28)
        HB_ELEMENT(7, 24)
#undef HB_ELEMENT
        const __m512 scales = scales_of(w, row * w.cols + k, count);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(part[m], scales, total[m]);
    }
    for (int m = 0; m < M; ++m)
        sums[m] = sum_of(_mm256_add_ps(_mm512_castps512_ps256(total[m]), _mm512_extractf32x8_ps(total[m], 1)));
}

// ---- and the transposed product for a few rows: sums += g W, row of W by row of W ----

constexpr int64_t max_sum_rows = 8;
constexpr int64_t rows_at_once = 8;

// What order_row has put into order: n numbers of up to 128.
inline void restore_order(const float* ordered, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = ordered[i % 8 * 16 + i / 8];
}

// sums[M], `stride` floats apart, += g(M, ROWS) W in columns [column, column + columns), of rows `row` and on of W.
// `sums` are in the order of order_row; g's rows are g_stride apart.
template <int M, int ROWS>
void add_rows(const hb_weight& w, const Decoder& d, int64_t row, int64_t column, int64_t columns, const float* g,
              int64_t g_stride, float* sums, int64_t stride) {
    const __m512 table = _mm512_loadu_ps(d.codebook);
    for (int64_t k = column; k < column + columns; k += 128) {
        const int64_t count = at_most(128, column + columns - k);
        __m512i dwords[ROWS];
        __m512 scaled[M][ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const int64_t first = (row + r) * w.cols + k;
            dwords[r] = count == 128
                            ? _mm512_loadu_si512(w.codes + first / 2)
                            : _mm512_maskz_loadu_epi32(__mmask16((1u << (count / 8)) - 1u), w.codes + first / 2);
            const __m512 scales = scales_of(w, first, count);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) scaled[m][r] = _mm512_mul_ps(scales, _mm512_set1_ps(g[m * g_stride + r]));
        }
#define HB_ELEMENT(e, bit)                                                                                         \
    {                                                                                                              \
        __m512 v[ROWS];                                                                                            \
        _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) v[r] =                                              \
            _mm512_permutexvar_ps(_mm512_srli_epi32(dwords[r], bit), table);                                       \
        _Pragma("GCC unroll 8") for (int m = 0; m < M; ++m) {                                                      \
            float* to = sums + m * stride + k + 16 * e;                                                            \
            __m512 sum = _mm512_loadu_ps(to);                                                                      \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) sum = _mm512_fmadd_ps(v[r], scaled[m][r], sum); \
            _mm512_storeu_ps(to, sum);                                                                             \
        }                                                                                                          \
    }
        HB_ELEMENT(0, 4)
        HB_ELEMENT(1, 0)
        HB_ELEMENT(2, 12)
        HB_ELEMENT(3, 8)
        HB_ELEMENT(4, 20)
        HB_ELEMENT(5, 16)
        HB_ELEMENT(6, 28)
        HB_ELEMENT(7, 24)
#undef HB_ELEMENT
    }
}

// AVX-512: rows of W times one x, or a few, the product that generation is made of. As dot_row, but a row's scales are
// decoded first, four sums hide the adder's latency, and a last half of 128 weights takes half the work. Each x is
// multiplied as if it were the only one.

constexpr int64_t few_rows = 8;  // of x at a time: their sums and 128 weights fit into the registers

// As order_row, but a part of 64 weights or fewer fills its vectors: nibbles 2 t + 1 of the dwords, then nibbles 2 t.
inline void order_one(const float* x, int64_t cols, float* out) {
    const int64_t whole = cols / 128 * 128, rest = cols - whole;
    if (rest == 0 || rest > 64) return order_row(x, cols, out);
    order_row(x, whole, out);
    for (int64_t i = 0; i < 64; ++i) out[whole + i] = 0.0f;
    for (int64_t i = 0; i < rest; ++i) out[whole + i % 8 / 2 * 16 + (i % 2 ? 0 : 8) + i / 8] = x[whole + i];
}

inline __m512 weights_at(__m512i dwords, int bit, __m512 table) {
    return _mm512_permutexvar_ps(bit ? _mm512_srli_epi32(dwords, unsigned(bit)) : dwords, table);
}

// 128 weights, in the order of x.
struct Weights128 {
    __m512 v[8];
    Weights128(__m512i dwords, __m512 table)
        : v{weights_at(dwords, 4, table),  weights_at(dwords, 0, table),  weights_at(dwords, 12, table),
            weights_at(dwords, 8, table),  weights_at(dwords, 20, table), weights_at(dwords, 16, table),
            weights_at(dwords, 28, table), weights_at(dwords, 24, table)} {}
    __m512 dot(const float* x) const {
        __m512 a = _mm512_mul_ps(v[0], _mm512_loadu_ps(x)), b = _mm512_mul_ps(v[1], _mm512_loadu_ps(x + 16));
        __m512 c = _mm512_mul_ps(v[2], _mm512_loadu_ps(x + 32)), d = _mm512_mul_ps(v[3], _mm512_loadu_ps(x + 48));
        a = _mm512_fmadd_ps(v[4], _mm512_loadu_ps(x + 64), a);
        b = _mm512_fmadd_ps(v[5], _mm512_loadu_ps(x + 80), b);
        c = _mm512_fmadd_ps(v[6], _mm512_loadu_ps(x + 96), c);
        d = _mm512_fmadd_ps(v[7], _mm512_loadu_ps(x + 112), d);
        return _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
    }
};

struct Weights64 {
    __m512 v[4];
    Weights64(__m512i dwords, __m512 table)
        : v{weights_at(dwords, 0, table), weights_at(dwords, 8, table), weights_at(dwords, 16, table),
            weights_at(dwords, 24, table)} {}
    __m512 dot(const float* x) const {
        __m512 a = _mm512_mul_ps(v[0], _mm512_loadu_ps(x)), b = _mm512_mul_ps(v[1], _mm512_loadu_ps(x + 16));
        a = _mm512_fmadd_ps(v[2], _mm512_loadu_ps(x + 32), a);
        b = _mm512_fmadd_ps(v[3], _mm512_loadu_ps(x + 48), b);
        return _mm512_add_ps(a, b);
    }
};

// total[M] += `blocks` blocks of a row of W, from `codes` on, times those of x. Where `ahead` is not zero, codes so many
// bytes on are fetched.
template <int M>
inline __attribute__((always_inline)) void add_blocks_64(const uint8_t* codes, const float* scales, __m512 table,
                                                         int64_t blocks, const float* x, int64_t stride, int64_t ahead,
                                                         __m512* total) {
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) {
        if (ahead) __builtin_prefetch(codes + b * 32 + ahead);
        const __m512 low = _mm512_set1_ps(scales[b]);
        const __m512 scale = _mm512_mask_broadcastss_ps(low, 0xff00, _mm_load_ss(scales + b + 1));
        const Weights128 weights(_mm512_loadu_si512(codes + b * 32), table);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(weights.dot(x + m * stride + b * 64), scale, total[m]);
    }
    if (b < blocks) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * 32));
        const __m512i dwords = _mm512_inserti64x4(_mm512_castsi256_si512(half), _mm256_srli_epi32(half, 4), 1);
        const Weights64 weights(dwords, table);
        const __m512 scale = _mm512_set1_ps(scales[b]);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(weights.dot(x + m * stride + b * 64), scale, total[m]);
    }
}

// y(M, y_stride) = the sums of `count` rows of M vectors: as vsum gives them to the bit, but of 16 rows at a time.
template <int M>
inline void store_sums(const __m512 (*total)[M], int64_t count, float* y, int64_t y_stride) {
    static_assert(dot_rows_at_once == 16, "a vector of sums");
    if (count < dot_rows_at_once) {
        for (int64_t row = 0; row < count; ++row)
            for (int m = 0; m < M; ++m) y[m * y_stride + row] = vsum(total[row][m]);
        return;
    }
    const __m512i in_order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    for (int m = 0; m < M; ++m) {
        __m512 halves[8], quarters[4], pairs[2];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m512 a = total[i][m], b = total[i + 8][m];
            halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[i], halves[i + 4], 0x88),
                                        _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0xdd));
        for (int i = 0; i < 2; ++i)
            pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(quarters[i], quarters[i + 2], 0x44),
                                     _mm512_shuffle_ps(quarters[i], quarters[i + 2], 0xee));
        const __m512 sums =
            _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
        _mm512_storeu_ps(y + m * y_stride, _mm512_permutexvar_ps(in_order, sums));
    }
}

// Blocks of 64 columns at a time: M rows of x fill at most half of 48 KB of L1 while rows of W pass by.
template <int M>
constexpr int64_t blocks_at_once = M == 1 ? max_row_scales : 24576 / 256 / M / 2 * 2;

// dot_few_64 for rows that are longer than that, slice by slice; sums are the same to the bit.
template <int M>
HB_NOINLINE void dot_slices_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                               int64_t stride, float* y, int64_t y_stride) {
    const __m512 table = _mm512_loadu_ps(d.codebook);
    const int64_t blocks = w.cols / 64;
    const int64_t slice = divide_up(divide_up(blocks, divide_up(blocks, blocks_at_once<M>)), 2) * 2;
    float scales[blocks_at_once<M>];
    __m512 total[dot_rows_at_once][M];
    for (int64_t row = 0; row < last - first; ++row)
        for (int m = 0; m < M; ++m) total[row][m] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < blocks; begin += slice) {
        const int64_t count = at_most(slice, blocks - begin);
        for (int64_t row = first; row < last; ++row) {
            scales_of_row(w, row * blocks + begin, count, scales);
            const uint8_t* codes = w.codes + row * (w.cols / 2) + begin * 32;
            // A slice of each row is no stream that a processor foresees: that of the row after the next one is asked for.
            add_blocks_64<M>(codes, scales, table, count, x + begin * 64, stride, w.cols, total[row - first]);
        }
    }
    store_sums<M>(total, last - first, y + first, y_stride);
}

// y(M, y_stride) = rows [first, last) of W, in blocks of 64, times x(M, stride), which order_one has ordered; of more
// than one x, up to dot_rows_at_once rows of W. Inlined it runs a fifth slower: gcc keeps the loop's pointers in vector
// registers.
template <int M>
HB_NOINLINE void dot_few_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                            int64_t stride, float* y, int64_t y_stride) {
    const int64_t blocks = w.cols / 64;
    if constexpr (M > 1)
        if (blocks > blocks_at_once<M>) return dot_slices_64<M>(w, d, first, last, x, stride, y, y_stride);
    const __m512 table = _mm512_loadu_ps(d.codebook);
    float scales[max_row_scales];
    __m512 totals[M > 1 ? dot_rows_at_once : 1][M];
    for (int64_t row = first; row < last; ++row) {
        scales_of_row(w, row * blocks, blocks, scales);
        __m512 total[M];
        for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
        // One row of W after the other is a stream; while several x are multiplied it is asked for too late.
        add_blocks_64<M>(w.codes + row * (w.cols / 2), scales, table, blocks, x, stride, M > 1 ? w.cols : 0, total);
        if constexpr (M == 1)
            y[row] = vsum(total[0]);
        else
            for (int m = 0; m < M; ++m) totals[row - first][m] = total[m];
    }
    if constexpr (M > 1) store_sums<M>(totals, last - first, y + first, y_stride);
}

// AVX2: vectors of 8, panels of 6 rows by 16 columns, and the decoding of W into a tile.

#define HB_PANEL_ROWS 6
constexpr int64_t max_panel_rows = HB_PANEL_ROWS;
// Floats from one panel of the tile to the next: not a multiple of 4 KB, or all panels would share one cache set.
constexpr int64_t panel_stride(int64_t depth) { return depth * 2 * vec_width + 16; }
constexpr int64_t panel_width = 2 * vec_width;

// The nibble of element BIT of eight dwords, one row of W in each lane, times the rows' scales.
template <int BIT>
inline void lookup_rows(__m256i dwords, __m256 low, __m256 high, __m256 scales, float* out) {
    const __m256i index = _mm256_srli_epi32(dwords, BIT);  // vpermps reads only the lowest three bits
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(dwords, 28 - BIT));  // vblendvps only the highest
    const __m256 value =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), sign);
    _mm256_storeu_ps(out, _mm256_mul_ps(value, scales));
}

// Columns k .. k + 31 of eight rows -> out[32][16], eight lanes wide. A row of codes is 16 bytes; turning dwords, not
// weights, is what makes the transposition nearly free.
inline void decode_eight_rows(const uint8_t* const* rows, int64_t byte, __m256 scales, __m256 low, __m256 high,
                              float* out) {
    __m256i pair[4];
    for (int i = 0; i < 4; ++i) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + byte));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4] + byte));
        pair[i] = _mm256_set_m128i(b, a);
    }
    const __m256i a = _mm256_unpacklo_epi32(pair[0], pair[1]), b = _mm256_unpackhi_epi32(pair[0], pair[1]);
    const __m256i c = _mm256_unpacklo_epi32(pair[2], pair[3]), d = _mm256_unpackhi_epi32(pair[2], pair[3]);
    const __m256i dwords[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                               _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        float* to = out + i * 8 * 16;
        lookup_rows<4>(dwords[i], low, high, scales, to);
        lookup_rows<0>(dwords[i], low, high, scales, to + 16);
        lookup_rows<12>(dwords[i], low, high, scales, to + 32);
        lookup_rows<8>(dwords[i], low, high, scales, to + 48);
        lookup_rows<20>(dwords[i], low, high, scales, to + 64);
        lookup_rows<16>(dwords[i], low, high, scales, to + 80);
        lookup_rows<28>(dwords[i], low, high, scales, to + 96);
        lookup_rows<24>(dwords[i], low, high, scales, to + 112);
    }
}

// Rows [row, row + rows) of W, columns [k0, k0 + depth), transposed: tile[panel][depth][16].
void decode_forward(const hb_weight& w, const Decoder& d, int64_t row, int64_t rows, int64_t k0, int64_t depth,
                    float* tile) {
    const __m256 low = _mm256_loadu_ps(d.codebook), high = _mm256_loadu_ps(d.codebook + 8);
    const int64_t row_blocks = w.cols / w.blocksize;
    for (int64_t r = 0; r < rows; r += 8) {
        const uint8_t* codes[8];
        for (int i = 0; i < 8; ++i) codes[i] = w.codes + (row + at_most(r + i, rows - 1)) * (w.cols / 2);
        float* out = tile + r / 16 * panel_stride(depth) + r % 16;
        __m256 scales = _mm256_setzero_ps();
        int64_t block = -1;
        for (int64_t k = 0; k < depth; k += 32) {
            if (over(k0 + k, w.blocksize) != block) {
                block = over(k0 + k, w.blocksize);
                alignas(32) float s[8];
                for (int i = 0; i < 8; ++i)  // rows past the end multiply by 0
                    s[i] = r + i < rows ? scale_of(w, (row + r + i) * row_blocks + block) : 0.0f;
                scales = _mm256_load_ps(s);
            }
            decode_eight_rows(codes, (k0 + k) / 2, scales, low, high, out + k * 16);
        }
    }
    if (rows % 16 && rows % 16 <= 8) {  // the last panel's right half holds no row
        float* out = tile + rows / 16 * panel_stride(depth) + 8;
        for (int64_t k = 0; k < depth; ++k) _mm256_storeu_ps(out + k * 16, _mm256_setzero_ps());
    }
}

// Rows [r0, r0 + depth) of W, columns [column, column + columns), as they lie: tile[panel][depth][16].
void decode_backward(const hb_weight& w, const Decoder& d, int64_t r0, int64_t depth, int64_t column, int64_t columns,
                     float* tile) {
    for (int64_t r = 0; r < depth; ++r) {
        const int64_t start = (r0 + r) * w.cols + column;
        const uint8_t* codes = w.codes + start / 2;
        fetch_columns(w, r0 + r + rows_ahead, column, columns);
        __m256 scale = _mm256_setzero_ps();
        int64_t block = -1;
        for (int64_t c = 0; c < columns; c += 32) {
            if (over(start + c, w.blocksize) != block) {
                block = over(start + c, w.blocksize);
                scale = _mm256_set1_ps(scale_of(w, block));
            }
            __m256 v[4];
            lookup32(spread32(codes + c / 2), d.plane, v);
            float* out = tile + c / 16 * panel_stride(depth) + r * 16;
            _mm256_storeu_ps(out, _mm256_mul_ps(v[0], scale));
            _mm256_storeu_ps(out + 8, _mm256_mul_ps(v[1], scale));
            out += panel_stride(depth);
            _mm256_storeu_ps(out, _mm256_mul_ps(v[2], scale));
            _mm256_storeu_ps(out + 8, _mm256_mul_ps(v[3], scale));
        }
    }
}

// Packing X for the inner kernel: rows [row, row + rows) of x(m, depth), `stride` apart, as [depth][rows]; rows past m
// are zeros.

// Eight rows of eight -> their transpose, in place.
inline void transpose8(__m256* r) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

template <class T>
void pack_panel(const T* x, int64_t m, int64_t stride, int64_t depth, int64_t row, int64_t rows, float* out) {
    constexpr int most = max_panel_rows > 8 ? 16 : 8;
    const bool tall = most > 8 && rows > 8;
    const int64_t present = at_most(rows, m - row);
    const T* from = x + row * stride;
    int64_t k = 0;
    // A column of `rows` floats is stored as one or two vectors of eight, which may run into the next column: that one
    // is stored later. So the last columns go one number at a time, and no thread writes outside its panel.
    for (; k + 16 <= depth; k += 8) {
        __m256 v[most];
        for (int64_t i = 0; i < most; ++i) v[i] = i < present ? load8(from + i * stride + k) : _mm256_setzero_ps();
        transpose8(v);
        if (tall) transpose8(v + most - 8);
        for (int64_t j = 0; j < 8; ++j) {
            _mm256_storeu_ps(out + (k + j) * rows, v[j]);
            if (tall) _mm256_storeu_ps(out + (k + j) * rows + 8, v[most - 8 + j]);
        }
    }
    for (; k < depth; ++k)
        for (int64_t i = 0; i < rows; ++i) out[k * rows + i] = i < present ? widen(from[i * stride + k]) : 0.0f;
}

// AVX-512: rows of W times one x, the product that generation is made of. As dot_row, but a row's scales are decoded
// first, four sums hide the adder's latency, and a last half of 128 weights takes half the work.

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

// 128 weights times x.
inline __m512 dot_128(__m512i dwords, const float* x, __m512 table) {
    __m512 a = _mm512_mul_ps(weights_at(dwords, 4, table), _mm512_loadu_ps(x));
    __m512 b = _mm512_mul_ps(weights_at(dwords, 0, table), _mm512_loadu_ps(x + 16));
    __m512 c = _mm512_mul_ps(weights_at(dwords, 12, table), _mm512_loadu_ps(x + 32));
    __m512 d = _mm512_mul_ps(weights_at(dwords, 8, table), _mm512_loadu_ps(x + 48));
    a = _mm512_fmadd_ps(weights_at(dwords, 20, table), _mm512_loadu_ps(x + 64), a);
    b = _mm512_fmadd_ps(weights_at(dwords, 16, table), _mm512_loadu_ps(x + 80), b);
    c = _mm512_fmadd_ps(weights_at(dwords, 28, table), _mm512_loadu_ps(x + 96), c);
    d = _mm512_fmadd_ps(weights_at(dwords, 24, table), _mm512_loadu_ps(x + 112), d);
    return _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
}

inline __m512 dot_64(__m256i half, const float* x, __m512 table) {
    const __m512i dwords = _mm512_inserti64x4(_mm512_castsi256_si512(half), _mm256_srli_epi32(half, 4), 1);
    __m512 a = _mm512_mul_ps(weights_at(dwords, 0, table), _mm512_loadu_ps(x));
    __m512 b = _mm512_mul_ps(weights_at(dwords, 8, table), _mm512_loadu_ps(x + 16));
    a = _mm512_fmadd_ps(weights_at(dwords, 16, table), _mm512_loadu_ps(x + 32), a);
    b = _mm512_fmadd_ps(weights_at(dwords, 24, table), _mm512_loadu_ps(x + 48), b);
    return _mm512_add_ps(a, b);
}

// y = rows [first, last) of W, in blocks of 64, times x, which order_one has ordered. Inlined it runs a fifth slower:
// gcc keeps the loop's pointers in vector registers.
HB_NOINLINE void dot_one_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                            float* y) {
    const __m512 table = _mm512_loadu_ps(d.codebook);
    const int64_t blocks = w.cols / 64;
    float scales[max_row_scales];
    for (int64_t row = first; row < last; ++row) {
        scales_of_row(w, row * blocks, blocks, scales);
        const uint8_t* codes = w.codes + row * (w.cols / 2);
        __m512 total = _mm512_setzero_ps();
        int64_t b = 0;
        for (; b + 2 <= blocks; b += 2) {
            const __m512 low = _mm512_set1_ps(scales[b]);
            const __m512 scale = _mm512_mask_broadcastss_ps(low, 0xff00, _mm_load_ss(scales + b + 1));
            const __m512 sum = dot_128(_mm512_loadu_si512(codes + b * 32), x + b * 64, table);
            total = _mm512_fmadd_ps(sum, scale, total);
        }
        if (b < blocks) {
            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + b * 32));
            total = _mm512_fmadd_ps(dot_64(half, x + b * 64, table), _mm512_set1_ps(scales[b]), total);
        }
        y[row] = vsum(total);
    }
}

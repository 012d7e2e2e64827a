// AVX2: rows of W times one x, or a few, the product that generation is made of. Looking up float32 values takes 24
// shuffles for 64 weights, which is what that product would wait for. So the table and x are rounded to 16-bit integers
// here, x by blocks of 64 with a scale each: 8 shuffles, and vpmaddwd adds products in pairs, exactly. What it costs is
// a result that is off by 2e-5 of the product of lengths |w| |x|, a hundredth of what rounding x to bfloat16 does. Each
// x is multiplied as if it were the only one.

constexpr int64_t few_rows = 4;                  // of x at a time
constexpr int table_one = 32767, x_one = 32767;  // of the largest: two products fit into 32 bits

inline float max_of(__m256 v) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// In place of `out`'s floats: for every block its scale, then its x as 16-bit integers in the order of the look-up: high
// nibbles of bytes 0 to 7 and 16 to 23, of the other bytes, and the same of the low nibbles.
inline void order_one(const float* x, int64_t cols, float* out) {
    const int64_t blocks = cols / 64;
    int16_t* to = reinterpret_cast<int16_t*>(out + divide_up(blocks, 8) * 8);
    for (int64_t b = 0; b < blocks; ++b, x += 64, to += 64) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        __m256 most = _mm256_setzero_ps(), zero = _mm256_setzero_ps();
        for (int i = 0; i < 64; i += 8) {
            const __m256 v = _mm256_loadu_ps(x + i);
            most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
            zero = _mm256_fmadd_ps(v, _mm256_setzero_ps(), zero);  // NaN of a NaN or an infinity, which max may lose
        }
        const float largest = max_of(most);
        out[b] = largest / (float(x_one) * float(table_one)) + vsum(zero);
        const float inverse = largest > 0.0f ? float(x_one) / largest : 0.0f;
        const __m256 scale = _mm256_set1_ps(inverse);
        for (int part = 0; part < 4; ++part) {  // 16 numbers: every second one of two runs of 16
            const float* from = x + part % 2 * 16;
            __m256i half[2];
            for (int i = 0; i < 2; ++i) {
                const __m256 a = _mm256_loadu_ps(from + 32 * i), c = _mm256_loadu_ps(from + 32 * i + 8);
                const __m256 chosen = part < 2 ? _mm256_shuffle_ps(a, c, 0x88) : _mm256_shuffle_ps(a, c, 0xdd);
                half[i] = _mm256_cvtps_epi32(_mm256_mul_ps(chosen, scale));
            }
            // Lanes of `half` hold 0 2 | 8 10 and 4 6 | 12 14; packing takes lane by lane, so 64 bits are put in order.
            const __m256i first = _mm256_permute4x64_epi64(half[0], 0xd8),
                          second = _mm256_permute4x64_epi64(half[1], 0xd8);
            const __m256i packed = _mm256_packs_epi32(first, second);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part * 16), _mm256_permute4x64_epi64(packed, 0xd8));
        }
    }
}

struct Table16 {
    __m256i low, high;     // bytes of the 16 values, as parts of the largest
    float largest = 0.0f;  // magnitude: 1 in most codebooks
    explicit Table16(const float* codebook) {
        alignas(16) uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
            const float magnitude = codebook[i] < 0.0f ? -codebook[i] : codebook[i];
            largest = magnitude > largest ? magnitude : largest;
        }
        for (int i = 0; i < 16; ++i) {
            const float part = codebook[i] / largest * float(table_one);
            const int value = int(part + (part < 0.0f ? -0.5f : 0.5f));
            bytes[0][i] = uint8_t(value & 255);
            bytes[1][i] = uint8_t(value >> 8 & 255);
        }
        low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
        high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
};

// y(M, y_stride) = rows [first, last) of W, in blocks of 64, times x(M, stride), which order_one has ordered.
template <int M>
HB_NOINLINE void dot_few_64(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x,
                            int64_t stride, float* y, int64_t y_stride) {
    const int64_t blocks = w.cols / 64, head = divide_up(blocks, 8) * 8;
    const Table16 table(d.codebook);
    float scales[max_row_scales];
    for (int64_t row = first; row < last; ++row) {
        scales_of_row(w, row * blocks, blocks, scales);
        const uint8_t* codes = w.codes + row * (w.cols / 2);
        __m256 total[M];
        for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; ++b) {
            codes32 nibbles[2];
            nibbles_of(codes + b * 32, true, nibbles, nibbles + 1);
            __m256i v[4];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const __m256i low = _mm256_shuffle_epi8(table.low, nibbles[h]);
                const __m256i high = _mm256_shuffle_epi8(table.high, nibbles[h]);
                v[2 * h] = _mm256_unpacklo_epi8(low, high);
                v[2 * h + 1] = _mm256_unpackhi_epi8(low, high);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const __m256i* from = reinterpret_cast<const __m256i*>(x + m * stride + head) + b * 4;
                __m256 pairs[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    pairs[j] = _mm256_cvtepi32_ps(_mm256_madd_epi16(v[j], _mm256_loadu_si256(from + j)));
                const __m256 sum = _mm256_add_ps(_mm256_add_ps(pairs[0], pairs[1]), _mm256_add_ps(pairs[2], pairs[3]));
                const __m256 scale =
                    _mm256_mul_ps(_mm256_broadcast_ss(scales + b), _mm256_broadcast_ss(x + m * stride + b));
                total[m] = _mm256_fmadd_ps(sum, scale, total[m]);
            }
        }
        for (int m = 0; m < M; ++m) y[m * y_stride + row] = vsum(total[m]) * table.largest;
    }
}

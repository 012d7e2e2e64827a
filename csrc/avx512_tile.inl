// AVX-512: vectors of 16, panels of 14 rows by 32 columns, and the decoding of W into a tile.
// One vpermps looks up all 16 values, so decoding takes half of AVX2's instructions on twice the lanes.

#define HB_PANEL_ROWS 14
constexpr int64_t max_panel_rows = HB_PANEL_ROWS;
// Floats from one panel of the tile to the next: not a multiple of 4 KB, or all panels would share one cache set.
constexpr int64_t panel_stride(int64_t depth) { return depth * 2 * vec_width + 16; }
constexpr int64_t panel_width = 2 * vec_width;

// 16 bytes of each of eight rows as four dword columns, a row in each lane.
inline void turn_eight_rows(const uint8_t* const* rows, int64_t byte, __m256i* dwords) {
    __m256i pair[4];
    for (int i = 0; i < 4; ++i) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + byte));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4] + byte));
        pair[i] = _mm256_set_m128i(b, a);
    }
    const __m256i a = _mm256_unpacklo_epi32(pair[0], pair[1]), b = _mm256_unpackhi_epi32(pair[0], pair[1]);
    const __m256i c = _mm256_unpacklo_epi32(pair[2], pair[3]), d = _mm256_unpackhi_epi32(pair[2], pair[3]);
    dwords[0] = _mm256_unpacklo_epi64(a, c), dwords[1] = _mm256_unpackhi_epi64(a, c);
    dwords[2] = _mm256_unpacklo_epi64(b, d), dwords[3] = _mm256_unpackhi_epi64(b, d);
}

// Rows [row, row + rows) of W, columns [k0, k0 + depth), transposed: tile[panel][depth][32].
void decode_forward(const hb_weight& w, const Decoder& d, int64_t row, int64_t rows, int64_t k0, int64_t depth,
                    float* tile) {
    const __m512 table = _mm512_loadu_ps(d.codebook);
    const int64_t row_blocks = w.cols / w.blocksize;
    for (int64_t r = 0; r < divide_up(rows, 32) * 32; r += 16) {
        const uint8_t* codes[16];
        for (int i = 0; i < 16; ++i) codes[i] = w.codes + (row + at_most(r + i, rows - 1)) * (w.cols / 2);
        float* out = tile + r / 32 * panel_stride(depth) + r % 32;
        __m512 scales = _mm512_setzero_ps();
        int64_t block = -1;
        for (int64_t k = 0; k < depth; k += 32) {
            if (over(k0 + k, w.blocksize) != block) {
                block = over(k0 + k, w.blocksize);
                alignas(64) float s[16];
                for (int i = 0; i < 16; ++i)  // rows past the end multiply by 0
                    s[i] = r + i < rows ? scale_of(w, (row + r + i) * row_blocks + block) : 0.0f;
                scales = _mm512_load_ps(s);
            }
            if (k % 128 == 0) fetch_rows(w, row + r, 16, row, row + rows, k0 + k, depth);
            __m256i first[4], second[4];
            turn_eight_rows(codes, (k0 + k) / 2, first);
            turn_eight_rows(codes + 8, (k0 + k) / 2, second);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i dwords = _mm512_inserti64x4(_mm512_castsi256_si512(first[i]), second[i], 1);
                float* to = out + (k + 8 * i) * 32;
#define HB_LOOKUP(element, bit)                                                                   \
    _mm512_storeu_ps(to + element * 32, /* vpermps reads only the lowest four bits of an index */ \
                     _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(dwords, bit), table), scales));
                HB_LOOKUP(0, 4)
                HB_LOOKUP(1, 0)
                HB_LOOKUP(2, 12)
                HB_LOOKUP(3, 8)
                HB_LOOKUP(4, 20)
                HB_LOOKUP(5, 16)
                HB_LOOKUP(6, 28)
                HB_LOOKUP(7, 24)
#undef HB_LOOKUP
            }
        }
    }
}

// 32 codes -> two registers of values in their order. `table` is the codebook times the block's scale.
inline void decode32(const uint8_t* codes, __m512 table, __m512* out) {
    const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m512i packed = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i first =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), packed);
    const __m512i second =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3), packed);
    out[0] = _mm512_permutexvar_ps(_mm512_srlv_epi32(first, shifts), table);
    out[1] = _mm512_permutexvar_ps(_mm512_srlv_epi32(second, shifts), table);
}

// Rows [r0, r0 + depth) of W, columns [column, column + columns), as they lie: tile[panel][depth][32].
void decode_backward(const hb_weight& w, const Decoder& d, int64_t r0, int64_t depth, int64_t column, int64_t columns,
                     float* tile) {
    const __m512 codebook = _mm512_loadu_ps(d.codebook);
    for (int64_t r = 0; r < depth; ++r) {
        const int64_t start = (r0 + r) * w.cols + column;
        const uint8_t* codes = w.codes + start / 2;
        fetch_columns(w, r0 + r + rows_ahead, column, columns);
        __m512 table = _mm512_setzero_ps();
        int64_t block = -1;
        for (int64_t c = 0; c < columns; c += 32) {
            if (over(start + c, w.blocksize) != block) {
                block = over(start + c, w.blocksize);
                table = _mm512_mul_ps(codebook, _mm512_set1_ps(scale_of(w, block)));
            }
            __m512 v[2];
            decode32(codes + c / 2, table, v);
            float* out = tile + c / 32 * panel_stride(depth) + r * 32;
            _mm512_storeu_ps(out, v[0]);
            _mm512_storeu_ps(out + 16, v[1]);
        }
    }
}

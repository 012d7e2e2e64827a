// AVX-512: vectors of 16, panels of 14 rows by 32 columns, and the decoding of W into a tile.
// One vpermps looks up all 16 values, so decoding takes half of AVX2's instructions on twice the lanes.

#define HB_PANEL_ROWS 14
constexpr int64_t max_panel_rows = HB_PANEL_ROWS;
// Dwords from one panel of the tile to the next: not a multiple of 4 KB, or all panels would share one cache set.
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

// Rows of two neighbouring columns of W into the tile.
inline void put(Single, float* to, __m512 first, __m512 second) {
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + 32, second);
}
template <class N>
void put(N, float* to, __m512 first, __m512 second) {
    _mm512_storeu_ps(to, N::join(first, second));
}

// Rows [row, row + rows) of W, columns [k0, k0 + depth), transposed: tile[panel][dwords][32].
template <class N>
void decode_forward(const hb_weight& w, const Decoder& d, int64_t row, int64_t rows, int64_t k0, int64_t depth,
                    float* tile) {
    const __m512 table = _mm512_loadu_ps(d.codebook);
    const int64_t row_blocks = w.cols / w.blocksize;
    for (int64_t r = 0; r < divide_up(rows, 32) * 32; r += 16) {
        const uint8_t* codes[16];
        for (int i = 0; i < 16; ++i) codes[i] = w.codes + (row + at_most(r + i, rows - 1)) * (w.cols / 2);
        float* out = tile + r / 32 * panel_stride(dwords_of<N>(depth)) + r % 32;
        __m512 scales = _mm512_setzero_ps(), offsets = _mm512_set1_ps(no_offset);
        int64_t block = -1;
        for (int64_t k = 0; k < depth; k += 32) {
            if (over(k0 + k, w.blocksize) != block) {
                block = over(k0 + k, w.blocksize);
                alignas(64) float s[16], o[16];
                constants_of_rows<16>(w, (row + r) * row_blocks + block, row_blocks, rows - r, s, o);
                scales = _mm512_load_ps(s);
                if (w.constants == 2) offsets = _mm512_load_ps(o);
            }
            if (k % 128 == 0) fetch_rows(w, row + r, 16, row, row + rows, k0 + k, depth);
            __m256i first[4], second[4];
            turn_eight_rows(codes, (k0 + k) / 2, first);
            turn_eight_rows(codes + 8, (k0 + k) / 2, second);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i dwords = _mm512_inserti64x4(_mm512_castsi256_si512(first[i]), second[i], 1);
                float* to = out + (k + 8 * i) / N::numbers * 32;
                const auto value = [=](unsigned bit) {  // vpermps reads only the lowest four bits of an index
                    return vadd(vmul(_mm512_permutexvar_ps(_mm512_srli_epi32(dwords, bit), table), scales), offsets);
                };
                put(N(), to, value(4), value(0));
                put(N(), to + 2 / N::numbers * 32, value(12), value(8));
                put(N(), to + 4 / N::numbers * 32, value(20), value(16));
                put(N(), to + 6 / N::numbers * 32, value(28), value(24));
            }
        }
    }
}

// 32 codes -> two registers of values in their order. `table` is the codebook times the block's scale, plus its offset.
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

// The values of a row, block by block.
struct RowValues {
    const hb_weight& w;
    __m512 codebook, table = _mm512_setzero_ps();
    int64_t block = -1;

    // 32 of them, from the flat index `at` on.
    void read(int64_t at, __m512* out) {
        if (over(at, w.blocksize) != block) {
            block = over(at, w.blocksize);
            table = vadd(vmul(codebook, vset(scale_of(w, block))), vset(offset_of(w, block)));
        }
        decode32(w.codes + at / 2, table, out);
    }
};

// Rows [r0, r0 + depth) of W, columns [column, column + columns), as they lie: tile[panel][dwords][32].
template <class N>
void decode_backward(const hb_weight& w, const Decoder& d, int64_t r0, int64_t depth, int64_t column, int64_t columns,
                     float* tile) {
    const __m512 codebook = _mm512_loadu_ps(d.codebook);
    for (int64_t r = 0; r < depth; r += N::numbers) {
        const int64_t start = (r0 + r) * w.cols + column;
        RowValues first = {w, codebook}, second = {w, codebook};
        for (int64_t i = 0; i < N::numbers; ++i) fetch_columns(w, r0 + r + i + rows_ahead, column, columns);
        float* out = tile + r / N::numbers * 32;
        for (int64_t c = 0; c < columns; c += 32, out += panel_stride(dwords_of<N>(depth))) {
            __m512 v[2], below[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            first.read(start + c, v);
            if (N::numbers == 2 && r + 1 < depth) second.read(start + w.cols + c, below);
            _mm512_storeu_ps(out, N::join(v[0], below[0]));
            _mm512_storeu_ps(out + 16, N::join(v[1], below[1]));
        }
    }
}

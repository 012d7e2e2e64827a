// AVX2: looking up the codes of eight rows side by side.

// The nibble of element BIT of eight dwords, one row of W in each lane, times the rows' scales, plus their offsets.
template <int BIT>
inline void lookup_rows(__m256i dwords, __m256 low, __m256 high, __m256 scales, __m256 offsets, float* out) {
    const __m256i index = _mm256_srli_epi32(dwords, BIT);  // vpermps reads only the lowest three bits
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(dwords, 28 - BIT));  // vblendvps only the highest
    const __m256 value =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), sign);
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_mul_ps(value, scales), offsets));
}

struct RowLookup {
    __m256 low, high;  // of the codebook
    explicit RowLookup(const Decoder& d) : low(_mm256_loadu_ps(d.codebook)), high(_mm256_loadu_ps(d.codebook + 8)) {}

    // 32 columns of eight rows, from byte `byte` of each on -> out[32][16], eight lanes wide. Turning dwords, not weights,
    // is what makes the transposition nearly free.
    void eight_rows(const uint8_t* const* rows, int64_t byte, vec scales, vec offsets, float* out) const {
        __m256i pair[4];
        for (int i = 0; i < 4; ++i) {
            const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + byte));
            const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4] + byte));
            pair[i] = _mm256_set_m128i(b, a);
        }
        const __m256i a = _mm256_unpacklo_epi32(pair[0], pair[1]), b = _mm256_unpackhi_epi32(pair[0], pair[1]);
        const __m256i c = _mm256_unpacklo_epi32(pair[2], pair[3]), d = _mm256_unpackhi_epi32(pair[2], pair[3]);
        const __m256i dwords[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                   _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            float* to = out + i * 8 * 16;
            lookup_rows<4>(dwords[i], low, high, scales, offsets, to);
            lookup_rows<0>(dwords[i], low, high, scales, offsets, to + 16);
            lookup_rows<12>(dwords[i], low, high, scales, offsets, to + 32);
            lookup_rows<8>(dwords[i], low, high, scales, offsets, to + 48);
            lookup_rows<20>(dwords[i], low, high, scales, offsets, to + 64);
            lookup_rows<16>(dwords[i], low, high, scales, offsets, to + 80);
            lookup_rows<28>(dwords[i], low, high, scales, offsets, to + 96);
            lookup_rows<24>(dwords[i], low, high, scales, offsets, to + 112);
        }
    }
};

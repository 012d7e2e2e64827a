// Encoding and decoding one block of codes. Block sizes are multiples of 32: 16 bytes of codes.

// ---- encode: four comparisons walk a binary tree over the 15 boundaries ----

struct Encoder {
    __m256 root, left, right, level3, level4;
    __m256i order;
    Encoder(const float* b, const uint8_t* o) {
        root = _mm256_set1_ps(b[7]);
        left = _mm256_set1_ps(b[3]);
        right = _mm256_set1_ps(b[11]);
        level3 = _mm256_setr_ps(b[1], b[5], b[9], b[13], 0, 0, 0, 0);
        level4 = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]);
        order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(o)));
    }
};

// The number of boundaries below each x, 0 to 15, in eight dwords.
inline __m256i rank8(__m256 x, const Encoder& e) {
    const __m256 m1 = _mm256_cmp_ps(x, e.root, _CMP_GT_OQ);
    const __m256 m2 = _mm256_cmp_ps(x, _mm256_blendv_ps(e.left, e.right, m1), _CMP_GT_OQ);
    __m256i r = _mm256_srli_epi32(_mm256_castps_si256(m1), 31);
    r = _mm256_sub_epi32(_mm256_add_epi32(r, r), _mm256_castps_si256(m2));
    const __m256 m3 = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(e.level3, r), _CMP_GT_OQ);
    r = _mm256_sub_epi32(_mm256_add_epi32(r, r), _mm256_castps_si256(m3));
    const __m256 m4 = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(e.level4, r), _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(r, r), _mm256_castps_si256(m4));
}

template <class T>
uint32_t absmax_bits(const T* x, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i peak0 = _mm256_setzero_si256(), peak1 = peak0;
    for (int64_t i = 0; i < n; i += 16) {
        peak0 = _mm256_max_epi32(peak0, _mm256_and_si256(_mm256_castps_si256(load8(x + i)), magnitude));
        peak1 = _mm256_max_epi32(peak1, _mm256_and_si256(_mm256_castps_si256(load8(x + i + 8)), magnitude));
    }
    peak0 = _mm256_max_epi32(peak0, peak1);
    __m128i peak = _mm_max_epi32(_mm256_castsi256_si128(peak0), _mm256_extracti128_si256(peak0, 1));
    peak = _mm_max_epi32(peak, _mm_shuffle_epi32(peak, 0x4e));
    peak = _mm_max_epi32(peak, _mm_shuffle_epi32(peak, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(peak));
}

template <class T>
void encode_block(const T* x, int64_t n, float inverse, const Encoder& e, uint8_t* codes) {
    const __m256 inv = _mm256_set1_ps(inverse);
    const __m256i merge = _mm256_set1_epi16(0x0110);  // first * 16 + second
    for (int64_t i = 0; i < n; i += 32) {
        const __m256i a = rank8(_mm256_mul_ps(load8(x + i), inv), e);
        const __m256i b = rank8(_mm256_mul_ps(load8(x + i + 8), inv), e);
        const __m256i c = rank8(_mm256_mul_ps(load8(x + i + 16), inv), e);
        const __m256i d = rank8(_mm256_mul_ps(load8(x + i + 24), inv), e);
        // Bytes a0-3 b0-3 c0-3 d0-3 | a4-7 b4-7 c4-7 d4-7, then codes, then 16-bit units a01 a23 b01 ... per lane.
        const __m256i ranks = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(e.order, ranks), merge);
        const __m256i bytes = _mm256_packus_epi16(pairs, pairs);
        const __m128i out = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / 2), out);
    }
}

// ---- decode ----
// An fp32 value is looked up as four byte planes (vpshufb) and put together by unpacking: on Zen 3 faster than two
// vpermps and a blend. The 16-bit formats look up the block's 16 already scaled and rounded values, in two planes.

struct Decoder {
    const float* codebook;
    __m256i plane[4];
    Decoder() = default;
    explicit Decoder(const float* c) : codebook(c) {
        for (int p = 0; p < 4; ++p) {
            alignas(16) uint8_t bytes[16];
            for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(bits_of(c[i]) >> (8 * p));
            plane[p] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
        }
    }
};

typedef __m256i codes32;

// 32 codes in bytes. Lane 0 holds quads 0 2 4 6 of the 32 weights and lane 1 quads 1 3 5 7, so that after two levels
// of unpacking each register is eight weights in their order.
inline codes32 spread32(const uint8_t* codes) {
    const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i twice =
        _mm256_shuffle_epi8(packed, _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                                     2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
    const __m256i first = _mm256_srli_epi16(twice, 4);
    const __m256i both = _mm256_blendv_epi8(first, twice, _mm256_set1_epi16(short(0xff00)));
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// 32 codes -> 4 x 8 values, not yet scaled, in the order of spread32.
inline void lookup32(codes32 code, const __m256i* plane, __m256* out) {
    const __m256i p0 = _mm256_shuffle_epi8(plane[0], code), p1 = _mm256_shuffle_epi8(plane[1], code);
    const __m256i p2 = _mm256_shuffle_epi8(plane[2], code), p3 = _mm256_shuffle_epi8(plane[3], code);
    const __m256i low0 = _mm256_unpacklo_epi8(p0, p1), low1 = _mm256_unpackhi_epi8(p0, p1);
    const __m256i high0 = _mm256_unpacklo_epi8(p2, p3), high1 = _mm256_unpackhi_epi8(p2, p3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// 64 codes, the high nibbles and the low ones; the second half as zeros when there are only 32.
inline void nibbles_of(const uint8_t* codes, bool whole, codes32* high, codes32* low) {
    const __m256i bytes = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
                                : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    *high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    *low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}

// T is bf16 or fp16.
template <class T>
void decode_block(const uint8_t* codes, int64_t n, float scale, float offset, const Decoder& d, T* out) {
    const __m256 s = _mm256_set1_ps(scale), o = _mm256_set1_ps(offset);
    alignas(32) T values[16];
    store8(values, add8(mul8(_mm256_loadu_ps(d.codebook), s), o));
    store8(values + 8, add8(mul8(_mm256_loadu_ps(d.codebook + 8), s), o));
    const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i split = _mm256_shuffle_epi8(  // each lane: its eight low bytes, then its eight high bytes
        both, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                               0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i low = _mm256_permute4x64_epi64(split, 0x88), high = _mm256_permute4x64_epi64(split, 0xdd);
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t i = 0; i < n; i += 32) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
        const __m128i first = _mm_srli_epi16(packed, 4);
        // Codes of weights 0-7 16-23 | 8-15 24-31 in bytes, so that unpacking gives 0-15 and 16-31.
        const __m256i natural =
            _mm256_and_si256(_mm256_set_m128i(_mm_unpackhi_epi8(_mm_and_si128(first, _mm_set1_epi8(15)), packed),
                                              _mm_unpacklo_epi8(_mm_and_si128(first, _mm_set1_epi8(15)), packed)),
                             nibble);
        const __m256i code = _mm256_permute4x64_epi64(natural, 0xd8);
        const __m256i l = _mm256_shuffle_epi8(low, code), h = _mm256_shuffle_epi8(high, code);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 16), _mm256_unpackhi_epi8(l, h));
    }
}

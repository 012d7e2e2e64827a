// AVX-512's vector of floats, and the operations that the shared kernels are written in.

typedef __m512 vec;
constexpr int64_t vec_width = 16;

inline vec vzero() { return _mm512_setzero_ps(); }
inline vec vset(float x) { return _mm512_set1_ps(x); }
inline vec vbroadcast(const float* p) { return _mm512_set1_ps(*p); }
// Element I * STEP in all lanes, where A is packed and elements up to ROWS * STEP are used.
template <int I, int ROWS, int64_t STEP>
inline vec vspread(const float* a) {
    return vbroadcast(a + I * STEP);
}

inline vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline vec vload(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline vec vload(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline vec vload(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline void vstore(float* p, vec x) { _mm512_storeu_ps(p, x); }
inline void vstore(fp16* p, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void vstore(bf16* p, vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    // A NaN must stay one: rounding up could carry its mantissa away.
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(1 << 22));
    const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

inline vec vadd(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec vsub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec vmul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec vdiv(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline vec vfnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }                // b where either is NaN
inline vec vmin(vec a, vec b) { return _mm512_min_ps(a, b); }
inline float vsum(vec x) { return _mm512_reduce_add_ps(x); }
inline float vpeak(vec x) { return _mm512_reduce_max_ps(x); }  // the largest lane
// `inside` where low <= x < high, else `outside`.
inline vec vwithin(vec x, vec low, vec high, vec inside, vec outside) {
    const __mmask16 is = _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ);
    return _mm512_mask_blend_ps(_mm512_mask_cmp_ps_mask(is, x, high, _CMP_LT_OQ), outside, inside);
}

inline vec vround(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The float whose exponent field is the last eight bits of x.
inline vec vexponent(vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
inline vec vscale(vec x, vec n) { return _mm512_scalef_ps(x, n); }  // x * 2^n for whole n

// The level nearest each number: of 16 ascending ones, between 15 bounds. A tree of four comparisons, whose place, 8 4 2 1
// for each that holds, is the index of the next bounds and at last of the level.
struct Nearest {
    __m512 root, left, right, third, fourth, levels;
    Nearest(const float* all, const float* b) : levels(_mm512_loadu_ps(all)) {
        alignas(64) float quarters[16] = {}, eighths[16] = {};
        for (int i = 0; i < 16; i += 4) quarters[i] = b[i + 1];
        for (int i = 0; i < 16; i += 2) eighths[i] = b[i];
        root = _mm512_set1_ps(b[7]), left = _mm512_set1_ps(b[3]), right = _mm512_set1_ps(b[11]);
        third = _mm512_load_ps(quarters), fourth = _mm512_load_ps(eighths);
    }
};
inline vec vnearest(vec x, const Nearest& n) {
    const auto deeper = [](__m512i place, __mmask16 holds, int step) {
        return _mm512_mask_add_epi32(place, holds, place, _mm512_set1_epi32(step));
    };
    const __mmask16 upper = _mm512_cmp_ps_mask(x, n.root, _CMP_GT_OQ);
    const __mmask16 second = _mm512_cmp_ps_mask(x, _mm512_mask_blend_ps(upper, n.left, n.right), _CMP_GT_OQ);
    __m512i place = deeper(_mm512_maskz_set1_epi32(upper, 8), second, 4);
    place = deeper(place, _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(place, n.third), _CMP_GT_OQ), 2);
    place = deeper(place, _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(place, n.fourth), _CMP_GT_OQ), 1);
    return _mm512_permutexvar_ps(place, n.levels);
}

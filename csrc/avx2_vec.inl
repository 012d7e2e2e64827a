// AVX2's vector of floats, and the operations that the shared kernels are written in.

typedef __m256 vec;
constexpr int64_t vec_width = 8;

inline vec vzero() { return _mm256_setzero_ps(); }
inline vec vset(float x) { return _mm256_set1_ps(x); }
inline vec vbroadcast(const float* p) { return _mm256_broadcast_ss(p); }
// x with another number in its high half.
inline vec with_high(vec x, float high) { return _mm256_insertf128_ps(x, _mm_set1_ps(high), 1); }
// Element I * STEP in all lanes, where A is packed and elements up to ROWS * STEP are used.
template <int I, int ROWS, int64_t STEP>
inline vec vspread(const float* a) {
    return vbroadcast(a + I * STEP);
}
template <class T>
inline vec vload(const T* p) {
    return load8(p);
}
template <class T>
inline void vstore(T* p, vec x) {
    store8(p, x);
}

inline vec vadd(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec vsub(vec a, vec b) { return _mm256_sub_ps(a, b); }
inline vec vmul(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec vdiv(vec a, vec b) { return _mm256_div_ps(a, b); }
inline vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
inline vec vfnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }                // b where either is NaN
inline vec vmin(vec a, vec b) { return _mm256_min_ps(a, b); }
inline float vsum(vec x) { return sum_of(x); }
inline float vpeak(vec x) {  // the largest lane
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
// `inside` where low <= x < high, else `outside`.
inline vec vwithin(vec x, vec low, vec high, vec inside, vec outside) {
    const vec is = _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LT_OQ));
    return _mm256_blendv_ps(outside, inside, is);
}

inline vec vround(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The float whose exponent field is the last eight bits of x.
inline vec vexponent(vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
// x * 2^n for whole n from -252 to 254, in two steps: 2^n itself may not be a float.
inline vec vscale(vec x, vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

// a and b, each four pairs -> the pairs' first numbers, a's four and then b's, and their second ones; and back.
inline void separate(vec a, vec b, vec* even, vec* odd) {
    const __m256 p = _mm256_permute2f128_ps(a, b, 0x20), q = _mm256_permute2f128_ps(a, b, 0x31);
    *even = _mm256_shuffle_ps(p, q, 0x88), *odd = _mm256_shuffle_ps(p, q, 0xdd);
}
inline void interleave(vec even, vec odd, vec* a, vec* b) {
    const __m256 p = _mm256_unpacklo_ps(even, odd), q = _mm256_unpackhi_ps(even, odd);
    *a = _mm256_permute2f128_ps(p, q, 0x20), *b = _mm256_permute2f128_ps(p, q, 0x31);
}

// The level nearest each number: of 16 ascending ones, between 15 bounds.
struct Nearest {
    Encoder tree;
    __m256 low, high;
    Nearest(const float* levels, const float* bounds)
        : tree(bounds, no_order), low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
};
inline vec vnearest(vec x, const Nearest& n) {
    const __m256i rank = rank8(x, n.tree);  // bit 3 says which half; as the sign it chooses
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(n.low, rank), _mm256_permutevar8x32_ps(n.high, rank),
                            _mm256_castsi256_ps(_mm256_slli_epi32(rank, 28)));
}

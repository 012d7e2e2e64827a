// Pairs of bfloat16 and the instruction that multiplies them: two products a lane, added to an fp32 sum. It takes and
// gives zeros for subnormals, as rounding to pairs does.

struct Pairs {
    static constexpr int64_t numbers = 2;

    static vec dot(vec a, vec b, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static vec join(vec first, vec second) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    static float join(float first, float second) {
        bf16 low, high;
        narrow(first, &low), narrow(second, &high);
        return float_of(uint32_t(high.bits) << 16 | low.bits);
    }
    static eight load(const bf16* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
    static eight load(const float* p) { return (eight)_mm512_cvtneps_pbh(vload(p)); }
    static eight load(const bf16* p, float) { return load(p); }  // what is stored in bfloat16 has no factor
    template <class T>
    static eight load(const T* p, float factor) {
        return (eight)_mm512_cvtneps_pbh(vmul(vload(p), vset(factor)));
    }
};

template <>
struct NumberOf<bf16, bf16> {
    typedef Pairs type;
};

// NEON's eight floats, two registers, between memory formats and fp32, and what the shared kernels do with them.

struct eight {
    float32x4_t low, high;
};

inline eight zero8() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
inline eight set8(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline eight mul8(eight a, eight b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline eight add8(eight a, eight b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }

inline eight load8(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline eight load8(const bf16* p) {
    const uint16x8_t half = vld1q_u16(&p->bits), zero = vdupq_n_u16(0);
    return {vreinterpretq_f32_u16(vzip1q_u16(zero, half)), vreinterpretq_f32_u16(vzip2q_u16(zero, half))};
}
inline eight load8(const fp16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))),
            vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits + 4)))};
}

inline eight load8(const int8_t* p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}

inline void store8(float* p, eight x) { vst1q_f32(p, x.low), vst1q_f32(p + 4, x.high); }
inline void store8(fp16* p, eight x) {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x.low)));
    vst1_u16(&p->bits + 4, vreinterpret_u16_f16(vcvt_f16_f32(x.high)));
}
inline uint16x4_t narrow4(float32x4_t x) {  // to bfloat16
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    // A NaN must stay one: rounding up could carry its mantissa away.
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(1 << 22));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
inline void store8(bf16* p, eight x) { vst1q_u16(&p->bits, vcombine_u16(narrow4(x.low), narrow4(x.high))); }

inline void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const float64x2_t p = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), q = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t r = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), s = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vzip1q_f64(p, r)), b = vreinterpretq_f32_f64(vzip1q_f64(q, s));
    c = vreinterpretq_f32_f64(vzip2q_f64(p, r)), d = vreinterpretq_f32_f64(vzip2q_f64(q, s));
}

// Eight rows of eight -> their transpose, in place.
inline void transpose8(eight* r) {
    transpose4(r[0].low, r[1].low, r[2].low, r[3].low);
    transpose4(r[0].high, r[1].high, r[2].high, r[3].high);
    transpose4(r[4].low, r[5].low, r[6].low, r[7].low);
    transpose4(r[4].high, r[5].high, r[6].high, r[7].high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const float32x4_t corner = r[i].high;
        r[i].high = r[i + 4].low;
        r[i + 4].low = corner;
    }
}

// NEON's vector of floats, two registers, and the operations that the shared kernels are written in.

typedef eight vec;
constexpr int64_t vec_width = 8;

inline vec vzero() { return zero8(); }
inline vec vset(float x) { return set8(x); }
inline vec vbroadcast(const float* p) {
    const float32x4_t x = vld1q_dup_f32(p);
    return {x, x};
}
// x with another number in its high half.
inline vec with_high(vec x, float high) { return {x.low, vdupq_n_f32(high)}; }
template <class T>
inline vec vload(const T* p) {
    return load8(p);
}
template <class T>
inline void vstore(T* p, vec x) {
    store8(p, x);
}

inline vec vadd(vec a, vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline vec vsub(vec a, vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline vec vmul(vec a, vec b) { return mul8(a, b); }
inline vec vdiv(vec a, vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline vec vfma(vec a, vec b, vec c) {  // a b + c
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline vec vfnma(vec a, vec b, vec c) {  // c - a b
    return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}
inline vec vmax(vec a, vec b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }  // NaN where either is
inline vec vmin(vec a, vec b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
inline float vsum(vec x) { return vaddvq_f32(vaddq_f32(x.low, x.high)); }
inline float vpeak(vec x) { return vmaxvq_f32(vmaxq_f32(x.low, x.high)); }  // the largest lane

// One number for all lanes, as a multiply-add takes it: a lane of a register. Where A's rows lie side by side, two of them
// are loaded at once; a broadcasting load would cost the multiplying pipes an instruction.
template <int LANE>
struct Spread {
    float32x2_t pair;
};
template <int I, int ROWS, int64_t STEP>
inline auto vspread(const float* a) {
    if constexpr (STEP == 1 && (I ^ 1) < ROWS)
        return Spread<I & 1>{vld1_f32(a + I / 2 * 2)};
    else
        return Spread<0>{vld1_dup_f32(a + I * STEP)};
}
template <int LANE>
inline vec vfma(Spread<LANE> a, vec b, vec c) {
    return {vfmaq_lane_f32(c.low, b.low, a.pair, LANE), vfmaq_lane_f32(c.high, b.high, a.pair, LANE)};
}

inline float32x4_t within4(float32x4_t x, float32x4_t low, float32x4_t high, float32x4_t inside, float32x4_t outside) {
    return vbslq_f32(vandq_u32(vcgeq_f32(x, low), vcltq_f32(x, high)), inside, outside);
}
// `inside` where low <= x < high, else `outside`.
inline vec vwithin(vec x, vec low, vec high, vec inside, vec outside) {
    return {within4(x.low, low.low, high.low, inside.low, outside.low),
            within4(x.high, low.high, high.high, inside.high, outside.high)};
}

inline vec vround(vec x) { return {vrndnq_f32(x.low), vrndnq_f32(x.high)}; }
inline float32x4_t exponent4(int32x4_t x) { return vreinterpretq_f32_s32(vshlq_n_s32(x, 23)); }
// The float whose exponent field is the last eight bits of x.
inline vec vexponent(vec x) {
    return {exponent4(vreinterpretq_s32_f32(x.low)), exponent4(vreinterpretq_s32_f32(x.high))};
}
inline float32x4_t scale4(float32x4_t x, float32x4_t n) {
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
    const float32x4_t first = exponent4(vaddq_s32(half, bias));
    return vmulq_f32(vmulq_f32(x, first), exponent4(vaddq_s32(vsubq_s32(whole, half), bias)));
}
// x * 2^n for whole n from -252 to 254, in two steps: 2^n itself may not be a float.
inline vec vscale(vec x, vec n) { return {scale4(x.low, n.low), scale4(x.high, n.high)}; }

// a and b, each four pairs -> the pairs' first numbers, a's four and then b's, and their second ones; and back.
inline void separate(vec a, vec b, vec* even, vec* odd) {
    *even = {vuzp1q_f32(a.low, a.high), vuzp1q_f32(b.low, b.high)};
    *odd = {vuzp2q_f32(a.low, a.high), vuzp2q_f32(b.low, b.high)};
}
inline void interleave(vec even, vec odd, vec* a, vec* b) {
    *a = {vzip1q_f32(even.low, odd.low), vzip2q_f32(even.low, odd.low)};
    *b = {vzip1q_f32(even.high, odd.high), vzip2q_f32(even.high, odd.high)};
}

// The level nearest each number: of 16 ascending ones, between 15 bounds.
struct Nearest {
    Encoder tree;
    uint8x16x4_t levels;
    Nearest(const float* all, const float* bounds) : tree(bounds, no_order) {
        for (int i = 0; i < 4; ++i) levels.val[i] = vreinterpretq_u8_f32(vld1q_f32(all + 4 * i));
    }
};
inline float32x4_t nearest4(float32x4_t x, const Nearest& n) {
    return vreinterpretq_f32_u8(vqtbl4q_u8(n.levels, bytes_of(rank4(x, n.tree))));
}
inline vec vnearest(vec x, const Nearest& n) { return {nearest4(x.low, n), nearest4(x.high, n)}; }

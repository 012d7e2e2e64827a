// Encoding and decoding one block of codes. Block sizes are multiples of 32: 16 bytes of codes.

// ---- encode: four comparisons walk a binary tree over the 15 boundaries ----

struct Encoder {
    float32x4_t root, left, right;
    uint8x16_t level3;    // four floats
    uint8x16x2_t level4;  // eight
    uint8x16_t order;
    Encoder(const float* b, const uint8_t* o) {
        root = vdupq_n_f32(b[7]), left = vdupq_n_f32(b[3]), right = vdupq_n_f32(b[11]);
        const float third[4] = {b[1], b[5], b[9], b[13]};
        const float fourth[8] = {b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]};
        level3 = vreinterpretq_u8_f32(vld1q_f32(third));
        level4.val[0] = vreinterpretq_u8_f32(vld1q_f32(fourth));
        level4.val[1] = vreinterpretq_u8_f32(vld1q_f32(fourth + 4));
        order = vld1q_u8(o);
    }
};

// Of the floats in a table with these numbers.
inline uint8x16_t bytes_of(uint32x4_t number) {
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), number, vdupq_n_u32(0x04040404)));
}

// The number of boundaries below each x, 0 to 15. A comparison gives -1 where it holds.
inline uint32x4_t rank4(float32x4_t x, const Encoder& e) {
    const auto deeper = [x](uint32x4_t r, float32x4_t bound) {
        return vsubq_u32(vaddq_u32(r, r), vcgtq_f32(x, bound));
    };
    const uint32x4_t right = vcgtq_f32(x, e.root);
    uint32x4_t r = deeper(vshrq_n_u32(right, 31), vbslq_f32(right, e.right, e.left));
    r = deeper(r, vreinterpretq_f32_u8(vqtbl1q_u8(e.level3, bytes_of(r))));
    return deeper(r, vreinterpretq_f32_u8(vqtbl2q_u8(e.level4, bytes_of(r))));
}

template <class T>
uint32_t absmax_bits(const T* x, int64_t n) {
    uint32x4_t low = vdupq_n_u32(0), high = low;  // magnitudes twice as large: the shift drops the signs
    for (int64_t i = 0; i < n; i += 8) {
        const eight v = load8(x + i);
        low = vmaxq_u32(low, vshlq_n_u32(vreinterpretq_u32_f32(v.low), 1));
        high = vmaxq_u32(high, vshlq_n_u32(vreinterpretq_u32_f32(v.high), 1));
    }
    return vmaxvq_u32(vmaxq_u32(low, high)) >> 1;
}

// The codes of sixteen numbers, in bytes.
template <class T>
inline uint8x16_t encode16(const T* x, float inverse, const Encoder& e) {
    const eight a = mul8(load8(x), set8(inverse)), b = mul8(load8(x + 8), set8(inverse));
    const auto halves = [](uint32x4_t p, uint32x4_t q) {
        return vuzp1q_u16(vreinterpretq_u16_u32(p), vreinterpretq_u16_u32(q));
    };
    const uint16x8_t first = halves(rank4(a.low, e), rank4(a.high, e)),
                     second = halves(rank4(b.low, e), rank4(b.high, e));
    return vqtbl1q_u8(e.order, vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second)));
}

template <class T>
void encode_block(const T* x, int64_t n, float inverse, const Encoder& e, uint8_t* codes) {
    for (int64_t i = 0; i < n; i += 32) {
        const uint8x16_t a = encode16(x + i, inverse, e), b = encode16(x + i + 16, inverse, e);
        vst1q_u8(codes + i / 2, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));  // first * 16 + second
    }
}

// ---- decode ----
// An fp32 value is looked up as four byte planes and put together by zipping, twelve instructions for 16 weights. One
// look-up in all 64 bytes gives a quarter of them and is several instructions inside most processors. The 16-bit formats
// look up the block's 16 already scaled and rounded values, in two planes.

struct Decoder {
    const float* codebook;
    uint8x16_t plane[4];
    Decoder() = default;
    explicit Decoder(const float* c) : codebook(c) {
        for (int p = 0; p < 4; ++p) {
            uint8_t bytes[16];
            for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(bits_of(c[i]) >> (8 * p));
            plane[p] = vld1q_u8(bytes);
        }
    }
};

struct codes32 {
    uint8x16_t low, high;
};

inline uint8x16_t first_codes(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }
inline uint8x16_t second_codes(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

// 32 codes in bytes. `low` holds quads 0 2 4 6 of the 32 weights and `high` quads 1 3 5 7, as lookup32 wants them.
inline codes32 spread32(const uint8_t* codes) {
    const uint8x16_t packed = vld1q_u8(codes), first = first_codes(packed), second = second_codes(packed);
    const uint32x4_t a = vreinterpretq_u32_u8(vzip1q_u8(first, second));
    const uint32x4_t b = vreinterpretq_u32_u8(vzip2q_u8(first, second));
    return {vreinterpretq_u8_u32(vuzp1q_u32(a, b)), vreinterpretq_u8_u32(vuzp2q_u32(a, b))};
}

// 64 codes, the high nibbles and the low ones; the second half as zeros when there are only 32.
inline void nibbles_of(const uint8_t* codes, bool whole, codes32* high, codes32* low) {
    const uint8x16_t a = vld1q_u8(codes), b = whole ? vld1q_u8(codes + 16) : vdupq_n_u8(0);
    *high = {first_codes(a), first_codes(b)};
    *low = {second_codes(a), second_codes(b)};
}

// 16 codes -> 4 x 4 values in their order, not yet scaled.
inline void lookup16(uint8x16_t code, const uint8x16_t* plane, float32x4_t* out) {
    const uint8x16_t p0 = vqtbl1q_u8(plane[0], code), p1 = vqtbl1q_u8(plane[1], code);
    const uint8x16_t p2 = vqtbl1q_u8(plane[2], code), p3 = vqtbl1q_u8(plane[3], code);
    const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(p0, p1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(p0, p1));
    const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(p2, p3)), high1 = vreinterpretq_u16_u8(vzip2q_u8(p2, p3));
    out[0] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
    out[1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
    out[2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
    out[3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
}

// 32 codes -> 4 x 8 values, not yet scaled, in the order of spread32.
inline void lookup32(codes32 code, const uint8x16_t* plane, eight* out) {
    float32x4_t low[4], high[4];
    lookup16(code.low, plane, low);
    lookup16(code.high, plane, high);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[j] = {low[j], high[j]};
}

// T is bf16 or fp16.
template <class T>
void decode_block(const uint8_t* codes, int64_t n, float scale, float offset, const Decoder& d, T* out) {
    T values[16];
    store8(values, add8(mul8(load8(d.codebook), set8(scale)), set8(offset)));
    store8(values + 8, add8(mul8(load8(d.codebook + 8), set8(scale)), set8(offset)));
    const uint8x16x2_t table = vld2q_u8(reinterpret_cast<const uint8_t*>(values));  // low bytes, high bytes
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
    for (int64_t i = 0; i < n; i += 32) {
        const uint8x16_t packed = vld1q_u8(codes + i / 2), first = first_codes(packed), second = second_codes(packed);
        const uint8x16_t code[2] = {vzip1q_u8(first, second), vzip2q_u8(first, second)};
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const uint8x16_t low = vqtbl1q_u8(table.val[0], code[j]), high = vqtbl1q_u8(table.val[1], code[j]);
            vst1q_u8(bytes + 2 * i + 32 * j, vzip1q_u8(low, high));
            vst1q_u8(bytes + 2 * i + 32 * j + 16, vzip2q_u8(low, high));
        }
    }
}

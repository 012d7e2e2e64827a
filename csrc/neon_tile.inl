// NEON: looking up the codes of eight rows side by side.

struct RowLookup {
    const uint8x16_t* plane;
    explicit RowLookup(const Decoder& d) : plane(d.plane) {}

    // 32 columns of eight rows, from byte `byte` of each on -> out[32][16], eight lanes wide. Turning bytes, not weights,
    // is what makes the transposition cheap: zipping row i with row i + 4, three times.
    void eight_rows(const uint8_t* const* rows, int64_t byte, eight scales, eight offsets, float* out) const {
        uint8x16_t turned[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) turned[i] = vld1q_u8(rows[i] + byte);
        for (int level = 0; level < 3; ++level) zip_halves(turned);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i, out += 4 * 16) {  // bytes 2 i and 2 i + 1 of all rows
            two_columns(first_codes(turned[i]), scales, offsets, out);
            two_columns(second_codes(turned[i]), scales, offsets, out + 16);
        }
    }

  private:
    static void zip_halves(uint8x16_t* v) {
        const uint8x16_t a = v[0], b = v[1], c = v[2], d = v[3];
        v[0] = vzip1q_u8(a, v[4]), v[1] = vzip2q_u8(a, v[4]);
        const uint8x16_t e = v[5], f = v[6], g = v[7];
        v[2] = vzip1q_u8(b, e), v[3] = vzip2q_u8(b, e);
        v[4] = vzip1q_u8(c, f), v[5] = vzip2q_u8(c, f);
        v[6] = vzip1q_u8(d, g), v[7] = vzip2q_u8(d, g);
    }

    // The codes of a column and of the one after next.
    void two_columns(uint8x16_t codes, eight scales, eight offsets, float* out) const {
        float32x4_t v[4];
        lookup16(codes, plane, v);
        store8(out, add8(mul8({v[0], v[1]}, scales), offsets));
        store8(out + 2 * 16, add8(mul8({v[2], v[3]}, scales), offsets));
    }
};

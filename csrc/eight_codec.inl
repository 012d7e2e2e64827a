// Decoding a block to fp32, eight weights at a time.

inline void decode_block(const uint8_t* codes, int64_t n, float scale, float offset, const Decoder& d, float* out) {
    const eight s = set8(scale), o = set8(offset);
    for (int64_t i = 0; i < n; i += 32) {
        eight v[4];
        lookup32(spread32(codes + i / 2), d.plane, v);
        for (int j = 0; j < 4; ++j) store8(out + i + 8 * j, add8(mul8(v[j], s), o));
    }
}

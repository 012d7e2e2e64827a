// dequantize: the loops around an ISA's `decode_block`, which reads nibbles.

// Codes of three or two bits as nibbles: 8 to 3 bytes, 4 to a byte, the first in the high bits.
inline void widen_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* nibbles) {
    for (int64_t i = 0; i < n; i += 8, nibbles += 4) {
        uint32_t v;
        if (bits == 3) {
            v = uint32_t(codes[0]) << 16 | uint32_t(codes[1]) << 8 | codes[2];
            v = (v & 0xfffu) | (v & 0xfff000u) << 4;
            v = (v & 0x003f003fu) | (v & 0x0fc00fc0u) << 2;
            v = (v & 0x07070707u) | (v & 0x38383838u) << 1;
        } else {
            v = uint32_t(codes[0]) << 8 | codes[1];
            v = (v & 0xffu) | (v & 0xff00u) << 8;
            v = (v & 0x000f000fu) | (v & 0x00f000f0u) << 4;
            v = (v & 0x03030303u) | (v & 0x0c0c0c0cu) << 2;
        }
        codes += bits;
        nibbles[0] = uint8_t(v >> 24), nibbles[1] = uint8_t(v >> 16), nibbles[2] = uint8_t(v >> 8);
        nibbles[3] = uint8_t(v);
    }
}

template <class T>
void decode_block_of(const uint8_t* codes, int64_t n, int bits, float scale, float offset, const Decoder& decoder,
                     T* out) {
    if (bits == 4) return decode_block(codes, n, scale, offset, decoder, out);
    if (bits == 8) {
        for (int64_t i = 0; i < n; ++i) narrow(float(int8_t(codes[i])) * scale, out + i);
        return;
    }
    uint8_t nibbles[most_block / 2];
    widen_codes(codes, n, bits, nibbles);
    decode_block(nibbles, n, scale, offset, decoder, out);
}

template <class T>
void dequantize_typed(const hb_weight& w, int64_t first, int64_t n, T* out, int threads) {
    const int64_t blocksize = w.blocksize, first_block = first / blocksize, full = n / blocksize;
    const Decoder decoder(w.codebook);
#pragma omp parallel for schedule(dynamic, serial_elements / blocksize) num_threads(threads_for(n, threads))
    for (int64_t b = 0; b < full; ++b) {
        const uint8_t* codes = w.codes + (first + b * blocksize) * w.bits / 8;
        decode_block_of(codes, blocksize, w.bits, scale_of(w, first_block + b), offset_of(w, first_block + b), decoder,
                        out + b * blocksize);
    }
    const int64_t done = full * blocksize;
    if (done == n) return;
    const float scale = scale_of(w, first_block + full), offset = offset_of(w, first_block + full);
    for (int64_t i = done; i < n; ++i) narrow(decode_one(w, first + i, scale, offset), out + i);
}

void dequantize(const hb_weight* w, int64_t first, int64_t n, int dtype, void* out, int threads) {
    switch (dtype) {
        case HB_BF16: return dequantize_typed(*w, first, n, static_cast<bf16*>(out), threads);
        case HB_F16: return dequantize_typed(*w, first, n, static_cast<fp16*>(out), threads);
        default: return dequantize_typed(*w, first, n, static_cast<float*>(out), threads);
    }
}

// The portable table: any CPU, any compiler. It has the codec only: panels of decoded rows times the platform's BLAS
// (halfbyte/kernels/panel.py), and torch's own functions for the rest, beat any portable loop.
#include "table.h"

namespace {
namespace hb_baseline {

#include "numbers.inl"

struct Encoder {
    const float* bounds;
    const uint8_t* order;
    Encoder(const float* b, const uint8_t* o) : bounds(b), order(o) {}
};

template <class T>
uint32_t absmax_bits(const T* x, int64_t n) {
    uint32_t peak = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = bits_of(widen(x[i])) & 0x7fffffffu;
        peak = magnitude > peak ? magnitude : peak;
    }
    return peak;
}

template <class T>
void encode_block(const T* x, int64_t n, float inverse, const Encoder& e, uint8_t* codes) {
    for (int64_t i = 0; i < n; i += 2) {
        const uint8_t high = encode_one(widen(x[i]) * inverse, e.bounds, e.order);
        const uint8_t low = encode_one(widen(x[i + 1]) * inverse, e.bounds, e.order);
        codes[i / 2] = uint8_t(high << 4 | low);
    }
}

struct Decoder {
    const float* codebook;
    explicit Decoder(const float* c) : codebook(c) {}
};

template <class T>
void decode_block(const uint8_t* codes, int64_t n, float scale, float offset, const Decoder& d, T* out) {
    T table[16];  // a block is at least twice as long: scale the 16 values, not the weights
    for (int i = 0; i < 16; ++i) narrow(d.codebook[i] * scale + offset, table + i);
    for (int64_t i = 0; i < n; i += 2) {
        out[i] = table[codes[i / 2] >> 4];
        out[i + 1] = table[codes[i / 2] & 15];
    }
}

#include "baseline_vec.inl"

#include "quantize.inl"
#include "scales.inl"
#include "constants.inl"
#include "choose.inl"
#include "dequantize.inl"
#include "adamw.inl"

}  // namespace hb_baseline
}  // namespace

extern const hb_table hb_table_baseline = {hb_baseline::quantize,
                                           hb_baseline::codes_for_scales,
                                           hb_baseline::count_nonfinite,
                                           hb_baseline::dequantize,
                                           hb_baseline::quantize_8bit,
                                           hb_baseline::least_error_scales,
                                           hb_baseline::least_error_constants,
                                           hb_baseline::choose_codes,
                                           hb_baseline::adamw};

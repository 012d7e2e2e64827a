// quantize, codes_for_scales and count_nonfinite: the loops around an ISA's `absmax_bits` and `encode_block`.
//
// The absmax is taken over the bits of |x| as integers: equal to the float maximum for numbers, and a NaN or Inf, whose
// bits are the largest, always survives into the result.

template <class T>
void quantize_typed(const T* w, int64_t n, int64_t blocksize, const float* bounds, const uint8_t* order, uint8_t* codes,
                    float* absmax, int threads) {
    const int64_t full = n / blocksize;
    const Encoder encoder(bounds, order);
#pragma omp parallel for schedule(dynamic, serial_elements / blocksize) num_threads(threads_for(n, threads))
    for (int64_t b = 0; b < full; ++b) {
        const T* x = w + b * blocksize;
        const float peak = float_of(absmax_bits(x, blocksize));
        absmax[b] = peak;
        const float inverse = 1.0f / (peak < 1e-38f ? 1e-38f : peak);
        encode_block(x, blocksize, inverse, encoder, codes + b * blocksize / 2);
    }
    const int64_t done = full * blocksize;
    if (done == n) return;
    // bitsandbytes treats a partial last block differently: it divides where full blocks multiply by the reciprocal.
    uint32_t bits = 0;
    for (int64_t i = done; i < n; ++i) {
        const uint32_t magnitude = bits_of(widen(w[i])) & 0x7fffffffu;
        if (magnitude > bits) bits = magnitude;
    }
    absmax[full] = float_of(bits);
    const float peak = absmax[full] < 1e-38f ? 1e-38f : absmax[full];
    for (int64_t i = done; i < n; i += 2) {
        const uint8_t high = encode_one(widen(w[i]) / peak, bounds, order);
        const uint8_t low = encode_one(i + 1 < n ? widen(w[i + 1]) / peak : 0.0f, bounds, order);
        codes[i / 2] = uint8_t(high << 4 | low);
    }
}

void quantize(const void* w, int dtype, int64_t n, int64_t blocksize, const float* bounds, const uint8_t* order,
              uint8_t* codes, float* absmax, int threads) {
    switch (dtype) {
        case HB_BF16:
            return quantize_typed(static_cast<const bf16*>(w), n, blocksize, bounds, order, codes, absmax, threads);
        case HB_F16:
            return quantize_typed(static_cast<const fp16*>(w), n, blocksize, bounds, order, codes, absmax, threads);
        default:
            return quantize_typed(static_cast<const float*>(w), n, blocksize, bounds, order, codes, absmax, threads);
    }
}

template <class T>
void codes_for_scales_typed(const T* w, int64_t n, int64_t blocksize, const float* scales, int constants,
                            const float* bounds, const uint8_t* order, uint8_t* codes, int threads) {
    const int64_t full = n / blocksize, done = full * blocksize;
    const Encoder encoder(bounds, order);
    constexpr int64_t moved_at_once = 256;
    const auto inverse = [=](int64_t b) {
        const float scale = scales[b * constants];
        return 1.0f / (scale < 1e-38f && scale > -1e-38f ? 1.0f : scale);
    };
    const auto offset = [=](int64_t b) { return constants == 2 ? scales[2 * b + 1] : 0.0f; };
#pragma omp parallel for schedule(dynamic, serial_elements / blocksize) num_threads(threads_for(n, threads))
    for (int64_t b = 0; b < full; ++b) {
        const int64_t start = b * blocksize;
        if (constants == 1) {
            encode_block(w + start, blocksize, inverse(b), encoder, codes + start / 2);
            continue;
        }
        float moved[moved_at_once];
        const float o = offset(b);
        for (int64_t at = start; at < start + blocksize; at += moved_at_once) {
            const int64_t count = blocksize < moved_at_once ? blocksize : moved_at_once;
            for (int64_t i = 0; i < count; ++i) moved[i] = widen(w[at + i]) - o;
            encode_block(moved, count, inverse(b), encoder, codes + at / 2);
        }
    }
    for (int64_t i = done; i < n; i += 2) {
        const auto one = [&](int64_t at) {
            return encode_one((widen(w[at]) - offset(full)) * inverse(full), bounds, order);
        };
        const uint8_t high = one(i), low = i + 1 < n ? one(i + 1) : encode_one(0.0f, bounds, order);
        codes[i / 2] = uint8_t(high << 4 | low);
    }
}

void codes_for_scales(const void* w, int dtype, int64_t n, int64_t blocksize, const float* scales, int constants,
                      const float* bounds, const uint8_t* order, uint8_t* codes, int threads) {
    switch (dtype) {
        case HB_BF16:
            return codes_for_scales_typed(static_cast<const bf16*>(w), n, blocksize, scales, constants, bounds, order,
                                          codes, threads);
        case HB_F16:
            return codes_for_scales_typed(static_cast<const fp16*>(w), n, blocksize, scales, constants, bounds, order,
                                          codes, threads);
        default:
            return codes_for_scales_typed(static_cast<const float*>(w), n, blocksize, scales, constants, bounds, order,
                                          codes, threads);
    }
}

// An all-ones exponent marks NaN and Inf in each format. Plain code: the compiler vectorises it, memory bounds it.
template <class U>
int64_t count_exponent(const U* x, U exponent, int64_t n, int threads) {
    constexpr int64_t grain = 4096;
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads)) reduction(+ : total)
    for (int64_t start = 0; start < n; start += grain) {
        const int64_t stop = start + grain < n ? start + grain : n;
        U found = 0;  // at most `grain`: fits in 16 bits
        for (int64_t i = start; i < stop; ++i) found = U(found + U((x[i] & exponent) == exponent));
        total += found;
    }
    return total;
}

int64_t count_nonfinite(const void* x, int dtype, int64_t n, int threads) {
    switch (dtype) {
        case HB_BF16: return count_exponent(static_cast<const uint16_t*>(x), uint16_t(0x7f80), n, threads);
        case HB_F16: return count_exponent(static_cast<const uint16_t*>(x), uint16_t(0x7c00), n, threads);
        default: return count_exponent(static_cast<const uint32_t*>(x), uint32_t(0x7f800000), n, threads);
    }
}

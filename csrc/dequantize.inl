// dequantize: the loops around an ISA's `decode_block`.

template <class T>
void dequantize_typed(const hb_weight& w, int64_t first, int64_t n, T* out, int threads) {
    const int64_t blocksize = w.blocksize, first_block = first / blocksize, full = n / blocksize;
    const Decoder decoder(w.codebook);
#pragma omp parallel for schedule(dynamic, serial_elements / blocksize) num_threads(threads_for(n, threads))
    for (int64_t b = 0; b < full; ++b) {
        const uint8_t* codes = w.codes + (first + b * blocksize) / 2;
        decode_block(codes, blocksize, scale_of(w, first_block + b), decoder, out + b * blocksize);
    }
    const int64_t done = full * blocksize;
    if (done == n) return;
    const float scale = scale_of(w, first_block + full);
    for (int64_t i = done; i < n; ++i) narrow(decode_one(w, first + i, scale), out + i);
}

void dequantize(const hb_weight* w, int64_t first, int64_t n, int dtype, void* out, int threads) {
    switch (dtype) {
        case HB_BF16: return dequantize_typed(*w, first, n, static_cast<bf16*>(out), threads);
        case HB_F16: return dequantize_typed(*w, first, n, static_cast<fp16*>(out), threads);
        default: return dequantize_typed(*w, first, n, static_cast<float*>(out), threads);
    }
}

// Number formats and block scales, in plain scalar code: every ISA's tails, and all of the baseline.
// Included inside an ISA's namespace: internal linkage, so that no copy compiled for one ISA can be linked into another.

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// a / power without a division: one per block of 64 weights would cost as much as decoding it.
inline int64_t over(int64_t a, int64_t power_of_two) { return a >> __builtin_ctzll(uint64_t(power_of_two)); }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return float(x); }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact
        const float magnitude = float(mantissa) * float_of(0x33800000u);
        return float_of(bits_of(magnitude) | sign);
    }
    return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        out->bits = uint16_t((bits >> 16) | 64u);  // keep a NaN a NaN
    } else {
        out->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}
inline void narrow(float x, fp16* out) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // rounds to 65536 or more: infinity
    } else if (magnitude >= 0x38800000u) {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    } else {
        // Subnormal half: adding 0.5 puts the unit of 2^-24 at the last mantissa bit, and the FPU rounds to even.
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    }
    out->bits = uint16_t(sign | half);
}

// The scale of block b; multiply, then add (the whole build has -ffp-contract=off), as bitsandbytes does.
inline float scale_of(const hb_weight& w, int64_t b) {
    const int64_t at = b * w.constants;
    if (!w.nested_absmax) return static_cast<const float*>(w.absmax)[at];
    const uint8_t code = static_cast<const uint8_t*>(w.absmax)[at];
    const float scaled = w.dynamic_map[code] * w.nested_absmax[over(at, w.nested_blocksize)];
    return scaled + w.nested_offset;
}

constexpr float no_offset = -0.0f;  // which leaves all it is added to as it is, 0 and -0 too
inline float offset_of(const hb_weight& w, int64_t b) {
    if (w.constants == 1) return no_offset;
    const int64_t at = 2 * b + 1;
    if (!w.nested_absmax) return static_cast<const float*>(w.absmax)[at];
    return w.dynamic_map[static_cast<const uint8_t*>(w.absmax)[at]] * w.nested_absmax[over(at, w.nested_blocksize)];
}

// Of block `first` and of those `step`, 2 `step`, ... blocks on: scales, and offsets where there are any. Beyond `count`
// blocks both are 0.
template <int LANES>
inline void constants_of_rows(const hb_weight& w, int64_t first, int64_t step, int64_t count, float* scales,
                              float* offsets) {
    for (int i = 0; i < LANES; ++i) scales[i] = i < count ? scale_of(w, first + i * step) : 0.0f;
    if (w.constants == 1) return;
    for (int i = 0; i < LANES; ++i) offsets[i] = i < count ? offset_of(w, first + i * step) : 0.0f;
}

inline float decode_one(const hb_weight& w, int64_t i, float scale, float offset) {
    if (w.bits == 8) return float(int8_t(w.codes[i])) * scale;
    const int64_t bit = i * w.bits, byte = bit / 8, end = bit % 8 + w.bits;
    const unsigned two = unsigned(w.codes[byte]) << 8 | (end > 8 ? w.codes[byte + 1] : 0u);
    return w.codebook[two >> (16 - end) & ((1u << w.bits) - 1u)] * scale + offset;
}

// Columns of W are a few bytes of each of its rows, too far apart for the CPU to foresee: whoever reads row r of them
// asks for that of r + rows_ahead.
constexpr int64_t rows_ahead = 24;
inline void fetch_columns(const hb_weight& w, int64_t row, int64_t column, int64_t columns) {
    const uint8_t* codes = w.codes + (at_most(row, w.rows - 1) * w.cols + column) / 2;
    for (int64_t i = 0; i < columns / 2; i += 64) __builtin_prefetch(codes + i);
}

// The same for whole rows: whoever reads columns k and on of `count` rows from `row` on, of `rows` up to `end`, asks for
// them of the next rows, or for the columns after `depth` where those were the last.
inline void fetch_rows(const hb_weight& w, int64_t row, int64_t count, int64_t first, int64_t end, int64_t k,
                       int64_t depth) {
    const bool more = row + count < end;
    const int64_t next = more ? row + count : first, column = more ? k : k + depth;
    if (column >= w.cols) return;
    for (int64_t i = 0; i < count; ++i)
        __builtin_prefetch(w.codes + (at_most(next + i, w.rows - 1) * w.cols + column) / 2);
}

constexpr uint8_t no_order[16] = {};  // of an encoder that is asked for ranks only

inline uint8_t encode_one(float x, const float* bounds, const uint8_t* order) {
    int interval = 0;
    for (int i = 0; i < 15; ++i) interval += x > bounds[i];
    return order[interval];
}

// Elements below this are not worth waking a thread for (about 10 us of work).
constexpr int64_t serial_elements = 1 << 16;

inline int threads_for(int64_t elements, int threads) {
    const int64_t useful = elements / serial_elements + 1;
    return useful < threads ? int(useful) : (threads < 1 ? 1 : threads);
}

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

inline int team_size() {  // of the parallel region we are in
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// The scales of a row, or its offsets, before the row itself: one look-up each, with nothing to decide in between.

constexpr int64_t max_row_scales = 1024;
constexpr int64_t dot_rows_at_once = 16;  // of W, times a few rows of x that stay in L1 meanwhile
#define HB_NOINLINE __attribute__((noinline))

// Numbers first, first + STEP, ... of a weight's scales, or of its scales and offsets in turn; to those that are stored in
// 8 bits `add` is added.
template <int STEP>
inline void constants_of_row(const hb_weight& w, int64_t first, int64_t count, float add, float* out) {
    if (!w.nested_absmax) {
        const float* from = static_cast<const float*>(w.absmax) + first;
        for (int64_t i = 0; i < count; ++i) out[i] = from[i * STEP];
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(w.absmax);
    const int64_t last = first + count * STEP;
    for (int64_t at = first; at < last;) {
        const int64_t nested = over(at, w.nested_blocksize);
        const int64_t end = at_most((nested + 1) * w.nested_blocksize, last);
        const float scale = w.nested_absmax[nested];
        for (; at < end; at += STEP) {
            float value = w.dynamic_map[codes[at]];
#if defined(HB_X86)
            asm("" : "+x"(value));  // keeps gcc from gathering, which takes twice as long on Zen
#endif
            *out++ = value * scale + add;
        }
    }
}

// Of blocks [first, first + count).
inline void scales_of_row(const hb_weight& w, int64_t first, int64_t count, float* scales) {
    if (w.constants == 1) return constants_of_row<1>(w, first, count, w.nested_offset, scales);
    constants_of_row<2>(w, 2 * first, count, w.nested_offset, scales);
}
inline void offsets_of_row(const hb_weight& w, int64_t first, int64_t count, float* offsets) {
    constants_of_row<2>(w, 2 * first + 1, count, no_offset, offsets);
}

// The scales of a row, before the row itself: one look-up a scale, with nothing to decide in between.

constexpr int64_t max_row_scales = 1024;
constexpr int64_t dot_rows_at_once = 16;  // of W, times a few rows of x that stay in L1 meanwhile
#define HB_NOINLINE __attribute__((noinline))

// Scales of blocks [first, first + count).
inline void scales_of_row(const hb_weight& w, int64_t first, int64_t count, float* scales) {
    if (w.constants == 2) {
        for (int64_t b = 0; b < count; ++b) scales[b] = scale_of(w, first + b);
        return;
    }
    if (!w.nested_absmax) {
        __builtin_memcpy(scales, static_cast<const float*>(w.absmax) + first, size_t(count) * 4);
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(w.absmax);
    for (int64_t block = first; block < first + count;) {
        const int64_t nested = over(block, w.nested_blocksize);
        const int64_t end = at_most((nested + 1) * w.nested_blocksize, first + count);
        const float scale = w.nested_absmax[nested];
        for (; block < end; ++block) {
            float value = w.dynamic_map[codes[block]];
#if defined(HB_X86)
            asm("" : "+x"(value));  // keeps gcc from gathering, which takes twice as long on Zen
#endif
            *scales++ = value * scale + w.nested_offset;
        }
    }
}

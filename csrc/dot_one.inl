// y = rows [first, last) of W times one x, which order_one has ordered.
inline void dot_one(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x, float* y) {
    if (w.blocksize == 64 && w.cols <= 64 * max_row_scales) return dot_one_64(w, d, first, last, x, y);
    for (int64_t row = first; row < last; ++row) dot_row<1>(w, d, row, x, 0, y + row);
}

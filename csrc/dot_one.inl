// Whether dot_few_64 serves; else dot_row does, whose order of x is another one.
inline bool in_64s(const hb_weight& w) { return w.blocksize == 64 && w.cols <= 64 * max_row_scales; }

inline void order_for(const hb_weight& w, const float* x, float* out) {
    return in_64s(w) ? order_one(x, w.cols, out) : order_row(x, w.cols, out);
}

// y(M, y_stride) = rows [first, last) of W times x(M, stride), which order_for has ordered.
template <int M>
inline void dot_few(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x, int64_t stride,
                    float* y, int64_t y_stride) {
    if (in_64s(w)) return dot_few_64<M>(w, d, first, last, x, stride, y, y_stride);
    for (int64_t row = first; row < last; ++row)
        for (int m = 0; m < M; ++m) dot_row<1>(w, d, row, x + m * stride, 0, y + m * y_stride + row);
}

template <int M>
struct Count {
    static constexpr int value = M;
};

// Runs `body` with the constant `n`, or MOST where there are more.
template <int MOST, class Body>
inline void with_count(int64_t n, Body body) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_count<MOST - 1>(n, body);
    body(Count<MOST>());
}

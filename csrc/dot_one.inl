// Whether dot_few_64 serves; else dot_row does, whose order of x is another one.
inline bool in_64s(const hb_weight& w) { return w.blocksize == 64 && w.cols <= 64 * max_row_scales; }

// Floats that order_for writes: x in order, then its blocks' sums, which offsets are multiplied by.
inline int64_t length_for(int64_t cols) { return ordered_length(cols) + cols / 32; }

// For matrices side by side; their weights in 4 bits have blocks of one size.
inline void order_for(const hb_matrix* group, int count, const float* x, float* out) {
    bool ordered = false;
    for (const hb_matrix* matrix = group; matrix < group + count; ++matrix) {
        if (!matrix->w4) continue;
        const hb_weight& w = *matrix->w4;
        if (!ordered) in_64s(w) ? order_one(x, w.cols, out) : order_row(x, w.cols, out);
        ordered = true;
        if (w.constants == 2) return block_sums(x, w.cols, w.blocksize, out + ordered_length(w.cols));
    }
}

// y(M, y_stride) = rows [first, last) of W times x(M, stride), which order_for has ordered.
template <int M>
inline void dot_few(const hb_weight& w, const Decoder& d, int64_t first, int64_t last, const float* x, int64_t stride,
                    float* y, int64_t y_stride) {
    if (in_64s(w))
        dot_few_64<M>(w, d, first, last, x, stride, y, y_stride);
    else
        for (int64_t row = first; row < last; ++row)
            for (int m = 0; m < M; ++m) dot_row<1>(w, d, row, x + m * stride, 0, y + m * y_stride + row);
    for (int64_t row = first; w.constants == 2 && row < last; ++row)
        add_offsets<M>(w, row, x + ordered_length(w.cols), stride, y + row, y_stride);
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

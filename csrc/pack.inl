// Packing X for the inner kernel: rows [row, row + rows) of x(m, depth), `stride` apart, as [depth][rows]; rows past m
// are zeros.

template <class T>
void pack_panel(const T* x, int64_t m, int64_t stride, int64_t depth, int64_t row, int64_t rows, float* out) {
    constexpr int most = max_panel_rows > 8 ? 16 : 8;
    const bool tall = most > 8 && rows > 8;
    const int64_t present = at_most(rows, m - row);
    const T* from = x + row * stride;
    int64_t k = 0;
    // A column of `rows` floats is stored as one or two vectors of eight, which may run into the next column: that one
    // is stored later. So the last columns go one number at a time, and no thread writes outside its panel.
    for (; k + 16 <= depth; k += 8) {
        eight v[most];
        for (int64_t i = 0; i < most; ++i) v[i] = i < present ? load8(from + i * stride + k) : zero8();
        transpose8(v);
        if (tall) transpose8(v + most - 8);
        for (int64_t j = 0; j < 8; ++j) {
            store8(out + (k + j) * rows, v[j]);
            if (tall) store8(out + (k + j) * rows + 8, v[most - 8 + j]);
        }
    }
    for (; k < depth; ++k)
        for (int64_t i = 0; i < rows; ++i) out[k * rows + i] = i < present ? widen(from[i * stride + k]) : 0.0f;
}

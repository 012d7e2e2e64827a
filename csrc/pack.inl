// Packing X for the inner kernel: rows [row, row + rows) of x(m, depth), `stride` apart, as [dwords][rows]; rows past m
// are zeros.

template <class N, class T>
void pack_panel(const T* x, int64_t m, int64_t stride, int64_t depth, int64_t row, int64_t rows, float* out) {
    constexpr int most = max_panel_rows > 8 ? 16 : 8;
    const bool tall = most > 8 && rows > 8;
    const int64_t present = at_most(rows, m - row), whole = depth / N::numbers;
    const T* from = x + row * stride;
    int64_t k = 0;
    // A column of `rows` dwords is stored as one or two vectors of eight, which may run into the next column: that one
    // is stored later. So the last columns go one dword at a time, and no thread writes outside its panel.
    for (; k + 16 <= whole; k += 8) {
        eight v[most];
        for (int64_t i = 0; i < most; ++i) v[i] = i < present ? N::load(from + i * stride + k * N::numbers) : zero8();
        transpose8(v);
        if (tall) transpose8(v + most - 8);
        for (int64_t j = 0; j < 8; ++j) {
            store8(out + (k + j) * rows, v[j]);
            if (tall) store8(out + (k + j) * rows + 8, v[most - 8 + j]);
        }
    }
    for (; k + 8 <= whole; k += 8)
        for (int64_t i = 0; i < rows; ++i) {
            float dwords[8];
            store8(dwords, i < present ? N::load(from + i * stride + k * N::numbers) : zero8());
            for (int64_t j = 0; j < 8; ++j) out[(k + j) * rows + i] = dwords[j];
        }
    for (; k < dwords_of<N>(depth); ++k)
        for (int64_t i = 0; i < rows; ++i) {
            const T* at = from + i * stride + k * N::numbers;
            out[k * rows + i] =
                i < present ? N::join(widen(at[0]), k < whole ? widen(at[N::numbers - 1]) : 0.0f) : 0.0f;
        }
}

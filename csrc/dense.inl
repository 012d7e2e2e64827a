// Tiles of a matrix of plain numbers: rows of S, `stride` apart, times a factor. What lies past its last row or
// column is filled with zeros up to whole panels. Short pieces of many rows are more than a processor fetches ahead by
// itself: asked for in time, filling a tile from memory takes a third to a half of the time.

// A factor for each HB_INT8_BLOCK columns of each row.
struct BlockScales {
    const float* data;
    int64_t blocks;  // of a row
};
static_assert(HB_INT8_BLOCK % panel_width == 0, "columns of a panel share a scale");

inline float factor_at(float factor, int64_t, int64_t) { return factor; }
inline float factor_at(const BlockScales& scales, int64_t row, int64_t column) {
    return scales.data[row * scales.blocks + over(column, HB_INT8_BLOCK)];
}

template <class S, class F = float>
struct Dense {
    const S* data;
    int64_t row_count, col_count, stride;
    F factor;

    int64_t rows() const { return row_count; }
    int64_t cols() const { return col_count; }

    // Rows [row, row + rows), columns [k0, k0 + depth), transposed: tile[panel][dwords][panel_width].
    template <class N>
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        constexpr int64_t step = 8 * N::numbers;
        for (int64_t r = 0; r < divide_up(rows, panel_width) * panel_width; r += 8) {
            const S* from = data + (row + r) * stride + k0;
            float* out = tile + r / panel_width * panel_stride(dwords_of<N>(depth)) + r % panel_width;
            int64_t k = 0;
            for (; k + step <= depth; k += step, out += 8 * panel_width) {
                if (k * int64_t(sizeof(S)) % 64 == 0)
                    for (int64_t i = 8; i < 16; ++i) __builtin_prefetch(from + i * stride + k);
                eight v[8];
                for (int64_t i = 0; i < 8; ++i)
                    v[i] =
                        r + i < rows ? N::load(from + i * stride + k, factor_at(factor, row + r + i, k0 + k)) : zero8();
                transpose8(v);
                for (int64_t j = 0; j < 8; ++j) store8(out + j * panel_width, v[j]);
            }
            for (; k < depth; k += N::numbers, out += panel_width)
                for (int64_t i = 0; i < 8; ++i) {
                    out[i] = 0.0f;
                    if (r + i >= rows) continue;
                    const S* at = from + i * stride + k;
                    const float scale = factor_at(factor, row + r + i, k0 + k);
                    out[i] = N::join(widen(at[0]) * scale, k + 1 < depth ? widen(at[N::numbers - 1]) * scale : 0.0f);
                }
        }
    }

    // Rows [r0, r0 + depth), columns [column, column + columns), as they lie: tile[panel][dwords][panel_width].
    template <class N>
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        for (int64_t r = 0; r < depth; r += N::numbers) {
            const S* from = data + (r0 + r) * stride + column;
            for (int64_t row = 16; row < 16 + N::numbers; ++row)
                for (int64_t i = 0; i < columns; i += 64 / sizeof(S)) __builtin_prefetch(from + row * stride + i);
            float* out = tile + r / N::numbers * panel_width;
            for (int64_t c = 0; c < divide_up(columns, panel_width) * panel_width; c += vec_width) {
                const auto dwords = [&](auto lanes) {
                    return join_rows<N>(r, depth, [&](int64_t row) {
                        const vec scale = vset(factor_at(factor, r0 + row, column + at_most(c, columns - 1)));
                        return vmul(lanes.load(from + (row - r) * stride + c), scale);
                    });
                };
                vstore(out + c / panel_width * panel_stride(dwords_of<N>(depth)) + c % panel_width,
                       c + vec_width <= columns ? dwords(Whole()) : dwords(Part{at_least(columns - c, 0)}));
            }
        }
    }
};

// Tiles of a matrix of plain numbers: rows of S, `stride` apart, times a factor, in fp32. What lies past its last row or
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

    // Rows [row, row + rows), columns [k0, k0 + depth), transposed: tile[panel][depth][panel_width].
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        for (int64_t r = 0; r < divide_up(rows, panel_width) * panel_width; r += 8) {
            const S* from = data + (row + r) * stride + k0;
            float* out = tile + r / panel_width * panel_stride(depth) + r % panel_width;
            int64_t k = 0;
            for (; k + 8 <= depth; k += 8) {
                if (k * int64_t(sizeof(S)) % 64 == 0)
                    for (int64_t i = 8; i < 16; ++i) __builtin_prefetch(from + i * stride + k);
                eight v[8];
                for (int64_t i = 0; i < 8; ++i)
                    v[i] = r + i < rows
                               ? mul8(load8(from + i * stride + k), set8(factor_at(factor, row + r + i, k0 + k)))
                               : zero8();
                transpose8(v);
                for (int64_t j = 0; j < 8; ++j) store8(out + (k + j) * panel_width, v[j]);
            }
            for (; k < depth; ++k)
                for (int64_t i = 0; i < 8; ++i)
                    out[k * panel_width + i] =
                        r + i < rows ? widen(from[i * stride + k]) * factor_at(factor, row + r + i, k0 + k) : 0.0f;
        }
    }

    // Rows [r0, r0 + depth), columns [column, column + columns), as they lie: tile[panel][depth][panel_width].
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        for (int64_t r = 0; r < depth; ++r) {
            const S* from = data + (r0 + r) * stride + column;
            for (int64_t i = 0; i < columns; i += 64 / sizeof(S)) __builtin_prefetch(from + 16 * stride + i);
            float* out = tile + r * panel_width;
            int64_t c = 0;
            for (; c + panel_width <= columns; c += panel_width, out += panel_stride(depth)) {
                const vec scale = vset(factor_at(factor, r0 + r, column + c));
                vstore(out, vmul(vload(from + c), scale));
                vstore(out + vec_width, vmul(vload(from + c + vec_width), scale));
            }
            if (c == columns) continue;
            for (int64_t i = 0; i < panel_width; ++i)
                out[i] = c + i < columns ? widen(from[c + i]) * factor_at(factor, r0 + r, column + c) : 0.0f;
        }
    }
};

// Vectors of eight: panels of 6 rows by 16 columns, and the decoding of W into a tile.

#define HB_PANEL_ROWS 6
constexpr int64_t max_panel_rows = HB_PANEL_ROWS;
// Floats from one panel of the tile to the next: not a multiple of 4 KB, or all panels would share one cache set.
constexpr int64_t panel_stride(int64_t depth) { return depth * 2 * vec_width + 16; }
constexpr int64_t panel_width = 2 * vec_width;

// Rows [row, row + rows) of W, columns [k0, k0 + depth), transposed: tile[panel][depth][16].
template <class N>
void decode_forward(const hb_weight& w, const Decoder& d, int64_t row, int64_t rows, int64_t k0, int64_t depth,
                    float* tile) {
    static_assert(N::numbers == 1);
    const RowLookup lookup(d);
    const int64_t row_blocks = w.cols / w.blocksize;
    for (int64_t r = 0; r < rows; r += 8) {
        const uint8_t* codes[8];
        for (int i = 0; i < 8; ++i) codes[i] = w.codes + (row + at_most(r + i, rows - 1)) * (w.cols / 2);
        float* out = tile + r / 16 * panel_stride(depth) + r % 16;
        vec scales = vzero(), offsets = vset(no_offset);
        int64_t block = -1;
        for (int64_t k = 0; k < depth; k += 32) {
            if (over(k0 + k, w.blocksize) != block) {
                block = over(k0 + k, w.blocksize);
                alignas(32) float s[8], o[8];
                constants_of_rows<8>(w, (row + r) * row_blocks + block, row_blocks, rows - r, s, o);
                scales = vload(s);
                if (w.constants == 2) offsets = vload(o);
            }
            if (k % 128 == 0) fetch_rows(w, row + r, 8, row, row + rows, k0 + k, depth);
            lookup.eight_rows(codes, (k0 + k) / 2, scales, offsets, out + k * 16);
        }
    }
    if (rows % 16 && rows % 16 <= 8) {  // the last panel's right half holds no row
        float* out = tile + rows / 16 * panel_stride(depth) + 8;
        for (int64_t k = 0; k < depth; ++k) vstore(out + k * 16, vzero());
    }
}

// Rows [r0, r0 + depth) of W, columns [column, column + columns), as they lie: tile[panel][depth][16].
template <class N>
void decode_backward(const hb_weight& w, const Decoder& d, int64_t r0, int64_t depth, int64_t column, int64_t columns,
                     float* tile) {
    static_assert(N::numbers == 1);
    for (int64_t r = 0; r < depth; ++r) {
        const int64_t start = (r0 + r) * w.cols + column;
        const uint8_t* codes = w.codes + start / 2;
        fetch_columns(w, r0 + r + rows_ahead, column, columns);
        vec scale = vzero(), offset = vzero();
        int64_t block = -1;
        for (int64_t c = 0; c < columns; c += 32) {
            if (over(start + c, w.blocksize) != block) {
                block = over(start + c, w.blocksize);
                scale = vset(scale_of(w, block)), offset = vset(offset_of(w, block));
            }
            vec v[4];
            lookup32(spread32(codes + c / 2), d.plane, v);
            float* out = tile + c / 16 * panel_stride(depth) + r * 16;
            vstore(out, vadd(vmul(v[0], scale), offset));
            vstore(out + 8, vadd(vmul(v[1], scale), offset));
            out += panel_stride(depth);
            vstore(out, vadd(vmul(v[2], scale), offset));
            vstore(out + 8, vadd(vmul(v[3], scale), offset));
        }
    }
}

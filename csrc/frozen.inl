// Products with a frozen, unquantized weight of any of the three dtypes: a source of tiles for the loop nest of
// linear.inl, and dot products at the speed of memory for a few rows of x (generation).

// Rows [row, row + rows) of w, columns [k0, k0 + depth), transposed: tile[panel][depth][panel_width].
template <class T>
void widen_forward(const T* w, int64_t cols, int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) {
    for (int64_t r = 0; r < divide_up(rows, panel_width) * panel_width; r += 8) {
        const int64_t present = at_most(at_least(rows - r, 0), 8);
        const T* from = w + (row + r) * cols + k0;
        float* out = tile + r / panel_width * panel_stride(depth) + r % panel_width;
        int64_t k = 0;
        for (; k + 8 <= depth; k += 8) {
            __m256 v[8];
            for (int64_t i = 0; i < 8; ++i) v[i] = i < present ? load8(from + i * cols + k) : _mm256_setzero_ps();
            transpose8(v);
            for (int64_t j = 0; j < 8; ++j) _mm256_storeu_ps(out + (k + j) * panel_width, v[j]);
        }
        for (; k < depth; ++k)
            for (int64_t i = 0; i < 8; ++i) out[k * panel_width + i] = i < present ? widen(from[i * cols + k]) : 0.0f;
    }
}

// Rows [r0, r0 + depth) of w, columns [column, column + columns), as they lie: tile[panel][depth][panel_width].
template <class T>
void widen_backward(const T* w, int64_t cols, int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) {
    const int64_t whole = columns / vec_width * vec_width, padded = divide_up(columns, panel_width) * panel_width;
    for (int64_t r = 0; r < depth; ++r) {
        const T* from = w + (r0 + r) * cols + column;
        float* out = tile + r * panel_width;
        int64_t c = 0;
        for (; c < whole; c += vec_width)
            vstore(out + c / panel_width * panel_stride(depth) + c % panel_width, vload(from + c));
        for (; c < padded; ++c)
            out[c / panel_width * panel_stride(depth) + c % panel_width] = c < columns ? widen(from[c]) : 0.0f;
    }
}

// W as it is stored.
struct Stored {
    const void* data;
    int dtype;
    int64_t out, in;

    int64_t rows() const { return out; }
    int64_t cols() const { return in; }
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        with_type(dtype, [&](auto number) {
            widen_forward(static_cast<const decltype(number)*>(data), in, row, rows, k0, depth, tile);
        });
    }
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        with_type(dtype, [&](auto number) {
            widen_backward(static_cast<const decltype(number)*>(data), in, r0, depth, column, columns, tile);
        });
    }
};

constexpr int64_t max_frozen_dot_rows = 8;  // from 9 on the tiles are as fast

// sums[M] = one row of W times M rows of x, `cols` floats each.
template <int M, class T>
void dot_stored(const T* w, int64_t cols, const float* x, float* sums) {
    constexpr int chains = M == 1 ? 4 : M <= 4 ? 2 : 1;  // independent sums hide the latency of FMA
    vec total[M][chains];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < chains; ++c) total[m][c] = vzero();
    int64_t k = 0;
    for (; k + chains * vec_width <= cols; k += chains * vec_width)
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) {
            const vec v = vload(w + k + c * vec_width);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) total[m][c] = vfma(v, vload(x + m * cols + k + c * vec_width), total[m][c]);
        }
    for_lanes(cols - k, [&](int64_t i, auto lanes) {
        const vec v = lanes.load(w + k + i);
        for (int m = 0; m < M; ++m) total[m][0] = vfma(v, lanes.load(x + m * cols + k + i), total[m][0]);
    });
    for (int m = 0; m < M; ++m) {
        for (int c = 1; c < chains; ++c) total[m][0] = vadd(total[m][0], total[m][c]);
        sums[m] = vsum(total[m][0]);
    }
}

template <int M, class W, class T>
void dot_rows(const W* w, int64_t rows, int64_t cols, const float* x, const T* bias, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows* cols, threads))
    for (int64_t n = 0; n < rows; ++n) {
        float sums[M];
        dot_stored<M>(w + n * cols, cols, x, sums);
        for (int m = 0; m < M; ++m) narrow(bias ? sums[m] + widen(bias[n]) : sums[m], y + m * rows + n);
    }
}

template <class T>
int small_frozen(const Stored& s, const T* x, int64_t m, const T* bias, T* y, int threads) {
    float* wide = static_cast<float*>(hb_workspace_take((m * s.in + 16) * 4));
    if (!wide) return HB_NO_MEMORY;
    for_lanes(m * s.in, [&](int64_t i, auto lanes) { lanes.store(wide + i, lanes.load(x + i)); });
    with_type(s.dtype, [&](auto number) {
        const auto* w = static_cast<const decltype(number)*>(s.data);
        switch (m) {
            case 1: dot_rows<1>(w, s.out, s.in, wide, bias, y, threads); break;
            case 2: dot_rows<2>(w, s.out, s.in, wide, bias, y, threads); break;
            case 3: dot_rows<3>(w, s.out, s.in, wide, bias, y, threads); break;
            case 4: dot_rows<4>(w, s.out, s.in, wide, bias, y, threads); break;
            case 5: dot_rows<5>(w, s.out, s.in, wide, bias, y, threads); break;
            case 6: dot_rows<6>(w, s.out, s.in, wide, bias, y, threads); break;
            case 7: dot_rows<7>(w, s.out, s.in, wide, bias, y, threads); break;
            case 8: dot_rows<8>(w, s.out, s.in, wide, bias, y, threads); break;
            default: break;
        }
    });
    hb_workspace_give(wide);
    return HB_OK;
}

int linear_frozen(const void* w, int w_dtype, int64_t rows, int64_t cols, const void* x, int dtype, int64_t m,
                  const void* bias, void* y, int threads) {
    const Stored weight = {w, w_dtype, rows, cols};
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        const auto run = m <= max_frozen_dot_rows ? small_frozen<T> : product<false, Stored, T>;
        status = run(weight, static_cast<const T*>(x), m, static_cast<const T*>(bias), static_cast<T*>(y), threads);
    });
    return status;
}

int linear_frozen_dx(const void* w, int w_dtype, int64_t rows, int64_t cols, const void* g, int dtype, int64_t m,
                     void* dx, int threads) {
    const Stored weight = {w, w_dtype, rows, cols};
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        using T = decltype(number);
        status = product<true, Stored, T>(weight, static_cast<const T*>(g), m, nullptr, static_cast<T*>(dx), threads);
    });
    return status;
}

// Products with a frozen weight of any of the three dtypes, or int8 with scales: a source of tiles for the loop nest of
// linear.inl, and dot products at the speed of memory for a few rows of x (generation).

// Part of a row in int8.
struct Coded {
    const int8_t* codes;
    const float* scales;
};

// As with_type, of a weight.
template <class Body>
inline void with_stored_type(int dtype, Body body) {
    return dtype == HB_I8 ? body(int8_t()) : with_type(dtype, body);
}

// W as it is stored.
struct Stored {
    const void* data;
    const float* scales;  // of int8: one for each HB_INT8_BLOCK columns of each row
    int dtype;
    int64_t out, in;

    int64_t blocks() const { return divide_up(in, HB_INT8_BLOCK); }
    template <class T>
    Dense<T> dense(T) const {
        return {static_cast<const T*>(data), out, in, in, 1.0f};
    }
    Dense<int8_t, BlockScales> dense(int8_t) const {
        return {static_cast<const int8_t*>(data), out, in, in, {scales, blocks()}};
    }
    // Row `row` from column k on, for add_dots.
    template <class T>
    const T* part(T, int64_t row, int64_t k) const {
        return static_cast<const T*>(data) + row * in + k;
    }
    Coded part(int8_t, int64_t row, int64_t k) const {
        return {static_cast<const int8_t*>(data) + row * in + k, scales + row * blocks() + over(k, HB_INT8_BLOCK)};
    }
    Stored from(int64_t row, int64_t rows) const {
        const int64_t bytes = row * in * (dtype == HB_F32 ? 4 : dtype == HB_I8 ? 1 : 2);
        return {static_cast<const char*>(data) + bytes, dtype == HB_I8 ? scales + row * blocks() : nullptr, dtype, rows,
                in};
    }
    int64_t rows() const { return out; }
    int64_t cols() const { return in; }
    template <class N>
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        with_stored_type(dtype, [&](auto number) { dense(number).template forward<N>(row, rows, k0, depth, tile); });
    }
    template <class N>
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        with_stored_type(dtype,
                         [&](auto number) { dense(number).template backward<N>(r0, depth, column, columns, tile); });
    }
};

constexpr int64_t max_frozen_dot_rows = 8;  // from 9 on the tiles are as fast

// sums[M] += n weights times M rows of x, `stride` floats apart. The weights of the next row, `cols` on, are fetched
// meanwhile: a processor's own prefetching stops at the end of each part.
// The order of a sum depends on the number of chains: independent sums, which hide the latency of FMA.
template <int M,
          int chains = M == 1   ? 4
                       : M <= 4 ? 2
                                : 1,
          class T>
void add_dots(const T* w, int64_t n, int64_t cols, const float* x, int64_t stride, float* sums) {
    vec total[M][chains];
    for (int m = 0; m < M; ++m)
        for (int c = 0; c < chains; ++c) total[m][c] = vzero();
    int64_t k = 0;
    for (; k + chains * vec_width <= n; k += chains * vec_width) {
        __builtin_prefetch(w + cols + k);
#pragma GCC unroll 4
        for (int c = 0; c < chains; ++c) {
            const vec v = vload(w + k + c * vec_width);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) total[m][c] = vfma(v, vload(x + m * stride + k + c * vec_width), total[m][c]);
        }
    }
    for_lanes(n - k, [&](int64_t i, auto lanes) {
        const vec v = lanes.load(w + k + i);
        for (int m = 0; m < M; ++m) total[m][0] = vfma(v, lanes.load(x + m * stride + k + i), total[m][0]);
    });
    for (int m = 0; m < M; ++m) {
        for (int c = 1; c < chains; ++c) total[m][0] = vadd(total[m][0], total[m][c]);
        sums[m] += vsum(total[m][0]);
    }
}

// The same for int8: each block is summed by itself, in one chain, then times its scale. `n` ends where a block or the
// row does.
template <int M, int = 1>
void add_dots(const Coded& w, int64_t n, int64_t cols, const float* x, int64_t stride, float* sums) {
    vec total[M];
    for (int m = 0; m < M; ++m) total[m] = vzero();
    for (int64_t k = 0; k < n; k += HB_INT8_BLOCK) {
        __builtin_prefetch(w.codes + cols + k);
        vec part[M];
        for (int m = 0; m < M; ++m) part[m] = vzero();
        const auto add = [&](int64_t i, auto lanes) {
            const vec v = lanes.load(w.codes + k + i);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) part[m] = vfma(v, lanes.load(x + m * stride + k + i), part[m]);
        };
        if (k + HB_INT8_BLOCK <= n) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < HB_INT8_BLOCK; i += vec_width) add(i, Whole());
        } else {
            for_lanes(n - k, add);
        }
        const vec scale = vset(w.scales[over(k, HB_INT8_BLOCK)]);
        for (int m = 0; m < M; ++m) total[m] = vfma(scale, part[m], total[m]);
    }
    for (int m = 0; m < M; ++m) sums[m] += vsum(total[m]);
}

// sums[M] = one row of W times M rows of x, `cols` floats each.
template <int M, class W>
void dot_stored(const W& w, int64_t cols, const float* x, float* sums) {
    for (int m = 0; m < M; ++m) sums[m] = 0.0f;
    add_dots<M>(w, cols, cols, x, cols, sums);
}

constexpr int64_t dot_rows = 16;      // of W, whose results are stored together: rows of y may share a cache set
constexpr int64_t dot_floats = 6144;  // of x at a time: they stay in L1

template <int M, class Number, class T>
void dot_all(const Stored& w, Number number, const float* x, int64_t stride, const T* bias, T* y, int threads) {
    constexpr int64_t part = dot_floats / M / HB_INT8_BLOCK * HB_INT8_BLOCK;
    const int64_t rows = w.out, cols = w.in;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows* cols, threads))
    for (int64_t row = 0; row < rows; row += dot_rows) {
        const int64_t count = at_most(dot_rows, rows - row);
        float sums[dot_rows][M] = {};
        for (int64_t k = 0; k < cols; k += part)
            for (int64_t n = 0; n < count; ++n)
                add_dots<M>(w.part(number, row + n, k), at_most(part, cols - k), cols, x + k, stride, sums[n]);
        for (int m = 0; m < M; ++m)
            for (int64_t n = 0; n < count; ++n)
                narrow(bias ? sums[n][m] + widen(bias[row + n]) : sums[n][m], y + m * rows + row + n);
    }
}

template <class T>
int small_frozen(const Stored& s, const T* x, int64_t m, const T* bias, T* y, int threads) {
    const int64_t stride = divide_up(s.in, 16) * 16 + 16;  // not a power of two: rows would share a cache set
    float* wide = static_cast<float*>(hb_workspace_take(m * stride * 4));
    if (!wide) return HB_NO_MEMORY;
    for (int64_t i = 0; i < m; ++i)
        for_lanes(s.in,
                  [&](int64_t k, auto lanes) { lanes.store(wide + i * stride + k, lanes.load(x + i * s.in + k)); });
    with_stored_type(s.dtype, [&](auto number) {
        switch (m) {
            case 1: dot_all<1>(s, number, wide, stride, bias, y, threads); break;
            case 2: dot_all<2>(s, number, wide, stride, bias, y, threads); break;
            case 3: dot_all<3>(s, number, wide, stride, bias, y, threads); break;
            case 4: dot_all<4>(s, number, wide, stride, bias, y, threads); break;
            case 5: dot_all<5>(s, number, wide, stride, bias, y, threads); break;
            case 6: dot_all<6>(s, number, wide, stride, bias, y, threads); break;
            case 7: dot_all<7>(s, number, wide, stride, bias, y, threads); break;
            case 8: dot_all<8>(s, number, wide, stride, bias, y, threads); break;
            default: break;
        }
    });
    hb_workspace_give(wide);
    return HB_OK;
}

template <class N, class T>
int frozen_forward(const Stored& w, const T* x, int64_t m, const T* bias, T* y, int threads) {
    Group g = {};
    add_layer<N>(g, w, bias);
    return forward<N>(g, x, m, y, nullptr, threads);
}

constexpr int64_t slab_rows = 1024, slab_depth = 2048;  // dwords of g, packed at a time: 8 MB

// dx(m, in) = g(m, out) W. Where W is an output head, g is as wide as the vocabulary: it is packed slab by slab, so that
// W is read once for many rows and the packed copy stays in cache.
template <class N, class T>
int frozen_backward(const Stored& w, const T* g, int64_t m, T* dx, int threads) {
    constexpr bool wide = sizeof(T) == 4;  // dx itself takes the fp32 sums
    const int64_t part = at_most(m, slab_rows), slab = at_most(w.out, slab_depth * N::numbers);
    const int64_t packed_floats = (part + max_panel_rows) * dwords_of<N>(slab), sums_floats = wide ? 0 : part * w.in;
    Workspace space(threads * tile_floats + packed_floats + sums_floats, 3);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * tile_floats), *packed = space.take(packed_floats),
          *sums = space.take(sums_floats);
    for (int64_t row = 0; row < m; row += part) {
        const Panels panels = panels_of(at_most(part, m - row));
        float* y = wide ? reinterpret_cast<float*>(dx) + row * w.in : sums;
#pragma omp parallel num_threads(threads_for(panels.m* w.in* w.out / 16, threads))
        {
            for (int64_t k0 = 0; k0 < w.out; k0 += slab) {
                const Columns columns = {k0, at_most(slab, w.out - k0)};
                const Stored rows = w.from(k0, columns.count);
                Product p = empty_product(panels, w.in);
                Output& out = add_output(p, w.in, nullptr, y);
                out.add = k0 > 0;
                add_term(out, packed, dwords_of<N>(columns.count), 0, columns.count, &rows, fill_backward<N, Stored>);
                divide(p, threads);
                pack_rows<N>(g + row * w.out, panels, w.out, &columns, 1, packed);
                run<N, float>(p, tiles + thread_number() * tile_floats, nullptr);
            }
            if (!wide) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < panels.m; ++r)
                    narrow_rows(sums + r * w.in, 0, 1, w.in, dx + (row + r) * w.in, 0);
            }
        }
    }
    return HB_OK;
}

// call(N()): what x of T is multiplied in with a weight that is stored as `w_dtype`.
template <class T, class Call>
int with_number(int w_dtype, Call call) {
    if constexpr (sizeof(T) == 2)
        if (w_dtype == HB_BF16 || w_dtype == HB_I8) return call(typename NumberOf<T, bf16>::type());
    return call(Single());
}

int linear_frozen(const void* w, const float* scales, int w_dtype, int64_t rows, int64_t cols, const void* x, int dtype,
                  int64_t m, const void* bias, void* y, int threads) {
    const Stored weight = {w, scales, w_dtype, rows, cols};
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        typedef decltype(number) T;
        const T *from = static_cast<const T*>(x), *offset = static_cast<const T*>(bias);
        const int useful = int(at_least(threads, 1));
        if (m <= max_frozen_dot_rows)
            status = small_frozen(weight, from, m, offset, static_cast<T*>(y), useful);
        else
            status = with_number<T>(w_dtype, [&](auto n) {
                return frozen_forward<decltype(n)>(weight, from, m, offset, static_cast<T*>(y), useful);
            });
    });
    return status;
}

int linear_frozen_dx(const void* w, const float* scales, int w_dtype, int64_t rows, int64_t cols, const void* g,
                     int dtype, int64_t m, void* dx, int threads) {
    const Stored weight = {w, scales, w_dtype, rows, cols};
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        typedef decltype(number) T;
        status = with_number<T>(w_dtype, [&](auto n) {
            return frozen_backward<decltype(n)>(weight, static_cast<const T*>(g), m, static_cast<T*>(dx),
                                                int(at_least(threads, 1)));
        });
    });
    return status;
}

// The gradients of the adapters, dA = v^T x and dB = s g^T u, where v = s g B and u = x A^T are a few columns wide.
// A task owns some columns of x or of g and sums over all rows, in their order.

// Columns [0, rank) of left (m, stride) in panels of a few columns, [dwords of m][columns of a panel] each.
template <class N>
void pack_columns(const float* left, int64_t m, int64_t stride, int64_t rank, int64_t columns, float* out) {
    for (int64_t c = 0; c < rank; c += columns)
        for (int64_t t = 0; t < m; t += N::numbers)
            for_lanes(at_most(columns, rank - c), [&](int64_t i, auto lanes) {
                lanes.store(out,
                            join_rows<N>(t, m, [&](int64_t row) { return lanes.load(left + row * stride + c + i); }));
                out += lanes.count();
            });
}

template <class T>
struct Outer {                 // left^T right, (rank, width)
    const float* left;         // packed
    int64_t m, rank, columns;  // of left, and of one of its panels
    Dense<T> right;            // (m, width)
    float* out;                // (rank, width), or its transpose times a factor:
    bool turned;
    float factor;
};

template <class N, class T>
void outer_task(const Outer<T>& o, int64_t column, int64_t columns, float* tile, float* sums) {
    for (int64_t i = 0; i < o.rank * max_tile_columns; ++i) sums[i] = 0.0f;
    for (int64_t t0 = 0; t0 < o.m; t0 += max_depth * N::numbers) {
        const int64_t numbers = at_most(max_depth * N::numbers, o.m - t0), depth = dwords_of<N>(numbers);
        o.right.template backward<N>(t0, numbers, column, columns, tile);
        for (int64_t j = 0; j < columns; j += panel_width)
            for (int64_t r = 0; r < o.rank; r += o.columns) {
                const int64_t n = at_most(o.columns, o.rank - r);
                float* c = sums + r * max_tile_columns + j;
                micro_of<N>(int(n))(o.left + r * dwords_of<N>(o.m) + t0 / N::numbers * n,
                                    tile + j / panel_width * panel_stride(depth), depth, c, max_tile_columns, c,
                                    max_tile_columns);
            }
    }
    for (int64_t r = 0; r < o.rank; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            const float sum = sums[r * max_tile_columns + c];
            if (o.turned)
                o.out[(column + c) * o.rank + r] = sum * o.factor;
            else
                o.out[r * o.right.col_count + column + c] = sum;
        }
}

// Fills grad_A and grad_B of every adapter, from x (m, cols), grad (m, rows), u and v (m, rank).
template <class N, class T>
int adapter_gradients(const Group& g, const T* grad, const T* x, const float* u, const float* v, int64_t m,
                      int threads) {
    int64_t most = 0;
    for (int i = 0; i < g.count; ++i) most = at_least(most, g.layers[i].rank);
    const int64_t sums_floats = most * max_tile_columns, dwords = dwords_of<N>(m);
    Workspace space(threads * (tile_floats + sums_floats) + 2 * dwords * g.rank, 4);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * tile_floats), *sums = space.take(threads * sums_floats),
          *packed_v = space.take(dwords * g.rank), *packed_u = space.take(dwords * g.rank);
    Outer<T> outer[2 * max_members];
    int count = 0;
    int64_t column = 0, low = 0, width = 0;
    for (const Layer* layer = g.layers; layer < g.layers + g.count; column += layer->rows, ++layer) {
        if (!layer->rank) continue;
        const int64_t r = layer->rank, columns = divide_up(r, divide_up(r, max_panel_rows));
        float *left_v = packed_v + low * dwords, *left_u = packed_u + low * dwords;
        pack_columns<N>(v + low, m, g.rank, r, columns, left_v);
        pack_columns<N>(u + low, m, g.rank, r, columns, left_u);
        outer[count++] = {left_v, m, r, columns, {x, m, g.cols, g.cols, 1.0f}, layer->grad_A, false, 1.0f};
        outer[count++] = {
            left_u, m, r, columns, {grad + column, m, layer->rows, g.rows, 1.0f}, layer->grad_B, true, layer->scaling};
        low += r, width += g.cols + layer->rows;
    }
    const int64_t share = divide_up(divide_up(width, 4 * int64_t(threads)), panel_width) * panel_width;
    const int64_t columns = at_most(share, max_tile_columns);
    int64_t tasks = 0;
    for (int i = 0; i < count; ++i) tasks += divide_up(outer[i].right.col_count, columns);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_for(m * width * most / 16, threads))
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t part = task;
        const Outer<T>* o = outer;
        for (; part >= divide_up(o->right.col_count, columns); ++o) part -= divide_up(o->right.col_count, columns);
        outer_task<N>(*o, part * columns, at_most(columns, o->right.col_count - part * columns),
                      tiles + thread_number() * tile_floats, sums + thread_number() * sums_floats);
    }
    return HB_OK;
}

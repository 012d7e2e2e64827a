// Linear layers for a few rows of x (generation, short sequences): every row of W is decoded in registers and never
// stored.

// Of a row, where they have offsets; else 0. Weights of a group are in one format.
inline int64_t blocks_with_offsets(const FourBit* weights) {
    return weights->w->constants == 2 ? weights->w->cols / weights->w->blocksize : 0;
}

template <int M, class T>
int small_forward(const Group& g, const FourBit* weights, const T* x, const float* u, T* y, int threads) {
    const int64_t stride = ordered_length(g.cols), blocks = blocks_with_offsets(weights);
    Workspace space(M * (stride + blocks), 2);
    if (!space.base) return HB_NO_MEMORY;
    float *ordered = space.take(M * stride), *of_blocks = space.take(M * blocks);
    for (int m = 0; m < M; ++m) {
        order_row(x + m * g.cols, g.cols, ordered + m * stride);
        if (blocks) block_sums(x + m * g.cols, g.cols, weights->w->blocksize, of_blocks + m * blocks);
    }
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads_for(g.rows* g.cols, threads))
    for (int64_t n = 0; n < g.rows; ++n) {
        int64_t row = n, low = 0;  // of the layer, of its part of u
        int i = 0;
        for (; row >= g.layers[i].rows; ++i) row -= g.layers[i].rows, low += g.layers[i].rank;
        const Layer& layer = g.layers[i];
        float sums[M];
        dot_row<M>(*weights[i].w, weights[i].decoder, row, ordered, stride, sums);
        if (blocks) add_offsets<M>(*weights[i].w, row, of_blocks, blocks, sums, 1);
        for (int m = 0; m < M; ++m) {
            float sum = layer.bias ? sums[m] + widen(static_cast<const T*>(layer.bias)[row]) : sums[m];
            if (layer.rank) {
                const float *b = layer.up.data + row * layer.rank, *a = u + m * g.rank + low;
                float delta = 0.0f;
                for (int64_t r = 0; r < layer.rank; ++r) delta += a[r] * b[r];
                sum += layer.scaling * delta;
            }
            narrow(sum, y + m * g.rows + n);
        }
    }
    return HB_OK;
}

// sums(M, stride), in the order of order_row, += rows [row, row + rows) of a weight times g(M, g_stride); columns
// [column, column + columns) of them.
template <int M>
void add_rows_of(const FourBit& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* g,
                 int64_t g_stride, float* sums, int64_t stride) {
    int64_t r = 0;
    for (; r + rows_at_once <= rows; r += rows_at_once)
        add_rows<M, rows_at_once>(*weight.w, weight.decoder, row + r, column, columns, g + r, g_stride, sums, stride);
    for (; r < rows; ++r)
        add_rows<M, 1>(*weight.w, weight.decoder, row + r, column, columns, g + r, g_stride, sums, stride);
}

constexpr int64_t sum_blocks = 32;      // into which the rows of all weights are cut, each with sums of its own
constexpr int64_t sums_at_once = 4096;  // floats: half of the smallest L1

struct SmallSums {
    int64_t block_rows, blocks, stride, columns, column_blocks;  // columns of a task
    int64_t offsets;                                             // of a row
};

inline SmallSums small_sums_of(const Group& g, const FourBit* weights, int64_t m) {
    SmallSums s;
    s.block_rows = divide_up(at_least(divide_up(g.rows, sum_blocks), 32), 8) * 8;
    s.blocks = 0;
    for (int i = 0; i < g.count; ++i) s.blocks += divide_up(g.layers[i].rows, s.block_rows);
    s.stride = ordered_length(g.cols);
    s.columns = at_least(sums_at_once / m / 128, 1) * 128;
    s.column_blocks = divide_up(g.cols, s.columns);
    s.offsets = blocks_with_offsets(weights);
    return s;
}

template <int M>
void small_sums(const Group& g, const FourBit* weights, const SmallSums& s, const float* grad, float* sums,
                float* offset_sums) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.blocks * s.column_blocks; ++task) {
        const int64_t block = task / s.column_blocks, column = task % s.column_blocks * s.columns;
        int64_t part = block, first = 0;
        int i = 0;
        for (; part >= divide_up(g.layers[i].rows, s.block_rows); ++i)
            part -= divide_up(g.layers[i].rows, s.block_rows), first += g.layers[i].rows;
        const int64_t row = part * s.block_rows, rows = at_most(s.block_rows, g.layers[i].rows - row);
        if (s.offsets && !column)
            sum_offsets<M>(*weights[i].w, row, rows, grad + first + row, g.rows, offset_sums + block * M * s.offsets);
        float* to = sums + block * M * s.stride;
        for (int m = 0; m < M; ++m)
            for (int64_t c = column; c < at_most(column + s.columns, s.stride); ++c) to[m * s.stride + c] = 0.0f;
        add_rows_of<M>(weights[i], row, rows, column, at_most(s.columns, g.cols - column), grad + first + row, g.rows,
                       to, s.stride);
    }
}

// Output [column, column + 128) of dx (m, cols): the blocks' sums in their order, their offsets' sums, then the adapters'
// slabs.
template <class T>
void small_finish(const Group& g, const SmallSums& s, int64_t m, int64_t column, const float* v, const float* sums,
                  const float* offset_sums, T* dx) {
    const int64_t n = at_most(128, g.cols - column), ordered = at_most(128, s.stride - column);
    float total[128], natural[128];
    for (int64_t row = 0; row < m; ++row) {
        for (int64_t c = 0; c < 128; ++c) total[c] = 0.0f;
        for (int64_t block = 0; block < s.blocks; ++block) {
            const float* from = sums + (block * m + row) * s.stride + column;
            for (int64_t c = 0; c < ordered; ++c) total[c] += from[c];
        }
        restore_order(total, n, natural);
        const int64_t size = s.offsets ? g.cols / s.offsets : 0;  // of a block of the weights
        for (int64_t c = 0; s.offsets && c < n; c += at_most(size, n)) {
            float offset = 0.0f;
            for (int64_t block = 0; block < s.blocks; ++block)
                offset += offset_sums[(block * m + row) * s.offsets + (column + c) / size];
            for (int64_t i = c; i < at_most(c + size, n); ++i) natural[i] += offset;
        }
        const float* scales = v + row * g.rank;
        for (const Layer* layer = g.layers; layer < g.layers + g.count; ++layer)
            for (int64_t r = 0; r < layer->rank; ++r) {
                const float *a = layer->down.data + r * g.cols + column, scale = *scales++;
                for (int64_t c = 0; c < n; ++c) natural[c] += scale * a[c];
            }
        for (int64_t c = 0; c < n; ++c) narrow(natural[c], dx + row * g.cols + column + c);
    }
}

template <int M, class T>
int small_backward(const Group& g, const FourBit* weights, const T* grad, const float* v, T* dx, int threads) {
    const SmallSums s = small_sums_of(g, weights, M);
    const int64_t sums_floats = s.blocks * M * s.stride, offset_floats = s.blocks * M * s.offsets;
    Workspace space(sums_floats + M * g.rows + offset_floats, 3);
    if (!space.base) return HB_NO_MEMORY;
    float *sums = space.take(sums_floats), *wide = space.take(M * g.rows), *offset_sums = space.take(offset_floats);
    for (int64_t i = 0; i < M * g.rows; ++i) wide[i] = widen(grad[i]);
#pragma omp parallel num_threads(threads_for(g.rows* g.cols, threads))
    {
        small_sums<M>(g, weights, s, wide, sums, offset_sums);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < g.cols; column += 128)
            small_finish(g, s, M, column, v, sums, offset_sums, dx);
    }
    return HB_OK;
}

// Linear layers that read the same input, each with a frozen weight and perhaps an adapter:
// y_i = x W_i^T + bias_i + s_i (x A_i^T) B_i^T, and the gradients. x is packed once for all of them.

constexpr int64_t packed_bytes = 2 << 20;  // rows are packed in parts of about this size, which stay in cache
constexpr int64_t min_packed_rows = 96;    // and never fewer: each part decodes the weights anew
constexpr int64_t max_packed_rows = 1024;  // nor more: decoding is a hundredth of the work by then

// A weight in 4 bits.
struct FourBit {
    const hb_weight* w;
    Decoder decoder;

    FourBit() = default;
    explicit FourBit(const hb_weight& weight) : w(&weight), decoder(weight.codebook) {}
    int64_t rows() const { return w->rows; }
    int64_t cols() const { return w->cols; }
    template <class N>
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        decode_forward<N>(*w, decoder, row, rows, k0, depth, tile);
    }
    template <class N>
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        decode_backward<N>(*w, decoder, r0, depth, column, columns, tile);
    }
};

struct Layer {
    const void* source;  // of its weight's tiles
    fill_fn forward, backward;
    int64_t rows;  // out_features
    const void* bias;
    int64_t rank;           // of its adapter; 0: none
    Dense<float> down, up;  // A (rank, cols), and B (rows, rank) times the scaling
    float scaling;
    float *grad_A, *grad_B;
};

struct Group {
    Layer layers[max_members];
    int count;
    int64_t cols, rows, rank;  // in_features; sums over the layers
};

template <class N, class W>
void add_layer(Group& g, const W& w, const void* bias) {
    Layer& layer = g.layers[g.count++];
    layer = {};
    layer.source = &w, layer.forward = fill_forward<N, W>, layer.backward = fill_backward<N, W>;
    layer.rows = w.rows(), layer.bias = bias;
    g.cols = w.cols(), g.rows += w.rows();
}

inline void add_adapter(Group& g, const hb_member& member) {
    Layer& layer = g.layers[g.count - 1];
    layer.rank = member.rank, layer.scaling = member.scaling;
    layer.down = {member.lora_A, member.rank, g.cols, g.cols, 1.0f};
    layer.up = {member.lora_B, layer.rows, member.rank, member.rank, member.scaling};
    layer.grad_A = member.grad_A, layer.grad_B = member.grad_B;
    g.rank += member.rank;
}

// Rows that are packed at a time, of m: equal parts.
template <class N>
int64_t rows_of_part(int64_t m, int64_t depth) {
    const int64_t fitting = packed_bytes / 4 / at_least(dwords_of<N>(depth), 1);
    const int64_t rows = at_most(at_least(fitting, min_packed_rows), max_packed_rows);
    return at_most(divide_up(divide_up(m, divide_up(m, rows)), max_panel_rows) * max_panel_rows, m);
}

inline Product empty_product(const Panels& panels, int64_t stride) {
    Product p;
    p.panels = panels, p.stride = stride, p.count = 0;
    return p;
}

// What a task that writes T sums into.
template <class T>
constexpr int64_t scratch_floats(int64_t rows) {
    return sizeof(T) == 4 ? 0 : (rows + max_panel_rows) * max_tile_columns;
}

struct LayerColumns {  // of a group's outputs and of its adapters' ranks, packed layer by layer
    Columns outputs[max_members], ranks[max_members];

    explicit LayerColumns(const Group& g) {
        int64_t column = 0, low = 0;
        for (int i = 0; i < g.count; ++i) {
            outputs[i] = {column, g.layers[i].rows}, ranks[i] = {low, g.layers[i].rank};
            column += g.layers[i].rows, low += g.layers[i].rank;
        }
    }
};

// u = x A^T of all adapters (m, rank) and y (m, rows), or u alone when y is NULL.
template <class N, class T>
int forward(const Group& g, const T* x, int64_t m, T* y, float* u, int threads) {
    const LayerColumns columns(g);
    const Columns all = {0, g.cols};
    const int64_t depth = dwords_of<N>(g.cols), low_depth = packed_depth<N>(columns.ranks, g.count);
    const int64_t part = rows_of_part<N>(m, g.cols), padded = part + max_panel_rows;
    const int64_t thread_floats = tile_floats + scratch_floats<T>(part), bias_floats = g.rows + g.count * panel_width;
    Workspace space(threads * thread_floats + padded * (depth + low_depth) + bias_floats, 4);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * thread_floats), *packed_x = space.take(padded * depth),
          *packed_u = space.take(padded * low_depth), *bias = space.take(bias_floats);
    int64_t at = 0;
    for (const Layer* layer = g.layers; layer < g.layers + g.count; ++layer) {
        const T* from = static_cast<const T*>(layer->bias);
        const int64_t end = at + divide_up(layer->rows, panel_width) * panel_width;
        for (int64_t i = 0; at < end; ++i, ++at) bias[at] = from && i < layer->rows ? widen(from[i]) : 0.0f;
    }
    for (int64_t row = 0; row < m; row += part) {
        const Panels panels = panels_of(at_most(part, m - row));
        Product down = empty_product(panels, g.rank), up = empty_product(panels, g.rows);
        int64_t low = 0;
        at = 0;
        for (int i = 0; i < g.count; ++i) {
            const Layer& layer = g.layers[i];
            Output& output = add_output(up, layer.rows, bias + at, y + row * g.rows + columns.outputs[i].first);
            add_term(output, packed_x, depth, 0, g.cols, layer.source, layer.forward);
            at += divide_up(layer.rows, panel_width) * panel_width;
            if (!layer.rank) continue;
            add_term(output, packed_u, low_depth, low, layer.rank, &layer.up, fill_forward<N, Dense<float>>);
            Output& low_output = add_output(down, layer.rank, nullptr, u + row * g.rank + columns.ranks[i].first);
            add_term(low_output, packed_x, depth, 0, g.cols, &layer.down, fill_forward<N, Dense<float>>);
            low += dwords_of<N>(layer.rank);
        }
        if (g.rank) divide(down, threads);
        if (y) divide(up, threads);
        const int useful = threads_for(panels.m * g.cols * (y ? g.rows + g.rank : g.rank) / 16, threads);
#pragma omp parallel num_threads(useful)
        {
            float *tile = tiles + thread_number() * thread_floats, *scratch = tile + tile_floats;
            pack_rows<N>(x + row * g.cols, panels, g.cols, &all, 1, packed_x);
            if (g.rank) run<N, float>(down, tile, scratch);
            if (y) {
                if (g.rank) pack_rows<N>(u + row * g.rank, panels, g.rank, columns.ranks, g.count, packed_u);
                run<N, T>(up, tile, scratch);
            }
        }
    }
    return HB_OK;
}

// v_i = s_i g_i B_i of all adapters (m, rank) and dx = sum of g_i W_i + v_i A_i (m, cols), or v alone when dx is NULL.
template <class N, class T>
int backward(const Group& g, const T* grad, int64_t m, float* v, T* dx, int threads) {
    const LayerColumns columns(g);
    const int64_t depth = packed_depth<N>(columns.outputs, g.count),
                  low_depth = packed_depth<N>(columns.ranks, g.count);
    const int64_t part = rows_of_part<N>(m, g.rows), padded = part + max_panel_rows;
    const int64_t thread_floats = tile_floats + scratch_floats<T>(part);
    Workspace space(threads * thread_floats + padded * (depth + low_depth), 3);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * thread_floats), *packed_g = space.take(padded * depth),
          *packed_v = space.take(padded * low_depth);
    for (int64_t row = 0; row < m; row += part) {
        const Panels panels = panels_of(at_most(part, m - row));
        Product up = empty_product(panels, g.rank), down = empty_product(panels, g.cols);
        Output& output = add_output(down, g.cols, nullptr, dx + row * g.cols);
        int64_t high = 0, low = 0;
        for (int i = 0; i < g.count; ++i) {
            const Layer& layer = g.layers[i];
            add_term(output, packed_g, depth, high, layer.rows, layer.source, layer.backward);
            if (layer.rank) {
                add_term(output, packed_v, low_depth, low, layer.rank, &layer.down, fill_backward<N, Dense<float>>);
                Output& low_output = add_output(up, layer.rank, nullptr, v + row * g.rank + columns.ranks[i].first);
                add_term(low_output, packed_g, depth, high, layer.rows, &layer.up, fill_backward<N, Dense<float>>);
            }
            high += dwords_of<N>(layer.rows), low += dwords_of<N>(layer.rank);
        }
        if (g.rank) divide(up, threads);
        if (dx) divide(down, threads);
        const int useful = threads_for(panels.m * g.rows * (dx ? g.cols + g.rank : g.rank) / 16, threads);
#pragma omp parallel num_threads(useful)
        {
            float *tile = tiles + thread_number() * thread_floats, *scratch = tile + tile_floats;
            pack_rows<N>(grad + row * g.rows, panels, g.rows, columns.outputs, g.count, packed_g);
            if (g.rank) run<N, float>(up, tile, scratch);
            if (dx) {
                if (g.rank) pack_rows<N>(v + row * g.rank, panels, g.rank, columns.ranks, g.count, packed_v);
                run<N, T>(down, tile, scratch);
            }
        }
    }
    return HB_OK;
}

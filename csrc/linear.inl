// Linear layers that read the same input, each with a frozen weight and perhaps an adapter:
// y_i = x W_i^T + bias_i + s_i (x A_i^T) B_i^T, and the gradients. x is packed once for all of them.

constexpr int64_t packed_bytes = 16 << 20;  // rows are packed in parts of about this size
constexpr int64_t min_packed_rows = 192;    // and never fewer: each part decodes the weights anew

// A weight in 4 bits.
struct FourBit {
    const hb_weight* w;
    Decoder decoder;

    FourBit() = default;
    explicit FourBit(const hb_weight& weight) : w(&weight), decoder(weight.codebook) {}
    int64_t rows() const { return w->rows; }
    int64_t cols() const { return w->cols; }
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        decode_forward(*w, decoder, row, rows, k0, depth, tile);
    }
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        decode_backward(*w, decoder, r0, depth, column, columns, tile);
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

template <class W>
void add_layer(Group& g, const W& w, const void* bias) {
    Layer& layer = g.layers[g.count++];
    layer = {};
    layer.source = &w, layer.forward = fill_forward<W>, layer.backward = fill_backward<W>;
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

inline int64_t rows_of_part(int64_t m, int64_t depth) {
    const int64_t rows = at_least(packed_bytes / 4 / at_least(depth, 1), min_packed_rows);
    return at_most(rows / max_panel_rows * max_panel_rows, m);
}

template <class T>
void narrow_rows(const float* sums, int64_t m, int64_t width, T* y) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; ++r)
        for_lanes(width, [=](int64_t i, auto lanes) {
            const int64_t at = r * width + i;
            lanes.store(y + at, lanes.load(sums + at));
        });
}

inline Product empty_product(const Panels& panels, int64_t stride) {
    Product p;
    p.panels = panels, p.stride = stride, p.count = 0;
    return p;
}

// u = x A^T of all adapters (m, rank) and y (m, rows), or u alone when y is NULL.
template <class T>
int forward(const Group& g, const T* x, int64_t m, T* y, float* u, int threads) {
    constexpr bool wide = sizeof(T) == 4;  // y itself takes the fp32 sums
    const int64_t part = rows_of_part(m, wide ? g.cols : at_least(g.cols, g.rows)), padded = part + max_panel_rows;
    const int64_t sums_floats = wide || !y ? 0 : part * g.rows, bias_floats = g.rows + g.count * panel_width;
    Workspace space(threads * tile_floats + padded * (g.cols + g.rank) + bias_floats + sums_floats, 5);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * tile_floats), *packed_x = space.take(padded * g.cols),
          *packed_u = space.take(padded * g.rank), *sums = space.take(sums_floats), *bias = space.take(bias_floats);
    int64_t at = 0;
    for (const Layer* layer = g.layers; layer < g.layers + g.count; ++layer) {
        const T* from = static_cast<const T*>(layer->bias);
        const int64_t end = at + divide_up(layer->rows, panel_width) * panel_width;
        for (int64_t i = 0; at < end; ++i, ++at) bias[at] = from && i < layer->rows ? widen(from[i]) : 0.0f;
    }
    for (int64_t row = 0; row < m; row += part) {
        const Panels panels = panels_of(at_most(part, m - row));
        float* out = wide ? reinterpret_cast<float*>(y) + row * g.rows : sums;
        Product down = empty_product(panels, g.rank), up = empty_product(panels, g.rows);
        int64_t column = 0, low = 0;
        at = 0;
        for (const Layer* layer = g.layers; layer < g.layers + g.count; ++layer) {
            Output& output = add_output(up, layer->rows, bias + at, out + column);
            add_term(output, packed_x, g.cols, 0, g.cols, layer->source, layer->forward);
            at += divide_up(layer->rows, panel_width) * panel_width, column += layer->rows;
            if (!layer->rank) continue;
            add_term(output, packed_u, g.rank, low, layer->rank, &layer->up, fill_forward<Dense<float>>);
            Output& low_output = add_output(down, layer->rank, nullptr, u + row * g.rank + low);
            add_term(low_output, packed_x, g.cols, 0, g.cols, &layer->down, fill_forward<Dense<float>>);
            low += layer->rank;
        }
        if (g.rank) divide(down, threads);
        if (y) divide(up, threads);
        const int useful = threads_for(panels.m * g.cols * (y ? g.rows + g.rank : g.rank) / 16, threads);
#pragma omp parallel num_threads(useful)
        {
            float* tile = tiles + thread_number() * tile_floats;
            pack_rows(x + row * g.cols, panels, g.cols, g.cols, packed_x);
            if (g.rank) run(down, tile);
            if (y) {
                if (g.rank) pack_rows(u + row * g.rank, panels, g.rank, g.rank, packed_u);
                run(up, tile);
                if (!wide) narrow_rows(sums, panels.m, g.rows, y + row * g.rows);
            }
        }
    }
    return HB_OK;
}

// v_i = s_i g_i B_i of all adapters (m, rank) and dx = sum of g_i W_i + v_i A_i (m, cols), or v alone when dx is NULL.
template <class T>
int backward(const Group& g, const T* grad, int64_t m, float* v, T* dx, int threads) {
    constexpr bool wide = sizeof(T) == 4;
    const int64_t part = rows_of_part(m, wide ? g.rows : at_least(g.cols, g.rows)), padded = part + max_panel_rows;
    const int64_t sums_floats = wide || !dx ? 0 : part * g.cols;
    Workspace space(threads * tile_floats + padded * (g.rows + g.rank) + sums_floats, 4);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * tile_floats), *packed_g = space.take(padded * g.rows),
          *packed_v = space.take(padded * g.rank), *sums = space.take(sums_floats);
    for (int64_t row = 0; row < m; row += part) {
        const Panels panels = panels_of(at_most(part, m - row));
        Product up = empty_product(panels, g.rank), down = empty_product(panels, g.cols);
        Output& output = add_output(down, g.cols, nullptr, wide ? reinterpret_cast<float*>(dx) + row * g.cols : sums);
        int64_t column = 0, low = 0;
        for (const Layer* layer = g.layers; layer < g.layers + g.count; column += layer->rows, ++layer) {
            add_term(output, packed_g, g.rows, column, layer->rows, layer->source, layer->backward);
            if (!layer->rank) continue;
            add_term(output, packed_v, g.rank, low, layer->rank, &layer->down, fill_backward<Dense<float>>);
            Output& low_output = add_output(up, layer->rank, nullptr, v + row * g.rank + low);
            add_term(low_output, packed_g, g.rows, column, layer->rows, &layer->up, fill_backward<Dense<float>>);
            low += layer->rank;
        }
        if (g.rank) divide(up, threads);
        if (dx) divide(down, threads);
        const int useful = threads_for(panels.m * g.rows * (dx ? g.cols + g.rank : g.rank) / 16, threads);
#pragma omp parallel num_threads(useful)
        {
            float* tile = tiles + thread_number() * tile_floats;
            pack_rows(grad + row * g.rows, panels, g.rows, g.rows, packed_g);
            if (g.rank) run(up, tile);
            if (dx) {
                if (g.rank) pack_rows(v + row * g.rank, panels, g.rank, g.rank, packed_v);
                run(down, tile);
                if (!wide) narrow_rows(sums, panels.m, g.cols, dx + row * g.cols);
            }
        }
    }
    return HB_OK;
}

// Both matrix products of a frozen linear layer, forward y = x W^T + b and backward dx = g W, as one loop nest.
//
// W is a source of tiles: rows(), cols(), forward() and backward(), which fill a tile with its values in fp32.
// X (x or g) is packed once into panels of a few rows. A task owns a range of output columns; it decodes the part of W
// it needs, 512 deep, into a scratch tile that stays in L2, in the order the inner kernel reads, and multiplies it with
// every panel of X. So W is decoded once, is never transposed, and its decoded values never reach memory.
// Each output is summed in an order that depends on neither the number of threads nor the other rows.

constexpr int64_t max_depth = 512;          // of a tile: shorter pays for loading C more often
constexpr int64_t max_tile_columns = 128;   // 512 x 128 fp32 is 256 KB: half of Zen 3's L2
constexpr int64_t block_rows = 48;          // rows of X multiplied with one panel of the tile before the next panel
constexpr int64_t packed_bytes = 16 << 20;  // X is packed in parts of about this size
constexpr int64_t min_packed_rows = 192;    // and never fewer rows: each part decodes W anew

// W in 4 bits.
struct FourBit {
    const hb_weight& w;
    const Decoder decoder;

    explicit FourBit(const hb_weight& weight) : w(weight), decoder(weight.codebook) {}
    int64_t rows() const { return w.rows; }
    int64_t cols() const { return w.cols; }
    void forward(int64_t row, int64_t rows, int64_t k0, int64_t depth, float* tile) const {
        decode_forward(w, decoder, row, rows, k0, depth, tile);
    }
    void backward(int64_t r0, int64_t depth, int64_t column, int64_t columns, float* tile) const {
        decode_backward(w, decoder, r0, depth, column, columns, tile);
    }
};

struct Plan {
    int64_t m, depth, width;  // of this part: y(m, width) = x(m, depth) times W in the direction asked for
    int64_t panel_rows, panels;
    int64_t columns, column_tasks;   // columns of a task
    int64_t task_panels, row_tasks;  // row panels of a task: all, unless there are too few columns
    const float* packed;
    const float* bias;  // width, padded to whole panels
    float* y;
};

inline Plan plan_of(int64_t m, int64_t depth, int64_t width, int threads) {
    Plan p = {};
    p.m = m, p.depth = depth, p.width = width;
    p.panels = divide_up(m, max_panel_rows);
    p.panel_rows = divide_up(m, p.panels);  // 16 rows are two panels of 8, not 14 and 2
    p.panels = divide_up(m, p.panel_rows);
    const int64_t share = divide_up(divide_up(width, 4 * int64_t(threads)), 32) * 32;  // decoding goes by 32
    p.columns = at_most(share, max_tile_columns);
    p.column_tasks = divide_up(width, p.columns);
    const int64_t splits = p.column_tasks < threads ? divide_up(threads, p.column_tasks) : 1;
    p.task_panels = divide_up(p.panels, at_most(splits, p.panels));
    p.row_tasks = divide_up(p.panels, p.task_panels);
    return p;
}

inline void multiply_block(const Plan& p, const float* tile, int64_t column, int64_t columns, int64_t k0, int64_t depth,
                           int64_t first_panel, int64_t last_panel) {
    const micro_fn kernel = micro_of(int(p.panel_rows));
    alignas(64) float edge[max_panel_rows * panel_width];
    for (int64_t j = 0; j < columns; j += panel_width) {
        const float* b = tile + j / panel_width * panel_stride(depth);
        const int64_t n = at_most(panel_width, columns - j);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const float* a = p.packed + (panel * p.depth + k0) * p.panel_rows;
            const int64_t row = panel * p.panel_rows, rows = at_most(p.panel_rows, p.m - row);
            float* c = p.y + row * p.width + column + j;
            if (rows == p.panel_rows && n == panel_width) {
                if (k0 == 0)
                    kernel(a, b, depth, p.bias + column + j, 0, c, p.width);
                else
                    kernel(a, b, depth, c, p.width, c, p.width);
                continue;
            }
            for (int64_t r = 0; r < p.panel_rows; ++r)
                for (int64_t i = 0; i < panel_width; ++i)
                    edge[r * panel_width + i] = k0 == 0             ? p.bias[column + j + i]
                                                : r < rows && i < n ? c[r * p.width + i]
                                                                    : 0.0f;
            kernel(a, b, depth, edge, panel_width, edge, panel_width);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < n; ++i) c[r * p.width + i] = edge[r * panel_width + i];
        }
    }
}

template <bool BACKWARD, class W>
void run_task(const W& w, const Plan& p, int64_t task, float* tile) {
    const int64_t column = task / p.row_tasks * p.columns, columns = at_most(p.columns, p.width - column);
    const int64_t first = task % p.row_tasks * p.task_panels, last = at_most(first + p.task_panels, p.panels);
    const int64_t step = at_least(block_rows / p.panel_rows, 1);
    for (int64_t k0 = 0; k0 < p.depth; k0 += max_depth) {
        const int64_t depth = at_most(max_depth, p.depth - k0);
        if (BACKWARD)
            w.backward(k0, depth, column, columns, tile);
        else
            w.forward(column, columns, k0, depth, tile);
        for (int64_t panel = first; panel < last; panel += step)
            multiply_block(p, tile, column, columns, k0, depth, panel, at_most(panel + step, last));
    }
}

template <bool BACKWARD, class W, class T>
int product(const W& w, const T* x, int64_t m, const T* bias, T* y, int threads) {
    constexpr bool wide = sizeof(T) == 4;  // y itself takes the fp32 sums
    const int64_t depth = BACKWARD ? w.rows() : w.cols(), width = BACKWARD ? w.cols() : w.rows();
    if (threads < 1) threads = 1;
    const int64_t longest = at_least(wide ? depth : at_least(depth, width), 1);
    int64_t part = at_least(packed_bytes / 4 / longest, min_packed_rows) / max_panel_rows * max_panel_rows;
    part = at_most(part, m);
    const int64_t padded_width = divide_up(width, panel_width) * panel_width;
    const int64_t packed_floats = (part + max_panel_rows) * depth,
                  tile_floats = panel_stride(max_depth) * (max_tile_columns / panel_width);
    const int64_t sums = wide ? 0 : part * width;
    const int64_t floats = tile_floats * threads + packed_floats + padded_width + sums + 64;
    float* workspace = static_cast<float*>(hb_workspace_take(floats * 4));
    if (!workspace) return HB_NO_MEMORY;
    float* packed = workspace + tile_floats * threads;
    float* bias32 = packed + divide_up(packed_floats, 16) * 16;
    float* sums32 = bias32 + padded_width;
    for (int64_t i = 0; i < padded_width; ++i) bias32[i] = bias && i < width ? widen(bias[i]) : 0.0f;

    for (int64_t row = 0; row < m; row += part) {
        Plan p = plan_of(at_most(part, m - row), depth, width, threads);
        p.packed = packed;
        p.bias = bias32;
        p.y = wide ? reinterpret_cast<float*>(y) + row * width : sums32;
        const int64_t tasks = p.column_tasks * p.row_tasks;
        const int useful = threads_for(p.m * width * depth / 16, threads);
#pragma omp parallel num_threads(useful)
        {
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < p.panels; ++panel)
                pack_panel(x + row * depth, p.m, depth, panel * p.panel_rows, p.panel_rows,
                           packed + panel * p.panel_rows * depth);
            float* tile = workspace + thread_number() * tile_floats;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t task = 0; task < tasks; ++task) run_task<BACKWARD>(w, p, task, tile);
            if (!wide) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < p.m; ++r) narrow_row(sums32 + r * width, width, y + (row + r) * width);
            }
        }
    }
    hb_workspace_give(workspace);
    return HB_OK;
}

template <class T>
int linear_of(const hb_weight& w, const T* x, int64_t m, const T* bias, T* y, int threads) {
    if (m <= max_dot_rows) return small_linear(w, x, m, bias, y, threads);
    return product<false>(FourBit(w), x, m, bias, y, threads);
}

int linear(const hb_weight* w, const void* x, int dtype, int64_t m, const void* bias, void* y, int threads) {
    switch (dtype) {
        case HB_BF16:
            return linear_of(*w, static_cast<const bf16*>(x), m, static_cast<const bf16*>(bias), static_cast<bf16*>(y),
                             threads);
        case HB_F16:
            return linear_of(*w, static_cast<const fp16*>(x), m, static_cast<const fp16*>(bias), static_cast<fp16*>(y),
                             threads);
        default:
            return linear_of(*w, static_cast<const float*>(x), m, static_cast<const float*>(bias),
                             static_cast<float*>(y), threads);
    }
}

int linear_dx(const hb_weight* w, const void* g, int dtype, int64_t m, void* dx, int threads) {
    switch (dtype) {
        case HB_BF16:
            return product<true>(FourBit(*w), static_cast<const bf16*>(g), m, static_cast<const bf16*>(nullptr),
                                 static_cast<bf16*>(dx), threads);
        case HB_F16:
            return product<true>(FourBit(*w), static_cast<const fp16*>(g), m, static_cast<const fp16*>(nullptr),
                                 static_cast<fp16*>(dx), threads);
        default:
            return product<true>(FourBit(*w), static_cast<const float*>(g), m, static_cast<const float*>(nullptr),
                                 static_cast<float*>(dx), threads);
    }
}

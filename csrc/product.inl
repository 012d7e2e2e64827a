// Sums of matrix products, y = bias + left_1 right_1 + left_2 right_2 + ..., as one loop nest: every product of a linear
// layer, forward and backward, runs here.
//
// The left matrices (activations, gradients) are packed once into panels of a few rows. A task owns a range of output
// columns; it fills a scratch tile that stays in L2 with the part of a right matrix it needs, in the order the inner
// kernel reads, and multiplies it with every panel. So a 4-bit weight is decoded once, is never transposed, and its
// decoded values never reach memory; an adapter is one more right matrix, few rows deep.
// Each output is summed in an order that depends on neither the number of threads nor the other rows.

constexpr int64_t max_depth = 512;         // dwords of a slice of a right matrix: shorter loads y more often
constexpr int64_t tile_depth = 640;        // of the slices that share a pass over y: an adapter rides with the last one
constexpr int64_t max_tile_columns = 128;  // 512 x 128 dwords are 256 KB: half of Zen 3's L2; fewer for few rows
constexpr int64_t block_rows = 48;         // rows multiplied with one panel of the tile before the next panel
constexpr int64_t least_split_rows = 96;   // rows of a task, where few columns force to split by rows
constexpr int max_pieces = 4;
constexpr int max_members = HB_MAX_MEMBERS;
constexpr int64_t tile_floats =
    (panel_stride(tile_depth) + max_pieces * panel_stride(0)) * (max_tile_columns / panel_width);

// Fills a tile with rows [k0, k0 + depth) and columns [column, column + columns) of a right matrix.
typedef void (*fill_fn)(const void* source, int64_t k0, int64_t depth, int64_t column, int64_t columns, float* tile);

// A source of tiles has rows(), cols(), forward() (its transpose is the right matrix) and backward() (it is itself).
template <class N, class W>
void fill_forward(const void* w, int64_t k0, int64_t depth, int64_t column, int64_t columns, float* tile) {
    static_cast<const W*>(w)->template forward<N>(column, columns, k0, depth, tile);
}
template <class N, class W>
void fill_backward(const void* w, int64_t k0, int64_t depth, int64_t column, int64_t columns, float* tile) {
    static_cast<const W*>(w)->template backward<N>(k0, depth, column, columns, tile);
}

struct Term {
    const float* left;   // packed panels
    int64_t left_depth;  // dwords of a row of all that is packed there
    int64_t first;       // of these, this product's first
    int64_t depth;       // and its numbers
    const void* source;  // of tiles
    fill_fn fill;
};

struct Output {  // output columns with the same terms
    Term terms[2 * max_members];
    int count;
    int64_t width;
    const float* bias;  // width, padded to whole panels; NULL: zeros
    bool add;           // to what is in y, instead of to the bias
    void* y;            // the first of its columns
};

struct Panels {  // of rows: the last one has what is left
    int64_t m, rows, count;
};

struct Product {
    Panels panels;
    Output outputs[max_members];
    int count;
    int64_t stride;                         // of y
    int64_t columns;                        // of a task
    int64_t task_panels, row_tasks, tasks;  // row panels of a task: all, unless there are too few columns
};

inline Panels panels_of(int64_t m) {
    const int64_t rows = divide_up(m, divide_up(m, max_panel_rows));  // 16 rows are two panels of 8, not 14 and 2
    return {m, rows, divide_up(m, rows)};
}

inline void add_term(Output& out, const float* left, int64_t left_depth, int64_t first, int64_t depth,
                     const void* source, fill_fn fill) {
    out.terms[out.count++] = {left, left_depth, first, depth, source, fill};
}

inline Output& add_output(Product& p, int64_t width, const float* bias, void* y) {
    Output& out = p.outputs[p.count++];
    out.count = 0, out.width = width, out.bias = bias, out.add = false, out.y = y;
    return out;
}

inline int64_t column_tasks(const Product& p, int out) { return divide_up(p.outputs[out].width, p.columns); }

// Divides the work, once all ranges are there.
inline void divide(Product& p, int threads) {
    int64_t width = 0, tasks = 0;
    for (int i = 0; i < p.count; ++i) width += p.outputs[i].width;
    const int64_t share = divide_up(divide_up(width, 4 * int64_t(threads)), 32) * 32;  // decoding goes by 32
    p.columns = at_most(share, p.panels.m <= block_rows ? 2 * panel_width : max_tile_columns);
    for (int i = 0; i < p.count; ++i) tasks += column_tasks(p, i);
    const int64_t wanted = tasks < 2 * threads ? divide_up(4 * threads, tasks) : 1;
    const int64_t splits = at_most(wanted, at_least(p.panels.m / least_split_rows, 1));
    p.task_panels = divide_up(p.panels.count, at_most(splits, p.panels.count));
    p.row_tasks = divide_up(p.panels.count, p.task_panels);
    p.tasks = tasks * p.row_tasks;
}

// A filled part of the tile and what it is multiplied with.
struct Piece {
    const float* left;
    int64_t left_depth, first, depth;
    const float* tile;

    // Its part of a panel of `rows` rows, where panels have `panel_rows` but for the last one.
    const float* panel(int64_t number, int64_t panel_rows, int64_t rows) const {
        return left + number * left_depth * panel_rows + first * rows;
    }
};

// A task's part of y, its sums in fp32: in y itself, or in scratch memory that has room for whole panels.
struct Sums {
    float* at;
    int64_t stride;
    bool scratch;
};

// The pieces' products, added to columns [column, column + columns) of row panels [first, last): to y, or to the bias.
template <class N>
void multiply(const Product& p, const Output& out, const Piece* pieces, int count, bool to_bias, int64_t column,
              int64_t columns, int64_t first, int64_t last, const Sums& sums) {
    alignas(64) static const float zeros[panel_width] = {};
    alignas(64) float edge[max_panel_rows * panel_width] = {};
    for (int64_t j = 0; j < divide_up(columns, panel_width); ++j) {
        const int64_t at = column + j * panel_width, n = at_most(panel_width, column + columns - at);
        const float* bias = out.bias ? out.bias + at : zeros;
        for (int64_t panel = first; panel < last; ++panel) {
            const int64_t rows = at_most(p.panels.rows, p.panels.m - panel * p.panels.rows);
            const micro_fn kernel = micro_of<N>(int(rows));
            float* y = sums.at + (panel - first) * p.panels.rows * sums.stride + j * panel_width;
            float* c = (n == panel_width || sums.scratch) && count ? y : edge;  // the kernel stores whole panels
            const int64_t stride = c == edge ? panel_width : sums.stride;
            if (c == edge)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t i = 0; i < n; ++i)
                        edge[r * panel_width + i] = to_bias ? bias[i] : y[r * sums.stride + i];
            const float* base = to_bias && c == y ? bias : c;
            int64_t base_stride = base == bias ? 0 : stride;
            for (int i = 0; i < count; ++i) {
                kernel(pieces[i].panel(panel, p.panels.rows, rows), pieces[i].tile + j * panel_stride(pieces[i].depth),
                       pieces[i].depth, base, base_stride, c, stride);
                base = c, base_stride = stride;
            }
            if (c == edge)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t i = 0; i < n; ++i) y[r * sums.stride + i] = edge[r * panel_width + i];
        }
    }
}

template <class T>
void narrow_rows(const float* sums, int64_t stride, int64_t m, int64_t width, T* y, int64_t y_stride) {
    for (int64_t r = 0; r < m; ++r)
        for_lanes(width,
                  [=](int64_t i, auto lanes) { lanes.store(y + r * y_stride + i, lanes.load(sums + r * stride + i)); });
}

// T is y's; where it is not float, `scratch` takes the sums of a task's rows, each max_tile_columns long.
template <class N, class T>
void run_task(const Product& p, int64_t task, float* tile, float* scratch) {
    int64_t part = task / p.row_tasks;
    int number = 0;
    for (; part >= column_tasks(p, number); ++number) part -= column_tasks(p, number);
    const Output& out = p.outputs[number];
    const int64_t column = part * p.columns, columns = at_most(p.columns, out.width - column);
    const int64_t first = task % p.row_tasks * p.task_panels, last = at_most(first + p.task_panels, p.panels.count);
    const int64_t step = at_least(block_rows / p.panels.rows, 1);
    T* y = static_cast<T*>(out.y) + first * p.panels.rows * p.stride + column;

    Piece pieces[max_pieces];
    int count = 0;
    int64_t filled = 0;  // depth of the pieces
    float* to = tile;
    bool to_bias = !out.add;
    const auto flush = [&](bool finished) {
        for (int64_t panel = first; panel < last; panel += step) {
            const int64_t row = (panel - first) * p.panels.rows, end = at_most(panel + step, last);
            if constexpr (sizeof(T) == 4) {
                multiply<N>(p, out, pieces, count, to_bias, column, columns, panel, end,
                            {y + row * p.stride, p.stride, false});
            } else {
                float* sums = scratch + (finished && to_bias ? 0 : row) * max_tile_columns;  // a single pass reuses it
                multiply<N>(p, out, pieces, count, to_bias, column, columns, panel, end,
                            {sums, max_tile_columns, true});
                if (finished)
                    narrow_rows(sums, max_tile_columns,
                                at_most(end * p.panels.rows, p.panels.m) - panel * p.panels.rows, columns,
                                y + row * p.stride, p.stride);
            }
        }
        to_bias = false, count = 0, filled = 0, to = tile;
    };
    for (const Term* term = out.terms; term < out.terms + out.count; ++term) {
        const int64_t slices = divide_up(term->depth, max_depth * N::numbers);
        const int64_t slice = slices ? divide_up(divide_up(term->depth, slices), 32) * 32 : 0;
        for (int64_t k0 = 0; k0 < term->depth; k0 += slice) {
            const int64_t depth = at_most(slice, term->depth - k0), dwords = dwords_of<N>(depth);
            if (count == max_pieces || filled + dwords > tile_depth) flush(false);
            term->fill(term->source, k0, depth, column, columns, to);
            pieces[count++] = {term->left, term->left_depth, term->first + k0 / N::numbers, dwords, to};
            filled += dwords, to += panel_stride(dwords) * divide_up(columns, panel_width);
        }
    }
    if (count || to_bias) flush(true);
}

// To be called by every thread of a parallel region, as is pack_rows; both end with all threads waiting for each other.
template <class N, class T>
void run(const Product& p, float* tile, float* scratch) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.tasks; ++task) run_task<N, T>(p, task, tile, scratch);
}

struct Columns {  // of a left matrix, packed from a dword of their own on
    int64_t first, count;
};

template <class N>
int64_t packed_depth(const Columns* parts, int count) {
    int64_t dwords = 0;
    for (int i = 0; i < count; ++i) dwords += dwords_of<N>(parts[i].count);
    return dwords;
}

template <class N, class T>
void pack_rows(const T* x, const Panels& panels, int64_t stride, const Columns* parts, int count, float* packed) {
    const int64_t depth = packed_depth<N>(parts, count);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t row = panel * panels.rows, rows = at_most(panels.rows, panels.m - row);
        float* to = packed + row * depth;
        for (const Columns* part = parts; part < parts + count; ++part) {
            pack_panel<N>(x + part->first, panels.m, stride, part->count, row, rows, to);
            to += dwords_of<N>(part->count) * rows;
        }
    }
}

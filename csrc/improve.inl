// One sweep over the columns of a weight, each given the best code beside all others, what that changes taken from the
// pull of all columns. One code in a hundred changes: the changes are listed, and nothing else is multiplied.

constexpr int64_t push_depth = 512, push_columns = 128;  // of the moments: 256 KB, half of Zen 3's L2
constexpr int push_vecs = 8;

struct Sweep {
    uint8_t* ranks;  // these four (rows, cols), contiguous
    float *values, *pull;
    const float* scales;
    int64_t rows, cols;
    const float* moments;  // (cols, cols), contiguous, symmetric
    const float *levels, *bounds;
    int count;
    hb_change* changes;  // (rows, cols): of each row one behind the other, by column
    int32_t* ends;       // (rows, 1 + blocks): how many of them lie in the blocks of most_chosen columns before
    int64_t blocks;
    int threads;

    // The changes of `row` in columns [first, last), whole blocks.
    const hb_change* begin(int64_t row, int64_t first) const {
        return changes + row * cols + ends[row * (blocks + 1) + first / most_chosen];
    }
    const hb_change* end(int64_t row, int64_t last) const { return begin(row, last + most_chosen - 1); }
};

// A block, columns [first, first + depth): of choice_lanes rows at a time, as lanes.
inline void improve_columns(const Sweep& s, int64_t first, int64_t depth) {
    const int64_t blocks = divide_up(s.rows, choice_lanes);
#pragma omp parallel for schedule(static) num_threads(threads_for(depth * depth * s.rows, s.threads))
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * choice_lanes, length = at_most(choice_lanes, s.rows - start);
        float pull[most_chosen][choice_lanes] = {}, scale[most_chosen][choice_lanes] = {};
        float value[most_chosen][choice_lanes] = {};
        for (int64_t l = 0; l < length; ++l) {
            const int64_t at = (start + l) * s.cols + first;
            for (int64_t i = 0; i < depth; ++i) pull[i][l] = s.pull[at + i];
            for (int64_t i = 0; i < depth; ++i) scale[i][l] = s.scales[at + i];
            for (int64_t i = 0; i < depth; ++i) value[i][l] = s.values[at + i];
            s.ends[(start + l) * (s.blocks + 1)] = 0;
        }
        int32_t ends[choice_lanes];
        for (int64_t l = 0; l < length; ++l) ends[l] = s.ends[(start + l) * (s.blocks + 1) + first / most_chosen];
        for (int64_t i = 0; i < depth; ++i) {
            const float* row = s.moments + (first + i) * s.cols + first;
            const float inverse = 1.0f / row[i];
            float x[choice_lanes], change[choice_lanes];
            for (int l = 0; l < choice_lanes; ++l)
                x[l] = (value[i][l] + pull[i][l] * inverse) * (1.0f / (scale[i][l] != 0.0f ? scale[i][l] : 1.0f));
            int32_t rank[choice_lanes];
            nearest_ranks(x, s.bounds, s.count, rank);
            bool changed = false;
            for (int l = 0; l < choice_lanes; ++l) change[l] = s.levels[rank[l]] * scale[i][l] - value[i][l];
            for (int l = 0; l < choice_lanes; ++l) changed |= change[l] != 0.0f;
            if (!changed) continue;
            for (int64_t j = 0; j < depth; ++j) {
                const float share = row[j];
                for (int l = 0; l < choice_lanes; ++l) pull[j][l] -= share * change[l];
            }
            for (int64_t l = 0; l < length; ++l) {
                if (change[l] == 0.0f) continue;
                const int64_t at = (start + l) * s.cols + first + i;
                s.ranks[at] = uint8_t(rank[l]);
                s.values[at] = s.levels[rank[l]] * scale[i][l];
                s.changes[(start + l) * s.cols + ends[l]++] = {int32_t(first + i), change[l]};
            }
        }
        for (int64_t l = 0; l < length; ++l) {
            s.ends[(start + l) * (s.blocks + 1) + first / most_chosen + 1] = ends[l];
            for (int64_t i = 0; i < depth; ++i) s.pull[(start + l) * s.cols + first + i] = pull[i][l];
        }
    }
}

inline void push_row(const Sweep& s, const hb_change* begin, const hb_change* end, const float* moments, int64_t width,
                     float* pull) {
    int64_t i = 0;
    for (; i + push_vecs * vec_width <= width; i += push_vecs * vec_width) {
        vec sums[push_vecs];
        for (int j = 0; j < push_vecs; ++j) sums[j] = vload(pull + i + j * vec_width);
        for (const hb_change* change = begin; change < end; ++change) {
            const float* row = moments + change->column * s.cols + i;
            const vec by = vset(change->by);
            for (int j = 0; j < push_vecs; ++j) sums[j] = vfnma(by, vload(row + j * vec_width), sums[j]);
        }
        for (int j = 0; j < push_vecs; ++j) vstore(pull + i + j * vec_width, sums[j]);
    }
    for (const hb_change* change = begin; change < end; ++change)
        for (int64_t rest = i; rest < width; ++rest) pull[rest] -= change->by * moments[change->column * s.cols + rest];
}

// What columns [first, last), whole blocks, have changed, taken from the pull of others.
inline void push(const Sweep& s, int64_t first, int64_t last, int64_t left, int64_t right) {
    const int64_t tiles = divide_up(right - left, push_columns);
    const int64_t part = divide_up(s.rows, at_most(divide_up(4 * s.threads, tiles), s.rows));
    const int64_t parts = divide_up(s.rows, part), work = s.rows * (last - first) * (right - left) / 64;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(work, s.threads))
    for (int64_t task = 0; task < tiles * parts; ++task) {
        const int64_t column = left + task / parts * push_columns, row = task % parts * part;
        const int64_t width = at_most(push_columns, right - column), stop = at_most(row + part, s.rows);
        for (int64_t k = first; k < last; k += push_depth)
            for (int64_t r = row; r < stop; ++r) {
                const hb_change *begin = s.begin(r, k), *end = s.end(r, at_most(k + push_depth, last));
                if (begin != end) push_row(s, begin, end, s.moments + column, width, s.pull + r * s.cols + column);
            }
    }
}

// In order; what a half has changed is passed on to the other as one product, so that each is read seldom.
inline void improve_range(const Sweep& s, int64_t start, int64_t stop) {
    if (stop - start <= most_chosen) return improve_columns(s, start, stop - start);
    const int64_t middle = start + divide_up(stop - start, 2 * most_chosen) * most_chosen;
    improve_range(s, start, middle);
    push(s, start, middle, middle, stop);
    improve_range(s, middle, stop);
    push(s, middle, stop, start, middle);
}

int improve_codes(uint8_t* ranks, float* values, float* pull, const float* scales, int64_t rows, int64_t cols,
                  const float* moments, const float* levels, const float* bounds, int count, hb_change* changes,
                  int32_t* ends, int threads) {
    const Sweep sweep = {ranks,
                         values,
                         pull,
                         scales,
                         rows,
                         cols,
                         moments,
                         levels,
                         bounds,
                         count,
                         changes,
                         ends,
                         divide_up(cols, most_chosen),
                         int(at_least(threads, 1))};
    improve_range(sweep, 0, cols);
    return HB_OK;
}

// Codes chosen column by column, what each is off by taken up by those after it. Columns of the weight are rows here, so
// that its rows, which know nothing of each other, are lanes: plain loops that the compiler makes vectors of.

constexpr int64_t most_chosen = 128, choice_lanes = 32;

// Of `count` ascending levels with `bounds` between them: which one is nearest.
inline void nearest_ranks(const float* x, const float* bounds, int count, int32_t* rank) {
    for (int l = 0; l < choice_lanes; ++l) rank[l] = 0;
    for (int k = 0; k < count - 1; ++k) {
        const float bound = bounds[k];
        for (int l = 0; l < choice_lanes; ++l) rank[l] += x[l] > bound;
    }
}

void choose_codes(const float* state, const float* scales, int64_t rows, int64_t cols, const float* factor,
                  int64_t stride, const float* levels, const float* bounds, int count, uint8_t* ranks, float* errors,
                  int threads) {
    const int64_t blocks = divide_up(cols, choice_lanes);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * rows * cols, threads))
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * choice_lanes, length = at_most(choice_lanes, cols - start);
        float tile[most_chosen][choice_lanes] = {};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t l = 0; l < length; ++l) tile[i][l] = state[i * cols + start + l];
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = i * cols + start;
            const float* row = factor + i * stride;
            const float inverse = 1.0f / row[i];
            float scale[choice_lanes] = {}, x[choice_lanes], error[choice_lanes];
            int32_t rank[choice_lanes];
            for (int64_t l = 0; l < length; ++l) scale[l] = scales[at + l];
            for (int l = 0; l < choice_lanes; ++l) x[l] = tile[i][l] * (1.0f / (scale[l] != 0.0f ? scale[l] : 1.0f));
            nearest_ranks(x, bounds, count, rank);
            for (int l = 0; l < choice_lanes; ++l) error[l] = (tile[i][l] - levels[rank[l]] * scale[l]) * inverse;
            for (int64_t j = i + 1; j < rows; ++j) {
                const float share = row[j];
                for (int l = 0; l < choice_lanes; ++l) tile[j][l] -= share * error[l];
            }
            for (int64_t l = 0; l < length; ++l) {
                ranks[at + l] = uint8_t(rank[l]);
                errors[at + l] = error[l];
            }
        }
    }
}

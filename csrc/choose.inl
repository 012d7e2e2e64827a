// Codes chosen column by column, what each is off by taken up by those after it. Columns of the weight are rows here, so
// that its rows, which know nothing of each other, are lanes: plain loops that the compiler makes vectors of.

constexpr int64_t most_chosen = 128, choice_lanes = 32;

void choose_codes(const float* state, const float* values, const float* scales, int64_t rows, int64_t cols,
                  const float* matrix, int64_t stride, const float* levels, const float* bounds, int count,
                  uint8_t* ranks, float* changes, int threads) {
    const int64_t blocks = divide_up(cols, choice_lanes);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * rows * cols, threads))
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * choice_lanes, length = at_most(choice_lanes, cols - start);
        float tile[most_chosen][choice_lanes] = {};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t l = 0; l < length; ++l) tile[i][l] = state[i * cols + start + l];
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = i * cols + start;
            const float* row = matrix + i * stride;
            const float inverse = 1.0f / row[i];
            float scale[choice_lanes] = {}, value[choice_lanes] = {}, wish[choice_lanes], x[choice_lanes];
            float change[choice_lanes];
            int32_t rank[choice_lanes] = {};
            for (int64_t l = 0; l < length; ++l) scale[l] = scales[at + l];
            if (values)
                for (int64_t l = 0; l < length; ++l) value[l] = values[at + l];
            for (int l = 0; l < choice_lanes; ++l) {
                wish[l] = values ? value[l] + tile[i][l] * inverse : tile[i][l];
                x[l] = wish[l] * (1.0f / (scale[l] != 0.0f ? scale[l] : 1.0f));
            }
            for (int k = 0; k < count - 1; ++k) {
                const float bound = bounds[k];
                for (int l = 0; l < choice_lanes; ++l) rank[l] += x[l] > bound;
            }
            for (int l = 0; l < choice_lanes; ++l) {
                const float chosen = levels[rank[l]] * scale[l];
                change[l] = values ? chosen - value[l] : (wish[l] - chosen) * inverse;
            }
            for (int64_t j = i + 1; j < rows; ++j) {
                const float share = row[j];
                for (int l = 0; l < choice_lanes; ++l) tile[j][l] -= share * change[l];
            }
            for (int64_t l = 0; l < length; ++l) {
                ranks[at + l] = uint8_t(rank[l]);
                changes[at + l] = change[l];
            }
        }
    }
}

// Cross-entropy of rows of logits, and its gradient in their place. A row is read from memory once: blocks of it give
// the running maximum and the sum of exponentials, and what is still in cache is then overwritten.

constexpr int64_t softmax_block = 2048;  // logits whose maximum is taken before their exponentials are summed

struct RowSum {
    float peak;    // the largest logit
    double total;  // sum of exp(logit - peak)
};

template <class T>
RowSum row_sum(const T* x, int64_t n) {
    RowSum s = {-3.402823466e38f, 0.0};  // finite: -inf logits are 0 beside it, not NaN
    for (int64_t start = 0; start < n; start += softmax_block) {
        const int64_t count = at_most(softmax_block, n - start);
        vec peaks = vset(s.peak);
        int64_t i = 0;
        for (; i + vec_width <= count; i += vec_width) peaks = vmax(vload(x + start + i), peaks);
        float peak = vpeak(peaks);
        for (; i < count; ++i) peak = widen(x[start + i]) > peak ? widen(x[start + i]) : peak;
        if (peak > s.peak) s.total *= __builtin_exp(double(s.peak) - double(peak)), s.peak = peak;
        const vec shift = vset(peak);
        const int64_t whole = count / vec_width * vec_width;
        s.total += double(sum_lanes(whole, [&](int64_t k, auto lanes, vec sum) {
            return vadd(sum, vexp(vsub(lanes.load(x + start + k), shift)));
        }));
        for (i = whole; i < count; ++i) s.total += __builtin_exp(double(widen(x[start + i])) - double(peak));
    }
    return s;
}

template <class T>
double softmax_row(T* x, int64_t n, int64_t target, bool write) {
    const RowSum s = row_sum(x, n);
    const double score = double(widen(x[target])) - double(s.peak);
    if (write) {
        const vec shift = vset(s.peak), scale = vset(float(1.0 / s.total));
        for_lanes(
            n, [&](int64_t i, auto lanes) { lanes.store(x + i, vmul(vexp(vsub(lanes.load(x + i), shift)), scale)); });
        narrow(float(__builtin_exp(score) / s.total - 1.0), x + target);
    }
    return __builtin_log(s.total) - score;
}

int softmax_cross_entropy(void* logits, int dtype, int64_t rows, int64_t n, const int64_t* targets, double* loss,
                          int write, int threads) {
    double* losses = static_cast<double*>(hb_workspace_take(rows * 8 + 8));
    if (!losses) return HB_NO_MEMORY;
    with_type(dtype, [&](auto number) {
        auto* x = static_cast<decltype(number)*>(logits);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * n * 4, threads))
        for (int64_t r = 0; r < rows; ++r) losses[r] = softmax_row(x + r * n, n, targets[r], write != 0);
    });
    *loss = 0.0;
    for (int64_t r = 0; r < rows; ++r) *loss += losses[r];  // in order, whoever computed them
    hb_workspace_give(losses);
    return HB_OK;
}

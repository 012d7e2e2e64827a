// Forward for a few rows of x (generation): every row of W is decoded in registers and never stored.

template <int M, class T>
void small_rows(const hb_weight& w, const float* x, int64_t stride, const T* bias, T* y, int threads) {
    const Decoder decoder(w.codebook);
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads_for(w.rows* w.cols, threads))
    for (int64_t n = 0; n < w.rows; ++n) {
        float sums[M];
        dot_row<M>(w, decoder, n, x, stride, sums);
        for (int m = 0; m < M; ++m) narrow(bias ? sums[m] + widen(bias[n]) : sums[m], y + m * w.rows + n);
    }
}

template <class T>
int small_linear(const hb_weight& w, const T* x, int64_t m, const T* bias, T* y, int threads) {
    const int64_t stride = ordered_length(w.cols);
    float* ordered = static_cast<float*>(hb_workspace_take((m * stride + 16) * 4));
    if (!ordered) return HB_NO_MEMORY;
    for (int64_t i = 0; i < m; ++i) order_row(x + i * w.cols, w.cols, ordered + i * stride);
    switch (m) {
        case 1: small_rows<1>(w, ordered, stride, bias, y, threads); break;
        case 2: small_rows<2>(w, ordered, stride, bias, y, threads); break;
        case 3: small_rows<3>(w, ordered, stride, bias, y, threads); break;
        case 4: small_rows<4>(w, ordered, stride, bias, y, threads); break;
        case 5: small_rows<5>(w, ordered, stride, bias, y, threads); break;
        case 6: small_rows<6>(w, ordered, stride, bias, y, threads); break;
#if HB_PANEL_ROWS > 6
        case 7: small_rows<7>(w, ordered, stride, bias, y, threads); break;
        case 8: small_rows<8>(w, ordered, stride, bias, y, threads); break;
#endif
        default: break;
    }
    hb_workspace_give(ordered);
    return HB_OK;
}

// Root-mean-square norms and their gradients. A row is read from memory once: it is short enough to stay in L1 or L2 for
// the second look. y = x rstd (offset + weight), rstd = 1 / sqrt(mean(x^2) + eps).

// offset + weight as floats, once a call: rows then need no knowledge of the weight's type.
inline void scale_row(const void* weight, int dtype, float offset, int64_t n, float* scale) {
    with_type(dtype, [=](auto type) {
        const auto* w = static_cast<const decltype(type)*>(weight);
        for_lanes(n, [=](int64_t i, auto lanes) { lanes.store(scale + i, vadd(lanes.load(w + i), vset(offset))); });
    });
}

// Returns rstd.
template <class T>
inline float norm_row(const T* x, const float* scale, int64_t n, float eps, T* y) {
    const float squares = sum_lanes(n, [=](int64_t i, auto lanes, vec sum) {
        const vec v = lanes.load(x + i);
        return vfma(v, v, sum);
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(n) + eps);
    const vec factor = vset(rstd);
    for_lanes(n, [=](int64_t i, auto lanes) {
        lanes.store(y + i, vmul(vmul(lanes.load(x + i), factor), lanes.load(scale + i)));
    });
    return rstd;
}

// dx = rstd (s - u mean(s u)) + add, where s = g scale and u = x rstd; `dx` may be `g`, `add` may be NULL.
template <class T>
inline void norm_backward_row(const T* g, const T* x, const float* scale, float rstd, const T* add, int64_t n, T* dx) {
    const vec factor = vset(rstd);
    const float products = sum_lanes(n, [=](int64_t i, auto lanes, vec sum) {
        return vfma(vmul(lanes.load(g + i), lanes.load(scale + i)), vmul(lanes.load(x + i), factor), sum);
    });
    const vec mean = vset(products / float(n));
    const auto gradient = [=](int64_t i, auto lanes) {
        const vec s = vmul(lanes.load(g + i), lanes.load(scale + i));
        return vmul(factor, vfnma(vmul(lanes.load(x + i), factor), mean, s));
    };
    if (add)
        for_lanes(n,
                  [=](int64_t i, auto lanes) { lanes.store(dx + i, vadd(gradient(i, lanes), lanes.load(add + i))); });
    else
        for_lanes(n, [=](int64_t i, auto lanes) { lanes.store(dx + i, gradient(i, lanes)); });
}

template <class T>
void norm_rows(const T* x, const T* delta, const float* scale, int64_t rows, int64_t n, float eps, T* sum, T* y,
               float* rstd, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows* n, threads))
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = x + r * n;
        if (delta) {
            T* to = sum + r * n;
            const T* more = delta + r * n;
            for_lanes(n, [=](int64_t i, auto lanes) {
                lanes.store(to + i, vadd(lanes.load(from + i), lanes.load(more + i)));
            });
            from = to;  // the rounded sum: what the next layer and the backward pass see
        }
        rstd[r] = norm_row(from, scale, n, eps, y + r * n);
    }
}

template <class T>
void norm_backward_rows(const T* g, const T* x, const float* scale, const float* rstd, const T* add, int64_t rows,
                        int64_t n, T* dx, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows* n, threads))
    for (int64_t r = 0; r < rows; ++r)
        norm_backward_row(g + r * n, x + r * n, scale, rstd[r], add ? add + r * n : nullptr, n, dx + r * n);
}

// Rows of heads + 2 kv_heads heads: queries, keys, values. The values are copied.
template <class T>
void norm_head_rows(const T* qkv, const float* scale, int64_t rows, int64_t heads, int64_t kv_heads, int64_t n,
                    float eps, T* out, float* rstd, int threads) {
    const int64_t normed = heads + kv_heads, width = (normed + kv_heads) * n;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows* width, threads))
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = qkv + r * width;
        T* to = out + r * width;
        for (int64_t h = 0; h < normed; ++h)
            rstd[r * normed + h] = norm_row(from + h * n, h < heads ? scale : scale + n, n, eps, to + h * n);
        __builtin_memcpy(to + normed * n, from + normed * n, size_t(kv_heads * n) * sizeof(T));
    }
}

template <class T>
void norm_head_backward_rows(T* dqkv, const T* qkv, const float* scale, const float* rstd, int64_t rows, int64_t heads,
                             int64_t kv_heads, int64_t n, int threads) {
    const int64_t normed = heads + kv_heads, width = (normed + kv_heads) * n;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows* width, threads))
    for (int64_t r = 0; r < rows; ++r) {
        T* g = dqkv + r * width;
        const T* x = qkv + r * width;
        for (int64_t h = 0; h < normed; ++h)
            norm_backward_row(g + h * n, x + h * n, h < heads ? scale : scale + n, rstd[r * normed + h],
                              static_cast<const T*>(nullptr), n, g + h * n);
    }
}

// The exported functions (halfbyte.h), but for the choice of the ISA.

int rms_norm(const void* x, const void* delta, const void* weight, int dtype, int weight_dtype, int64_t rows, int64_t n,
             float eps, float offset, void* sum, void* y, float* rstd, int threads) {
    float* scale = static_cast<float*>(hb_workspace_take(n * 4));
    if (!scale) return HB_NO_MEMORY;
    scale_row(weight, weight_dtype, offset, n, scale);
    with_type(dtype, [=](auto type) {
        using T = decltype(type);
        norm_rows(static_cast<const T*>(x), static_cast<const T*>(delta), scale, rows, n, eps, static_cast<T*>(sum),
                  static_cast<T*>(y), rstd, threads);
    });
    hb_workspace_give(scale);
    return HB_OK;
}

int rms_norm_backward(const void* g, const void* x, const void* weight, int dtype, int weight_dtype, const float* rstd,
                      const void* add, int64_t rows, int64_t n, float offset, void* dx, int threads) {
    float* scale = static_cast<float*>(hb_workspace_take(n * 4));
    if (!scale) return HB_NO_MEMORY;
    scale_row(weight, weight_dtype, offset, n, scale);
    with_type(dtype, [=](auto type) {
        using T = decltype(type);
        norm_backward_rows(static_cast<const T*>(g), static_cast<const T*>(x), scale, rstd, static_cast<const T*>(add),
                           rows, n, static_cast<T*>(dx), threads);
    });
    hb_workspace_give(scale);
    return HB_OK;
}

int rms_norm_heads(const void* qkv, const void* q_weight, const void* k_weight, int dtype, int weight_dtype,
                   int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps, float offset, void* out,
                   float* rstd, int threads) {
    float* scale = static_cast<float*>(hb_workspace_take(2 * head_dim * 4));
    if (!scale) return HB_NO_MEMORY;
    scale_row(q_weight, weight_dtype, offset, head_dim, scale);
    scale_row(k_weight, weight_dtype, offset, head_dim, scale + head_dim);
    with_type(dtype, [=](auto type) {
        using T = decltype(type);
        norm_head_rows(static_cast<const T*>(qkv), scale, rows, heads, kv_heads, head_dim, eps, static_cast<T*>(out),
                       rstd, threads);
    });
    hb_workspace_give(scale);
    return HB_OK;
}

int rms_norm_heads_backward(void* dqkv, const void* qkv, const void* q_weight, const void* k_weight, int dtype,
                            int weight_dtype, const float* rstd, int64_t rows, int64_t heads, int64_t kv_heads,
                            int64_t head_dim, float offset, int threads) {
    float* scale = static_cast<float*>(hb_workspace_take(2 * head_dim * 4));
    if (!scale) return HB_NO_MEMORY;
    scale_row(q_weight, weight_dtype, offset, head_dim, scale);
    scale_row(k_weight, weight_dtype, offset, head_dim, scale + head_dim);
    with_type(dtype, [=](auto type) {
        using T = decltype(type);
        norm_head_backward_rows(static_cast<T*>(dqkv), static_cast<const T*>(qkv), scale, rstd, rows, heads, kv_heads,
                                head_dim, threads);
    });
    hb_workspace_give(scale);
    return HB_OK;
}

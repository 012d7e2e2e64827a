// act(gate) * up, and its gradient. Both activations are x s(z(x)) with the logistic function s: SiLU with z = x, and
// GELU's tanh formula with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), because (1 + tanh(z / 2)) / 2 = s(z).

struct Silu {
    static vec z(vec x) { return x; }
    static vec slope(vec) { return vset(1.0f); }
};

struct GeluTanh {
    static vec z(vec x) {
        const vec x2 = vmul(x, x);
        return vmul(x, vfma(x2, vset(0.0713548163f), vset(1.5957691216f)));
    }
    static vec slope(vec x) { return vfma(vmul(x, x), vset(3 * 0.0713548163f), vset(1.5957691216f)); }
};

template <class Act, class T>
inline void gate_row(const T* gate, const T* up, int64_t n, T* out) {
    for_lanes(n, [=](int64_t i, auto lanes) {
        const vec x = lanes.load(gate + i);
        lanes.store(out + i, vmul(vmul(x, vsigmoid(Act::z(x))), lanes.load(up + i)));
    });
}

template <class Act, class T>
void gated_rows(const T* gate_up, int64_t rows, int64_t n, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * n * 4, threads))
    for (int64_t r = 0; r < rows; ++r) {
        const T* gate = gate_up + r * 2 * n;
        gate_row<Act>(gate, gate + n, n, out + r * n);
    }
}

template <class Act, class T>
void gated_backward_rows(const T* g, const T* gate_up, int64_t rows, int64_t n, T* d_gate_up, T* h, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * n * 4, threads))
    for (int64_t r = 0; r < rows; ++r) {
        const T *gate = gate_up + r * 2 * n, *up = gate + n, *grad = g + r * n;
        T *d_gate = d_gate_up + r * 2 * n, *d_up = d_gate + n, *again = h + r * n;
        for_lanes(n, [=](int64_t i, auto lanes) {
            const vec x = lanes.load(gate + i), y = lanes.load(up + i), dh = lanes.load(grad + i);
            const vec s = vsigmoid(Act::z(x)), active = vmul(x, s);
            // (x s)' = s + x s (1 - s) z'
            const vec slope = vfma(vmul(active, vsub(vset(1.0f), s)), Act::slope(x), s);
            lanes.store(d_gate + i, vmul(vmul(dh, y), slope));
            lanes.store(d_up + i, vmul(dh, active));
            lanes.store(again + i, vmul(active, y));
        });
    }
}

int gated(const void* gate_up, int dtype, int64_t rows, int64_t n, int activation, void* out, int threads) {
    with_type(dtype, [=](auto type) {
        using T = decltype(type);
        const auto* from = static_cast<const T*>(gate_up);
        auto* to = static_cast<T*>(out);
        if (activation == HB_SILU)
            gated_rows<Silu>(from, rows, n, to, threads);
        else
            gated_rows<GeluTanh>(from, rows, n, to, threads);
    });
    return HB_OK;
}

int gated_backward(const void* g, const void* gate_up, int dtype, int64_t rows, int64_t n, int activation,
                   void* d_gate_up, void* h, int threads) {
    with_type(dtype, [=](auto type) {
        using T = decltype(type);
        const auto *grad = static_cast<const T*>(g), *from = static_cast<const T*>(gate_up);
        auto *to = static_cast<T*>(d_gate_up), *again = static_cast<T*>(h);
        if (activation == HB_SILU)
            gated_backward_rows<Silu>(grad, from, rows, n, to, again, threads);
        else
            gated_backward_rows<GeluTanh>(grad, from, rows, n, to, again, threads);
    });
    return HB_OK;
}

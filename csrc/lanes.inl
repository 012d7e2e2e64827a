// Loops over rows of any length: whole vectors, then one of the lanes that are left. A kernel's body is written once, as
// a lambda over (position, lanes), and loads and stores through `lanes`.

struct Whole {
    int64_t count() const { return vec_width; }
    template <class T>
    vec load(const T* p) const {
        return vload(p);
    }
    template <class T>
    void store(T* p, vec x) const {
        vstore(p, x);
    }
};

struct Part {
    int64_t n;
    int64_t count() const { return n; }
    template <class T>
    vec load(const T* p) const {  // zeros beyond
        T all[vec_width] = {};
        for (int64_t i = 0; i < n; ++i) all[i] = p[i];
        return vload(all);
    }
    template <class T>
    void store(T* p, vec x) const {
        T all[vec_width];
        vstore(all, x);
        for (int64_t i = 0; i < n; ++i) p[i] = all[i];
    }
};

template <class Body>
inline void for_lanes(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + vec_width <= n; i += vec_width) body(i, Whole());
    if (i < n) body(i, Part{n - i});
}

// The sum over i of term(i, lanes, sum so far), in an order that only n decides; four sums hide the adder's latency.
template <class Term>
inline float sum_lanes(int64_t n, Term term) {
    vec a = vzero(), b = vzero(), c = vzero(), d = vzero();
    int64_t i = 0;
    for (; i + 4 * vec_width <= n; i += 4 * vec_width) {
        a = term(i, Whole(), a);
        b = term(i + vec_width, Whole(), b);
        c = term(i + 2 * vec_width, Whole(), c);
        d = term(i + 3 * vec_width, Whole(), d);
    }
    for (; i + vec_width <= n; i += vec_width) a = term(i, Whole(), a);
    if (i < n) b = term(i, Part{n - i}, b);
    return vsum(vadd(vadd(a, b), vadd(c, d)));
}

// Runs `body` with a zero of the type that `dtype` names.
template <class Body>
inline void with_type(int dtype, Body body) {
    switch (dtype) {
        case HB_BF16: return body(bf16());
        case HB_F16: return body(fp16());
        default: return body(float());
    }
}

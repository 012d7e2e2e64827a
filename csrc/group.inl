// The exported products of 4-bit layers: one, or several that share their input.

template <class N>
struct FourBitGroup {
    FourBit weights[max_members];
    Group group = {};

    FourBitGroup(const hb_member* members, int count) {
        for (int i = 0; i < count; ++i) {
            weights[i] = FourBit(members[i].weight);
            add_layer<N>(group, weights[i], members[i].bias);
            if (members[i].rank) add_adapter(group, members[i]);
        }
    }
};

template <int M>
struct RowCount {
    static constexpr int value = M;
};

// call(RowCount<m>()) for m from 1 to MOST: the small kernels unroll over the rows of x.
template <int MOST, int M = 1, class Call>
int with_rows(int64_t m, Call call) {
    if constexpr (M < MOST) {
        if (m > M) return with_rows<MOST, M + 1>(m, call);
    }
    return call(RowCount<M>());
}

template <class T>
int linear_of(const hb_member* members, int count, const T* x, int64_t m, T* y, float* u, int threads) {
    typedef typename NumberOf<T>::type N;
    const FourBitGroup<N> all(members, count);
    const Group& g = all.group;
    if (m > max_dot_rows) return forward<N>(g, x, m, y, u, threads);
    if (g.rank) {
        const int status = forward<N>(g, x, m, static_cast<T*>(nullptr), u, threads);
        if (status != HB_OK) return status;
    }
    return with_rows<max_dot_rows>(
        m, [&](auto rows) { return small_forward<decltype(rows)::value>(g, all.weights, x, u, y, threads); });
}

template <class T>
int linear_backward_of(const hb_member* members, int count, const T* grad, const T* x, const float* u, int64_t m, T* dx,
                       float* v, int threads) {
    typedef typename NumberOf<T>::type N;
    const FourBitGroup<N> all(members, count);
    const Group& g = all.group;
    const bool small = m <= max_sum_rows;
    int status = HB_OK;
    if (g.rank || (dx && !small)) status = backward<N>(g, grad, m, v, small ? static_cast<T*>(nullptr) : dx, threads);
    if (dx && small && status == HB_OK)
        status = with_rows<max_sum_rows>(
            m, [&](auto rows) { return small_backward<decltype(rows)::value>(g, all.weights, grad, v, dx, threads); });
    if (g.rank && status == HB_OK) status = adapter_gradients<N>(g, grad, x, u, v, m, threads);
    return status;
}

int linear(const hb_member* members, int count, const void* x, int dtype, int64_t m, void* y, float* u, int threads) {
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        typedef decltype(number) T;
        status = linear_of(members, count, static_cast<const T*>(x), m, static_cast<T*>(y), u, threads);
    });
    return status;
}

int linear_backward(const hb_member* members, int count, const void* grad, const void* x, const float* u, int dtype,
                    int64_t m, void* dx, float* v, int threads) {
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        typedef decltype(number) T;
        status = linear_backward_of(members, count, static_cast<const T*>(grad), static_cast<const T*>(x), u, m,
                                    static_cast<T*>(dx), v, threads);
    });
    return status;
}

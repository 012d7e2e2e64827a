// sums(m, n) += alpha a(m, depth) b(depth, n), the sums in fp32: what calibration adds up.

template <class T>
int add_product_typed(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t m, int64_t depth, int64_t n,
                      float alpha, float* sums, int64_t stride, int threads) {
    typedef typename NumberOf<T>::type N;
    const int64_t part = at_most(m, slab_rows), slab = at_most(depth, slab_depth * N::numbers);
    Workspace space(threads * tile_floats + (part + max_panel_rows) * dwords_of<N>(slab), 2);
    if (!space.base) return HB_NO_MEMORY;
    float *tiles = space.take(threads * tile_floats),
          *packed = space.take((part + max_panel_rows) * dwords_of<N>(slab));
    for (int64_t row = 0; row < m; row += part) {
        const Panels panels = panels_of(at_most(part, m - row));
#pragma omp parallel num_threads(threads_for(panels.m * n * depth / 16, threads))
        for (int64_t k0 = 0; k0 < depth; k0 += slab) {
            const Columns columns = {k0, at_most(slab, depth - k0)};
            const Dense<T> right = {b + k0 * b_stride, columns.count, n, b_stride, alpha};
            Product p = empty_product(panels, stride);
            Output& out = add_output(p, n, nullptr, sums + row * stride);
            out.add = true;
            add_term(out, packed, dwords_of<N>(columns.count), 0, columns.count, &right, fill_backward<N, Dense<T>>);
            divide(p, threads);
            pack_rows<N>(a + row * a_stride, panels, a_stride, &columns, 1, packed);
            run<N, float>(p, tiles + thread_number() * tile_floats, nullptr);
        }
    }
    return HB_OK;
}

int add_product(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int dtype, int64_t m, int64_t depth,
                int64_t n, float alpha, float* sums, int64_t stride, int threads) {
    int status = HB_OK;
    with_type(dtype, [&](auto number) {
        typedef decltype(number) T;
        status = add_product_typed(static_cast<const T*>(a), a_stride, static_cast<const T*>(b), b_stride, m, depth, n,
                                   alpha, sums, stride, int(at_least(threads, 1)));
    });
    return status;
}

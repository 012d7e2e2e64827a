// The inner kernel of every matrix product: C(rows x 2 vectors) = A(rows x depth) * B(depth x 2 vectors), finished as the
// caller says; the depth is in dwords (number.inl). The accumulators have names because gcc 12 keeps an array of them on the stack inside the loop (0.60 of
// peak where names give 0.85).

#define HB_EACH_ROW(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13)

// Element (i, k) of A is a[i * ROW_STEP + k * a_step], row k of B starts at b + k * b_step. What is stored in row i from
// column j on, a vector of C, is finish(the sum, i, j).
template <int ROWS, int64_t ROW_STEP, class N = Single, class Finish>
inline __attribute__((always_inline)) void multiply(const float* a, int64_t a_step, const float* b, int64_t b_step,
                                                    int64_t depth, float* c, int64_t stride, Finish finish) {
#define HB_DECLARE(i) [[maybe_unused]] vec l##i = vzero(), r##i = vzero();
    HB_EACH_ROW(HB_DECLARE)
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        const vec left = vload(b), right = vload(b + vec_width);
#define HB_MULTIPLY(i)                                \
    if constexpr (i < ROWS) {                         \
        const auto x = vspread<i, ROWS, ROW_STEP>(a); \
        l##i = N::dot(x, left, l##i);                 \
        r##i = N::dot(x, right, r##i);                \
    }
        HB_EACH_ROW(HB_MULTIPLY)
        a += a_step;
        b += b_step;
    }
#define HB_STORE(i)                                                              \
    if constexpr (i < ROWS) {                                                    \
        vstore(c + i * stride, finish(l##i, i, 0));                              \
        vstore(c + i * stride + vec_width, finish(r##i, i, int64_t(vec_width))); \
    }
    HB_EACH_ROW(HB_STORE)
#undef HB_DECLARE
#undef HB_MULTIPLY
#undef HB_STORE
}

// A is packed [depth][ROWS], B [depth][2 vectors]. `base` is added to the product: C itself, or a row of biases
// (stride 0) for the first part of the depth.
template <class N, int ROWS>
void micro(const float* a, const float* b, int64_t depth, const float* base, int64_t base_stride, float* c,
           int64_t stride) {
    multiply<ROWS, 1, N>(a, ROWS, b, panel_width, depth, c, stride,
                         [=](vec sum, int64_t i, int64_t j) { return vadd(vload(base + i * base_stride + j), sum); });
}

typedef void (*micro_fn)(const float*, const float*, int64_t, const float*, int64_t, float*, int64_t);

// The kernel for panels of `rows` rows, 1 to max_panel_rows.
template <class N>
micro_fn micro_of(int rows) {
    static const micro_fn kernels[] = {
        micro<N, 1>, micro<N, 2>, micro<N, 3>, micro<N, 4>,  micro<N, 5>,  micro<N, 6>,
#if HB_PANEL_ROWS > 6
        micro<N, 7>, micro<N, 8>, micro<N, 9>, micro<N, 10>, micro<N, 11>, micro<N, 12>, micro<N, 13>, micro<N, 14>,
#endif
    };
    return kernels[rows - 1];
}

// What the machine can do at most, for figures to stand beside: fused multiply-adds in registers, and reading memory.

// 2 * 12 * vec_width * iterations floating-point operations on each thread; returns a number that depends on all.
float multiply_add(int64_t iterations, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        // As many chains as the inner kernel has, so that the latency of one hides behind the others; they start
        // differently, or the compiler would see that they are one.
        vec a = vset(0.0f), b = vset(1.0f), c = vset(2.0f), d = vset(3.0f), e = vset(4.0f), f = vset(5.0f);
        vec g = vset(6.0f), h = vset(7.0f), i = vset(8.0f), j = vset(9.0f), k = vset(10.0f), l = vset(11.0f);
        const vec x = vset(0.5f), y = vset(1.0f);
        for (int64_t n = 0; n < iterations; ++n) {
            a = vfma(a, x, y), b = vfma(b, x, y), c = vfma(c, x, y), d = vfma(d, x, y);
            e = vfma(e, x, y), f = vfma(f, x, y), g = vfma(g, x, y), h = vfma(h, x, y);
            i = vfma(i, x, y), j = vfma(j, x, y), k = vfma(k, x, y), l = vfma(l, x, y);
        }
        const vec sum = vadd(vadd(vadd(a, b), vadd(c, d)), vadd(vadd(e, f), vadd(g, h)));
        total += vsum(vadd(sum, vadd(vadd(i, j), vadd(k, l))));
    }
    return total;
}

// The sum of n floats, each thread over a stretch of its own.
float read_all(const float* x, int64_t n, int threads) {
    constexpr int64_t step = 8 * vec_width;
    float total = 0;
    const int64_t share = n / threads / step * step;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const float* p = x + thread_number() * share;
        vec sums[8];
        for (vec& sum : sums) sum = vzero();
        for (int64_t i = 0; i < share; i += step)
            for (int lane = 0; lane < 8; ++lane) sums[lane] = vadd(sums[lane], vload(p + i + lane * vec_width));
        for (const vec& sum : sums) total += vsum(sum);
    }
    return total;
}

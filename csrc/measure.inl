// What the machine can do at most, for figures to stand beside: fused multiply-adds in registers, and reading memory.

// 2 * 12 * vec_width * iterations floating-point operations on each thread; returns a number that depends on all.
float multiply_add(int64_t iterations, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        // As many chains as the inner kernel has, so that the latency of one hides behind the others. Every lane starts
        // differently, or the compiler would see that some are one; each chain is the addend, as NEON's instruction has it.
        float starts[12 * vec_width];
        for (int64_t n = 0; n < 12 * vec_width; ++n) starts[n] = float(n);
        const auto start = [&starts](int64_t chain) { return vload(starts + chain * vec_width); };
        vec a = start(0), b = start(1), c = start(2), d = start(3), e = start(4), f = start(5);
        vec g = start(6), h = start(7), i = start(8), j = start(9), k = start(10), l = start(11);
        const vec x = vset(0.5f), y = vset(0.25f);
        for (int64_t n = 0; n < iterations; ++n) {
            a = vfma(x, y, a), b = vfma(x, y, b), c = vfma(x, y, c), d = vfma(x, y, d);
            e = vfma(x, y, e), f = vfma(x, y, f), g = vfma(x, y, g), h = vfma(x, y, h);
            i = vfma(x, y, i), j = vfma(x, y, j), k = vfma(x, y, k), l = vfma(x, y, l);
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

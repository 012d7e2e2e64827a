// e^x and the logistic function, written once over `vec`.

// e^(n ln 2 + r) / 2^n for |r| <= ln 2 / 2, x = n ln 2 + r: ln 2 is the sum of two floats, n times the first one exact.
inline vec vexp_rest(vec x, vec n) {
    const vec r = vfnma(n, vset(-2.12194440e-4f), vfnma(n, vset(0.693359375f), x));
    vec p = vset(1.9875691500e-4f);  // Cephes' expf: (e^r - 1 - r) / r^2
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    return vadd(vfma(p, vmul(r, r), r), vset(1.0f));
}

// Within 1.1 units in the last place of the exact value; 0 from -104 down, infinity from 88.8 up, NaN for NaN.
inline vec vexp(vec x) {
    x = vmin(vset(89.0f), vmax(vset(-104.0f), x));
    const vec n = vround(vmul(x, vset(1.44269504f)));
    return vscale(vexp_rest(x, n), n);
}

// The same for a softmax, whose terms do not exceed 1, in two thirds of the instructions on AVX2: x up to 88, and e^-87
// (1.6e-38) from -87 down.
inline vec vexp_term(vec x) {
    x = vmax(vset(-87.0f), x);
    const vec whole = vset(12582912.0f + 127.0f);  // 1.5 * 2^23: the sum's last bits are the integer n + 127
    const vec biased = vfma(x, vset(1.44269504f), whole);
    return vmul(vexp_rest(x, vsub(biased, whole)), vexponent(biased));
}

// 1 / (1 + e^-x), as e^x / (1 + e^x); e^-87 from -87 down.
inline vec vsigmoid(vec x) {
    const vec e = vexp_term(vmin(vset(88.0f), x));
    return vdiv(e, vadd(vset(1.0f), e));
}

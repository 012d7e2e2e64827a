// e^x and the logistic function, written once over `vec`.

// Within 1.1 units in the last place of the exact value; 0 from -104 down, infinity from 88.8 up, NaN for NaN.
inline vec vexp(vec x) {
    x = vmin(vset(89.0f), vmax(vset(-104.0f), x));
    const vec n = vround(vmul(x, vset(1.44269504f)));
    // r = x - n ln 2, where ln 2 is the sum of two floats and n times the first one is exact
    const vec r = vfnma(n, vset(-2.12194440e-4f), vfnma(n, vset(0.693359375f), x));
    vec p = vset(1.9875691500e-4f);  // Cephes' expf: (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    return vscale(vadd(vfma(p, vmul(r, r), r), vset(1.0f)), n);
}

// 1 / (1 + e^-x)
inline vec vsigmoid(vec x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

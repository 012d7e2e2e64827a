// Four floats, as every processor has them in one register, and what scales.inl does with them.

typedef float vec __attribute__((vector_size(16)));
constexpr int64_t vec_width = 4;

inline vec vset(float x) { return vec{x, x, x, x}; }
inline vec vzero() { return vset(0.0f); }
inline vec vload(const float* p) { return vec{p[0], p[1], p[2], p[3]}; }
inline void vstore(float* p, vec x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline vec vadd(vec a, vec b) { return a + b; }
inline vec vmul(vec a, vec b) { return a * b; }
inline vec vdiv(vec a, vec b) { return a / b; }

typedef int32_t vec_bits __attribute__((vector_size(16)));
inline vec vchoose(vec_bits holds, vec a, vec b) {
    return reinterpret_cast<vec>((holds & reinterpret_cast<vec_bits>(a)) | (~holds & reinterpret_cast<vec_bits>(b)));
}
inline vec vmax(vec a, vec b) { return vchoose(a > b, a, b); }

// The level nearest each number: of 16 ascending ones, between 15 bounds.
struct Nearest {
    vec levels[16], bounds[15];
    Nearest(const float* all, const float* between) {
        for (int k = 0; k < 16; ++k) levels[k] = vset(all[k]);
        for (int k = 0; k < 15; ++k) bounds[k] = vset(between[k]);
    }
};
inline vec vnearest(vec x, const Nearest& n) {
    vec value = n.levels[0];
    for (int k = 0; k < 15; ++k) value = vchoose(x > n.bounds[k], n.levels[k + 1], value);
    return value;
}

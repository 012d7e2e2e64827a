// What a dword of a tile and of a packed panel holds: one float, or two bfloat16 neighbours along the sum, where the
// instruction set multiplies such pairs (avx512_pairs.inl). Dwords travel as floats; only `dot` looks inside.

struct Single {
    static constexpr int64_t numbers = 1;  // in a dword

    template <class Spread>  // as vspread gives it: a vector, or a lane of one (NEON)
    static vec dot(Spread a, vec b, vec sum) {
        return vfma(a, b, sum);
    }
    static float join(float first, float) { return first; }
    static vec join(vec first, vec) { return first; }
    template <class T>
    static eight load(const T* p) {  // eight dwords
        return load8(p);
    }
    template <class T>
    static eight load(const T* p, float factor) {
        return mul8(load8(p), set8(factor));
    }
};

// The number in which T is multiplied with a matrix of S.
template <class T, class S = T>
struct NumberOf {
    typedef Single type;
};

template <class N>
constexpr int64_t dwords_of(int64_t numbers) {
    return (numbers + N::numbers - 1) / N::numbers;
}

// A dword column of rows r and r + 1, where there are `rows`, from their vectors row(r).
template <class N, class Row>
inline vec join_rows(int64_t r, int64_t rows, Row row) {
    if constexpr (N::numbers == 1) return row(r);
    return N::join(row(r), r + 1 < rows ? row(r + 1) : vzero());
}

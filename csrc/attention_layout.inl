// What both directions of attention share: where sequences and heads lie, and packed copies of them.
//
// The queries of all heads in a group see the same keys, so they are stacked: row r of a sequence is query head
// r % group of token r / group. Scores are kept turned, keys down and rows across: a vector holds one key's scores with
// as many rows, and the softmax needs no sum across lanes.

// Sequences of starts[s] .. starts[s + 1] things, `rows` rows each, over cells of `unit` rows. No cell holds two
// sequences, and the last of a sequence may be empty.
struct Cells {
    const int32_t* starts;
    int64_t sequences, rows, unit;

    int64_t first(int64_t s) const { return starts[s] * rows / unit + s; }
    int64_t count() const { return first(sequences); }
    int64_t sequence_of(int64_t index) const {
        int64_t low = 0, high = sequences;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first(middle) <= index ? low : high) = middle;
        }
        return low;
    }
};

struct Heads {  // one call's sizes
    const hb_packed& p;
    int64_t group, dim, row;  // query heads to a key head; numbers in a head, and in a token's row of qkv
    int64_t stride;           // of a packed row of a head: whole panels, and an odd number of cache lines
    Cells eights, panels;     // of keys, and of rows
    int64_t slots;            // room for the keys of all sequences, each rounded up to 8

    explicit Heads(const hb_packed& packed)
        : p(packed),
          group(p.heads / p.kv_heads),
          dim(p.head_dim),
          row((p.heads + 2 * p.kv_heads) * dim),
          stride(divide_up(dim, 32) * 32 + 16),
          eights{p.key_starts, p.sequences, 1, 8},
          panels{p.seq_starts, p.sequences, group, panel_width},
          slots(eights.count() * 8) {}

    int64_t start(int64_t s) const { return p.seq_starts[s]; }
    int64_t length(int64_t s) const { return p.seq_starts[s + 1] - p.seq_starts[s]; }
    int64_t keys(int64_t s) const { return p.key_starts[s + 1] - p.key_starts[s]; }
    int64_t offset(int64_t s) const { return keys(s) - length(s); }  // the position of its first token
    int64_t slot(int64_t s) const { return eights.first(s) * 8; }
    int64_t padded(int64_t s) const { return divide_up(keys(s), 8) * 8; }

    int64_t token(int64_t s, int64_t key) const {
        while (key < offset(s)) s = p.parents[s];
        return start(s) + key - offset(s);
    }
    // The sequences [s, end) are s and all that go on from it.
    int64_t end_of_family(int64_t s) const {
        int64_t end = s + 1;
        for (; end < p.sequences && offset(end); ++end) {
            int64_t t = end;
            while (t > s) t = offset(t) ? p.parents[t] : -1;
            if (t != s) break;
        }
        return end;
    }
};

// Rows [first, first + count) of a sequence, up to COUNT; positions from the last one on repeat its token.
template <int64_t COUNT>
struct Rows {
    int64_t count;
    int64_t position[COUNT], token[COUNT], head[COUNT];
    alignas(64) float at[COUNT];  // the position again

    Rows(const Heads& h, int64_t s, int64_t kv_head, int64_t first)
        : count(at_most(COUNT, h.length(s) * h.group - first)) {
        int64_t own = first / h.group, within = first % h.group;
        for (int64_t i = 0; i < COUNT; ++i) {
            token[i] = h.start(s) + own, position[i] = h.offset(s) + own, at[i] = float(position[i]);
            head[i] = kv_head * h.group + within;
            if (i + 1 < count && ++within == h.group) within = 0, ++own;
        }
    }
};

// The keys that some of `rows` rows from i on sees: [low, high), whole eights.
struct Range {
    int64_t low, high;
    bool operator==(const Range& other) const { return low == other.low && high == other.high; }
};

template <int64_t COUNT>
Range keys_of(const Heads& h, const Rows<COUNT>& rows, int64_t i) {
    const int64_t first = rows.position[i], last = rows.position[i + panel_width - 1];
    const int64_t low = h.p.window ? at_least(first - h.p.window + 1, 0) : 0;
    return {low / 8 * 8, divide_up(last + 1, 8) * 8};
}

// Scores (turned) of keys [low, high) with a panel of rows: `value` where a row does not see the key.
template <int64_t COUNT>
void hide(const Heads& h, const Rows<COUNT>& rows, int64_t i, int64_t low, int64_t high, float value, float* scores,
          int64_t stride) {
    const int64_t first = rows.position[i], last = rows.position[i + panel_width - 1];
    if (high - 1 <= first && (!h.p.window || last - low < h.p.window)) return;
    const vec left = vload(rows.at + i), right = vload(rows.at + i + vec_width), hidden = vset(value);
    for (int64_t j = low; j < high; ++j, scores += stride) {
        const vec from = vset(float(j)), to = vset(h.p.window ? float(j + h.p.window) : 1e30f);
        vstore(scores, vwithin(left, from, to, vload(scores), hidden));
        vstore(scores + vec_width, vwithin(right, from, to, vload(scores + vec_width), hidden));
    }
}

// Eight rows -> out[depth][8], times `factor`; zeros where there is no row.
template <class T>
void turn_rows(const T* const* rows, int64_t depth, float factor, float* out, int64_t stride) {
    const eight scale = set8(factor);
    for (int64_t k = 0; k < depth; k += 8) {
        eight v[8];
        for (int i = 0; i < 8; ++i) v[i] = rows[i] ? mul8(load8(rows[i] + k), scale) : zero8();
        transpose8(v);
        for (int i = 0; i < 8; ++i) store8(out + (k + i) * stride, v[i]);
    }
}

// A turned panel (depth x panel_width) back into rows of `out`, `row` numbers a token, each times its factor.
template <class T, int64_t COUNT>
void turn_back(const Heads& h, const Rows<COUNT>& rows, int64_t first, const float* panel, const float* factors, T* out,
               int64_t row) {
    for (int64_t i = 0; i < panel_width && first + i < rows.count; i += 8) {
        const int64_t count = at_most(8, rows.count - first - i);
        T* to[8];
        for (int64_t r = 0; r < count; ++r)
            to[r] = out + rows.token[first + i + r] * row + rows.head[first + i + r] * h.dim;
        const eight factor = load8(factors + i);
        for (int64_t k = 0; k < h.dim; k += 8) {
            eight v[8];
            for (int j = 0; j < 8; ++j) v[j] = mul8(load8(panel + (k + j) * panel_width + i), factor);
            transpose8(v);
            for (int64_t r = 0; r < count; ++r) store8(to[r] + k, v[r]);
        }
    }
}

template <class T, class Out>
void copy_row(const T* x, int64_t n, float factor, Out* out) {
    const vec scale = vset(factor);
    for_lanes(n, [=](int64_t i, auto lanes) { lanes.store(out + i, vmul(lanes.load(x + i), scale)); });
}

// Where key `key` of a sequence lies among its turned keys: blocks of `block` keys, each [dim][keys in it].
struct Turned {
    int64_t offset, stride;
};
inline Turned turned(const Heads& h, int64_t padded, int64_t key, int64_t block) {
    const int64_t start = key / block * block;
    return {start * h.dim + key - start, at_most(block, padded - start)};
}

// Eight keys of head `index` of qkv, turned (`columns`) or as they lie (`lines`; either may be NULL). Keys past the end
// are zeros.
template <class T>
void pack_keys(const Heads& h, int64_t s, int64_t key, int64_t index, int64_t block, float* columns, float* lines) {
    const T* x = static_cast<const T*>(h.p.qkv) + index * h.dim;
    const T* rows[8];
    for (int64_t i = 0; i < 8; ++i) rows[i] = key + i < h.keys(s) ? x + h.token(s, key + i) * h.row : nullptr;
    if (columns) {
        const Turned to = turned(h, h.padded(s), key, block);
        turn_rows(rows, h.dim, 1.0f, columns + h.slot(s) * h.dim + to.offset, to.stride);
    }
    if (!lines) return;
    for (int64_t i = 0; i < 8; ++i) {
        float* to = lines + (h.slot(s) + key + i) * h.stride;
        if (rows[i])
            copy_row(rows[i], h.dim, 1.0f, to);
        else
            __builtin_memset(to, 0, size_t(h.dim) * 4);
    }
}

// body(first row, tile) over tiles that make up `rows` rows, a multiple of 8.
template <int N>
struct Tile {
    static constexpr int rows = N;
};
template <class Body>
inline void for_tiles(int64_t rows, Body body) {
    constexpr int tall = vec_width == 16 ? 8 : 6;  // accumulators for the latency of FMA, and registers to spare
    int64_t i = 0;
    for (; (rows - i) % tall; i += 4) body(i, Tile<4>());
    for (; i < rows; i += tall) body(i, Tile<tall>());
}

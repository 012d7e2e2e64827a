// Attention of one token over the cached ones, and its own key and value into the cache.
// Keys lie 16 positions side by side, feature by feature, so that 16 scores are summed in lanes with no shuffle.

constexpr int64_t block_vecs = HB_KEY_BLOCK / vec_width;

struct AttendScratch {
    float *query, *key;  // (heads of a group, head_dim), (head_dim)
    float* scores;       // (heads of a group, capacity + HB_KEY_BLOCK)
};

// A head from `from`, normed where there is a norm, turned to its position.
inline void prepare_head(const hb_norm& norm, const Turn& turn, int64_t rotary_dim, const float* from, int64_t features,
                         float* to) {
    if (norm.scale)
        norm_row(from, norm.scale, features, norm.eps, to);
    else
        for (int64_t d = 0; d < features; ++d) to[d] = from[d];
    turn_head(to, rotary_dim / 2, turn);
}

// scores of 16 positions for HEADS queries, `stride` floats apart.
template <int HEADS, class T>
inline void score_block(const T* keys, const float* queries, int64_t features, float* scores, int64_t stride) {
    vec sums[HEADS][block_vecs];
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < block_vecs; ++v) sums[h][v] = vzero();
    for (int64_t d = 0; d < features; ++d)
#pragma GCC unroll 2
        for (int v = 0; v < block_vecs; ++v) {
            const vec key = vload(keys + d * HB_KEY_BLOCK + v * vec_width);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; ++h) sums[h][v] = vfma(key, vbroadcast(queries + h * features + d), sums[h][v]);
        }
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < block_vecs; ++v) vstore(scores + h * stride + v * vec_width, sums[h][v]);
}

template <class T>
void score_keys(const T* keys, const float* queries, int64_t heads, int64_t features, int64_t first, int64_t last,
                float* scores, int64_t stride) {
    for (int64_t block = first; block < last; ++block) {
        const T* k = keys + block * features * HB_KEY_BLOCK;
        float* out = scores + (block - first) * HB_KEY_BLOCK;
        int64_t h = 0;
        for (; h + 4 <= heads; h += 4) score_block<4>(k, queries + h * features, features, out + h * stride, stride);
        for (; h + 2 <= heads; h += 2) score_block<2>(k, queries + h * features, features, out + h * stride, stride);
        for (; h < heads; ++h) score_block<1>(k, queries + h * features, features, out + h * stride, stride);
    }
}

// scores -> weights that sum to 1; `n` of them, then room up to a whole vector.
inline void softmax(float* scores, int64_t n) {
    const int64_t padded = divide_up(n, vec_width) * vec_width;
    for (int64_t i = n; i < padded; ++i) scores[i] = -__builtin_inff();
    vec peak = vload(scores);
    for (int64_t i = vec_width; i < padded; i += vec_width) peak = vmax(peak, vload(scores + i));
    const vec top = vset(vpeak(peak));
    vec total = vzero();
    for (int64_t i = 0; i < padded; i += vec_width) {
        const vec e = vexp_term(vsub(vload(scores + i), top));
        vstore(scores + i, e);
        total = vadd(total, e);
    }
    const float sum = vsum(total);
    const vec inverse = vset(1.0f / sum);
    for (int64_t i = 0; i < padded; i += vec_width) vstore(scores + i, vmul(vload(scores + i), inverse));
}

// out = sum of weights[j] * values[j], j < n, plus the last weight times the token's own value.
template <class T>
void mix_values(const T* values, const float* weights, int64_t n, const float* own, int64_t features, float* out) {
    for (int64_t d = 0; d < features; d += HB_KEY_BLOCK) {
        vec even[block_vecs], odd[block_vecs];
        for (int v = 0; v < block_vecs; ++v) {
            even[v] = vmul(vbroadcast(weights + n), vload(own + d + v * vec_width));
            odd[v] = vzero();
        }
        int64_t j = 0;
        for (; j + 2 <= n; j += 2)
            for (int v = 0; v < block_vecs; ++v) {
                const T* value = values + j * features + d + v * vec_width;
                even[v] = vfma(vbroadcast(weights + j), vload(value), even[v]);
                odd[v] = vfma(vbroadcast(weights + j + 1), vload(value + features), odd[v]);
            }
        for (int v = 0; v < block_vecs; ++v) {
            if (j < n)
                even[v] = vfma(vbroadcast(weights + j), vload(values + j * features + d + v * vec_width), even[v]);
            vstore(out + d + v * vec_width, vadd(even[v], odd[v]));
        }
    }
}

// Query heads [first, last) of the token at `position`; `qkv` its projections. The thread with a group's first query
// head writes the group's key and value; nobody reads them from the cache in this call.
template <class T>
void attend(const hb_layer& layer, int64_t position, int64_t capacity, const float* qkv, int64_t first, int64_t last,
            const AttendScratch& scratch, float* out) {
    const int64_t features = layer.head_dim, group = layer.heads / layer.kv_heads;
    const int64_t start = layer.window && position >= layer.window ? position - layer.window + 1 : 0;
    const int64_t block = start / HB_KEY_BLOCK, stride = capacity + HB_KEY_BLOCK, n = position - start;
    const int64_t row = position * layer.rotary_dim;
    Turn turn;
    turn_of(layer.cos + row, layer.sin + row, layer.rotary_dim, false, &turn);
    for (int64_t head = first; head < last;) {
        const int64_t kv = head / group, heads = at_most((kv + 1) * group, last) - head;
        const float* value = qkv + (layer.heads + layer.kv_heads + kv) * features;
        T* keys = static_cast<T*>(layer.keys) + kv * capacity * features;
        T* values = static_cast<T*>(layer.values) + kv * capacity * features;
        prepare_head(layer.k_norm, turn, layer.rotary_dim, qkv + (layer.heads + kv) * features, features, scratch.key);
        for (int64_t h = 0; h < heads; ++h) {
            float* query = scratch.query + h * features;
            prepare_head(layer.q_norm, turn, layer.rotary_dim, qkv + (head + h) * features, features, query);
            for (int64_t d = 0; d < features; ++d) query[d] *= layer.scale;
        }
        score_keys(keys, scratch.query, heads, features, block, divide_up(position, HB_KEY_BLOCK), scratch.scores,
                   stride);
        for (int64_t h = 0; h < heads; ++h) {
            float* scores = scratch.scores + h * stride + (start - block * HB_KEY_BLOCK);
            dot_stored<1>(scratch.key, features, scratch.query + h * features, scores + n);
            softmax(scores, n + 1);
            mix_values(values + start * features, scores, n, value, features, out + (head + h) * features);
        }
        if (head == kv * group) {
            T* own = keys + position / HB_KEY_BLOCK * features * HB_KEY_BLOCK + position % HB_KEY_BLOCK;
            for (int64_t d = 0; d < features; ++d) narrow(scratch.key[d], own + d * HB_KEY_BLOCK);
            for (int64_t d = 0; d < features; ++d) narrow(value[d], values + position * features + d);
        }
        head += heads;
    }
}

// Attention over a cache in blocks of HB_KEY_BLOCK positions, which lie anywhere in a pool: keys of a block are
// (kv_heads, head_dim, HB_KEY_BLOCK), values (kv_heads, HB_KEY_BLOCK, head_dim).

// Queries of key head `kv` turned and scaled in place, its key and value into the cache; `qkv` the row's projections.
template <class T>
void store_head(const hb_layer& layer, const hb_row& row, int64_t kv, float* qkv) {
    const int64_t features = layer.head_dim, group = layer.heads / layer.kv_heads,
                  angle = row.position * layer.rotary_dim;
    Turn turn;
    turn_of(layer.cos + angle, layer.sin + angle, layer.rotary_dim, false, &turn);
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
        float* query = qkv + head * features;
        prepare_head(layer.q_norm, turn, layer.rotary_dim, query, features, query);
        for (int64_t d = 0; d < features; ++d) query[d] *= layer.scale;
    }
    float *key = qkv + (layer.heads + kv) * features, *value = key + layer.kv_heads * features;
    prepare_head(layer.k_norm, turn, layer.rotary_dim, key, features, key);
    const int64_t place = row.position % HB_KEY_BLOCK;
    const int64_t head =
        (row.blocks[row.position / HB_KEY_BLOCK] * int64_t(layer.kv_heads) + kv) * features * HB_KEY_BLOCK;
    T *keys = static_cast<T*>(layer.keys) + head + place,
      *values = static_cast<T*>(layer.values) + head + place * features;
    for (int64_t d = 0; d < features; ++d) narrow(key[d], keys + d * HB_KEY_BLOCK);
    for (int64_t d = 0; d < features; ++d) narrow(value[d], values + d);
}

// out = sum of weights[j] * value j, j in [first, last); `values` those of a key head of block 0, `stride` between blocks.
template <class T>
void mix_blocks(const T* values, int64_t stride, const int32_t* blocks, const float* weights, int64_t first,
                int64_t last, int64_t features, float* out) {
    for (int64_t d = 0; d < features; d += HB_KEY_BLOCK) {
        vec even[block_vecs], odd[block_vecs];
        for (int v = 0; v < block_vecs; ++v) even[v] = odd[v] = vzero();
        for (int64_t j = first; j < last;) {
            const T* block = values + blocks[j / HB_KEY_BLOCK] * stride + d;
            const int64_t end = at_most((j / HB_KEY_BLOCK + 1) * HB_KEY_BLOCK, last);
            for (; j + 2 <= end; j += 2)
                for (int v = 0; v < block_vecs; ++v) {
                    const T* value = block + j % HB_KEY_BLOCK * features + v * vec_width;
                    even[v] = vfma(vbroadcast(weights + j), vload(value), even[v]);
                    odd[v] = vfma(vbroadcast(weights + j + 1), vload(value + features), odd[v]);
                }
            for (; j < end; ++j)
                for (int v = 0; v < block_vecs; ++v)
                    even[v] = vfma(vbroadcast(weights + j), vload(block + j % HB_KEY_BLOCK * features + v * vec_width),
                                   even[v]);
        }
        for (int v = 0; v < block_vecs; ++v) vstore(out + d + v * vec_width, vadd(even[v], odd[v]));
    }
}

// `heads` query heads of key head `kv`, which `store_head` has prepared, over all positions up to the row's own.
// `scores` has room for `stride` of each head.
template <class T>
void attend_blocks(const hb_layer& layer, const hb_row& row, int64_t kv, int64_t heads, const float* queries,
                   float* scores, int64_t stride, float* out) {
    const int64_t features = layer.head_dim, end = row.position + 1;
    const int64_t start = layer.window && end > layer.window ? end - layer.window : 0;
    const int64_t head = features * HB_KEY_BLOCK, block = layer.kv_heads * head;
    const T *keys = static_cast<const T*>(layer.keys) + kv * head,
            *values = static_cast<const T*>(layer.values) + kv * head;
    for (int64_t b = start / HB_KEY_BLOCK; b < divide_up(end, HB_KEY_BLOCK); ++b)
        score_keys(keys + row.blocks[b] * block, queries, heads, features, 0, 1, scores + b * HB_KEY_BLOCK, stride);
    for (int64_t h = 0; h < heads; ++h) {
        float* weights = scores + h * stride;
        softmax(weights + start, end - start);
        mix_blocks(values, block, row.blocks, weights, start, end, features, out + h * features);
    }
}

// Tokens of several sequences through all layers, in one parallel region: csrc/token_step.inl for many rows, caches in
// blocks, and an adapter for each row. What a row gives depends on its sequence and its adapter alone, to the bit: every
// sum is taken by one thread in an order that neither the other rows nor the number of threads change.

// Runs `body` with a zero of the type that A and B are kept in.
template <class Body>
inline void with_low_rank_type(const hb_low_rank& low, Body body) {
    return low.dtype == HB_BF16 ? body(bf16()) : body(float());
}

struct BatchSizes {
    int64_t input, ordered, qkv, gate_up, low_rank, queries, scores;
    int64_t row, own;  // floats of a row; of a thread
};

inline int64_t rank_of(const hb_low_rank* group, int count) {
    int64_t rank = 0;
    for (int i = 0; i < count; ++i) rank += group[i].rank;
    return rank;
}

inline BatchSizes sizes_of(const hb_decoder& decoder, const hb_batch& batch) {
    BatchSizes s = {};
    s.input = decoder.hidden_size;
    for (int64_t i = 0; i < decoder.num_layers; ++i) {
        const hb_layer& layer = decoder.layers[i];
        s.input = at_least(s.input, at_least(layer.o.cols, layer.down.cols));
        s.qkv = at_least(s.qkv, rows_in(layer.qkv, layer.num_qkv));
        s.gate_up = at_least(s.gate_up, rows_in(layer.gate_up, layer.num_gate_up));
        s.queries = at_least(s.queries, int64_t(layer.heads / layer.kv_heads));
    }
    int64_t longest = 0;
    for (int64_t r = 0; r < batch.count; ++r) {
        longest = at_least(longest, batch.rows[r].position + 1);
        const hb_low_rank* adapter = batch.rows[r].adapter;
        for (int64_t i = 0; adapter && i < decoder.num_layers; ++i, adapter += HB_ADAPTED) {
            s.low_rank = at_least(s.low_rank, at_least(rank_of(adapter, 3), rank_of(adapter + HB_GATE, 2)));
            s.low_rank = at_least(s.low_rank, at_least(adapter[HB_O].rank, adapter[HB_DOWN].rank));
        }
    }
    s.input = divide_up(s.input, 16) * 16 + 16;  // not a power of two: rows would share a cache set
    s.ordered = divide_up(length_for(s.input), 16) * 16 + 16;
    s.scores = divide_up(longest, HB_KEY_BLOCK) * HB_KEY_BLOCK + HB_KEY_BLOCK;
    s.row = 2 * decoder.hidden_size + s.input + s.ordered + s.qkv + s.gate_up + s.low_rank;
    s.own = decoder.hidden_size + s.queries * s.scores + 1024;  // a page between threads keeps their lines apart
    return s;
}

struct BatchShared {
    float *x, *delta, *plain, *ordered, *qkv, *gate_up,
        *low_rank;  // x: the residual; plain, ordered: a product's input
    Barrier barrier;
};

class BatchStep {
  public:
    BatchStep(const hb_decoder& decoder, const hb_batch& batch, const BatchSizes& sizes, BatchShared& shared,
              float* own, int number, int threads)
        : decoder_(decoder),
          batch_(batch),
          sizes_(sizes),
          shared_(shared),
          delta_(own),
          scores_(own + decoder.hidden_size),
          number_(number),
          threads_(threads),
          mine_(share(batch.count, 1, number, threads)) {}

    void run() {
        const int64_t n = decoder_.hidden_size;
        for (int64_t r = mine_.first; r < mine_.last; ++r)
            __builtin_memcpy(shared_.x + r * n, batch_.x + r * n, size_t(n) * 4);
        for (int64_t i = 0; i < decoder_.num_layers; ++i) run_layer(i);
        wait();
        const RowSpan logits = share(batch_.num_wanted, 1, number_, threads_);
        normalize(decoder_.final_norm, logits, batch_.wanted);
        order(&decoder_.head, 1, logits);
        wait();
        product(&decoder_.head, 1, nullptr, 0, batch_.num_wanted, batch_.logits);
    }

  private:
    void run_layer(int64_t index) {
        const hb_layer& layer = decoder_.layers[index];
        normalize(layer.input_norm, mine_, nullptr);
        multiply(layer.qkv, layer.num_qkv, index, HB_QKV, shared_.qkv);
        if (layer.cache_dtype == HB_BF16)
            attention<bf16>(layer);
        else
            attention<float>(layer);
        multiply(&layer.o, 1, index, HB_O, shared_.delta);
        add_delta(layer.post_attention_norm);
        normalize(layer.mlp_norm, mine_, nullptr);
        multiply(layer.gate_up, layer.num_gate_up, index, HB_GATE, shared_.gate_up);
        gate(layer);
        multiply(&layer.down, 1, index, HB_DOWN, shared_.delta);
        add_delta(layer.post_mlp_norm);
    }

    float* plain(int64_t row) { return shared_.plain + row * sizes_.input; }

    // Rows [rows] of `plain`, from those of the residual that `from` names, or the same.
    void normalize(const hb_norm& norm, RowSpan rows, const int64_t* from) {
        const int64_t n = decoder_.hidden_size;
        for (int64_t r = rows.first; r < rows.last; ++r)
            norm_row(shared_.x + (from ? from[r] : r) * n, norm.scale, n, norm.eps, plain(r));
    }

    void add_delta(const hb_norm& norm) {
        const int64_t n = decoder_.hidden_size;
        for (int64_t r = mine_.first; r < mine_.last; ++r) {
            float* x = shared_.x + r * n;
            const float* delta = shared_.delta + r * n;
            if (norm.scale) {
                norm_row(delta, norm.scale, n, norm.eps, delta_);
                delta = delta_;
            }
            for_lanes(
                n, [=](int64_t i, auto lanes) { lanes.store(x + i, vadd(lanes.load(x + i), lanes.load(delta + i))); });
        }
    }

    void gate(const hb_layer& layer) {
        const int64_t width = layer.down.cols;
        for (int64_t r = mine_.first; r < mine_.last; ++r) {
            const float *gate = shared_.gate_up + r * 2 * width, *up = gate + width;
            if (layer.activation == HB_SILU)
                gate_row<Silu>(gate, up, width, plain(r));
            else
                gate_row<GeluTanh>(gate, up, width, plain(r));
        }
    }

    // ---- products: y(rows, all rows of the group) of `plain`, whose own rows this thread has filled ----

    void multiply(const hb_matrix* group, int count, int64_t layer, int place, float* y) {
        const int64_t slot = layer * HB_ADAPTED + place;
        order(group, count, mine_);
        wait();
        if (sizes_.low_rank) {
            low_rank(group[0].cols, count, slot);
            wait();
        }
        product(group, count, batch_.rows, slot, batch_.count, y);
        wait();
    }

    void order(const hb_matrix* group, int count, RowSpan rows) {
        for (int64_t r = rows.first; r < rows.last; ++r)
            order_for(group, count, plain(r), shared_.ordered + r * sizes_.ordered);
    }

    // The end of the rows from `row` on that share an adapter.
    int64_t run_end(int64_t row) const {
        int64_t end = row + 1;
        while (end < batch_.count && batch_.rows[end].adapter == batch_.rows[row].adapter) ++end;
        return end;
    }

    // scaling A x of all rows and their adapters, those of a group side by side.
    void low_rank(int64_t cols, int count, int64_t slot) {
        int64_t total = 0, at = 0;
        for (int64_t row = 0; row < batch_.count; row = run_end(row))
            if (batch_.rows[row].adapter) total += rank_of(batch_.rows[row].adapter + slot, count);
        const RowSpan part = share(total, 1, number_, threads_);
        for (int64_t row = 0; row < batch_.count; row = run_end(row)) {
            if (!batch_.rows[row].adapter) continue;
            int64_t column = 0;
            for (const hb_low_rank* low = batch_.rows[row].adapter + slot;
                 low < batch_.rows[row].adapter + slot + count; ++low) {
                const int64_t first = at_least(part.first - at, 0), last = at_most(part.last - at, low->rank);
                with_low_rank_type(*low, [&](auto number) {
                    const auto* a = static_cast<const decltype(number)*>(low->A);
                    for (int64_t r = first; r < last; ++r) dots(a + r * cols, cols, row, column + r, low->scaling);
                });
                at += low->rank, column += low->rank;
            }
        }
    }

    // One row of A times the rows from `row` on that share the adapter.
    template <class T>
    void dots(const T* a, int64_t cols, int64_t row, int64_t column, float scaling) {
        const int64_t end = run_end(row);
        for (; row < end; row += few_rows)
            with_count<few_rows>(end - row, [&](auto n) {
                constexpr int M = decltype(n)::value;
                float sums[M] = {};
                add_dots<M, 2>(a, cols, cols, plain(row), sizes_.input, sums);
                for (int m = 0; m < M; ++m) shared_.low_rank[(row + m) * sizes_.low_rank + column] = scaling * sums[m];
            });
    }

    // `rows`: whose adapters are added, or NULL.
    void product(const hb_matrix* group, int count, const hb_row* rows, int64_t slot, int64_t m, float* y) {
        const int64_t stride = rows_in(group, count);
        for (int i = 0; i < count; y += group[i++].rows) {
            const RowSpan part = share(group[i].rows, 16, number_, threads_);
            for (int64_t first = part.first; first < part.last; first += dot_rows_at_once) {
                const int64_t last = at_most(first + dot_rows_at_once, part.last);
                for (int64_t r = 0; r < m; r += few_rows)
                    with_count<few_rows>(m - r, [&](auto n) {
                        matrix_rows<decltype(n)::value>(group[i], first, last, r, y + r * stride, stride);
                    });
                if (group[i].bias)
                    for (int64_t r = 0; r < m; ++r)
                        for (int64_t row = first; row < last; ++row) y[r * stride + row] += group[i].bias[row];
                for (int64_t r = 0; rows && r < m; ++r)
                    if (rows[r].adapter) add_update(rows[r].adapter + slot, i, r, first, last, y + r * stride);
            }
        }
    }

    template <int M>
    void matrix_rows(const hb_matrix& w, int64_t first, int64_t last, int64_t r, float* y, int64_t stride) {
        if (w.w4) {
            const Decoder decoder(w.w4->codebook);
            return dot_few<M>(*w.w4, decoder, first, last, shared_.ordered + r * sizes_.ordered, sizes_.ordered, y,
                              stride);
        }
        constexpr int64_t part = dot_floats / few_rows / HB_INT8_BLOCK * HB_INT8_BLOCK;
        const Stored stored = {w.dense, w.scales, w.dtype, w.rows, w.cols};
        with_stored_type(w.dtype, [=](auto number) {
            for (int64_t row = first; row < last; ++row) {
                float sums[M] = {};
                for (int64_t k = 0; k < w.cols; k += part)
                    add_dots<M, 2>(stored.part(number, row, k), at_most(part, w.cols - k), w.cols, plain(r) + k,
                                   sizes_.input, sums);
                for (int m = 0; m < M; ++m) y[m * stride + row] = sums[m];
            }
        });
    }

    // y[first, last), at most a block, += B u, for matrix `i` of a group of adapters.
    void add_update(const hb_low_rank* group, int i, int64_t row, int64_t first, int64_t last, float* y) {
        const hb_low_rank& low = group[i];
        if (!low.rank) return;
        const float* u = shared_.low_rank + row * sizes_.low_rank + rank_of(group, i);
        float sums[16] = {};
        for (int64_t k = first; k < last; ++k) sums[k - first] = y[k];
        with_low_rank_type(low, [&](auto number) {
            const auto* b = static_cast<const decltype(number)*>(low.B) + first * low.rank;
            for (int64_t v = 0; v < 16; v += vec_width) {
                vec sum = vload(sums + v);
                for (int64_t r = 0; r < low.rank; ++r) sum = vfma(vbroadcast(u + r), vload(b + r * 16 + v), sum);
                vstore(sums + v, sum);
            }
        });
        for (int64_t k = first; k < last; ++k) y[k] = sums[k - first];
    }

    // ---- attention ----

    template <class T>
    void attention(const hb_layer& layer) {
        const int64_t width = rows_in(layer.qkv, layer.num_qkv), heads = layer.heads, features = layer.head_dim;
        const RowSpan stored = share(batch_.count * layer.kv_heads, 1, number_, threads_);
        for (int64_t at = stored.first; at < stored.last; ++at)
            store_head<T>(layer, batch_.rows[at / layer.kv_heads], at % layer.kv_heads,
                          shared_.qkv + at / layer.kv_heads * width);
        wait();  // a row may attend to another one of this batch
        const RowSpan mine = share(batch_.count * heads, 1, number_, threads_);
        for (int64_t at = mine.first; at < mine.last;) {
            const int64_t row = at / heads, head = at % heads, group = heads / layer.kv_heads;
            const int64_t count = at_most(at_most((head / group + 1) * group - head, mine.last - at), heads - head);
            attend_blocks<T>(layer, batch_.rows[row], head / group, count, shared_.qkv + row * width + head * features,
                             scores_, sizes_.scores, plain(row) + head * features);
            at += count;
        }
        wait();
    }

    void wait() { wait_for_all(shared_.barrier, threads_); }

    const hb_decoder& decoder_;
    const hb_batch& batch_;
    const BatchSizes& sizes_;
    BatchShared& shared_;
    float *delta_, *scores_;
    const int number_, threads_;
    const RowSpan mine_;
};

int batch_step(const hb_decoder* decoder, const hb_batch* batch, int threads) {
    const BatchSizes sizes = sizes_of(*decoder, *batch);
    const int64_t m = batch->count;
    if (threads < 1) threads = 1;
    float* workspace = static_cast<float*>(hb_workspace_take((m * sizes.row + threads * sizes.own) * 4));
    if (!workspace) return HB_NO_MEMORY;
    BatchShared shared;
    shared.x = workspace;
    shared.delta = shared.x + m * decoder->hidden_size;
    shared.plain = shared.delta + m * decoder->hidden_size;
    shared.ordered = shared.plain + m * sizes.input;
    shared.qkv = shared.ordered + m * sizes.ordered;
    shared.gate_up = shared.qkv + m * sizes.qkv;
    shared.low_rank = shared.gate_up + m * sizes.gate_up;
    float* own = workspace + m * sizes.row;
#pragma omp parallel num_threads(threads)
    {
        const int number = thread_number();
        BatchStep(*decoder, *batch, sizes, shared, own + number * sizes.own, number, team_size()).run();
    }
    hb_workspace_give(workspace);
    return HB_OK;
}

// One token through all layers, in one parallel region. Every stage splits its rows among the threads; what is short
// (norms, residual sums) each thread computes for itself, so that a layer needs five barriers, up to eight with an adapter.
// No result depends on the number of threads: each row is summed by one thread, in one order.

struct StepShared {
    float *qkv, *attended, *delta, *gate_up, *low_rank;
    Barrier barrier;
};

struct StepOwn {
    float *x, *y, *ordered;  // the residual; the input of a product, as it is and in the order of dot_few
    AttendScratch attention;
};

struct RowSpan {
    int64_t first, last;
};

// This thread's part of n, in units.
inline RowSpan share(int64_t n, int64_t unit, int number, int threads) {
    const int64_t units = divide_up(n, unit);
    return {at_most(units * number / threads * unit, n), at_most(units * (number + 1) / threads * unit, n)};
}

struct StepSizes {
    int64_t input, ordered, qkv, attended, gate_up, low_rank, queries;
    int64_t shared, own;  // floats of each
};

inline void take_group(StepSizes& s, const hb_matrix* group, int count) {
    int64_t rank = 0;
    for (int i = 0; i < count; ++i) {
        s.input = at_least(s.input, group[i].cols);
        rank += group[i].rank;
    }
    s.low_rank = at_least(s.low_rank, rank);
}

inline int64_t rows_in(const hb_matrix* group, int count) {
    int64_t rows = 0;
    for (int i = 0; i < count; ++i) rows += group[i].rows;
    return rows;
}

inline StepSizes sizes_of(const hb_decoder& decoder) {
    StepSizes s = {};
    take_group(s, &decoder.head, 1);
    for (int64_t i = 0; i < decoder.num_layers; ++i) {
        const hb_layer& layer = decoder.layers[i];
        take_group(s, layer.qkv, layer.num_qkv);
        take_group(s, layer.gate_up, layer.num_gate_up);
        take_group(s, &layer.o, 1);
        take_group(s, &layer.down, 1);
        s.qkv = at_least(s.qkv, rows_in(layer.qkv, layer.num_qkv));
        s.gate_up = at_least(s.gate_up, rows_in(layer.gate_up, layer.num_gate_up));
        s.attended = at_least(s.attended, int64_t(layer.heads) * layer.head_dim);
        s.queries = at_least(s.queries, int64_t(layer.heads / layer.kv_heads));
    }
    int64_t* const sizes[] = {&s.input, &s.qkv, &s.gate_up, &s.attended, &s.low_rank};
    for (int64_t* size : sizes) *size = divide_up(*size, 16) * 16;
    s.ordered = divide_up(length_for(s.input), 16) * 16 + 16;
    s.shared = s.qkv + s.attended + decoder.hidden_size + s.gate_up + s.low_rank;
    // A head's features are counted in s.attended; a page between threads keeps their lines apart.
    s.own = decoder.hidden_size + s.input + s.ordered + 2 * s.attended + s.queries * (decoder.capacity + HB_KEY_BLOCK) +
            1024;
    return s;
}

class Step {
  public:
    Step(const hb_decoder& decoder, int64_t position, const StepSizes& sizes, StepShared& shared, float* own,
         int number, int threads)
        : decoder_(decoder), position_(position), shared_(shared), number_(number), threads_(threads) {
        own_.x = own;
        own_.y = own_.x + decoder.hidden_size;
        own_.ordered = own_.y + sizes.input;
        own_.attention.query = own_.ordered + sizes.ordered;
        own_.attention.key = own_.attention.query + sizes.attended;
        own_.attention.scores = own_.attention.key + sizes.attended;
    }

    void run(const float* x, float* logits) {
        const int64_t n = decoder_.hidden_size;
        for (int64_t i = 0; i < n; ++i) own_.x[i] = x[i];
        for (int64_t i = 0; i < decoder_.num_layers; ++i) run_layer(decoder_.layers[i]);
        normalize(decoder_.final_norm);
        product(&decoder_.head, 1, own_.y, share(decoder_.head.rows, 16, number_, threads_), logits);
    }

  private:
    void run_layer(const hb_layer& layer) {
        const int64_t n = decoder_.hidden_size;
        normalize(layer.input_norm);
        product(layer.qkv, layer.num_qkv, own_.y, share(rows_in(layer.qkv, layer.num_qkv), 16, number_, threads_),
                shared_.qkv);
        wait();
        const RowSpan heads = share(layer.heads, 1, number_, threads_);
        if (layer.cache_dtype == HB_BF16)
            attend<bf16>(layer, position_, decoder_.capacity, shared_.qkv, heads.first, heads.last, own_.attention,
                         shared_.attended);
        else
            attend<float>(layer, position_, decoder_.capacity, shared_.qkv, heads.first, heads.last, own_.attention,
                          shared_.attended);
        wait();
        product(&layer.o, 1, shared_.attended, share(n, 16, number_, threads_), shared_.delta);
        wait();
        add_delta(layer.post_attention_norm);
        normalize(layer.mlp_norm);
        gated_product(layer);
        wait();
        product(&layer.down, 1, shared_.gate_up, share(n, 16, number_, threads_), shared_.delta);
        wait();
        add_delta(layer.post_mlp_norm);
    }

    void normalize(const hb_norm& norm) { norm_row(own_.x, norm.scale, decoder_.hidden_size, norm.eps, own_.y); }

    void gated_product(const hb_layer& layer) {
        const int64_t width = layer.down.cols;
        const RowSpan part = share(width, 16, number_, threads_);
        const Input input = prepare(layer.gate_up, layer.num_gate_up, own_.y);
        rows(layer.gate_up, layer.num_gate_up, input, part, shared_.gate_up);
        rows(layer.gate_up, layer.num_gate_up, input, {width + part.first, width + part.last}, shared_.gate_up);
        float *gate = shared_.gate_up + part.first, *up = gate + width;
        if (layer.activation == HB_SILU)
            gate_row<Silu>(gate, up, part.last - part.first, gate);
        else
            gate_row<GeluTanh>(gate, up, part.last - part.first, gate);
    }

    void add_delta(const hb_norm& norm) {
        float* x = own_.x;
        const float* delta = shared_.delta;
        if (norm.scale) {
            norm_row(delta, norm.scale, decoder_.hidden_size, norm.eps, own_.y);
            delta = own_.y;
        }
        for_lanes(decoder_.hidden_size,
                  [=](int64_t i, auto lanes) { lanes.store(x + i, vadd(lanes.load(x + i), lanes.load(delta + i))); });
    }

    struct Input {
        const float *plain, *ordered;
    };

    // Matrices side by side with one input; their low-rank products A x into shared_.low_rank.
    Input prepare(const hb_matrix* group, int count, const float* x) {
        int64_t rank = 0;
        for (int i = 0; i < count; ++i) {
            rank += group[i].rank;
        }
        if (rank) {
            const RowSpan part = share(rank, 1, number_, threads_);
            int64_t start = 0;
            for (int i = 0; i < count; start += group[i++].rank)
                for (int64_t r = at_least(part.first - start, 0); r < at_most(part.last - start, group[i].rank); ++r)
                    dot_stored<1>(group[i].lora_A + r * group[i].cols, group[i].cols, x, shared_.low_rank + start + r);
            wait();
        }
        order_for(group, count, x, own_.ordered);
        return {x, own_.ordered};
    }

    void product(const hb_matrix* group, int count, const float* x, RowSpan part, float* y) {
        rows(group, count, prepare(group, count, x), part, y);
    }

    // y[part] of the matrices side by side.
    void rows(const hb_matrix* group, int count, const Input& input, RowSpan part, float* y) {
        int64_t start = 0, rank = 0;
        for (int i = 0; i < count; ++i) {
            const hb_matrix& m = group[i];
            const int64_t first = at_least(part.first - start, 0), last = at_most(part.last - start, m.rows);
            if (first < last) matrix_rows(m, input, first, last, y + start);
            for (int64_t r = first; m.bias && r < last; ++r) y[start + r] += m.bias[r];
            for (int64_t r = first; m.rank && r < last; ++r) {
                float update;
                dot_stored<1>(m.lora_B + r * m.rank, m.rank, shared_.low_rank + rank, &update);
                y[start + r] += m.scaling * update;
            }
            start += m.rows;
            rank += m.rank;
        }
    }

    static void matrix_rows(const hb_matrix& m, const Input& input, int64_t first, int64_t last, float* y) {
        if (m.w4) {
            dot_few<1>(*m.w4, Decoder(m.w4->codebook), first, last, input.ordered, 0, y, 0);
        } else {
            const Stored w = {m.dense, m.scales, m.dtype, m.rows, m.cols};
            with_stored_type(m.dtype, [=](auto number) {
                for (int64_t r = first; r < last; ++r) dot_stored<1>(w.part(number, r, 0), m.cols, input.plain, y + r);
            });
        }
    }

    void wait() { wait_for_all(shared_.barrier, threads_); }

    const hb_decoder& decoder_;
    const int64_t position_;
    StepShared& shared_;
    StepOwn own_;
    const int number_, threads_;
};

int token_step(const hb_decoder* decoder, int64_t position, const float* x, float* logits, int threads) {
    const StepSizes sizes = sizes_of(*decoder);
    if (threads < 1) threads = 1;
    float* workspace = static_cast<float*>(hb_workspace_take((sizes.shared + threads * sizes.own) * 4));
    if (!workspace) return HB_NO_MEMORY;
    StepShared shared;
    shared.qkv = workspace;
    shared.attended = shared.qkv + sizes.qkv;
    shared.delta = shared.attended + sizes.attended;
    shared.gate_up = shared.delta + decoder->hidden_size;
    shared.low_rank = shared.gate_up + sizes.gate_up;
    float* own = workspace + sizes.shared;
#pragma omp parallel num_threads(threads)
    {
        const int number = thread_number();
        Step(*decoder, position, sizes, shared, own + number * sizes.own, number, team_size()).run(x, logits);
    }
    hb_workspace_give(workspace);
    return HB_OK;
}

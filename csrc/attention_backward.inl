// Attention backward: a task goes through blocks of rows of one sequence and key head, and through the keys of each,
// recomputing their scores. It writes its rows' dq itself, and adds to sums of dk and dv that are its own. Sequences with
// much of the work are split into several such tasks; how, depends on the shapes alone, and the last pass adds their
// sums in order: the result does not depend on the number of threads.

constexpr int64_t backward_keys = 48;  // of a block
constexpr int64_t block_rows_of_queries = 64;
constexpr int64_t score_stride = block_rows_of_queries + 16;  // an odd number of cache lines
constexpr int64_t attention_tasks = 16;                       // to split the work into, where there is enough
constexpr int64_t task_scores = 1 << 18;                      // that make splitting worth its sums

typedef Rows<block_rows_of_queries> BlockRows;

struct Scratch {                             // of one thread
    float *q, *g;                            // [row][stride]: scale * q, and the gradient of out
    float *turned_q, *turned_g, *turned_dq;  // [panel][dim][panel_width]
    float *p, *ds;                           // [key][score_stride]
    float *lse, *delta;                      // [row]

    static int64_t floats(const Heads& h) {
        return block_rows_of_queries * (2 * h.stride + 3 * h.dim + 2) + 2 * backward_keys * score_stride;
    }
    Scratch(const Heads& h, float* memory) {
        const auto take = [&](int64_t n) { return memory += n, memory - n; };
        q = take(block_rows_of_queries * h.stride), g = take(block_rows_of_queries * h.stride);
        turned_q = take(block_rows_of_queries * h.dim), turned_g = take(block_rows_of_queries * h.dim);
        turned_dq = take(block_rows_of_queries * h.dim);
        p = take(backward_keys * score_stride), ds = take(backward_keys * score_stride);
        lse = take(block_rows_of_queries), delta = take(block_rows_of_queries);
    }
};

// The keys and values that one sequence sees of one head, packed, and a task's sums.
struct Keys {
    const float *turned_k, *turned_v, *k;  // [dim][keys] in blocks, and [key][stride]
    float *dk, *dv;                        // [key][stride]
};

template <class T>
struct Gradient {  // one call's tensors
    const T *g, *out;
    const float* lse;
    T* dqkv;
};

template <class T>
void load_rows(const Heads& h, const Gradient<T>& t, const BlockRows& rows, const Scratch& w) {
    const T* qkv = static_cast<const T*>(h.p.qkv);
    const int64_t used = divide_up(rows.count, panel_width) * panel_width;
    for (int64_t i = 0; i < used; ++i) {
        float *q = w.q + i * h.stride, *g = w.g + i * h.stride;
        if (i >= rows.count) {  // contributes nothing: its scores are e^-inf
            __builtin_memset(q, 0, size_t(h.stride) * 4), __builtin_memset(g, 0, size_t(h.stride) * 4);
            w.lse[i] = 1e30f, w.delta[i] = 0.0f;
            continue;
        }
        const int64_t at = (rows.token[i] * h.p.heads + rows.head[i]) * h.dim;
        copy_row(qkv + rows.token[i] * h.row + rows.head[i] * h.dim, h.dim, h.p.scale, q);
        copy_row(t.g + at, h.dim, 1.0f, g);
        for (int64_t d = h.dim; d < h.stride; ++d) q[d] = g[d] = 0.0f;
        w.lse[i] = t.lse[rows.head[i] * h.p.tokens + rows.token[i]];
        w.delta[i] = sum_lanes(h.dim, [=, &t](int64_t d, auto lanes, vec sum) {
            return vfma(lanes.load(t.g + at + d), lanes.load(t.out + at + d), sum);
        });
    }
    for (int64_t i = 0; i < used; i += 8) {
        const int64_t to = i / panel_width * panel_width * h.dim + i % panel_width;
        const float *q[8], *g[8];
        for (int64_t r = 0; r < 8; ++r) q[r] = w.q + (i + r) * h.stride, g[r] = w.g + (i + r) * h.stride;
        turn_rows(q, h.dim, 1.0f, w.turned_q + to, panel_width);
        turn_rows(g, h.dim, 1.0f, w.turned_g + to, panel_width);
    }
    __builtin_memset(w.turned_dq, 0, size_t(used * h.dim) * 4);
}

// The panel of rows from i on and keys [low, high) of the block at `block`: p, ds, and what they add to dq.
inline void panel_scores(const Heads& h, const BlockRows& rows, int64_t i, int64_t block, int64_t low, int64_t high,
                         const Turned& at, const Keys& keys, const Scratch& w) {
    float *p = w.p + (low - block) * score_stride + i, *ds = w.ds + (low - block) * score_stride + i;
    const float *q = w.turned_q + i * h.dim, *g = w.turned_g + i * h.dim, *lse = w.lse + i, *delta = w.delta + i;
    for_tiles(high - low, [=, &h](int64_t j, auto tile) {
        multiply<tile.rows, 1>(keys.turned_k + at.offset + j, at.stride, q, panel_width, h.dim, p + j * score_stride,
                               score_stride,
                               [=](vec sum, int64_t, int64_t c) { return vexp_term(vsub(sum, vload(lse + c))); });
    });
    hide(h, rows, i, low, high, 0.0f, p, score_stride);
    for_tiles(high - low, [=, &h](int64_t j, auto tile) {
        const float* weight = p + j * score_stride;
        multiply<tile.rows, 1>(keys.turned_v + at.offset + j, at.stride, g, panel_width, h.dim, ds + j * score_stride,
                               score_stride, [=](vec sum, int64_t r, int64_t c) {
                                   return vmul(vload(weight + r * score_stride + c), vsub(sum, vload(delta + c)));
                               });
    });
    for_tiles(h.dim, [=, &h](int64_t d, auto tile) {
        float* c = w.turned_dq + (i * h.dim + d * panel_width);
        multiply<tile.rows, 1>(
            keys.k + low * h.stride + d, h.stride, ds, score_stride, high - low, c, panel_width,
            [=](vec sum, int64_t r, int64_t j) { return vadd(vload(c + r * panel_width + j), sum); });
    });
}

// sums[key][stride] += scores[key][rows] times x[row][stride], all columns of a head.
inline void add_turned(const Heads& h, const float* scores, const float* x, int64_t keys, int64_t rows, float* sums) {
    for_tiles(keys, [=, &h](int64_t j, auto tile) {
        for (int64_t d = 0; d < h.dim; d += panel_width) {
            float* c = sums + j * h.stride + d;
            multiply<tile.rows, score_stride>(
                scores + j * score_stride, 1, x + d, h.stride, rows, c, h.stride,
                [=, &h](vec sum, int64_t r, int64_t k) { return vadd(vload(c + r * h.stride + k), sum); });
        }
    });
}

template <class T>
void block_gradients(const Heads& h, const Gradient<T>& t, int64_t s, int64_t kv_head, int64_t first, const Keys& keys,
                     const Scratch& w) {
    const BlockRows rows(h, s, kv_head, first);
    load_rows(h, t, rows, w);
    const int64_t used = divide_up(rows.count, panel_width) * panel_width;
    const int64_t begin = keys_of(h, rows, 0).low, end = keys_of(h, rows, used - panel_width).high;
    for (int64_t block = begin / backward_keys * backward_keys; block < end; block += backward_keys) {
        const auto seen = [&](int64_t i) {
            const Range all = keys_of(h, rows, i);
            return Range{at_least(all.low, block), at_most(all.high, block + backward_keys)};
        };
        for (int64_t i = 0; i < used; i += panel_width) {
            const Range r = seen(i);
            if (r.low >= r.high) continue;
            const Turned at = turned(h, h.padded(s), r.low, backward_keys);
            panel_scores(h, rows, i, block, r.low, r.high, at, keys, w);
        }
        for (int64_t i = 0, next; i < used; i = next) {  // panels that see the same keys go together
            const Range r = seen(i);
            for (next = i + panel_width; next < used && seen(next) == r;) next += panel_width;
            if (r.low >= r.high) continue;
            const int64_t scores = (r.low - block) * score_stride + i, x = i * h.stride, sums = r.low * h.stride;
            add_turned(h, w.p + scores, w.g + x, r.high - r.low, next - i, keys.dv + sums);
            add_turned(h, w.ds + scores, w.q + x, r.high - r.low, next - i, keys.dk + sums);
        }
    }
    float factors[panel_width];
    for (float& factor : factors) factor = h.p.scale;
    for (int64_t i = 0; i < used; i += panel_width)
        turn_back(h, rows, i, w.turned_dq + i * h.dim, factors, t.dqkv, h.row);
}

// How the work is split, from the shapes alone.
struct Split {
    int64_t most;   // tasks of one sequence and key head
    double scores;  // of all sequences of one key head

    explicit Split(const Heads& h, int64_t fixed_floats, int64_t sum_floats) : most(1), scores(0) {
        for (int64_t s = 0; s < h.p.sequences; ++s) scores += scores_of(h, s);
        const int64_t fitting = (attention_bytes / 4 - fixed_floats) / at_least(sum_floats, 1);
        for (int64_t s = 0; s < h.p.sequences; ++s) most = at_least(most, wanted(h, s));
        most = at_least(at_most(most, fitting), 1);
    }
    static double scores_of(const Heads& h, int64_t s) {
        const double n = double(h.length(s)), before = double(h.offset(s)), window = double(h.p.window);
        return n * double(h.group) * (window > 0 && window < before + n ? window : before + n / 2);
    }
    int64_t wanted(const Heads& h, int64_t s) const {
        const double mine = scores_of(h, s), share = mine * attention_tasks / (scores * double(h.p.kv_heads));
        return 1 + int64_t(share < mine / task_scores ? share : mine / task_scores);
    }
    int64_t tasks(const Heads& h, int64_t s) const { return at_most(wanted(h, s), most); }
};

// One key head's packed keys and values, and the sums of its tasks.
struct HeadMemory {
    float *turned_k, *turned_v, *k, *sums;
    int64_t sum_floats;

    static int64_t fixed(const Heads& h) { return h.slots * (2 * h.dim + h.stride); }
    HeadMemory(const Heads& h, float* memory) {
        turned_k = memory, turned_v = turned_k + h.slots * h.dim, k = turned_v + h.slots * h.dim;
        sums = k + h.slots * h.stride, sum_floats = h.slots * h.stride;
    }
    float* dk(int64_t part) const { return sums + 2 * part * sum_floats; }
    float* dv(int64_t part) const { return sums + (2 * part + 1) * sum_floats; }
};

// Task `part` of `parts` of a sequence and head: every parts-th block of rows, so that all have as much to do.
template <class T>
void part_gradients(const Heads& h, const Gradient<T>& t, int64_t s, int64_t kv_head, int64_t part, int64_t parts,
                    const HeadMemory& m, const Scratch& w) {
    const int64_t turned = h.slot(s) * h.dim, line = h.slot(s) * h.stride, floats = h.padded(s) * h.stride;
    const Keys keys = {m.turned_k + turned, m.turned_v + turned, m.k + line, m.dk(part) + line, m.dv(part) + line};
    __builtin_memset(keys.dk, 0, size_t(floats) * 4), __builtin_memset(keys.dv, 0, size_t(floats) * 4);
    const int64_t step = parts * block_rows_of_queries;
    for (int64_t first = part * block_rows_of_queries; first < h.length(s) * h.group; first += step)
        block_gradients(h, t, s, kv_head, first, keys, w);
}

// dk and dv of a sequence's own among eight keys: the sums of its tasks, and of those of all that goes on from it.
template <class T>
void write_keys(const Heads& h, const Split& split, int64_t s, int64_t key, int64_t kv_head, const HeadMemory& m,
                T* dqkv) {
    const int64_t first = at_least(key, h.offset(s)), count = at_most(key + 8, h.keys(s)) - first;
    if (count <= 0) return;
    const int64_t own = (h.slot(s) + first) * h.stride, end = h.end_of_family(s);
    for (int64_t member = s; member < end; ++member) {
        const int64_t line = (h.slot(member) + first) * h.stride, parts = split.tasks(h, member);
        for (int64_t part = member == s; part < parts; ++part)
            for_lanes(count * h.stride, [=, &m](int64_t i, auto lanes) {
                float *dk = m.dk(0) + own + i, *dv = m.dv(0) + own + i;
                lanes.store(dk, vadd(lanes.load(dk), lanes.load(m.dk(part) + line + i)));
                lanes.store(dv, vadd(lanes.load(dv), lanes.load(m.dv(part) + line + i)));
            });
    }
    for (int64_t j = first; j < first + count; ++j) {
        T* dk = dqkv + h.token(s, j) * h.row + (h.p.heads + kv_head) * h.dim;
        copy_row(m.dk(0) + (h.slot(s) + j) * h.stride, h.dim, 1.0f, dk);
        copy_row(m.dv(0) + (h.slot(s) + j) * h.stride, h.dim, 1.0f, dk + h.p.kv_heads * h.dim);
    }
}

template <class T>
int attention_gradients(const hb_packed& packed, const Gradient<T>& t, int threads) {
    const Heads h(packed);
    const Split split(h, HeadMemory::fixed(h), 2 * h.slots * h.stride);
    const int64_t head_floats = HeadMemory::fixed(h) + 2 * split.most * h.slots * h.stride;
    const int64_t wave = heads_at_once(h, head_floats, threads), scratch_floats = Scratch::floats(h);
    const int useful = threads_for(h.p.tokens * h.p.heads * h.dim, threads);
    float* workspace = static_cast<float*>(hb_workspace_take((useful * scratch_floats + wave * head_floats) * 4));
    if (!workspace) return HB_NO_MEMORY;
    float* heads = workspace + useful * scratch_floats;
    const int64_t eights = h.eights.count(), parts = h.p.sequences * split.most;
    for (int64_t begin = 0; begin < h.p.kv_heads; begin += wave) {
        const int64_t count = at_most(wave, h.p.kv_heads - begin);
#pragma omp parallel num_threads(useful)
        {
            const Scratch scratch(h, workspace + thread_number() * scratch_floats);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < count * eights; ++task) {
                const int64_t head = task / eights, eight = task % eights, s = h.eights.sequence_of(eight);
                const int64_t key = (eight - h.eights.first(s)) * 8, k_head = h.p.heads + begin + head;
                const HeadMemory m(h, heads + head * head_floats);
                if (key >= h.keys(s)) continue;
                pack_keys<T>(h, s, key, k_head, backward_keys, m.turned_k, m.k);
                pack_keys<T>(h, s, key, k_head + h.p.kv_heads, backward_keys, m.turned_v, nullptr);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < count * parts; ++task) {
                const int64_t head = task / parts, s = task % parts / split.most, part = task % split.most;
                if (part >= split.tasks(h, s)) continue;
                const HeadMemory m(h, heads + head * head_floats);
                part_gradients(h, t, s, begin + head, part, split.tasks(h, s), m, scratch);
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < count * eights; ++task) {
                const int64_t head = task / eights, eight = task % eights, s = h.eights.sequence_of(eight);
                const HeadMemory m(h, heads + head * head_floats);
                write_keys(h, split, s, (eight - h.eights.first(s)) * 8, begin + head, m, t.dqkv);
            }
        }
    }
    hb_workspace_give(workspace);
    return HB_OK;
}

template <class T>
int gradients_of(const hb_packed& p, const void* g, const void* out, const float* lse, void* dqkv, int threads) {
    const Gradient<T> t = {static_cast<const T*>(g), static_cast<const T*>(out), lse, static_cast<T*>(dqkv)};
    return attention_gradients(p, t, threads);
}

int attention_backward(const hb_packed* p, const void* g, const void* out, const float* lse, void* dqkv, int threads) {
    switch (p->dtype) {
        case HB_BF16: return gradients_of<bf16>(*p, g, out, lse, dqkv, threads);
        case HB_F16: return gradients_of<fp16>(*p, g, out, lse, dqkv, threads);
        default: return gradients_of<float>(*p, g, out, lse, dqkv, threads);
    }
}

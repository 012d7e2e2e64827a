// Attention forward: a task is a panel of rows. It goes through the keys block by block with a running softmax, so that
// nothing it works on is larger than L1 but the packed keys and values themselves.

constexpr int64_t forward_keys = 112;          // of a block
constexpr int64_t attention_bytes = 32 << 20;  // of packed keys and values at a time, more only for one head

struct Softmax {
    vec peak_l = vset(-1e30f), peak_r = vset(-1e30f);  // finite: exp(-inf - peak) is 0 before any key was seen
    vec sum_l = vzero(), sum_r = vzero();

    // scores[keys][panel_width] -> e^(score - peak); what was summed before is to be multiplied with `keep`.
    void add(float* scores, int64_t keys, float* keep) {
        vec a = peak_l, b = peak_r, c = peak_l, d = peak_r;
        for (int64_t j = 0; j < keys * panel_width; j += 2 * panel_width) {
            a = vmax(a, vload(scores + j)), b = vmax(b, vload(scores + j + vec_width));
            c = vmax(c, vload(scores + j + panel_width)), d = vmax(d, vload(scores + j + panel_width + vec_width));
        }
        a = vmax(a, c), b = vmax(b, d);
        const vec keep_l = vexp_term(vsub(peak_l, a)), keep_r = vexp_term(vsub(peak_r, b));
        vec l = vzero(), r = vzero();
        for (int64_t j = 0; j < keys * panel_width; j += panel_width) {
            const vec x = vexp_term(vsub(vload(scores + j), a)), y = vexp_term(vsub(vload(scores + j + vec_width), b));
            vstore(scores + j, x), vstore(scores + j + vec_width, y);
            l = vadd(l, x), r = vadd(r, y);
        }
        peak_l = a, peak_r = b;
        sum_l = vfma(sum_l, keep_l, l), sum_r = vfma(sum_r, keep_r, r);
        vstore(keep, keep_l), vstore(keep + vec_width, keep_r);
    }
};

template <class T>
void attend_panel(const Heads& h, int64_t s, int64_t kv_head, int64_t first, const float* keys, const float* values,
                  float* scratch, T* out, float* lse) {
    const Rows<panel_width> rows(h, s, kv_head, first);
    const T* qkv = static_cast<const T*>(h.p.qkv);
    float *queries = scratch, *sums = queries + h.dim * panel_width, *scores = sums + h.dim * panel_width;
    for (int64_t i = 0; i < panel_width; i += 8) {
        const T* from[8];
        for (int64_t r = 0; r < 8; ++r)
            from[r] = i + r < rows.count ? qkv + rows.token[i + r] * h.row + rows.head[i + r] * h.dim : nullptr;
        turn_rows(from, h.dim, h.p.scale, queries + i, panel_width);
    }
    __builtin_memset(sums, 0, size_t(h.dim * panel_width) * 4);

    Softmax softmax;
    alignas(64) float keep[panel_width];
    const Range seen = keys_of(h, rows, 0);
    for (int64_t block = seen.low / forward_keys * forward_keys; block < seen.high; block += forward_keys) {
        const int64_t low = at_least(seen.low, block), high = at_most(seen.high, block + forward_keys);
        const Turned at = turned(h, h.padded(s), low, forward_keys);
        for_tiles(high - low, [=](int64_t i, auto tile) {
            multiply<tile.rows, 1>(keys + at.offset + i, at.stride, queries, panel_width, h.dim,
                                   scores + i * panel_width, panel_width,
                                   [](vec sum, int64_t, int64_t) { return sum; });
        });
        hide(h, rows, 0, low, high, -__builtin_inff(), scores, panel_width);
        softmax.add(scores, high - low, keep);
        for_tiles(h.dim, [=, &keep](int64_t i, auto tile) {
            float* c = sums + i * panel_width;
            multiply<tile.rows, 1>(values + low * h.stride + i, h.stride, scores, panel_width, high - low, c,
                                   panel_width, [=, &keep](vec sum, int64_t r, int64_t j) {
                                       return vfma(vload(c + r * panel_width + j), vload(keep + j), sum);
                                   });
        });
    }

    alignas(64) float total[panel_width], peak[panel_width];
    vstore(total, softmax.sum_l), vstore(total + vec_width, softmax.sum_r);
    vstore(peak, softmax.peak_l), vstore(peak + vec_width, softmax.peak_r);
    for (int64_t i = 0; i < rows.count; ++i)
        lse[rows.head[i] * h.p.tokens + rows.token[i]] = peak[i] + __builtin_logf(total[i]);
    vstore(total, vdiv(vset(1.0f), softmax.sum_l)), vstore(total + vec_width, vdiv(vset(1.0f), softmax.sum_r));
    turn_back(h, rows, 0, sums, total, out, h.p.heads * h.dim);
}

// Key heads to pack at once: as many as `attention_bytes` hold, and enough for the threads.
inline int64_t heads_at_once(const Heads& h, int64_t floats_per_head, int threads) {
    const int64_t fitting = attention_bytes / 4 / at_least(floats_per_head, 1);
    return at_most(at_least(fitting, at_least(threads, 1)), h.p.kv_heads);
}

template <class T>
int attend(const hb_packed& packed, T* out, float* lse, int threads) {
    const Heads h(packed);
    const int64_t keys_floats = h.slots * h.dim, head_floats = keys_floats + h.slots * h.stride;
    const int64_t wave = heads_at_once(h, head_floats, threads);
    const int64_t scratch_floats = (2 * h.dim + forward_keys) * panel_width;
    const int useful = threads_for(h.p.tokens * h.p.heads * h.dim / 2, threads);
    float* workspace = static_cast<float*>(hb_workspace_take((useful * scratch_floats + wave * head_floats) * 4));
    if (!workspace) return HB_NO_MEMORY;
    float* heads = workspace + useful * scratch_floats;
    const int64_t eights = h.eights.count(), panels = h.panels.count();
    for (int64_t begin = 0; begin < h.p.kv_heads; begin += wave) {
        const int64_t count = at_most(wave, h.p.kv_heads - begin);
#pragma omp parallel num_threads(useful)
        {
            float* scratch = workspace + thread_number() * scratch_floats;
#pragma omp for schedule(static)
            for (int64_t task = 0; task < count * eights; ++task) {
                const int64_t head = task / eights, eight = task % eights, s = h.eights.sequence_of(eight);
                const int64_t key = (eight - h.eights.first(s)) * 8, k_head = h.p.heads + begin + head;
                if (key >= h.keys(s)) continue;
                float* keys = heads + head * head_floats;
                pack_keys<T>(h, s, key, k_head, forward_keys, keys, nullptr);
                pack_keys<T>(h, s, key, k_head + h.p.kv_heads, forward_keys, nullptr, keys + keys_floats);
            }
#pragma omp for schedule(dynamic, 2)
            for (int64_t task = 0; task < count * panels; ++task) {
                const int64_t head = task / panels, panel = task % panels;
                const int64_t s = h.panels.sequence_of(panel), first = (panel - h.panels.first(s)) * panel_width;
                if (first >= h.length(s) * h.group) continue;
                const float* keys = heads + head * head_floats;
                attend_panel(h, s, begin + head, first, keys + h.slot(s) * h.dim,
                             keys + keys_floats + h.slot(s) * h.stride, scratch, out, lse);
            }
        }
    }
    hb_workspace_give(workspace);
    return HB_OK;
}

int attention(const hb_packed* p, void* out, float* lse, int threads) {
    switch (p->dtype) {
        case HB_BF16: return attend(*p, static_cast<bf16*>(out), lse, threads);
        case HB_F16: return attend(*p, static_cast<fp16*>(out), lse, threads);
        default: return attend(*p, static_cast<float*>(out), lse, threads);
    }
}

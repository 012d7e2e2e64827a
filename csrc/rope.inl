// Rotary position embedding in place: in each head, element i turns with element i + rotary_dim / 2.

constexpr int64_t max_rotary_dim = 512;

// One token's factors, shared by all of its heads: low' = low keep + high from_high, high' = high keep' + low from_low.
struct Turn {
    alignas(64) float keep[max_rotary_dim];
    alignas(64) float cross[max_rotary_dim];  // from_high, then from_low
};

template <class C>
inline void turn_of(const C* cos, const C* sin, int64_t rotary_dim, bool inverse, Turn* turn) {
    const int64_t half = rotary_dim / 2;
    for_lanes(rotary_dim, [=](int64_t i, auto lanes) { lanes.store(turn->keep + i, lanes.load(cos + i)); });
    // The inverse is the transposed matrix: the two sines change places, and their signs too.
    const C *low = inverse ? sin + half : sin, *high = inverse ? sin : sin + half;
    const vec sign = vset(inverse ? 1.0f : -1.0f);
    for_lanes(half, [=](int64_t i, auto lanes) {
        lanes.store(turn->cross + i, vmul(sign, lanes.load(low + i)));
        lanes.store(turn->cross + half + i, vmul(vsub(vzero(), sign), lanes.load(high + i)));
    });
}

template <class T>
inline void turn_head(T* head, int64_t half, const Turn& turn) {
    const float *keep = turn.keep, *cross = turn.cross;
    for_lanes(half, [=](int64_t i, auto lanes) {
        const vec low = lanes.load(head + i), high = lanes.load(head + half + i);
        const vec new_low = vfma(high, lanes.load(cross + i), vmul(low, lanes.load(keep + i)));
        const vec new_high = vfma(low, lanes.load(cross + half + i), vmul(high, lanes.load(keep + half + i)));
        lanes.store(head + i, new_low);
        lanes.store(head + half + i, new_high);
    });
}

int rope(void* qkv, int dtype, const void* cos, const void* sin, int angle_dtype, int64_t rows, int64_t width,
         int64_t heads, int64_t head_dim, int64_t rotary_dim, int inverse, int threads) {
    if (rotary_dim > max_rotary_dim) return HB_UNSUPPORTED;
    const int team = threads_for(rows * heads * rotary_dim, threads);
    with_type(dtype, [=](auto type) {
        with_type(angle_dtype, [=](auto angle_type) {
            using T = decltype(type);
            using C = decltype(angle_type);
#pragma omp parallel for schedule(static) num_threads(team)
            for (int64_t r = 0; r < rows; ++r) {
                Turn turn;
                const int64_t angle = r * rotary_dim;
                turn_of(static_cast<const C*>(cos) + angle, static_cast<const C*>(sin) + angle, rotary_dim, inverse,
                        &turn);
                for (int64_t h = 0; h < heads; ++h)
                    turn_head(static_cast<T*>(qkv) + r * width + h * head_dim, rotary_dim / 2, turn);
            }
        });
    });
    return HB_OK;
}

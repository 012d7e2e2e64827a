// The kept buffer of one call, handed out in parts that start on a cache line.
struct Workspace {
    float* base;
    float* next;

    Workspace(int64_t floats, int parts)
        : base(static_cast<float*>(hb_workspace_take((floats + 16 * parts) * 4))), next(base) {}
    ~Workspace() {
        if (base) hb_workspace_give(base);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* take(int64_t floats) {
        float* part = next;
        next += divide_up(floats, 16) * 16;
        return part;
    }
};

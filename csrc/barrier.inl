// A barrier for the threads of one parallel region, hundreds of times a token: libgomp's own goes to the kernel at once
// under OMP_WAIT_POLICY=passive. This one spins for some tens of microseconds, then lets others have the core.

inline void wait_briefly() {
#if defined(HB_X86)
    _mm_pause();
#else
    asm volatile("isb");  // ARM's own hint, yield, does nothing on most cores
#endif
}

struct Barrier {
    int arrived = 0;
    int phase = 0;
};

inline void wait_for_all(Barrier& barrier, int threads) {
    if (threads == 1) return;
    const int phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier.phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
        if (spins < 1000)
            wait_briefly();
        else
            hb_yield();
    }
}

// Memory: page sizes, and a small pool of kept buffers. A fresh 16 MB costs 4000 page faults, several percent of the
// matrix product it serves; kept between calls it costs its bytes (3 MB for products, up to 32 MB for attention's keys).
#include <atomic>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <thread>

#include "table.h"

namespace {

struct Slot {
    std::atomic_flag taken = ATOMIC_FLAG_INIT;
    void* buffer = nullptr;
    int64_t bytes = 0;
};

Slot slots[4];  // calls from more threads at once than this use malloc

void* allocate(int64_t bytes) {
    void* buffer = std::aligned_alloc(4096, size_t((bytes + 4095) / 4096 * 4096));
    if (buffer) hb_prefer_huge_pages(buffer, bytes);
    return buffer;
}

}  // namespace

// Touching a fresh 64 MB in pages of 4 KB takes four times as long as decoding into it. Only whole huge pages inside
// the buffer are asked for, so it grows by nothing; memory touched before stays as it is.
void hb_prefer_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

void* hb_workspace_take(int64_t bytes) {
    for (Slot& slot : slots) {
        if (slot.taken.test_and_set(std::memory_order_acquire)) continue;
        if (slot.bytes < bytes) {
            std::free(slot.buffer);
            slot.buffer = allocate(bytes);
            slot.bytes = slot.buffer ? bytes : 0;
        }
        if (slot.buffer) return slot.buffer;
        slot.taken.clear(std::memory_order_release);
        return nullptr;
    }
    return allocate(bytes);
}

void hb_workspace_give(void* buffer) {
    for (Slot& slot : slots) {
        if (slot.buffer != buffer) continue;
        slot.taken.clear(std::memory_order_release);
        return;
    }
    std::free(buffer);
}

void hb_release_workspace(void) {
    for (Slot& slot : slots) {
        if (slot.taken.test_and_set(std::memory_order_acquire)) continue;
        std::free(slot.buffer);
        slot.buffer = nullptr;
        slot.bytes = 0;
        slot.taken.clear(std::memory_order_release);
    }
}

void hb_yield(void) { std::this_thread::yield(); }

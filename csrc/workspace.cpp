// A small pool of kept buffers. A fresh 16 MB costs 4000 page faults, several percent of the matrix product it serves;
// kept between calls it costs its bytes (16 to 32 MB a process, see linear.inl).
#include <atomic>
#include <cstdlib>
#include <new>

#include "table.h"

namespace {

struct Slot {
    std::atomic_flag taken = ATOMIC_FLAG_INIT;
    void* buffer = nullptr;
    int64_t bytes = 0;
};

Slot slots[4];  // calls from more threads at once than this use malloc

void* allocate(int64_t bytes) { return std::aligned_alloc(4096, size_t((bytes + 4095) / 4096 * 4096)); }

}  // namespace

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

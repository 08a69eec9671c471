// Memory that a thread computes in and keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pooling_ext {

// Aligned to 64 bytes; in huge pages where the system has them, since the transformed domain is
// written to as many pages at a time as it has points.
class LargeScratch {
  public:
    explicit LargeScratch(size_t bytes) {
        if (bytes > kKeep) {
            own_ = allocate(bytes);
            memory_ = own_.get();
            return;
        }
        thread_local Block kept;
        thread_local size_t size = 0;
        if (size < bytes) {
            kept.reset();
            size = 0;
            kept = allocate(bytes);
            size = bytes;
        }
        memory_ = kept.get();
    }

    void* get() const { return memory_; }

  private:
    static constexpr size_t kKeep = size_t(32) << 20, kPage = size_t(2) << 20;

    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    using Block = std::unique_ptr<void, Free>;

    static Block allocate(size_t bytes) {
        const bool large = bytes >= kPage / 2;
        const size_t unit = large ? kPage : 64;
        const size_t whole = (bytes + unit - 1) / unit * unit;
        void* const memory = std::aligned_alloc(unit, whole);
        if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (large) madvise(memory, whole, MADV_HUGEPAGE);  // a wish: it may fail
#endif
        return Block(memory);
    }

    Block own_;
    void* memory_;
};

}  // namespace pooling_ext

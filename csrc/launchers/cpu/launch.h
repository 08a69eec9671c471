// From tensors to kernels: what every CPU launcher shares.
#pragma once

#include <memory>

#include "common/pool_call.h"
#include "kernels/cpu/pool/plan.h"

namespace pooling_ext {

// Scratch memory that a thread keeps between calls, unless it is very large; each slot has its own.
template <int kSlot = 0>
class ThreadScratch {
  public:
    explicit ThreadScratch(size_t bytes) {
        constexpr size_t kKeep = size_t(8) << 20;
        if (bytes > kKeep) {
            own_.reset(new char[bytes]);
            memory_ = own_.get();
            return;
        }
        thread_local std::unique_ptr<char[]> kept;
        thread_local size_t size = 0;
        if (size < bytes) {
            kept.reset(new char[bytes]);
            size = bytes;
        }
        memory_ = kept.get();
    }

    void* get() const { return memory_; }

  private:
    std::unique_ptr<char[]> own_;
    void* memory_;
};

// Runs `kernel` over the rows of a planned job on torch's threads.
template <class AnyJob>
void launch(void (*kernel)(const AnyJob&, int64_t, int64_t, void*), const AnyJob& job, Rows rows) {
    STD_TORCH_CHECK(kernel != nullptr, "pooling_ext: the CPU kernels do not support this dtype");
    constexpr int64_t kWorkPerThread = 1 << 15;
    const int64_t grain = 1 + kWorkPerThread / (rows.work + 1);
    const size_t bytes = scratch_bytes(job);
    auto run = [&](int64_t begin, int64_t end) {
        kernel(job, begin, end, ThreadScratch<>(bytes).get());
    };
    if (rows.count <= grain)
        run(0, rows.count);
    else
        parallel_for(0, rows.count, grain, run);
}

}  // namespace pooling_ext

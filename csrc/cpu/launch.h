// From tensors to kernels: what every CPU launcher shares.
#pragma once

#include <memory>

#include "common/torch_api.h"
#include "cpu/isa.h"
#include "cpu/plan.h"

namespace pooling_ext {

inline DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return DType::Float32;
        case ScalarType::Double:
            return DType::Float64;
        case ScalarType::BFloat16:
            return DType::BFloat16;
        case ScalarType::Half:
            return DType::Float16;
        case ScalarType::Char:
            return DType::Int8;
        case ScalarType::Short:
            return DType::Int16;
        case ScalarType::Int:
            return DType::Int32;
        case ScalarType::Long:
            return DType::Int64;
        case ScalarType::Byte:
            return DType::UInt8;
        default:
            STD_TORCH_CHECK(false, "pooling_ext: the CPU kernels do not support this dtype");
    }
}

// The geometry of an input of the given sizes, unbatched or batched.
inline PoolParams params_of(const Ints& sizes, const Windows& windows, bool channels_last) {
    const int64_t rank = windows.rank(), dims = static_cast<int64_t>(sizes.size());
    PoolParams p;
    Axis* axes[] = {&p.d, &p.h, &p.w};
    for (int64_t i = 0; i < rank; ++i)
        *axes[3 - rank + i] = axis_of(sizes[dims - rank + i], windows, i);
    for (int64_t i = 0; i < dims - rank; ++i) p.outer *= sizes[i];
    if (channels_last) {
        p.channels = sizes[1];
        p.outer = sizes[0];
    }
    return p;
}

// The output's sizes for an input of the given ones; checks that the windows go with it.
inline Ints output_sizes(Ints sizes, const Windows& windows) {
    STD_TORCH_CHECK(valid(sizes, windows),
                    "pooling_ext: the windows do not go with the input's size");
    std::copy(windows.output_size.begin(), windows.output_size.end(), sizes.end() - windows.rank());
    return sizes;
}

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

// A forward call: the input made dense in the format it suggests, and an output in that format.
struct Forward {
    bool channels_last;
    Tensor input, output;
    Job job;

    Forward(const Tensor& x, const Windows& windows)
        : channels_last(suggests_channels_last(x, windows.rank())),
          input(dense(x, channels_last)),
          output(empty(output_sizes(sizes_of(x), windows), x.scalar_type(), channels_last)) {
        job.p = params_of(sizes_of(x), windows, channels_last);
        job.src = input.data_ptr();
        job.dst = output.data_ptr();
    }

    Tensor launch(Kernel kernel, bool averages = false) {
        if (output.numel() == 0) return output;
        const Rows rows = plan_forward(job, input.element_size(), averages);
        pooling_ext::launch(kernel, job, rows);
        return output;
    }
};

}  // namespace pooling_ext

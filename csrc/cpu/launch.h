// From tensors to kernels: what every CPU launcher shares.
#pragma once

#include <memory>

#include "common/torch_api.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace pooling_ext {

// The fields of the Python class Windows: sizes for each spatial axis, outermost first, with
// padding as (before, after) pairs. An empty kernel_size means adaptive windows.
struct Windows {
    const Ints &output_size, &kernel_size, &stride, &padding, &dilation;

    int64_t rank() const { return static_cast<int64_t>(output_size.size()); }
};

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

inline Axis axis_of(int64_t in, const Windows& windows, int64_t i) {
    Axis axis;
    axis.in = in;
    axis.out = windows.output_size[i];
    if (!windows.kernel_size.empty()) {
        axis.kernel = windows.kernel_size[i];
        axis.stride = windows.stride[i];
        axis.pad_before = windows.padding[2 * i];
        axis.pad_after = windows.padding[2 * i + 1];
        axis.dilation = windows.dilation[i];
    } else if (axis.out > 0 && in % axis.out == 0) {
        axis.kernel = axis.stride = in / axis.out;
    } else if (axis.out > 0) {
        axis.kernel = in / axis.out + 2;
        axis.adaptive = true;
    }
    return axis;
}

// The geometry of an input of the given sizes, unbatched or batched.
inline PoolParams params_of(const Ints& sizes, const Windows& windows, bool channels_last) {
    const int64_t rank = windows.rank(), dims = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(rank >= 1 && rank <= 3 && dims >= rank, "pooling_ext: wrong number of dimensions");
    PoolParams p;
    Axis* axes[] = {&p.d, &p.h, &p.w};
    for (int64_t i = 0; i < rank; ++i) *axes[3 - rank + i] = axis_of(sizes[dims - rank + i], windows, i);
    for (int64_t i = 0; i < dims - rank; ++i) p.outer *= sizes[i];
    if (channels_last) {
        p.channels = sizes[1];
        p.outer = sizes[0];
    }
    return p;
}

// A window over a whole plane is a window over one long row, which the kernels walk faster.
inline void flatten_whole_planes(PoolParams& p) {
    if (p.channels != 1) return;
    for (Axis* outer : {&p.h, &p.d}) {
        if (!p.w.whole() || !outer->whole()) return;
        p.w.in *= outer->in;
        p.w.kernel = p.w.stride = p.w.in;
        *outer = Axis{};
    }
}

// The same for the forward pass in channels-last: one long column of pixels.
inline void flatten_whole_rows(PoolParams& p) {
    if (p.channels == 1 || !p.w.whole() || !p.h.whole()) return;
    p.h.in *= p.w.in;
    p.h.kernel = p.h.stride = p.h.in;
    p.w = Axis{};
}

inline Ints output_sizes(const Tensor& input, const Windows& windows) {
    const auto sizes = input.sizes();
    Ints result(sizes.begin(), sizes.end());
    std::copy(windows.output_size.begin(), windows.output_size.end(), result.end() - windows.rank());
    return result;
}

// Scratch memory that a thread keeps between calls, unless it is very large.
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

// Runs `kernel` over `rows` rows, each of about `work` element operations, on torch's threads.
inline void launch(Kernel kernel, const Job& job, int64_t rows, int64_t work) {
    STD_TORCH_CHECK(kernel != nullptr, "pooling_ext: the CPU kernels do not support this dtype");
    constexpr int64_t kWorkPerThread = 1 << 15;
    const int64_t grain = 1 + kWorkPerThread / (work + 1);
    size_t bytes = scratch_bytes(job.p);
    if (job.by_plane) bytes += job.p.in_plane() * sizeof(double);
    if (job.block) bytes += (job.p.in_plane() + 2 * job.p.out_plane()) * job.block * sizeof(double);
    auto run = [&](int64_t begin, int64_t end) { kernel(job, begin, end, ThreadScratch(bytes).get()); };
    if (rows <= grain) run(0, rows);
    else parallel_for(0, rows, grain, run);
}

// Takes planes in blocks where their rows are short and there are enough of them.
inline bool interleave_small_planes(Job& job) {
    // A block of planes is to fit the second-level cache.
    constexpr int64_t kShortRow = 48, kLargestPlane = 4096, kBlock = 64, kBlockElements = 1 << 17;
    PoolParams& p = job.p;
    if (p.channels != 1 || p.w.in > kShortRow || p.in_plane() > kLargestPlane || p.outer < kBlock) return false;
    job.block = p.in_plane() * kBlock > kBlockElements ? kBlock / 2 : kBlock;
    job.planes = p.outer;
    p.outer = 1;
    p.channels = job.block;
    return true;
}

inline MemoryFormat memory_format(bool channels_last, int64_t rank) {
    return channels_last ? channels_last_format(rank) : MemoryFormat::Contiguous;
}

// A forward call: the input made dense in the format it suggests, and an output in that format.
struct Forward {
    bool channels_last;
    MemoryFormat format;
    Tensor input, output;
    Job job;

    Forward(const Tensor& x, const Windows& windows)
        : channels_last(suggests_channels_last(x, windows.rank())),
          format(memory_format(channels_last, windows.rank())),
          input(dense(x, channels_last, format)),
          output(empty(output_sizes(x, windows), x.scalar_type(), x, format)) {
        const auto sizes = x.sizes();
        job.p = params_of({sizes.begin(), sizes.end()}, windows, channels_last);
        job.src = input.data_ptr();
        job.dst = output.data_ptr();
    }

    Tensor launch(Kernel kernel) {
        if (output.numel() == 0) return output;
        const PoolParams& p = job.p;
        if (interleave_small_planes(job)) {
            flatten_whole_rows(job.p);
            pooling_ext::launch(kernel, job, ceil_div(job.planes, job.block), 4 * p.in_plane() * job.block);
        } else {
            flatten_whole_planes(job.p);
            flatten_whole_rows(job.p);
            pooling_ext::launch(kernel, job, p.out_rows(), p.d.kernel * p.h.kernel * p.in_row());
        }
        return output;
    }
};

inline void launch_backward(Kernel kernel, Job& job, const Tensor& result) {
    if (result.numel() == 0) return;
    const PoolParams& p = job.p;
    if (job.by_plane) return launch(kernel, job, p.outer, 4 * p.in_plane());
    if (interleave_small_planes(job))
        return launch(kernel, job, ceil_div(job.planes, job.block), 4 * p.in_plane() * job.block);
    flatten_whole_planes(job.p);
    launch(kernel, job, p.in_rows(), 4 * p.in_row());
}

}  // namespace pooling_ext

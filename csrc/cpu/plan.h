// From the geometry of a call to the job that a kernel runs: what needs no tensors, so that the
// fuzzer makes its jobs in the same way.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace pooling_ext {

using Ints = std::vector<int64_t>;

// The fields of the Python class Windows: sizes for each spatial axis, outermost first, with
// padding as (before, after) pairs. An empty stride, padding or dilation means kernel_size, zeros
// or ones; an empty kernel_size means adaptive windows.
struct Windows {
    const Ints &output_size, &kernel_size, &stride, &padding, &dilation;

    int64_t rank() const { return static_cast<int64_t>(output_size.size()); }
};

inline Axis axis_of(int64_t in, const Windows& windows, int64_t i) {
    Axis axis;
    axis.in = in;
    axis.out = windows.output_size[i];
    if (!windows.kernel_size.empty()) {
        axis.kernel = windows.kernel_size[i];
        axis.stride = windows.stride.empty() ? axis.kernel : windows.stride[i];
        if (!windows.padding.empty()) {
            axis.pad_before = windows.padding[2 * i];
            axis.pad_after = windows.padding[2 * i + 1];
        }
        if (!windows.dilation.empty()) axis.dilation = windows.dilation[i];
    } else if (axis.out > 0 && in % axis.out == 0) {
        axis.kernel = axis.stride = in / axis.out;
    } else if (axis.out > 0) {
        axis.kernel = in / axis.out + 2;
        axis.adaptive = true;
    }
    return axis;
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

// The rows that a kernel is to run over, and about how many element operations each takes.
struct Rows {
    int64_t count, work;
};

inline Rows plan_forward(Job& job) {
    PoolParams& p = job.p;
    if (interleave_small_planes(job)) {
        flatten_whole_rows(p);
        return {ceil_div(job.planes, job.block), 4 * p.in_plane() * job.block};
    }
    flatten_whole_planes(p);
    flatten_whole_rows(p);
    return {p.out_rows(), p.d.kernel * p.h.kernel * p.in_row()};
}

inline Rows plan_backward(Job& job) {
    PoolParams& p = job.p;
    if (job.by_plane) return {p.outer, 4 * p.in_plane()};
    if (interleave_small_planes(job)) return {ceil_div(job.planes, job.block), 4 * p.in_plane() * job.block};
    flatten_whole_planes(p);
    return {p.in_rows(), 4 * p.in_row()};
}

// Bytes of scratch that one call of a kernel needs for a planned job.
inline size_t scratch_bytes(const Job& job) {
    const PoolParams& p = job.p;
    size_t bytes = scratch_bytes(p);
    if (job.by_plane) bytes += p.in_plane() * sizeof(double);
    if (job.block) bytes += (p.in_plane() + 2 * p.out_plane()) * job.block * sizeof(double);
    return bytes;
}

}  // namespace pooling_ext

// From the geometry of a call to the job that a kernel runs: what needs no tensors, so that the
// fuzzer makes its jobs in the same way.
#pragma once

#include "common/windows.h"
#include "kernels/cpu/pool/job.h"

namespace pooling_ext {

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

// Takes planes in blocks where their rows are short and there are enough of them. `size` is that of
// an element in bytes: large ones are slow to transpose, and rows of them fill vectors sooner.
inline bool interleave_small_planes(Job& job, int64_t size) {
    // A block of planes is to fit the second-level cache.
    constexpr int64_t kLargestPlane = 4096, kBlock = 64, kBlockElements = 1 << 17;
    PoolParams& p = job.p;
    const bool fast_rows =
        size >= 4 && !job.offsets_out && !p.w.adaptive && p.w.kernel <= 3 && p.w.dilation == 1;
    const int64_t short_row = fast_rows ? 24 : 48;
    if (p.channels != 1 || p.w.in > short_row || p.in_plane() > kLargestPlane || p.outer < kBlock)
        return false;
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

// `size` is that of an element; `averages`: of whole planes, which the kernel takes several at a
// time by itself.
inline Rows plan_forward(Job& job, int64_t size, bool averages) {
    PoolParams& p = job.p;
    const bool by_itself = averages && p.channels == 1 && is_whole(p);
    if (!by_itself && interleave_small_planes(job, size)) {
        flatten_whole_rows(p);
        return {ceil_div(job.planes, job.block), 4 * p.in_plane() * job.block};
    }
    flatten_whole_planes(p);
    flatten_whole_rows(p);
    return {p.out_rows(), p.window_rows() * p.in_row()};
}

// Max pooling's backward gathers from small windows, comparing a vector of offsets at a time, and
// scatters whole planes from larger ones, unless those are so large that their sums would take too
// much memory.
inline void plan_max_backward(Job& job, DType dtype, Offsets offsets) {
    constexpr int64_t kLargestPlane = int64_t(1) << 26;
    const PoolParams& p = job.p;
    // Sums that are not made in place cost more.
    const bool in_place = dtype == DType::Float32 || dtype == DType::Float64;
    const int64_t most = in_place || offsets != Offsets::Byte ? kGatherWindow / 2 : kGatherWindow;
    const bool gathers = p.channels > 1 && p.window_size() <= most;
    const int64_t at_once = p.channels < kScatterChannels ? p.channels : kScatterChannels;
    job.by_plane = p.in_plane() * at_once <= kLargestPlane && !gathers;
}

// The rows of a max pooling backward that is planned.
inline Rows max_backward_rows(const Job& job) {
    const PoolParams& p = job.p;
    if (!job.by_plane) return {p.in_rows(), 4 * p.in_row()};
    const int64_t groups = ceil_div(p.channels, kScatterChannels);
    return {p.outer * groups, 4 * p.in_plane() * p.channels / groups};
}

inline Rows plan_avg_backward(Job& job, int64_t size) {
    PoolParams& p = job.p;
    if (!is_whole(p) && interleave_small_planes(job, size))
        return {ceil_div(job.planes, job.block), 4 * p.in_plane() * job.block};
    flatten_whole_planes(p);
    return {p.in_rows(), 4 * p.in_row()};
}

// Bytes of scratch that one call of a kernel needs for a planned job.
inline size_t scratch_bytes(const Job& job) {
    const PoolParams& p = job.p;
    size_t bytes = scratch_bytes(p);
    if (job.by_plane) {
        const int64_t at_once = p.channels < kScatterChannels ? p.channels : kScatterChannels;
        const int64_t planes = 2 + 4096 / p.in_plane();
        bytes += p.in_plane() * at_once * sizeof(double) + p.d.out * p.h.out * sizeof(int64_t);
        bytes += (planes * (p.in_plane() + p.out_plane()) + 4096) * sizeof(int32_t);
    }
    // The taps of MaxPoolBackwardNhwc.
    bytes += p.window_size() <= kGatherWindow ? p.w.out * p.w.kernel * 16 + p.w.in * 8 : 0;
    if (job.block) bytes += (p.in_plane() + 2 * p.out_plane()) * job.block * sizeof(double);
    return bytes;
}

}  // namespace pooling_ext

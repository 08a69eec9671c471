// What the launchers of pooling (compiled once) and its kernels (compiled for each instruction set)
// agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/dispatch.h"

namespace pooling_ext {

// Windows too wide for a pass over the row for each column are reduced one by one.
constexpr int64_t kWideWindow = 16;

// The largest window, in elements, that max pooling's backward gathers from by comparing each
// offset.
constexpr int64_t kGatherWindow = 27;

// How many planes max pooling's backward scatters to at a time in channels-last.
constexpr int64_t kScatterChannels = 32;

// A job with what the CPU's planning adds to it.
struct Job : PoolJob {
    // Max backward: a row is a whole plane, or kScatterChannels planes in channels-last.
    bool by_plane = false;
    // If not 0: there are `planes` small planes, of which `p` describes `block`, as channels, and
    // a row is such a block (see block_transpose.h).
    int64_t block = 0;
    int64_t planes = 0;
};

// Computes rows [begin, end): output rows in a forward pass, input rows in a backward pass.
using Kernel = void (*)(const Job& job, int64_t begin, int64_t end, void* scratch);

// Whether rows are deinterleaved (see Deinterleaver), which takes windows of one size in the
// contiguous format, and no more room than a few rows: strides, dilation and padding may go far
// beyond one.
POOLING_EXT_INLINE bool deinterleaves(const PoolParams& p) {
    const Axis& w = p.w;
    if (p.channels != 1 || w.adaptive || w.kernel > kWideWindow) return false;
    return w.stride + w.pad_before + w.dilation * (w.kernel - 1) <= 4 * w.in + 1024;
}

// Bytes of scratch that one call of a kernel needs, for elements of at most 8 bytes.
inline size_t scratch_bytes(const PoolParams& p) {
    constexpr size_t element = 8 + 4, pointer = 8, slack = 12288;
    const size_t rows = p.window_rows();
    if (p.channels == 1 && is_whole(p) && rows == 1) return slack;  // walked in place
    const bool deinterleaved = deinterleaves(p);
    const size_t columns = deinterleaved ? p.w.kernel : p.channels == 1 ? 0 : p.w.most_inside();
    const size_t steps = deinterleaved ? p.w.stride : 0;
    const size_t phases =
        deinterleaved ? p.w.in + p.w.pad_before + p.w.dilation * columns + (p.w.out + 2) * steps
                      : 0;
    const size_t in = p.in_row(), out = p.out_row();
    return (in + 2 * out + phases) * element +
           (rows + 2 * columns + 4 * steps + 2 * p.w.out) * pointer + slack;
}

}  // namespace pooling_ext

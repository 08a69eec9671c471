// What the launchers (compiled once) and the kernels (compiled for each instruction set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/pool_job.h"

namespace pooling_ext {

// Windows too wide for a pass over the row for each column are reduced one by one.
constexpr int64_t kWideWindow = 16;

// The largest window, in places, that max pooling's backward gathers from by comparing each place.
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

// See batch_norm.h.
enum class Step;
struct BatchNormJob;
using BatchNormKernel = void (*)(const BatchNormJob& job, int64_t begin, int64_t end,
                                 void* scratch);

// See batch_norm_relu_max_pool.h.
enum class StemStep;
struct StemJob;
using StemKernel = void (*)(const StemJob& job, int64_t begin, int64_t end, void* scratch);

// See kernels/cpu/conv/winograd.h.
enum class WinogradKind;
struct WinogradKernels;
// See kernels/cpu/conv/depthwise.h.
enum class DepthwiseStep;
struct DepthwiseJob;
using DepthwiseKernel = void (*)(const DepthwiseJob& job, int64_t begin, int64_t end,
                                 void* scratch);

// The kernels of one instruction set.
struct Kernels {
    Kernel (*max_pool)(DType, Places);
    Kernel (*max_pool_backward)(DType, Places);
    Kernel (*avg_pool)(DType);
    Kernel (*avg_pool_backward)(DType);
    Kernel (*lp_pool)(DType);
    BatchNormKernel (*batch_norm)(DType, Step);
    BatchNormKernel (*add_relu_mean)(DType, bool backward);
    StemKernel (*stem)(DType, StemStep);
    WinogradKernels (*winograd)(DType, WinogradKind);
    DepthwiseKernel (*depthwise)(DType, DepthwiseStep);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// Whether rows are dealt out (see Phases), which takes windows of one size in the contiguous
// format, and no more room than a few rows: strides, dilation and padding may go far beyond one.
POOLING_EXT_INLINE bool deals(const PoolParams& p) {
    const Axis& w = p.w;
    if (p.channels != 1 || w.adaptive || w.kernel > kWideWindow) return false;
    return w.stride + w.pad_before + w.dilation * (w.kernel - 1) <= 4 * w.in + 1024;
}

// Bytes of scratch that one call of a kernel needs, for elements of at most 8 bytes.
inline size_t scratch_bytes(const PoolParams& p) {
    constexpr size_t element = 8 + 4, pointer = 8, slack = 12288;
    const size_t rows = p.window_rows();
    if (p.channels == 1 && is_whole(p) && rows == 1) return slack;  // walked in place
    const bool dealt = deals(p);
    const size_t columns = dealt ? p.w.kernel : p.channels == 1 ? 0 : p.w.most_inside();
    const size_t steps = dealt ? p.w.stride : 0;
    const size_t phases =
        dealt ? p.w.in + p.w.pad_before + p.w.dilation * columns + (p.w.out + 2) * steps : 0;
    const size_t in = p.in_row(), out = p.out_row();
    return (in + 2 * out + phases) * element +
           (rows + 2 * columns + 4 * steps + 2 * p.w.out) * pointer + slack;
}

}  // namespace pooling_ext

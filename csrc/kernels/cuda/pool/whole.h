// Windows that are a whole plane: how many blocks share one.
#pragma once

#include <algorithm>

#include "common/pool_job.h"

namespace pooling_ext::cuda {

// Bytes of a pixel that a block has of an image in channels-last, at most.
constexpr int64_t kWholeLine = 512;

// Several where there are few large planes: enough blocks to keep a GPU busy, each with enough to
// do. It depends on the sizes alone, and so do results.
inline int64_t whole_splits(const PoolParams& p, int64_t element) {
    constexpr int64_t kBlocks = 792, kLeast = 1 << 16;
    if (!is_whole(p) || p.in_plane() <= 1 || p.outer < 1) return 1;
    const int64_t pixel = p.channels * element;
    const int64_t blocks = p.outer * ceil_div(pixel, kWholeLine);
    const int64_t bytes = p.in_plane() * std::min(pixel, kWholeLine);
    return std::max(std::min(kBlocks / blocks, bytes / kLeast), int64_t(1));
}

// Bytes for what each block's part of a window comes to, none where no window is shared.
inline int64_t whole_parts_bytes(const PoolParams& p, int64_t element) {
    constexpr int64_t kMost = 16;  // a value and its offset
    const int64_t splits = whole_splits(p, element);
    return splits > 1 ? splits * p.outer * p.channels * kMost : 0;
}

}  // namespace pooling_ext::cuda

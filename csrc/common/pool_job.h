// A call of a pooling kernel, on any device.
#pragma once

#include "common/pooling.h"

namespace pooling_ext {

enum class DType { Float32, Float64, BFloat16, Float16, Int8, Int16, Int32, Int64, UInt8 };

// How the winner of a max-pool window is remembered: not at all, as its offset in the window
// (a byte or an int32), or as its index in the plane.
enum class Offsets { None, Byte, Int32, Index };

struct PoolJob {
    PoolParams p;
    const void* src = nullptr;         // forward: the input; backward: the gradient of the output
    void* dst = nullptr;               // forward: the output; backward: the gradient of the input
    void* offsets_out = nullptr;       // max forward
    const void* offsets_in = nullptr;  // max backward
    // Averages divide by the window's count unless `divisor` is not 0.
    bool count_include_pad = true;
    int64_t divisor = 0;
    // Lp: the norm, at least 1, and whether |x| is pooled.
    int norm = 0;
    bool magnitude = false;
};

}  // namespace pooling_ext

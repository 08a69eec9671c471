// The CPU, as the launchers of pooling see a device.
#pragma once

#include "launchers/cpu/launch.h"

#define POOLING_EXT_DISPATCH_KEY CPU

namespace pooling_ext {

inline size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::Float64:
        case DType::Int64:
            return 8;
        case DType::Float32:
        case DType::Int32:
            return 4;
        case DType::Int8:
        case DType::UInt8:
            return 1;
        default:
            return 2;
    }
}

class Device {
  public:
    explicit Device(const Tensor&) {}

    Tensor empty(const Ints& sizes, ScalarType dtype, bool channels_last) const {
        return pooling_ext::empty(sizes, dtype, channels_last);
    }
};

// Runs the kernel of a forward pass; `averages` where it divides by counts.
inline void run_forward(Kernel kernel, const PoolJob& call, DType dtype, bool averages) {
    Job job{call};
    const Rows rows = plan_forward(job, int64_t(size_of(dtype)), averages);
    launch(kernel, job, rows);
}

}  // namespace pooling_ext

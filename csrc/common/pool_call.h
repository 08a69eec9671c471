// From tensors to the job of a pooling kernel, on any device.
#pragma once

#include "common/pool_job.h"
#include "common/torch_api.h"
#include "common/windows.h"

namespace pooling_ext {

inline DType dtype_of(ScalarType dtype) {
    switch (dtype) {
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
            STD_TORCH_CHECK(false, "pooling_ext: no kernel supports this dtype");
    }
}
inline DType dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

// The geometry of an input of the given sizes, unbatched or batched.
inline PoolParams params_of(const Ints& sizes, const Windows& windows, bool channels_last) {
    const int64_t rank = windows.rank(), dims = static_cast<int64_t>(sizes.size());
    PoolParams p;
    Axis* axes[] = {&p.d, &p.h, &p.w};
    for (int64_t i = 0; i < rank; ++i) {
        Axis& axis = *axes[3 - rank + i];
        axis = axis_of(sizes[dims - rank + i], windows, i);
        // One window makes no step, which may be as long as it likes.
        if (axis.out == 1 && axis.stride > axis.kernel) axis.stride = axis.kernel;
    }
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

}  // namespace pooling_ext

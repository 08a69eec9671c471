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

    void max_pool(const PoolJob& call, DType dtype, Places kind) const {
        forward(kernels().max_pool(dtype, kind), call, dtype, false);
    }

    void max_pool_backward(const PoolJob& call, DType dtype, Places kind) const {
        Job job{call};
        plan_max_backward(job, dtype, kind);
        launch(kernels().max_pool_backward(dtype, kind), job, max_backward_rows(job));
    }

    // See max_pool_gather.cpp.
    void max_pool_gather(const PoolJob& call, DType dtype, Places kind) const;

    void avg_pool(const PoolJob& call, DType dtype) const {
        forward(kernels().avg_pool(dtype), call, dtype, true);
    }

    void avg_pool_backward(const PoolJob& call, DType dtype) const {
        Job job{call};
        const Rows rows = plan_avg_backward(job, int64_t(size_of(dtype)));
        launch(kernels().avg_pool_backward(dtype), job, rows);
    }

    void lp_pool(const PoolJob& call, DType dtype) const {
        forward(kernels().lp_pool(dtype), call, dtype, false);
    }

  private:
    static void forward(Kernel kernel, const PoolJob& call, DType dtype, bool averages) {
        Job job{call};
        const Rows rows = plan_forward(job, int64_t(size_of(dtype)), averages);
        launch(kernel, job, rows);
    }
};

}  // namespace pooling_ext

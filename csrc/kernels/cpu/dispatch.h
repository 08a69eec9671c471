// How the kernel sources of one instruction set find each other, and types by their DType.
#pragma once

#include "kernels/cpu/norm/batch_norm.h"
#include "kernels/cpu/pool/job.h"
#include "kernels/cpu/simd/numeric.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Each returns nullptr for what it has no kernel for.
Kernel max_pool(DType, Places);
Kernel max_pool_backward(DType, Places);
Kernel avg_pool(DType);
Kernel avg_pool_backward(DType);
Kernel lp_pool(DType);
BatchNormKernel batch_norm(DType, Step);
BatchNormKernel add_relu_mean(DType, bool backward);
StemKernel stem(DType, StemStep);
WinogradKernels winograd(DType, WinogradKind);
DepthwiseKernel depthwise(DType, DepthwiseStep);

// What `make` gives for a value of the floating type that `dtype` names, a pointer; nullptr for
// other types.
template <class Make>
auto for_float(DType dtype, Make make) -> decltype(make(float{})) {
    switch (dtype) {
        case DType::Float32:
            return make(float{});
        case DType::Float64:
            return make(double{});
        case DType::BFloat16:
            return make(BFloat16{});
        case DType::Float16:
            return make(Float16{});
        default:
            return nullptr;
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA

// What the files of depthwise convolution's kernels share.
#pragma once

#include "kernels/cpu/conv/depthwise_rows.h"

namespace pooling_ext::POOLING_EXT_ISA {

DepthwiseKernel depthwise_weight_grad(DType, DepthwiseStep);

}  // namespace pooling_ext::POOLING_EXT_ISA

// The mean of relu(x + residual) on the CPU.
#pragma once

#include "kernels/cpu/norm/batch_norm.h"

namespace pooling_ext {

POOLING_EXT_KERNELS(add_relu_mean, BatchNormKernel(DType, bool backward))

}  // namespace pooling_ext

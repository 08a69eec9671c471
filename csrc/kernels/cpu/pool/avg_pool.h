// Average pooling on the CPU.
#pragma once

#include "kernels/cpu/pool/job.h"

namespace pooling_ext {

POOLING_EXT_KERNELS(avg_pool, Kernel(DType))
POOLING_EXT_KERNELS(avg_pool_backward, Kernel(DType))

}  // namespace pooling_ext

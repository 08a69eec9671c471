// Max pooling on the CPU.
#pragma once

#include "kernels/cpu/pool/job.h"

namespace pooling_ext {

POOLING_EXT_KERNELS(max_pool, Kernel(DType, Places))
POOLING_EXT_KERNELS(max_pool_backward, Kernel(DType, Places))

}  // namespace pooling_ext

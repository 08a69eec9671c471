// Max pooling on the CPU.
#pragma once

#include "kernels/cpu/pool/job.h"

namespace pooling_ext {

POOLING_EXT_KERNELS(max_pool, Kernel(DType, Offsets))
POOLING_EXT_KERNELS(max_pool_backward, Kernel(DType, Offsets))

}  // namespace pooling_ext

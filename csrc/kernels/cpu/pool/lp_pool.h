// Power-average pooling on the CPU.
#pragma once

#include "kernels/cpu/pool/job.h"

namespace pooling_ext {

POOLING_EXT_KERNELS(lp_pool, Kernel(DType))

}  // namespace pooling_ext

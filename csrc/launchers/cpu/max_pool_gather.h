// Reads the winners of max pooling on the CPU.
#pragma once

#include "common/pool_job.h"

namespace pooling_ext {

void gather_winners(const PoolJob& job, DType dtype, Offsets kind);

}  // namespace pooling_ext

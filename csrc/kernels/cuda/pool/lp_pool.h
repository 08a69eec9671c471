// The CUDA kernels of power-average pooling. Each function returns when its work is on the stream;
// a dtype without a kernel is an error.
#pragma once

#include "common/pool_job.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

// `parts`: whole_parts_bytes() of memory, or none.
void lp_pool(const PoolJob& job, DType dtype, void* parts, StreamHandle stream);

}  // namespace pooling_ext::cuda

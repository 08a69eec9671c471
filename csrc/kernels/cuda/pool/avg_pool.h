// The CUDA kernels of average pooling. Each function returns when its work is on the stream; a
// dtype without a kernel is an error.
#pragma once

#include "common/pool_job.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

void avg_pool(const PoolJob& job, DType dtype, StreamHandle stream);
void avg_pool_backward(const PoolJob& job, DType dtype, StreamHandle stream);

}  // namespace pooling_ext::cuda

// The CUDA kernels of average pooling. Each function returns when its work is on the stream; a
// dtype without a kernel is an error.
#pragma once

#include "common/pool_job.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

// How many numbers avg_pool() needs room for in `parts`, or 0: where there are few large planes,
// several blocks share one.
int64_t avg_pool_parts(const PoolJob& job, DType dtype);
void avg_pool(const PoolJob& job, DType dtype, double* parts, StreamHandle stream);
void avg_pool_backward(const PoolJob& job, DType dtype, StreamHandle stream);

}  // namespace pooling_ext::cuda

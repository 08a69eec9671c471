// The CUDA kernels of max pooling. Each function returns when its work is on the stream; a dtype
// without a kernel is an error.
#pragma once

#include "common/pool_job.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

// `parts`: whole_parts_bytes() of memory, or none.
void max_pool(const PoolJob& job, DType dtype, Offsets kind, void* parts, StreamHandle stream);
void max_pool_backward(const PoolJob& job, DType dtype, Offsets kind, StreamHandle stream);
void max_pool_gather(const PoolJob& job, DType dtype, Offsets kind, StreamHandle stream);

}  // namespace pooling_ext::cuda

// The CUDA kernels of pooling, as the launchers call them. Each returns when its work is on the
// stream; where there is no kernel for a dtype, that is an error.
#pragma once

#include "common/pool_job.h"

namespace pooling_ext::cuda {

using StreamHandle = void*;  // a cudaStream_t, for sources that see no CUDA header

void max_pool(const PoolJob& job, DType dtype, Places kind, StreamHandle stream);
void max_pool_backward(const PoolJob& job, DType dtype, Places kind, StreamHandle stream);
void max_pool_gather(const PoolJob& job, DType dtype, Places kind, StreamHandle stream);
void avg_pool(const PoolJob& job, DType dtype, StreamHandle stream);
void avg_pool_backward(const PoolJob& job, DType dtype, StreamHandle stream);
void lp_pool(const PoolJob& job, DType dtype, StreamHandle stream);

}  // namespace pooling_ext::cuda

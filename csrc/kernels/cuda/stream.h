// A CUDA stream, for sources that see no CUDA header.
#pragma once

namespace pooling_ext::cuda {

using StreamHandle = void*;  // a cudaStream_t

}  // namespace pooling_ext::cuda

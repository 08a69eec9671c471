// The kernels of convolutions whose machine code tests/gpu/cuda_machine_code.py reads.
#include "kernels/cuda/conv/conv.cuh"

namespace pooling_ext::cuda {

#define POOLING_EXT_TILE(kTile)                                                        \
    template __global__ void conv_kernel<BFloat16, kTile, kVector<BFloat16>>(ConvJob); \
    template __global__ void conv_kernel<float, kTile, kVector<float>>(ConvJob);

static_assert(kConvTileCount == 4);
POOLING_EXT_TILE(0)
POOLING_EXT_TILE(1)
POOLING_EXT_TILE(2)
POOLING_EXT_TILE(3)

}  // namespace pooling_ext::cuda

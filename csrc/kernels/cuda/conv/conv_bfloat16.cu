// The convolution of bfloat16; a file for each type, since they take longest to compile.
#include "kernels/cuda/conv/conv.cuh"

namespace pooling_ext::cuda {

void conv_bfloat16(const ConvJob& job, StreamHandle stream) {
    launch_conv<BFloat16>(job, static_cast<Stream>(stream));
}

}  // namespace pooling_ext::cuda

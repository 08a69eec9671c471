// The convolution of float32; a file for each type, since they take longest to compile.
#include "kernels/cuda/conv/conv.cuh"

namespace pooling_ext::cuda {

void conv_float32(const ConvJob& job, StreamHandle stream) {
    launch_conv<float>(job, static_cast<Stream>(stream));
}

}  // namespace pooling_ext::cuda

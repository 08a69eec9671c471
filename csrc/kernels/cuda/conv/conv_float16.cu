// The convolution of float16; a file for each type, since they take longest to compile.
#include "kernels/cuda/conv/conv.cuh"

namespace pooling_ext::cuda {

void conv_float16(const ConvJob& job, StreamHandle stream) {
    launch_conv<Float16>(job, static_cast<Stream>(stream));
}

}  // namespace pooling_ext::cuda

// What Python asks of the library before it uses it, through ctypes.
#ifndef POOLING_EXT_CUDA_ARCHITECTURES
#define POOLING_EXT_CUDA_ARCHITECTURES ""
#endif

// The architectures that the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST.
extern "C" __attribute__((visibility("default"))) const char* pooling_ext_cuda_architectures() {
    return POOLING_EXT_CUDA_ARCHITECTURES;
}

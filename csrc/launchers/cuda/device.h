// A GPU, as the launchers see a device. Where tests/cuda_on_cpu stands in for the GPU, its tensors
// are the CPU's, and the operators are registered under a key that nothing else uses.
#pragma once

#include <memory>

#include "common/pool_call.h"
#include "kernels/cuda/stream.h"

#ifdef POOLING_EXT_CUDA_ON_CPU
#define POOLING_EXT_DISPATCH_KEY PrivateUse1
#else
#include <torch/csrc/stable/accelerator.h>
#define POOLING_EXT_DISPATCH_KEY CUDA
#endif

namespace pooling_ext {

// Makes the tensor's GPU the current one while it lives.
class Device {
  public:
#ifdef POOLING_EXT_CUDA_ON_CPU
    explicit Device(const Tensor&) {}
#else
    explicit Device(const Tensor& x)
        : memory_{aoti_torch_device_type_cuda(), x.get_device_index()}, guard_(memory_.index) {
        POOLING_EXT_TORCH_CHECK_CODE(aoti_torch_get_current_cuda_stream(memory_.index, &stream_));
    }
#endif

    Tensor empty(const Ints& sizes, ScalarType dtype, bool channels_last) const {
        return pooling_ext::empty(sizes, dtype, channels_last, memory_);
    }

    // The current stream.
    cuda::StreamHandle stream() const { return stream_; }

  private:
    Memory memory_;
    cuda::StreamHandle stream_ = nullptr;
#ifndef POOLING_EXT_CUDA_ON_CPU
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace pooling_ext

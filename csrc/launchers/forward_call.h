// What the launchers of pooling share. They are compiled once for each device.
#pragma once

#include "common/pool_call.h"
#ifdef POOLING_EXT_CUDA
#include "kernels/cuda/pool/whole.h"
#include "launchers/cuda/device.h"
#else
#include "launchers/cpu/device.h"
#endif

namespace pooling_ext {

// A forward call: the input made dense in the format it suggests, and an output in that format.
struct Forward {
    bool channels_last;
    Device device;
    Tensor input, output;
    PoolJob job;

    Forward(const Tensor& x, const Windows& windows)
        : channels_last(suggests_channels_last(x, windows.rank())),
          device(x),
          input(dense(x, channels_last)),
          output(device.empty(output_sizes(sizes_of(x), windows), x.scalar_type(), channels_last)) {
        job.p = params_of(sizes_of(x), windows, channels_last);
        job.src = input.data_ptr();
        job.dst = output.data_ptr();
    }

    // Whether there is anything to compute.
    bool any() const { return output.numel() > 0; }

#ifdef POOLING_EXT_CUDA
    // Memory for the parts of windows that several blocks share, or none.
    void* allocate_parts() {
        const int64_t n = cuda::whole_parts_bytes(job.p, int64_t(input.element_size()));
        if (n == 0) return nullptr;
        parts_ = device.empty({n}, ScalarType::Byte, false);
        return parts_->data_ptr();
    }

  private:
    std::optional<Tensor> parts_;
#endif
};

}  // namespace pooling_ext

// What the launchers of pooling share. They are compiled once for each device.
#pragma once

#include "common/pool_call.h"
#ifdef POOLING_EXT_CUDA
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
};

}  // namespace pooling_ext

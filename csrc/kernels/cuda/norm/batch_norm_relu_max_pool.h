// Batch normalization, ReLU and max pooling on a GPU: what its launchers and kernels agree on.
#pragma once

#include "kernels/cuda/norm/batch_norm.h"

namespace pooling_ext::cuda {

struct BnReluMaxPoolJob {
    BnReluMaxPoolJob(const PoolJob& pool, DType dtype, bool channels_last)
        : pool(pool), dtype(dtype), channels_last(channels_last) {}

    PoolJob pool;             // src, dst and maybe offsets_out, or src, offsets_in and dst
    void* winners = nullptr;  // the elements that won; forward, where there are offsets_out
    DType dtype;
    bool channels_last;
    const void* x = nullptr;  // backward
    Norm norm;
    // Five rows of `channels` in the type that kernels compute in: center, scale, shift, slope and
    // offset of each.
    void* coefficients = nullptr;
};

void stem_coefficients(const BnReluMaxPoolJob& job, StreamHandle stream);
void stem_forward(const BnReluMaxPoolJob& job, StreamHandle stream);
void stem_backward(const BnReluMaxPoolJob& job, StreamHandle stream);

}  // namespace pooling_ext::cuda

// What the kernels of the stem share: a channel's coefficients as threads read them.
#pragma once

#include "cuda/batch_norm.cuh"
#include "cuda/batch_norm_relu_max_pool.h"

namespace pooling_ext::cuda {

// The rows that stem_coefficients has written.
template <class T>
struct CoefficientRows {
    const T* rows;
    int64_t channels;
    bool channels_last;

    explicit CoefficientRows(const StemJob& job)
        : rows(static_cast<const T*>(job.coefficients)),
          channels(job.norm.channels),
          channels_last(job.channels_last) {}

    // A coefficient of N channels from `channel` of an image on; in the contiguous format, where
    // each plane is one, of its channel.
    template <int N>
    POOLING_EXT_DEVICE void read(int row, int64_t plane, int64_t channel, T (&values)[N]) const {
        constexpr int M = N * sizeof(T) % 16 == 0 ? kVector<T> : 1;
        const T* const from = rows + row * channels + (channels_last ? channel : plane % channels);
#pragma unroll
        for (int i = 0; i < N; i += M) {
            const Vec<T, M> some = load<M>(from + i);
#pragma unroll
            for (int j = 0; j < M; ++j) values[i + j] = some.at[j];
        }
    }
};

}  // namespace pooling_ext::cuda

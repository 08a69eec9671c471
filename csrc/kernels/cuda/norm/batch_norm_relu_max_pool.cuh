// What the kernels of the stem share: a channel's coefficients as threads read them.
#pragma once

#include "kernels/cuda/norm/batch_norm.cuh"
#include "kernels/cuda/norm/batch_norm_relu_max_pool.h"

namespace pooling_ext::cuda {

// The rows that stem_coefficients has written.
template <class T>
struct CoefficientRows {
    const T* rows;
    unsigned channels;
    bool channels_last;

    explicit CoefficientRows(const BnReluMaxPoolJob& job)
        : rows(static_cast<const T*>(job.coefficients)),
          channels(unsigned(job.norm.channels)),
          channels_last(job.channels_last) {
        // Dividing 64 bits is a call, around which registers are kept in memory.
        if (job.pool.p.outer > 0xffffffff || job.norm.channels > 0x7fffffff)
            throw std::runtime_error("pooling_ext: input is too large");
    }

    // A coefficient of N channels from `channel` of an image on; in the contiguous format, where
    // each plane is one, of its channel.
    template <int N>
    POOLING_EXT_DEVICE void read(int row, int64_t plane, int64_t channel, T (&values)[N]) const {
        constexpr int M = N * sizeof(T) % 16 == 0 ? kVector<T> : 1;
        const int64_t first = channels_last ? channel : int64_t(unsigned(plane) % channels);
        const T* const from = rows + int64_t(row) * channels + first;
#pragma unroll
        for (int i = 0; i < N; i += M) {
            const Vec<T, M> some = load<M>(from + i);
#pragma unroll
            for (int j = 0; j < M; ++j) values[i + j] = some.at[j];
        }
    }
};

}  // namespace pooling_ext::cuda

// Reading numbers whose type is known only when the kernel runs.
#pragma once

#include "common/cuda.cuh"
#include "kernels/cuda/conv/conv.h"

namespace pooling_ext::cuda {

template <class To, class T, int N>
POOLING_EXT_DEVICE void read_as(const void* from, int64_t first, int some, To (&to)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < some) to[i] = To(widen(load(static_cast<const T*>(from) + first + i).at[0]));
}

// The first `some` of N numbers from `first` on; leaves the others, and all where there are none.
template <class To, int N>
POOLING_EXT_DEVICE void read(const Numbers& numbers, int64_t first, int some, To (&to)[N]) {
    if (!numbers.data) return;
    switch (numbers.dtype) {
        case DType::Float64:
            return read_as<To, double>(numbers.data, first, some, to);
        case DType::BFloat16:
            return read_as<To, BFloat16>(numbers.data, first, some, to);
        case DType::Float16:
            return read_as<To, Float16>(numbers.data, first, some, to);
        default:
            return read_as<To, float>(numbers.data, first, some, to);
    }
}

}  // namespace pooling_ext::cuda

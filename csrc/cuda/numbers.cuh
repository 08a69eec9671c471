// Reading numbers whose type is known only when the kernel runs.
#pragma once

#include "common/cuda.cuh"
#include "cuda/conv.h"

namespace pooling_ext::cuda {

template <class To>
POOLING_EXT_DEVICE To number(const Numbers& numbers, int64_t i) {
    switch (numbers.dtype) {
        case DType::Float64:
            return To(load(static_cast<const double*>(numbers.data) + i).at[0]);
        case DType::BFloat16:
            return To(widen(load(static_cast<const BFloat16*>(numbers.data) + i).at[0]));
        case DType::Float16:
            return To(widen(load(static_cast<const Float16*>(numbers.data) + i).at[0]));
        default:
            return To(load(static_cast<const float*>(numbers.data) + i).at[0]);
    }
}

}  // namespace pooling_ext::cuda

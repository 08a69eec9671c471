// The only file that names LibTorch's stable ABI: everything else uses what is declared here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace pooling_ext {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using MemoryFormat = torch::headeronly::MemoryFormat;
using Ints = std::vector<int64_t>;

using torch::stable::parallel_for;

inline Tensor empty(const Ints& sizes, ScalarType dtype, const Tensor& like, MemoryFormat format) {
    return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// The channels-last format for a batched input of `rank` spatial axes.
inline MemoryFormat channels_last_format(int64_t rank) {
    return rank == 3 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// Whether the strides put the channels innermost and the rest in order, so that the tensor asks
// for a channels-last result: what Tensor::suggest_memory_format says. Where the strides fit both
// formats (no axis but one is larger than 1), they are channels-last only if they say so by being unequal.
inline bool suggests_channels_last(const Tensor& x, int64_t rank) {
    if (rank < 2 || x.dim() != rank + 2) return false;
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    if (strides[1] == 0) return false;
    int64_t least = 0;
    for (int64_t step = 0; step <= rank + 1; ++step) {
        // Innermost first: channels, the spatial axes from the last to the first, the batch.
        const int64_t axis = step == 0 ? 1 : step <= rank ? rank + 2 - step : 0;
        if (sizes[axis] == 0 || strides[axis] < least) return false;
        if (axis == 0 && least == strides[1]) return false;
        least = strides[axis] * (sizes[axis] > 1 ? sizes[axis] : 1);
    }
    return true;
}

// Whether the elements lie one after another in the given format.
inline bool is_dense(const Tensor& x, bool channels_last) {
    if (!channels_last) return x.is_contiguous();
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    const int64_t dims = x.dim();
    int64_t expected = 1;
    for (int64_t step = 0; step < dims; ++step) {
        const int64_t axis = step == 0 ? 1 : step < dims - 1 ? dims - step : 0;
        if (sizes[axis] != 1 && strides[axis] != expected) return false;
        expected *= sizes[axis];
    }
    return true;
}

inline Tensor dense(const Tensor& x, bool channels_last, MemoryFormat format) {
    return is_dense(x, channels_last) ? x : torch::stable::contiguous(x, format);
}

}  // namespace pooling_ext

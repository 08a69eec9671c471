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

#include "common/windows.h"

// The check whose error says what failed, where this PyTorch has it; the other, which all have,
// does not.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define POOLING_EXT_TORCH_CHECK_CODE STABLE_TORCH_ERROR_CODE_CHECK
#else
#define POOLING_EXT_TORCH_CHECK_CODE TORCH_ERROR_CODE_CHECK
#endif

namespace pooling_ext {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using MemoryFormat = torch::headeronly::MemoryFormat;

using torch::stable::parallel_for;

inline Ints sizes_of(const Tensor& x) {
    const auto sizes = x.sizes();
    return {sizes.begin(), sizes.end()};
}

// Whether the strides put the channels innermost and the rest in order, so that the tensor asks
// for a channels-last result: what Tensor::suggest_memory_format says. Where the strides fit both
// formats (no axis but one is larger than 1), they are channels-last only if they say so by being
// unequal.
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

// Where a tensor's memory is.
struct Memory {
    int32_t type = aoti_torch_device_type_cpu();
    int32_t index = 0;
};

// An uninitialized tensor. The direct call, where torch::stable::empty would look the operator up
// by its name.
inline Tensor empty(const Ints& sizes, ScalarType dtype, bool channels_last, Memory memory = {}) {
    const int64_t dims = static_cast<int64_t>(sizes.size());
    Ints strides(sizes.size());
    int64_t stride = 1;
    const auto next = [&](int64_t axis) {
        strides[axis] = stride;
        stride *= sizes[axis] > 1 ? sizes[axis] : 1;
    };
    if (channels_last) next(1);
    for (int64_t axis = dims - 1; axis >= 0; --axis)
        if (!channels_last || axis != 1) next(axis);
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    POOLING_EXT_TORCH_CHECK_CODE(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), code,
                                                          memory.type, memory.index, &handle));
    return Tensor(handle);
}

// The tensor itself if it is dense in the wanted format, else a copy that is.
inline Tensor dense(const Tensor& x, bool channels_last) {
    if (is_dense(x, channels_last)) return x;
    const MemoryFormat format = !channels_last ? MemoryFormat::Contiguous
                                : x.dim() == 4 ? MemoryFormat::ChannelsLast
                                               : MemoryFormat::ChannelsLast3d;
    return torch::stable::contiguous(x, format);
}

}  // namespace pooling_ext

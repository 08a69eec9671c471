// From an operator's arguments to the geometry of its windows.
#pragma once

#include <vector>

#include "common/pooling.h"

namespace pooling_ext {

using Ints = std::vector<int64_t>;

// The fields of the Python class Windows: sizes for each spatial axis, outermost first, with
// padding as (before, after) pairs. An empty stride, padding or dilation means kernel_size, zeros
// or ones; an empty kernel_size means adaptive windows.
struct Windows {
    const Ints &output_size, &kernel_size, &stride, &padding, &dilation;

    int64_t rank() const { return static_cast<int64_t>(output_size.size()); }
};

inline Axis axis_of(int64_t in, const Windows& windows, int64_t i) {
    Axis axis;
    axis.in = in;
    axis.out = windows.output_size[i];
    if (!windows.kernel_size.empty()) {
        axis.kernel = windows.kernel_size[i];
        axis.stride = windows.stride.empty() ? axis.kernel : windows.stride[i];
        if (!windows.padding.empty()) {
            axis.pad_before = windows.padding[2 * i];
            axis.pad_after = windows.padding[2 * i + 1];
        }
        if (!windows.dilation.empty()) axis.dilation = windows.dilation[i];
    } else if (axis.out > 0 && in % axis.out == 0) {
        axis.kernel = axis.stride = in / axis.out;
    } else if (axis.out > 0) {
        axis.kernel = in / axis.out + 2;
        axis.adaptive = true;
    }
    return axis;
}

// Whether the lists have the lengths that the rank asks for and the windows lie where
// windows.py puts them; kernels trust that they do.
inline bool valid(const Ints& sizes, const Windows& windows) {
    const size_t rank = windows.output_size.size();
    const auto fits = [&](const Ints& list, size_t length) {
        return list.empty() || list.size() == length;
    };
    if (rank < 1 || rank > 3 || (sizes.size() != rank + 1 && sizes.size() != rank + 2))
        return false;
    if (!fits(windows.kernel_size, rank) || !fits(windows.stride, rank) ||
        !fits(windows.padding, 2 * rank) || !fits(windows.dilation, rank))
        return false;
    for (size_t i = 0; i < rank; ++i) {
        const Axis a = axis_of(sizes[sizes.size() - rank + i], windows, static_cast<int64_t>(i));
        if (a.in < 1 || a.out < 0) return false;
        if (windows.kernel_size.empty()) continue;
        if (a.kernel < 1 || a.stride < 1 || a.dilation < 1 || a.pad_before < 0 || a.pad_after < 0)
            return false;
        const auto out = [&](bool ceil_mode) {
            return output_size(a.in, a.kernel, a.stride, a.pad_before, a.pad_after, a.dilation,
                               ceil_mode);
        };
        if (a.out != out(false) && a.out != out(true)) return false;
    }
    return true;
}

}  // namespace pooling_ext

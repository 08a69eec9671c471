// What the launchers of Winograd's convolutions have in common: shapes out of arguments, and the
// machine.
#pragma once

#include <unistd.h>

#include <algorithm>

#include "kernels/cpu/conv/winograd_plan.h"
#include "launchers/cpu/batch_norm_launch.h"

namespace pooling_ext {

inline int64_t cache_size(int level, int64_t otherwise) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long size = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return otherwise;
}

inline WinogradKernels winograd_kernels(ScalarType dtype, WinogradKind kind) {
    const WinogradKernels table = kernels::winograd(dtype_of(dtype), kind);
    STD_TORCH_CHECK(table.forward != nullptr, "pooling_ext: tensors must be floating-point");
    return table;
}

inline ScalarType computed_in(ScalarType dtype) {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline WinogradMachine machine_of(ScalarType dtype) {
    static const int64_t second = cache_size(2, 1 << 20), third = cache_size(3, 0);
    WinogradMachine m;
    m.element = dtype == ScalarType::Double ? 8 : 4;
    m.lanes = winograd_kernels(computed_in(dtype), WinogradKind::Dense).lanes;
    m.near = second / 8 * 5;
    // Of the last cache a worker has a share, which no system tells.
    m.far = third > 0 ? std::clamp(third / 8, second, 8 * second) : second;
    return m;
}

// A convolution's arguments: (plane, row, column), where planes may be missing.
struct WinogradGeometry {
    const Ints &padding, &stride, &dilation;

    // Along the axis that is `from_last` before the last.
    int64_t pad(int64_t from_last) const { return at(padding, from_last, stride.size()); }
    int64_t pad_after(int64_t from_last) const { return at(padding, from_last, padding.size()); }
    int64_t pads(int64_t from_last) const { return pad(from_last) + pad_after(from_last); }
    int64_t step(int64_t from_last) const { return at(stride, from_last, stride.size()); }
    int64_t spacing(int64_t from_last) const { return at(dilation, from_last, stride.size()); }

    void check(const Tensor& input) const {
        STD_TORCH_CHECK(input.dim() == 4 || input.dim() == 5,
                        "pooling_ext: input must be (N, C, H, W) or (N, C, D, H, W)");
        const size_t rank = size_t(input.dim()) - 2;
        STD_TORCH_CHECK(stride.size() == rank && dilation.size() == rank,
                        "pooling_ext: stride and dilation must have a number per spatial axis");
        STD_TORCH_CHECK(padding.size() == 2 * rank,
                        "pooling_ext: padding must have a number per side, first those before");
        const bool dense = step(0) == 1 && step(1) == 1;
        STD_TORCH_CHECK(dense || (step(0) == 2 && step(1) == 2),
                        "pooling_ext: the stride of rows and columns must be 1, or 2");
        STD_TORCH_CHECK(
            spacing(0) > 0 && spacing(1) > 0 && (dense || (spacing(0) == 1 && spacing(1) == 1)),
            "pooling_ext: a dilation must be at least 1, and 1 with a stride of 2");
        STD_TORCH_CHECK(rank == 2 || (step(2) > 0 && spacing(2) > 0),
                        "pooling_ext: stride and dilation must be at least 1");
    }

  private:
    static int64_t at(const Ints& values, int64_t from_last, size_t end) {
        return end > size_t(from_last) ? values[end - 1 - size_t(from_last)] : 0;
    }
};

// Sets the kind of a shape for kernels of so many rows and columns.
inline void set_kernel(WinogradShape& s, int64_t rows, int64_t columns, int64_t stride) {
    s.turned = columns == 1;
    if (s.turned) std::swap(rows, columns);
    const auto is = [&](int64_t a, int64_t b) { return rows == a && columns == b; };
    s.kind = is(5, 5)   ? WinogradKind::Square5
             : is(1, 3) ? WinogradKind::Row3
             : is(1, 7) ? WinogradKind::Row7
                        : WinogradKind::Dense;
    STD_TORCH_CHECK(
        is(3, 3) || (stride == 1 && s.kind != WinogradKind::Dense),
        "pooling_ext: a kernel must be 3x3, or with a stride of 1 5x5, 1x3, 3x1, 1x7 or 7x1");
    if (stride == 2) s.kind = WinogradKind::Strided;
}

// That of a weight (out, in, [planes,] rows, columns).
inline void set_kernel(WinogradShape& s, const Ints& weight_size, int64_t stride) {
    const size_t dims = weight_size.size();
    STD_TORCH_CHECK(dims == 4 || dims == 5,
                    "pooling_ext: weight must be (out, in, H, W) or (out, in, D, H, W)");
    set_kernel(s, weight_size[dims - 2], weight_size[dims - 1], stride);
    s.planes = dims == 5 ? weight_size[2] : 1;
}

inline void set_groups(WinogradShape& s, int64_t channels, int64_t features, int64_t groups) {
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0 && features % groups == 0 &&
                        channels > 0 && features > 0,
                    "pooling_ext: groups must divide the channels");
    s.groups = groups, s.channels = channels / groups, s.features = features / groups;
}

inline int64_t winograd_out(int64_t in, int64_t padding, int64_t kernel, int64_t stride,
                            int64_t dilation) {
    const int64_t room = in + padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

// Sets height, width and what goes with them, of which the output's are still to be set. Rows and
// columns are those of the shape, which may be turned.
inline void set_plane(WinogradShape& s, const Ints& sizes, const WinogradGeometry& g) {
    const int64_t rows = s.turned ? 0 : 1, columns = 1 - rows;
    s.batch = sizes[0];
    s.height = sizes[sizes.size() - 1 - size_t(rows)];
    s.width = sizes[sizes.size() - 1 - size_t(columns)];
    s.pad_top = g.pad(rows), s.pad_left = g.pad(columns);
    s.dilation_y = g.spacing(rows), s.dilation_x = g.spacing(columns);
}

// A shape of which kernel and planes are set, for an input.
inline WinogradShape shape_of(const Tensor& input, WinogradShape s, int64_t features,
                              int64_t groups, const WinogradGeometry& g) {
    g.check(input);
    const Ints sizes = sizes_of(input);
    const bool has_planes = sizes.size() == 5;
    STD_TORCH_CHECK(has_planes || s.planes == 1, "pooling_ext: weight must have input's rank");
    set_groups(s, sizes[1], features, groups);
    set_plane(s, sizes, g);
    const int64_t rows = s.turned ? 0 : 1, columns = 1 - rows;
    const WinogradTile& tile = s.tile();
    s.out_height = winograd_out(s.height, g.pads(rows), tile.rows.taps, g.step(rows), s.dilation_y);
    s.out_width =
        winograd_out(s.width, g.pads(columns), tile.columns.taps, g.step(columns), s.dilation_x);
    if (has_planes) {
        s.depth = sizes[2], s.pad_front = g.pad(2);
        s.plane_stride = g.step(2), s.plane_dilation = g.spacing(2);
        s.out_depth = winograd_out(s.depth, g.pads(2), s.planes, s.plane_stride, s.plane_dilation);
    }
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0 && s.out_depth > 0,
                    "pooling_ext: the kernel must fit into input with its padding");
    return s;
}

// Of the convolution that makes the gradient of an input, whose input is the output's gradient.
inline WinogradShape input_grad_shape(const Tensor& grad, const Ints& weight_size,
                                      const Ints& input_size, int64_t groups,
                                      const WinogradGeometry& g) {
    g.check(grad);
    const Ints sizes = sizes_of(grad);
    const size_t dims = sizes.size();
    STD_TORCH_CHECK(weight_size.size() == dims && (input_size.size() == dims || input_size.empty()),
                    "pooling_ext: weight and input_size must have grad's rank");
    STD_TORCH_CHECK(!input_size.empty() || (dims == 4 && g.step(0) == 1),
                    "pooling_ext: input_size is needed with a stride or planes");
    WinogradShape s;
    set_kernel(s, weight_size, g.step(0));
    set_groups(s, sizes[1], weight_size[1] * groups, groups);
    set_plane(s, sizes, g);
    const int64_t rows = s.turned ? 0 : 1, columns = 1 - rows;
    const int64_t kernel_rows = s.tile().rows.taps, kernel_columns = s.tile().columns.taps;
    if (input_size.empty()) {
        s.out_height = s.height + (kernel_rows - 1) * s.dilation_y - g.pads(rows);
        s.out_width = s.width + (kernel_columns - 1) * s.dilation_x - g.pads(columns);
    } else {
        s.out_height = input_size[dims - 1 - size_t(rows)];
        s.out_width = input_size[dims - 1 - size_t(columns)];
        STD_TORCH_CHECK(input_size[0] == s.batch && input_size[1] == s.groups * s.features,
                        "pooling_ext: input_size must fit grad and weight");
    }
    if (g.step(0) == 2) {
        s.kind = WinogradKind::Spread;
        STD_TORCH_CHECK(g.pad(0) % 2 != 0 && g.pad(1) % 2 != 0,
                        "pooling_ext: with a stride of 2 the padding must be odd");
        s.pad_top = -(g.pad(1) - 1) / 2, s.pad_left = -(g.pad(0) - 1) / 2;
    } else {
        s.pad_top = (kernel_rows - 1) * s.dilation_y - g.pad(rows);
        s.pad_left = (kernel_columns - 1) * s.dilation_x - g.pad(columns);
    }
    if (dims == 5) {
        STD_TORCH_CHECK(g.step(2) == 1,
                        "pooling_ext: the gradient of an input takes a stride of planes of 1");
        s.depth = sizes[2], s.out_depth = input_size[2], s.plane_dilation = g.spacing(2);
        s.pad_front = s.plane_dilation * (s.planes - 1) - g.pad(2);
    }
    const auto fits = [&](int64_t from_last, int64_t in, int64_t kernel, int64_t out) {
        return winograd_out(in, g.pads(from_last), kernel, g.step(from_last),
                            g.spacing(from_last)) == out;
    };
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0 && s.out_depth > 0 &&
                        fits(columns, s.out_width, kernel_columns, s.width) &&
                        fits(rows, s.out_height, kernel_rows, s.height) &&
                        (dims == 4 || fits(2, s.out_depth, s.planes, s.depth)),
                    "pooling_ext: grad must have the size of the output");
    return s;
}

// The transform of a weight of any strides, for a convolution of these channels and this kernel;
// `result` is still to be set.
inline WinogradWeightJob weight_job(const Tensor& weight, const WinogradShape& s, bool transposed) {
    const Ints sizes = sizes_of(weight);
    STD_TORCH_CHECK(sizes[0] == s.groups * (transposed ? s.channels : s.features) &&
                        sizes[1] == (transposed ? s.features : s.channels),
                    "pooling_ext: weight must fit the channels");
    WinogradWeightJob job;
    job.shape = s;
    job.transposed = transposed;
    job.weight = weight.data_ptr();
    const auto strides = weight.strides();
    job.strides[0] = strides[0], job.strides[1] = strides[1];
    if (sizes.size() == 5) job.strides[2] = strides[2];
    const size_t last = sizes.size() - 1;
    job.strides[3] = strides[s.turned ? last : last - 1];
    job.strides[4] = strides[s.turned ? last - 1 : last];
    return job;
}

}  // namespace pooling_ext

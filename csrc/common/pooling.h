// The geometry of pooling, shared by every kernel and by the host code that launches them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define POOLING_EXT_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels include this header once per instruction set, and an out-of-line
// copy compiled for one of them must never serve another.
#define POOLING_EXT_INLINE __attribute__((always_inline)) inline
#endif

namespace pooling_ext {

POOLING_EXT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The windows along one spatial axis. A window has `kernel` elements; element c of window o lies at
// position start(o) + c * dilation, which may be outside [0, in). GPUs count in 32 bits.
template <class Int>
struct AxisOf {
    Int in = 1;
    Int out = 1;
    Int kernel = 1;  // adaptive: an upper bound, the size of no window is larger
    Int stride = 1;
    Int pad_before = 0;
    Int pad_after = 0;
    Int dilation = 1;
    bool adaptive = false;  // windows of unequal size, cut from [0, in)

    POOLING_EXT_INLINE Int start(Int o) const {
        return adaptive ? scaled(o, in, out) : o * stride - pad_before;
    }

    // How many elements window o has, clipped or not.
    POOLING_EXT_INLINE Int length(Int o) const {
        return adaptive ? scaled_up(o + 1, in, out) - start(o) : kernel;
    }

    // The elements of window o that lie inside the input are [first(o), end(o)).
    POOLING_EXT_INLINE Int first(Int o) const {
        const Int s = start(o);
        return s >= 0 ? 0 : steps(-s);
    }

    POOLING_EXT_INLINE Int end(Int o) const {
        const Int room = in - start(o);
        const Int inside = room > 0 ? steps(room) : 0;
        const Int all = length(o);
        return inside < all ? inside : all;
    }

    // How many steps of the dilation cover a distance. Divisions are slow, and most have no need.
    POOLING_EXT_INLINE Int steps(Int distance) const {
        return dilation == 1 ? distance : ceil_div(distance, dilation);
    }

    // The outputs whose windows may hold input i are [first_output(i), end_output(i)).
    POOLING_EXT_INLINE Int first_output(Int i) const {
        if (adaptive) return scaled(i, out, in);
        const Int over = i + pad_before - dilation * (kernel - 1);
        return over <= 0 ? 0 : ceil_div(over, stride);
    }

    POOLING_EXT_INLINE Int end_output(Int i) const {
        const Int last = adaptive ? scaled_up(i + 1, out, in) : (i + pad_before) / stride + 1;
        return last < out ? last : out;
    }

    // The element of window o that input i is, or -1 where dilation steps over it.
    POOLING_EXT_INLINE Int element(Int o, Int i) const {
        const Int offset = i - start(o);
        if (dilation == 1) return offset >= 0 && offset < length(o) ? offset : -1;
        return offset >= 0 && offset % dilation == 0 && offset / dilation < length(o)
                   ? offset / dilation
                   : -1;
    }

    // How many elements the average over window o divides by.
    POOLING_EXT_INLINE Int count(Int o, bool include_pad) const {
        Int low = start(o);
        Int high = low + length(o);
        const Int bottom = include_pad ? -pad_before : 0;
        const Int top = include_pad ? in + pad_after : in;
        low = low < bottom ? bottom : low;
        high = high > top ? top : high;
        return high - low;
    }

    // No window has more elements inside the input. There may be far more outside.
    POOLING_EXT_INLINE Int most_inside() const { return kernel < in ? kernel : in; }

    // Whether no two windows overlap.
    POOLING_EXT_INLINE bool apart() const {
        return out == 1 || (!adaptive && stride > dilation * (kernel - 1));
    }

    // Whether the only window is the whole axis.
    POOLING_EXT_INLINE bool whole() const {
        return out == 1 && start(0) == 0 && dilation == 1 && length(0) == in && pad_after == 0;
    }

    // a * b / c, and the same rounded up; the product may need 64 bits.
    static POOLING_EXT_INLINE Int scaled(Int a, Int b, Int c) { return Int(int64_t(a) * b / c); }
    static POOLING_EXT_INLINE Int scaled_up(Int a, Int b, Int c) {
        return Int(pooling_ext::ceil_div(int64_t(a) * b, int64_t(c)));
    }
    static POOLING_EXT_INLINE Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
};

using Axis = AxisOf<int64_t>;

// A tensor seen as [outer, d, h, w, channels], dense: the contiguous format has every plane in
// `outer` and one channel, the channels-last formats have the batch in `outer`.
struct PoolParams {
    int64_t outer = 1;
    int64_t channels = 1;
    Axis d, h, w;

    // At most 2^62.
    POOLING_EXT_INLINE int64_t window_size() const {
        const double size = double(d.kernel) * double(h.kernel) * double(w.kernel);
        return size < 0x1p62 ? d.kernel * h.kernel * w.kernel : int64_t(1) << 62;
    }
    // No window has more rows inside the input.
    POOLING_EXT_INLINE int64_t window_rows() const { return d.most_inside() * h.most_inside(); }
    POOLING_EXT_INLINE int64_t in_row() const { return w.in * channels; }
    POOLING_EXT_INLINE int64_t out_row() const { return w.out * channels; }
    POOLING_EXT_INLINE int64_t in_plane() const { return d.in * h.in * w.in; }
    POOLING_EXT_INLINE int64_t out_plane() const { return d.out * h.out * w.out; }
    POOLING_EXT_INLINE int64_t in_rows() const { return outer * d.in * h.in; }
    POOLING_EXT_INLINE int64_t out_rows() const { return outer * d.out * h.out; }
};

// Whether the only window is the whole plane.
POOLING_EXT_INLINE bool is_whole(const PoolParams& p) {
    return p.w.whole() && p.h.whole() && p.d.whole();
}

// The same windows without the elements that are inside the input in none of them, for a maximum:
// an average counts some of those.
POOLING_EXT_INLINE Axis without_outside(Axis axis) {
    if (axis.adaptive || axis.out < 1) return axis;
    const int64_t reach = (axis.out - 1) * axis.stride;
    const int64_t before = axis.pad_before > reach ? (axis.pad_before - reach) / axis.dilation : 0;
    axis.pad_before -= before * axis.dilation;
    axis.pad_after = 0;
    axis.kernel -= before;
    const int64_t rest = ceil_div(axis.in + axis.pad_before, axis.dilation);
    if (axis.kernel > rest) axis.kernel = rest;
    return axis;
}

// The largest window, in elements, whose offsets fit one byte with 255 left to mean "none".
constexpr int64_t kByteWindow = 255;

// PyTorch's rule (ATen/native/Pool.h): under ceil_mode a window that would start in the padding
// after the input is dropped.
POOLING_EXT_INLINE int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t before,
                                       int64_t after, int64_t dilation, bool ceil_mode) {
    const int64_t span = in + before + after - dilation * (kernel - 1) - 1;
    if (span < 0 && !(ceil_mode && span > -stride)) return 0;
    int64_t out = (ceil_mode ? (span + stride - 1) / stride : span / stride) + 1;
    if (ceil_mode && (out - 1) * stride >= in + before) --out;
    return out;
}

}  // namespace pooling_ext

// What the kernels on batch normalization share: its coefficients.
//
// As on the CPU, y = (x - center) * scale + shift: the center is the mean rounded to the type that
// kernels compute in, so that the difference loses nothing where the mean is large beside the
// deviation, and what the rounding left goes into the shift.
#pragma once

#include <cmath>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/norm/batch_norm.h"
#include "kernels/cuda/norm/channels.cuh"

namespace pooling_ext::cuda {

POOLING_EXT_DEVICE double value_of(const ChannelVector& vector, int64_t channel, double otherwise) {
    if (vector.data == nullptr) return otherwise;
    const int64_t at = channel * vector.step;
    switch (vector.dtype) {
        case DType::Float64:
            return load(static_cast<const double*>(vector.data) + at).at[0];
        case DType::BFloat16:
            return widen(load(static_cast<const BFloat16*>(vector.data) + at).at[0]);
        case DType::Float16:
            return widen(load(static_cast<const Float16*>(vector.data) + at).at[0]);
        default:
            return load(static_cast<const float*>(vector.data) + at).at[0];
    }
}

POOLING_EXT_DEVICE void set_value(const ChannelVector& vector, int64_t channel, double value) {
    if (vector.data == nullptr) return;
    const int64_t at = channel * vector.step;
    switch (vector.dtype) {
        case DType::Float64:
            return store(static_cast<double*>(vector.data) + at, {{value}});
        case DType::BFloat16:
            return store(static_cast<BFloat16*>(vector.data) + at,
                         {{narrow<BFloat16>(float(value))}});
        case DType::Float16:
            return store(static_cast<Float16*>(vector.data) + at,
                         {{narrow<Float16>(float(value))}});
        default:
            return store(static_cast<float*>(vector.data) + at, {{float(value)}});
    }
}

// 1 / sqrt(value): for float32, by a Newton step from its own.
template <class T>
POOLING_EXT_DEVICE double inverse_root(double value) {
    if constexpr (std::is_same_v<T, double>) return 1 / sqrt(value);
    const double near = 1 / sqrtf(float(value));
    const double nearer = near * fused(-0.5 * value * near, near, 1.5);
    return fabs(nearer) < HUGE_VAL ? nearer : near;
}

// A channel's. The gradient of the input is grad * scale + (x - center) * slope + offset.
template <class T>
struct Coefficients {
    T center, scale, shift, slope, offset;

    static POOLING_EXT_DEVICE Coefficients of(const Norm& norm, int64_t channel) {
        const double mean = load(norm.stats + channel).at[0];
        const double inverse =
            inverse_root<T>(load(norm.stats + norm.channels + channel).at[0] + norm.eps);
        const T center = T(mean);
        const double away = mean - double(center);
        const double scale = inverse * value_of(norm.weight, channel, 1.0);
        const double shift = fused(-away, scale, value_of(norm.bias, channel, 0.0));
        double slope = 0, offset = 0;
        if (norm.sums != nullptr) {
            const double gradient = load(norm.sums + channel).at[0] / norm.count;
            const double product =
                load(norm.sums + norm.channels + channel).at[0] / norm.count * inverse * inverse;
            slope = -scale * product;
            offset = scale * fused(away, product, -gradient);
        }
        return {center, T(scale), T(shift), T(slope), T(offset)};
    }
};

// Coefficients of the channels of a thread's vectors; the block makes them together.
template <class T, int N>
struct OwnCoefficients {
    T center[N], scale[N], shift[N], slope[N], offset[N];

    POOLING_EXT_DEVICE OwnCoefficients(const ChannelTiles& t, const ChannelPosition<N>& p,
                                       const Norm& norm) {
        __shared__ Coefficients<T> all[kThreads];
        const int thread = int(threadIdx.x);
        if (thread < p.own) all[thread] = Coefficients<T>::of(norm, p.first_channel + thread);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const Coefficients<T>& one = all[p.channel(t, i)];
            center[i] = one.center;
            scale[i] = one.scale;
            shift[i] = one.shift;
            slope[i] = one.slope;
            offset[i] = one.offset;
        }
    }
};

template <class T>
POOLING_EXT_DEVICE T rectified(T z) {
    return z < 0 ? T(0) : z;
}

// Whether what ReLU was given, or what it made of it, lets the gradient through; NaN does, as in
// PyTorch.
template <class T>
POOLING_EXT_DEVICE bool lets_through(T z) {
    return !(z <= 0);
}

// The gradient of what ReLU was given.
template <class T>
POOLING_EXT_DEVICE T relu_backward(T z, T grad) {
    return lets_through(z) ? grad : T(0);
}

// Where ReLU's mask has the byte of a vector of 16 bytes of elements. It is in the order of memory,
// but in channels-last so many vectors of a pixel, as many as a block has, are followed by those of
// the next pixels: so a warp reads or writes one whole sector of 32 bytes, where parts of four
// would be shared with other blocks. ops/batch_norm_act.py takes masks apart.
template <int N>
struct MaskOrder {
    static constexpr int64_t kTogether = 8;

    int64_t rows;
    int64_t vectors;  // of a row; none where the order is that of memory

    POOLING_EXT_INLINE explicit MaskOrder(const ChannelTiles& t)
        : rows(t.rows), vectors(t.inner == 1 && t.channels % N == 0 ? t.channels / N : 0) {}

    // For the vectors of a column of the rows.
    struct Column {
        int64_t before;  // from where they lie in the order of memory to where they begin here
        int away;        // and so much for each row

        // Of the element at `at` of memory, which is in this row if there are columns.
        POOLING_EXT_DEVICE int64_t byte(int64_t at, int64_t row) const {
            return int64_t(uint64_t(at) / N) + before + row * away;
        }
    };

    POOLING_EXT_DEVICE Column column(int64_t vector) const {
        if (vectors == 0) return {0, 0};
        const int64_t first = vector / kTogether * kTogether, left = vectors - first;
        const int64_t together = left < kTogether ? left : kTogether;
        return {first * (rows - 1), int(together - vectors)};
    }

    // Of a thread, which stays in a column where there are some.
    template <int M>
    POOLING_EXT_DEVICE Column column(const ChannelPosition<M>& p) const {
        return column((p.first_channel + p.across * M) / N);
    }
};

// What a kernel is told of the activation: which of those in activation.cuh it is, or whether it is
// ReLU. (A structure in place of the bool has the compiler take more registers.)
template <bool kCurved>
using ToldActivation = std::conditional_t<kCurved, ActivationFunction, bool>;

template <bool kCurved>
ToldActivation<kCurved> told(const ActivationFunction& activation) {
    if constexpr (kCurved)
        return activation;
    else
        return activation.kind == Activation::Relu;
}

// Calls use(constant) with `flag` as a constant.
template <class Use>
void with_flag(bool flag, const Use& use) {
    if (flag)
        use(std::true_type());
    else
        use(std::false_type());
}

}  // namespace pooling_ext::cuda

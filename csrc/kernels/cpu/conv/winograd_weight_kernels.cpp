// The transform of a 3x3 kernel for Winograd's convolution, compiled once for each instruction set.
#include "kernels/cpu/conv/winograd_tables.h"
#include "kernels/cpu/conv/winograd_tiles.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

template <class In>
void transform_weights(const WinogradWeightJob& job, int64_t begin, int64_t end) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    constexpr WinogradMachine m = machine_of<In>();
    const int64_t vectors = winograd_vectors(job.features, m);
    // Strides of a feature and of a channel of the convolution that the result is for.
    const int64_t feature = job.strides[job.transposed], channel = job.strides[!job.transposed];
    for (int64_t index = begin; index < end; ++index) {
        const int64_t group = index / vectors, vector = index % vectors;
        const int64_t first = vector * L::kSize, lanes = smaller(L::kSize, job.features - first);
        // The given weight's first dimension runs over the groups.
        const int64_t outs = job.transposed ? job.channels : job.features;
        const In* const from =
            static_cast<const In*>(job.weight) + group * outs * job.strides[0] + first * feature;
        const WinogradPanel panel(vector, vectors, job.channels, L::kSize);
        T* const to = static_cast<T*>(job.result) +
                      group * winograd_weight_size(job.channels, job.features) + panel.offset;
        for (int64_t k = 0; k < job.channels; ++k) {
            alignas(64) T taps[9][L::kSize] = {};
            for (int64_t lane = 0; lane < lanes; ++lane)
                for (int64_t tap = 0; tap < 9; ++tap) {
                    const int64_t at = job.transposed ? 8 - tap : tap;
                    taps[tap][lane] =
                        widen(from[lane * feature + k * channel + at / 3 * job.strides[2] +
                                   at % 3 * job.strides[3]]);
                }
            X half[6][3];
#pragma GCC unroll 3
            for (int b = 0; b < 3; ++b)
                weight_points(L::own(taps[b]), L::own(taps[3 + b]), L::own(taps[6 + b]),
                              &half[0][b], 3, T(0));
#pragma GCC unroll 6
            for (int a = 0; a < 6; ++a) {
                X row[6];
                weight_points(half[a][0], half[a][1], half[a][2], row, 1, T(0));
                for (int b = 0; b < 6; ++b)
                    L::keep(to + ((a * 6 + b) * job.channels + k) * panel.width, row[b]);
            }
        }
    }
}

}  // namespace
}  // namespace conv

void (*winograd_weight(DType dtype))(const WinogradWeightJob&, int64_t, int64_t) {
    switch (dtype) {
        case DType::Float32:
            return conv::transform_weights<float>;
        case DType::Float64:
            return conv::transform_weights<double>;
        case DType::BFloat16:
            return conv::transform_weights<BFloat16>;
        case DType::Float16:
            return conv::transform_weights<Float16>;
        default:
            return nullptr;
    }
}

WinogradKernels winograd(DType dtype) {
    return {(dtype == DType::Float64 ? conv::Lanes<double>::kSize : conv::Lanes<float>::kSize),
            winograd_weight(dtype), winograd_forward(dtype), winograd_grad(dtype),
            winograd_grad_end(dtype)};
}

}  // namespace pooling_ext::POOLING_EXT_ISA

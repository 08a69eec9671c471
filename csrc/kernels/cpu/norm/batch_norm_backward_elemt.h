// The input's gradient, from that of what the activation was given or of its output.
//
// For one file, in an unnamed namespace: the compiler then sees every caller when it decides what
// to inline.
#pragma once

#include "kernels/cpu/norm/batch_norm_gates.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

// What makes the input's gradient, from that of what the activation was given or, with a gate, of
// its output. Without kBatch the statistics are constants.
template <bool kBatch, Gate kGate, class In>
struct Spreads {
    static_assert(!writes_gradient(kGate));
    static constexpr Gate kOwnGate = kGate;
    const BatchNormJob& job;
    const In *x, *grad;
    In* y;
    bool non_temporal;

    Spreads(const BatchNormJob& job, const void* gradient, int64_t start)
        : job(job),
          x(static_cast<const In*>(job.x) + start),
          grad(static_cast<const In*>(gradient) + start),
          y(static_cast<In*>(job.y) + start),
          non_temporal(job.non_temporal) {}

    POOLING_EXT_INLINE void prefetch_all(int64_t from, int64_t n, int64_t ahead) const {
        if constexpr (kBatch || kGate != Gate::None) prefetch(x + from, n, ahead);
        prefetch(grad + from, n, ahead);
    }

    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE X sum(Kind kind, int64_t i, X center, X scale, X shift) const {
        return (kind.get(x + i) - center) * scale + shift;
    }

    template <class Kind, class Ready, class X = typename Kind::X>
    POOLING_EXT_INLINE void spread(Kind kind, int64_t i, X center, X scale, X shift, X slope,
                                   X offset, [[maybe_unused]] Ready& derivatives) const {
        X g = kind.get(grad + i);
        const X d = kind.get(x + i) - center;
        if constexpr (kGate == Gate::Relu) g = relu_backward(kind, X(d * scale + shift), g);
        if constexpr (kGate == Gate::Relu6) g = relu6_backward(kind, X(d * scale + shift), g);
        if constexpr (derives(kGate)) g = multiplied(kind, derivatives.take(kind), g);
        g *= scale;
        if constexpr (kBatch) g += d * slope + offset;
        write(kind, y + i, g, non_temporal);
    }
};

template <class All, class In, class T>
POOLING_EXT_INLINE void spread_channel(const All& all, int64_t n, T center, T scale, T shift,
                                       T slope, T offset) {
    in_pieces<kBurstMany, In>(n, [&](int64_t from, int64_t some) {
        all.prefetch_all(from, some, kAheadMany);
        Derivatives<All::kOwnGate, In, kPieceMany<In>> derivatives;
        if constexpr (derives(All::kOwnGate)) {
            each_vector<In>(some, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
                derivatives.add(kind, all.sum(kind, from + i, kind.splat(center), kind.splat(scale),
                                              kind.splat(shift)));
            });
            derivatives.template activate<true>(all.job);
        }
        each_vector<In>(some, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
            all.spread(kind, from + i, kind.splat(center), kind.splat(scale), kind.splat(shift),
                       kind.splat(slope), kind.splat(offset), derivatives);
        });
    });
}

template <class All, class In, class T>
POOLING_EXT_INLINE void spread_rows(const All& all, int64_t rows, int64_t n, const T* centers,
                                    const T* scales, const T* shifts, const T* slopes,
                                    const T* offsets) {
    in_columns<2, In>(n, [&](auto kind, auto many, int64_t i) POOLING_EXT_INLINE_LAMBDA {
        using Some = Columns<decltype(kind), decltype(many)::value>;
        const Some center(centers + i), scale(scales + i), shift(shifts + i), slope(slopes + i),
            offset(offsets + i);
        all.prefetch_all(i * rows, Some::kElements * rows, ahead_of<In>(rows, n, kAheadMany));
        Derivatives<All::kOwnGate, In, Some::kElements * kRowsTogether> derivatives;
        if constexpr (derives(All::kOwnGate)) {
            down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
                derivatives.add(kind, all.sum(kind, at, center.x[v], scale.x[v], shift.x[v]));
            });
            derivatives.template activate<true>(all.job);
        }
        down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
            all.spread(kind, at, center.x[v], scale.x[v], shift.x[v], slope.x[v], offset.x[v],
                       derivatives);
        });
    });
}

}  // namespace
}  // namespace pooling_ext::POOLING_EXT_ISA

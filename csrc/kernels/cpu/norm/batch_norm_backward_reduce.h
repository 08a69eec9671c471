// The sums of the gradient of what the activation is given, and of its product with x - center.
//
// For one file, in an unnamed namespace: the compiler then sees every caller when it decides what
// to inline.
#pragma once

#include "kernels/cpu/norm/batch_norm_gates.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

// What the sums of a run of elements read and write.
template <Gate kGate, class In>
struct Gradients {
    const BatchNormJob& job;
    const In *x, *grad, *kept;
    In* residual_grad;
    bool non_temporal;

    Gradients(const BatchNormJob& job, int64_t start)
        : job(job),
          x(static_cast<const In*>(job.x) + start),
          grad(static_cast<const In*>(job.grad) + start),
          kept(reads_kept(kGate) ? static_cast<const In*>(job.kept) + start : nullptr),
          residual_grad(writes_gradient(kGate) ? static_cast<In*>(job.residual_grad) + start
                                               : nullptr),
          // What one thread reads again for the same channel stays in the cache.
          non_temporal(job.non_temporal && (job.channels_last || kGate != Gate::DerivativeKept)) {}

    POOLING_EXT_INLINE void prefetch_all(int64_t from, int64_t n, int64_t ahead) const {
        prefetch(x + from, n, ahead);
        prefetch(grad + from, n, ahead);
        if constexpr (reads_kept(kGate)) prefetch(kept + from, n, ahead);
    }

    // What the activation is given.
    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE X sum(Kind kind, int64_t i, X center, X scale, X shift) const {
        X z = (kind.get(x + i) - center) * scale + shift;
        if constexpr (kGate == Gate::DerivativeOfSum) z += kind.get(kept + i);
        return z;
    }

    // s1 += g and s2 += g * (x - center) for the elements from i on, where g is the gradient of
    // what the activation is given. `derivatives` holds the next of its derivatives, if any.
    template <class Kind, class Ready, class X = typename Kind::X>
    POOLING_EXT_INLINE void add(Kind kind, int64_t i, X center, X scale, X shift,
                                [[maybe_unused]] Ready& derivatives, X& s1, X& s2) const {
        const X d = kind.get(x + i) - center;
        X g = kind.get(grad + i);
        if constexpr (kGate == Gate::Relu) g = relu_backward(kind, X(d * scale + shift), g);
        if constexpr (kGate == Gate::Relu6) g = relu6_backward(kind, X(d * scale + shift), g);
        if constexpr (kGate == Gate::ReluOutput) g = relu_backward(kind, kind.get(kept + i), g);
        if constexpr (derives(kGate)) g = multiplied(kind, derivatives.take(kind), g);
        if constexpr (writes_gradient(kGate)) write(kind, residual_grad + i, g, non_temporal);
        s1 += g;
        s2 += g * d;
    }
};

// The sums of a block of channels in the contiguous format, of which the coefficients are given.
// `writes`: the input's gradient is going to be written next.
template <Gate kGate, class In, class T>
void channel_sums(const BatchNormJob& job, int64_t channel, int64_t count, bool writes,
                  const T* centers, const T* scales, const T* shifts, double* first,
                  double* second) {
    ChannelSums<In> sums[ChannelBlock::kMost];
    for (int64_t k = 0; k < count; ++k) {
        sums[k].clear();
        first[k] = second[k] = 0;
    }
    runs_of_channels<In>(
        job, channel, count,
        [&](int64_t k, int64_t start, int64_t n) {
            const T center = centers[k], scale = scales[k], shift = shifts[k];
            const Gradients<kGate, In> all(job, start);
            if (writes_gradient(kGate) && !all.non_temporal) prefetch_written(all.residual_grad, n);
            if (writes) prefetch_written(static_cast<const In*>(job.y) + start, n);
            const auto add = [&](auto& derivatives, int64_t from, int64_t some) {
                sums[k].add_row(some, [&](auto kind, int64_t i, auto& s1, auto& s2) {
                    if (i % kPieceMany<In> == 0)
                        all.prefetch_all(from + i, n < kPieceMany<In> ? n : kPieceMany<In>,
                                         kAheadMany);
                    all.add(kind, from + i, kind.splat(center), kind.splat(scale),
                            kind.splat(shift), derivatives, s1, s2);
                });
            };
            if constexpr (derives(kGate)) {
                in_pieces<kBurstMany, In>(n, [&](int64_t from, int64_t some) {
                    Derivatives<kGate, In, kPieceMany<In>> derivatives;
                    each_vector<In>(some, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
                        derivatives.add(kind, all.sum(kind, from + i, kind.splat(center),
                                                      kind.splat(scale), kind.splat(shift)));
                    });
                    derivatives.template activate<true>(job);
                    add(derivatives, from, some);
                });
            } else {
                NoDerivatives none;
                add(none, 0, n);
            }
        },
        [&](int64_t) {
            for (int64_t k = 0; k < count; ++k) {
                double a, b;
                sums[k].take(a, b);
                first[k] += a;
                second[k] += b;
            }
        });
}

// s1 and s2 for some rows in channels-last, column by column.
template <Gate kGate, class In, class T>
POOLING_EXT_INLINE void add_rows(const Gradients<kGate, In>& all, int64_t rows, int64_t n,
                                 const T* centers, const T* scales, const T* shifts, T* s1, T* s2) {
    in_columns<2, In>(n, [&](auto kind, auto many, int64_t i) POOLING_EXT_INLINE_LAMBDA {
        using Some = Columns<decltype(kind), decltype(many)::value>;
        const Some center(centers + i), scale(scales + i), shift(shifts + i);
        all.prefetch_all(i * rows, Some::kElements * rows, ahead_of<In>(rows, n, kAheadMany));
        Derivatives<kGate, In, Some::kElements * kRowsTogether> derivatives;
        if constexpr (derives(kGate)) {
            down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
                derivatives.add(kind, all.sum(kind, at, center.x[v], scale.x[v], shift.x[v]));
            });
            derivatives.template activate<true>(all.job);
        }
        Some first(s1 + i), second(s2 + i);
        down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
            all.add(kind, at, center.x[v], scale.x[v], shift.x[v], derivatives, first.x[v],
                    second.x[v]);
        });
        first.keep(s1 + i);
        second.keep(s2 + i);
    });
}

}  // namespace
}  // namespace pooling_ext::POOLING_EXT_ISA

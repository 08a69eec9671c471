// The backward pass of batch normalization with residual and activation, compiled once for each
// instruction set: sums of the gradient, the input's gradient, and both for one channel after the
// other.
#include "kernels/cpu/norm/batch_norm_activation.h"
#include "kernels/cpu/norm/batch_norm_rows.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Run>
void with_gate(Gate gate, const Run& run) {
    switch (gate) {
        case Gate::None:
            return run(std::integral_constant<Gate, Gate::None>{});
        case Gate::Relu:
            return run(std::integral_constant<Gate, Gate::Relu>{});
        case Gate::Relu6:
            return run(std::integral_constant<Gate, Gate::Relu6>{});
        case Gate::ReluOutput:
            return run(std::integral_constant<Gate, Gate::ReluOutput>{});
        case Gate::Derivative:
            return run(std::integral_constant<Gate, Gate::Derivative>{});
        case Gate::DerivativeKept:
            return run(std::integral_constant<Gate, Gate::DerivativeKept>{});
        case Gate::DerivativeOfSum:
            return run(std::integral_constant<Gate, Gate::DerivativeOfSum>{});
    }
}

constexpr bool derives(Gate gate) {
    return gate == Gate::Derivative || gate == Gate::DerivativeKept ||
           gate == Gate::DerivativeOfSum;
}

// Where the derivative is 0 nothing passes, be it infinite.
template <class Kind, class X = typename Kind::X>
POOLING_EXT_INLINE X multiplied(Kind, X derivative, X grad) {
    using T = typename Kind::T;
    return by_registers<T, T>(derivative, grad,
                              [](auto factor, auto given) POOLING_EXT_INLINE_LAMBDA {
                                  const decltype(factor) zero{};
                                  return factor == zero ? zero : factor * given;
                              });
}

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

struct NoDerivatives {};

// Those at up to kMost elements and, where vectors overlap, at one more vector.
template <Gate kGate, class In, int64_t kMost>
using Derivatives =
    std::conditional_t<derives(kGate), Values<In, kMost + Vector<In>::kSize>, NoDerivatives>;

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

// A block's coefficients.
template <class T>
struct Block {
    T center[ChannelBlock::kMost], scale[ChannelBlock::kMost], shift[ChannelBlock::kMost];

    Block() = default;
    Block(const BatchNormJob& job, int64_t channel, int64_t count) {
        const auto copy = [&](T* to, const double* from) {
            for (int64_t k = 0; k < count; ++k) to[k] = from ? T(from[channel + k]) : T(0);
        };
        copy(center, job.center);
        copy(scale, job.scale);
        copy(shift, job.shift);
    }
};

template <class In>
void sums(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const int64_t channels = job.channels, row = job.channels_last ? job.row() : 0;
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch);
    T *s1 = scratch.take<T>(row), *s2 = scratch.take<T>(row);
    with_gate(job.gate, [&](auto gate) {
        constexpr Gate kGate = decltype(gate)::value;
        if (!job.channels_last) {
            ChannelBlock::each(job, sizeof(In), begin, end, [&](int64_t first, int64_t count) {
                const Block<T> block(job, first, count);
                channel_sums<kGate, In>(job, first, count, false, block.center, block.scale,
                                        block.shift, job.sums + first, job.sums + channels + first);
            });
            return;
        }
        const T *c = center(0), *a = scale(0), *b = shift(0);
        const Units units(job, Step::Sums);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t from = unit * units.size, to = Units::end(job, from, units.size);
            clear(s1, row);
            clear(s2, row);
            row_groups<writes_gradient(kGate) ? 1 : kRowsTogether>(
                job, from, to, [&](int64_t at, int64_t rows, int64_t n) {
                    add_rows(Gradients<kGate, In>(job, at), rows, n, c, a, b, s1, s2);
                });
            double* const out = job.sums + unit * 2 * channels;
            add_lanes(job, s1, out);
            add_lanes(job, s2, out + channels);
        }
    });
    if (job.non_temporal) fence_non_temporal();
}

void add_units(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    const int64_t units = Units(job, Step::Sums).count, channels = job.channels, n = end - begin;
    for (int64_t unit = 1; unit < units; ++unit)
        for (int64_t row = 0; row < 2; ++row) {
            double* __restrict all = job.sums + row * channels + begin;
            const double* __restrict some = all + unit * 2 * channels;
            for (int64_t i = 0; i < n; ++i) all[i] += some[i];
        }
}

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

template <class In>
void spread_units(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch), slope(job, job.slope, scratch),
        offset(job, job.offset, scratch);
    const auto spread = [&](auto all) {
        using All = typename decltype(all)::type;
        units_backwards(job, begin, end, [&](int64_t from, int64_t to, int64_t channel) {
            if (job.channels_last)
                row_groups<kRowsTogether>(job, from, to, [&](int64_t at, int64_t rows, int64_t n) {
                    spread_rows<All, In>(All(job, job.grad, at), rows, n, center(0), scale(0),
                                         shift(0), slope(0), offset(0));
                });
            else
                spread_channel<All, In>(All(job, job.grad, from), to - from, *center(channel),
                                        *scale(channel), *shift(channel), *slope(channel),
                                        *offset(channel));
        });
    };
    with_gate(job.gate, [&](auto gate) {
        constexpr Gate kGate = decltype(gate)::value;
        if constexpr (!writes_gradient(kGate)) {
            if (job.slope != nullptr)
                spread(std::type_identity<Spreads<true, kGate, In>>{});
            else
                spread(std::type_identity<Spreads<false, kGate, In>>{});
        }
    });
    if (job.non_temporal) fence_non_temporal();
}

template <class In>
void train_backward(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const int64_t channels = job.channels;
    const double count = double(job.batch * job.inner);
    with_gate(job.gate, [&](auto gate) {
        constexpr Gate kGate = decltype(gate)::value;
        constexpr bool kWrites = writes_gradient(kGate);
        using All = Spreads<true, kWrites ? Gate::None : kGate, In>;
        const void* const grad = kWrites ? job.residual_grad : job.grad;
        ChannelBlock::each(job, sizeof(In), begin, end, [&](int64_t first, int64_t many) {
            Affine affines[ChannelBlock::kMost];
            Block<T> block;
            T slope[ChannelBlock::kMost], offset[ChannelBlock::kMost];
            for (int64_t k = 0; k < many; ++k) {
                const int64_t channel = first + k;
                affines[k] = affine_of(job.moments[channel], job.moments[channels + channel],
                                       job.weight[channel], job.bias[channel], job.eps,
                                       std::is_same_v<T, double>);
                block.center[k] = T(affines[k].center), block.scale[k] = T(affines[k].scale);
                block.shift[k] = T(affines[k].shift);
            }
            double* const sums = job.sums + first;
            double* const products = sums + channels;
            const bool writes = !job.non_temporal && job.y != job.residual_grad;
            channel_sums<kGate, In>(job, first, many, writes, block.center, block.scale,
                                    block.shift, sums, products);
            for (int64_t k = 0; k < many; ++k) {
                const double away = job.moments[first + k] - affines[k].center;
                const double product = products[k] - away * sums[k];
                products[k] = product * affines[k].inverse;
                const StatsGrad stats = stats_grad(sums[k] / count, product / count, away,
                                                   affines[k].scale, affines[k].inverse);
                slope[k] = T(stats.slope), offset[k] = T(stats.offset);
            }
            for (int64_t n = job.batch - 1; n >= 0; --n)
                for (int64_t k = 0; k < many; ++k)
                    spread_channel<All, In>(All(job, grad, (n * channels + first + k) * job.inner),
                                            job.inner, block.center[k], block.scale[k],
                                            block.shift[k], slope[k], offset[k]);
        });
    });
    if (job.non_temporal) fence_non_temporal();
}

}  // namespace

BatchNormKernel batch_norm_backward(DType dtype, Step step) {
    return for_float(dtype, [&](auto zero) -> BatchNormKernel {
        using In = decltype(zero);
        switch (step) {
            case Step::Sums:
                return sums<In>;
            case Step::Total:
                return add_units;
            case Step::Backward:
                return spread_units<In>;
            case Step::TrainBackward:
                return train_backward<In>;
            default:
                return nullptr;
        }
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

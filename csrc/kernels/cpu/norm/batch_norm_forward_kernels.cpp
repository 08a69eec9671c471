// The forward pass of batch normalization with residual and activation, compiled once for each
// instruction set: statistics, output, and both for one channel after the other.
#include "kernels/cpu/norm/batch_norm_activation.h"
#include "kernels/cpu/norm/batch_norm_rows.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

// Mean and sum of squared deviations of a growing set; sets are merged as in Chan, Golub and
// LeVeque.
struct Moments {
    double count = 0, mean = 0, deviation = 0;

    // Adds n elements, of which s1 and s2 are the sums of x - center and its square.
    void add(double n, double center, double s1, double s2) {
        const double away = center + s1 / n - mean, all = count + n;
        deviation += s2 - s1 * s1 / n + away * away * count * n / all;
        mean += away * n / all;
        count = all;
    }
};

// --- statistics ----------------------------------------------------------------------------

// The mean of a few elements, which is a better guess of all elements' than one.
template <class In>
Accumulator<In> mean_of_some(const In* x, int64_t n) {
    constexpr int64_t kSamples = 128;
    ChannelSums<In> sums;
    sums.clear();
    const int64_t few = n < kSamples ? n : kSamples;
    sums.add_row(few, [&](auto kind, int64_t i, auto& sum, auto&) { sum += kind.get(x + i); });
    double sum, none;
    sums.take(sum, none);
    return Accumulator<In>(sum / double(few));
}

// Those of a block of channels. `writes`: the output is going to be written next.
template <class In>
void channel_moments(const BatchNormJob& job, int64_t channel, int64_t count, bool writes,
                     Moments* moments) {
    using T = Accumulator<In>;
    const In* const x = static_cast<const In*>(job.x);
    constexpr int64_t kBurst = kBurstOne / int64_t(sizeof(In));
    T center[ChannelBlock::kMost];
    ChannelSums<In> sums[ChannelBlock::kMost];
    for (int64_t k = 0; k < count; ++k) {
        center[k] = mean_of_some(x + (channel + k) * job.inner, job.inner);
        sums[k].clear();
    }
    runs_of_channels<In>(
        job, channel, count,
        [&](int64_t k, int64_t start, int64_t n) {
            const In* const row = x + start;
            const T about = center[k];
            if (writes) {
                prefetch_written(static_cast<const In*>(job.y) + start, n);
                if (job.residual != nullptr && n <= kBurst)
                    prefetch(static_cast<const In*>(job.residual) + start, n, kAheadOne);
            }
            sums[k].add_row(n, [&](auto kind, int64_t i, auto& s1, auto& s2) {
                if (i % kBurst == 0) prefetch(row + i, n - i < kBurst ? n - i : kBurst, kAheadOne);
                const auto d = kind.get(row + i) - kind.splat(about);
                s1 += d;
                s2 += d * d;
            });
        },
        [&](int64_t n) {
            for (int64_t k = 0; k < count; ++k) {
                double s1, s2;
                sums[k].take(s1, s2);
                moments[k].add(double(n), double(center[k]), s1, s2);
                center[k] = T(moments[k].mean);
            }
        });
}

// s1 += x - center and s2 += (x - center)^2 for some rows, column by column.
template <class In, class T>
POOLING_EXT_INLINE void add_deviations(const In* x, int64_t rows, int64_t n, const T* centers,
                                       T* s1, T* s2) {
    in_columns<4, In>(n, [&](auto kind, auto many, int64_t i) POOLING_EXT_INLINE_LAMBDA {
        using Some = Columns<decltype(kind), decltype(many)::value>;
        const Some center(centers + i);
        Some first(s1 + i), second(s2 + i);
        prefetch(x + i * rows, Some::kElements * rows, ahead_of<In>(rows, n, kAheadOne));
        down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
            const auto d = kind.get(x + at) - center.x[v];
            first.x[v] += d;
            second.x[v] += d * d;
        });
        first.keep(s1 + i);
        second.keep(s2 + i);
    });
}

// A value near the mean of a run: that of some of its rows.
template <class In, class T>
void guess_center(const BatchNormJob& job, const In* x, int64_t begin, int64_t end, T* lanes,
                  double* sums, T* center) {
    constexpr int64_t kSamples = 4;
    const int64_t row = job.row(), rows = (end - begin) / row, channels = job.channels;
    int64_t count = 0;
    clear(lanes, row);
    if (rows == 0) {
        for (int64_t i = 0; i < channels; ++i) lanes[i] = widen(x[begin + i]);
        count = 1;
    } else {
        const int64_t samples = rows < kSamples ? rows : kSamples;
        for (int64_t sample = 0; sample < samples; ++sample) {
            const In* __restrict from = x + begin + sample * rows / samples * row;
            for (int64_t i = 0; i < row; ++i) lanes[i] += widen(from[i]);
        }
        count = samples * (row / channels);
    }
    add_lanes(job, lanes, sums);
    for (int64_t c = 0; c < channels; ++c) sums[c] /= double(count);
    repeat(job, sums, center);
}

template <class In>
void stats(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    const int64_t channels = job.channels;
    if (!job.channels_last) {
        ChannelBlock::each(job, sizeof(In), begin, end, [&](int64_t first, int64_t count) {
            Moments moments[ChannelBlock::kMost];
            channel_moments<In>(job, first, count, false, moments);
            for (int64_t k = 0; k < count; ++k) {
                job.sums[first + k] = moments[k].mean;
                job.sums[channels + first + k] = moments[k].deviation;
            }
        });
        return;
    }
    Scratch scratch(memory);
    const In* const x = static_cast<const In*>(job.x);
    const int64_t row = job.row();
    T *center = scratch.take<T>(row), *s1 = scratch.take<T>(row), *s2 = scratch.take<T>(row);
    const Units units(job, Step::Stats);
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t from = unit * units.size, to = Units::end(job, from, units.size);
        double* const mean = job.sums + unit * 2 * channels;
        double* const deviation = mean + channels;
        guess_center(job, x, from, to, s1, mean, center);
        clear(s1, row);
        clear(s2, row);
        row_groups<kRowsTogether>(job, from, to, [&](int64_t at, int64_t rows, int64_t n) {
            add_deviations(x + at, rows, n, center, s1, s2);
        });
        add_lanes(job, s1, mean);
        add_lanes(job, s2, deviation);
        const double n = double((to - from) / channels);
        for (int64_t c = 0; c < channels; ++c) {
            deviation[c] -= mean[c] * mean[c] / n;
            mean[c] = double(center[c]) + mean[c] / n;
        }
    }
}

// From the units' moments to those of all, in the first unit's place: two sums, without a division
// for each unit and channel.
void merge(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    const Units units(job, Step::Stats);
    const int64_t channels = job.channels, n = end - begin;
    const auto count = [&](int64_t unit) {
        const int64_t from = unit * units.size;
        return double((Units::end(job, from, units.size) - from) / channels);
    };
    const double all = double(job.numel() / channels);
    double* __restrict mean = job.sums + begin;
    double* __restrict deviation = mean + channels;
    // As differences to the first, so that nothing is lost where means are large.
    constexpr int64_t kAtOnce = 64;
    for (int64_t c = 0; c < n; c += kAtOnce) {
        const int64_t some = n - c < kAtOnce ? n - c : kAtOnce;
        double away[kAtOnce] = {}, square[kAtOnce] = {};
        for (int64_t unit = 1; unit < units.count; ++unit) {
            const double* __restrict other = mean + unit * 2 * channels + c;
            const double share = count(unit);
            for (int64_t i = 0; i < some; ++i) {
                const double difference = other[i] - mean[c + i];
                away[i] += share * difference;
                square[i] += share * difference * difference;
                deviation[c + i] += other[channels + i];
            }
        }
        for (int64_t i = 0; i < some; ++i) {
            deviation[c + i] += square[i] - away[i] * away[i] / all;
            mean[c + i] += away[i] / all;
        }
    }
}

// --- output --------------------------------------------------------------------------------

// What follows the sum of the normalized input and the residual: nothing, ReLU, ReLU6, or another
// activation.
enum class After { None, Relu, Relu6, Other };

// What makes the output, which may lie where x does.
template <bool kResidual, After kAfter, class In>
struct Acts {
    static constexpr bool kMany = kResidual;  // whether several tensors are read
    static constexpr bool kBuffers = kAfter == After::Other;
    const BatchNormJob& job;
    const In *x, *residual;
    In* y;
    bool non_temporal;

    Acts(const BatchNormJob& job, int64_t start)
        : job(job),
          x(static_cast<const In*>(job.x) + start),
          residual(kResidual ? static_cast<const In*>(job.residual) + start : nullptr),
          y(static_cast<In*>(job.y) + start),
          non_temporal(job.non_temporal) {}

    POOLING_EXT_INLINE void prefetch_all(int64_t from, int64_t n, int64_t ahead) const {
        prefetch(x + from, n, ahead);
        if constexpr (kResidual) prefetch(residual + from, n, ahead);
    }

    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE X sum(Kind kind, int64_t i, X given, X center, X scale, X shift) const {
        X z = (given - center) * scale + shift;
        if constexpr (kResidual) z += kind.get(residual + i);
        return z;
    }

    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE void act(Kind kind, int64_t i, X given, X center, X scale, X shift) const {
        X z = sum(kind, i, given, center, scale, shift);
        if constexpr (kAfter == After::Relu) z = rectified(kind, z);
        if constexpr (kAfter == After::Relu6) z = rectified_to_six(kind, z);
        put(kind, i, z);
    }

    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE void put(Kind kind, int64_t i, X z) const {
        write(kind, y + i, z, non_temporal);
    }
};

// Calls run(constants) with an Acts of the job's kind.
template <class In, class Run>
void with_acts(const BatchNormJob& job, const Run& run) {
    const auto with_residual = [&](auto residual) {
        constexpr bool kResidual = decltype(residual)::value;
        if (job.activation == Activation::None)
            run(std::type_identity<Acts<kResidual, After::None, In>>{});
        else if (job.activation == Activation::Relu)
            run(std::type_identity<Acts<kResidual, After::Relu, In>>{});
        else if (job.activation == Activation::Relu6)
            run(std::type_identity<Acts<kResidual, After::Relu6, In>>{});
        else
            run(std::type_identity<Acts<kResidual, After::Other, In>>{});
    };
    job.residual != nullptr ? with_residual(std::true_type{}) : with_residual(std::false_type{});
}

template <class All, class In, class T>
POOLING_EXT_INLINE void act_channel(const All& all, int64_t n, T center, T scale, T shift) {
    in_pieces<kBurstMany, In>(n, [&](int64_t from, int64_t some) {
        if constexpr (All::kMany) all.prefetch_all(from, some, kAheadMany);
        if constexpr (All::kBuffers) {
            Values<In, kPieceMany<In> + Vector<In>::kSize> values;
            each_vector<In>(some, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
                values.add(kind, all.sum(kind, from + i, kind.get(all.x + from + i),
                                         kind.splat(center), kind.splat(scale), kind.splat(shift)));
            });
            values.template activate<false>(all.job);
            each_vector<In>(some, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
                all.put(kind, from + i, values.take(kind));
            });
        } else {
            each_vector_in_place<In>(
                some,
                [&](auto kind, int64_t i)
                    POOLING_EXT_INLINE_LAMBDA { return kind.get(all.x + from + i); },
                [&](auto kind, int64_t i, auto given) POOLING_EXT_INLINE_LAMBDA {
                    all.act(kind, from + i, given, kind.splat(center), kind.splat(scale),
                            kind.splat(shift));
                });
        }
    });
}

template <class All, class In, class T>
POOLING_EXT_INLINE void act_rows(const All& all, int64_t rows, int64_t n, const T* centers,
                                 const T* scales, const T* shifts) {
    in_columns<2, In>(n, [&](auto kind, auto many, int64_t i) POOLING_EXT_INLINE_LAMBDA {
        using Some = Columns<decltype(kind), decltype(many)::value>;
        const Some center(centers + i), scale(scales + i), shift(shifts + i);
        all.prefetch_all(i * rows, Some::kElements * rows, ahead_of<In>(rows, n, kAheadMany));
        if constexpr (All::kBuffers) {
            Values<In, Some::kElements * kRowsTogether + Vector<In>::kSize> values;
            down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
                values.add(kind, all.sum(kind, at, kind.get(all.x + at), center.x[v], scale.x[v],
                                         shift.x[v]));
            });
            values.template activate<false>(all.job);
            down_rows<Some>(rows, n, i, [&](int64_t at, int) POOLING_EXT_INLINE_LAMBDA {
                all.put(kind, at, values.take(kind));
            });
        } else {
            down_rows<Some>(rows, n, i, [&](int64_t at, int v) POOLING_EXT_INLINE_LAMBDA {
                all.act(kind, at, kind.get(all.x + at), center.x[v], scale.x[v], shift.x[v]);
            });
        }
    });
}

template <class In>
void act_units(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch);
    with_acts<In>(job, [&](auto acts) {
        using All = typename decltype(acts)::type;
        units_backwards(job, begin, end, [&](int64_t from, int64_t to, int64_t channel) {
            if (job.channels_last)
                row_groups<kRowsTogether>(job, from, to, [&](int64_t at, int64_t rows, int64_t n) {
                    act_rows<All, In>(All(job, at), rows, n, center(0), scale(0), shift(0));
                });
            else
                act_channel<All, In>(All(job, from), to - from, *center(channel), *scale(channel),
                                     *shift(channel));
        });
    });
    if (job.non_temporal) fence_non_temporal();
}

// --- both ----------------------------------------------------------------------------------

template <class In>
void train(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const double count = double(job.batch * job.inner);
    with_acts<In>(job, [&](auto acts) {
        using All = typename decltype(acts)::type;
        ChannelBlock::each(job, sizeof(In), begin, end, [&](int64_t first, int64_t many) {
            Moments moments[ChannelBlock::kMost];
            T center[ChannelBlock::kMost], scale[ChannelBlock::kMost], shift[ChannelBlock::kMost];
            channel_moments<In>(job, first, many, !job.non_temporal, moments);
            for (int64_t k = 0; k < many; ++k) {
                const int64_t channel = first + k;
                const double variance = moments[k].deviation / count;
                job.moments[channel] = moments[k].mean;
                job.moments[job.channels + channel] = variance;
                const Affine affine =
                    affine_of(moments[k].mean, variance, job.weight[channel], job.bias[channel],
                              job.eps, std::is_same_v<T, double>);
                center[k] = T(affine.center), scale[k] = T(affine.scale);
                shift[k] = T(affine.shift);
            }
            for (int64_t n = job.batch - 1; n >= 0; --n)
                for (int64_t k = 0; k < many; ++k)
                    act_channel<All, In>(All(job, (n * job.channels + first + k) * job.inner),
                                         job.inner, center[k], scale[k], shift[k]);
        });
    });
    if (job.non_temporal) fence_non_temporal();
}

}  // namespace

BatchNormKernel batch_norm(DType dtype, Step step) {
    return for_float(dtype, [&](auto zero) -> BatchNormKernel {
        using In = decltype(zero);
        switch (step) {
            case Step::Stats:
                return stats<In>;
            case Step::Merge:
                return merge;
            case Step::Act:
                return act_units<In>;
            case Step::Train:
                return train<In>;
            default:
                return batch_norm_backward(dtype, step);
        }
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

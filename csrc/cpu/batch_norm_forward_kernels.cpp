// The forward pass of batch normalisation with residual and ReLU, compiled once for each
// instruction set: statistics, output, and both for one channel after the other.
#include "cpu/batch_norm_rows.h"

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

// Those of a block of channels. `writes`: the output's place is going to be written next.
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
            const Values<false, In> about(center + k);
            if (writes) {
                prefetch_written(static_cast<const In*>(job.y) + start, n);
                if (job.residual != nullptr && n <= kBurst)
                    prefetch(static_cast<const In*>(job.residual) + start, n, kAheadOne);
            }
            sums[k].add_row(n, [&](auto kind, int64_t i, auto& s1, auto& s2) {
                if (i % kBurst == 0) prefetch(row + i, n - i < kBurst ? n - i : kBurst, kAheadOne);
                const auto d = kind.get(row + i) - about.at(kind, 0);
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

// Rows in channels-last that are summed at once, so that sums are read and written less often. It
// pays for one tensor alone: rows of several lie at the same place in their pages too often.
constexpr int64_t kRowsAtOnce = 4;

// s1 += x - center and s2 += (x - center)^2 for kRows rows, column by column.
template <int64_t kRows, class In, class T>
POOLING_EXT_INLINE void add_deviations(const In* __restrict x, int64_t row, int64_t n,
                                       const T* __restrict centers, T* __restrict s1,
                                       T* __restrict s2) {
    for (int64_t r = 0; r < kRows; ++r) prefetch(x + r * row, n, kRows * row * int64_t(sizeof(In)));
    const auto add = [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
        const auto center = kind.own(centers + i);
        auto a = kind.own(s1 + i), b = kind.own(s2 + i);
        for (int64_t r = 0; r < kRows; ++r) {
            const auto d = kind.get(x + r * row + i) - center;
            a += d;
            b += d * d;
        }
        kind.keep(s1 + i, a);
        kind.keep(s2 + i, b);
    };
    each_once<In>(n, add);
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
        row_groups<kRowsAtOnce, kBurstOne, In>(
            job, from, to, [&](auto rows, int64_t at, int64_t k, int64_t n) {
                add_deviations<decltype(rows)::value>(x + at + k, row, n, center + k, s1 + k,
                                                      s2 + k);
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

// y may be x.
template <bool kEach, bool kResidual, bool kRelu, class In, class T>
POOLING_EXT_INLINE void act(const In* x, const In* __restrict residual, In* y, int64_t row,
                            const T* centers, const T* scales, const T* shifts) {
    const Values<kEach, In> center(centers), scale(scales), shift(shifts);
    in_pieces<kBurstMany, In>(row, [&](int64_t from, int64_t n) {
        if constexpr (kResidual) {
            prefetch(x + from, n, kAheadMany);
            prefetch(residual + from, n, kAheadMany);
        }
        each_vector_in_place<In>(
            n,
            [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA { return kind.get(x + from + i); },
            [&](auto kind, int64_t i, auto given) POOLING_EXT_INLINE_LAMBDA {
                const int64_t at = from + i;
                auto z = (given - center.at(kind, at)) * scale.at(kind, at) + shift.at(kind, at);
                if constexpr (kResidual) z += kind.get(residual + at);
                if constexpr (kRelu) z = rectified(kind, z);
                kind.put(y + at, z);
            });
    });
}

template <class In>
void act_units(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch);
    const In* x = static_cast<const In*>(job.x);
    const In* residual = static_cast<const In*>(job.residual);
    In* y = static_cast<In*>(job.y);
    with_constants(residual != nullptr, job.relu, [&](auto has_residual, auto relu) {
        constexpr bool kResidual = decltype(has_residual)::value, kRelu = decltype(relu)::value;
        rows_backwards(job, begin, end, [&](int64_t at, int64_t n, int64_t channel) {
            const In* added = kResidual ? residual + at : nullptr;
            if (job.channels_last)
                act<true, kResidual, kRelu>(x + at, added, y + at, n, center(0), scale(0),
                                            shift(0));
            else
                act<false, kResidual, kRelu>(x + at, added, y + at, n, center(channel),
                                             scale(channel), shift(channel));
        });
    });
}

// --- both ----------------------------------------------------------------------------------

template <class In>
void train(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const In* x = static_cast<const In*>(job.x);
    const In* residual = static_cast<const In*>(job.residual);
    In* y = static_cast<In*>(job.y);
    const double count = double(job.batch * job.inner);
    with_constants(residual != nullptr, job.relu, [&](auto has_residual, auto relu) {
        constexpr bool kResidual = decltype(has_residual)::value, kRelu = decltype(relu)::value;
        ChannelBlock::each(job, sizeof(In), begin, end, [&](int64_t first, int64_t many) {
            Moments moments[ChannelBlock::kMost];
            T center[ChannelBlock::kMost], scale[ChannelBlock::kMost], shift[ChannelBlock::kMost];
            channel_moments<In>(job, first, many, true, moments);
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
                for (int64_t k = 0; k < many; ++k) {
                    const int64_t at = (n * job.channels + first + k) * job.inner;
                    act<false, kResidual, kRelu>(x + at, kResidual ? residual + at : nullptr,
                                                 y + at, job.inner, center + k, scale + k,
                                                 shift + k);
                }
        });
    });
}

}  // namespace

BatchNormKernel batch_norm(DType dtype, Step step) {
    BatchNormKernel found = nullptr;
    for_float(dtype, [&](auto zero) -> Kernel {
        using In = decltype(zero);
        switch (step) {
            case Step::Stats:
                found = stats<In>;
                break;
            case Step::Merge:
                found = merge;
                break;
            case Step::Act:
                found = act_units<In>;
                break;
            case Step::Train:
                found = train<In>;
                break;
            default:
                found = batch_norm_backward(dtype, step);
        }
        return nullptr;
    });
    return found;
}

}  // namespace pooling_ext::POOLING_EXT_ISA

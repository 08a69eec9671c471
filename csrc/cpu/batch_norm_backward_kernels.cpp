// The backward pass of batch normalisation with residual and ReLU, compiled once for each
// instruction set: sums of the gradient, the input's gradient, and both for one channel after the
// other.
#include "cpu/batch_norm_rows.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Run>
void with_mask(Mask mask, const Run& run) {
    switch (mask) {
        case Mask::None:
            return run(std::integral_constant<Mask, Mask::None>{});
        case Mask::Input:
            return run(std::integral_constant<Mask, Mask::Input>{});
        case Mask::Output:
            return run(std::integral_constant<Mask, Mask::Output>{});
    }
}

// What the sums of a run of elements read and write.
template <class In>
struct Gradients {
    const In *x, *grad, *output;
    In* masked;

    Gradients(const BatchNormJob& job, int64_t start)
        : x(static_cast<const In*>(job.x) + start),
          grad(static_cast<const In*>(job.grad) + start),
          output(static_cast<const In*>(job.output) + start),
          masked(static_cast<In*>(job.masked) + start) {}

    template <Mask kMask>
    POOLING_EXT_INLINE void prefetch_all(int64_t from, int64_t n, int64_t ahead) const {
        prefetch(x + from, n, ahead);
        prefetch(grad + from, n, ahead);
        if constexpr (kMask == Mask::Output) prefetch(output + from, n, ahead);
    }

    // s1 += g and s2 += g * (x - center) for the elements from i on, where g is the masked
    // gradient.
    template <Mask kMask, class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE void add(Kind kind, int64_t i, X center, X scale, X shift, X& s1,
                                X& s2) const {
        const X d = kind.get(x + i) - center;
        X g = kind.get(grad + i);
        if constexpr (kMask == Mask::Input) g = through(X(d * scale + shift), g);
        if constexpr (kMask == Mask::Output) {
            g = through(kind.get(output + i), g);
            kind.put(masked + i, g);
        }
        s1 += g;
        s2 += g * d;
    }
};

// The sums of a channel in the contiguous format.
template <Mask kMask, bool kWrites, class In, class T>
void channel_sums(const BatchNormJob& job, int64_t channel, const T* centers, const T* scales,
                  const T* shifts, double& first, double& second) {
    const Values<false, In> center(centers), scale(scales), shift(shifts);
    constexpr int64_t kBurst = kBurstMany / int64_t(sizeof(In));
    ChannelSums<In> sums;
    first = second = 0;
    runs_of_channel<In>(
        job, channel,
        [&](int64_t start, int64_t n) {
            const Gradients<In> all(job, start);
            if constexpr (kMask == Mask::Output) prefetch_written(all.masked, n);
            if constexpr (kWrites) prefetch_written(static_cast<const In*>(job.y) + start, n);
            sums.add_row(n, [&](auto kind, int64_t i, auto& s1, auto& s2) {
                if (i % kBurst == 0)
                    all.template prefetch_all<kMask>(i, n < kBurst ? n : kBurst, kAheadMany);
                all.template add<kMask>(kind, i, center.at(kind, 0), scale.at(kind, 0),
                                        shift.at(kind, 0), s1, s2);
            });
        },
        [&](int64_t) {
            double a, b;
            sums.take(a, b);
            first += a;
            second += b;
        });
}

template <class In>
void sums(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const int64_t channels = job.channels, row = job.channels_last ? job.row() : 0;
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch);
    T *s1 = scratch.take<T>(row), *s2 = scratch.take<T>(row);
    with_mask(job.mask, [&](auto mask) {
        constexpr Mask kMask = decltype(mask)::value;
        if (!job.channels_last) {
            for (int64_t channel = begin; channel < end; ++channel)
                channel_sums<kMask, false, In>(job, channel, center(channel), scale(channel),
                                               shift(channel), job.sums[channel],
                                               job.sums[channels + channel]);
            return;
        }
        const T *c = center(0), *a = scale(0), *b = shift(0);
        const Units units(job, Step::Sums);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t from = unit * units.size, to = Units::end(job, from, units.size);
            clear(s1, row);
            clear(s2, row);
            row_groups<1, kBurstMany, In>(
                job, from, to, [&](auto, int64_t at, int64_t k, int64_t n) {
                    const Gradients<In> all(job, at + k);
                    all.template prefetch_all<kMask>(0, n, kAheadMany);
                    each_once<In>(n, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
                        auto first = kind.own(s1 + k + i), second = kind.own(s2 + k + i);
                        all.template add<kMask>(kind, i, kind.own(c + k + i), kind.own(a + k + i),
                                                kind.own(b + k + i), first, second);
                        kind.keep(s1 + k + i, first);
                        kind.keep(s2 + k + i, second);
                    });
                });
            double* const out = job.sums + unit * 2 * channels;
            add_lanes(job, s1, out);
            add_lanes(job, s2, out + channels);
        }
    });
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

// The input's gradient for a row.
template <bool kEach, bool kBatch, bool kMask, class In, class T>
void spread(const In* __restrict x, const In* __restrict grad, In* __restrict y, int64_t row,
            const T* centers, const T* scales, const T* shifts, const T* slopes, const T* offsets) {
    const Values<kEach, In> center(centers), scale(scales), shift(shifts), slope(slopes),
        offset(offsets);
    in_pieces<kBurstMany, In>(row, [&](int64_t from, int64_t n) {
        prefetch(x + from, n, kAheadMany);
        prefetch(grad + from, n, kAheadMany);
        each_vector<In>(n, [&](auto kind, int64_t i) POOLING_EXT_INLINE_LAMBDA {
            const int64_t at = from + i;
            auto g = kind.get(grad + at);
            const auto a = scale.at(kind, at);
            if constexpr (kBatch || kMask) {
                const auto d = kind.get(x + at) - center.at(kind, at);
                if constexpr (kMask) g = through(decltype(g)(d * a + shift.at(kind, at)), g);
                g *= a;
                if constexpr (kBatch) g += d * slope.at(kind, at) + offset.at(kind, at);
                kind.put(y + at, g);
            } else {
                kind.put(y + at, g * a);
            }
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
    const In* x = static_cast<const In*>(job.x);
    const In* grad = static_cast<const In*>(job.grad);
    In* y = static_cast<In*>(job.y);
    with_constants(job.slope != nullptr, job.mask == Mask::Input, [&](auto batch, auto mask) {
        constexpr bool kBatch = decltype(batch)::value, kMask = decltype(mask)::value;
        rows_backwards(job, begin, end, [&](int64_t at, int64_t n, int64_t channel) {
            const T *c = center(channel), *a = scale(channel), *b = shift(channel);
            const T *k = slope(channel), *o = offset(channel);
            if (job.channels_last)
                spread<true, kBatch, kMask>(x + at, grad + at, y + at, n, c, a, b, k, o);
            else
                spread<false, kBatch, kMask>(x + at, grad + at, y + at, n, c, a, b, k, o);
        });
    });
}

template <class In>
void train_backward(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const int64_t channels = job.channels;
    const double count = double(job.batch * job.inner);
    const In* const x = static_cast<const In*>(job.x);
    In* const y = static_cast<In*>(job.y);
    with_mask(job.mask, [&](auto mask) {
        constexpr Mask kMask = decltype(mask)::value;
        const In* const grad =
            static_cast<const In*>(kMask == Mask::Output ? job.masked : job.grad);
        for (int64_t channel = begin; channel < end; ++channel) {
            const double mean = job.moments[channel], variance = job.moments[channels + channel];
            const Affine affine = affine_of(mean, variance, job.weight[channel], job.bias[channel],
                                            job.eps, std::is_same_v<T, double>);
            const T c = T(affine.center), a = T(affine.scale), b = T(affine.shift);
            double first, second;
            channel_sums<kMask, true, In>(job, channel, &c, &a, &b, first, second);
            const double away = mean - affine.center;
            second -= away * first;
            job.sums[channel] = first;
            job.sums[channels + channel] = second * affine.inverse;
            const Through through =
                through_of(first / count, second / count, away, affine.scale, affine.inverse);
            const T k = T(through.slope), o = T(through.offset);
            for (int64_t n = job.batch - 1; n >= 0; --n) {
                const int64_t at = (n * channels + channel) * job.inner;
                spread<false, true, kMask == Mask::Input>(x + at, grad + at, y + at, job.inner, &c,
                                                          &a, &b, &k, &o);
            }
        }
    });
}

}  // namespace

BatchNormKernel batch_norm_backward(DType dtype, Step step) {
    BatchNormKernel found = nullptr;
    for_float(dtype, [&](auto zero) -> Kernel {
        using In = decltype(zero);
        switch (step) {
            case Step::Sums:
                found = sums<In>;
                break;
            case Step::Total:
                found = add_units;
                break;
            case Step::Backward:
                found = spread_units<In>;
                break;
            case Step::TrainBackward:
                found = train_backward<In>;
                break;
            default:
                break;
        }
        return nullptr;
    });
    return found;
}

}  // namespace pooling_ext::POOLING_EXT_ISA

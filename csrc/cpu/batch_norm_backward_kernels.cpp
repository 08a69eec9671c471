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
        if constexpr (kMask == Mask::Input) g = through(kind, X(d * scale + shift), g);
        if constexpr (kMask == Mask::Output) {
            g = through(kind, kind.get(output + i), g);
            kind.put(masked + i, g);
        }
        s1 += g;
        s2 += g * d;
    }
};

// The sums of a block of channels in the contiguous format, of which the coefficients are given.
// `writes`: the place of the input's gradient is going to be written next.
template <Mask kMask, class In, class T>
void channel_sums(const BatchNormJob& job, int64_t channel, int64_t count, bool writes,
                  const T* centers, const T* scales, const T* shifts, double* first,
                  double* second) {
    constexpr int64_t kBurst = kBurstMany / int64_t(sizeof(In));
    ChannelSums<In> sums[ChannelBlock::kMost];
    for (int64_t k = 0; k < count; ++k) {
        sums[k].clear();
        first[k] = second[k] = 0;
    }
    runs_of_channels<In>(
        job, channel, count,
        [&](int64_t k, int64_t start, int64_t n) {
            const Values<false, In> center(centers + k), scale(scales + k), shift(shifts + k);
            const Gradients<In> all(job, start);
            if constexpr (kMask == Mask::Output) prefetch_written(all.masked, n);
            if (writes) prefetch_written(static_cast<const In*>(job.y) + start, n);
            sums[k].add_row(n, [&](auto kind, int64_t i, auto& s1, auto& s2) {
                if (i % kBurst == 0)
                    all.template prefetch_all<kMask>(i, n < kBurst ? n : kBurst, kAheadMany);
                all.template add<kMask>(kind, i, center.at(kind, 0), scale.at(kind, 0),
                                        shift.at(kind, 0), s1, s2);
            });
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
    with_mask(job.mask, [&](auto mask) {
        constexpr Mask kMask = decltype(mask)::value;
        if (!job.channels_last) {
            ChannelBlock::each(job, sizeof(In), begin, end, [&](int64_t first, int64_t count) {
                const Block<T> block(job, first, count);
                channel_sums<kMask, In>(job, first, count, false, block.center, block.scale,
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
                if constexpr (kMask) g = through(kind, decltype(g)(d * a + shift.at(kind, at)), g);
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
            channel_sums<kMask, In>(job, first, many, true, block.center, block.scale, block.shift,
                                    sums, products);
            for (int64_t k = 0; k < many; ++k) {
                const double away = job.moments[first + k] - affines[k].center;
                const double product = products[k] - away * sums[k];
                products[k] = product * affines[k].inverse;
                const Through through = through_of(sums[k] / count, product / count, away,
                                                   affines[k].scale, affines[k].inverse);
                slope[k] = T(through.slope), offset[k] = T(through.offset);
            }
            for (int64_t n = job.batch - 1; n >= 0; --n)
                for (int64_t k = 0; k < many; ++k) {
                    const int64_t at = (n * channels + first + k) * job.inner;
                    spread<false, true, kMask == Mask::Input>(
                        x + at, grad + at, y + at, job.inner, block.center + k, block.scale + k,
                        block.shift + k, slope + k, offset + k);
                }
        });
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

// The backward pass of batch normalization with residual and activation, compiled once for each
// instruction set: sums of the gradient, the input's gradient, and both for one channel after the
// other.
#include "kernels/cpu/norm/batch_norm_backward_elemt.h"
#include "kernels/cpu/norm/batch_norm_backward_reduce.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

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

// Batch normalization with residual and activation, forward.
//
// The statistics are shifted sums: each thread takes the mean of the first elements that it reads
// in a column as center, so that a float32 sum of squares loses no more than the number of the
// others in rounding errors, however large the mean is. What the threads have is merged by Chan,
// Golub and LeVeque's formula ("Algorithms for computing the sample variance", 1983), in a fixed
// order, in float64 from the blocks on.
#include "kernels/cuda/norm/batch_norm.cuh"

namespace pooling_ext::cuda {
namespace {

// Blocks that a multiprocessor is to have room for, so that enough of their loads are on the way.
// Activations other than ReLU take more registers.
template <bool kCurved>
constexpr int kResidentNorm = kCurved ? 2 : 3;

// Independent loads of a thread, of each tensor that is read.
template <int N>
constexpr int kUnroll = N == 1 ? 8 : 4;

template <class In, int N>
__global__ void __launch_bounds__(kThreads, kResidentNorm<false>)
    stats_parts(const In* x, double* parts, ChannelTiles tiles) {
    using T = Accumulator<In>;
    __shared__ Lanes<T, N> centers, means, deviations;
    __shared__ int counts[kThreads];
    const ChannelPosition<N> p(tiles);
    T center[N] = {}, sum[N] = {}, squares[N] = {};
    int count = 0;
    p.template walk<kUnroll<N>>(tiles, [&](const auto& at, const auto& there) {
        constexpr int U = kUnroll<N>;
        Vec<In, N> values[U];
#pragma unroll
        for (int u = 0; u < U; ++u) values[u] = load<N>(x + at[u]);
        int here = 0;
#pragma unroll
        for (int u = 0; u < U; ++u) here += there[u];
        if (count == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                T first = 0;
#pragma unroll
                for (int u = 0; u < U; ++u)
                    if (there[u]) first += widen(values[u].at[i]);
                center[i] = first / T(here);
            }
        }
        count += here;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const T d = widen(values[u].at[i]) - center[i];
                sum[i] += d;
                squares[i] = fused(d, d, squares[i]);
            }
        }
    });
    const int thread = int(threadIdx.x);
    counts[thread] = count;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const T mean = count ? sum[i] / T(count) : T(0);
        centers.at(thread, i) = center[i];
        means.at(thread, i) = mean;
        deviations.at(thread, i) = squares[i] - sum[i] * mean;
    }
    // Means are kept as differences to a number in their midst, whatever one thread began with.
    __shared__ T origins[kThreads];
    add_up<N, TwoSums<T>>(
        tiles, p.own,
        [&](int lane, int i) {
            return counts[lane] ? TwoSums<T>{centers.at(lane, i), T(1)} : TwoSums<T>{};
        },
        [&](int channel, const TwoSums<T>& all) { origins[channel] = all.first / all.second; });
    __syncthreads();
    const T origin = origins[thread % tiles.width];
    add_up<N, Moments<T>>(
        tiles, p.own,
        [&](int lane, int i) {
            return Moments<T>{T(counts[lane]), (centers.at(lane, i) - origin) + means.at(lane, i),
                              deviations.at(lane, i)};
        },
        [&](int channel, const Moments<T>& all) {
            double* const to = parts + p.split * 2 * tiles.channels + p.first_channel + channel;
            store(to, {{double(origin) + double(all.mean)}});
            store(to + tiles.channels, {{double(all.deviations)}});
        });
}

__global__ void __launch_bounds__(kThreads)
    merge_stats(const double* parts, double* stats, ChannelTiles tiles) {
    const int64_t channels = tiles.channels;
    add_up_splits<Moments<double>>(
        channels, tiles.splits,
        [&](int64_t split, int64_t channel) {
            const double* const from = parts + split * 2 * channels + channel;
            return Moments<double>{double(tiles.count(split)), load(from).at[0],
                                   load(from + channels).at[0]};
        },
        [&](int64_t channel, const Moments<double>& all) {
            store(stats + channel, {{all.mean}});
            store(stats + channels + channel, {{all.count > 0 ? all.deviations / all.count : 0.0}});
        });
}

// The mask's byte of a vector of outputs.
template <class In, int N>
POOLING_EXT_DEVICE uint8_t mask_of(const Vec<In, N>& outputs) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) bits |= unsigned(lets_through(widen(outputs.at[i]))) << i;
    return uint8_t(bits);
}

// Of outputs that were not written a vector at a time.
template <class In>
__global__ void __launch_bounds__(kThreads)
    write_mask(const In* y, uint8_t* mask, int64_t size, ChannelTiles tiles) {
    constexpr int N = kVector<In>;
    const int64_t vector = int64_t(blockIdx.x) * kThreads + threadIdx.x, at = vector * N;
    if (at >= size) return;
    Vec<In, N> outputs{};
    for (int i = 0; i < N && at + i < size; ++i) outputs.at[i] = load(y + at + i).at[0];
    const MaskOrder<N> order(tiles);
    const int64_t row = order.vectors ? vector / order.vectors : 0;
    const auto column = order.column(vector - row * order.vectors);
    store(mask + column.byte(at, row), {{mask_of<In, N>(outputs)}});
}

template <class In, int N, bool kResidual, bool kCurved, bool kMask>
__global__ void __launch_bounds__(kThreads, kResidentNorm<kCurved>)
    normalize(const In* x, const In* residual, In* y, uint8_t* mask, Norm norm,
              ToldActivation<kCurved> activation, ChannelTiles tiles) {
    using T = Accumulator<In>;
    const ChannelPosition<N> p(tiles, true);
    const OwnCoefficients<T, N> c(tiles, p, norm);
    [[maybe_unused]] const auto own = MaskOrder<N>(tiles).column(p);
    constexpr int U = kResidual ? kUnroll<N> / 2 : kUnroll<N>;
    p.template walk_units<U>(tiles, [&](const auto& at, const auto& there, const auto& rows) {
        Vec<In, N> values[U];
        [[maybe_unused]] Vec<In, N> added[kResidual ? U : 1];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            values[u] = load<N>(x + at[u]);
            if constexpr (kResidual) added[u] = load<N>(residual + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            T z[N];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                z[i] = fused(widen(values[u].at[i]) - c.center[i], c.scale[i], c.shift[i]);
                if constexpr (kResidual) z[i] += widen(added[u].at[i]);
                if constexpr (!kCurved) z[i] = activation ? rectified(z[i]) : z[i];
            }
            if constexpr (kCurved) activate<false>(activation.kind, T(activation.slope), z);
            Vec<In, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) out.at[i] = narrow<In>(z[i]);
            store<N>(y + at[u], out);
            if constexpr (kMask) store(mask + own.byte(at[u], rows[u]), {{mask_of<In, N>(out)}});
        }
    });
}

// As torch.lerp, and in float64, so that 16 bits are rounded once.
POOLING_EXT_DEVICE void move(const ChannelVector& running, int64_t channel, double now,
                             double momentum) {
    const double old = value_of(running, channel, 0.0);
    const double difference = now - old;
    set_value(
        running, channel,
        fabs(momentum) < 0.5 ? old + momentum * difference : now - difference * (1 - momentum));
}

__global__ void __launch_bounds__(kThreads)
    update_running(ChannelVector mean, ChannelVector variance, const double* stats,
                   int64_t channels, double factor, double momentum) {
    const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (channel >= channels) return;
    move(mean, channel, load(stats + channel).at[0], momentum);
    move(variance, channel, load(stats + channels + channel).at[0] * factor, momentum);
}

}  // namespace

void batch_norm_stats(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        launch<stats_parts<In, vector>>(grid_of(job.tiles), static_cast<Stream>(stream),
                                        static_cast<const In*>(job.x), job.parts, job.tiles);
    });
}

void batch_norm_merge(const BatchNormJob& job, double* stats, StreamHandle stream) {
    launch<merge_stats>(grid_of_totals(job.tiles.channels), static_cast<Stream>(stream),
                        static_cast<const double*>(job.parts), stats, job.tiles);
}

void batch_norm_act_elemt(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        In* const y = static_cast<In*>(job.y);
        const auto run = [&](auto residual, auto curved, auto mask) {
            launch<normalize<In, vector, residual, curved, mask>>(
                grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.x),
                static_cast<const In*>(job.residual), y, job.mask, job.norm,
                told<curved>(job.activation), job.tiles);
        };
        constexpr std::false_type kNo;
        constexpr std::true_type kYes;
        if (job.mask != nullptr && vector > 1) return run(kYes, kNo, kYes);
        with_flag(job.residual != nullptr, [&](auto residual) {
            with_flag(job.activation.curved(), [&](auto curved) { run(residual, curved, kNo); });
        });
        if (job.mask == nullptr) return;
        const int64_t size = job.tiles.rows * job.tiles.channels * job.tiles.inner;
        const Grid grid{dim3(unsigned(ceil_div(size, kVector<In> * kThreads))), dim3(kThreads)};
        launch<write_mask<In>>(grid, static_cast<Stream>(stream), y, job.mask, size, job.tiles);
    });
}

void batch_norm_update_running(ChannelVector mean, ChannelVector variance, const double* stats,
                               int64_t channels, double factor, double momentum,
                               StreamHandle stream) {
    const Grid grid{dim3(unsigned(ceil_div(channels, kThreads))), dim3(kThreads)};
    launch<update_running>(grid, static_cast<Stream>(stream), mean, variance, stats, channels,
                           factor, momentum);
}

}  // namespace pooling_ext::cuda

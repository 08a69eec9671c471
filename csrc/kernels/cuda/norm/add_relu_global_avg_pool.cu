// Residual add, ReLU and global average pooling, and global average pooling of a few large planes.
// Each plane is read once: by one block, or where that makes too few blocks by several, whose sums
// a second kernel adds up in a fixed order.
#include "kernels/cuda/norm/batch_norm.cuh"

namespace pooling_ext::cuda {
namespace {

template <int N>
constexpr int kUnroll = N == 1 ? 4 : 2;

// Blocks that a multiprocessor is to have room for: with more, a thread would ask for less at once,
// and there may be few blocks.
constexpr int kResidentMeans = 4;

// Means of x, or with kRectified of relu(x + residual); or where there are `parts`, sums of each
// split.
template <class In, int N, bool kRectified>
__global__ void __launch_bounds__(kThreads, kResidentMeans)
    plane_means(const In* x, const In* residual, In* y, double* parts, double pixels,
                ChannelTiles tiles) {
    using T = Accumulator<In>;
    __shared__ Lanes<T, N> sums;
    const ChannelPosition<N> p(tiles);
    T sum[N] = {};
    constexpr int U = kRectified ? kUnroll<N> : 2 * kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> values[U];
        [[maybe_unused]] Vec<In, N> added[kRectified ? U : 1];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            values[u] = load<N>(x + at[u]);
            if constexpr (kRectified) added[u] = load<N>(residual + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                T value = widen(values[u].at[i]);
                if constexpr (kRectified) value = rectified(T(value + widen(added[u].at[i])));
                // No branch, behind which a load would wait for others.
                sum[i] += there[u] ? value : T(0);
            }
        }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) sums.at(int(threadIdx.x), i) = sum[i];
    add_up<N, Sum<T>>(
        tiles, p.own, [&](int lane, int i) { return Sum<T>{sums.at(lane, i)}; },
        [&](int channel, const Sum<T>& all) {
            const int64_t to = p.split * tiles.channels + p.first_channel + channel;
            if (parts)
                store(parts + to, {{double(all.value)}});
            else
                store(y + to, {{narrow<In>(all.value / T(pixels))}});
        });
}

// Means of `planes`, of `channels` for each image, whose sums are in so many `parts`.
template <class In>
__global__ void __launch_bounds__(kThreads)
    total_means(const double* parts, In* y, double pixels, int64_t planes, int64_t channels,
                int64_t splits) {
    using T = Accumulator<In>;
    add_up_splits<Sum<double>>(
        planes, splits,
        [&](int64_t split, int64_t plane) {
            const int64_t image = plane / channels;
            const int64_t row = image * splits + split;
            return Sum<double>{load(parts + row * channels + (plane - image * channels)).at[0]};
        },
        [&](int64_t plane, const Sum<double>& all) {
            store(y + plane, {{narrow<In>(T(all.value / pixels))}});
        });
}

template <class In, int N>
__global__ void __launch_bounds__(kThreads, kResidentMeans)
    spread_means(const In* grad, const In* x, const In* residual, In* y, double pixels,
                 int64_t plane_splits, ChannelTiles tiles) {
    using T = Accumulator<In>;
    const ChannelPosition<N> p(tiles);
    if (p.next >= p.end) return;
    const int64_t first = p.split / plane_splits * tiles.channels + p.first_channel;
    T share[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int64_t plane = first + p.channel(tiles, i);
        share[i] = widen(load(grad + plane).at[0]) / T(pixels);
    }
    constexpr int U = kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> values[U], added[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            values[u] = load<N>(x + at[u]);
            added[u] = load<N>(residual + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            Vec<In, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i)
                out.at[i] = narrow<In>(
                    relu_backward(T(widen(values[u].at[i]) + widen(added[u].at[i])), share[i]));
            store<N>(y + at[u], out);
        }
    });
}

}  // namespace

void global_mean(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        In* const y = static_cast<In*>(job.y);
        with_flag(job.residual != nullptr, [&](auto adds) {
            launch<plane_means<In, vector, adds>>(
                grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.x),
                static_cast<const In*>(job.residual), y, job.parts, job.norm.count, job.tiles);
        });
        if (job.parts == nullptr) return;
        const int64_t planes = job.tiles.splits / job.plane_splits * job.tiles.channels;
        launch<total_means<In>>(grid_of_totals(planes), static_cast<Stream>(stream),
                                static_cast<const double*>(job.parts), y, job.norm.count, planes,
                                job.tiles.channels, job.plane_splits);
    });
}

void add_relu_mean_backward(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        launch<spread_means<In, vector>>(
            grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.grad),
            static_cast<const In*>(job.x), static_cast<const In*>(job.residual),
            static_cast<In*>(job.y), job.norm.count, job.plane_splits, job.tiles);
    });
}

}  // namespace pooling_ext::cuda

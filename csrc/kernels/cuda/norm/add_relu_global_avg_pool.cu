// Residual add, ReLU and global average pooling: each plane is one block's, and read once.
#include "kernels/cuda/norm/batch_norm.cuh"

namespace pooling_ext::cuda {
namespace {

template <int N>
constexpr int kUnroll = N == 1 ? 4 : 2;

template <class In, int N>
__global__ void __launch_bounds__(kThreads)
    plane_means(const In* x, const In* residual, In* y, int64_t pixels, ChannelTiles tiles) {
    using T = Accumulator<In>;
    __shared__ Lanes<T, N> sums;
    const Position<N> p(tiles);
    T sum[N] = {};
    constexpr int U = kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> values[U], added[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            values[u] = load<N>(x + at[u]);
            added[u] = load<N>(residual + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
#pragma unroll
            for (int i = 0; i < N; ++i)
                sum[i] += rectified(T(widen(values[u].at[i]) + widen(added[u].at[i])));
        }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) sums.at(int(threadIdx.x), i) = sum[i];
    add_up<N, Sum<T>>(
        tiles, p.own, [&](int lane, int i) { return Sum<T>{sums.at(lane, i)}; },
        [&](int channel, const Sum<T>& all) {
            store(y + p.split * tiles.channels + p.first_channel + channel,
                  {{narrow<In>(all.value / T(pixels))}});
        });
}

template <class In, int N>
__global__ void __launch_bounds__(kThreads)
    spread_means(const In* grad, const In* x, const In* residual, In* y, int64_t pixels,
                 ChannelTiles tiles) {
    using T = Accumulator<In>;
    const Position<N> p(tiles);
    if (p.next >= p.end) return;
    T share[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int64_t plane = p.split * tiles.channels + p.first_channel + p.channel(tiles, i);
        share[i] = widen(load(grad + plane).at[0]) / T(pixels);
    }
    constexpr int U = kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> values[U], added[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
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
                    through(T(widen(values[u].at[i]) + widen(added[u].at[i])), share[i]));
            store<N>(y + at[u], out);
        }
    });
}

}  // namespace

void add_relu_mean(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        launch<plane_means<In, vector>>(grid_of(job.tiles), static_cast<Stream>(stream),
                                        static_cast<const In*>(job.x),
                                        static_cast<const In*>(job.residual),
                                        static_cast<In*>(job.y), job.tiles.count(0), job.tiles);
    });
}

void add_relu_mean_backward(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        launch<spread_means<In, vector>>(
            grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.grad),
            static_cast<const In*>(job.x), static_cast<const In*>(job.residual),
            static_cast<In*>(job.y), job.tiles.count(0), job.tiles);
    });
}

}  // namespace pooling_ext::cuda

// Batch normalisation with residual and ReLU, backward: the two passes of Ioffe and Szegedy.
#include "cuda/batch_norm.cuh"

namespace pooling_ext::cuda {
namespace {

template <int N>
constexpr int kUnroll = N == 1 ? 4 : 2;

// With kOutput, ReLU's mask is the output's, and the gradient is written masked.
template <class In, int N, bool kOutput>
__global__ void __launch_bounds__(kThreads)
    sums_parts(const In* grad, const In* x, const In* output, In* masked, double* parts, Norm norm,
               bool relu, ChannelTiles tiles) {
    using T = Accumulator<In>;
    __shared__ Lanes<T, N> gradients, products;
    const Position<N> p(tiles);
    const OwnCoefficients<T, N> c(tiles, p, norm);
    T gradient[N] = {}, product[N] = {};
    constexpr int U = kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> grads[U], values[U];
        [[maybe_unused]] Vec<In, N> outputs[kOutput ? U : 1];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            grads[u] = load<N>(grad + at[u]);
            values[u] = load<N>(x + at[u]);
            if constexpr (kOutput) outputs[u] = load<N>(output + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            Vec<In, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const T d = widen(values[u].at[i]) - c.center[i];
                T g = widen(grads[u].at[i]);
                if constexpr (kOutput) {
                    g = through(T(widen(outputs[u].at[i])), g);
                    out.at[i] = narrow<In>(g);
                } else if (relu) {
                    g = through(fused(d, c.scale[i], c.shift[i]), g);
                }
                gradient[i] += g;
                product[i] = fused(g, d, product[i]);
            }
            if constexpr (kOutput) store<N>(masked + at[u], out);
        }
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
        gradients.at(int(threadIdx.x), i) = gradient[i];
        products.at(int(threadIdx.x), i) = product[i];
    }
    add_up<N, TwoSums<T>>(
        tiles, p.own,
        [&](int lane, int i) { return TwoSums<T>{gradients.at(lane, i), products.at(lane, i)}; },
        [&](int channel, const TwoSums<T>& all) {
            double* const to = parts + p.split * 2 * norm.channels + p.first_channel + channel;
            store(to, {{double(all.first)}});
            store(to + norm.channels, {{double(all.second)}});
        });
}

// The splits' sums added up, and from products with x - center to products with x - mean.
template <class T>
__global__ void __launch_bounds__(kThreads)
    total_sums(const double* parts, int64_t splits, double* sums, Norm norm,
               ChannelVector grad_weight, ChannelVector grad_bias) {
    const int64_t channels = norm.channels;
    add_up_splits<TwoSums<double>>(
        channels, splits,
        [&](int64_t split, int64_t channel) {
            const double* const from = parts + split * 2 * channels + channel;
            return TwoSums<double>{load(from).at[0], load(from + channels).at[0]};
        },
        [&](int64_t channel, const TwoSums<double>& all) {
            const double mean = load(norm.stats + channel).at[0];
            const double products = all.second - (mean - double(T(mean))) * all.first;
            store(sums + channel, {{all.first}});
            store(sums + channels + channel, {{products}});
            set_value(grad_bias, channel, all.first);
            if (grad_weight.data == nullptr) return;
            const double variance = load(norm.stats + channels + channel).at[0];
            set_value(grad_weight, channel, products * inverse_root<T>(variance + norm.eps));
        });
}

template <class In, int N>
__global__ void __launch_bounds__(kThreads)
    spread_gradient(const In* grad, const In* x, In* y, Norm norm, bool relu, ChannelTiles tiles) {
    using T = Accumulator<In>;
    const Position<N> p(tiles, true);
    const OwnCoefficients<T, N> c(tiles, p, norm);
    const bool sums = norm.sums != nullptr, reads_x = relu || sums;
    constexpr int U = kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> grads[U], values[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            grads[u] = load<N>(grad + at[u]);
            if (reads_x) values[u] = load<N>(x + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            Vec<In, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const T d = reads_x ? widen(values[u].at[i]) - c.center[i] : T(0);
                T g = widen(grads[u].at[i]);
                if (relu) g = through(fused(d, c.scale[i], c.shift[i]), g);
                g *= c.scale[i];
                if (sums) g += fused(d, c.slope[i], c.offset[i]);
                out.at[i] = narrow<In>(g);
            }
            store<N>(y + at[u], out);
        }
    });
}

}  // namespace

void batch_norm_sums(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        const auto run = [&](auto output) {
            launch<sums_parts<In, vector, output>>(
                grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.grad),
                static_cast<const In*>(job.x), static_cast<const In*>(job.output),
                static_cast<In*>(job.masked), job.parts, job.norm, job.relu, job.tiles);
        };
        if (job.output != nullptr)
            run(std::true_type());
        else
            run(std::false_type());
    });
}

void batch_norm_total(const Norm& norm, DType dtype, const double* parts, int64_t splits,
                      double* sums, ChannelVector grad_weight, ChannelVector grad_bias,
                      StreamHandle stream) {
    const auto run = [&](auto zero) {
        launch<total_sums<decltype(zero)>>(grid_of_totals(norm.channels),
                                           static_cast<Stream>(stream), parts, splits, sums, norm,
                                           grad_weight, grad_bias);
    };
    if (dtype == DType::Float64)
        run(double());
    else
        run(float());
}

void batch_norm_backward(const BatchNormJob& job, StreamHandle stream) {
    with_tiles(job.dtype, job.tiles, [&](auto zero, auto vector) {
        using In = decltype(zero);
        launch<spread_gradient<In, vector>>(
            grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.grad),
            static_cast<const In*>(job.x), static_cast<In*>(job.y), job.norm, job.relu, job.tiles);
    });
}

}  // namespace pooling_ext::cuda

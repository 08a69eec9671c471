// Batch normalization with residual and activation, backward: the two passes of Ioffe and Szegedy.
#include "kernels/cuda/norm/batch_norm.cuh"

namespace pooling_ext::cuda {
namespace {

template <int N>
constexpr int kUnroll = N == 1 ? 4 : 2;

// Blocks that a multiprocessor is to have room for. What reads two tensors has enough bytes on
// their way with two, and more would have it keep coefficients in memory.
template <class Kept, bool kCurved>
constexpr int kResidentSums = std::is_void_v<Kept> || kCurved ? 2 : 3;

// Kept: void, or where a residual went into the output, and its gradient is written, what is kept
// of that call: In, or uint8_t for the mask. kCurved: the activation is neither ReLU nor nothing.
template <class In, int N, class Kept, bool kCurved>
__global__ void __launch_bounds__(kThreads, kResidentSums<Kept, kCurved>)
    sums_parts(const In* grad, const In* x, const Kept* kept, In* residual_grad, double* parts,
               Norm norm, ToldActivation<kCurved> activation, ChannelTiles tiles) {
    using T = Accumulator<In>;
    constexpr bool kKept = !std::is_void_v<Kept>, kMask = std::is_same_v<Kept, uint8_t>;
    __shared__ Lanes<T, N> gradients, products;
    const ChannelPosition<N> p(tiles);
    const OwnCoefficients<T, N> c(tiles, p, norm);
    T gradient[N] = {}, product[N] = {};
    // With all of these a second vector would leave a multiprocessor half as many threads.
    constexpr int U = kKept && kCurved && N > 1 ? 1 : kUnroll<N>;
    constexpr int kOthers = kKept && !kMask ? U : 1, kBits = kMask ? U : 1;
    [[maybe_unused]] const auto own = MaskOrder<kVector<In>>(tiles).column(p);
    p.template walk_units<U>(tiles, [&](const auto& at, const auto& there, const auto& rows) {
        Vec<In, N> grads[U], values[U];
        [[maybe_unused]] Vec<In, N> others[kOthers];
        [[maybe_unused]] unsigned bits[kBits];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            grads[u] = load<N>(grad + at[u]);
            values[u] = load<N>(x + at[u]);
            if constexpr (kMask)
                bits[u] = load(kept + own.byte(at[u], rows[u])).at[0] >> at[u] % kVector<In>;
            else if constexpr (kKept)
                others[u] = load<N>(kept + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            [[maybe_unused]] T factors[N];
            if constexpr (kCurved) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const T d = widen(values[u].at[i]) - c.center[i];
                    factors[i] = fused(d, c.scale[i], c.shift[i]);
                    if constexpr (kKept) factors[i] += widen(others[u].at[i]);
                }
                activate<true>(activation.kind, T(activation.slope), factors);
            }
            Vec<In, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const T d = widen(values[u].at[i]) - c.center[i];
                T g = widen(grads[u].at[i]);
                if constexpr (kCurved) {
                    g = multiplied(factors[i], g);
                } else if constexpr (kMask) {
                    g = bits[u] >> i & 1 ? g : T(0);
                } else if constexpr (kKept) {
                    g = relu_backward(T(widen(others[u].at[i])), g);
                } else if (activation) {
                    g = relu_backward(fused(d, c.scale[i], c.shift[i]), g);
                }
                if constexpr (kKept) out.at[i] = narrow<In>(g);
                gradient[i] += g;
                product[i] = fused(g, d, product[i]);
            }
            if constexpr (kKept) store<N>(residual_grad + at[u], out);
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

template <class In, int N, bool kCurved>
__global__ void __launch_bounds__(kThreads, kResident)
    spread_gradient(const In* grad, const In* x, In* y, Norm norm,
                    ToldActivation<kCurved> activation, ChannelTiles tiles) {
    using T = Accumulator<In>;
    const ChannelPosition<N> p(tiles, true);
    const OwnCoefficients<T, N> c(tiles, p, norm);
    const bool sums = norm.sums != nullptr;
    bool reads_x = true;
    if constexpr (!kCurved) reads_x = activation || sums;
    // What is not needed is read where a load is anyway, since a branch would have others wait for
    // it.
    const In* const given = reads_x ? x : grad;
    constexpr int U = kUnroll<N>;
    p.template walk<U>(tiles, [&](const auto& at, const auto& there) {
        Vec<In, N> grads[U], values[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            grads[u] = load<N>(grad + at[u]);
            values[u] = load<N>(given + at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!there[u]) continue;
            [[maybe_unused]] T factors[N];
            if constexpr (kCurved) {
#pragma unroll
                for (int i = 0; i < N; ++i)
                    factors[i] =
                        fused(widen(values[u].at[i]) - c.center[i], c.scale[i], c.shift[i]);
                activate<true>(activation.kind, T(activation.slope), factors);
            }
            Vec<In, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const T d = widen(values[u].at[i]) - c.center[i];
                T g = widen(grads[u].at[i]);
                if constexpr (kCurved)
                    g = multiplied(factors[i], g);
                else if (activation)
                    g = relu_backward(fused(d, c.scale[i], c.shift[i]), g);
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
        const auto run = [&](auto kept, auto curved) {
            using Kept = typename decltype(kept)::Type;
            const void* const data = job.mask != nullptr ? job.mask : job.kept;
            launch<sums_parts<In, vector, Kept, curved>>(
                grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.grad),
                static_cast<const In*>(job.x), static_cast<const Kept*>(data),
                static_cast<In*>(job.residual_grad), job.parts, job.norm,
                told<curved>(job.activation), job.tiles);
        };
        if (job.mask != nullptr) return run(Tag<uint8_t>(), std::false_type());
        with_flag(job.activation.curved(), [&](auto curved) {
            if (job.kept != nullptr)
                run(Tag<In>(), curved);
            else
                run(Tag<void>(), curved);
        });
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
        with_flag(job.activation.curved(), [&](auto curved) {
            launch<spread_gradient<In, vector, curved>>(
                grid_of(job.tiles), static_cast<Stream>(stream), static_cast<const In*>(job.grad),
                static_cast<const In*>(job.x), static_cast<In*>(job.y), job.norm,
                told<curved>(job.activation), job.tiles);
        });
    });
}

}  // namespace pooling_ext::cuda

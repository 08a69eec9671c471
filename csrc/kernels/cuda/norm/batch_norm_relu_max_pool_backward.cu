// The gradient of batch normalization, ReLU and max pooling: each input gathers the gradients of
// the windows that picked it.
#include "kernels/cuda/norm/batch_norm_relu_max_pool.cuh"
#include "kernels/cuda/pool/max_pool_cells.cuh"

namespace pooling_ext::cuda {
namespace {

// Gradients go to the winners, through ReLU, and on through the normalization.
template <class In>
struct ToWinnerThroughNorm : ToWinner<In, uint8_t> {
    using T = Accumulator<In>;
    const In* x;
    CoefficientRows<T> coefficients;
    bool sums;

    explicit ToWinnerThroughNorm(const BnReluMaxPoolJob& job)
        : x(static_cast<const In*>(job.x)), coefficients(job), sums(job.norm.sums != nullptr) {}

    bool aligned() const { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }
};

}  // namespace

template <class In, int N>
struct OwnTo<ToWinnerThroughNorm<In>, N> {
    using T = Accumulator<In>;
    const ToWinnerThroughNorm<In>& to;
    T center[N], scale[N], shift[N], slope[N], offset[N];

    POOLING_EXT_DEVICE OwnTo(const ToWinnerThroughNorm<In>& to, int64_t plane, int64_t channel)
        : to(to) {
        const auto& rows = to.coefficients;
        rows.read(0, plane, channel, center);
        rows.read(1, plane, channel, scale);
        rows.read(2, plane, channel, shift);
        rows.read(3, plane, channel, slope);
        rows.read(4, plane, channel, offset);
    }

    template <int M>
    POOLING_EXT_DEVICE Vec<In, M> finish(const T* acc, int64_t at) const {
        const Vec<In, M> values = load<M>(to.x + at);
        Vec<In, M> out;
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const int c = N == 1 ? 0 : i;
            const T d = widen(values.at[i]) - center[c];
            T g = relu_backward(fused(d, scale[c], shift[c]), acc[i]) * scale[c];
            if (to.sums) g += fused(d, slope[c], offset[c]);
            out.at[i] = narrow<In>(g);
        }
        return out;
    }
};

void stem_backward(const BnReluMaxPoolJob& job, StreamHandle stream) {
    with_float(job.dtype, [&](auto zero) {
        using In = decltype(zero);
        const ToWinnerThroughNorm<In> to(job);
        if (!launch_max_pool_cells(job.pool, static_cast<Stream>(stream), to))
            launch_backward(job.pool, static_cast<Stream>(stream), to);
    });
}

}  // namespace pooling_ext::cuda

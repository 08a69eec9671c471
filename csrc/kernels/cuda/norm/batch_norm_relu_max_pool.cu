// Batch normalization, ReLU and max pooling: the stem of a ResNet. A thread normalizes the elements
// that it reads, and as it walks down rows it reads each of its columns once. In training the
// winners' elements are kept: with them backward's sums are those of a batch norm of the output's
// size.
#include "kernels/cuda/norm/batch_norm_relu_max_pool.cuh"
#include "kernels/cuda/pool/max_pool_rows.cuh"

namespace pooling_ext::cuda {
namespace {

// --- the windows that CNNs use -------------------------------------------------------------------

template <class In_, bool kKeeps_>
struct Normalized {
    using In = In_;
    // Two blocks have 48 KB on their way. The coefficients leave no registers for a third.
    static constexpr int kResident = 2;
    static constexpr bool kKeeps = kKeeps_;
    CoefficientRows<Accumulator<In>> coefficients;
    In* winners;
};

}  // namespace

template <class In, bool kKeeps, class Columns>
struct OwnCompared<Normalized<In, kKeeps>, Columns> {
    using Lanes = typename Columns::Lanes;
    using Value = typename Lanes::Value;
    using T = Accumulator<In>;
    static constexpr int N = Columns::kChannels;
    T center[N], scale[N], shift[N];

    POOLING_EXT_DEVICE OwnCompared(const Normalized<In, kKeeps>& what, int64_t plane, int channel) {
        what.coefficients.read(0, plane, channel, center);
        what.coefficients.read(1, plane, channel, scale);
        what.coefficients.read(2, plane, channel, shift);
    }

    // Rounded as the operators in turn would, on which it depends who wins.
    POOLING_EXT_DEVICE Value operator()(Value x, int w) const {
        return Lanes::map(x, [&](T one, int lane) {
            const int i = N == 1 ? 0 : w * Lanes::kLanes + lane;
            return fused(one - center[i], scale[i], shift[i]);
        });
    }
    POOLING_EXT_DEVICE T of_one(In x, int i) const {
        return widen(narrow<In>(fused(widen(x) - center[i], scale[i], shift[i])));
    }

    // ReLU changes the winner only among elements that it makes zero, which get no gradient.
    POOLING_EXT_DEVICE float finish(float best) const { return rectified(best); }
    POOLING_EXT_DEVICE unsigned finish(unsigned best) const {
        return Lanes::pick(Lanes::wins(0u, best), 0u, best);
    }
};

namespace {

// --- any window ----------------------------------------------------------------------------------

// `Offset` is what offsets in a window are counted in; void where nobody asks for them, nor for
// what won.
template <class In_, class Offset>
struct NormalMaxOp {
    using In = In_;
    using T = Accumulator<In>;
    static constexpr bool kOffsets = !std::is_void_v<Offset>, kAverages = false, kVectors = true;
    static constexpr bool kSquares = false;
    using Wide = NormalMaxOp<In, std::conditional_t<kOffsets, int64_t, void>>;

    struct Value {
        T value;
    };
    template <class P>
    struct Winner {
        T value;
        P offset;
        In element;
    };
    using Acc =
        std::conditional_t<kOffsets, Winner<std::conditional_t<kOffsets, Offset, int>>, Value>;

    static constexpr T kLowest = -std::numeric_limits<T>::infinity();

    CoefficientRows<T> coefficients;
    In* winners;

    NormalMaxOp(const CoefficientRows<T>& coefficients, In* winners)
        : coefficients(coefficients), winners(winners) {}
    template <class Other>
    explicit NormalMaxOp(const NormalMaxOp<In, Other>& other)
        : coefficients(other.coefficients), winners(other.winners) {}

    POOLING_EXT_DEVICE void start(Acc& acc) const {
        acc.value = kLowest;
        if constexpr (kOffsets) acc.offset = -1;
    }

    POOLING_EXT_DEVICE In finish(const Acc& acc) const { return narrow<In>(rectified(acc.value)); }

    template <int N>
    POOLING_EXT_DEVICE void keep(int64_t to, const Acc (&acc)[N]) const
        requires kOffsets
    {
        Vec<In, N> elements;
#pragma unroll
        for (int i = 0; i < N; ++i) elements.at[i] = acc[i].element;
        store<N>(winners + to, elements);
    }
};

}  // namespace

template <class In, class Offset, int N>
struct OwnOp<NormalMaxOp<In, Offset>, N> {
    using Op = NormalMaxOp<In, Offset>;
    using T = typename Op::T;
    T center[N], scale[N], shift[N];

    POOLING_EXT_DEVICE OwnOp(const Op& op, int64_t plane, int64_t channel) {
        op.coefficients.read(0, plane, channel, center);
        op.coefficients.read(1, plane, channel, scale);
        op.coefficients.read(2, plane, channel, shift);
    }

    template <class Int>
    POOLING_EXT_DEVICE void step(typename Op::Acc& acc, int i, In element, Int offset) const {
        const T z = widen(narrow<In>(fused(widen(element) - center[i], scale[i], shift[i])));
        bool wins = z > acc.value || is_nan(z);
        if constexpr (Op::kOffsets) wins = wins || acc.offset < 0;
        if (!wins) return;
        acc.value = z;
        if constexpr (Op::kOffsets) {
            acc.offset = decltype(acc.offset)(offset);
            acc.element = element;
        }
    }
};

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) write_coefficients(Norm norm, T* to) {
    const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (channel >= norm.channels) return;
    const auto c = Coefficients<T>::of(norm, channel);
    const T values[] = {c.center, c.scale, c.shift, c.slope, c.offset};
#pragma unroll
    for (int row = 0; row < 5; ++row) store(to + row * norm.channels + channel, {{values[row]}});
}

}  // namespace

void stem_coefficients(const BnReluMaxPoolJob& job, StreamHandle stream) {
    const Grid grid{dim3(unsigned(ceil_div(job.norm.channels, kThreads))), dim3(kThreads)};
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        launch<write_coefficients<T>>(grid, static_cast<Stream>(stream), job.norm,
                                      static_cast<T*>(job.coefficients));
    };
    if (job.dtype == DType::Float64)
        run(double());
    else
        run(float());
}

void stem_forward(const BnReluMaxPoolJob& job, StreamHandle handle) {
    const Stream stream = static_cast<Stream>(handle);
    with_float(job.dtype, [&](auto zero) {
        using In = decltype(zero);
        const CoefficientRows<Accumulator<In>> coefficients(job);
        In* const winners = static_cast<In*>(job.winners);
        if (job.pool.offsets_out == nullptr) {
            const Normalized<In, false> what{coefficients, nullptr};
            if (!launch_max_pool_rows<false>(what, job.pool, Offsets::None, stream))
                launch_forward(NormalMaxOp<In, void>(coefficients, nullptr), job.pool,
                               Offsets::None, stream);
        } else {
            const Normalized<In, true> what{coefficients, winners};
            if (!launch_max_pool_rows<true>(what, job.pool, Offsets::Byte, stream))
                launch_forward(NormalMaxOp<In, int>(coefficients, winners), job.pool, Offsets::Byte,
                               stream);
        }
    });
}

}  // namespace pooling_ext::cuda

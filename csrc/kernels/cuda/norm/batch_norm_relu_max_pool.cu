// Batch normalisation, ReLU and max pooling: the stem of a ResNet. A thread normalises the elements
// of its windows as it reads them; what neighbouring windows share it finds in the first-level
// cache.
#include <limits>

#include "kernels/cuda/norm/batch_norm_relu_max_pool.cuh"
#include "kernels/cuda/pool/pool_forward.cuh"

namespace pooling_ext::cuda {
namespace {

// `Place` is what places in a window are counted in; void where nobody asks for them.
template <class In_, class Place>
struct NormalMaxOp {
    using In = In_;
    using T = Accumulator<In>;
    static constexpr bool kPlaces = !std::is_void_v<Place>, kAverages = false, kVectors = true;
    using Wide = NormalMaxOp<In, std::conditional_t<kPlaces, int64_t, void>>;

    struct Value {
        T value;
    };
    template <class P>
    struct Winner {
        T value;
        P place;
    };
    using Acc = std::conditional_t<kPlaces, Winner<std::conditional_t<kPlaces, Place, int>>, Value>;

    static constexpr T kLowest = -std::numeric_limits<T>::infinity();

    CoefficientRows<T> coefficients;

    explicit NormalMaxOp(const CoefficientRows<T>& coefficients) : coefficients(coefficients) {}
    template <class Other>
    explicit NormalMaxOp(const NormalMaxOp<In, Other>& other) : coefficients(other.coefficients) {}

    POOLING_EXT_DEVICE void start(Acc& acc) const {
        acc.value = kLowest;
        if constexpr (kPlaces) acc.place = -1;
    }

    // ReLU changes the winner only among elements that it makes zero, which get no gradient.
    POOLING_EXT_DEVICE In finish(const Acc& acc) const { return narrow<In>(rectified(acc.value)); }
};

}  // namespace

template <class In, class Place, int N>
struct OwnOp<NormalMaxOp<In, Place>, N> {
    using Op = NormalMaxOp<In, Place>;
    using T = typename Op::T;
    T center[N], scale[N], shift[N];

    POOLING_EXT_DEVICE OwnOp(const Op& op, int64_t plane, int64_t channel) {
        op.coefficients.read(0, plane, channel, center);
        op.coefficients.read(1, plane, channel, scale);
        op.coefficients.read(2, plane, channel, shift);
    }

    template <class Int>
    POOLING_EXT_DEVICE void step(typename Op::Acc& acc, int i, In element, Int place) const {
        // Rounded as the operators in turn would, on which it depends who wins.
        const T z = widen(narrow<In>(fused(widen(element) - center[i], scale[i], shift[i])));
        bool wins = z > acc.value || is_nan(z);
        if constexpr (Op::kPlaces) wins = wins || acc.place < 0;
        if (!wins) return;
        acc.value = z;
        if constexpr (Op::kPlaces) acc.place = decltype(acc.place)(place);
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

void stem_forward(const BnReluMaxPoolJob& job, StreamHandle stream) {
    with_float(job.dtype, [&](auto zero) {
        using In = decltype(zero);
        const CoefficientRows<Accumulator<In>> coefficients(job);
        if (job.pool.places_out == nullptr)
            launch_forward(NormalMaxOp<In, void>(coefficients), job.pool, Places::None,
                           static_cast<Stream>(stream));
        else
            launch_forward(NormalMaxOp<In, int>(coefficients), job.pool, Places::Byte,
                           static_cast<Stream>(stream));
    });
}

}  // namespace pooling_ext::cuda

// Average pooling.
#include "kernels/cuda/pool/avg_pool.h"
#include "kernels/cuda/pool/pool_backward.cuh"
#include "kernels/cuda/pool/pool_forward.cuh"

namespace pooling_ext::cuda {
namespace {

template <class In_>
struct SumOp {
    using In = In_;
    using T = Accumulator<In>;
    using Wide = SumOp;
    static constexpr bool kPlaces = false, kAverages = true, kVectors = true;

    struct Acc {
        T value;
    };

    POOLING_EXT_DEVICE void start(Acc& acc) const { acc.value = 0; }
    template <class Int>
    POOLING_EXT_DEVICE void step(Acc& acc, In element, Int) const {
        acc.value += widen(element);
    }
    POOLING_EXT_DEVICE Acc merge(const Acc& a, const Acc& b) const { return {a.value + b.value}; }
    POOLING_EXT_DEVICE In finish(const Acc& acc, T count, T) const {
        return narrow<In>(acc.value / count);
    }
};

}  // namespace

void avg_pool(const PoolJob& job, DType dtype, StreamHandle stream) {
    with_float(dtype, [&](auto zero) {
        launch_forward(SumOp<decltype(zero)>(), job, Places::None, static_cast<Stream>(stream));
    });
}

void avg_pool_backward(const PoolJob& job, DType dtype, StreamHandle stream) {
    with_float(dtype, [&](auto zero) {
        launch_backward<ToAll<decltype(zero)>>(job, static_cast<Stream>(stream));
    });
}

}  // namespace pooling_ext::cuda

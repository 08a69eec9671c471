// Power-average pooling for the norms 1, 2 and 3.
#include "kernels/cuda/pool/lp_pool.h"
#include "kernels/cuda/pool/pool_forward.cuh"

namespace pooling_ext::cuda {
namespace {

template <class In_>
struct PowerSumOp {
    using In = In_;
    using T = Accumulator<In>;
    using Wide = PowerSumOp;
    static constexpr bool kOffsets = false, kAverages = true, kVectors = true;

    struct Acc {
        T value;
    };

    int norm;
    bool magnitude;

    POOLING_EXT_DEVICE void start(Acc& acc) const { acc.value = 0; }
    template <class Int>
    POOLING_EXT_DEVICE void step(Acc& acc, In element, Int) const {
        T x = widen(element);
        if (magnitude) x = x < 0 ? -x : x;
        acc.value += norm == 1 ? x : norm == 2 ? x * x : x * x * x;
    }
    POOLING_EXT_DEVICE Acc merge(const Acc& a, const Acc& b) const { return {a.value + b.value}; }
    // PyTorch takes the average and multiplies by the full window's size.
    POOLING_EXT_DEVICE In finish(const Acc& acc, T count, T size) const {
        const T x = acc.value / count * size;
        return narrow<In>(norm == 1 ? x : norm == 2 ? sqrt(x) : pow(x, T(1) / T(3)));
    }
};

}  // namespace

void lp_pool(const PoolJob& job, DType dtype, void* parts, StreamHandle stream) {
    with_float(dtype, [&](auto zero) {
        launch_forward(PowerSumOp<decltype(zero)>{job.norm, job.magnitude}, job, Offsets::None,
                       static_cast<Stream>(stream), parts);
    });
}

}  // namespace pooling_ext::cuda

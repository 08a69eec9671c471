// Average pooling.
#include "kernels/cuda/norm/batch_norm.h"
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
    static constexpr bool kOffsets = false, kAverages = true, kVectors = true;

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

// Of windows that are the whole plane.
BatchNormJob mean_job(const PoolJob& job, DType dtype) {
    const PoolParams& p = job.p;
    const int64_t element = dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
    const bool aligned = reinterpret_cast<uintptr_t>(job.src) % 16 == 0;
    const bool channels_last = p.channels > 1;
    BatchNormJob mean =
        plane_job(p.outer, p.channels, p.in_plane(), channels_last, element, aligned);
    mean.dtype = dtype;
    mean.x = job.src;
    mean.y = job.dst;
    const bool pad = job.count_include_pad;
    const int64_t count = p.d.count(0, pad) * p.h.count(0, pad) * p.w.count(0, pad);
    mean.norm.count = double(job.divisor ? job.divisor : count);
    return mean;
}

}  // namespace

int64_t avg_pool_parts(const PoolJob& job, DType dtype) {
    const PoolParams& p = job.p;
    if (!is_whole(p) || p.in_plane() < 2 || p.outer < 1) return 0;
    const BatchNormJob mean = mean_job(job, dtype);
    return mean.plane_splits > 1 ? mean.tiles.splits * mean.tiles.channels : 0;
}

void avg_pool(const PoolJob& job, DType dtype, double* parts, StreamHandle stream) {
    if (parts) {
        BatchNormJob mean = mean_job(job, dtype);
        mean.parts = parts;
        return global_mean(mean, stream);
    }
    with_float(dtype, [&](auto zero) {
        launch_forward(SumOp<decltype(zero)>(), job, Offsets::None, static_cast<Stream>(stream));
    });
}

void avg_pool_backward(const PoolJob& job, DType dtype, StreamHandle stream) {
    with_float(dtype, [&](auto zero) {
        launch_backward<ToAll<decltype(zero)>>(job, static_cast<Stream>(stream));
    });
}

}  // namespace pooling_ext::cuda

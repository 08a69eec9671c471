// Power-average pooling for the norms 1, 2 and 3, compiled once for each instruction set.
#include "cpu/divisors.h"
#include "cpu/interleave.h"
#include "cpu/pool_forward.h"
#include "cpu/tables.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Stored_, int kNorm, bool kMagnitude>
struct PowerSumOp {
    using In = Stored_;
    using T = Accumulator<In>;
    static constexpr bool kPlain = false;
    static POOLING_EXT_INLINE T identity() { return T(0); }
    static POOLING_EXT_INLINE T load(In stored) {
        T x = widen(stored);
        if constexpr (kMagnitude) x = x < 0 ? -x : x;
        T power = x;
        for (int i = 1; i < kNorm; ++i) power *= x;
        return power;
    }
    static POOLING_EXT_INLINE T combine(T a, T b) { return a + b; }
};

template <int kNorm, class T>
POOLING_EXT_INLINE T root(T x) {
    if constexpr (kNorm == 1) return x;
    if constexpr (kNorm == 2) return std::sqrt(x);
    return std::pow(x, T(1) / T(kNorm));
}

template <class In, int kNorm, bool kMagnitude>
void power_average(const Job& job, int64_t begin, int64_t end, Scratch scratch) {
    using T = Accumulator<In>;
    const Divisors<T> divisors(job, scratch);
    const PoolParams& p = job.p;
    pool_rows<PowerSumOp<In, kNorm, kMagnitude>, In>(
        job, begin, end, scratch,
        [&](int64_t od, int64_t oh, const T* __restrict row, In* __restrict y) {
            // PyTorch takes the average and multiplies by the full window's size.
            const T whole = T(p.d.places(od) * p.h.places(oh) * p.w.places(0));
            divisors.divide(
                od, oh, [=](int64_t i) { return row[i]; },
                [=](int64_t i, T mean) { y[i] = narrow<In>(root<kNorm>(mean * whole)); });
        });
}

template <class In>
void power_average_of(const Job& job, int64_t begin, int64_t end, void* memory) {
    const Scratch scratch(memory);
    if (job.block)
        return pool_blocks(job, begin, end, scratch, power_average_of<In>, true, sizeof(In), 0);
    switch (job.norm) {
        case 1:
            return job.magnitude ? power_average<In, 1, true>(job, begin, end, scratch)
                                 : power_average<In, 1, false>(job, begin, end, scratch);
        case 2:
            return power_average<In, 2, false>(job, begin, end, scratch);
        case 3:
            return job.magnitude ? power_average<In, 3, true>(job, begin, end, scratch)
                                 : power_average<In, 3, false>(job, begin, end, scratch);
        default:
            return;
    }
}

}  // namespace

Kernel lp_pool(DType dtype) {
    return for_float(dtype, [](auto zero) -> Kernel { return power_average_of<decltype(zero)>; });
}

const Kernels kernels{max_pool, max_pool_backward, avg_pool,      avg_pool_backward,
                      lp_pool,  batch_norm,        add_relu_mean, stem};

}  // namespace pooling_ext::POOLING_EXT_ISA

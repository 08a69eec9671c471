// Average pooling, compiled once for each instruction set.
#include "cpu/divisors.h"
#include "cpu/interleave.h"
#include "cpu/pool_backward.h"
#include "cpu/pool_forward.h"
#include "cpu/tables.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Stored_>
struct SumOp {
    using In = Stored_;
    using T = Accumulator<In>;
    static POOLING_EXT_INLINE T identity() { return T(0); }
    static POOLING_EXT_INLINE T load(In x) { return widen(x); }
    static POOLING_EXT_INLINE T combine(T a, T b) { return a + b; }
};

template <class In>
void average(const Job& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    if (job.block) return pool_blocks(job, begin, end, scratch, average<In>, true, sizeof(In), 0);
    const Divisors<T> divisors(job, scratch);
    pool_rows<SumOp<In>, In>(job, begin, end, scratch,
                             [&](int64_t od, int64_t oh, const T* __restrict row, In* __restrict y) {
                                 divisors.each(od, oh, [=](int64_t i, T divisor) { y[i] = narrow<In>(row[i] / divisor); });
                             });
}

// Shares the gradients of a row of outputs out over the columns of their windows. The rows over
// one input row are summed first, and shared out together with the last of them.
template <class G>
class AverageSpread {
public:
    using T = Accumulator<G>;

    AverageSpread(const Job& job, Scratch& scratch) : divisors_(job, scratch), share_(scratch.take<T>(job.p.out_row())) {}

    void operator()(RowGradient<T>& gradient, const SpreadRow<G>& row) const {
        const PoolParams& p = gradient.params();
        const Axis& w = p.w;
        const G* __restrict grad = row.grad;
        T* __restrict share = share_;
        divisors_.each(row.od, row.oh, [=](int64_t i, T divisor) { share[i] = widen(grad[i]) / divisor; });
        if (gradient.dealing()) {
            for (int64_t c = 0; c < w.kernel; ++c) add(gradient.phase(c), share_, w.out);
            return;
        }
        for (int64_t o = 0; o < w.out; ++o) {
            const int64_t from = w.start(o) + w.first(o), to = w.start(o) + w.end(o);
            if (p.channels == 1) {
                T* __restrict sum = gradient.column(0);
                for (int64_t i = from; i < to; ++i) sum[i] += share_[o];
            } else {
                for (int64_t i = from; i < to; ++i)
                    add(gradient.column(i), share_ + o * p.channels, p.channels);
            }
        }
    }

private:
    static void add(T* __restrict sum, const T* __restrict share, int64_t n) {
        for (int64_t i = 0; i < n; ++i) sum[i] += share[i];
    }

    Divisors<T> divisors_;
    T* share_;
};

template <class G>
void average_backward(const Job& job, int64_t begin, int64_t end, void* memory) {
    Scratch scratch(memory);
    if (job.block) return pool_blocks(job, begin, end, scratch, average_backward<G>, false, sizeof(G), 0);
    AverageSpread<G> spread(job, scratch);
    gather_rows<G>(job, begin, end, scratch, deals(job.p), spread);
}

}  // namespace

Kernel avg_pool(DType dtype) {
    return for_float(dtype, [](auto zero) -> Kernel { return average<decltype(zero)>; });
}

Kernel avg_pool_backward(DType dtype) {
    return for_float(dtype, [](auto zero) -> Kernel { return average_backward<decltype(zero)>; });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

// Power-average pooling for the norms 1, 2 and 3, compiled once for each instruction set.
#include "kernels/cpu/pool/block_transpose.h"
#include "kernels/cpu/pool/divisors.h"
#include "kernels/cpu/pool/lp_pool.h"
#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Stored_, int kNorm, bool kMagnitude>
struct PowerSumOp {
    using In = Stored_;
    using T = Accumulator<In>;
    static POOLING_EXT_INLINE T load(In stored) {
        T x = widen(stored);
        if constexpr (kMagnitude) x = x < 0 ? -x : x;
        T power = x;
        for (int i = 1; i < kNorm; ++i) power *= x;
        return power;
    }
    template <class X, class... Rest>
    static POOLING_EXT_INLINE X combine(X a, Rest... rest) {
        return (a + ... + rest);
    }
};

template <class T_>
struct SumOp {
    using In = T_;
    using T = T_;
    static constexpr bool kPlain = true;
    static POOLING_EXT_INLINE T identity() { return T(0); }
    static POOLING_EXT_INLINE T load(T x) { return x; }
    template <class X, class... Rest>
    static POOLING_EXT_INLINE X combine(X a, Rest... rest) {
        return (a + ... + rest);
    }
};

constexpr int64_t kPiece = 512;

template <class In>
using ReduceRows = void (*)(Accumulator<In>* dst, const In* const* rows, int64_t count, int64_t n);

// What adds rows of powers up.
template <class In>
ReduceRows<In> reduce_rows_of(int norm, bool magnitude) {
    const auto with = [](auto op) -> ReduceRows<In> {
        return reduce_rows<decltype(op), Stored<decltype(op)>>;
    };
    if (norm == 2) return with(PowerSumOp<In, 2, false>{});
    if (norm == 1)
        return magnitude ? with(PowerSumOp<In, 1, true>{}) : with(PowerSumOp<In, 1, false>{});
    return magnitude ? with(PowerSumOp<In, 3, true>{}) : with(PowerSumOp<In, 3, false>{});
}

template <class In, class T>
void store_roots(In* __restrict y, const T* __restrict powers, int64_t n, int norm) {
    if (norm == 1)
        for (int64_t i = 0; i < n; ++i) y[i] = narrow<In>(powers[i]);
    else if (norm == 2)
        for (int64_t i = 0; i < n; ++i) y[i] = narrow<In>(std::sqrt(powers[i]));
    else
        for (int64_t i = 0; i < n; ++i) y[i] = narrow<In>(std::pow(powers[i], T(1) / T(norm)));
}

// The sum of a plane's powers, a piece at a time.
template <class In, class T = Accumulator<In>>
T sum_of_powers(const In* x, int64_t n, ReduceRows<In> add_rows, T* piece) {
    T total = T(0);
    for (int64_t from = 0; from < n; from += kPiece) {
        const In* const row = x + from;
        const int64_t some = n - from < kPiece ? n - from : kPiece;
        add_rows(piece, &row, 1, some);
        total += reduce<SumOp<T>, Computed<SumOp<T>>>(piece, some, 1);
    }
    return total;
}

// The powers of a window's rows are added up first. The second step, over the columns of that sum,
// is one for all norms.
template <class In>
void power_average(const Job& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    if (job.block)
        return pool_blocks(job, begin, end, scratch, power_average<In>, true, sizeof(In), 0);
    const Divisors<T> divisors(job, scratch);
    const PoolParams& p = job.p;
    // All of a plane is one long row, of which scratch memory holds a piece.
    const bool whole_plane = p.channels == 1 && is_whole(p) && p.window_rows() == 1;
    const int64_t plane = p.in_plane() * p.channels;
    const int64_t in = whole_plane ? kPiece : whole_vectors(p.in_row());
    const auto* const src = static_cast<const In*>(job.src);
    const In* const src_end = src + p.outer * plane;
    const In** const rows = scratch.take<const In*>(p.window_rows());
    T* const sum = scratch.take<T>(in + kVector);
    PoolParams columns = p;
    columns.outer = 1;
    columns.d = columns.h = Axis{};
    RowReducer<SumOp<T>> add_columns(columns, sum + in + kVector, scratch);
    const ReduceRows<In> add_rows = reduce_rows_of<In>(job.norm, job.magnitude);
    each_index(
        begin, end, p.d.out, p.h.out, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
            int64_t count = 0;
            each_row(p, src + outer * plane, od, oh,
                     [&](const In* row, int64_t) { rows[count++] = row; });
            T* __restrict powers = sum;
            if (whole_plane) {
                *powers = sum_of_powers(rows[0], plane, add_rows, sum);
            } else if (count > 0) {
                prefetch_rows(p, rows[count - 1]);
                add_rows(sum, rows, count, rows[count - 1] + in <= src_end ? in : p.in_row());
            } else {
                fill(sum, T(0), in);
            }
            if (!whole_plane) powers = add_columns(sum, 0, 0);
            // PyTorch takes the average and multiplies by the full window's size.
            const T whole =
                T(double(p.d.length(od)) * double(p.h.length(oh)) * double(p.w.length(0)));
            divisors.divide(
                od, oh, [=](int64_t i) { return powers[i]; },
                [=](int64_t i, T mean) { powers[i] = mean * whole; });
            store_roots(static_cast<In*>(job.dst) + index * p.out_row(), powers, p.out_row(),
                        job.norm);
        });
}

}  // namespace

Kernel lp_pool(DType dtype) {
    return for_float(dtype, [](auto zero) -> Kernel { return power_average<decltype(zero)>; });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

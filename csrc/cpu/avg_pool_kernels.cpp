// Average pooling, compiled once for each instruction set.
#include "cpu/divisors.h"
#include "cpu/interleave.h"
#include "cpu/pool_backward.h"
#include "cpu/pool_forward.h"
#include "cpu/pool_pixels.h"
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

// Averages of whole small planes, as many at a time as a register has lanes: the lanes of each are
// summed apart, then transposed so that one addition serves all.
template <class In>
void average_planes(const Job& job, int64_t begin, int64_t end) {
    using T = Accumulator<In>;
    constexpr int64_t kLanes = Tile<T>::kLanes;
    const int64_t n = job.p.in_plane(), whole = n / kLanes * kLanes;
    const T divisor = T(job.divisor ? job.divisor : n);
    In* y = static_cast<In*>(job.dst);
    T apart[kLanes * kLanes] = {}, turned[kLanes * kLanes], rest[kLanes];
    for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t count = end - first < kLanes ? end - first : kLanes;
        for (int64_t plane = 0; plane < count; ++plane) {
            const In* __restrict x = static_cast<const In*>(job.src) + (first + plane) * n;
            T* __restrict lanes = apart + plane * kLanes;
            for (int64_t l = 0; l < kLanes; ++l) lanes[l] = T(0);
            for (int64_t i = 0; i < whole; i += kLanes)
                for (int64_t l = 0; l < kLanes; ++l) lanes[l] += widen(x[i + l]);
            T tail = T(0);
            for (int64_t i = whole; i < n; ++i) tail += widen(x[i]);
            rest[plane] = tail;
        }
        Tile<T>::transpose(turned, kLanes, apart, kLanes);
        for (int64_t lane = 1; lane < kLanes; ++lane)
            for (int64_t plane = 0; plane < kLanes; ++plane)
                turned[plane] += turned[lane * kLanes + plane];
        for (int64_t plane = 0; plane < count; ++plane)
            y[first + plane] = narrow<In>((turned[plane] + rest[plane]) / divisor);
    }
}

template <class In>
void average(const Job& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    if (job.block) return pool_blocks(job, begin, end, scratch, average<In>, true, sizeof(In), 0);
    if (job.p.channels == 1 && is_whole(job.p) && job.p.in_plane() <= kSmallPlane)
        return average_planes<In>(job, begin, end);
    const Divisors<T> divisors(job, scratch);
    if (PixelWalker<In>::takes(job.p))
        return pool_pixels<SumOp<In>, In>(
            job, begin, end, [&](int64_t od, int64_t oh, int64_t o, auto use) {
                divisors.divide_pixel(od, oh, o, [&](auto divide) {
                    use([=](T sum) { return narrow<In>(divide(sum)); });
                });
            });
    pool_rows<SumOp<In>, In>(
        job, begin, end, scratch,
        [&](int64_t od, int64_t oh, const T* __restrict row, In* __restrict y) {
            divisors.divide(
                od, oh, [=](int64_t i) { return row[i]; },
                [=](int64_t i, T mean) { y[i] = narrow<In>(mean); });
        });
}

// Shares gradients out over their windows: those of the rows of outputs over one row of inputs are
// summed first, then shared out over its columns.
template <class G>
class AverageSpread {
  public:
    using T = Accumulator<G>;

    AverageSpread(const Job& job, Scratch& scratch)
        : p_(job.p),
          divisors_(job, scratch),
          share_(scratch.take<T>(p_.out_row())),
          apart_(!deals(p_) && !p_.w.adaptive && p_.w.stride >= p_.w.kernel),
          gradient_(p_, scratch, deals(p_), !apart_) {}

    void start() { any_ = false; }

    void add(const SpreadRow<G>& row) {
        const G* __restrict grad = row.grad;
        T* __restrict share = share_;
        const auto read = [=](int64_t i) { return widen(grad[i]); };
        if (any_)
            divisors_.divide(row.od, row.oh, read, [=](int64_t i, T part) { share[i] += part; });
        else
            divisors_.divide(row.od, row.oh, read, [=](int64_t i, T part) { share[i] = part; });
        any_ = true;
    }

    void finish(G* dst) {
        const Axis& w = p_.w;
        const int64_t channels = p_.channels;
        if (!any_) {
            std::memset(dst, 0, p_.in_row() * sizeof(G));
        } else if (deals(p_)) {
            gradient_.clear();
            for (int64_t c = 0; c < w.kernel; ++c) sum(gradient_.phase(c), share_, w.out);
            gradient_.write(dst);
        } else if (apart_) {
            write_apart(dst);
        } else {
            gradient_.clear();
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t from = w.start(o) + w.first(o), to = w.start(o) + w.end(o);
                if (channels == 1) {
                    T* __restrict total = gradient_.column(0);
                    for (int64_t i = from; i < to; ++i) total[i] += share_[o];
                } else {
                    for (int64_t i = from; i < to; ++i)
                        sum(gradient_.column(i), share_ + o * channels, channels);
                }
            }
            gradient_.write(dst);
        }
    }

  private:
    static void sum(T* __restrict total, const T* __restrict share, int64_t n) {
        for (int64_t i = 0; i < n; ++i) total[i] += share[i];
    }

    // Where no two windows overlap, each column has its share from one of them, or none.
    void write_apart(G* __restrict dst) const {
        const Axis& w = p_.w;
        const int64_t channels = p_.channels;
        int64_t done = 0;
        const auto zero_until = [&](int64_t column) {
            if (column > done)
                std::memset(dst + done * channels, 0, (column - done) * channels * sizeof(G));
        };
        for (int64_t o = 0; o < w.out; ++o) {
            const int64_t from = w.start(o) + w.first(o), to = w.start(o) + w.end(o);
            zero_until(from);
            if (channels == 1) {
                fill(dst + from, narrow<G>(share_[o]), to - from);
            } else {
                const T* __restrict share = share_ + o * channels;
                for (int64_t i = from; i < to; ++i)
                    for (int64_t c = 0; c < channels; ++c)
                        dst[i * channels + c] = narrow<G>(share[c]);
            }
            done = to;
        }
        zero_until(w.in);
    }

    const PoolParams& p_;
    Divisors<T> divisors_;
    T* const share_;
    // Whether no two windows overlap.
    const bool apart_;
    RowGradient<T> gradient_;
    bool any_ = false;
};

template <class G>
void average_backward(const Job& job, int64_t begin, int64_t end, void* memory) {
    Scratch scratch(memory);
    if (job.block)
        return pool_blocks(job, begin, end, scratch, average_backward<G>, false, sizeof(G), 0);
    AverageSpread<G> spread(job, scratch);
    gather_rows<G>(
        job, begin, end, [&] { spread.start(); }, [&](const SpreadRow<G>& row) { spread.add(row); },
        [&](G* dst) { spread.finish(dst); });
}

}  // namespace

Kernel avg_pool(DType dtype) {
    return for_float(dtype, [](auto zero) -> Kernel { return average<decltype(zero)>; });
}

Kernel avg_pool_backward(DType dtype) {
    return for_float(dtype, [](auto zero) -> Kernel { return average_backward<decltype(zero)>; });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

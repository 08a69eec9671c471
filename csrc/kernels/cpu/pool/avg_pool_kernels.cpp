// Average pooling, compiled once for each instruction set.
#include "kernels/cpu/pool/avg_pool.h"
#include "kernels/cpu/pool/block_transpose.h"
#include "kernels/cpu/pool/divisors.h"
#include "kernels/cpu/pool/pool_backward.h"
#include "kernels/cpu/pool/pool_forward.h"
#include "kernels/cpu/pool/pool_nhwc.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Stored_>
struct SumOp {
    using In = Stored_;
    using T = Accumulator<In>;
    static constexpr bool kPlain = std::is_same_v<In, T>;
    static POOLING_EXT_INLINE T identity() { return T(0); }
    static POOLING_EXT_INLINE T load(In x) { return widen(x); }
    static POOLING_EXT_INLINE In store(T x) { return narrow<In>(x); }
    template <class X, class... Rest>
    static POOLING_EXT_INLINE X combine(X a, Rest... rest) {
        return (a + ... + rest);
    }
};

// Sums of runs of elements, by lanes. With vector types, because compilers take arrays of lanes
// apart.
template <class In>
struct LaneSums {
    using T = Accumulator<In>;
    using V = typename Tile<T>::V;
    static constexpr int64_t kLanes = Tile<T>::kLanes, kBlock = 2048, kAhead = 512;
    using Words = VectorOf<uint32_t, kLanes>;
    using Halves = VectorOf<uint16_t, kLanes>;

    static POOLING_EXT_INLINE V load(const In* x) {
        V v;
        if constexpr (std::is_same_v<In, T>) {
            std::memcpy(&v, x, sizeof(v));
        } else {
            Halves halves;
            std::memcpy(&halves, x, sizeof(halves));
            const Words words = __builtin_convertvector(halves, Words);
            if constexpr (std::is_same_v<In, BFloat16>) {
                v = bit_cast<V>(words << 16);
            } else {  // as widen(Float16)
                const Words sign = (words & 0x8000u) << 16, magnitude = (words & 0x7fffu) << 13;
                const Words finite = bit_cast<Words>(bit_cast<V>(magnitude) * 0x1p112f);
                v = bit_cast<V>(sign |
                                (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
            }
        }
        return v;
    }

    // Adds 2 * kLanes elements, each to either sum.
    static POOLING_EXT_INLINE void add(V& a, V& b, const In* x) {
        if constexpr (std::is_same_v<In, BFloat16>) {
            // As words of two, whose halves are floats but for a shift and a mask.
            Words words;
            std::memcpy(&words, x, sizeof(words));
            a += bit_cast<V>(words << 16);
            b += bit_cast<V>(words & 0xffff0000u);
        } else {
            a += load(x);
            b += load(x + kLanes);
        }
    }

    // Adds x[0..n) up to the lanes of the result and to `rest`.
    static POOLING_EXT_INLINE V sum(const In* x, int64_t n, T& rest) {
        // Four sums at a time: each addition waits for the one before it.
        V a = {}, b = {}, c = {}, d = {}, blocks = {};
        int64_t i = 0;
        const auto add_until = [&](int64_t end) POOLING_EXT_INLINE_LAMBDA {
            for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
                // The processor's own guesses end with a page.
                __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead);
                __builtin_prefetch(reinterpret_cast<const char*>(x + i + 2 * kLanes) + kAhead);
                add(a, b, x + i);
                add(c, d, x + i + 2 * kLanes);
            }
        };
        // In blocks, so that errors do not grow with the number of elements.
        for (; i + kBlock < n; a = b = c = d = V{}) {
            add_until(i + kBlock);
            blocks += (a + b) + (c + d);
        }
        add_until(n);
        if (i + 2 * kLanes <= n) add(a, b, x + i), i += 2 * kLanes;
        if (i + kLanes <= n) c += load(x + i), i += kLanes;
        rest = T(0);
        for (; i < n; ++i) rest += widen(x[i]);
        return blocks + ((a + b) + (c + d));
    }
};

// Averages of whole planes, as many at a time as a register has lanes: the lanes of each are summed
// apart, then those of all together.
template <class In>
void average_planes(const Job& job, int64_t begin, int64_t end) {
    using T = Accumulator<In>;
    using Sums = LaneSums<In>;
    constexpr int64_t kLanes = Sums::kLanes;
    const int64_t n = job.p.in_plane();
    const T divisor = T(job.divisor ? job.divisor : n);
    const In* x = static_cast<const In*>(job.src) + begin * n;
    In* y = static_cast<In*>(job.dst);
    typename Sums::V lanes[kLanes] = {};
    T rest[kLanes] = {}, totals[kLanes];
    BitsOf<In> averages[kLanes];
    for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t count = end - first < kLanes ? end - first : kLanes;
        for (int64_t plane = 0; plane < count; ++plane, x += n)
            lanes[plane] = Sums::sum(x, n, rest[plane]);
        Tile<T>::sum(lanes);
        typename Sums::V rests;
        std::memcpy(&rests, rest, sizeof(rest));
        const typename Sums::V means = (lanes[0] + rests) / divisor;
        std::memcpy(totals, &means, sizeof(totals));
        for (int64_t plane = 0; plane < kLanes; ++plane)
            averages[plane] = bit_cast<BitsOf<In>>(narrow<In>(totals[plane]));
        std::memcpy(y + first, averages, count * sizeof(In));
    }
}

template <class In>
void average(const Job& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    if (job.block) return pool_blocks(job, begin, end, scratch, average<In>, true, sizeof(In), 0);
    if (job.p.channels == 1 && is_whole(job.p)) return average_planes<In>(job, begin, end);
    const Divisors<T> divisors(job, scratch);
    if constexpr (kCommon<In>)
        if (PixelWalker<In>::takes(job.p))
            return pool_nhwc<SumOp<In>>(job, begin, end,
                                        [&](int64_t od, int64_t oh, int64_t o, auto use) {
                                            divisors.divide_pixel(od, oh, o, use);
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
          apart_(!deinterleaves(p_) && !p_.w.adaptive && p_.w.stride >= p_.w.kernel),
          gradient_(p_, scratch, deinterleaves(p_), !apart_) {}

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
        } else if (deinterleaves(p_)) {
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

// The forward pass in channels-last for small windows: each pixel of the output is reduced in one
// step, its channels in registers, and written straight to where it belongs.
#pragma once

#include <utility>

#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

// The input rows of a window, and the elements of its columns from each row's start.
template <class In>
struct Taps {
    const In* const* rows;
    int64_t first, step;

    // The k-th element, of `columns` to a row.
    POOLING_EXT_INLINE const In* at(int k, int columns) const {
        return rows[k / columns] + first + k % columns * step;
    }
};

// Calls visit(i, count) for runs of channels that together are those from `begin` to n, where count
// is of a type that says it, so that loops over it have whole vectors and no remainder; the last
// run may go over channels before it again.
template <int kRun, class Visit>
POOLING_EXT_INLINE void each_run(int64_t n, int64_t begin, Visit visit) {
    constexpr int kShort = kRun / 4;
    if (n >= kRun) {
        for (int64_t i = begin; i < n; i += kRun)
            visit(i + kRun <= n ? i : n - kRun, std::integral_constant<int, kRun>{});
    } else if (n >= kShort) {
        for (int64_t i = begin; i < n; i += kShort)
            visit(i + kShort <= n ? i : n - kShort, std::integral_constant<int, kShort>{});
    } else {
        for (int64_t i = begin; i < n; ++i) visit(i, std::integral_constant<int, 1>{});
    }
}

// Walks the windows of rows of outputs.
template <class In>
class PixelWalker {
  public:
    static bool takes(const PoolParams& p) {
        return p.channels > 1 && p.d.kernel * p.h.kernel <= kRows && p.w.kernel <= kColumns;
    }

    explicit PixelWalker(const PoolParams& p) : p_(p) {}

    // Calls visit(taps, rows, columns, o) for each window o of the row of outputs (od, oh),
    // where the numbers of rows and columns are of types that say them; windows with nothing in
    // them have none.
    template <class Visit>
    POOLING_EXT_INLINE void operator()(const In* plane, int64_t od, int64_t oh, Visit visit) {
        count_ = 0;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t kernel_row) {
            row_offsets_[count_] = int32_t(kernel_row * p_.w.kernel);
            rows_[count_++] = row;
        });
        switch (count_) {
            case 0:
                for (int64_t o = 0; o < p_.w.out; ++o)
                    visit(Taps<In>{}, Number<0>{}, Number<0>{}, o);
                return;
            case 1:
                return windows<1>(visit);
            case 2:
                return windows<2>(visit);
            case 3:
                return windows<3>(visit);
            default:
                return windows<kRows>(visit);
        }
    }

    // The offset of the k-th element of window o, of `columns` to a row.
    POOLING_EXT_INLINE int32_t offset(int64_t o, int k, int columns) const {
        return row_offsets_[k / columns] + int32_t(p_.w.first(o)) + k % columns;
    }

  private:
    static constexpr int kRows = 4, kColumns = 3;
    static constexpr int64_t kPrefetch = 2048;  // bytes

    template <int kNumber>
    using Number = std::integral_constant<int, kNumber>;

    template <int kCount, class Visit>
    POOLING_EXT_INLINE void windows(Visit visit) const {
        const Axis& w = p_.w;
        constexpr int64_t kLine = 64 / sizeof(In);
        const int64_t step = w.dilation * p_.channels, next = w.stride * p_.channels;
        const int64_t ahead = (kPrefetch / sizeof(In) / next + 1) * next;
        // Pixels that a long stride steps over are not read.
        const int64_t fresh = (w.stride < w.kernel ? w.stride : w.kernel) * p_.channels;
        for (int64_t o = 0; o < w.out; ++o) {
            const int64_t first = w.first(o);
            const Taps<In> taps{rows_, w.start(o) * p_.channels + first * step, step};
            // So many short runs at a time are more than the hardware foresees.
            for (int r = 0; r < kCount; ++r)
                for (int64_t i = 0; i < fresh; i += kLine)
                    __builtin_prefetch(rows_[r] + taps.first + ahead + i);
            switch (w.end(o) - first) {
                case 1:
                    visit(taps, Number<kCount>{}, Number<1>{}, o);
                    break;
                case 2:
                    visit(taps, Number<kCount>{}, Number<2>{}, o);
                    break;
                case 3:
                    visit(taps, Number<kCount>{}, Number<3>{}, o);
                    break;
                default:
                    visit(taps, Number<0>{}, Number<0>{}, o);
            }
        }
    }

    const PoolParams& p_;
    const In* rows_[kRows];
    int32_t row_offsets_[kRows];
    int64_t count_ = 0;
};

// y[i] = finish(x[0][i] + x[1][i] + ...), where + is the operator's.
template <class Op, class Finish, int... K>
POOLING_EXT_INLINE void reduce_elements(typename Op::In* __restrict y,
                                        const typename Op::In* const (&x)[sizeof...(K)], int64_t n,
                                        Finish finish, std::integer_sequence<int, K...>) {
    int64_t i = 0;
    if constexpr (std::is_same_v<typename Op::In, BFloat16> &&
                  std::is_same_v<typename Op::T, float>) {
        // As words of two, whose halves are floats but for a shift and a mask, so that they need
        // not be moved to elements twice as wide.
        typedef uint32_t Word __attribute__((may_alias, aligned(2)));
        for (; i < n / 2; ++i) {
            const uint32_t words[] = {reinterpret_cast<const Word*>(x[K])[i]...};
            const float low = finish(Op::combine(bit_cast<float>(words[K] << 16)...));
            const float high = finish(Op::combine(bit_cast<float>(words[K] & 0xffff0000u)...));
            reinterpret_cast<Word*>(y)[i] =
                rounded_to_half(low) >> 16 | (rounded_to_half(high) & 0xffff0000u);
        }
        i *= 2;
    }
    for (; i < n; ++i) y[i] = Op::store(finish(Op::combine(Op::load(x[K][i])...)));
}

// y[i] = finish(the sum of a window's elements for channel i), in kRows rows of kColumns.
template <class Op, int kRows, int kColumns, class Finish>
__attribute__((noinline)) void reduce_pixel(typename Op::In* y, const Taps<typename Op::In>& taps,
                                            int64_t n, Finish finish) {
    if constexpr (kRows * kColumns == 0) {
        fill(y, Op::store(finish(Op::identity())), n);
    } else {
        const typename Op::In* x[kRows * kColumns];
        for (int row = 0, k = 0; row < kRows; ++row) {
            x[k++] = taps.rows[row] + taps.first;
            for (int column = 1; column < kColumns; ++column, ++k) x[k] = x[k - 1] + taps.step;
        }
        reduce_elements<Op>(y, x, n, finish, std::make_integer_sequence<int, kRows * kColumns>{});
    }
}

// Computes rows [begin, end) of outputs. finish(od, oh, o, use) calls use(what is done to a reduced
// value before it is stored) for window o of row (od, oh).
template <class Op, class Finish>
POOLING_EXT_INLINE void pool_nhwc(const Job& job, int64_t begin, int64_t end, Finish finish) {
    using In = typename Op::In;
    const PoolParams& p = job.p;
    PixelWalker<In> walk(p);
    each_index(
        begin, end, p.d.out, p.h.out, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
            const In* plane = static_cast<const In*>(job.src) + outer * p.in_plane() * p.channels;
            In* row = static_cast<In*>(job.dst) + index * p.out_row();
            walk(plane, od, oh, [&](const Taps<In>& taps, auto rows, auto columns, int64_t o) {
                finish(od, oh, o, [&](auto finished) {
                    reduce_pixel<Op, rows.value, columns.value>(row + o * p.channels, taps,
                                                                p.channels, finished);
                });
            });
        });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

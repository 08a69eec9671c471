// The backward pass of max pooling in channels-last for small windows of one size: each pixel sums
// over the windows that it lies in, in registers where those are few.
#pragma once

#include "kernels/cpu/pool/pool_backward.h"
#include "kernels/cpu/pool/pool_nhwc.h"
#include "kernels/cpu/simd/vector.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Branch-free equality: all bits if two offsets are the same, else none. Avoids masked loads, which
// stall behind stores.
template <class Bits>
POOLING_EXT_INLINE Bits same(Bits a, Bits b) {
    using Signed = std::make_signed_t<Bits>;
    return Bits(Signed(Bits(a ^ b) - Bits(1)) >> (8 * sizeof(Bits) - 1));
}

// What a pixel's sum becomes: itself.
template <class G>
struct Narrowed {
    static constexpr bool kOne = true;  // a sum of one gradient is written as it is
    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE X operator()(Kind, int64_t, X total) const {
        return total;
    }
};

template <class G>
class MaxPoolBackwardNhwc {
  public:
    using T = Accumulator<G>;
    using Bits = BitsOf<G>;

    static bool takes(const PoolParams& p) {
        return p.channels > 1 && over(p.d) * over(p.h) <= kMost && over(p.w) <= kMost &&
               !p.d.adaptive && !p.h.adaptive && !p.w.adaptive;
    }

    MaxPoolBackwardNhwc(const Job& job, Scratch& scratch)
        : p_(job.p),
          grad_(static_cast<const G*>(job.src)),
          offsets_(static_cast<const uint8_t*>(job.offsets_in)),
          first_(scratch.take<int64_t>(p_.w.in + 1)),
          columns_(scratch.take<Tap>(p_.w.out * p_.w.kernel)),
          few_(over(p_.d) * over(p_.h) <= kFew && over(p_.w) <= kFew),
          sum_(scratch.take<T>(few_ ? 0 : p_.channels)) {
        const Axis& w = p_.w;
        int64_t count = 0;
        for (int64_t i = 0; i < w.in; ++i) {
            first_[i] = count;
            const int64_t end = w.end_output(i);
            for (int64_t o = w.first_output(i); o < end; ++o)
                if (const int64_t k = w.element(o, i); k >= 0)
                    columns_[count++] = {o * p_.channels, k};
        }
        first_[w.in] = count;
        if (w.stride != 2 || w.dilation != 1 || (w.kernel != 2 && w.kernel != 3) ||
            p_.channels < kRun)
            return;
        // Those with a window before them if theirs overlap.
        pairs_begin_ = w.kernel == 3 ? 1 : 0;
        while (w.start(pairs_begin_) < 0) ++pairs_begin_;
        pairs_end_ = w.out;
        while (pairs_end_ > pairs_begin_ && w.start(pairs_end_ - 1) + 1 >= w.in) --pairs_end_;
    }

    void start() { count_ = 0; }

    void add(const SpreadRow<G>& row) {
        rows_[count_++] = {row.offset, row.kernel_row * p_.w.kernel};
    }

    // Writes a row of pixels; output(i) is what makes the outputs of pixel i from a kind of vector,
    // the first of its channels and their sums.
    template <class Output>
    void finish(G* dst, const Output& output) const {
        if (!few_) return many(dst, output);
        const int64_t from = pairs_end_ > pairs_begin_ ? p_.w.start(pairs_begin_) : p_.w.in;
        few(dst, 0, from, output);
        if (from == p_.w.in) return;
        const int64_t to = p_.w.start(pairs_end_);
        if (count_ == 1 && p_.w.kernel == 2)
            pairs<1, 2>(dst, output);
        else if (count_ == 1)
            pairs<1, 3>(dst, output);
        else if (count_ == 2 && p_.w.kernel == 3)
            pairs<2, 3>(dst, output);
        else
            few(dst, from, to, output);
        few(dst, to, p_.w.in, output);
    }

  private:
    // A row or column of windows: where it lies in the outputs, and what it adds to the offset of
    // the element that is gathered for.
    struct Tap {
        int64_t at, offset;
    };
    static constexpr int64_t kFew = 3, kMost = 5, kRun = Vector<G>::kSize;

    // What a pixel gathers.
    struct Taken {
        const G* grad[kFew * kFew];
        const uint8_t* offsets[kFew * kFew];
        Bits wanted[kFew * kFew];
    };

    // How many windows there may be over an input.
    static int64_t over(const Axis& axis) {
        return axis.dilation == 1 ? ceil_div(axis.kernel, axis.stride) : axis.kernel;
    }

    static POOLING_EXT_INLINE Bits given(G grad, uint8_t offset, Bits wanted) {
        return Bits(bit_cast<Bits>(grad) & same(Bits(offset), wanted));
    }

    // Pixels of two columns for each window, of which only the first is in the one before, too:
    // so regular that each gradient is read for both.
    template <int kRows, int kKernel, class Output>
    __attribute__((noinline)) void pairs(G* row, const Output& output) const {
        using V = Vector<G>;
        using X = typename V::X;
        const int64_t n = p_.channels;
        for (int64_t o = pairs_begin_; o < pairs_end_; ++o) {
            const int64_t i = p_.w.start(o);
            const G* grad[kRows];
            const uint8_t* offsets[kRows];
            uint32_t wanted[kRows];
            for (int r = 0; r < kRows; ++r) {
                grad[r] = grad_ + rows_[r].at + o * n;
                offsets[r] = offsets_ + rows_[r].at + o * n;
                wanted[r] = uint32_t(rows_[r].offset);
            }
            G* const to = row + i * n;
            const auto first = output(i), second = output(i + 1);
            for (int64_t next = 0; next < n; next += kRun) {
                const int64_t c = next + kRun <= n ? next : n - kRun;
                X a, b;
                for (int r = 0; r < kRows; ++r) {
                    const X same = V::given(grad[r] + c, offsets[r] + c, wanted[r]);
                    const X beside = V::given(grad[r] + c, offsets[r] + c, wanted[r] + 1);
                    X all = same;
                    if constexpr (kKernel == 3) {
                        // The window before.
                        const int64_t at = c - n;
                        all += V::given(grad[r] + at, offsets[r] + at, wanted[r] + 2);
                    }
                    a = r == 0 ? all : a + all;
                    b = r == 0 ? beside : b + beside;
                }
                V::put(to + c, first(V{}, c, a));
                V::put(to + n + c, second(V{}, c, b));
            }
        }
    }

    // Pixels [begin, end) of the row at dst.
    template <class Output>
    void few(G* dst, int64_t begin, int64_t end, const Output& output) const {
        const int64_t channels = p_.channels;
        for (int64_t i = begin; i < end; ++i) {
            const Tap* const columns = columns_ + first_[i];
            const int64_t over = first_[i + 1] - first_[i];
            Taken taken;
            int64_t count = 0;
            for (int64_t r = 0; r < count_; ++r)
                for (int64_t k = 0; k < over; ++k, ++count) {
                    const int64_t at = rows_[r].at + columns[k].at;
                    taken.grad[count] = grad_ + at;
                    taken.offsets[count] = offsets_ + at;
                    taken.wanted[count] = Bits(rows_[r].offset + columns[k].offset);
                }
            sum(count, dst + i * channels, taken, channels, output(i));
        }
    }

    template <class Output>
    void many(G* __restrict dst, const Output& output) const {
        const int64_t channels = p_.channels;
        T* __restrict total = sum_;
        for (int64_t i = 0; i < p_.w.in; ++i, dst += channels) {
            for (int64_t c = 0; c < channels; ++c) total[c] = T(0);
            for (const Tap* row = rows_; row != rows_ + count_; ++row)
                for (const Tap *column = columns_ + first_[i], *last = columns_ + first_[i + 1];
                     column < last;)
                    if (last - column >= kMost)
                        column = add_columns<kMost>(total, *row, column);
                    else if (last - column >= 2)
                        column = add_columns<2>(total, *row, column);
                    else
                        column = add_columns<1>(total, *row, column);
            const auto to_output = output(i);
            for (int64_t c = 0; c < channels; ++c)
                put(dst, c, narrow<G>(to_output(Single<G>{}, c, total[c])));
        }
    }

    // Returns the first column that is not added yet.
    template <int kColumns>
    const Tap* add_columns(T* __restrict total, const Tap& row, const Tap* columns) const {
        const G* grad[kColumns];
        const uint8_t* offsets[kColumns];
        Bits wanted[kColumns];
        for (int k = 0; k < kColumns; ++k) {
            grad[k] = grad_ + row.at + columns[k].at;
            offsets[k] = offsets_ + row.at + columns[k].at;
            wanted[k] = Bits(row.offset + columns[k].offset);
        }
        for (int64_t c = 0; c < p_.channels; ++c) {
            T sum = T(0);
            for (int k = 0; k < kColumns; ++k)
                sum += widen(bit_cast<G>(given(grad[k][c], offsets[k][c], wanted[k])));
            total[c] += sum;
        }
        return columns + kColumns;
    }

    template <class Output>
    static void sum(int64_t count, G* dst, const Taken& taken, int64_t n, const Output& output) {
        switch (count) {
            case 0:
                return sum<0>(dst, taken, n, output);
            case 1:
                return sum<1>(dst, taken, n, output);
            case 2:
                return sum<2>(dst, taken, n, output);
            case 3:
                return sum<3>(dst, taken, n, output);
            case 4:
                return sum<4>(dst, taken, n, output);
            case 6:
                return sum<6>(dst, taken, n, output);
            default:
                return sum<9>(dst, taken, n, output);
        }
    }

    template <int kTaps, class Output>
    __attribute__((noinline)) static void sum(G* __restrict dst, const Taken& taken, int64_t n,
                                              const Output output) {
        const G* grad[kTaps + 1];
        const uint8_t* offsets[kTaps + 1];
        Bits wanted[kTaps + 1];
        for (int k = 0; k < kTaps; ++k)
            grad[k] = taken.grad[k], offsets[k] = taken.offsets[k], wanted[k] = taken.wanted[k];
        const auto visit = [&](int64_t i) __attribute__((always_inline)) {
            if constexpr (Output::kOne && kTaps == 1) {
                put(dst, i, bit_cast<G>(given(grad[0][i], offsets[0][i], wanted[0])));
            } else {
                T total = T(0);
                for (int k = 0; k < kTaps; ++k)
                    total += widen(bit_cast<G>(given(grad[k][i], offsets[k][i], wanted[k])));
                put(dst, i, narrow<G>(output(Single<G>{}, i, total)));
            }
        };
        // Here vectors have no remainder.
        const int64_t whole = n - n % (kVector / 2);
        for (int64_t i = 0; i < whole; ++i) visit(i);
        each_run<64 / sizeof(G)>(n, whole,
                                 [&](int64_t first, auto count) __attribute__((always_inline)) {
#pragma GCC unroll 1
                                     for (int j = 0; j < count.value; ++j) visit(first + j);
                                 });
    }

    const PoolParams& p_;
    const G* const grad_;
    const uint8_t* const offsets_;
    // The columns of windows over column i of the inputs are columns_[first_[i]] to
    // columns_[first_[i + 1]].
    int64_t* const first_;
    Tap* const columns_;
    const bool few_;
    T* const sum_;
    Tap rows_[kMost];
    int64_t count_ = 0;
    // The windows whose two columns are gathered for together.
    int64_t pairs_begin_ = 0, pairs_end_ = 0;
};

}  // namespace pooling_ext::POOLING_EXT_ISA

// The backward pass of max pooling in channels-last for small windows of one size: each pixel sums
// over the windows that it lies in, in registers where those are few.
#pragma once

#include "cpu/pool_backward.h"
#include "cpu/pool_pixels.h"

namespace pooling_ext::POOLING_EXT_ISA {

// All bits if two places are the same, else none. By arithmetic, of which a compiler makes no loads
// under a mask: those wait for the stores before them.
template <class Bits>
POOLING_EXT_INLINE Bits same(Bits a, Bits b) {
    using Signed = std::make_signed_t<Bits>;
    return Bits(Signed(Bits(a ^ b) - Bits(1)) >> (8 * sizeof(Bits) - 1));
}

// What a pixel's sum becomes: itself.
template <class G>
struct Narrowed {
    static constexpr bool kOne = true;  // a sum of one gradient is written as it is
    POOLING_EXT_INLINE G operator()(int64_t, Accumulator<G> total) const {
        return narrow<G>(total);
    }
};

template <class G>
class PixelGatherer {
  public:
    using T = Accumulator<G>;
    using Bits = BitsOf<G>;

    static bool takes(const PoolParams& p) {
        return p.channels > 1 && over(p.d) * over(p.h) <= kMost && over(p.w) <= kMost &&
               !p.d.adaptive && !p.h.adaptive && !p.w.adaptive;
    }

    PixelGatherer(const Job& job, Scratch& scratch)
        : p_(job.p),
          grad_(static_cast<const G*>(job.src)),
          places_(static_cast<const uint8_t*>(job.places_in)),
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
                if (const int64_t k = w.place(o, i); k >= 0)
                    columns_[count++] = {o * p_.channels, k};
        }
        first_[w.in] = count;
    }

    void start() { count_ = 0; }

    void add(const SpreadRow<G>& row) { rows_[count_++] = {row.offset, row.place * p_.w.kernel}; }

    // Writes a row of pixels; output(i) is what makes the outputs of pixel i from its channels and
    // their sums.
    template <class Output>
    void finish(G* dst, const Output& output) const {
        if (!few_)
            many(dst, output);
        else if (count_ == 0)
            few<0>(dst, output);
        else if (count_ == 1)
            few<1>(dst, output);
        else if (count_ == 2)
            few<2>(dst, output);
        else
            few<kFew>(dst, output);
    }

  private:
    // A row or column of windows: where it lies in the outputs, and what it adds to the offset of
    // the place that is gathered for.
    struct Tap {
        int64_t at, place;
    };
    static constexpr int64_t kFew = 3, kMost = 5;

    // How many windows there may be over an input.
    static int64_t over(const Axis& axis) {
        return axis.dilation == 1 ? ceil_div(axis.kernel, axis.stride) : axis.kernel;
    }

    template <int kRows, class Output>
    void few(G* dst, const Output& output) const {
        const int64_t channels = p_.channels;
        for (int64_t i = 0; i < p_.w.in; ++i, dst += channels) {
            const Tap* const columns = columns_ + first_[i];
            switch (first_[i + 1] - first_[i]) {
                case 0:
                    sum<kRows, 0>(dst, rows_, columns, channels, output(i));
                    break;
                case 1:
                    sum<kRows, 1>(dst, rows_, columns, channels, output(i));
                    break;
                case 2:
                    sum<kRows, 2>(dst, rows_, columns, channels, output(i));
                    break;
                default:
                    sum<kRows, kFew>(dst, rows_, columns, channels, output(i));
            }
        }
    }

    template <class Output>
    void many(G* __restrict dst, const Output& output) const {
        const int64_t channels = p_.channels;
        T* __restrict total = sum_;
        for (int64_t i = 0; i < p_.w.in; ++i, dst += channels) {
            const Tap* const columns = columns_ + first_[i];
            for (int64_t c = 0; c < channels; ++c) total[c] = T(0);
            for (const Tap* row = rows_; row != rows_ + count_; ++row)
                switch (first_[i + 1] - first_[i]) {
                    case 0:
                        break;
                    case 1:
                        sum<1, 1>(total, row, columns, channels, Added{});
                        break;
                    case 2:
                        sum<1, 2>(total, row, columns, channels, Added{});
                        break;
                    case 3:
                        sum<1, 3>(total, row, columns, channels, Added{});
                        break;
                    case 4:
                        sum<1, 4>(total, row, columns, channels, Added{});
                        break;
                    default:
                        sum<1, kMost>(total, row, columns, channels, Added{});
                }
            const auto to_output = output(i);
            for (int64_t c = 0; c < channels; ++c) dst[c] = to_output(c, total[c]);
        }
    }

    // Adds to what dst holds, instead of making outputs.
    struct Added {
        static constexpr bool kOne = false;
    };

    template <int kRows, int kColumns, class Dst, class Output>
    void sum(Dst* __restrict dst, const Tap* rows, const Tap* columns, int64_t n,
             const Output output) const {
        constexpr int kTaps = kRows * kColumns;
        const G* grad[kTaps + 1];
        const uint8_t* places[kTaps + 1];
        Bits wanted[kTaps + 1];
        for (int k = 0; k < kTaps; ++k) {
            const Tap &row = rows[k / kColumns], &column = columns[k % kColumns];
            grad[k] = grad_ + row.at + column.at;
            places[k] = places_ + row.at + column.at;
            wanted[k] = Bits(row.place + column.place);
        }
        const auto visit = [&](int64_t i) __attribute__((always_inline)) {
            const auto given = [&](int k) {
                return bit_cast<G>(
                    Bits(bit_cast<Bits>(grad[k][i]) & same(Bits(places[k][i]), wanted[k])));
            };
            if constexpr (Output::kOne && kTaps == 1) {
                put(dst, i, given(0));
            } else {
                T total = T(0);
                for (int k = 0; k < kTaps; ++k) total += widen(given(k));
                if constexpr (std::is_same_v<Output, Added>)
                    dst[i] += total;
                else
                    put(dst, i, output(i, total));
            }
        };
        constexpr bool kAdds = std::is_same_v<Output, Added>;
        // Here vectors have no remainder; what adds must not visit an element again.
        const int64_t whole = kAdds ? n : n - n % (kVector / 2);
        for (int64_t i = 0; i < whole; ++i) visit(i);
        if constexpr (!kAdds)
            each_run<64 / sizeof(G)>(n, whole,
                                     [&](int64_t first, auto count) __attribute__((always_inline)) {
#pragma GCC unroll 1
                                         for (int j = 0; j < count.value; ++j) visit(first + j);
                                     });
    }

    const PoolParams& p_;
    const G* const grad_;
    const uint8_t* const places_;
    // The columns of windows over column i of the inputs are columns_[first_[i]] to
    // columns_[first_[i + 1]].
    int64_t* const first_;
    Tap* const columns_;
    const bool few_;
    T* const sum_;
    Tap rows_[kMost];
    int64_t count_ = 0;
};

}  // namespace pooling_ext::POOLING_EXT_ISA

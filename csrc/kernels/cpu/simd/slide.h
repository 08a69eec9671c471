// The windows that most networks have, in the contiguous format: small ones, reduced as they slide
// over a row or over a few rows at once.
#pragma once

#include <utility>

#include "kernels/cpu/simd/numeric.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class T>
POOLING_EXT_INLINE T loaded(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

// Every other element of a row, register by register. Registers are of parts of 16 bytes, between
// which elements move slowly: what is taken from two registers is first left in the parts where it
// was, and put in order when nothing else is to be done with it.
template <class T>
class EveryOther {
  public:
    static constexpr int kLanes = kVectorBytes / sizeof(T);
    typedef T V __attribute__((vector_size(kVectorBytes)));

    // Elements 0, 2, 4, ... of two registers, or 1, 3, 5, ..., out of order.
    static POOLING_EXT_INLINE V even(V a, V b) { return taken<0>(a, b, kSequence); }
    static POOLING_EXT_INLINE V odd(V a, V b) { return taken<1>(a, b, kSequence); }

    // Those of the row at x.
    static POOLING_EXT_INLINE V even(const T* x) {
        return even(loaded<V>(x), loaded<V>(x + kLanes));
    }
    static POOLING_EXT_INLINE V odd(const T* x) { return odd(loaded<V>(x), loaded<V>(x + kLanes)); }

    static POOLING_EXT_INLINE V in_order(V taken) { return ordered(taken, kSequence); }

    // Each in place of the one after it, and the last in that of the first.
    static POOLING_EXT_INLINE V rotated(V taken) { return rotated(taken, kSequence); }

    // The first of one, the others of another.
    static POOLING_EXT_INLINE V with_first(V one, V another) {
        return first_of(one, another, kSequence);
    }

  private:
    static constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
    static constexpr int kPart = 16 / sizeof(T), kHalf = kPart / 2;

    // Where the i-th of those that are taken is: half of each part comes from either register.
    static constexpr int lane(int i) {
        const int second = i / (kLanes / 2), in_register = i % (kLanes / 2);
        return in_register / kHalf * kPart + second * kHalf + in_register % kHalf;
    }

    // Which of them is there.
    static constexpr int taken_at(int lane) {
        const int second = lane % kPart / kHalf;
        return second * (kLanes / 2) + lane / kPart * kHalf + lane % kHalf;
    }

    template <int kFirst, int... I>
    static POOLING_EXT_INLINE V taken(V a, V b, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (2 * taken_at(I) + kFirst)...);
    }

    template <int... I>
    static POOLING_EXT_INLINE V ordered(V v, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(v, v, lane(I)...);
    }

    template <int... I>
    static POOLING_EXT_INLINE V rotated(V v, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(v, v, lane((taken_at(I) + kLanes - 1) % kLanes)...);
    }

    template <int... I>
    static POOLING_EXT_INLINE V first_of(V a, V b, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (I == 0 ? 0 : kLanes + I)...);
    }
};

// dst[o] = row[kStride * o] + ... + row[kStride * o + kKernel - 1], where + is the operator's, for
// n outputs and what completes a vector.
template <class Op, int kStride, int kKernel>
void slide(typename Op::T* __restrict dst, const typename Op::T* __restrict row, int64_t n) {
    using T = typename Op::T;
    using Row = EveryOther<T>;
    if constexpr (kStride == 2) {
        static_assert(kKernel == 2 || kKernel == 3);
        for (int64_t o = 0; o < n; o += Row::kLanes) {
            const T* const x = row + 2 * o;
            typename Row::V all;
            if constexpr (kKernel == 2)
                all = Op::combine(Row::even(x), Row::odd(x));
            else
                all = Op::combine(Row::even(x), Row::odd(x), Row::even(x + 2));
            all = Row::in_order(all);
            std::memcpy(dst + o, &all, sizeof(all));
        }
    } else {
        const int64_t whole = (n + Row::kLanes - 1) / Row::kLanes * Row::kLanes;
        const auto combined = [&]<int... C>(const T* x, std::integer_sequence<int, C...>)
                                  POOLING_EXT_INLINE_LAMBDA { return Op::combine(x[C]...); };
        for (int64_t o = 0; o < whole; ++o)
            dst[o] = combined(row + kStride * o, std::make_integer_sequence<int, kKernel>{});
    }
}

template <class T>
using Slide = void (*)(T* __restrict dst, const T* __restrict row, int64_t n);

// The `slide` for the windows of a pooling, or nullptr.
template <class Op>
Slide<typename Op::T> slide_for(const PoolParams& p) {
    if (p.channels != 1 || p.w.adaptive || p.w.dilation != 1) return nullptr;
    const int64_t stride = p.w.stride, kernel = p.w.kernel;
    if constexpr (kCommon<typename Op::In>) {
        if (stride == 1 && kernel == 2) return slide<Op, 1, 2>;
        if (stride == 1 && kernel == 3) return slide<Op, 1, 3>;
        if (stride == 2 && kernel == 2) return slide<Op, 2, 2>;
        if (stride == 2 && kernel == 3) return slide<Op, 2, 3>;
        if (stride == 4 && kernel == 4) return slide<Op, 4, 4>;
    }
    return nullptr;
}

// Both steps at once, in registers: windows of stride 2 over a few rows.
template <class Op>
class SlideOverRows {
  public:
    using T = typename Op::T;

    // `end` is where the input ends.
    SlideOverRows(const PoolParams& p, const T* end)
        : w_(p.w), end_(end), kernel_(takes(p) ? p.w.kernel : 0) {
        const int64_t room = w_.in + w_.pad_before - w_.kernel;
        inside_ = room < 0 ? 0 : room / 2 + 1;
        if (inside_ > w_.out) inside_ = w_.out;
    }

    // Makes a row of outputs from `count` rows of inputs, and what completes the last vector; or
    // returns false.
    bool operator()(T* out, const T* const* rows, int64_t count) const {
        if (kernel_ == 0 || count > kMost) return false;
        // Where the first of the pairs of columns begins; in windows of 3, one comes before it.
        const int64_t from = kernel_ == 3 ? 1 - w_.pad_before : 0;
        if (rows[count - 1] + from + 2 * (inside_ + Row::kLanes) > end_) return false;
        if (count == 1)
            slide(out, rows, from, Count<1>{});
        else if (count == 2)
            slide(out, rows, from, Count<2>{});
        else
            slide(out, rows, from, Count<3>{});
        return true;
    }

  private:
    using Row = EveryOther<T>;
    using V = typename Row::V;
    static constexpr int64_t kMost = 3;
    template <int kRows>
    using Count = std::make_integer_sequence<int, kRows>;

    static bool takes(const PoolParams& p) {
        const Axis& w = p.w;
        return p.channels == 1 && !w.adaptive && w.dilation == 1 && w.stride == 2 &&
               ((w.kernel == 2 && w.pad_before == 0) || (w.kernel == 3 && w.pad_before <= 1));
    }

    template <int... R>
    void slide(T* out, const T* const* rows, int64_t from, std::integer_sequence<int, R...>) const {
        const auto column = [&](int64_t i) { return Op::combine(rows[R][i]...); };
        if (kernel_ == 2)
            slide_inside<2>(out, T(0), from, rows[R]...);
        else
            slide_inside<3>(out, from > 0 ? column(0) : Op::identity(), from, rows[R]...);
        for (int64_t o = inside_; o < w_.out; ++o) {
            const int64_t first = w_.start(o) + w_.first(o), end = w_.start(o) + w_.end(o);
            out[o] = first < end ? column(first) : Op::identity();
            for (int64_t i = first + 1; i < end; ++i) out[o] = Op::combine(out[o], column(i));
        }
    }

    // `before` is what windows of 3 have before the first pair of columns.
    template <int kKernel, class... Rows>
    void slide_inside(T* __restrict out, T before, int64_t from, Rows... rows) const {
        V last = {before};
        for (int64_t o = 0; o < inside_; o += Row::kLanes) {
            const int64_t i = from + 2 * o;
            const V a = Op::combine(loaded<V>(rows + i)...);
            const V b = Op::combine(loaded<V>(rows + i + Row::kLanes)...);
            const V even = Row::even(a, b), odd = Row::odd(a, b);
            V all;
            if constexpr (kKernel == 2) {
                all = Op::combine(even, odd);
            } else {
                const V rotated = Row::rotated(odd);
                all = Op::combine(Row::with_first(last, rotated), even, odd);
                last = rotated;
            }
            all = Row::in_order(all);
            std::memcpy(out + o, &all, sizeof(all));
        }
    }

    const Axis& w_;
    const T* const end_;
    // 0 where the windows are others.
    const int64_t kernel_;
    // How many windows have all of their columns.
    int64_t inside_;
};

}  // namespace pooling_ext::POOLING_EXT_ISA

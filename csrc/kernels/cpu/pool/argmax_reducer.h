// Rows of maxima, and the offsets of their winners.
#pragma once

#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class Order, class Stored_>
struct MaxOp {
    using In = Stored_;
    using T = typename Order::T;
    static constexpr bool kPlain = std::is_same_v<In, T>;
    static POOLING_EXT_INLINE T identity() { return Order::lowest(); }
    static POOLING_EXT_INLINE T load(In x) { return Order::load(x); }
    static POOLING_EXT_INLINE In store(T x) { return Order::store(x); }
    template <class X, class... Rest>
    static POOLING_EXT_INLINE X combine(X a, Rest... rest) {
        return Order::largest(a, rest...);
    }
};

// An offset larger than any in a window: what is not in the input, and so never wins.
constexpr int32_t kNowhere = 1 << 30;

// Maxima with the offsets of their winners, by the same two steps as RowReducer. Each candidate
// carries its offset; PyTorch's rule is that the first of equals wins, and the last NaN.
template <class In>
class ArgmaxReducer {
  public:
    using Order = Ordered<In>;
    using T = typename Order::T;

    // `end` is where the input ends.
    ArgmaxReducer(const PoolParams& p, const In* end, Scratch& scratch)
        : p_(p),
          end_(end),
          phases_(p.w, deinterleaves(p), scratch),
          deinterleaves_(deinterleaves(p)),
          value_(scratch.take<T>(p.out_row() + kVector)),
          offset_(scratch.take<int32_t>(p.out_row() + kVector)),
          row_value_(scratch.take<T>(p.in_row() + kVector)),
          row_offset_(scratch.take<int32_t>(p.in_row() + kVector)) {
        if (deinterleaves_) {
            phase_value_ = scratch.take<T>(phases_.size() + kVector);
            phase_offset_ = scratch.take<int32_t>(phases_.size() + kVector);
            for (int64_t i = 0; i < phases_.size(); ++i) {
                phase_value_[i] = Order::lowest();
                phase_offset_[i] = kNowhere;
            }
        }
    }

    const T* values() const { return value_; }
    const int32_t* offsets() const { return offset_; }

    void operator()(const In* plane, int64_t od, int64_t oh) {
        if (p_.channels >= kLeastChannels && p_.window_size() <= kDirectWindow)
            return reduce_pixels(plane, od, oh);
        const Axis& w = p_.w;
        const In* last = nullptr;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t kernel_row) {
            const int32_t offset = int32_t(kernel_row * w.kernel);
            if (last)
                add_row(row, offset);
            else
                start_row(row, offset);
            last = row;
        });
        if (last) prefetch_rows(p_, last);
        for (int64_t i = 0; i < p_.out_row(); ++i) {
            value_[i] = Order::lowest();
            offset_[i] = kNowhere;
        }
        if (!last) return;
        if (deinterleaves_) {
            deinterleave<Same<T>>(phase_value_, phases_, row_value_, w);
            deinterleave<Same<int32_t>>(phase_offset_, phases_, row_offset_, w);
            for (int64_t c = 0; c < w.kernel; ++c) {
                const int64_t at = phases_.at(c);
                add_column(value_, offset_, phase_value_ + at, phase_offset_ + at, int32_t(c),
                           whole_vectors(w.out));
            }
            return;
        }
        const int64_t channels = p_.channels;
        for (int64_t o = 0; o < w.out; ++o) {
            if (channels == 1) {
                scan_window(o);
                continue;
            }
            const int64_t last = w.end(o), to = o * channels;
            for (int64_t c = w.first(o); c < last; ++c) {
                const int64_t at = (w.start(o) + c * w.dilation) * channels;
                add_column(value_ + to, offset_ + to, row_value_ + at, row_offset_ + at, int32_t(c),
                           channels);
            }
        }
    }

  private:
    // In channels-last, windows of few elements are faster reduced in one step than in two.
    static constexpr int64_t kDirectWindow = 9, kLeastChannels = 16;

    template <class U>
    struct Same {
        using Element = U;
        static POOLING_EXT_INLINE U get(U x) { return x; }
    };

    // The elements of a window are met in order, so a later one never wins a tie.
    void reduce_pixels(const In* plane, int64_t od, int64_t oh) {
        const Axis& w = p_.w;
        const int64_t channels = p_.channels;
        // Until something larger comes along, the first element of the window wins, if it has any.
        const int64_t kd = p_.d.first(od), kh = p_.h.first(oh);
        const bool any = kd < p_.d.end(od) && kh < p_.h.end(oh);
        for (int64_t o = 0, i = 0; o < w.out; ++o) {
            const int64_t kw = w.first(o), offset = (kd * p_.h.kernel + kh) * w.kernel + kw;
            const int32_t start = any && kw < w.end(o) ? int32_t(offset) : kNowhere;
            for (int64_t c = 0; c < channels; ++c, ++i) {
                value_[i] = Order::lowest();
                offset_[i] = start;
            }
        }
        each_row(p_, plane, od, oh, [&](const In* row, int64_t kernel_row) {
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t last = w.end(o), step = w.dilation * channels;
                int64_t c = w.first(o);
                T* const best = value_ + o * channels;
                int32_t* const where = offset_ + o * channels;
                const In* x = row + w.start(o) * channels + c * step;
                const int32_t offset = int32_t(kernel_row * w.kernel);
                for (; c + 3 <= last; c += 3, x += 3 * step)
                    add_pixels<3>(best, where, x, step, offset + int32_t(c), channels);
                for (; c < last; ++c, x += step)
                    add_pixels<1>(best, where, x, step, offset + int32_t(c), channels);
            }
        });
    }

    template <int kCount>
    static void add_pixels(T* __restrict best, int32_t* __restrict where, const In* __restrict x,
                           int64_t step, int32_t offset, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            T b = best[i];
            int32_t o = where[i];
            for (int k = 0; k < kCount; ++k) {
                const T v = Order::load(x[k * step + i]);
                const bool wins = (v > b) | is_nan(v);
                b = select(wins, v, b);
                o = select(wins, offset + k, o);
            }
            best[i] = b;
            where[i] = o;
        }
    }

    // Finds the maximum of one wide window, then the offset of whoever has it.
    void scan_window(int64_t o) {
        const Axis& w = p_.w;
        const int64_t first = w.first(o), n = w.end(o) - first, step = w.dilation;
        if (n <= 0) return;
        const T* value = row_value_ + w.start(o) + first * step;
        const int32_t* offset = row_offset_ + w.start(o) + first * step;
        const T most = reduce<MaxOp<Order, T>, Same<T>>(value, n, step);
        int32_t where;
        if (is_nan(most)) {
            where = -1;
            for (int64_t c = 0; c < n; ++c) {
                const int32_t candidate =
                    is_nan(value[c * step]) ? offset[c * step] + int32_t(c) : -1;
                where = candidate > where ? candidate : where;
            }
        } else {
            where = kNowhere;
            for (int64_t c = 0; c < n; ++c) {
                const int32_t candidate =
                    value[c * step] == most ? offset[c * step] + int32_t(c) : kNowhere;
                where = candidate < where ? candidate : where;
            }
        }
        value_[o] = most;
        offset_[o] = where + int32_t(first);
    }

    int64_t readable(const In* row) const {
        const int64_t n = whole_vectors(p_.in_row());
        return row + n <= end_ ? n : p_.in_row();
    }

    void start_row(const In* __restrict x, int32_t offset) {
        const int64_t n = readable(x);
        for (int64_t i = 0; i < n; ++i) {
            row_value_[i] = Order::load(x[i]);
            row_offset_[i] = offset;
        }
    }

    void add_row(const In* __restrict x, int32_t offset) {
        T* __restrict best = row_value_;
        int32_t* __restrict where = row_offset_;
        const int64_t n = readable(x);
        for (int64_t i = 0; i < n; ++i) {
            const T v = Order::load(x[i]);
            const bool wins = (v > best[i]) | is_nan(v);
            best[i] = wins ? v : best[i];
            where[i] = wins ? offset : where[i];
        }
    }

    // Columns come in order, but a later column may hold an earlier row.
    static void add_column(T* __restrict best, int32_t* __restrict where, const T* __restrict value,
                           const int32_t* __restrict offset, int32_t column, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const T v = value[i], b = best[i];
            const int32_t o = offset[i] + column, old = where[i];
            bool wins = (v > b) | ((v == b) & (o < old));
            if constexpr (std::is_floating_point_v<T>) wins |= (v != v) & ((b == b) | (o > old));
            best[i] = wins ? v : b;
            where[i] = wins ? o : old;
        }
    }

    const PoolParams& p_;
    const In* const end_;
    const Deinterleaver phases_;
    const bool deinterleaves_;
    T* const value_;
    int32_t* const offset_;
    T* const row_value_;
    int32_t* const row_offset_;
    T* phase_value_ = nullptr;
    int32_t* phase_offset_ = nullptr;
};

}  // namespace pooling_ext::POOLING_EXT_ISA

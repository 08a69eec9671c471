// Max pooling, compiled once for each instruction set.
#include "cpu/pool_backward.h"
#include "cpu/pool_forward.h"
#include "cpu/tables.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Order, class Stored_>
struct MaxOp {
    using In = Stored_;
    using T = typename Order::T;
    static POOLING_EXT_INLINE T identity() { return Order::lowest(); }
    static POOLING_EXT_INLINE T load(In x) { return Order::load(x); }
    static POOLING_EXT_INLINE T combine(T a, T b) { return Order::larger(a, b); }
};

template <class In>
void max_values(const Job& job, int64_t begin, int64_t end, void* scratch) {
    using Order = typename Fastest<In>::Order;
    using Op = MaxOp<Order, In>;
    const int64_t n = job.p.out_row();
    pool_rows<Op, In>(job, begin, end, Scratch(scratch),
                      [&](int64_t, int64_t, const typename Op::T* __restrict row, In* __restrict y) {
                          for (int64_t i = 0; i < n; ++i) y[i] = Order::store(row[i]);
                      });
}

// An offset larger than any in a window: what is not in the input, and so never wins.
constexpr int32_t kNowhere = 1 << 30;

// Maxima with the offsets of their winners, by the same two steps as RowReducer. Each candidate
// carries its offset; PyTorch's rule is that the first of equals wins, and the last NaN.
template <class In>
class ArgmaxReducer {
public:
    using Order = Ordered<In>;
    using T = typename Order::T;

    ArgmaxReducer(const PoolParams& p, Scratch& scratch)
        : p_(p),
          phases_(p.w),
          dealing_(p.channels == 1 && !window_by_window(p.w)),
          value_(scratch.take<T>(p.out_row())),
          offset_(scratch.take<int32_t>(p.out_row())),
          row_value_(scratch.take<T>(p.in_row())),
          row_offset_(scratch.take<int32_t>(p.in_row())) {
        if (dealing_) {
            dealt_value_ = scratch.take<T>(phases_.size());
            dealt_offset_ = scratch.take<int32_t>(phases_.size());
            for (int64_t i = 0; i < phases_.size(); ++i) {
                dealt_value_[i] = Order::lowest();
                dealt_offset_[i] = kNowhere;
            }
        }
    }

    const T* values() const { return value_; }
    const int32_t* offsets() const { return offset_; }

    void operator()(const In* plane, int64_t od, int64_t oh) {
        const Axis& w = p_.w;
        bool any = false;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t place) {
            const int32_t offset = int32_t(place * w.kernel);
            if (any) add_row(row, offset);
            else start_row(row, offset);
            any = true;
        });
        for (int64_t i = 0; i < p_.out_row(); ++i) {
            value_[i] = Order::lowest();
            offset_[i] = kNowhere;
        }
        if (!any) return;
        if (dealing_) {
            phases_.each(w.in, [&](int64_t to, int64_t from, int64_t n) {
                gather_phase<Same<T>>(dealt_value_ + to, row_value_ + from, n, w.stride);
                gather_phase<Same<int32_t>>(dealt_offset_ + to, row_offset_ + from, n, w.stride);
            });
            for (int64_t c = 0; c < w.kernel; ++c) {
                const int64_t at = phases_.at(c * w.dilation);
                add_column(value_, offset_, dealt_value_ + at, dealt_offset_ + at, int32_t(c), w.out);
            }
            return;
        }
        const int64_t channels = p_.channels;
        for (int64_t o = 0; o < w.out; ++o) {
            const int64_t last = w.end(o);
            for (int64_t c = w.first(o); c < last; ++c) {
                const int64_t at = (w.start(o) + c * w.dilation) * channels;
                add_column(value_ + o * channels, offset_ + o * channels, row_value_ + at, row_offset_ + at,
                           int32_t(c), channels);
            }
        }
    }

private:
    template <class U>
    struct Same {
        using Element = U;
        static POOLING_EXT_INLINE U get(U x) { return x; }
    };

    void start_row(const In* __restrict x, int32_t offset) {
        for (int64_t i = 0; i < p_.in_row(); ++i) {
            row_value_[i] = Order::load(x[i]);
            row_offset_[i] = offset;
        }
    }

    void add_row(const In* __restrict x, int32_t offset) {
        T* __restrict best = row_value_;
        int32_t* __restrict where = row_offset_;
        for (int64_t i = 0; i < p_.in_row(); ++i) {
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
    const Phases phases_;
    const bool dealing_;
    T* const value_;
    int32_t* const offset_;
    T* const row_value_;
    int32_t* const row_offset_;
    T* dealt_value_ = nullptr;
    int32_t* dealt_offset_ = nullptr;
};

// Writes the winners' offsets, or their indices in the plane; -1 (as a byte: 255) where there is none.
template <class Place>
void write_places(const PoolParams& p, int64_t od, int64_t oh, const int32_t* __restrict offset,
                  Place* __restrict places) {
    if constexpr (!std::is_same_v<Place, int64_t>) {
        for (int64_t i = 0; i < p.out_row(); ++i) places[i] = Place(offset[i] < kNowhere ? offset[i] : -1);
    } else {
        const int64_t d0 = p.d.start(od), h0 = p.h.start(oh);
        for (int64_t o = 0, i = 0; o < p.w.out; ++o) {
            const int64_t w0 = p.w.start(o);
            for (int64_t c = 0; c < p.channels; ++c, ++i) {
                const int32_t row = offset[i] / int32_t(p.w.kernel), kw = offset[i] % int32_t(p.w.kernel);
                const int32_t kd = row / int32_t(p.h.kernel), kh = row % int32_t(p.h.kernel);
                const int64_t d = d0 + kd * p.d.dilation, h = h0 + kh * p.h.dilation;
                places[i] = offset[i] < kNowhere ? (d * p.h.in + h) * p.w.in + w0 + kw * p.w.dilation : -1;
            }
        }
    }
}

template <class In, class Place>
void max_with_places(const Job& job, int64_t begin, int64_t end, void* memory) {
    using Order = Ordered<In>;
    const PoolParams& p = job.p;
    Scratch scratch(memory);
    ArgmaxReducer<In> argmax(p, scratch);
    const auto* src = static_cast<const In*>(job.src);
    const int64_t plane = p.d.in * p.h.in * p.in_row();
    for (int64_t index = begin; index < end; ++index) {
        const int64_t oh = index % p.h.out, od = index / p.h.out % p.d.out;
        argmax(src + index / (p.h.out * p.d.out) * plane, od, oh);
        In* __restrict y = static_cast<In*>(job.dst) + index * p.out_row();
        const auto* __restrict values = argmax.values();
        for (int64_t i = 0; i < p.out_row(); ++i) y[i] = Order::store(values[i]);
        write_places(p, od, oh, argmax.offsets(), static_cast<Place*>(job.places_out) + index * p.out_row());
    }
}

// The gradient of one row of inputs: from each window over it, what went to a winner in that row.
template <class G, class Place>
class MaxSpread {
public:
    using T = Accumulator<G>;

    MaxSpread(const Job& job) : places_(static_cast<const Place*>(job.places_in)) {}

    static bool dealing(const PoolParams& p) {
        return p.channels == 1 && !window_by_window(p.w) && !std::is_same_v<Place, int64_t>;
    }

    void operator()(RowGradient<T>& gradient, const SpreadRow<G>& row) const {
        const PoolParams& p = gradient.params();
        const Axis& w = p.w;
        const Place* places = places_ + row.offset;
        if constexpr (std::is_same_v<Place, int64_t>) {
            scatter(gradient, row, places, [&](int64_t, int64_t index) {
                const int64_t column = index - row.input_row * w.in;
                return index >= 0 && column >= 0 && column < w.in ? column : -1;
            });
        } else {
            const int64_t base = row.place * w.kernel;
            if (w.adaptive || w.kernel > kWideWindow) {
                scatter(gradient, row, places, [&](int64_t o, int64_t offset) {
                    const int64_t c = offset - base;
                    const bool none = sizeof(Place) == 1 && offset == kByteWindow;
                    return !none && c >= 0 && c < w.kernel ? w.start(o) + c * w.dilation : -1;
                });
            } else if (p.channels == 1) {
                for (int64_t c = 0; c < w.kernel; ++c)
                    select(gradient.phase(c * w.dilation), row.grad, places, Place(base + c), w.out);
            } else {
                for (int64_t o = 0; o < w.out; ++o) {
                    const int64_t at = o * p.channels, last = w.end(o);
                    for (int64_t c = w.first(o); c < last; ++c)
                        select(gradient.column(w.start(o) + c * w.dilation), row.grad + at, places + at,
                               Place(base + c), p.channels);
                }
            }
        }
    }

private:
    static void select(T* __restrict sum, const G* __restrict grad, const Place* __restrict places, Place wanted,
                       int64_t n) {
        for (int64_t i = 0; i < n; ++i) sum[i] += places[i] == wanted ? widen(grad[i]) : T(0);
    }

    // Adds each gradient at the column that `find` gives it, if any.
    template <class Find>
    static void scatter(RowGradient<T>& gradient, const SpreadRow<G>& row, const Place* places, Find find) {
        const PoolParams& p = gradient.params();
        for (int64_t o = 0, i = 0; o < p.w.out; ++o)
            for (int64_t c = 0; c < p.channels; ++c, ++i) {
                const int64_t column = find(o, int64_t(places[i]));
                if (column >= 0) gradient.column(column)[c] += widen(row.grad[i]);
            }
    }

    const Place* places_;
};

template <class G, class Place>
void max_backward(const Job& job, int64_t begin, int64_t end, void* scratch) {
    MaxSpread<G, Place> spread(job);
    gather_rows<G>(job, begin, end, Scratch(scratch), MaxSpread<G, Place>::dealing(job.p), spread);
}

template <class In>
Kernel forward_of(Places places) {
    switch (places) {
        case Places::None:
            return max_values<In>;
        case Places::Byte:
            return max_with_places<In, uint8_t>;
        case Places::Int32:
            return max_with_places<In, int32_t>;
        case Places::Index:
            return max_with_places<In, int64_t>;
    }
    return nullptr;
}

template <class G>
Kernel backward_of(Places places) {
    switch (places) {
        case Places::Byte:
            return max_backward<G, uint8_t>;
        case Places::Int32:
            return max_backward<G, int32_t>;
        case Places::Index:
            return max_backward<G, int64_t>;
        case Places::None:
            break;
    }
    return nullptr;
}

}  // namespace

Kernel max_pool(DType dtype, Places places) {
    switch (dtype) {
        case DType::Int8:
            return forward_of<int8_t>(places);
        case DType::Int16:
            return forward_of<int16_t>(places);
        case DType::Int32:
            return forward_of<int32_t>(places);
        case DType::Int64:
            return forward_of<int64_t>(places);
        case DType::UInt8:
            return forward_of<uint8_t>(places);
        default:
            return for_float(dtype, [&](auto zero) { return forward_of<decltype(zero)>(places); });
    }
}

Kernel max_pool_backward(DType dtype, Places places) {
    return for_float(dtype, [&](auto zero) { return backward_of<decltype(zero)>(places); });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

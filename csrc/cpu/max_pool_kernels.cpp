// Max pooling, compiled once for each instruction set.
#include "cpu/interleave.h"
#include "cpu/pool_forward.h"
#include "cpu/pool_pixels.h"
#include "cpu/tables.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

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

template <class In>
void max_values(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.block)
        return pool_blocks(job, begin, end, Scratch(scratch), max_values<In>, true, sizeof(In), 0);
    using Order = typename Fastest<In>::Order;
    using Op = MaxOp<Order, In>;
    if constexpr (kCommon<In>)
        if (PixelWalker<In>::takes(job.p))
            return pool_pixels<Op>(job, begin, end, [](int64_t, int64_t, int64_t, auto use) {
                use([](typename Op::T x) { return x; });
            });
    const int64_t n = job.p.out_row();
    pool_rows<Op, In, Op::kPlain>(
        job, begin, end, Scratch(scratch),
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

    // `end` is where the input ends.
    ArgmaxReducer(const PoolParams& p, const In* end, Scratch& scratch)
        : p_(p),
          end_(end),
          phases_(p.w, deals(p), scratch),
          dealing_(deals(p)),
          value_(scratch.take<T>(p.out_row() + kVector)),
          offset_(scratch.take<int32_t>(p.out_row() + kVector)),
          row_value_(scratch.take<T>(p.in_row() + kVector)),
          row_offset_(scratch.take<int32_t>(p.in_row() + kVector)) {
        if (dealing_) {
            dealt_value_ = scratch.take<T>(phases_.size() + kVector);
            dealt_offset_ = scratch.take<int32_t>(phases_.size() + kVector);
            for (int64_t i = 0; i < phases_.size(); ++i) {
                dealt_value_[i] = Order::lowest();
                dealt_offset_[i] = kNowhere;
            }
        }
    }

    const T* values() const { return value_; }
    const int32_t* offsets() const { return offset_; }

    void operator()(const In* plane, int64_t od, int64_t oh) {
        if (p_.channels >= kLeastChannels && p_.window_places() <= kDirectWindow)
            return reduce_pixels(plane, od, oh);
        const Axis& w = p_.w;
        const In* last = nullptr;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t place) {
            const int32_t offset = int32_t(place * w.kernel);
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
        if (dealing_) {
            deal<Same<T>>(dealt_value_, phases_, row_value_, w);
            deal<Same<int32_t>>(dealt_offset_, phases_, row_offset_, w);
            for (int64_t c = 0; c < w.kernel; ++c) {
                const int64_t at = phases_.at(c);
                add_column(value_, offset_, dealt_value_ + at, dealt_offset_ + at, int32_t(c),
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
    // In channels-last, windows of few places are faster reduced in one step than in two.
    static constexpr int64_t kDirectWindow = 9, kLeastChannels = 16;

    template <class U>
    struct Same {
        using Element = U;
        static POOLING_EXT_INLINE U get(U x) { return x; }
    };

    // The places of a window are met in order, so a later one never wins a tie.
    void reduce_pixels(const In* plane, int64_t od, int64_t oh) {
        const Axis& w = p_.w;
        const int64_t channels = p_.channels;
        // Until something larger comes along, the first place of the window wins, if it has any.
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
        each_row(p_, plane, od, oh, [&](const In* row, int64_t place) {
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t last = w.end(o), step = w.dilation * channels;
                int64_t c = w.first(o);
                T* const best = value_ + o * channels;
                int32_t* const where = offset_ + o * channels;
                const In* x = row + w.start(o) * channels + c * step;
                const int32_t offset = int32_t(place * w.kernel);
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
    const Phases phases_;
    const bool dealing_;
    T* const value_;
    int32_t* const offset_;
    T* const row_value_;
    int32_t* const row_offset_;
    T* dealt_value_ = nullptr;
    int32_t* dealt_offset_ = nullptr;
};

// Writes the winners' indices in the plane; -1 where there is none.
inline void write_indices(const PoolParams& p, int64_t od, int64_t oh,
                          const int32_t* __restrict offset, int64_t* __restrict places) {
    const int64_t d0 = p.d.start(od), h0 = p.h.start(oh);
    for (int64_t o = 0, i = 0; o < p.w.out; ++o) {
        const int64_t w0 = p.w.start(o);
        for (int64_t c = 0; c < p.channels; ++c, ++i) {
            const int32_t row = offset[i] / int32_t(p.w.kernel),
                          kw = offset[i] % int32_t(p.w.kernel);
            const int32_t kd = row / int32_t(p.h.kernel), kh = row % int32_t(p.h.kernel);
            const int64_t d = d0 + kd * p.d.dilation, h = h0 + kh * p.h.dilation;
            places[i] =
                offset[i] < kNowhere ? (d * p.h.in + h) * p.w.in + w0 + kw * p.w.dilation : -1;
        }
    }
}

// Maxima of whole planes: the maximum first, then the place of whoever has it.
template <class In, class Place>
void max_of_planes(const Job& job, int64_t begin, int64_t end) {
    using Order = Ordered<In>;
    using Op = MaxOp<Order, In>;
    const int64_t n = job.p.in_plane();
    for (int64_t plane = begin; plane < end; ++plane) {
        const In* x = static_cast<const In*>(job.src) + plane * n;
        const auto most = reduce<Op, Stored<Op>>(x, n, 1);
        int64_t at = 0;
        if (is_nan(most))
            for (at = n - 1; !is_nan(Order::load(x[at]));) --at;
        else
            while (Order::load(x[at]) != most) ++at;
        static_cast<In*>(job.dst)[plane] = Order::store(most);
        static_cast<Place*>(job.places_out)[plane] = Place(at);
    }
}

// The maxima of a window in channels-last, and the offsets of their winners; x holds its elements
// in order.
template <class In, int kCount>
__attribute__((noinline)) void argmax_pixel(In* __restrict y, uint8_t* __restrict places,
                                            const In* const* elements, const int32_t* offsets,
                                            int64_t n) {
    using Order = Ordered<In>;
    using T = typename Order::T;
    // As wide as the values, so that one vector of each belongs together.
    using Where = std::make_signed_t<BitsOf<T>>;
    const In* x[kCount];
    Where offset[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = elements[k], offset[k] = Where(offsets[k]);
    each_run<64 / sizeof(T)>(n, 0, [&](int64_t i, auto count) {
        constexpr int kRun = count.value;
        T maxima[kRun];
        Where winners[kRun];
// Unrolled they would no longer be loops, of which vectors are made.
#pragma GCC unroll 1
        for (int j = 0; j < kRun; ++j) {
            T best = Order::load(x[0][i + j]);
            Where where = offset[0];
            for (int k = 1; k < kCount; ++k) {
                const T v = Order::load(x[k][i + j]);
                const bool wins = (v > best) | is_nan(v);
                best = select(wins, v, best);
                where = select(wins, offset[k], where);
            }
            maxima[j] = best;
            winners[j] = where;
        }
#pragma GCC unroll 1
        for (int j = 0; j < kRun; ++j) y[i + j] = Order::store(maxima[j]);
#pragma GCC unroll 1
        for (int j = 0; j < kRun; ++j) places[i + j] = uint8_t(winners[j]);
    });
}

template <class In>
void argmax_pixels(const Job& job, int64_t begin, int64_t end) {
    const PoolParams& p = job.p;
    PixelWalker<In> walk(p);
    each_index(
        begin, end, p.d.out, p.h.out, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
            const In* plane = static_cast<const In*>(job.src) + outer * p.in_plane() * p.channels;
            In* y = static_cast<In*>(job.dst) + index * p.out_row();
            auto* places = static_cast<uint8_t*>(job.places_out) + index * p.out_row();
            walk(plane, od, oh, [&](const Taps<In>& taps, auto rows, auto columns, int64_t o) {
                constexpr int kCount = rows.value * columns.value;
                In* const to = y + o * p.channels;
                uint8_t* const place = places + o * p.channels;
                if constexpr (kCount == 0) {
                    fill(to, Ordered<In>::store(Ordered<In>::lowest()), p.channels);
                    fill(place, uint8_t(kByteWindow), p.channels);
                } else {
                    const In* x[kCount];
                    int32_t offsets[kCount];
                    for (int k = 0; k < kCount; ++k) {
                        x[k] = taps.at(k, columns.value);
                        offsets[k] = walk.offset(o, k, columns.value);
                    }
                    argmax_pixel<In, kCount>(to, place, x, offsets, p.channels);
                }
            });
        });
}

// Stores a row's winners: their offsets in the windows, or indices in the plane.
template <class Place>
void store_places(const PoolParams& p, int64_t od, int64_t oh, const int32_t* __restrict offsets,
                  Place* __restrict where, Place* places) {
    if constexpr (std::is_same_v<Place, int64_t>) {
        write_indices(p, od, oh, offsets, places);
    } else {
        const int64_t out = p.out_row(), n = whole_vectors(out, kVector);
        for (int64_t i = 0; i < n; ++i) where[i] = Place(offsets[i] < kNowhere ? offsets[i] : -1);
        std::memcpy(places, where, out * sizeof(Place));
    }
}

template <class In>
void max_by_rows(const Job& job, int64_t begin, int64_t end, Places kind, Scratch scratch) {
    using Order = Ordered<In>;
    const PoolParams& p = job.p;
    const auto* src = static_cast<const In*>(job.src);
    const int64_t plane = p.d.in * p.h.in * p.in_row(), out = p.out_row();
    ArgmaxReducer<In> argmax(p, src + p.outer * plane, scratch);
    In* __restrict maxima = scratch.take<In>(out + kVector);
    int32_t* const where = scratch.take<int32_t>(out + kVector);
    each_index(begin, end, p.d.out, p.h.out,
               [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
                   argmax(src + outer * plane, od, oh);
                   // By way of scratch memory, where whole vectors can be written.
                   const auto* __restrict values = argmax.values();
                   const int64_t n = whole_vectors(out, kVector);
                   for (int64_t i = 0; i < n; ++i) maxima[i] = Order::store(values[i]);
                   std::memcpy(static_cast<In*>(job.dst) + index * out, maxima, out * sizeof(In));
                   const auto store = [&](auto place) {
                       using Place = decltype(place);
                       store_places(p, od, oh, argmax.offsets(), reinterpret_cast<Place*>(where),
                                    static_cast<Place*>(job.places_out) + index * out);
                   };
                   if (kind == Places::Byte)
                       store(uint8_t{});
                   else if (kind == Places::Int32)
                       store(int32_t{});
                   else
                       store(int64_t{});
               });
}

template <class In, class Place, Places kPlaces>
void max_with_places(const Job& job, int64_t begin, int64_t end, void* memory) {
    Scratch scratch(memory);
    if (job.block)
        return pool_blocks(job, begin, end, scratch, max_with_places<In, Place, kPlaces>, true,
                           sizeof(In), sizeof(Place));
    if (job.p.channels == 1 && is_whole(job.p)) return max_of_planes<In, Place>(job, begin, end);
    if constexpr (kCommon<In> && kPlaces == Places::Byte)
        if (PixelWalker<In>::takes(job.p)) return argmax_pixels<In>(job, begin, end);
    max_by_rows<In>(job, begin, end, kPlaces, scratch);
}

template <class In>
Kernel forward_of(Places places) {
    switch (places) {
        case Places::None:
            return max_values<In>;
        case Places::Byte:
            return max_with_places<In, uint8_t, Places::Byte>;
        case Places::Int32:
            return max_with_places<In, int32_t, Places::Int32>;
        case Places::Index:
            return max_with_places<In, int64_t, Places::Index>;
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

}  // namespace pooling_ext::POOLING_EXT_ISA

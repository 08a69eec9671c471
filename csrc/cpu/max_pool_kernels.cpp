// Max pooling, compiled once for each instruction set.
#include "cpu/interleave.h"
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
    if (job.block)
        return pool_blocks(job, begin, end, Scratch(scratch), max_values<In>, true, sizeof(In), 0);
    using Order = typename Fastest<In>::Order;
    using Op = MaxOp<Order, In>;
    const int64_t n = job.p.out_row();
    pool_rows<Op, In>(
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

    ArgmaxReducer(const PoolParams& p, Scratch& scratch)
        : p_(p),
          phases_(p.w, deals(p), scratch),
          dealing_(deals(p)),
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
        if (p_.channels >= kLeastChannels && p_.window_places() <= kDirectWindow)
            return reduce_pixels(plane, od, oh);
        const Axis& w = p_.w;
        bool any = false;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t place) {
            const int32_t offset = int32_t(place * w.kernel);
            if (any)
                add_row(row, offset);
            else
                start_row(row, offset);
            any = true;
        });
        for (int64_t i = 0; i < p_.out_row(); ++i) {
            value_[i] = Order::lowest();
            offset_[i] = kNowhere;
        }
        if (!any) return;
        if (dealing_) {
            for (const auto& part : phases_) {
                gather_phase<Same<T>>(dealt_value_ + part.to, row_value_ + part.from, part.count,
                                      w.stride);
                gather_phase<Same<int32_t>>(dealt_offset_ + part.to, row_offset_ + part.from,
                                            part.count, w.stride);
            }
            for (int64_t c = 0; c < w.kernel; ++c) {
                const int64_t at = phases_.at(c);
                add_column(value_, offset_, dealt_value_ + at, dealt_offset_ + at, int32_t(c),
                           w.out);
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

// Writes the winners' offsets, or their indices in the plane; -1 (as a byte: 255) where there is
// none.
template <class Place>
void write_places(const PoolParams& p, int64_t od, int64_t oh, const int32_t* __restrict offset,
                  Place* __restrict places) {
    if constexpr (!std::is_same_v<Place, int64_t>) {
        for (int64_t i = 0; i < p.out_row(); ++i)
            places[i] = Place(offset[i] < kNowhere ? offset[i] : -1);
    } else {
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

template <class In, class Place>
void max_with_places(const Job& job, int64_t begin, int64_t end, void* memory) {
    Scratch scratch(memory);
    if (job.block)
        return pool_blocks(job, begin, end, scratch, max_with_places<In, Place>, true, sizeof(In),
                           sizeof(Place));
    if (job.p.channels == 1 && is_whole(job.p)) return max_of_planes<In, Place>(job, begin, end);
    using Order = Ordered<In>;
    const PoolParams& p = job.p;
    ArgmaxReducer<In> argmax(p, scratch);
    const auto* src = static_cast<const In*>(job.src);
    const int64_t plane = p.d.in * p.h.in * p.in_row();
    each_index(begin, end, p.d.out, p.h.out,
               [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
                   argmax(src + outer * plane, od, oh);
                   In* __restrict y = static_cast<In*>(job.dst) + index * p.out_row();
                   const auto* __restrict values = argmax.values();
                   for (int64_t i = 0; i < p.out_row(); ++i) y[i] = Order::store(values[i]);
                   write_places(p, od, oh, argmax.offsets(),
                                static_cast<Place*>(job.places_out) + index * p.out_row());
               });
}

// The gradients of a plane are scattered, each to its winner. A thread has the plane to itself
// (in channels-last: kScatterChannels planes), so the order of the sums does not depend on how many
// there are.
template <class G, class Place, bool kChannelsLast>
void scatter_planes(const Job& job, int64_t begin, int64_t end, Scratch scratch) {
    using T = Accumulator<G>;
    const PoolParams& p = job.p;
    // Where each offset in a window leads, from the window's start.
    constexpr int64_t kTable = std::is_same_v<Place, uint8_t> ? kByteWindow : 0;
    int64_t lead[kTable + 1];
    const auto lead_of = [&](int64_t offset) {
        const int64_t kw = offset % p.w.kernel, row = offset / p.w.kernel;
        const int64_t kh = row % p.h.kernel, kd = row / p.h.kernel;
        return (kd * p.d.dilation * p.h.in + kh * p.h.dilation) * p.w.in + kw * p.w.dilation;
    };
    for (int64_t offset = 0; offset < kTable && offset < p.window_places(); ++offset)
        lead[offset] = lead_of(offset);
    int64_t* starts = scratch.take<int64_t>(p.w.out);
    for (int64_t ow = 0; ow < p.w.out; ++ow) starts[ow] = p.w.start(ow);
    const int64_t groups = ceil_div(p.channels, kScatterChannels);
    // Sums of the stored type in the contiguous format are made in place.
    constexpr bool in_place = std::is_same_v<T, G> && !kChannelsLast;
    T* own =
        scratch.take<T>(in_place ? 0 : p.in_plane() * (groups > 1 ? kScatterChannels : p.channels));
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t channel = unit % groups * kScatterChannels, outer = unit / groups;
        const int64_t rest = p.channels - channel;
        const int64_t channels = !kChannelsLast            ? 1
                                 : rest < kScatterChannels ? rest
                                                           : kScatterChannels;
        const int64_t from = outer * p.out_plane() * p.channels + channel;
        const G* grad = static_cast<const G*>(job.src) + from;
        const Place* place = static_cast<const Place*>(job.places_in) + from;
        G* dst = static_cast<G*>(job.dst) + outer * p.in_plane() * p.channels + channel;
        T* const sums = in_place ? reinterpret_cast<T*>(dst) : own;
        std::memset(sums, 0, p.in_plane() * channels * sizeof(T));
        each_index(
            0, p.d.out * p.h.out, p.d.out, p.h.out, [&](int64_t, int64_t, int64_t od, int64_t oh) {
                const int64_t row = (p.d.start(od) * p.h.in + p.h.start(oh)) * p.w.in;
                for (int64_t ow = 0; ow < p.w.out; ++ow, grad += p.channels, place += p.channels)
                    for (int64_t c = 0; c < channels; ++c) {
                        const Place at = place[c];
                        const T g = widen(grad[c]);
                        if constexpr (std::is_same_v<Place, int64_t>) {
                            if (at >= 0) sums[at * channels + c] += g;
                        } else if constexpr (std::is_same_v<Place, uint8_t>) {
                            if (at != kByteWindow)
                                sums[(row + starts[ow] + lead[at]) * channels + c] += g;
                        } else if (at >= 0) {
                            sums[(row + starts[ow] + lead_of(at)) * channels + c] += g;
                        }
                    }
            });
        if (in_place) continue;
        // Pixels that are whole are written in one run.
        const int64_t runs = channels == p.channels ? 1 : p.in_plane();
        const int64_t run = p.in_plane() * channels / runs;
        for (int64_t r = 0; r < runs; ++r) {
            const T* __restrict sum = sums + r * run;
            G* __restrict to = dst + r * p.channels;
            for (int64_t i = 0; i < run; ++i) to[i] = narrow<G>(sum[i]);
        }
    }
}

// The input column that an offset in window o names, if it is in the window's row `place`; else -1.
POOLING_EXT_INLINE int64_t column_of(const Axis& w, int64_t o, int64_t offset, int64_t place) {
    const int64_t k = offset - place * w.kernel;
    return k >= 0 && k < w.kernel ? w.start(o) + k * w.dilation : -1;
}

// In channels-last a row of inputs gathers, from each window over it, what went to a winner there.
template <class G, class Place>
void gather_winners(const Job& job, int64_t begin, int64_t end, Scratch scratch) {
    using T = Accumulator<G>;
    const PoolParams& p = job.p;
    const Axis& w = p.w;
    RowGradient<T> gradient(p, scratch, false);
    const auto add_row = [&](const SpreadRow<G>& row) {
        const Place* places = static_cast<const Place*>(job.places_in) + row.offset;
        for (int64_t o = 0; o < w.out; ++o) {
            const G* __restrict grad = row.grad + o * p.channels;
            const Place* __restrict place = places + o * p.channels;
            if (std::is_same_v<Place, int64_t> || w.kernel > kWideWindow) {
                // One pass over the winners costs less than one for each column.
                for (int64_t c = 0; c < p.channels; ++c) {
                    const int64_t at = std::is_same_v<Place, int64_t>
                                           ? place[c] - row.input_row * w.in
                                           : column_of(w, o, place[c], row.place);
                    if (at >= 0 && at < w.in) gradient.column(at)[c] += widen(grad[c]);
                }
                continue;
            }
            const int64_t last = w.end(o);
            for (int64_t k = w.first(o); k < last; ++k) {
                T* __restrict sum = gradient.column(w.start(o) + k * w.dilation);
                const Place wanted = Place(row.place * w.kernel + k);
                for (int64_t c = 0; c < p.channels; ++c)
                    sum[c] += place[c] == wanted ? widen(grad[c]) : T(0);
            }
        }
    };
    gather_rows<G>(
        job, begin, end, [&] { gradient.clear(); }, add_row, [&](G* dst) { gradient.write(dst); });
}

template <class G, class Place>
void max_backward(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.by_plane && job.p.channels == 1)
        scatter_planes<G, Place, false>(job, begin, end, Scratch(scratch));
    else if (job.by_plane)
        scatter_planes<G, Place, true>(job, begin, end, Scratch(scratch));
    else
        gather_winners<G, Place>(job, begin, end, Scratch(scratch));
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

// The backward pass of max pooling, compiled once for each instruction set: each gradient goes to
// the offset that won.
#include "kernels/cpu/pool/max_pool.h"
#include "kernels/cpu/pool/max_pool_backward_nhwc.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Offset>
POOLING_EXT_INLINE bool is_offset(Offset at) {
    if constexpr (std::is_same_v<Offset, uint8_t>)
        return at != kByteWindow;
    else
        return at >= 0;
}

// The gradients of a plane are scattered, each to its winner. A thread has the plane to itself
// (in channels-last: kScatterChannels planes), so the order of the sums does not depend on how many
// there are. Where no two windows overlap there is nothing to sum, and gradients are stored.
template <class G, class Offset>
class Scatter {
  public:
    using T = Accumulator<G>;

    Scatter(const Job& job, Scratch& scratch)
        : p_(job.p),
          grad_(static_cast<const G*>(job.src)),
          offsets_(static_cast<const Offset*>(job.offsets_in)),
          dst_(static_cast<G*>(job.dst)),
          apart_(p_.d.apart() && p_.h.apart() && p_.w.apart()),
          direct_(kInPlace || apart_),
          pitch_(direct_ || p_.channels < kScatterChannels ? p_.channels : kScatterChannels),
          rows_(scratch.take<int64_t>(p_.d.out * p_.h.out)),
          columns_(scratch.take<int64_t>(p_.w.out)),
          lead_(scratch.take<int64_t>(kByteWindow)),
          own_(scratch.take<T>(direct_            ? 0
                               : p_.channels == 1 ? p_.in_plane() * planes_at_once()
                                                  : p_.in_plane() * pitch_)),
          located_(scratch.take<int32_t>(2 * kLocated)),
          starts_(scratch.take<int32_t>(
              p_.channels == 1 ? planes_at_once() * p_.out_plane() + kVector : 0)) {
        for (int64_t od = 0, i = 0; od < p_.d.out; ++od)
            for (int64_t oh = 0; oh < p_.h.out; ++oh, ++i)
                rows_[i] = (p_.d.start(od) * p_.h.in + p_.h.start(oh)) * p_.w.in * pitch_;
        for (int64_t ow = 0; ow < p_.w.out; ++ow) columns_[ow] = p_.w.start(ow) * pitch_;
        const int64_t planes = p_.channels == 1 && !is_whole(p_) ? planes_at_once() : 0;
        for (int64_t plane = 0, i = 0; plane < planes; ++plane)
            for (int64_t r = 0; r < p_.d.out * p_.h.out; ++r)
                for (int64_t ow = 0; ow < p_.w.out; ++ow, ++i)
                    starts_[i] = int32_t(plane * p_.in_plane() + rows_[r] + columns_[ow]);
        row_inverse_ = 65536 / p_.w.kernel + 1;
        slice_inverse_ = 65536 / p_.h.kernel + 1;
        row_step_ = uint32_t(p_.h.dilation * p_.w.in - p_.w.dilation * p_.w.kernel);
        slice_step_ = uint32_t((p_.d.dilation * p_.h.in - p_.h.dilation * p_.h.kernel) * p_.w.in);
        if (!std::is_same_v<Offset, uint8_t>) return;
        for (int64_t offset = 0; offset < p_.window_size(); ++offset)
            lead_[offset] = lead_of(offset);
    }

    void planes(int64_t begin, int64_t end) {
        const int64_t in = p_.in_plane(), count = planes_at_once();
        const bool whole = is_whole(p_);
        for (int64_t first = begin; first < end; first += count) {
            const int64_t last = first + count < end ? first + count : end;
            G* const dst = dst_ + first * in;
            if (!direct_) {
                std::memset(own_, 0, (last - first) * in * sizeof(T));
                scatter(first, last, own_, [](T& sum, G g) { sum += widen(g); });
                for (int64_t i = 0; i < (last - first) * in; ++i) dst[i] = narrow<G>(own_[i]);
                continue;
            }
            std::memset(dst, 0, (last - first) * in * sizeof(G));
            if (whole) {
                for (int64_t plane = first; plane < last; ++plane)
                    if (const Offset at = offsets_[plane]; is_offset(at))
                        dst[(plane - first) * in + at] = grad_[plane];
            } else if (apart_) {
                scatter(first, last, dst, [](G& to, G g) { to = g; });
            } else if constexpr (kInPlace) {
                scatter(first, last, dst, [](T& sum, G g) { sum += g; });
            }
        }
    }

    // Units of kScatterChannels channels; neighbors are taken together where that is possible.
    void channels(int64_t begin, int64_t end) {
        const int64_t all = p_.channels, groups = ceil_div(all, kScatterChannels);
        while (begin < end) {
            const int64_t outer = begin / groups, group = begin % groups;
            const int64_t left = end - begin, rest = groups - group;
            const int64_t taken = !direct_ ? 1 : left < rest ? left : rest;
            const int64_t channel = group * kScatterChannels;
            const int64_t until = (group + taken) * kScatterChannels;
            const int64_t n = (until < all ? until : all) - channel;
            const int64_t from = outer * p_.out_plane() * all + channel;
            G* const dst = dst_ + outer * p_.in_plane() * all + channel;
            if (direct_) clear(dst, n);
            if (apart_) {
                each_winner(from, n, [=](int64_t at, G g) { dst[at] = g; });
            } else if (kInPlace) {
                T* const sums = reinterpret_cast<T*>(dst);
                each_winner(from, n, [=](int64_t at, G g) { sums[at] += widen(g); });
            } else {
                T* const sums = own_;
                std::memset(sums, 0, p_.in_plane() * pitch_ * sizeof(T));
                each_winner(from, n, [=](int64_t at, G g) { sums[at] += widen(g); });
                for (int64_t pixel = 0; pixel < p_.in_plane(); ++pixel)
                    for (int64_t c = 0; c < n; ++c)
                        dst[pixel * all + c] = narrow<G>(sums[pixel * pitch_ + c]);
            }
            begin += taken;
        }
    }

  private:
    // Sums of the stored type are made in place.
    static constexpr bool kInPlace = std::is_same_v<T, G>;
    static constexpr int64_t kLocated = 1024;

    // As many planes at a time as leave the first-level cache room.
    int64_t planes_at_once() const { return 2 * (1 + 2048 / p_.in_plane()); }

    int64_t lead_of(int64_t offset) const {
        const int64_t kw = offset % p_.w.kernel, row = offset / p_.w.kernel;
        const int64_t kh = row % p_.h.kernel, kd = row / p_.h.kernel;
        return ((kd * p_.d.dilation * p_.h.in + kh * p_.h.dilation) * p_.w.in +
                kw * p_.w.dilation) *
               pitch_;
    }

    void clear(G* dst, int64_t n) const {
        if (n == p_.channels) {
            std::memset(dst, 0, p_.in_plane() * n * sizeof(G));
            return;
        }
        for (int64_t pixel = 0; pixel < p_.in_plane(); ++pixel)
            std::memset(dst + pixel * p_.channels, 0, n * sizeof(G));
    }

    // Where an offset leads in the window that starts at `start`.
    POOLING_EXT_INLINE int64_t input_of(int64_t start, Offset at) const {
        if constexpr (std::is_same_v<Offset, int64_t>)
            return at * pitch_;
        else if constexpr (std::is_same_v<Offset, uint8_t>)
            return start + lead_[at];
        else
            return start + lead_of(at);
    }

    // Calls give(input, gradient) for each window of planes [first, last), whose inputs are at
    // `to`. The two halves of the planes take turns, so that a sum need not wait for the one
    // before.
    template <class To, class Give>
    POOLING_EXT_INLINE void scatter(int64_t first, int64_t last, To* to, Give give) const {
        const int64_t out = p_.out_plane(), half = (last - first) / 2 * out;
        const int64_t all = (last - first) * out, from = first * out;
        const G* __restrict grad = grad_ + from;
        const int32_t* __restrict here = located_, * __restrict there = located_ + kLocated;
        for (int64_t o = 0; o < half; o += kLocated) {
            const int64_t n = half - o < kLocated ? half - o : kLocated;
            locate(from, o, n, 0);
            locate(from, half + o, n, kLocated);
            for (int64_t i = 0; i < n; ++i) {
                if (here[i] >= 0) give(to[here[i]], grad[o + i]);
                if (there[i] >= 0) give(to[there[i]], grad[half + o + i]);
            }
        }
        for (int64_t o = 2 * half; o < all; o += kLocated) {
            const int64_t n = all - o < kLocated ? all - o : kLocated;
            locate(from, o, n, 0);
            for (int64_t i = 0; i < n; ++i)
                if (here[i] >= 0) give(to[here[i]], grad[o + i]);
        }
    }

    // Where the winners of outputs [first, first + n) after `from` lie, computed by vectors; -1 for
    // none.
    void locate(int64_t from, int64_t first, int64_t n, int64_t to) const {
        const Offset* const offsets = offsets_ + from + first;
        if constexpr (std::is_same_v<Offset, uint8_t>) {
            // Whole vectors where there are more offsets to read; what is found past n is not used.
            const int64_t rounded = whole_vectors(n, kVector);
            const bool readable = from + first + rounded <= p_.outer * p_.out_plane();
            locate(offsets, starts_ + first, located_ + to, readable ? rounded : n);
        } else {
            const int64_t out = p_.out_plane(), in = p_.in_plane();
            for (int64_t i = 0; i < n; ++i) {
                const Offset at = offsets[i];
                const int64_t start =
                    std::is_same_v<Offset, int64_t> ? (first + i) / out * in : starts_[first + i];
                const int64_t where =
                    std::is_same_v<Offset, int64_t> ? start + at : input_of(start, at);
                located_[to + i] = is_offset(at) ? int32_t(where) : -1;
            }
        }
    }

    void locate(const uint8_t* __restrict offset, const int32_t* __restrict starts,
                int32_t* __restrict located, int64_t n) const {
        // Modulo 2^32: a window may start so far outside that its start does not fit.
        const uint32_t column = uint32_t(p_.w.dilation), row = row_step_, slice = slice_step_;
        const uint32_t per_row = row_inverse_, per_slice = slice_inverse_;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t at = offset[i];
            const uint32_t kh = (at * per_row) >> 16, kd = (kh * per_slice) >> 16;
            const uint32_t where = uint32_t(starts[i]) + at * column + kh * row + kd * slice;
            located[i] = at == kByteWindow ? -1 : int32_t(where);
        }
    }

    // Calls give(where in the plane of inputs, gradient) for `n` channels of each window, from
    // output `from` on.
    template <class Give>
    POOLING_EXT_INLINE void each_winner(int64_t from, int64_t n, Give give) const {
        const int64_t rows = p_.d.out * p_.h.out, out = p_.w.out, channels = p_.channels;
        const int64_t* __restrict columns = columns_;
        const G* __restrict grad = grad_ + from;
        const Offset* __restrict offset = offsets_ + from;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = rows_[r];
            for (int64_t ow = 0; ow < out; ++ow, grad += channels, offset += channels) {
                const int64_t start = row + columns[ow];
                for (int64_t c = 0; c < n; ++c)
                    if (const Offset at = offset[c]; is_offset(at))
                        give(input_of(start, at) + c, grad[c]);
            }
        }
    }

    const PoolParams& p_;
    const G* const grad_;
    const Offset* const offsets_;
    G* const dst_;
    const bool apart_, direct_;
    // How far apart neighboring inputs are, and so where rows and columns of windows start and
    // where each offset in a window leads from there.
    const int64_t pitch_;
    int64_t* const rows_;
    int64_t* const columns_;
    int64_t* const lead_;
    T* const own_;
    int32_t* const located_;
    int32_t* const starts_;
    uint32_t row_inverse_, slice_inverse_;
    uint32_t row_step_, slice_step_;
};

// The input column that an offset in window o names, if it is in the window's row `kernel_row`;
// else -1.
POOLING_EXT_INLINE int64_t column_of(const Axis& w, int64_t o, int64_t offset, int64_t kernel_row) {
    const int64_t k = offset - kernel_row * w.kernel;
    return k >= 0 && k < w.kernel ? w.start(o) + k * w.dilation : -1;
}

// A row of inputs gathers, from each window over it, what went to a winner there.
template <class G, class Offset>
void gather_winners(const Job& job, int64_t begin, int64_t end, Scratch scratch) {
    using T = Accumulator<G>;
    const PoolParams& p = job.p;
    const Axis& w = p.w;
    RowGradient<T> gradient(p, scratch, false);
    const auto add_row = [&](const SpreadRow<G>& row) {
        const Offset* offsets = static_cast<const Offset*>(job.offsets_in) + row.offset;
        for (int64_t o = 0; o < w.out; ++o) {
            const G* __restrict grad = row.grad + o * p.channels;
            const Offset* __restrict offset = offsets + o * p.channels;
            if (std::is_same_v<Offset, int64_t> || w.kernel > kWideWindow) {
                // One pass over the winners costs less than one for each column.
                for (int64_t c = 0; c < p.channels; ++c) {
                    const int64_t at = std::is_same_v<Offset, int64_t>
                                           ? offset[c] - row.input_row * w.in
                                           : column_of(w, o, offset[c], row.kernel_row);
                    if (at >= 0 && at < w.in) gradient.column(at)[c] += widen(grad[c]);
                }
                continue;
            }
            const int64_t last = w.end(o);
            for (int64_t k = w.first(o); k < last; ++k) {
                T* __restrict sum = gradient.column(w.start(o) + k * w.dilation);
                const Offset wanted = Offset(row.kernel_row * w.kernel + k);
                for (int64_t c = 0; c < p.channels; ++c)
                    sum[c] += select(offset[c] == wanted, T(widen(grad[c])), T(0));
            }
        }
    };
    gather_rows<G>(
        job, begin, end, [&] { gradient.clear(); }, add_row, [&](G* dst) { gradient.write(dst); });
}

template <class G, class Offset>
void max_backward(const Job& job, int64_t begin, int64_t end, void* memory) {
    Scratch scratch(memory);
    if (job.by_plane) {
        Scatter<G, Offset> scatter(job, scratch);
        return job.p.channels == 1 ? scatter.planes(begin, end) : scatter.channels(begin, end);
    }
    if constexpr (kCommon<G> && std::is_same_v<Offset, uint8_t>) {
        if (MaxPoolBackwardNhwc<G>::takes(job.p)) {
            MaxPoolBackwardNhwc<G> gatherer(job, scratch);
            return gather_rows<G>(
                job, begin, end, [&] { gatherer.start(); },
                [&](const SpreadRow<G>& row) { gatherer.add(row); },
                [&](G* dst) { gatherer.finish(dst, [](int64_t) { return Narrowed<G>{}; }); });
        }
    }
    gather_winners<G, Offset>(job, begin, end, scratch);
}

template <class G>
Kernel backward_of(Offsets offsets) {
    switch (offsets) {
        case Offsets::Byte:
            return max_backward<G, uint8_t>;
        case Offsets::Int32:
            return max_backward<G, int32_t>;
        case Offsets::Index:
            return max_backward<G, int64_t>;
        case Offsets::None:
            break;
    }
    return nullptr;
}

}  // namespace

Kernel max_pool_backward(DType dtype, Offsets offsets) {
    return for_float(dtype, [&](auto zero) { return backward_of<decltype(zero)>(offsets); });
}

}  // namespace pooling_ext::POOLING_EXT_ISA

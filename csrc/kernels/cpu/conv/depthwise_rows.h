// Rows of planes, between tensors and the scratch memory of depthwise convolution's kernels.
#pragma once

#include "kernels/cpu/conv/depthwise.h"
#include "kernels/cpu/conv/lanes.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// Keeps compilers from taking an address apart, which would cost a register for each offset from
// it.
template <class T>
POOLING_EXT_INLINE void fixed(T*& address) {
    asm("" : "+r"(address));
}

// A walk over the pixels of a plane. Divisions are slow: there is one where it begins.
struct Pixel {
    int64_t row, column;

    Pixel(int64_t pixel, int64_t columns) : row(pixel / columns), column(pixel % columns) {}

    POOLING_EXT_INLINE void skip(int64_t count, int64_t columns) {
        for (column += count; column >= columns; column -= columns) ++row;
    }
};

// The planes of a tensor.
template <class E>
struct Planes {
    E* data;
    int64_t batch, channels, rows, columns;
    bool channels_last;

    int64_t pixels() const { return rows * columns; }
    int64_t numel() const { return batch * channels * pixels(); }
    // The first of some channels of a pixel; in the contiguous format, of one of them.
    E* at(int64_t n, int64_t channel, int64_t pixel) const {
        return data + (channels_last ? (n * pixels() + pixel) * channels + channel
                                     : (n * channels + channel) * pixels() + pixel);
    }
};

// Rows of the source in scratch memory, for some vectors of channels. Row r is in slot r % slots.
template <class In>
class Ring {
  public:
    using L = Lanes<In>;
    using T = typename L::T;
    using X = typename L::X;

    Ring(T* memory, int64_t slots, int64_t vectors, int64_t width, int64_t lead)
        : zeros_(memory),
          data_(memory + width * L::kSize),
          slots_(slots),
          vectors_(vectors),
          width_(width),
          lead_(lead) {}

    static int64_t size(int64_t slots, int64_t vectors, int64_t width) {
        return (slots * vectors + 1) * width * L::kSize;
    }

    // What no load writes stays zero: the padding, and a row of it.
    void clear() const { std::memset(zeros_, 0, size(slots_, vectors_, width_) * sizeof(T)); }

    // Column 0 of a row, which may be in the padding of a plane of so many rows.
    const T* row(int64_t r, int64_t v, int64_t rows) const {
        return r < 0 || r >= rows ? zeros_ : at(r, v);
    }

    // Loads rows [begin, end) of the planes of `count` channels from `channel` on.
    void load(const Planes<const In>& from, int64_t n, int64_t channel, int64_t count,
              int64_t begin, int64_t end) const {
        if (begin >= end) return;
        if (from.channels_last)
            for (int64_t r = begin; r < end; ++r) load_row(from, n, channel, count, r);
        else
            for (int64_t v = 0; v * L::kSize < count; ++v)
                load_planes(from, n, channel + v * L::kSize, count - v * L::kSize, begin, end, v);
    }

  private:
    T* at(int64_t r, int64_t v) const {
        return data_ + (r % slots_ * vectors_ + v) * width_ * L::kSize;
    }

    void load_row(const Planes<const In>& from, int64_t n, int64_t channel, int64_t count,
                  int64_t r) const {
        const In* x = from.at(n, channel, r * from.columns);
        const In* const end = from.data + from.numel();
        const int64_t whole = count / L::kSize, rest = count % L::kSize, pitch = width_ * L::kSize;
        T* to = at(r, 0) + lead_ * L::kSize;
        for (int64_t column = 0; column < from.columns; ++column) {
            T* into = to;
            for (int64_t v = 0; v < whole; ++v, into += pitch)
                L::keep(into, L::get(x + v * L::kSize));
            if (rest > 0) {
                // What follows is another pixel's, and goes into lanes that nobody reads.
                const In* const last = x + whole * L::kSize;
                L::keep(into, end - last >= L::kSize ? L::get(last) : L::get(last, rest));
            }
            x += from.channels;
            to += L::kSize;
        }
    }

    // A square of as many pixels as channels at a time.
    void load_planes(const Planes<const In>& from, int64_t n, int64_t channel, int64_t count,
                     int64_t begin, int64_t end, int64_t v) const {
        constexpr int64_t kSize = L::kSize;
        const int64_t first = begin * from.columns, last = end * from.columns;
        const In* planes[kSize];
        for (int64_t i = 0; i < kSize; ++i)
            planes[i] = from.at(n, channel + (i < count ? i : count - 1), 0);
        Pixel at_next(first, from.columns);
        for (int64_t next = first; next < last; next += kSize, at_next.skip(kSize, from.columns)) {
            // The last square overlaps the one before it.
            const bool back = next + kSize > last && last - first >= kSize;
            const int64_t pixel = back ? last - kSize : next;
            const int64_t some = last - pixel < kSize ? last - pixel : kSize;
            X x[kSize];
            if (some == kSize) {
#pragma GCC unroll 16
                for (int64_t i = 0; i < kSize; ++i) x[i] = L::get(planes[i] + pixel);
            } else {
                for (int64_t i = 0; i < kSize; ++i) x[i] = L::get(planes[i] + pixel, some);
            }
            L::transpose(x);
            store(x, back ? Pixel(pixel, from.columns) : at_next, some, from.columns, v);
        }
    }

    POOLING_EXT_INLINE void store(const X* x, Pixel pixel, int64_t count, int64_t columns,
                                  int64_t v) const {
        T* row = at(pixel.row, v) + lead_ * L::kSize;
        T* to = row + pixel.column * L::kSize;
        if (count == L::kSize && pixel.column + L::kSize <= columns) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < L::kSize; ++i) L::keep(to + i * L::kSize, x[i]);
            return;
        }
        const int64_t pitch = vectors_ * width_ * L::kSize;
        const T* const end = data_ + slots_ * pitch;
        for (int64_t i = 0, left = columns - pixel.column; i < count; ++i, to += L::kSize) {
            if (left-- == 0) {
                row += pitch;
                if (row >= end) row -= slots_ * pitch;
                to = row;
                left = columns - 1;
            }
            L::keep(to, x[i]);
        }
    }

    T* zeros_;
    T* data_;
    int64_t slots_, vectors_, width_, lead_;
};

// Writes `rows` rows from `first` on for a vector of channels. They lie `across` columns apart.
template <class In>
void store_rows(const Planes<In>& to, int64_t n, int64_t channel, int64_t first, int64_t rows,
                const Accumulator<In>* from, int64_t across) {
    using L = Lanes<In>;
    constexpr int64_t kSize = L::kSize;
    const int64_t left = to.channels - channel, count = left < kSize ? left : kSize;
    if (to.channels_last) {
        In* y = to.at(n, channel, first * to.columns);
        for (int64_t r = 0; r < rows; ++r, from += across * kSize) {
            const auto* x = from;
            if (count == kSize)
                for (int64_t i = 0; i < to.columns; ++i, x += kSize, y += to.channels)
                    L::put(y, L::own(x));
            else
                for (int64_t i = 0; i < to.columns; ++i, x += kSize, y += to.channels)
                    L::put(y, L::own(x), count);
        }
        return;
    }
    const int64_t pixels = rows * to.columns;
    In* planes[kSize];
    for (int64_t i = 0; i < count; ++i) planes[i] = to.at(n, channel + i, first * to.columns);
    Pixel at_next(0, to.columns);
    for (int64_t next = 0; next < pixels; next += kSize, at_next.skip(kSize, to.columns)) {
        const bool back = next + kSize > pixels && pixels >= kSize;
        const int64_t pixel = back ? pixels - kSize : next;
        const int64_t some = pixels - pixel < kSize ? pixels - pixel : kSize;
        const Pixel at = back ? Pixel(pixel, to.columns) : at_next;
        const auto* x_at = from + (at.row * across + at.column) * kSize;
        typename L::X x[kSize];
        if (some == kSize && at.column + kSize <= to.columns) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < kSize; ++i) x[i] = L::own(x_at + i * kSize);
        } else {
            const int64_t jump = (across - to.columns) * kSize;
            for (int64_t i = 0, left = to.columns - at.column; i < kSize; ++i, x_at += kSize) {
                if (left-- == 0) x_at += jump, left = to.columns - 1;
                x[i] = i < some ? L::own(x_at) : typename L::X{};
            }
        }
        L::transpose(x);
        if (some == kSize && count == kSize) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < kSize; ++i) L::put(planes[i] + pixel, x[i]);
        } else {
            for (int64_t i = 0; i < count; ++i) {
                if (some == kSize)
                    L::put(planes[i] + pixel, x[i]);
                else
                    L::put(planes[i] + pixel, x[i], some);
            }
        }
    }
}

// Memory for a call of a kernel, handed out in order.
class Memory {
  public:
    explicit Memory(void* memory) : next_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* const array =
            reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t(63));
        next_ = reinterpret_cast<char*>(array + count);
        return array;
    }

  private:
    char* next_;
};

// What a unit of a step is.
struct DepthwiseUnit {
    int64_t n, band;            // Forward and InputGrad
    int64_t piece;              // WeightGrad
    int64_t channel, channels;  // the first, and how many

    DepthwiseUnit(const DepthwiseJob& job, const DepthwisePlan& plan, bool sums, int64_t unit) {
        // Bands and groups of an image one after the other.
        const int64_t inner = sums ? plan.pieces : plan.bands, at = unit / inner;
        band = sums ? 0 : unit % inner;
        piece = sums ? unit % inner : 0;
        n = at / plan.groups;
        channel = at % plan.groups * plan.group * kDepthwiseBlock;
        const int64_t left = job.channels - channel, most = plan.group * kDepthwiseBlock;
        channels = left < most ? left : most;
    }
};

}  // namespace pooling_ext::POOLING_EXT_ISA::conv

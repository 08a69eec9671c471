// Where the tiles of a Winograd convolution lie, and how they are read into the transformed domain.
#pragma once

#include "kernels/cpu/conv/register_tile.h"
#include "kernels/cpu/conv/winograd.h"
#include "kernels/cpu/conv/winograd_transforms.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

template <class In>
constexpr WinogradMachine machine_of() {
    WinogradMachine m;
    m.lanes = Lanes<In>::kSize;
    m.element = int64_t(sizeof(Accumulator<In>));
    return m;
}

// A tile by its image and the first pixel of its output.
struct TilePlace {
    int64_t image, y, x;
};

// Tiles one after the other.
class TileWalk {
  public:
    TileWalk(const WinogradShape& s, int64_t tile) : columns_(s.columns()), rows_(s.rows()) {
        column_ = tile % columns_;
        row_ = tile / columns_ % rows_;
        image_ = tile / columns_ / rows_;
    }
    TilePlace place() const { return {image_, row_ * kWinogradOut, column_ * kWinogradOut}; }
    void next() {
        if (++column_ < columns_) return;
        column_ = 0;
        if (++row_ < rows_) return;
        row_ = 0, ++image_;
    }

  private:
    int64_t columns_, rows_, column_, row_, image_;
};

// Transforms vectors of a tile of 6x6 pixels: at(a, c)(b) is where element c of pixel (a, b) is.
template <class In, class At>
POOLING_EXT_INLINE void transform_input(int64_t channels, int64_t points,
                                        Accumulator<In>* __restrict to, const At& at) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    const auto one = [&](int64_t c, const auto& get) POOLING_EXT_INLINE_LAMBDA {
        X half[6][6];
#pragma GCC unroll 6
        for (int a = 0; a < 6; ++a) {
            const auto row = at(a, c);
            input_points(get(row(0)), get(row(1)), get(row(2)), get(row(3)), get(row(4)),
                         get(row(5)), half[a], 1, T(0));
        }
#pragma GCC unroll 6
        for (int b = 0; b < 6; ++b) {
            X column[6];
            input_points(half[0][b], half[1][b], half[2][b], half[3][b], half[4][b], half[5][b],
                         column, 1, T(0));
#pragma GCC unroll 6
            for (int a = 0; a < 6; ++a) L::keep(to + (a * 6 + b) * points + c, column[a]);
        }
    };
    int64_t c = 0;
    for (; c + L::kSize <= channels; c += L::kSize)
        one(c, [](const In* from) POOLING_EXT_INLINE_LAMBDA { return L::get(from); });
    if (c < channels)
        one(c,
            [&](const In* from) POOLING_EXT_INLINE_LAMBDA { return L::get(from, channels - c); });
}

// A pointer of which the compiler knows nothing, so that it does not keep others at fixed distances
// beside it, in memory for want of registers.
template <class In>
POOLING_EXT_INLINE const In* made_anew(const In* pointer) {
    asm("" : "+r"(pointer));
    return pointer;
}

// The pixels of a row, of which addresses are made out of a pointer and few multiples: compilers
// run out of registers with a pointer for each.
template <class In>
struct PixelRow {
    const In* from;
    int64_t one, three, five;

    POOLING_EXT_INLINE const In* operator()(int b) const {
        switch (b) {
            case 0:
                return from;
            case 1:
                return from + one;
            case 2:
                return from + 2 * one;
            case 3:
                return from + three;
            case 4:
                return from + 4 * one;
            default:
                return from + five;
        }
    }
};

// Tiles [first, last) of channels [from, to) of all, into `v` with its strides. `zeros` is a row of
// elements for pixels outside the input.
template <class In>
void transform_inputs(const WinogradShape& s, const In* x, int64_t first, int64_t last,
                      int64_t from, int64_t channels, Accumulator<In>* v, int64_t row,
                      int64_t point, const In* zeros) {
    const int64_t pixel = s.groups * s.channels, line = s.width * pixel;
    TileWalk walk(s, first);
    for (int64_t t = first; t < last; ++t, walk.next(), v += row) {
        const TilePlace place = walk.place();
        const int64_t y = place.y - s.pad_top, x0 = place.x - s.pad_left;
        const In* const corner = x + ((place.image * s.height + y) * s.width + x0) * pixel + from;
        if (y >= 0 && x0 >= 0 && y + kWinogradIn <= s.height && x0 + kWinogradIn <= s.width) {
            const auto inside = [=](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
                return PixelRow<In>{made_anew(corner + c) + a * line, pixel, 3 * pixel, 5 * pixel};
            };
            transform_input<In>(channels, point, v, inside);
            continue;
        }
        const In* at[kWinogradIn][kWinogradIn];
        for (int64_t a = 0; a < kWinogradIn; ++a)
            for (int64_t b = 0; b < kWinogradIn; ++b) {
                const bool inside =
                    y + a >= 0 && y + a < s.height && x0 + b >= 0 && x0 + b < s.width;
                at[a][b] = inside ? corner + a * line + b * pixel : zeros;
            }
        const auto anywhere = [&](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
            return [&at, a, c](int b) POOLING_EXT_INLINE_LAMBDA { return at[a][b] + c; };
        };
        transform_input<In>(channels, point, v, anywhere);
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv

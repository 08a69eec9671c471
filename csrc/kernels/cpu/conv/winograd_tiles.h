// Where the tiles of a Winograd convolution lie, and how they are read into the transformed domain.
#pragma once

#include "kernels/cpu/conv/register_tile.h"
#include "kernels/cpu/conv/winograd.h"
#include "kernels/cpu/conv/winograd_transforms.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class In>
constexpr WinogradMachine machine_of() {
    WinogradMachine m;
    m.lanes = Lanes<In>::kCount;
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

// Transforms vectors of a tile of 6x6 pixels, of which at(a, b, c) is element c.
template <class In, class At>
POOLING_EXT_INLINE void transform_input(int64_t channels, int64_t points,
                                        Accumulator<In>* __restrict to, const At& at) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    const auto one = [&](int64_t c, const auto& get) POOLING_EXT_INLINE_LAMBDA {
        X half[6][6];
#pragma GCC unroll 6
        for (int b = 0; b < 6; ++b)
            input_points(get(0, b, c), get(1, b, c), get(2, b, c), get(3, b, c), get(4, b, c),
                         get(5, b, c), &half[0][b], 6, T(0));
#pragma GCC unroll 6
        for (int a = 0; a < 6; ++a) {
            X row[6];
            input_points(half[a][0], half[a][1], half[a][2], half[a][3], half[a][4], half[a][5],
                         row, 1, T(0));
#pragma GCC unroll 6
            for (int b = 0; b < 6; ++b) L::keep(to + (a * 6 + b) * points + c, row[b]);
        }
    };
    int64_t c = 0;
    for (; c + L::kCount <= channels; c += L::kCount)
        one(c, [&](int a, int b, int64_t c)
                   POOLING_EXT_INLINE_LAMBDA { return L::get(at(a, b) + c); });
    if (c < channels)
        one(c, [&](int a, int b, int64_t c)
                   POOLING_EXT_INLINE_LAMBDA { return L::get(at(a, b) + c, channels - c); });
}

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
            transform_input<In>(channels, point, v, [=](int a, int b) POOLING_EXT_INLINE_LAMBDA {
                return corner + a * line + b * pixel;
            });
            continue;
        }
        const In* at[kWinogradIn][kWinogradIn];
        for (int64_t a = 0; a < kWinogradIn; ++a)
            for (int64_t b = 0; b < kWinogradIn; ++b) {
                const bool inside =
                    y + a >= 0 && y + a < s.height && x0 + b >= 0 && x0 + b < s.width;
                at[a][b] = inside ? corner + a * line + b * pixel : zeros;
            }
        transform_input<In>(channels, point, v,
                            [&](int a, int b) POOLING_EXT_INLINE_LAMBDA { return at[a][b]; });
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA

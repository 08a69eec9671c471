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

// Tiles one after the other.
class TileWalk {
  public:
    TileWalk(const WinogradShape& s, int64_t tile)
        : shape_(s), columns_(s.columns()), rows_(s.rows()) {
        column_ = tile % columns_;
        row_ = tile / columns_ % rows_;
        image_ = tile / columns_ / rows_;
    }
    POOLING_EXT_INLINE WinogradPosition position() const {
        return shape_.position(image_, row_, column_);
    }
    POOLING_EXT_INLINE void next() {
        if (++column_ < columns_) return;
        column_ = 0;
        if (++row_ < rows_) return;
        row_ = 0, ++image_;
    }

  private:
    const WinogradShape& shape_;
    int64_t columns_, rows_, column_, row_, image_;
};

// Calls use(point, weight's point, whether that was used before) for a tile's points, those with
// the same point of the weight one after the other.
template <class Use>
POOLING_EXT_INLINE void each_point(const WinogradTile& tile, const Use& use) {
    const auto end = [](const WinogradAxis& axis, int64_t weight_point) POOLING_EXT_INLINE_LAMBDA {
        const bool last = weight_point + 1 == axis.weight_points;
        return last ? axis.points : weight_point + 1;
    };
    for (int64_t row = 0; row < tile.rows.weight_points; ++row)
        for (int64_t column = 0; column < tile.columns.weight_points; ++column)
            for (int64_t a = row; a < end(tile.rows, row); ++a)
                for (int64_t b = column; b < end(tile.columns, column); ++b)
                    use(a * tile.columns.points + b, row * tile.columns.weight_points + column,
                        a > row || b > column);
}

// Into the transformed domain, a tile of pixels in the way that `Direction` says: at(a, c)(b) is
// where element c of pixel (a, b) is.
template <class In, class Tile, class Direction, class At>
POOLING_EXT_INLINE void transform_tile(int64_t channels, int64_t points,
                                       Accumulator<In>* __restrict to, const At& at) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    using Rows = typename Tile::Rows;
    using Columns = typename Tile::Columns;
    constexpr int kRows = Direction::from(Rows::kSizes),
                  kColumns = Direction::from(Columns::kSizes);
    constexpr int kRowPoints = Rows::kSizes.points, kColumnPoints = Columns::kSizes.points;
    const auto one = [&](int64_t c, const auto& get) POOLING_EXT_INLINE_LAMBDA {
        X half[kRows][kColumnPoints];
#pragma GCC unroll 10
        for (int a = 0; a < kRows; ++a) {
            const auto row = at(a, c);
            X pixels[kColumns];
#pragma GCC unroll 10
            for (int b = 0; b < kColumns; ++b) pixels[b] = get(row(b));
            Direction::template along<Columns>(pixels, half[a], T(0));
        }
#pragma GCC unroll 10
        for (int b = 0; b < kColumnPoints; ++b) {
            X pixels[kRows], column[kRowPoints];
#pragma GCC unroll 10
            for (int a = 0; a < kRows; ++a) pixels[a] = half[a][b];
            Direction::template along<Rows>(pixels, column, T(0));
#pragma GCC unroll 10
            for (int a = 0; a < kRowPoints; ++a)
                L::keep(to + (a * kColumnPoints + b) * points + c, column[a]);
        }
    };
    int64_t c = 0;
    for (; c + L::kSize <= channels; c += L::kSize)
        one(c, [](const In* from) POOLING_EXT_INLINE_LAMBDA { return L::get(from); });
    if (c < channels)
        one(c,
            [&](const In* from) POOLING_EXT_INLINE_LAMBDA { return L::get(from, channels - c); });
}

// A tile of the input.
struct OfInput {
    static constexpr int64_t from(const WinogradAxis& axis) { return axis.in; }
    template <class Axis, class From, class To, class T>
    static POOLING_EXT_INLINE void along(const From& from, To& to, T zero) {
        Axis::input(from, to, zero);
    }
};

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
    int64_t one, three, five, seven;

    POOLING_EXT_INLINE PixelRow(const In* from, int64_t pixel)
        : from(from), one(pixel), three(3 * pixel), five(5 * pixel), seven(7 * pixel) {}

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
            case 5:
                return from + five;
            case 6:
                return from + 2 * three;
            case 7:
                return from + seven;
            case 8:
                return from + 8 * one;
            default:
                return from + one + 8 * one;
        }
    }
};

// Calls use(plane, channel, count, first) for the channels of each plane among channels
// [begin, end) of all planes.
template <class Use>
POOLING_EXT_INLINE void each_plane(const WinogradShape& s, int64_t begin, int64_t end,
                                   const Use& use) {
    for (int64_t at = begin; at < end;) {
        const int64_t plane = at / s.channels, channel = at % s.channels;
        const int64_t count = smaller(s.channels - channel, end - at);
        use(plane, channel, count, at - begin);
        at += count;
    }
}

// Activations of a group: the first channel of the first pixel, which may lie outside of what is
// there.
template <class In>
struct Pixels {
    In* first;
    WinogradStrides strides;

    POOLING_EXT_INLINE In* at(int64_t image, int64_t y, int64_t x) const {
        return first + strides.offset(image, y, x);
    }
};

// Calls use(channel, channels, pixel, pixels) for blocks of a matrix that a register's lanes
// transpose.
template <class In, class Use>
POOLING_EXT_INLINE void each_block(int64_t channels, int64_t pixels, const Use& use) {
    constexpr int64_t kSize = Lanes<In>::kSize;
    for (int64_t c = 0; c < channels; c += kSize)
        for (int64_t p = 0; p < pixels; p += kSize)
            use(c, smaller(kSize, channels - c), p, smaller(kSize, pixels - p));
}

// A register for each of `rows` runs that lie `stride` apart, of `lanes` elements each, transposed
// to runs of the other matrix.
template <class In>
POOLING_EXT_INLINE void transpose_block(const In* from, int64_t stride, int64_t rows, int64_t lanes,
                                        In* to, int64_t to_stride) {
    using L = Lanes<In>;
    typename L::X block[L::kSize];
    if (rows == L::kSize && lanes == L::kSize) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < L::kSize; ++i) block[i] = L::get(from + i * stride);
        L::transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L::kSize; ++i) L::put(to + i * to_stride, block[i]);
        return;
    }
    for (int64_t i = 0; i < L::kSize; ++i)
        block[i] = i >= rows           ? typename L::X{}
                   : lanes == L::kSize ? L::get(from + i * stride)
                                       : L::get(from + i * stride, lanes);
    L::transpose(block);
    for (int64_t i = 0; i < lanes; ++i) {
        if (rows == L::kSize)
            L::put(to + i * to_stride, block[i]);
        else
            L::put(to + i * to_stride, block[i], rows);
    }
}

// Channels [begin, end) of a band of planes of `all` channels, to memory for it in channels-last.
template <class In>
Pixels<const In> read_band(const In* planes, int64_t height, int64_t width, int64_t all,
                           const WinogradBand& band, int64_t begin, int64_t end, In* to) {
    const int64_t channels = end - begin, line = band.columns * channels, plane = height * width;
    for (int64_t row = band.first; row < band.first + band.rows;) {
        const int64_t image = row / height, y = row % height;
        // Whole rows of an image lie together.
        const bool whole = band.columns == width;
        const int64_t rows = whole ? smaller(height - y, band.first + band.rows - row) : 1;
        const In* const from = planes + (image * all + begin) * plane + y * width + band.x;
        In* const first = to + (row - band.first) * line;
        each_block<In>(channels, rows * band.columns,
                       [&](int64_t c, int64_t some, int64_t p, int64_t pixels) {
                           transpose_block(from + c * plane + p, plane, some, pixels,
                                           first + p * channels + c, channels);
                       });
        row += rows;
    }
    const WinogradStrides strides{height * line, line, channels};
    return {to - begin - band.first * line - band.x * channels, strides};
}

// Tiles [first, last) of a group's channels [begin, end), counted over the planes, into `v` with
// its strides. `zeros` is a row of elements for pixels outside the input.
template <class In, class Tile>
void transform_inputs(const WinogradShape& s, const Pixels<const In>& x, int64_t first,
                      int64_t last, int64_t begin, int64_t end, Accumulator<In>* v, int64_t row,
                      int64_t point, const In* zeros) {
    using T = Accumulator<In>;
    constexpr int64_t kRows = Tile::kSizes.rows.in, kColumns = Tile::kSizes.columns.in;
    const int64_t pixel = s.dilation_x * x.strides.column, line = s.dilation_y * x.strides.row;
    TileWalk walk(s, first);
    for (int64_t t = first; t < last; ++t, walk.next(), v += row) {
        const WinogradPosition position = walk.position();
        const int64_t y = position.in_y - s.pad_top, x0 = position.in_x - s.pad_left;
        const bool whole = y >= 0 && x0 >= 0 && y + (kRows - 1) * s.dilation_y < s.height &&
                           x0 + (kColumns - 1) * s.dilation_x < s.width;
        const int64_t image = position.image / s.out_depth;
        const int64_t front = position.image % s.out_depth * s.plane_stride - s.pad_front;
        each_plane(s, begin, end, [&](int64_t plane, int64_t channel, int64_t count, int64_t at_v) {
            const int64_t z = front + plane * s.plane_dilation;
            T* const to = v + at_v;
            if (z < 0 || z >= s.depth) {
                for (int64_t p = 0; p < Tile::kSizes.points(); ++p)
                    std::memset(to + p * point, 0, size_t(count) * sizeof(T));
                return;
            }
            const In* const corner = x.at(image * s.depth + z, y, x0) + channel;
            if (whole) {
                const auto inside = [=](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
                    return PixelRow<In>(made_anew(corner + c) + a * line, pixel);
                };
                transform_tile<In, Tile, OfInput>(count, point, to, inside);
                return;
            }
            const In* at[kRows][kColumns];
            for (int64_t a = 0; a < kRows; ++a)
                for (int64_t b = 0; b < kColumns; ++b) {
                    const int64_t in_y = y + a * s.dilation_y, in_x = x0 + b * s.dilation_x;
                    const bool is_inside =
                        in_y >= 0 && in_y < s.height && in_x >= 0 && in_x < s.width;
                    at[a][b] = is_inside ? corner + a * line + b * pixel : zeros;
                }
            const auto anywhere = [&](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
                return [&at, a, c](int b) POOLING_EXT_INLINE_LAMBDA { return at[a][b] + c; };
            };
            transform_tile<In, Tile, OfInput>(count, point, to, anywhere);
        });
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv

// Winograd's convolutions as sizes: what a tile is, a convolution cut into tiles, and where these
// lie. After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): a tile of
// the output comes from one of the input through Y = A^T [(G g G^T) . (B^T d B)] A.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/pooling.h"

namespace pooling_ext {

// Channels of a transformed weight are padded to a multiple of this, whatever the instruction set.
constexpr int64_t kWinogradChannels = 16;
// Statistics are taken over units of so many tiles, whatever the number of threads.
constexpr int64_t kWinogradUnit = 8;

POOLING_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
POOLING_EXT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A tile along one axis: `out` pixels of the output come from `in` of the input through `points`
// products. The last of the kernel's points is used by all of the tile's points that are left.
struct WinogradAxis {
    int64_t taps, in, points, out;
    int64_t step;  // from one tile's input to the next
    int64_t weight_points;
};

// F(4, 3): six products where the direct way has twelve.
constexpr WinogradAxis kWinogradDense{3, 6, 6, 4, 4, 6};
// Of stride 2: F(4, 2) on the even pixels, and four products of the odd ones with the middle tap.
constexpr WinogradAxis kWinogradStrided{3, 9, 9, 4, 8, 6};
// Its transpose, from which the gradient of its input comes: pixels of the output are in turn a
// product with the middle tap and a sum of two with the outer ones.
constexpr WinogradAxis kWinogradSpread{3, 5, 9, 8, 4, 6};
// F(4, 5) and F(4, 7): eight products where the direct way has twenty, and ten for twenty-eight.
constexpr WinogradAxis kWinogradFive{5, 8, 8, 4, 4, 8};
constexpr WinogradAxis kWinogradSeven{7, 10, 10, 4, 4, 10};
// An axis along which the kernel is one pixel.
constexpr WinogradAxis kWinogradSingle{1, 1, 1, 1, 1, 1};

struct WinogradTile {
    WinogradAxis rows, columns;

    constexpr POOLING_EXT_INLINE int64_t points() const { return rows.points * columns.points; }
    constexpr POOLING_EXT_INLINE int64_t weight_points() const {
        return rows.weight_points * columns.weight_points;
    }
    constexpr POOLING_EXT_INLINE int64_t taps() const { return rows.taps * columns.taps; }
};

// Kernels of 3x3: 36 products where the direct way has 144; strided ones 81. Of 5x5: 64 for 400. Of
// 1x3: 6 for 12, of 1x7: 10 for 28.
enum class WinogradKind { Dense, Strided, Spread, Square5, Row3, Row7 };
constexpr WinogradTile kWinogradTiles[] = {
    {kWinogradDense, kWinogradDense},   {kWinogradStrided, kWinogradStrided},
    {kWinogradSpread, kWinogradSpread}, {kWinogradFive, kWinogradFive},
    {kWinogradSingle, kWinogradDense},  {kWinogradSingle, kWinogradSeven}};

// A tile by its image and its first pixels.
struct WinogradPosition {
    int64_t image, y, x;  // of the output
    int64_t in_y, in_x;   // of the input with its padding
};

// How far images, rows and columns of pixels lie from each other.
struct WinogradStrides {
    int64_t image, row, column;

    POOLING_EXT_INLINE int64_t offset(int64_t n, int64_t y, int64_t x) const {
        return n * image + y * row + x * column;
    }
};

// Columns [x, x + columns) of `rows` rows, counted over the images.
struct WinogradBand {
    int64_t first, rows, x, columns;
};

// A convolution's sizes. Channels are those of one group.
struct WinogradShape {
    WinogradKind kind = WinogradKind::Dense;
    // Rows are columns in memory, for a kernel of 3x1 as one of 1x3: all sizes are as if the planes
    // were turned.
    bool turned = false;
    // Activations lie plane after plane, and not channels-last. Then there is one group, no
    // dilation, a kernel of one plane, and nothing is turned.
    bool planar = false;
    int64_t batch = 1, groups = 1, channels = 1, features = 1;
    int64_t height = 1, width = 1, out_height = 1, out_width = 1;
    int64_t pad_top = 0, pad_left = 0;       // below 0 the input is cropped
    int64_t dilation_y = 1, dilation_x = 1;  // 1 where the stride is 2
    // A kernel of several planes is a sum over them, as over channels.
    int64_t planes = 1, depth = 1, out_depth = 1;
    int64_t pad_front = 0, plane_stride = 1, plane_dilation = 1;

    // Of activations in channels-last.
    POOLING_EXT_INLINE WinogradStrides in_strides() const {
        return strides(height, width, groups * channels);
    }
    POOLING_EXT_INLINE WinogradStrides out_strides() const {
        return strides(out_height, out_width, groups * features);
    }
    POOLING_EXT_INLINE const WinogradTile& tile() const { return kWinogradTiles[int(kind)]; }
    // What is summed over in the transformed domain: channels, plane after plane.
    POOLING_EXT_INLINE int64_t inner() const { return planes * channels; }
    POOLING_EXT_INLINE int64_t images() const { return batch * out_depth; }
    // Tiles of a dilated convolution are those of its phases, one after the other.
    POOLING_EXT_INLINE int64_t rows() const {
        return dilation_y * phase(out_height, dilation_y, tile().rows.out);
    }
    POOLING_EXT_INLINE int64_t columns() const {
        return dilation_x * phase(out_width, dilation_x, tile().columns.out);
    }
    POOLING_EXT_INLINE int64_t tiles() const { return images() * rows() * columns(); }
    POOLING_EXT_INLINE int64_t units() const {
        return (tiles() + kWinogradUnit - 1) / kWinogradUnit;
    }
    POOLING_EXT_INLINE int64_t in_pixels() const { return batch * depth * height * width; }
    POOLING_EXT_INLINE int64_t pixels() const { return images() * out_height * out_width; }
    // Elements of a group's transformed weight.
    POOLING_EXT_INLINE int64_t weight_size() const {
        return tile().weight_points() * inner() * ceil_div(features, kWinogradChannels) *
               kWinogradChannels;
    }

    POOLING_EXT_INLINE WinogradPosition position(int64_t image, int64_t row, int64_t column) const {
        const WinogradTile& t = tile();
        WinogradPosition found{image, 0, 0, 0, 0};
        along(row, t.rows, out_height, dilation_y, found.y, found.in_y);
        along(column, t.columns, out_width, dilation_x, found.x, found.in_x);
        return found;
    }
    POOLING_EXT_INLINE WinogradPosition tile_at(int64_t tile) const {
        return position(tile / columns() / rows(), tile / columns() % rows(), tile % columns());
    }
    // Pixels of a tile that lie in the output.
    POOLING_EXT_INLINE int64_t rows_of(const WinogradPosition& at) const {
        return within(out_height - at.y, dilation_y, tile().rows.out);
    }
    POOLING_EXT_INLINE int64_t columns_of(const WinogradPosition& at) const {
        return within(out_width - at.x, dilation_x, tile().columns.out);
    }

  private:
    POOLING_EXT_INLINE WinogradStrides strides(int64_t rows, int64_t columns, int64_t all) const {
        const int64_t image = rows * columns * all;
        return turned ? WinogradStrides{image, all, rows * all}
                      : WinogradStrides{image, columns * all, all};
    }
    static POOLING_EXT_INLINE int64_t phase(int64_t size, int64_t dilation, int64_t out) {
        return ceil_div(ceil_div(size, dilation), out);
    }
    static POOLING_EXT_INLINE void along(int64_t index, const WinogradAxis& axis, int64_t size,
                                         int64_t dilation, int64_t& out, int64_t& in) {
        if (dilation == 1) {
            out = index * axis.out, in = index * axis.step;
            return;
        }
        const int64_t tiles = phase(size, dilation, axis.out), first = index / tiles;
        out = first + index % tiles * axis.out * dilation;
        in = first + index % tiles * axis.step * dilation;
    }
    static POOLING_EXT_INLINE int64_t within(int64_t left, int64_t dilation, int64_t out) {
        if (dilation == 1) return smaller(left, out);
        return left > 0 ? smaller(ceil_div(left, dilation), out) : 0;
    }
};

}  // namespace pooling_ext

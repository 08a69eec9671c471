// Planar activations in Winograd's convolutions: a block of tiles reads and writes bands of pixels,
// which are turned to channels-last in scratch memory that the second-level cache holds.
#pragma once

#include "kernels/cpu/conv/winograd_shape.h"

namespace pooling_ext {

POOLING_EXT_INLINE int64_t within(int64_t x, int64_t least, int64_t most) {
    return smaller(larger(x, least), most);
}

// Where a block ends that begins with `tile`: with the row of tiles if that is longer than a block.
POOLING_EXT_INLINE int64_t winograd_block_end(const WinogradShape& s, int64_t tile, int64_t tiles,
                                              int64_t last) {
    const int64_t columns = s.columns(), end = smaller(tile + tiles, last);
    return s.planar && columns > tiles ? smaller(end, (tile / columns + 1) * columns) : end;
}

// What tiles [first, last) read.
POOLING_EXT_INLINE WinogradBand winograd_input_band(const WinogradShape& s, int64_t first,
                                                    int64_t last) {
    const WinogradPosition a = s.tile_at(first), b = s.tile_at(last - 1);
    const int64_t begin = a.image * s.height + within(a.in_y - s.pad_top, 0, s.height);
    const int64_t end =
        b.image * s.height + within(b.in_y - s.pad_top + s.tile().rows.in, 0, s.height);
    WinogradBand band{begin, larger(end - begin, 0), 0, s.width};
    if (a.image == b.image && a.y == b.y) {
        band.x = within(a.in_x - s.pad_left, 0, s.width);
        band.columns = within(b.in_x - s.pad_left + s.tile().columns.in, 0, s.width) - band.x;
    }
    return band;
}

// What they write, and with it what others of the same rows do.
POOLING_EXT_INLINE WinogradBand winograd_output_band(const WinogradShape& s, int64_t first,
                                                     int64_t last) {
    const WinogradPosition a = s.tile_at(first), b = s.tile_at(last - 1);
    const int64_t begin = a.image * s.out_height + a.y;
    const int64_t end = b.image * s.out_height + b.y + s.rows_of(b);
    if (a.image == b.image && a.y == b.y)
        return {begin, end - begin, a.x, b.x + s.columns_of(b) - a.x};
    return {begin, end - begin, 0, s.out_width};
}

// At most so many pixels do blocks of so many tiles read and write.
struct WinogradBandSizes {
    int64_t input = 0, output = 0;

    POOLING_EXT_INLINE WinogradBandSizes(const WinogradShape& s, int64_t tiles) {
        if (!s.planar) return;
        const WinogradTile& t = s.tile();
        const int64_t in_row = s.columns();
        const bool parts = in_row > tiles;  // of a row of tiles
        const int64_t tile_rows = parts ? 1 : ceil_div(tiles - 1, in_row) + 1;
        const int64_t images = smaller(ceil_div(tile_rows - 1, s.rows()) + 1, s.images());
        // Rows that the tiles of an image read beyond their steps, or leave out at its end.
        const int64_t beyond = larger(t.rows.in - t.rows.step, 0) + larger(-s.pad_top, 0);
        const int64_t left = larger(s.height + s.pad_top - s.rows() * t.rows.step, 0);
        const int64_t in_rows =
            smaller(tile_rows * t.rows.step + images * (beyond + left), s.images() * s.height);
        const int64_t out_rows = smaller(tile_rows * t.rows.out, s.images() * s.out_height);
        const int64_t wide = tiles * t.columns.step + t.columns.in;
        input = in_rows * (parts ? smaller(wide, s.width) : s.width);
        output = out_rows * (parts ? smaller(tiles * t.columns.out, s.out_width) : s.out_width);
    }
};

}  // namespace pooling_ext

// Winograd's convolution: input transform, products and output transform of a block of tiles after
// the other, with what follows a convolution in the output transform.
#pragma once

#include "kernels/cpu/conv/activation.h"
#include "kernels/cpu/conv/winograd_tables.h"
#include "kernels/cpu/conv/winograd_tiles.h"
#include "kernels/cpu/simd/vector.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// The memory of an activation that tiles [first, last) of all lie in, roughly: in channels-last
// tiles follow each other as pixels do, but for those in a row of tiles.
struct Stretch {
    const char* from = nullptr;
    int64_t bytes = 0;

    POOLING_EXT_INLINE Stretch(const void* data, int64_t size, int64_t first, int64_t last,
                               int64_t tiles) {
        if (data == nullptr) return;
        from = static_cast<const char*>(data) + size / tiles * first;
        bytes = size / tiles * (last - first);
    }
};

// The products of a block with vectors [first, last) of a group, for every point. Meanwhile the
// weight's next panel is fetched, and one stretch after the other. Points that share the weight's
// follow each other.
template <class T>
void multiply(const WinogradShape& s, const WinogradScratch& blocks, int64_t tiles, const T* v,
              const T* weight, int64_t first, int64_t last, T* products, const Stretch& written,
              const Stretch& read) {
    constexpr int64_t kLanes = Lanes<T>::kSize;
    const int64_t inner = s.inner(), half = blocks.points / 2;
    const int64_t weight_points = s.tile().weight_points();
    const int64_t panels = ceil_div(last - first, int64_t(2));
    const RowTiles row_tiles(tiles);
    const int64_t steps = row_tiles.count * inner;
    // The same for a panel of one vector, and for one of two.
    const int64_t fetched[] = {ceil_div(inner * kLanes * int64_t(sizeof(T)), steps),
                               ceil_div(2 * inner * kLanes * int64_t(sizeof(T)), steps)};
    const WinogradPanel begin(s, first, kLanes);
    int64_t done = 0;
    each_point(s.tile(), [&](int64_t point, int64_t weight_point, bool) {
        const Stretch& stretch = done < half ? written : read;
        const int64_t share = stretch.bytes / (half * panels), step = share / steps;
        const char* other = stretch.from + done++ % half * panels * share;
        const bool is_last = done == blocks.points;
        for (int64_t vector = first; vector < last;) {
            const WinogradPanel panel(s, vector, kLanes);
            const int64_t many = vector % 2 == 0 && vector + 1 < last ? 2 : 1;
            const int64_t size = inner * panel.width;
            const T* const b = weight + panel.offset + weight_point * size;
            T* const c = products + point * blocks.m_point + (vector - first) * kLanes;
            // The same vectors' next point if they are the last ones of this.
            const bool ends = is_last && vector + many >= last;
            const T* const next =
                ends ? b
                : vector + many < last
                    ? b + size * weight_points
                    : weight + begin.offset + (weight_point + 1) * inner * begin.width;
            // Where no memory is, the processor would search its page tables at each step.
            const bool has_other = stretch.bytes > 0;
            Ahead ahead{reinterpret_cast<const char*>(next),
                        has_other ? other : reinterpret_cast<const char*>(b),
                        ends ? 0 : fetched[many - 1], step};
            const auto* const kernels = kTiles<T>.product[many - 1];
            row_tiles.each([&](int64_t row, int64_t rows) POOLING_EXT_INLINE_LAMBDA {
                kernels[rows](inner, v + point * blocks.v_point + row * blocks.v_row, blocks.v_row,
                              b, panel.width, c + row * blocks.m_row, blocks.m_row, ahead);
                ahead.first += inner * ahead.first_step;
                ahead.second += inner * ahead.second_step;
            });
            vector += many;
            other += share;
        }
    });
}

// What a vector of channels needs in the output transform.
template <class In, class Tile>
struct Epilogue {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;

    static constexpr int64_t kRows = Tile::kSizes.rows.out, kColumns = Tile::kSizes.columns.out;
    static constexpr int64_t kPixels = kRows * kColumns;

    // Parts of a line must not go past the cache one by one.
    static constexpr bool kWholeLines = std::is_same_v<In, T> && kVectorBytes == 64;

    const WinogradJob& job;
    const Pixels<In>& y;
    int64_t channel, lanes;  // of all groups; how many
    X bias;

    Epilogue(const WinogradJob& job, const Pixels<In>& y, int64_t channel, int64_t lanes)
        : job(job), y(y), channel(channel), lanes(lanes), bias{} {
        if (job.bias == nullptr) return;
        const T* const from = static_cast<const T*>(job.bias) + channel;
        bias = lanes == L::kSize ? L::own(from) : Lanes<T>::get(from, lanes);
    }

    // Finishes a tile and writes what of it lies in the output.
    template <class Seen>
    POOLING_EXT_INLINE void finish(const WinogradPosition& position, X* tile,
                                   const Seen& seen) const {
        const WinogradShape& s = job.shape;
        const int64_t pixel = s.dilation_x * y.strides.column, line = s.dilation_y * y.strides.row;
        const int64_t start = y.strides.offset(position.image, position.y, position.x) + channel;
        const int64_t rows = s.rows_of(position), columns = s.columns_of(position);
#pragma GCC unroll 64
        for (int i = 0; i < kPixels; ++i) tile[i] += bias;
        if (job.residual != nullptr) {
            const In* const from = static_cast<const In*>(job.residual) + start;
            each_pixel(rows, columns, line, pixel, [&](int64_t i, int64_t at) {
                tile[i] += lanes == L::kSize ? L::get(from + at) : L::get(from + at, lanes);
            });
        }
        activate<T>(tile, kPixels, job.activation, T(job.slope));
        In* const to = y.first + start;
        if (kWholeLines && job.non_temporal && lanes == L::kSize)
            each_pixel(rows, columns, line, pixel, [&](int64_t i, int64_t at) {
                store_non_temporal(to + at, tile[i]);
                seen(i);
            });
        else if (lanes == L::kSize)
            each_pixel(rows, columns, line, pixel, [&](int64_t i, int64_t at) {
                L::put(to + at, tile[i]);
                seen(i);
            });
        else
            each_pixel(rows, columns, line, pixel, [&](int64_t i, int64_t at) {
                L::put(to + at, tile[i], lanes);
                seen(i);
            });
    }

  private:
    template <class Use>
    static POOLING_EXT_INLINE void each_pixel(int64_t rows, int64_t columns, int64_t line,
                                              int64_t pixel, const Use& use) {
        if (rows == kRows && columns == kColumns) {
#pragma GCC unroll 8
            for (int64_t a = 0; a < kRows; ++a)
#pragma GCC unroll 8
                for (int64_t b = 0; b < kColumns; ++b) use(a * kColumns + b, a * line + b * pixel);
            return;
        }
        for (int64_t a = 0; a < rows; ++a)
            for (int64_t b = 0; b < columns; ++b) use(a * kColumns + b, a * line + b * pixel);
    }
};

// The products of a vector, transformed back to a tile.
template <class Tile, class T>
POOLING_EXT_INLINE void transform_back(const T* from, int64_t points, typename Lanes<T>::X* tile) {
    using L = Lanes<T>;
    using X = typename L::X;
    constexpr WinogradAxis kRows = Tile::Rows::kSizes, kColumns = Tile::Columns::kSizes;
    X half[kRows.out][kColumns.points];
#pragma GCC unroll 10
    for (int b = 0; b < kColumns.points; ++b) {
        X m[kRows.points], column[kRows.out];
#pragma GCC unroll 10
        for (int a = 0; a < kRows.points; ++a)
            m[a] = L::own(from + (a * kColumns.points + b) * points);
        Tile::Rows::output(m, column, T(0));
#pragma GCC unroll 8
        for (int a = 0; a < kRows.out; ++a) half[a][b] = column[a];
    }
#pragma GCC unroll 8
    for (int a = 0; a < kRows.out; ++a) {
        X row[kColumns.out];
        Tile::Columns::output(half[a], row, T(0));
#pragma GCC unroll 8
        for (int b = 0; b < kColumns.out; ++b) tile[a * kColumns.out + b] = row[b];
    }
}

// The sums of a unit's outputs and of their squares, about the first.
template <class In>
struct UnitSums {
    using L = Lanes<In>;
    using X = typename L::X;
    X center{}, sum{}, square{};
    int64_t count = 0;

    POOLING_EXT_INLINE void add(X x) {
        const X value = L::stored(x);
        if (count++ == 0) center = value;
        const X d = value - center;
        sum += d;
        square += d * d;
    }

    void store(double* mean, double* deviation, int64_t lanes) const {
        const double n = double(larger(count, 1));  // of tiles beyond a phase there is none
        for (int64_t i = 0; i < lanes; ++i) {
            const double s = double(sum[i]);
            mean[i] = double(center[i]) + s / n;
            deviation[i] = double(square[i]) - s * s / n;
        }
    }
};

// Transforms a block's products back, for vectors of one group. Blocks of planar activations may
// end within a unit: `kept` has its sums, by vector, from one block to the next.
template <class In, class Tile>
void finish_block(const WinogradJob& job, const WinogradScratch& blocks, const Pixels<In>& y,
                  int64_t group, int64_t first_tile, int64_t last_tile, int64_t first, int64_t last,
                  const Accumulator<In>* products, void* kept) {
    using L = Lanes<In>;
    using X = typename L::X;
    using Finish = Epilogue<In, Tile>;
    const WinogradShape& s = job.shape;
    const int64_t channels = s.groups * s.features;
    for (int64_t start = first_tile; start < last_tile;) {
        const int64_t unit = start / kWinogradUnit;
        const int64_t end = smaller(last_tile, (unit + 1) * kWinogradUnit);
        for (int64_t vector = first; vector < last; ++vector) {
            const int64_t within = vector * L::kSize;
            const int64_t channel = group * s.features + within;
            const Finish epilogue(job, y, channel, smaller(L::kSize, s.features - within));
            const auto* from =
                products + (start - first_tile) * blocks.m_row + (vector - first) * L::kSize;
            TileWalk walk(s, start);
            if (job.stats == nullptr) {
                for (int64_t t = start; t < end; ++t, walk.next(), from += blocks.m_row) {
                    X tile[Finish::kPixels];
                    transform_back<Tile>(from, blocks.m_point, tile);
                    epilogue.finish(walk.position(), tile,
                                    [](int64_t) POOLING_EXT_INLINE_LAMBDA {});
                }
                continue;
            }
            UnitSums<In> sums;
            char* const open_sums = static_cast<char*>(kept) + vector * int64_t(sizeof(sums));
            if (start % kWinogradUnit != 0) std::memcpy(&sums, open_sums, sizeof(sums));
            for (int64_t t = start; t < end; ++t, walk.next(), from += blocks.m_row) {
                X tile[Finish::kPixels];
                transform_back<Tile>(from, blocks.m_point, tile);
                epilogue.finish(walk.position(), tile,
                                [&](int64_t i) POOLING_EXT_INLINE_LAMBDA { sums.add(tile[i]); });
            }
            if (end % kWinogradUnit != 0 && end < s.tiles()) {
                std::memcpy(open_sums, &sums, sizeof(sums));
                continue;
            }
            double* const mean = job.stats + unit * 2 * channels + channel;
            sums.store(mean, mean + channels, epilogue.lanes);
        }
        start = end;
    }
}

// The tiles of a block, from a band in channels-last to planes: of rows of tiles that are whole all
// pixels at once.
template <class In>
void write_band(const WinogradShape& s, const Pixels<In>& band, int64_t first_tile,
                int64_t last_tile, int64_t first_channel, int64_t last_channel, In* planes) {
    const int64_t columns = s.columns(), plane = s.out_height * s.out_width;
    for (int64_t tile = first_tile; tile < last_tile;) {
        const WinogradPosition at = s.tile_at(tile);
        const int64_t row_end = (tile / columns + 1) * columns;
        int64_t end = smaller(row_end, last_tile), rows = s.rows_of(at);
        const bool whole = tile % columns == 0 && end == row_end;
        if (whole) {
            const int64_t image_end = (at.image + 1) * columns * s.rows();
            end = smaller(last_tile / columns * columns, image_end);
            const WinogradPosition last = s.tile_at(end - 1);
            rows = last.y + s.rows_of(last) - at.y;
        }
        const WinogradPosition last = s.tile_at(end - 1);
        const int64_t pixels = whole ? rows * s.out_width : last.x + s.columns_of(last) - at.x;
        for (int64_t row = 0; row < (whole ? 1 : rows); ++row) {
            const In* const from = band.at(at.image, at.y + row, at.x) + first_channel;
            In* const to = planes + (at.image * s.features + first_channel) * plane +
                           (at.y + row) * s.out_width + at.x;
            each_block<In>(last_channel - first_channel, pixels,
                           [&](int64_t c, int64_t channels, int64_t p, int64_t some) {
                               transpose_block(from + p * band.strides.column + c,
                                               band.strides.column, some, channels,
                                               to + c * plane + p, plane);
                           });
        }
        tile = end;
    }
}

template <class In, class Tile>
void forward(const WinogradJob& job, void* scratch) {
    using T = Accumulator<In>;
    constexpr WinogradMachine m = machine_of<In>();
    const WinogradShape& s = job.shape;
    const WinogradShare& share = job.share;
    const WinogradScratch blocks(s, m, job.block);
    T* const v = static_cast<T*>(scratch);
    T* const products = v + blocks.v_size();
    In* const zeros = reinterpret_cast<In*>(products + blocks.m_size());
    In* const x_band = zeros + blocks.v_row;
    In* const y_band = x_band + blocks.x_size;
    static_assert(sizeof(UnitSums<In>) <= size_t(4 * m.lanes * m.element));
    void* const kept = y_band + blocks.y_size;
    std::memset(zeros, 0, size_t(s.channels) * sizeof(In));
    const int64_t vectors = winograd_vectors(s.features, m), tiles = s.tiles();
    const int64_t x_size = s.in_pixels() * s.groups * s.channels * int64_t(sizeof(In));
    const int64_t y_size = s.pixels() * s.groups * s.features * int64_t(sizeof(In));
    for (int64_t group = share.first_vector / vectors; group * vectors < share.last_vector;
         ++group) {
        const int64_t begin = larger(share.first_vector - group * vectors, 0);
        const int64_t end = smaller(share.last_vector - group * vectors, vectors);
        const T* const weight = static_cast<const T*>(job.weight) + group * s.weight_size();
        for (int64_t tile = share.first_tile, last_tile; tile < share.last_tile; tile = last_tile) {
            last_tile = winograd_block_end(s, tile, job.block.tiles, share.last_tile);
            if (!job.input_is_there) {
                const In* const given = static_cast<const In*>(job.x);
                const Pixels<const In> x =
                    s.planar
                        ? read_band(given, s.height, s.width, s.channels,
                                    winograd_input_band(s, tile, last_tile), 0, s.channels, x_band)
                        : Pixels<const In>{given + group * s.channels, s.in_strides()};
                transform_inputs<In, Tile>(s, x, tile, last_tile, 0, s.inner(), v, blocks.v_row,
                                           blocks.v_point, zeros);
            }
            for (int64_t vector = begin; vector < end; vector += job.block.vectors) {
                const int64_t last = smaller(vector + job.block.vectors, end);
                // Once for a block: where it is written, and what the next one reads.
                const bool first_pass = vector == begin && s.groups == 1;
                const int64_t next = smaller(last_tile + job.block.tiles, share.last_tile);
                const bool non_temporal = Epilogue<In, Tile>::kWholeLines && job.non_temporal;
                const bool in_place = first_pass && !non_temporal && !s.planar;
                const Stretch written(in_place ? job.y : nullptr, y_size, tile, last_tile, tiles);
                const Stretch read(first_pass ? job.x : nullptr, x_size, last_tile, next, tiles);
                multiply(s, blocks, last_tile - tile, v, weight, vector, last, products, written,
                         read);
                In* const y = static_cast<In*>(job.y);
                if (!s.planar) {
                    finish_block<In, Tile>(job, blocks, {y, s.out_strides()}, group, tile,
                                           last_tile, vector, last, products, kept);
                    continue;
                }
                const WinogradBand to = winograd_output_band(s, tile, last_tile);
                const int64_t line = to.columns * blocks.y_pixel, channel = vector * m.lanes;
                const Pixels<In> band{y_band - to.first * line - to.x * blocks.y_pixel - channel,
                                      {s.out_height * line, line, blocks.y_pixel}};
                finish_block<In, Tile>(job, blocks, band, group, tile, last_tile, vector, last,
                                       products, kept);
                write_band(s, band, tile, last_tile, channel, smaller(last * m.lanes, s.features),
                           y);
            }
        }
    }
    if (job.non_temporal) fence_non_temporal();
}

// That of a dtype, or nullptr.
template <class Tile>
auto forward_of(DType dtype) {
    return for_float(dtype, [](auto zero) -> decltype(WinogradKernels::forward) {
        return forward<decltype(zero), Tile>;
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv

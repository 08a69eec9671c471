// How a Winograd convolution is divided among threads and into blocks: pure functions of sizes, of
// the number of workers and of the caches. No result depends on what they choose, but for the
// number of splits of a weight's gradient, which follows from the sizes alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/conv/winograd.h"

namespace pooling_ext {

// Relative costs in cycles, measured on processors with two FMA units for tiles of 36 points; bytes
// are those that come from beyond the second-level cache.
struct WinogradCosts {
    double input = 110, output = 90, grad_input = 170, grad = 160;  // transforms of a tile's vector
    double weight = 150;  // of a kernel's vector of features
    double step = 0.5;    // one vector of products
    double byte = 0.15;
    double fetched_byte = 0.005;  // of those fetched in time, three times that from memory
    // Of transformed inputs when they are made and when a product reads them, and of products that
    // are written and read back.
    double write_byte = 0.025, row_byte = 0.012, product_byte = 0.3;
    // In a weight's gradient: of transformed inputs and gradients, and of sums.
    double spilled_byte = 0.055, sums_byte = 0.042, memory = 5;
    double near_byte = 0.001;      // from the second-level cache
    double wake = 5000;            // for other workers to begin
    double rows = 14, tile = 0.2;  // a tile of registers, and what it costs beside its products
};
constexpr WinogradCosts kWinogradCosts{};
// Tiles of 36 points that may be taken at a time; of those with fewer points as many more.
constexpr int64_t kWinogradBlocks[] = {8, 16, 24, 32, 40, 56, 80, 112, 168, 224, 336, 448};

inline int64_t winograd_block_scale(const WinogradShape& s) {
    return std::max<int64_t>(1, 36 / s.tile().points());
}

// Part `part` of `count` things in `parts`, each as large as the next or larger by one.
inline int64_t part_begin(int64_t part, int64_t parts, int64_t count) {
    return count / parts * part + std::min(part, count % parts);
}

// `tiles` in blocks of at most about `some` that are of equal size, in whole units.
inline int64_t even_block(int64_t tiles, int64_t some) {
    const int64_t count = ceil_div(tiles, some);
    return ceil_div(ceil_div(tiles, count), kWinogradUnit) * kWinogradUnit;
}

// --- forward -----------------------------------------------------------------------------------

// The forward pass as a grid of tile ranges by vector ranges.
struct WinogradGrid {
    int64_t over_tiles = 1, over_vectors = 1, unit = 1;

    int64_t tasks() const { return over_tiles * over_vectors; }

    WinogradShare share(int64_t task, const WinogradShape& s, const WinogradMachine& m) const {
        const int64_t units = ceil_div(s.tiles(), unit);
        const int64_t vectors = s.groups * winograd_vectors(s.features, m);
        const int64_t t = task / over_vectors, v = task % over_vectors;
        return {std::min(part_begin(t, over_tiles, units) * unit, s.tiles()),
                std::min(part_begin(t + 1, over_tiles, units) * unit, s.tiles()),
                part_begin(v, over_vectors, vectors), part_begin(v + 1, over_vectors, vectors)};
    }
};

// What a share costs: transforms, products, and reading its part of the weight. With `weight` it
// transforms that too.
inline double winograd_cost(const WinogradShape& s, const WinogradMachine& m, int64_t tiles,
                            int64_t vectors, bool weight) {
    const WinogradCosts& c = kWinogradCosts;
    const double groups = double(ceil_div(vectors, winograd_vectors(s.features, m)));
    const double inner = double(s.inner()), points = double(s.tile().points());
    const double input = groups * double(winograd_vectors(s.inner(), m)) * c.input;
    return double(tiles) * (input * points / 36 +
                            double(vectors) * (points * inner * c.step + c.output * points / 36)) +
           double(vectors) * double(s.tile().weight_points()) * inner *
               double(m.lanes * m.element) * c.byte +
           (weight ? double(vectors) * inner * c.weight : 0);
}

inline WinogradGrid winograd_grid(const WinogradShape& s, const WinogradMachine& m, bool stats,
                                  int64_t workers, bool weight = false) {
    WinogradGrid best;
    best.unit = stats ? kWinogradUnit : 1;
    const int64_t units = ceil_div(s.tiles(), best.unit);
    const int64_t vectors = s.groups * winograd_vectors(s.features, m);
    double least = winograd_cost(s, m, s.tiles(), vectors, weight);
    for (int64_t v = 1; v <= std::min(vectors, workers); ++v) {
        const int64_t t = std::min(units, workers / v);
        if (t * v == 1) continue;
        const double cost =
            kWinogradCosts.wake +
            winograd_cost(s, m, ceil_div(units, t) * best.unit, ceil_div(vectors, v), weight);
        if (cost < least) {
            least = cost;
            best.over_tiles = t, best.over_vectors = v;
        }
    }
    return best;
}

// Blocks of a share. Either the transformed input and what is multiplied from it stay in the near
// cache, or blocks are large, so that the weight is read seldom.
inline WinogradBlock winograd_block(const WinogradShape& s, const WinogradMachine& m,
                                    const WinogradShare& share) {
    const int64_t tiles = share.last_tile - share.first_tile;
    const int64_t all = share.last_vector - share.first_vector;
    const int64_t vectors = std::min(all, winograd_vectors(s.features, m));
    const double panel = double(m.lanes * s.inner() * m.element);
    const double weight = double(all * s.tile().weight_points()) * panel, near = double(m.near);
    const double products = double(tiles * all * s.inner() * s.tile().points());
    const WinogradCosts& c = kWinogradCosts;

    WinogradBlock best{std::min<int64_t>(kWinogradUnit, tiles), std::min<int64_t>(2, vectors)};
    double least = -1;
    for (const int64_t of_36 : kWinogradBlocks) {
        const int64_t some = of_36 * winograd_block_scale(s);
        for (int64_t wide = 2;; wide *= 2) {
            const WinogradBlock block{even_block(tiles, some), std::min(wide, vectors)};
            const WinogradScratch parts(s, m, block);
            const double v = double(parts.v_size() * m.element);
            const double p = double(parts.m_size() * m.element);
            const double blocks = double(ceil_div(tiles, block.tiles));
            const double passes = double(ceil_div(vectors, block.vectors));
            // What does not fit is written to the far cache and read back: transformed inputs row
            // by row, which the processor foresees, products at 36 points at a time.
            const double bands = double((parts.x_size + parts.y_size) * m.element);
            const double over = std::clamp((v + p + bands + 2 * panel) / near - 1, 0.0, 1.0);
            const double beside = std::clamp(p / near - 0.2, 0.0, 1.0);
            const double spilled = blocks * (v * (c.write_byte + passes * c.row_byte) +
                                             p * passes * beside * c.product_byte);
            const double read = v + p + bands + weight <= near ? weight : weight * blocks;
            const double rows = double(block.tiles) / std::ceil(double(block.tiles) / c.rows);
            const double work = products * c.step * (1 + c.tile / rows);
            const double fetched = read * c.fetched_byte * (weight > 2 * double(m.far) ? 3 : 1);
            const double cost = std::max(work, read * c.byte) + fetched +
                                weight * blocks * c.near_byte + over * spilled;
            if ((over == 0 || v + p + bands <= double(m.far)) && (least < 0 || cost < least)) {
                least = cost;
                best = block;
            }
            if (wide >= vectors) break;
        }
        if (some >= tiles) break;
    }
    return best;
}

// Where parts of a share's vectors begin, and the last ends, whose transformed weights stay in the
// last cache. Parts end with a panel, but for the last. They are smaller where the transformed
// input can stay, else it is made anew for each.
inline std::vector<int64_t> winograd_weight_parts(const WinogradShape& s, const WinogradMachine& m,
                                                  const WinogradShare& share) {
    const int64_t tiles = share.last_tile - share.first_tile;
    const int64_t input =
        tiles * winograd_input_row(s, s.inner(), m) * s.tile().points() * m.element;
    const bool stays = s.groups == 1 && input <= m.far * 3 / 4;
    const int64_t bytes = int64_t(stays ? 6 : 24) << 20;
    const int64_t vectors = share.last_vector - share.first_vector;
    const WinogradPanels all(s, m, share.first_vector, share.last_vector);
    const int64_t parts = std::clamp<int64_t>(ceil_div((all.end - all.begin) * m.element, bytes), 1,
                                              ceil_div(vectors, 2));
    std::vector<int64_t> begins = {share.first_vector};
    for (int64_t part = 1; part < parts; ++part) {
        const int64_t at = share.first_vector + part_begin(part, parts, vectors);
        begins.push_back(at - at % winograd_vectors(s.features, m) % 2);
    }
    begins.push_back(share.last_vector);
    return begins;
}

// --- the weight's gradient ---------------------------------------------------------------------

// Regions of the gradient by splits of the tiles. Splits are summed in their order.
struct WinogradGradGrid {
    int64_t splits = 1, over_channels = 1, over_vectors = 1, block = kWinogradUnit;

    int64_t regions(const WinogradShape& s) const {
        return s.groups * over_channels * over_vectors;
    }

    WinogradRegion region(int64_t index, const WinogradShape& s, const WinogradMachine& m) const {
        const int64_t v = index % over_vectors, c = index / over_vectors % over_channels;
        const int64_t vectors = winograd_vectors(s.features, m);
        const int64_t in = winograd_inner_vectors(s, m);
        return {index / over_vectors / over_channels,
                winograd_inner_begin(part_begin(c, over_channels, in), s, m),
                winograd_inner_begin(part_begin(c + 1, over_channels, in), s, m),
                part_begin(v, over_vectors, vectors), part_begin(v + 1, over_vectors, vectors)};
    }
    int64_t first_tile(int64_t split, const WinogradShape& s) const {
        return part_begin(split, splits, s.tiles());
    }
};

// So many that cores find work where channels are few, and their sums stay small.
inline int64_t winograd_splits(const WinogradShape& s, const WinogradMachine& m) {
    constexpr int64_t kBytes = 6 << 20, kLeastTiles = 96, kMost = 8;
    const int64_t sums = s.groups * s.inner() * s.features * s.tile().weight_points() * m.element;
    int64_t splits = 1;
    while (splits < kMost && 2 * splits * sums <= kBytes && s.tiles() >= 2 * splits * kLeastTiles)
        splits *= 2;
    return splits;
}

// What summing `tiles` costs in blocks of `block`, for a region of so many vectors each way.
inline double winograd_grad_cost(const WinogradShape& s, const WinogradMachine& m, int64_t tiles,
                                 int64_t in, int64_t out, int64_t block, int64_t splits) {
    const WinogradCosts& c = kWinogradCosts;
    const WinogradRegion region{0, 0, std::min(in * m.lanes, s.inner()), 0, out};
    const WinogradGradScratch parts(s, region, m, block);
    const double v =
        double((parts.v_size() + parts.d_size() + parts.x_size + parts.y_size) * m.element);
    const double sums = double(region.size(s, m.lanes) * m.element);
    const double blocks = double(ceil_div(tiles, block));
    const double bytes = splits > 1 ? 2 * sums : 0, near = double(m.near);
    // Blocks that the near cache does not hold are written and read back, through memory where they
    // fill a worker's share of the last cache. So are sums, for each block and at the end.
    const double far = double(m.far) * 3 / 4;
    const double spilled =
        std::clamp((v / near - 1) / 2, 0.0, 1.0) * blocks * v * (v > far ? c.memory : 1);
    const double over = std::clamp(((v + sums) / near - 1) / 4, 0.0, 1.0);
    const double fetched = over * 2 * blocks * sums * (sums > far ? 2 : 1);
    const double points = double(s.tile().points());
    const double products = points * double(region.channels() * out);
    // A register tile's sums are read and written for each block.
    const double depth = double(block) / double(block + 6);
    return double(tiles) * ((double(in) * c.grad_input + double(out) * c.grad) * points / 36 +
                            products * c.step / depth) +
           bytes * c.byte + spilled * c.spilled_byte + fetched * c.sums_byte +
           double(in * m.lanes * out) * c.output / double(m.lanes) * 4;
}

inline WinogradGradGrid winograd_grad_grid(const WinogradShape& s, const WinogradMachine& m,
                                           int64_t workers) {
    WinogradGradGrid best;
    best.splits = winograd_splits(s, m);
    const int64_t in = winograd_inner_vectors(s, m), out = winograd_vectors(s.features, m);
    const int64_t tiles = ceil_div(s.tiles(), best.splits);
    double least = -1;
    for (int64_t c = 1; c <= in; ++c)
        for (int64_t v = 1; v <= out; ++v) {
            // Parts that are not equal are never better than fewer or more.
            if (ceil_div(in, ceil_div(in, c)) != c || ceil_div(out, ceil_div(out, v)) != v)
                continue;
            const int64_t tasks = best.splits * s.groups * c * v;
            const double turns = double(ceil_div(tasks, workers));
            for (const int64_t of_36 : kWinogradBlocks) {
                const int64_t some = of_36 * winograd_block_scale(s);
                const int64_t block = even_block(tiles, some);
                const double cost =
                    turns * winograd_grad_cost(s, m, tiles, ceil_div(in, c), ceil_div(out, v),
                                               block, best.splits);
                if (least < 0 || cost < least) {
                    least = cost;
                    best.over_channels = c, best.over_vectors = v, best.block = block;
                }
                if (some >= tiles) break;
            }
        }
    return best;
}

}  // namespace pooling_ext

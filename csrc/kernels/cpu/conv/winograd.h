// Winograd's convolution F(4x4, 3x3): what its launchers and kernels agree on. After Lavin and
// Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): an output tile of 4x4 comes
// from a tile of 6x6 through Y = A^T [(G g G^T) . (B^T d B)] A, with 36 multiplications instead of
// 144.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "kernels/cpu/conv/activation_kind.h"

namespace pooling_ext {

constexpr int64_t kWinogradOut = 4;      // pixels of a tile of the output, along an axis
constexpr int64_t kWinogradIn = 6;       // of the input
constexpr int64_t kWinogradPoints = 36;  // of the transformed domain
// Channels of a transformed weight are padded to a multiple of this, whatever the instruction set.
constexpr int64_t kWinogradChannels = 16;
// Statistics are taken over units of so many tiles, whatever the number of threads.
constexpr int64_t kWinogradUnit = 8;

// A convolution's sizes; activations lie channels-last. Channels are those of one group.
struct WinogradShape {
    int64_t batch = 1, groups = 1, channels = 1, features = 1;
    int64_t height = 1, width = 1, out_height = 1, out_width = 1;
    int64_t pad_top = 0, pad_left = 0;  // below 0 the input is cropped

    POOLING_EXT_INLINE int64_t rows() const {
        return (out_height + kWinogradOut - 1) / kWinogradOut;
    }
    POOLING_EXT_INLINE int64_t columns() const {
        return (out_width + kWinogradOut - 1) / kWinogradOut;
    }
    POOLING_EXT_INLINE int64_t tiles() const { return batch * rows() * columns(); }
    POOLING_EXT_INLINE int64_t units() const {
        return (tiles() + kWinogradUnit - 1) / kWinogradUnit;
    }
    POOLING_EXT_INLINE int64_t pixels() const { return batch * out_height * out_width; }
};

// A part of the tiles and of the output's channels, in vectors: [first, last).
struct WinogradShare {
    int64_t first_tile = 0, last_tile = 0, first_vector = 0, last_vector = 0;
};

// What is worked on at a time: tiles, and vectors of output channels.
struct WinogradBlock {
    int64_t tiles = 0, vectors = 0;
};

struct WinogradJob {
    WinogradShape shape;
    const void* x = nullptr;
    const void* weight = nullptr;    // transformed
    const void* bias = nullptr;      // of the type computed in; may be none
    const void* residual = nullptr;  // as the output; may be none
    void* y = nullptr;
    Activation activation = Activation::None;
    double slope = 0;  // of LeakyRelu
    // May be none. For each unit means and sums of squared deviations, two rows of all channels.
    double* stats = nullptr;
    WinogradShare share;
    WinogradBlock block;
    // The scratch memory has the share's input, transformed for other vectors: it is one block of
    // tiles and of one group.
    bool input_is_there = false;
    // The output goes past the cache, where a vector is a whole line of it: every pixel's channels
    // of a group begin with a line.
    bool streams = false;
};

// Transforms kernels: for vectors [begin, end) of the output's channels, counted over the groups.
struct WinogradWeightJob {
    // Of the convolution with the transformed weight. Transposed: of the one that makes the
    // gradient of an input, whose channels are the given weight's outputs.
    int64_t groups = 1, channels = 1, features = 1;
    bool transposed = false;
    const void* weight = nullptr;
    int64_t strides[4] = {};  // of the weight, in elements
    void* result = nullptr;
};

// The gradient of a weight: a region of it, of some channels of a group and some vectors of its
// features. Sums over a share of the tiles stand at [36][channels][vectors] of the region.
struct WinogradRegion {
    int64_t group = 0;
    int64_t first_channel = 0, last_channel = 0;
    int64_t first_vector = 0, last_vector = 0;

    POOLING_EXT_INLINE int64_t channels() const { return last_channel - first_channel; }
    POOLING_EXT_INLINE int64_t vectors() const { return last_vector - first_vector; }
    POOLING_EXT_INLINE int64_t size(int64_t lanes) const {
        return kWinogradPoints * channels() * vectors() * lanes;
    }
};

struct WinogradGradJob {
    WinogradShape shape;
    const void* x = nullptr;
    const void* grad = nullptr;
    void* result = nullptr;   // out x in x 3 x 3
    int64_t strides[4] = {};  // of the result, in elements
    int64_t block = 0;        // tiles at a time
};

// One instruction set's kernels; all memory that is computed in is aligned to 64 bytes.
struct WinogradKernels {
    int64_t lanes;  // elements of a vector of the type computed in
    void (*weight)(const WinogradWeightJob& job, int64_t begin, int64_t end);
    void (*forward)(const WinogradJob& job, void* scratch);
    // Sums over tiles [first, last).
    void (*grad)(const WinogradGradJob& job, const WinogradRegion& region, int64_t first,
                 int64_t last, void* sums, void* scratch);
    // Adds up `splits` sums, one after another in memory, and transforms them back.
    void (*grad_end)(const WinogradGradJob& job, const WinogradRegion& region, const void* sums,
                     int64_t splits);
};

// What is known of a processor and of the type that is computed in.
struct WinogradMachine {
    int64_t lanes = 16, element = 4;
    int64_t near = 1 << 20, far = 4 << 20;  // bytes of cache that one worker may fill
};

POOLING_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
POOLING_EXT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of transformed inputs are this long, so that neither they nor the points they belong to lie
// at multiples of 2048 bytes, which fall on the same places of the first-level cache.
POOLING_EXT_INLINE int64_t winograd_row(int64_t channels, const WinogradMachine& m) {
    const int64_t line = 64 / m.element, row = ceil_div(channels, line) * line;
    return row * m.element % 2048 == 0 ? row + line : row;
}
POOLING_EXT_INLINE int64_t winograd_point(int64_t rows, int64_t row, const WinogradMachine& m) {
    const int64_t line = 64 / m.element, size = ceil_div(rows * row, line) * line;
    return size / line % 2 == 0 ? size + line : size;
}

POOLING_EXT_INLINE int64_t winograd_vectors(int64_t features, const WinogradMachine& m) {
    return ceil_div(features, m.lanes);
}

// Where vector `index` of a group begins in its transformed weight, and how wide that panel is. Two
// vectors lie together, for each point and channel; a last odd one is alone.
struct WinogradPanel {
    int64_t offset, width;
    POOLING_EXT_INLINE WinogradPanel(int64_t index, int64_t vectors, int64_t channels,
                                     int64_t lanes)
        : offset(index / 2 * 2 * lanes * channels * kWinogradPoints + index % 2 * lanes),
          width((index | 1) < vectors ? 2 * lanes : lanes) {}
};

POOLING_EXT_INLINE int64_t winograd_weight_size(int64_t channels, int64_t features) {
    return kWinogradPoints * channels * ceil_div(features, kWinogradChannels) * kWinogradChannels;
}

// Where the panels of vectors [first, last), counted over the groups, begin and end.
struct WinogradPanels {
    int64_t begin, end;
    POOLING_EXT_INLINE WinogradPanels(const WinogradShape& s, const WinogradMachine& m,
                                      int64_t first, int64_t last)
        : begin(place(s, m, first)), end(place(s, m, last - 1) + size(s, m, last - 1)) {}

  private:
    static POOLING_EXT_INLINE int64_t place(const WinogradShape& s, const WinogradMachine& m,
                                            int64_t index) {
        const int64_t vectors = winograd_vectors(s.features, m), even = index % vectors / 2 * 2;
        return index / vectors * winograd_weight_size(s.channels, s.features) +
               WinogradPanel(even, vectors, s.channels, m.lanes).offset;
    }
    static POOLING_EXT_INLINE int64_t size(const WinogradShape& s, const WinogradMachine& m,
                                           int64_t index) {
        const int64_t vectors = winograd_vectors(s.features, m);
        return WinogradPanel(index % vectors, vectors, s.channels, m.lanes).width * s.channels *
               kWinogradPoints;
    }
};

// The scratch memory of the forward pass: a block's transformed input, its products, and a row of
// zeros for what lies outside the input.
struct WinogradScratch {
    int64_t v_row, v_point, m_row, m_point;

    POOLING_EXT_INLINE WinogradScratch(const WinogradShape& s, const WinogradMachine& m,
                                       const WinogradBlock& block)
        : v_row(winograd_row(s.channels, m)),
          v_point(winograd_point(block.tiles, v_row, m)),
          m_row(ceil_div(block.vectors * m.lanes * m.element, 64) * 64 / m.element),
          m_point(winograd_point(block.tiles, m_row, m)) {}

    POOLING_EXT_INLINE int64_t v_size() const { return kWinogradPoints * v_point; }
    POOLING_EXT_INLINE int64_t m_size() const { return kWinogradPoints * m_point; }
    POOLING_EXT_INLINE int64_t bytes(const WinogradMachine& m) const {
        return (v_size() + m_size() + v_row) * m.element;
    }
};

// That of a weight's gradient: a block's transformed input and gradient, and zeros for both.
struct WinogradGradScratch {
    int64_t v_row, v_point, d_row, d_point;

    POOLING_EXT_INLINE WinogradGradScratch(const WinogradRegion& region, const WinogradMachine& m,
                                           int64_t tiles)
        : v_row(winograd_row(region.channels(), m)),
          v_point(winograd_point(tiles, v_row, m)),
          d_row(winograd_row(region.vectors() * m.lanes, m)),
          d_point(winograd_point(tiles, d_row, m)) {}

    POOLING_EXT_INLINE int64_t v_size() const { return kWinogradPoints * v_point; }
    POOLING_EXT_INLINE int64_t d_size() const { return kWinogradPoints * d_point; }
    POOLING_EXT_INLINE int64_t bytes(const WinogradMachine& m) const {
        return (v_size() + d_size() + larger(v_row, d_row)) * m.element;
    }
};

}  // namespace pooling_ext

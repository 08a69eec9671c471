// Winograd's convolutions: what their launchers and kernels agree on.
#pragma once

#include "common/activation_kind.h"
#include "kernels/cpu/conv/winograd_bands.h"
#include "kernels/cpu/dispatch.h"

namespace pooling_ext {

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
    bool non_temporal = false;
};

// Transforms kernels: for vectors [begin, end) of the output's channels, counted over the groups.
struct WinogradWeightJob {
    // The convolution with the transformed weight, of which its channels and kernel count.
    // Transposed: the one that makes the gradient of an input, whose channels are the given
    // weight's outputs.
    WinogradShape shape;
    bool transposed = false;
    const void* weight = nullptr;
    int64_t strides[5] = {};  // of the weight, (out, in, plane, row, column), in elements
    void* result = nullptr;
};

// The gradient of a weight: a region of it, of some channels (of all planes) of a group and some
// vectors of its features. Sums over a share of the tiles stand at
// [weight points][channels][vectors] of the region.
struct WinogradRegion {
    int64_t group = 0;
    int64_t first_channel = 0, last_channel = 0;
    int64_t first_vector = 0, last_vector = 0;

    POOLING_EXT_INLINE int64_t channels() const { return last_channel - first_channel; }
    POOLING_EXT_INLINE int64_t vectors() const { return last_vector - first_vector; }
    POOLING_EXT_INLINE int64_t size(const WinogradShape& s, int64_t lanes) const {
        return s.tile().weight_points() * channels() * vectors() * lanes;
    }
};

struct WinogradGradJob {
    WinogradShape shape;
    const void* x = nullptr;
    const void* grad = nullptr;
    void* result = nullptr;
    int64_t strides[5] = {};  // of the result, (out, in, plane, row, column), in elements
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

POOLING_EXT_KERNELS(winograd, WinogradKernels(DType, WinogradKind))

// What is known of a processor and of the type that is computed in.
struct WinogradMachine {
    int64_t lanes = 16, element = 4;
    int64_t near = 1 << 20, far = 4 << 20;  // bytes of cache that one worker may fill
};

// Rows of transformed inputs are this long, so that neither they nor the points they belong to lie
// at multiples of 2048 bytes, which fall on the same addresses of the first-level cache.
POOLING_EXT_INLINE int64_t winograd_row(int64_t elements, const WinogradMachine& m) {
    const int64_t line = 64 / m.element, row = ceil_div(elements, line) * line;
    return row * m.element % 2048 == 0 ? row + line : row;
}
POOLING_EXT_INLINE int64_t winograd_point(int64_t rows, int64_t row, const WinogradMachine& m) {
    const int64_t line = 64 / m.element, size = ceil_div(rows * row, line) * line;
    return size / line % 2 == 0 ? size + line : size;
}

POOLING_EXT_INLINE int64_t winograd_vectors(int64_t features, const WinogradMachine& m) {
    return ceil_div(features, m.lanes);
}

// A row of the transformed input for channels of some planes, each of which ends with a whole
// vector.
POOLING_EXT_INLINE int64_t winograd_input_row(const WinogradShape& s, int64_t channels,
                                              const WinogradMachine& m) {
    return winograd_row(channels + (s.planes > 1 ? m.lanes : 0), m);
}

// Vectors of what is summed over: each plane has its own, so that an element is always in the same
// place of the same vector. Compilers may contract sums of whole vectors and of tails differently.
POOLING_EXT_INLINE int64_t winograd_inner_vectors(const WinogradShape& s,
                                                  const WinogradMachine& m) {
    return s.planes * winograd_vectors(s.channels, m);
}

// The first element of the vector `index` of them, or their end.
POOLING_EXT_INLINE int64_t winograd_inner_begin(int64_t index, const WinogradShape& s,
                                                const WinogradMachine& m) {
    const int64_t vectors = winograd_vectors(s.channels, m);
    return index / vectors * s.channels + index % vectors * m.lanes;
}

// Where vector `index` of a group begins in its transformed weight, and how wide that panel is. Two
// vectors lie together, for each point and channel; a last odd one is alone.
struct WinogradPanel {
    int64_t offset, width;
    POOLING_EXT_INLINE WinogradPanel(const WinogradShape& s, int64_t index, int64_t lanes)
        : offset(index / 2 * 2 * lanes * s.inner() * s.tile().weight_points() + index % 2 * lanes),
          width((index | 1) < ceil_div(s.features, lanes) ? 2 * lanes : lanes) {}
};

// Where the panels of vectors [first, last), counted over the groups, begin and end.
struct WinogradPanels {
    int64_t begin, end;
    POOLING_EXT_INLINE WinogradPanels(const WinogradShape& s, const WinogradMachine& m,
                                      int64_t first, int64_t last)
        : begin(start(s, m, first)), end(start(s, m, last - 1) + size(s, m, last - 1)) {}

  private:
    static POOLING_EXT_INLINE int64_t start(const WinogradShape& s, const WinogradMachine& m,
                                            int64_t index) {
        const int64_t vectors = winograd_vectors(s.features, m), even = index % vectors / 2 * 2;
        return index / vectors * s.weight_size() + WinogradPanel(s, even, m.lanes).offset;
    }
    static POOLING_EXT_INLINE int64_t size(const WinogradShape& s, const WinogradMachine& m,
                                           int64_t index) {
        const int64_t vectors = winograd_vectors(s.features, m);
        return WinogradPanel(s, index % vectors, m.lanes).width * s.inner() *
               s.tile().weight_points();
    }
};

// The scratch memory of the forward pass: a block's transformed input, its products, a row of zeros
// for what lies outside the input, the bands of planar activations, and the sums of a unit that the
// next block goes on with, of which each vector's take four vectors at most.
struct WinogradScratch {
    int64_t points, v_row, v_point, m_row, m_point, x_size, y_pixel, y_size, sums_size;

    POOLING_EXT_INLINE WinogradScratch(const WinogradShape& s, const WinogradMachine& m,
                                       const WinogradBlock& block)
        : points(s.tile().points()),
          v_row(winograd_input_row(s, s.inner(), m)),
          v_point(winograd_point(block.tiles, v_row, m)),
          m_row(ceil_div(block.vectors * m.lanes * m.element, 64) * 64 / m.element),
          m_point(winograd_point(block.tiles, m_row, m)),
          x_size(0),
          y_pixel(block.vectors * m.lanes),
          y_size(0),
          sums_size(s.planar ? winograd_vectors(s.features, m) * 4 * m.lanes : 0) {
        const WinogradBandSizes bands(s, block.tiles);
        x_size = ceil_div(bands.input * s.channels, 64) * 64;
        y_size = ceil_div(bands.output * y_pixel, 64) * 64;
    }

    POOLING_EXT_INLINE int64_t v_size() const { return points * v_point; }
    POOLING_EXT_INLINE int64_t m_size() const { return points * m_point; }
    POOLING_EXT_INLINE int64_t bytes(const WinogradMachine& m) const {
        return (v_size() + m_size() + v_row + x_size + y_size + sums_size) * m.element;
    }
};

// That of a weight's gradient: a block's transformed input and gradient, zeros for both, and the
// bands of planar ones.
struct WinogradGradScratch {
    int64_t points, v_row, v_point, d_row, d_point, x_size, y_size;

    POOLING_EXT_INLINE WinogradGradScratch(const WinogradShape& s, const WinogradRegion& region,
                                           const WinogradMachine& m, int64_t tiles)
        : points(s.tile().points()),
          v_row(winograd_input_row(s, region.channels(), m)),
          v_point(winograd_point(tiles, v_row, m)),
          d_row(winograd_row(region.vectors() * m.lanes, m)),
          d_point(winograd_point(tiles, d_row, m)),
          x_size(0),
          y_size(0) {
        const WinogradBandSizes bands(s, tiles);
        x_size = ceil_div(bands.input * region.channels(), 64) * 64;
        y_size = ceil_div(bands.output * region.vectors() * m.lanes, 64) * 64;
    }

    POOLING_EXT_INLINE int64_t v_size() const { return points * v_point; }
    POOLING_EXT_INLINE int64_t d_size() const { return points * d_point; }
    POOLING_EXT_INLINE int64_t bytes(const WinogradMachine& m) const {
        return (v_size() + d_size() + larger(v_row, d_row) + x_size + y_size) * m.element;
    }
};

}  // namespace pooling_ext

// The CUDA kernels of convolutions, as their launchers call them.
#pragma once

#include <iterator>

#include "common/pool_job.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

// What a block computes: pixels by channels of the output, and how its warps divide them. It steps
// through 64 bytes of each row of the operands, of which so many stages are in shared memory.
struct ConvTile {
    int pixels, channels;
    int warps_down, warps_across;
    int stages;
};

// Large tiles read least; small ones fill the GPU where the output is small. The last is the one
// for operands that cannot be read in vectors.
constexpr ConvTile kConvTiles[] = {
    {128, 128, 2, 4, 3},
    {128, 128, 2, 4, 2},
    {128, 64, 4, 2, 3},
    {64, 64, 2, 2, 4},
};
constexpr int kConvTileCount = int(std::size(kConvTiles));

// A number for each channel, of any floating-point type; none where `data` is null.
struct Numbers {
    const void* data = nullptr;
    DType dtype = DType::Float32;
};

// A convolution in channels_last with weights (features, kernel, channels). Rows are pixels of the
// output.
struct ConvJob {
    const void* input = nullptr;
    const void* weight = nullptr;
    void* output = nullptr;
    int64_t pixels = 0;
    int channels = 0, features = 0;
    int height = 0, width = 0, out_height = 0, out_width = 0;
    int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
    int padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1;

    // Prologue: the batch norm that the input is yet to pass, as rows of centers, scales and
    // shifts, and whether ReLU follows. What is padded is its result.
    const float* affine = nullptr;
    bool prologue_relu = false;

    // Epilogue.
    Numbers bias;
    const void* residual = nullptr;
    bool relu = false;
    // Where to leave the means and the sums of squared deviations of each row of tiles, as
    // (tiles, 2, features), in float64 for float32 and in float32 for 16 bits.
    void* partials = nullptr;

    int tile = 0;              // of kConvTiles
    bool vectors_in = false;   // whether the operands can be read 16 bytes at a time,
    bool vectors_out = false;  // and the output written
};

void conv_float32(const ConvJob& job, StreamHandle stream);
void conv_bfloat16(const ConvJob& job, StreamHandle stream);
void conv_float16(const ConvJob& job, StreamHandle stream);

// How many tiles are combined into one at a time.
constexpr int kCombined = 256;

// Means and squared deviations of tiles of `unit` elements, the last of what is left of `total`, as
// (tiles, 2, channels) of float32 or float64.
struct CombineJob {
    const void* partials = nullptr;
    bool wide = false;  // float64
    int64_t tiles = 0, unit = 0, total = 0;
    int channels = 0;
    double* output = nullptr;

    POOLING_EXT_INLINE int64_t parts() const {
        return tiles > kCombined ? ceil_div(tiles, kCombined) : 1;
    }
};

// Writes those of each kCombined tiles; where that is all, the mean and the biased variance.
void combine_means(const CombineJob& job, StreamHandle stream);

// A batch norm as (x - center) * scale + shift: float32 (3, channels).
void batch_norm_affine(const double* stats, Numbers weight, Numbers bias, double eps, int channels,
                       float* affine, StreamHandle stream);

}  // namespace pooling_ext::cuda

// Batch normalization on a GPU: what its launchers and kernels agree on.
#pragma once

#include "common/activation_kind.h"
#include "common/pool_job.h"
#include "kernels/cuda/norm/channel_tiles.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

// A value for each channel, `step` apart; none where there is no data.
struct ChannelVector {
    void* data = nullptr;
    DType dtype = DType::Float32;
    int64_t step = 1;
};

// What to normalize with: y = (x - mean) / sqrt(variance + eps) * weight + bias.
struct Norm {
    const double* stats = nullptr;  // two rows of `channels`: means and biased variances
    ChannelVector weight, bias;
    double eps = 0;
    int64_t channels = 0;
    // Of a backward pass through the statistics, which were taken from `count` elements: two rows,
    // of the gradient and of its products with x - mean.
    const double* sums = nullptr;
    double count = 1;
};

// What comes after a batch norm.
struct ActivationFunction {
    Activation kind = Activation::None;
    double slope = 0;  // of LeakyRelu, for negative numbers

    // Whether it is neither ReLU nor nothing.
    bool curved() const { return kind != Activation::None && kind != Activation::Relu; }
};

struct BatchNormJob {
    explicit BatchNormJob(const ChannelTiles& tiles) : tiles(tiles) {}

    ChannelTiles tiles;
    DType dtype = DType::Float32;
    Norm norm;
    ActivationFunction activation;
    const void* x = nullptr;
    const void* residual = nullptr;  // may be none
    const void* grad = nullptr;
    // Of a call with a residual: ReLU's output or, for another activation, the residual. With it
    // the gradient of the residual, which is that of what the activation was given, is written.
    const void* kept = nullptr;
    // Instead of ReLU's output: a bit of each element, whether it lets gradients through. Each
    // byte has those of 16 bytes of elements, from the lowest bit on; MaskOrder says which.
    uint8_t* mask = nullptr;
    void* residual_grad = nullptr;
    void* y = nullptr;        // the output, or the gradient of the input
    double* parts = nullptr;  // two rows of `channels` for each split
    // Of global pooling: so many splits have one plane.
    int64_t plane_splits = 1;
};

// Means and sums of squared deviations of each split.
void batch_norm_stats(const BatchNormJob& job, StreamHandle stream);
// Means and variances of all splits, into two rows of `channels`.
void batch_norm_merge(const BatchNormJob& job, double* stats, StreamHandle stream);
// Where there is a mask, of ReLU with a residual, it is written.
void batch_norm_act_elemt(const BatchNormJob& job, StreamHandle stream);
// Sums of the gradient and of its products with x - center of each split.
void batch_norm_sums(const BatchNormJob& job, StreamHandle stream);
// Sums of so many splits, with x - mean, and the gradients of weight and bias (or none).
void batch_norm_total(const Norm& norm, DType dtype, const double* parts, int64_t splits,
                      double* sums, ChannelVector grad_weight, ChannelVector grad_bias,
                      StreamHandle stream);
void batch_norm_backward(const BatchNormJob& job, StreamHandle stream);
// Moves the running mean and unbiased variance; `factor` makes that of the biased one.
void batch_norm_update_running(ChannelVector mean, ChannelVector variance, const double* stats,
                               int64_t channels, double factor, double momentum,
                               StreamHandle stream);

// Means of the planes of relu(x + residual), or of x where there is no residual, of `norm.count`
// pixels each; and the former's gradient's share in each element. A split is of one image in
// channels-last; in the contiguous format, every plane is a channel. Where a plane has several
// splits, `parts` has a row of `tiles.channels` for each.
void global_mean(const BatchNormJob& job, StreamHandle stream);
void add_relu_mean_backward(const BatchNormJob& job, StreamHandle stream);

// A job on the planes of `images`; `pixels` of each lie together, or their channels.
inline BatchNormJob plane_job(int64_t images, int64_t channels, int64_t pixels, bool channels_last,
                              int64_t element, bool aligned) {
    // Few rows, which a block shares among fewer threads, and more channels than usual.
    constexpr int64_t kLine = 512;
    BatchNormJob job(channels_last
                         ? ChannelTiles(images * pixels, channels, 1, element, aligned, kLine)
                         : ChannelTiles(1, images * channels, pixels, element, aligned));
    if (channels_last) {
        job.plane_splits = job.tiles.divide_groups(pixels);
    } else {
        job.tiles.divide_sums();
        job.plane_splits = job.tiles.splits;
    }
    job.norm.count = double(pixels);
    return job;
}

}  // namespace pooling_ext::cuda

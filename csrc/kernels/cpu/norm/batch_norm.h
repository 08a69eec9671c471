// Batch normalization with residual and activation: what its launchers and kernels agree on.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "common/activation_kind.h"
#include "kernels/cpu/dispatch.h"

namespace pooling_ext {

// y = (x - center) * scale + shift. The center is representable in the type that kernels compute
// in, so that nothing is lost where the mean is large beside the deviation.
struct Affine {
    double center, scale, shift;
    double inverse;  // of the deviation
};

inline Affine affine_of(double mean, double variance, double weight, double bias, double eps,
                        bool is_double) {
    const double center = is_double ? mean : double(float(mean));
    const double inverse = 1 / std::sqrt(variance + eps), scale = weight * inverse;
    return {center, scale, bias - (mean - center) * scale, inverse};
}

// What a backward pass through the statistics adds to a gradient: (x - center) * slope + offset.
struct StatsGrad {
    double slope, offset;
};

// From the mean of the gradient and of its product with x - mean, where `away` is mean - center.
inline StatsGrad stats_grad(double gradient, double product, double away, double scale,
                            double inverse) {
    const double share = product * inverse * inverse;
    return {-scale * share, scale * (away * share - gradient)};
}

// Source of the mask of ReLU: none, the input, or (with a residual) the output; ReLU6 without a
// residual has its from the input. Other activations take their derivative at their input, which is
// made of the batch norm's input and, with Sum, the residual. The gradient of a residual is
// written. So is, with Kept, the gradient of what the activation is given, for the second pass over
// it: derivatives that take an exponential are then made once.
enum class Gate { None, Relu, Relu6, ReluOutput, Derivative, DerivativeKept, DerivativeOfSum };

// That of a call whose activation this is, with something kept for a residual or not.
inline Gate gate_of(Activation activation, bool kept) {
    if (activation == Activation::None) return Gate::None;
    if (activation == Activation::Relu) return kept ? Gate::ReluOutput : Gate::Relu;
    if (kept) return Gate::DerivativeOfSum;
    return activation == Activation::Relu6 ? Gate::Relu6 : Gate::Derivative;
}

constexpr bool reads_kept(Gate gate) {
    return gate == Gate::ReluOutput || gate == Gate::DerivativeOfSum;
}

constexpr bool writes_gradient(Gate gate) {
    return reads_kept(gate) || gate == Gate::DerivativeKept;
}

struct BatchNormJob {
    // An element is at (n, c, i) of batch * channels * inner, or at (n, i, c) in channels-last.
    int64_t batch = 1, channels = 1, inner = 1;
    bool channels_last = false;
    const void* x = nullptr;
    const void* residual = nullptr;  // may be none
    const void* grad = nullptr;
    const void* kept = nullptr;     // ReLU's output, or the residual, as the gate reads them
    void* y = nullptr;              // the output, or the gradient of the input
    void* residual_grad = nullptr;  // what the gate writes; with Kept y, if vectors are whole
    // For each channel: center, scale and shift of its Affine; in Step::Backward also slope and
    // offset of the input's gradient, grad * scale + (x - center) * slope + offset.
    const double* center = nullptr;
    const double* scale = nullptr;
    const double* shift = nullptr;
    const double* slope = nullptr;  // none where the statistics are constants
    const double* offset = nullptr;
    Activation activation = Activation::None;
    double negative_slope = 0;  // of LeakyRelu
    Gate gate = Gate::None;
    bool non_temporal = false;  // what is written goes past the cache
    bool undivided = false;     // all is one unit, in channels-last
    // Stats: mean and sum of squared deviations; Sums: of the gradient, and of its product with
    // x - center. Two rows of `channels`, for each unit in channels-last.
    double* sums = nullptr;
    // Train and TrainBackward, which make the coefficients of a channel by themselves: weight and
    // bias of each channel, and two rows of the means and biased variances.
    const double* weight = nullptr;
    const double* bias = nullptr;
    double* moments = nullptr;
    double eps = 0;

    int64_t numel() const { return batch * channels * inner; }

    // Whether runs, of pixels or channels, divide into vectors of every instruction set.
    bool has_whole_vectors() const { return (channels_last ? channels : inner) % 16 == 0; }

    // In channels-last a row of the kernels is some pixels, so that rows are not short and, unless
    // there are many channels, consist of whole vectors.
    int64_t row() const {
        constexpr int64_t kRow = 256, kVector = 16;
        if (!channels_last) return inner;
        const int64_t step = channels <= 2 * kRow ? kVector / std::gcd(channels, kVector) : 1;
        const int64_t pixels = (kRow + channels - 1) / channels;
        return channels * ((pixels + step - 1) / step * step);
    }
};

// Stats: each channel's mean and deviations. Merge: from those of the units to those of all.
// Act: the output. Sums: of a backward pass. Total: as Merge. Backward: the input's gradient.
// Train and TrainBackward: all of a direction for one channel after the other, which is then read
// from the cache the second time; in the contiguous format alone.
enum class Step { Stats, Merge, Act, Sums, Total, Backward, Train, TrainBackward };

// What a step is divided into: in channels-last, runs of rows, of which there are as many whatever
// the number of threads, so that sums do not depend on it; else channels or planes.
struct Units {
    int64_t count, size;  // how many, and elements in each but perhaps the last

    // The end of the unit that begins at `from`, an element of the job.
    static int64_t end(const BatchNormJob& job, int64_t from, int64_t size) {
        return from + size < job.numel() ? from + size : job.numel();
    }

    Units(const BatchNormJob& job, Step step) {
        constexpr int64_t kRows = 256, kLeast = 32, kMost = 16;
        if (step == Step::Merge || step == Step::Total) {
            count = job.channels;
            size = Units(job, Step::Stats).count;
        } else if (job.channels_last) {
            const int64_t rows = (job.numel() + job.row() - 1) / job.row();
            int64_t at_once = rows / kMost;
            at_once = at_once < kLeast ? kLeast : at_once > kRows ? kRows : at_once;
            if (job.undivided) at_once = rows;
            count = (rows + at_once - 1) / at_once;
            size = at_once * job.row();
        } else if (step != Step::Act && step != Step::Backward) {
            count = job.channels;
            size = job.batch * job.inner;
        } else {
            count = job.batch * job.channels;
            size = job.inner;
        }
    }
};

inline size_t scratch_bytes(const BatchNormJob& job) {
    constexpr size_t vectors = 7, slack = 4096;
    const size_t row = job.channels_last ? job.row() : 0;
    return vectors * row * sizeof(double) + slack;
}

// Works on units [begin, end) of a step.
using BatchNormKernel = void (*)(const BatchNormJob& job, int64_t begin, int64_t end,
                                 void* scratch);

POOLING_EXT_KERNELS(batch_norm, BatchNormKernel(DType, Step))

}  // namespace pooling_ext

// Convolution of images, of few channels each: what its launchers and kernels agree on.
//
// The elements of a window's row lie together in memory where pixels have their channels side by
// side, and those of the next window lie a constant distance further. So a tile of a matrix product
// reads windows where they are: rows of the image in scratch memory, with the padding. Nothing is
// gathered, and no channels are added up to a vector's, as they are where channels are the vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/activation_kind.h"
#include "kernels/cpu/dispatch.h"

namespace pooling_ext {

// Prepare: weights and bias, widened and in the order of the loops. Forward. Merge: the statistics
// of all pieces from those of each. WeightGrad: sums of each piece. Total: of all pieces.
enum class ImageStep { Prepare, Forward, Merge, WeightGrad, Total };

// The convolution along one axis.
struct ImageAxis {
    int64_t in = 1, out = 1, kernel = 1, stride = 1, padding = 0;
};

struct ImageJob {
    // Of the output that vectors are made of: as many of each instruction set divide it.
    static constexpr int64_t kFeatureBlock = 16;

    int64_t batch = 1, channels = 3, features = 16;
    ImageAxis h, w;
    bool image_last = false, channels_last = false;  // the formats of the input and of the output
    // The output goes past the cache: a pixel's channels, or a plane's row, are whole lines.
    bool non_temporal = false;
    const void* x = nullptr;
    const void* grad = nullptr;    // the output's gradient
    void* y = nullptr;             // the output
    const void* weight = nullptr;  // (features, channels, kernel, kernel)
    const void* bias = nullptr;    // may be none
    void* prepared = nullptr;      // prepared_count() numbers
    Activation activation = Activation::None;
    double slope = 0;  // of LeakyRelu
    // If not none: for each piece two rows of padded_features(), means and sums of squared
    // deviations. Merge makes two rows of `features` of them, means and variances, at `stats`.
    double* moments = nullptr;
    double* stats = nullptr;
    // For each piece depth() rows of padded_features() sums. Total writes `weight_grad`.
    void* sums = nullptr;
    void* weight_grad = nullptr;
    int64_t wide = 4;  // bytes of a number that sums are made in

    int64_t padded_features() const { return ceil_div(features, kFeatureBlock) * kFeatureBlock; }
    // Elements of a row of a window, and of a window.
    int64_t across() const { return w.kernel * channels; }
    int64_t depth() const { return h.kernel * across(); }
    int64_t prepared_count() const { return padded_features() * (depth() + 1); }
    // Elements of a row of an image that windows reach.
    int64_t reach() const { return ((w.out - 1) * w.stride + w.kernel) * channels; }
};

// How images are divided. It does not depend on the number of threads, nor on the instruction set.
struct ImagePlan {
    int64_t band, bands;  // rows of the output; how many bands an image has
    int64_t pieces;       // of WeightGrad: each has some bands
    int64_t work;         // element operations of a band, about

    explicit ImagePlan(const ImageJob& job) {
        constexpr int64_t kUnits = 64, kLeastRows = 4, kMostRows = 16, kMostSums = 16 << 20;
        const int64_t batch = job.batch > 0 ? job.batch : 1;
        const int64_t rows = clamp(job.batch * job.h.out / kUnits, kLeastRows, kMostRows);
        bands = ceil_div(job.h.out, rows);
        band = ceil_div(job.h.out, bands);
        bands = ceil_div(job.h.out, band);
        work = band * job.w.out * job.depth() * job.features;
        const int64_t bytes = job.depth() * job.padded_features() * job.wide;
        pieces = clamp(kMostSums / bytes, 1, clamp(batch * bands, 1, kUnits));
    }

    int64_t all_bands(const ImageJob& job) const { return job.batch * bands; }

  private:
    static int64_t clamp(int64_t x, int64_t least, int64_t most) {
        return x < least ? least : x > most ? most : x;
    }
};

// Of one call of a kernel: rows of the image and of zeros, and a row of the output or its gradient.
inline size_t scratch_bytes(const ImageJob& job) {
    constexpr size_t kSlack = 4096, kNumbers = 64;
    const size_t rows = (job.h.kernel + 1) * (job.reach() + 16);
    const size_t row = (job.w.out + 1) * job.padded_features();
    return (rows + 2 * row) * job.wide + job.padded_features() * kNumbers +
           job.h.kernel * sizeof(void*) + kSlack;
}

// Works on units [begin, end) of a step.
using ImageKernel = void (*)(const ImageJob& job, int64_t begin, int64_t end, void* scratch);

POOLING_EXT_KERNELS(image, ImageKernel(DType, ImageStep))

}  // namespace pooling_ext

// Depthwise convolution: what its launchers and kernels agree on.
//
// A kernel takes some rows of a plane of the result at a time (a chunk), for a group of channels:
// it widens the rows of the source that they need into scratch memory in the cache, where sixteen
// channels lie together and the padding is, and computes from there. So one loop serves every
// type, layout and padding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/activation_kind.h"
#include "kernels/cpu/dispatch.h"

namespace pooling_ext {

// Prepare: weights and bias, widened and in the order of a step's loops. Forward and InputGrad.
// Merge: the statistics of all pieces from those of each. WeightGrad: sums of each piece. Total:
// both gradients from the sums of all pieces.
enum class DepthwiseStep { Prepare, Forward, Merge, InputGrad, WeightGrad, Total };

// Channels that lie together in scratch memory.
constexpr int64_t kDepthwiseBlock = 16;

// The convolution along one axis.
struct DepthwiseAxis {
    int64_t in = 1, out = 1, stride = 1, padding = 0;
};

struct DepthwiseJob {
    int64_t batch = 1, channels = 1, kernel = 3;
    DepthwiseAxis h, w;
    bool channels_last = false;
    // The planes that are read need not be copied into scratch memory: in channels-last, of types
    // that are widened by an instruction or two. There is a block of channels at least.
    bool in_place = false;
    // What is computed: Forward, InputGrad or WeightGrad. The others prepare or finish it.
    DepthwiseStep step = DepthwiseStep::Forward;
    const void* x = nullptr;       // the input
    const void* grad = nullptr;    // the output's gradient
    void* y = nullptr;             // the output, or the input's gradient
    const void* weight = nullptr;  // (channels, kernel, kernel)
    const void* bias = nullptr;    // may be none
    void* prepared = nullptr;      // prepared_count() numbers
    Activation activation = Activation::None;
    double slope = 0;  // of LeakyRelu
    // If not none: for each piece two rows of padded_channels(), means and sums of squared
    // deviations. Merge makes two rows of `channels` of them, means and variances, at `stats`.
    double* moments = nullptr;
    double* stats = nullptr;
    // Sums of products for each piece, and of the gradient: taps() + 1 for each of
    // padded_channels(). Total writes `weight_grad` and, if not none, `bias_grad`.
    void* sums = nullptr;
    void* weight_grad = nullptr;
    void* bias_grad = nullptr;
    int64_t wide = 4;  // bytes of a number that sums are made in

    bool backward() const { return step == DepthwiseStep::InputGrad; }
    int64_t taps() const { return kernel * kernel; }
    int64_t blocks() const { return ceil_div(channels, kDepthwiseBlock); }
    int64_t padded_channels() const { return blocks() * kDepthwiseBlock; }
    int64_t prepared_count() const { return padded_channels() * (taps() + 1); }
};

// How the rows or columns of a result follow from those of its source. Results of one phase are
// `phases` apart and use the same taps.
struct DepthwiseWalk {
    int64_t source, result, phases, step, padding, kernel;

    DepthwiseWalk(const DepthwiseAxis& axis, int64_t kernel, bool backward)
        : source(backward ? axis.out : axis.in),
          result(backward ? axis.in : axis.out),
          phases(backward ? axis.stride : 1),
          step(backward ? 1 : axis.stride),
          padding(axis.padding),
          kernel(kernel),
          backward_(backward) {}

    int64_t phase(int64_t at) const { return backward_ ? (at + padding) % phases : 0; }
    // How many taps the results of a phase have.
    int64_t taps(int64_t phase) const { return ceil_div(kernel - phase, phases); }
    // Which of the kernel's elements the i-th tap of a phase is: backward they are turned.
    int64_t tap(int64_t phase, int64_t i) const {
        return backward_ ? phase + phases * (taps(phase) - 1 - i) : i;
    }
    // Where in the source the first tap of a result lies; it may be outside.
    int64_t first(int64_t at) const {
        if (!backward_) return at * step - padding;
        return (at + padding) / phases - (taps(phase(at)) - 1);
    }
    // The first result of a phase, and how many there are.
    int64_t begin(int64_t phase) const {
        return backward_ ? ((phase - padding) % phases + phases) % phases : 0;
    }
    int64_t count(int64_t phase) const {
        return result <= begin(phase) ? 0 : ceil_div(result - begin(phase), phases);
    }

  private:
    bool backward_;
};

// How a step is divided, and the scratch memory that a chunk takes. It does not depend on the
// number of threads, nor on the instruction set.
struct DepthwisePlan {
    // A unit is a group of `group` blocks of channels, and in Forward and InputGrad a band of rows
    // of one image; in WeightGrad a piece of all bands.
    int64_t group, groups, band, bands, pieces, units;
    int64_t chunk;   // rows of the result, or of the output in WeightGrad, at a time
    int64_t slots;   // rows of the source in scratch memory
    int64_t lead;    // columns before the source's first
    int64_t width;   // columns of a row of the source in scratch memory
    int64_t across;  // columns of a row of the result there
    int64_t work;    // element operations of a unit, about

    // Columns computed at once, of which each row has a multiple.
    static constexpr int64_t kColumns = 7;
    // Columns of the input, of some hundred channels, that stay in the second-level cache.
    static constexpr int64_t kInPlaceColumns = 448;
    static constexpr int64_t kUnits = 64;  // about as many units as there may be threads

    explicit POOLING_EXT_INLINE DepthwisePlan(const DepthwiseJob& job) {
        const bool sums = job.step == DepthwiseStep::WeightGrad;
        const DepthwiseWalk rows(job.h, job.kernel, job.backward());
        const DepthwiseWalk columns(job.w, job.kernel, job.backward());
        // Chunks of short rows make the loops long; rows along channels are long by themselves.
        const int64_t least = job.channels_last && !sums ? 64 : 256;
        chunk = clamp(least / columns.result, 1, rows.result);
        if (sums && job.in_place) chunk = clamp(kInPlaceColumns / columns.source, 1, rows.result);
        lead = width = across = 0;
        for (int64_t phase = 0; phase < columns.phases; ++phase) {
            const int64_t before = -columns.first(columns.begin(phase));
            lead = before > lead ? before : lead;
        }
        for (int64_t phase = 0; phase < columns.phases; ++phase) {
            const int64_t count = ceil_div(columns.count(phase), kColumns) * kColumns;
            const int64_t last = columns.first(columns.begin(phase)) + (count - 1) * columns.step +
                                 columns.taps(phase);
            width = last > width ? last : width;
            const int64_t end = count * columns.phases;
            across = end > across ? end : across;
        }
        // Odd, so that rows do not all lie at the same addresses of the first-level cache.
        width = (lead + (width > columns.source ? width : columns.source)) | 1;
        across |= 1;
        set_rows(rows);
        divide(job, rows.result, sums);
    }

    size_t scratch_bytes(const DepthwiseJob& job) const {
        // Vectors of channels have a few numbers and pointers each; some results are computed at
        // once.
        constexpr size_t kSlack = 16384, kNumbers = 64;
        size_t columns = (slots * group + 1) * width + (chunk * group + 1) * across;
        if (job.in_place) columns = 0;
        return columns * kDepthwiseBlock * job.wide + kSlack + group * kDepthwiseBlock * kNumbers +
               chunk * job.kernel * sizeof(void*);
    }

    static int64_t clamp(int64_t x, int64_t least, int64_t most) {
        return x < least ? least : x > most ? most : x;
    }

  private:
    void set_rows(const DepthwiseWalk& rows) {
        slots = rows.phases == 1
                    ? (chunk - 1) * rows.step + rows.kernel
                    : (chunk - 1) / rows.phases + 2 + ceil_div(rows.kernel, rows.phases);
    }

    void divide(const DepthwiseJob& job, int64_t results, bool sums) {
        constexpr int64_t kScratch = 384 << 10, kBlocks = 16, kLeastRows = 8, kLeastWork = 1 << 16;
        const int64_t blocks = job.blocks(), batch = job.batch > 0 ? job.batch : 1;
        group = 1;
        if (job.channels_last) {
            const int64_t block =
                ((slots + 1) * width + (sums ? chunk * across : 0)) * kDepthwiseBlock * job.wide;
            group = clamp(kScratch / block, 1, blocks);
            if (sums) group = clamp(group, 1, kBlocks / 2);
            if (job.in_place) group = sums ? clamp(kBlocks, 1, blocks) : blocks;
        }
        groups = ceil_div(blocks, group);
        group = ceil_div(blocks, groups);
        groups = ceil_div(blocks, group);
        // Rows of an image are shared out where there are few images: each band reads some rows
        // that its neighbors read too.
        bands = clamp(kUnits / (batch * groups), 1, ceil_div(results, kLeastRows));
        band = ceil_div(ceil_div(results, bands), chunk) * chunk;
        bands = ceil_div(results, band);
        const int64_t items = batch * bands;
        work = group * kDepthwiseBlock * band * job.w.out * job.taps();
        pieces = clamp(kUnits / groups, 1, items);
        pieces = clamp(items * work / kLeastWork, 1, pieces);
        units = groups * (sums ? pieces : items);
        if (sums) work *= ceil_div(items, pieces);
    }
};

inline size_t scratch_bytes(const DepthwiseJob& job) {
    return DepthwisePlan(job).scratch_bytes(job);
}

// Works on units [begin, end) of a step.
using DepthwiseKernel = void (*)(const DepthwiseJob& job, int64_t begin, int64_t end,
                                 void* scratch);

POOLING_EXT_KERNELS(depthwise, DepthwiseKernel(DType, DepthwiseStep))

}  // namespace pooling_ext

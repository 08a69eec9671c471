// How the kernels that work on whole channels divide a tensor into blocks.
//
// A dense tensor of channels is rows of `channels * inner` elements: in channels-last a row is a
// pixel and `inner` 1, in the contiguous format a row is an image and `inner` its pixels. A block
// has a few channels of some rows, a split of them. A thread moves vectors that lie at the same
// offset in each row, so that their channels stay the same; or, where a block has one channel of
// long planes, whichever come next (a flat tile).
#pragma once

#include <algorithm>
#include <numeric>

#include "common/pooling.h"

namespace pooling_ext::cuda {

struct ChannelTiles {
    static constexpr int kThreads = 256;

    int64_t rows, channels, inner;
    int vector = 1;      // elements that a thread moves at once
    bool flat = false;   // the vectors of a split are counted, not its rows
    int width = 1;       // channels of a block
    int64_t blocks = 1;  // of channels
    int64_t across = 1;  // vectors of a block in a row
    int below = 1;       // rows that the threads of a block have at once
    int64_t splits = 1;  // of the rows
    int64_t each = 0;    // rows, or vectors, of a split
    // From a thread's vector to its next one: rows or vectors; rows, vectors along the row, and
    // elements; and elements more where the row ends between.
    int64_t step = 1, step_rows = 0, step_across = 0, step_at = 0, wrap = 0;

    // `aligned`: whether all tensors begin at a multiple of 16 bytes. `line`: of a pixel in
    // channels-last, at most so many bytes; with more, a block would leave more sums for as many
    // rows.
    ChannelTiles(int64_t rows, int64_t channels, int64_t inner, int64_t element, bool aligned,
                 int64_t line = 128)
        : rows(rows), channels(channels), inner(inner) {
        const int most = int(16 / element);
        // Nobody trains in float64.
        if (aligned && element < 8 && takes(most)) vector = most;
        if (inner == 1)
            take_pixels(element, line);
        else if (unit() == 1 && inner / vector >= kLong)
            take_planes();
        else
            take_several_planes();
        blocks = ceil_div(channels, width);
        below = int(kThreads / across);
        step = below;
        if (flat) {
            step = kThreads;
            step_across = kThreads % across;
            wrap = channels * inner - across * vector;
        }
        step_rows = kThreads / across;
        step_at = step_rows * channels * inner + step_across * vector;
        each = total();
    }

    // What a split is counted in: rows, or vectors.
    int64_t total() const { return flat ? rows * across : rows; }

    // Shares the rows among so many blocks in all, if each has enough to do. It depends on the
    // sizes alone, and so do sums.
    void divide(int64_t most_blocks, int64_t least_batches) {
        // A thread's sum in float32 takes no more than this.
        constexpr int64_t kMostBatches = 256;
        const int64_t batch = step * kBatch, batches = ceil_div(total(), batch);
        splits = std::min(most_blocks / blocks, batches / least_batches);
        splits = std::max({splits, ceil_div(batches, kMostBatches), int64_t(1)});
        each = std::max(ceil_div(batches, splits), int64_t(1)) * batch;
        splits = std::max(ceil_div(total(), each), int64_t(1));
    }

    // Of 132 multiprocessors, with room for two or for three such blocks each, all are busy to the
    // end: 792 blocks are three times the one and twice the other. There are few enough that what
    // they leave to add up, or read before they begin, is little.
    static constexpr int64_t kSumBlocks = 792;
    void divide_sums() { divide(kSumBlocks, kLeastBatches); }
    void divide_elements() { divide(3 * kSumBlocks, 2); }

    // As many splits for each group of so many rows as make enough blocks, if each has enough to
    // do; all have as many rows. Returns how many.
    int64_t divide_groups(int64_t group) {
        const int64_t groups = std::max(rows / group, int64_t(1));
        int64_t n =
            std::min(kSumBlocks / (blocks * groups), group / (kLeastBatches * kBatch * step));
        n = std::max(n, int64_t(1));
        while (group % n) --n;
        each = group / n;
        splits = rows / each;
        return n;
    }

    int64_t grid() const { return blocks * splits; }

    // How many elements of a channel a split has.
    POOLING_EXT_INLINE int64_t count(int64_t split) const {
        const int64_t all = flat ? rows * across : rows, begin = split * each;
        const int64_t units = begin + each < all ? each : all - begin;
        return units * (flat ? vector : inner);
    }

  private:
    static constexpr int64_t kBatch = 4;         // vectors of a thread
    static constexpr int64_t kLeastBatches = 4;  // of a split that is summed up
    static constexpr int64_t kLong = 32;         // vectors of a plane that is walked by itself

    // So many channels are a whole number of vectors.
    int64_t unit() const { return vector / std::gcd(inner, int64_t(vector)); }

    bool takes(int64_t n) const {
        const int64_t unit = n / std::gcd(inner, n);
        return channels % unit == 0 && (unit == 1 || unit * inner / n <= kThreads);
    }

    void take_pixels(int64_t element, int64_t line) {
        constexpr int64_t kSector = 32;
        const int64_t bytes = vector * element, all = ceil_div(channels, vector);
        across = std::max(all, int64_t(1));
        if (all * bytes > line) {
            const int64_t whole = kSector / std::min(bytes, kSector);
            const int64_t some = ceil_div(all, ceil_div(all * bytes, line));
            across = ceil_div(some, whole) * whole;
        }
        width = int(across * vector);
    }

    void take_planes() {
        flat = true;
        across = inner / vector;
    }

    // As many short planes as keep most threads busy.
    void take_several_planes() {
        const int64_t vectors = std::max(unit() * inner / vector, int64_t(1));
        const int64_t most =
            std::max(std::min({kThreads / vectors, kThreads / unit(), ceil_div(channels, unit())}),
                     int64_t(1));
        int64_t best = 0, units = 1;
        for (int64_t n = 1; n <= most; ++n) {
            const int64_t row = n * vectors;
            if (row < 8 && n < most) continue;
            const int64_t busy = row * std::min(kThreads / row, std::max(rows, int64_t(1)));
            if (20 * busy <= 21 * best) continue;
            best = busy;
            units = n;
        }
        across = units * vectors;
        width = int(units * unit());
    }
};

}  // namespace pooling_ext::cuda

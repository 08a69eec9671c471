// Batch normalization, ReLU and max pooling as one step in channels-last, for windows of few
// offsets: what the launchers and kernels agree on.
//
// The offsets of these kernels say what ReLU let through, too: a window whose maximum is not above
// zero has none, so that backward passes need not look at the input for that.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/norm/batch_norm.h"
#include "kernels/cpu/pool/plan.h"

namespace pooling_ext {

struct BnReluMaxPoolJob {
    static constexpr int64_t kMost = 3;  // rows and columns of a window

    BatchNormJob norm;  // x, the coefficients, `y` of a backward pass and `sums`
    Job pool;           // dst and offsets_out, or src and offsets_in

    // The dtypes that networks are trained in; others go by tiles.
    static bool has(DType dtype) { return dtype == DType::Float32 || dtype == DType::BFloat16; }

    // Whether there are kernels for it.
    bool taken(DType dtype) const {
        const PoolParams& p = pool.p;
        return has(dtype) && p.channels > 1 && p.h.out > 0 && p.d.in == 1 && p.d.out == 1 &&
               p.h.kernel <= kMost && p.w.kernel <= kMost && p.h.dilation == 1 &&
               p.w.dilation == 1 && !p.h.adaptive && !p.w.adaptive;
    }

    // Units of sums are rows of the outputs of an image, as many whatever the number of threads.
    int64_t band() const {
        constexpr int64_t kBand = 1 << 17;  // elements of the input
        const int64_t rows = kBand / (pool.p.h.stride * pool.p.in_row());
        return rows < 1 ? 1 : rows < pool.p.h.out ? rows : pool.p.h.out;
    }
    int64_t bands() const { return ceil_div(pool.p.h.out, band()); }

    // Rows of the outputs that are made at a time where their inputs are normalized first.
    int64_t rows_at_once() const {
        constexpr int64_t kInputs = 1 << 15;  // elements
        const int64_t rows = kInputs / (pool.p.h.stride * pool.p.in_row());
        return rows < 1 ? 1 : rows < pool.p.h.out ? rows : pool.p.h.out;
    }
    int64_t tile() const {
        const Axis& h = pool.p.h;
        return ((rows_at_once() - 1) * h.stride + h.kernel) * pool.p.in_row();
    }
};

// Forward: rows of the outputs. Sums: bands of every image. Backward: rows of the inputs.
enum class BnReluMaxPoolStep { Forward, Sums, Backward };

inline size_t scratch_bytes(const BnReluMaxPoolJob& job) {
    constexpr size_t vectors = 8, element = 2;
    return scratch_bytes(job.norm) + scratch_bytes(job.pool) +
           vectors * job.norm.channels * sizeof(double) + job.tile() * element;
}

using BnReluMaxPoolKernel = void (*)(const BnReluMaxPoolJob& job, int64_t begin, int64_t end,
                                     void* scratch);

POOLING_EXT_KERNELS(bn_relu_max_pool, BnReluMaxPoolKernel(DType, BnReluMaxPoolStep))

}  // namespace pooling_ext

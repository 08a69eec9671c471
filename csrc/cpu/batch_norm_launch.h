// From tensors to batch normalisation's kernels: what its launchers share.
#pragma once

#include <optional>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/launch.h"

namespace pooling_ext {

using MaybeTensor = std::optional<Tensor>;

// A float32 or float64 vector's values, or `otherwise` where there is none.
inline std::vector<double> values_of(const MaybeTensor& vector, int64_t n, double otherwise) {
    if (!vector) return std::vector<double>(n, otherwise);
    const Tensor row = dense(*vector, false);
    STD_TORCH_CHECK(row.numel() == n, "pooling_ext: weight and bias must have a value per channel");
    const void* data = row.data_ptr();
    if (row.scalar_type() == ScalarType::Double) {
        const auto* values = static_cast<const double*>(data);
        return {values, values + n};
    }
    STD_TORCH_CHECK(row.scalar_type() == ScalarType::Float,
                    "pooling_ext: weight and bias must be float32 or float64");
    const auto* values = static_cast<const float*>(data);
    return {values, values + n};
}

// An input and the tensors that lie as it does.
struct BatchNormCall {
    bool channels_last;
    Tensor input;
    BatchNormJob job;
    std::vector<Tensor> kept;  // copies that are read

    explicit BatchNormCall(const Tensor& x)
        : channels_last(suggests_channels_last(x, x.dim() - 2)), input(dense(x, channels_last)) {
        const Ints sizes = sizes_of(x);
        job.batch = sizes[0];
        job.channels = sizes[1];
        for (size_t i = 2; i < sizes.size(); ++i) job.inner *= sizes[i];
        // With one pixel the formats are the same, and rows over channels are the longer ones.
        job.channels_last = channels_last || job.inner == 1;
        job.x = input.data_ptr();
    }

    // The data of a tensor of the input's shape and dtype, in the input's format.
    const void* like_input(const Tensor& x) {
        STD_TORCH_CHECK(sizes_of(x) == sizes_of(input) && x.scalar_type() == input.scalar_type(),
                        "pooling_ext: tensors must have input's shape and dtype");
        kept.push_back(dense(x, channels_last));
        return kept.back().data_ptr();
    }

    Tensor empty_like_input() const {
        return empty(sizes_of(input), input.scalar_type(), channels_last);
    }

    void run(Step step) const {
        if (job.numel() == 0) return;
        const Units units(job, step);
        launch(kernels().batch_norm(dtype_of(input), step), job, {units.count, units.size});
    }

    // Runs a step that makes two rows of sums, and the one that adds up those of its units.
    Tensor run_sums(Step step, Step combine) {
        Tensor result = empty({2, job.channels}, ScalarType::Double, false);
        double* const data = static_cast<double*>(result.data_ptr());
        const int64_t n = 2 * job.channels, units = job.channels_last ? Units(job, step).count : 1;
        std::vector<double> parts(units > 1 ? n * units : 0);
        job.sums = units > 1 ? parts.data() : data;
        std::fill(job.sums, job.sums + n, 0.0);
        run(step);
        if (units > 1) {
            run(combine);
            std::copy(job.sums, job.sums + n, data);
        }
        return result;
    }
};

// The coefficients of a call, which its job points to.
struct Affines {
    // `away` is what the center leaves of the mean, `inverse` 1 / (variance + eps).
    std::vector<double> center, scale, shift, away, inverse, slope, offset;

    Affines(BatchNormJob& job, const Tensor& stats, const MaybeTensor& weight,
            const MaybeTensor& bias, double eps, bool is_double)
        : shift(values_of(bias, job.channels, 0.0)) {
        const std::vector<double> moments = values_of(stats, 2 * job.channels, 0.0);
        scale = values_of(weight, job.channels, 1.0);
        for (int64_t c = 0; c < job.channels; ++c) {
            const double mean = moments[c], variance = moments[job.channels + c];
            const Affine affine = affine_of(mean, variance, scale[c], shift[c], eps, is_double);
            center.push_back(affine.center);
            away.push_back(mean - affine.center);
            inverse.push_back(1 / (variance + eps));
            scale[c] = affine.scale;
            shift[c] = affine.shift;
        }
        job.center = center.data();
        job.scale = scale.data();
        job.shift = shift.data();
    }

    // From sums of products with x - center to products with x - mean.
    void about_mean(const Tensor& sums) const {
        double* const data = static_cast<double*>(sums.data_ptr());
        const int64_t channels = static_cast<int64_t>(away.size());
        for (int64_t c = 0; c < channels; ++c) data[channels + c] -= away[c] * data[c];
    }

    // Adds what a backward pass through statistics of `count` elements needs of the sums.
    void add_slopes(BatchNormJob& job, const Tensor& sums, double count) {
        const std::vector<double> both = values_of(sums, 2 * job.channels, 0.0);
        for (int64_t c = 0; c < job.channels; ++c) {
            const double mean = both[c] / count;
            const double product = both[job.channels + c] * inverse[c] / count;
            slope.push_back(-scale[c] * product);
            offset.push_back(scale[c] * (away[c] * product - mean));
        }
        job.slope = slope.data();
        job.offset = offset.data();
    }
};

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

}  // namespace pooling_ext

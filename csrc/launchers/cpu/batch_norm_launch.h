// From tensors to batch normalization's kernels: what its launchers share.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/cpu/norm/batch_norm.h"
#include "kernels/cpu/simd/numeric.h"
#include "launchers/activation.h"
#include "launchers/cpu/launch.h"

namespace pooling_ext {

using MaybeTensor = std::optional<Tensor>;

// Calls use(values) with a pointer to the elements of a vector of any floating dtype.
template <class Use>
void with_values(const Tensor& vector, const Use& use) {
    void* const data = vector.data_ptr();
    switch (vector.scalar_type()) {
        case ScalarType::Double:
            return use(static_cast<double*>(data));
        case ScalarType::Float:
            return use(static_cast<float*>(data));
        case ScalarType::BFloat16:
            return use(static_cast<baseline::BFloat16*>(data));
        case ScalarType::Half:
            return use(static_cast<baseline::Float16*>(data));
        default:
            STD_TORCH_CHECK(false, "pooling_ext: vectors of channels must be floating-point");
    }
}

// Writes a vector's n values, or `otherwise` where there is none.
inline void read_values(const MaybeTensor& vector, int64_t n, double otherwise, double* to) {
    if (!vector) return std::fill(to, to + n, otherwise);
    const Tensor row = dense(*vector, false);
    STD_TORCH_CHECK(row.numel() == n, "pooling_ext: weight and bias must have a value per channel");
    with_values(row, [&](const auto* from) {
        for (int64_t i = 0; i < n; ++i) to[i] = double(baseline::widen(from[i]));
    });
}

inline std::vector<double> values_of(const MaybeTensor& vector, int64_t n, double otherwise) {
    std::vector<double> values(n);
    read_values(vector, n, otherwise, values.data());
    return values;
}

// A vector of the given dtype with values from float64, of no size where `like` is none.
inline Tensor vector_like(const MaybeTensor& like, const double* values, int64_t n) {
    if (!like) return empty({0}, ScalarType::Double, false);
    Tensor result = empty({n}, like->scalar_type(), false);
    with_values(result, [&](auto* to) {
        using Element = std::remove_pointer_t<decltype(to)>;
        for (int64_t i = 0; i < n; ++i)
            to[i] = baseline::narrow<Element>(baseline::Accumulator<Element>(values[i]));
    });
    return result;
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

    // How many elements each channel's statistics are taken from.
    double count() const { return double(job.batch * job.inner); }

    Tensor empty_like_input() const {
        return empty(sizes_of(input), input.scalar_type(), channels_last);
    }

    // Whether what is written goes past the cache, which large results do: a line is then not read
    // before it is written, nor does it drive out what is read once more.
    bool non_temporal() const {
        constexpr int64_t kLeast = int64_t(4) << 20, kLine = 64;
        const int64_t size = input.element_size();
        const int64_t run = job.channels_last ? job.channels : job.inner;
        return job.numel() * size >= kLeast && run * size % kLine == 0 && job.y != job.x &&
               (uintptr_t(job.y) | uintptr_t(job.residual_grad)) % kLine == 0;
    }

    void run(Step step) {
        if (job.numel() == 0) return;
        job.non_temporal = non_temporal();
        const Units units(job, step);
        launch(kernels::batch_norm(dtype_of(input), step), job, {units.count, units.size});
    }

    // Runs a step that makes two rows of sums, and the one that adds up those of its units.
    void run_sums(Step step, Step combine, const Tensor& result) {
        double* const data = static_cast<double*>(result.data_ptr());
        const int64_t n = 2 * job.channels, units = job.channels_last ? Units(job, step).count : 1;
        if (job.numel() == 0) std::fill(data, data + n, 0.0);
        const std::unique_ptr<double[]> parts(units > 1 ? new double[n * units] : nullptr);
        job.sums = units > 1 ? parts.get() : data;
        run(step);
        if (units > 1) {
            run(combine);
            std::copy(job.sums, job.sums + n, data);
        }
    }

    Tensor empty_sums() const { return empty({2, job.channels}, ScalarType::Double, false); }

    Tensor run_sums(Step step, Step combine) {
        Tensor result = empty_sums();
        run_sums(step, combine, result);
        return result;
    }
};

// The coefficients of a call, which its job points to.
struct Affines {
    // `away` is what the center leaves of the mean, `inverse` 1 over the deviation.
    std::vector<double> center, scale, shift, away, inverse, slope, offset;

    Affines(BatchNormJob& job, const Tensor& stats, const MaybeTensor& weight,
            const MaybeTensor& bias, double eps, bool is_double)
        : center(job.channels),
          scale(values_of(weight, job.channels, 1.0)),
          shift(values_of(bias, job.channels, 0.0)),
          away(job.channels),
          inverse(job.channels) {
        const std::vector<double> moments = values_of(stats, 2 * job.channels, 0.0);
        const double* const means = moments.data();
        for (int64_t c = 0; c < job.channels; ++c) {
            const Affine affine =
                affine_of(means[c], means[job.channels + c], scale[c], shift[c], eps, is_double);
            center[c] = affine.center;
            inverse[c] = affine.inverse;
            away[c] = means[c] - affine.center;
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

    // From sums of products with x - mean to products with the normalized x, the weight's gradient.
    void normalize(double* products) const {
        for (size_t c = 0; c < inverse.size(); ++c) products[c] *= inverse[c];
    }

    // Adds what a backward pass through statistics of `count` elements needs of the sums.
    void add_slopes(BatchNormJob& job, const Tensor& sums, double count) {
        const std::vector<double> both = values_of(sums, 2 * job.channels, 0.0);
        const double share = 1 / count;
        slope.resize(job.channels);
        offset.resize(job.channels);
        for (int64_t c = 0; c < job.channels; ++c) {
            const StatsGrad stats = stats_grad(both[c] * share, both[job.channels + c] * share,
                                               away[c], scale[c], inverse[c]);
            slope[c] = stats.slope;
            offset[c] = stats.offset;
        }
        job.slope = slope.data();
        job.offset = offset.data();
    }
};

inline void set_activation(BatchNormJob& job, int64_t activation, double negative_slope) {
    job.activation = activation_of(activation);
    job.negative_slope = negative_slope;
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

}  // namespace pooling_ext

// Launchers of batch normalisation on the CPU. The operators are defined in
// pooling_ext/ops/batch_norm_act.py.
#include "cpu/batch_norm.h"

#include "cpu/launch.h"

namespace pooling_ext {
namespace {

using MaybeTensor = std::optional<Tensor>;

// A float32 or float64 vector's values, or `otherwise` where there is none.
std::vector<double> values_of(const MaybeTensor& vector, int64_t n, double otherwise) {
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
struct Call {
    bool channels_last;
    Tensor input;
    BatchNormJob job;
    std::vector<Tensor> kept;  // copies that are read

    explicit Call(const Tensor& x)
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
    std::vector<double> center, scale, shift, away, inverse;

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
};

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

Tensor batch_norm_stats(const Tensor& input) {
    Call call(input);
    Tensor stats = call.run_sums(Step::Stats, Step::Merge);
    double* const variance = static_cast<double*>(stats.data_ptr()) + call.job.channels;
    const double count = double(call.job.batch * call.job.inner);
    for (int64_t c = 0; c < call.job.channels; ++c) variance[c] /= count;
    return stats;
}

Tensor batch_norm_act(const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
                      const MaybeTensor& bias, const MaybeTensor& residual, double eps, bool relu) {
    Call call(input);
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor output = call.empty_like_input();
    if (residual) call.job.residual = call.like_input(*residual);
    call.job.y = output.data_ptr();
    call.job.relu = relu;
    call.run(Step::Act);
    return output;
}

std::tuple<Tensor, Tensor> batch_norm_act_sums(const Tensor& grad, const Tensor& input,
                                               const Tensor& stats, const MaybeTensor& weight,
                                               const MaybeTensor& bias, const MaybeTensor& output,
                                               double eps, bool relu) {
    Call call(input);
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor masked =
        output ? call.empty_like_input() : empty({0}, input.scalar_type(), false);
    call.job.grad = call.like_input(grad);
    call.job.mask = output ? Mask::Output : relu ? Mask::Input : Mask::None;
    if (output) {
        call.job.output = call.like_input(*output);
        call.job.masked = masked.data_ptr();
    }
    Tensor sums = call.run_sums(Step::Sums, Step::Total);
    double* const data = static_cast<double*>(sums.data_ptr());
    for (int64_t c = 0; c < call.job.channels; ++c)
        data[call.job.channels + c] -= affines.away[c] * data[c];
    return {masked, sums};
}

Tensor batch_norm_act_backward(const Tensor& grad, const Tensor& input, const Tensor& stats,
                               const MaybeTensor& weight, const MaybeTensor& bias,
                               const MaybeTensor& sums, double count, double eps, bool relu) {
    Call call(input);
    const int64_t channels = call.job.channels;
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor result = call.empty_like_input();
    call.job.grad = call.like_input(grad);
    call.job.y = result.data_ptr();
    call.job.mask = relu ? Mask::Input : Mask::None;
    std::vector<double> slope, offset;
    if (sums) {
        const std::vector<double> both = values_of(sums, 2 * channels, 0.0);
        for (int64_t c = 0; c < channels; ++c) {
            const double mean = both[c] / count;
            const double product = both[channels + c] * affines.inverse[c] / count;
            slope.push_back(-affines.scale[c] * product);
            offset.push_back(affines.scale[c] * (affines.away[c] * product - mean));
        }
        call.job.slope = slope.data();
        call.job.offset = offset.data();
    }
    call.run(Step::Backward);
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("batch_norm_stats", TORCH_BOX(&pooling_ext::batch_norm_stats));
    m.impl("batch_norm_act", TORCH_BOX(&pooling_ext::batch_norm_act));
    m.impl("batch_norm_act_sums", TORCH_BOX(&pooling_ext::batch_norm_act_sums));
    m.impl("batch_norm_act_backward", TORCH_BOX(&pooling_ext::batch_norm_act_backward));
}

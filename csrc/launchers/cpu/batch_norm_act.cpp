// Launchers of batch normalization on the CPU. The operators are defined in
// pooling_ext/ops/batch_norm_operators.py.
#include "launchers/cpu/batch_norm_launch.h"

namespace pooling_ext {
namespace {

// What the kernels that make a channel's coefficients are given of all of them.
struct ChannelArguments {
    std::vector<double> weight, bias;

    ChannelArguments(BatchNormJob& job, const Tensor& stats, const MaybeTensor& weights,
                     const MaybeTensor& biases, double eps)
        : weight(values_of(weights, job.channels, 1.0)),
          bias(values_of(biases, job.channels, 0.0)) {
        STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double &&
                            stats.numel() == 2 * job.channels && stats.is_contiguous(),
                        "pooling_ext: stats must be two rows of float64");
        job.weight = weight.data();
        job.bias = bias.data();
        job.moments = static_cast<double*>(stats.data_ptr());
        job.eps = eps;
    }
};

// Prepares a backward pass through the activation, with what was kept of a residual's call. The
// gradient of the residual, or a tensor of no size.
Tensor open_gate(BatchNormCall& call, const MaybeTensor& kept) {
    BatchNormJob& job = call.job;
    job.gate = gate_of(job.activation, kept.has_value());
    if (!reads_kept(job.gate)) return empty({0}, call.input.scalar_type(), false);
    job.kept = call.like_input(*kept);
    Tensor residual_grad = call.empty_like_input();
    job.residual_grad = residual_grad.data_ptr();
    return residual_grad;
}

// Has the first pass leave what the second takes, but not in 16 bits, in which it would be rounded:
// where the input's gradient is going to be or, if the last vectors of runs reach back over what is
// written already, in the tensor that is returned.
Tensor keep_gradient(BatchNormCall& call) {
    BatchNormJob& job = call.job;
    const Activation activation = job.activation;
    const bool is_exponential = activation == Activation::Silu || activation == Activation::Gelu ||
                                activation == Activation::GeluTanh;
    Tensor own = empty({0}, call.input.scalar_type(), false);
    if (job.gate != Gate::Derivative || !is_exponential || call.input.element_size() < 4)
        return own;
    job.gate = Gate::DerivativeKept;
    if (!job.has_whole_vectors()) own = call.empty_like_input();
    job.residual_grad = job.has_whole_vectors() ? job.y : own.data_ptr();
    return own;
}

Tensor stats_of(BatchNormCall& call) {
    Tensor stats = call.run_sums(Step::Stats, Step::Merge);
    double* const variance = static_cast<double*>(stats.data_ptr()) + call.job.channels;
    const double count = call.count();
    for (int64_t c = 0; c < call.job.channels; ++c) variance[c] /= count;
    return stats;
}

Tensor batch_norm_stats(const Tensor& input) {
    BatchNormCall call(input);
    return stats_of(call);
}

Tensor batch_norm_act_elemt(const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
                            const MaybeTensor& bias, const MaybeTensor& residual, double eps,
                            int64_t activation, double negative_slope) {
    BatchNormCall call(input);
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor output = call.empty_like_input();
    if (residual) call.job.residual = call.like_input(*residual);
    call.job.y = output.data_ptr();
    set_activation(call.job, activation, negative_slope);
    call.run(Step::Act);
    return output;
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_reduce(
    const Tensor& grad, const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& kept, double eps, int64_t activation,
    double negative_slope) {
    BatchNormCall call(input);
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    call.job.grad = call.like_input(grad);
    set_activation(call.job, activation, negative_slope);
    Tensor residual_grad = open_gate(call, kept);
    Tensor sums = call.run_sums(Step::Sums, Step::Total);
    affines.about_mean(sums);
    return {residual_grad, sums};
}

Tensor batch_norm_act_backward_elemt(const Tensor& grad, const Tensor& input, const Tensor& stats,
                                     const MaybeTensor& weight, const MaybeTensor& bias,
                                     const MaybeTensor& sums, double count, double eps,
                                     int64_t activation, double negative_slope) {
    BatchNormCall call(input);
    Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor result = call.empty_like_input();
    call.job.grad = call.like_input(grad);
    call.job.y = result.data_ptr();
    set_activation(call.job, activation, negative_slope);
    open_gate(call, std::nullopt);
    if (sums) affines.add_slopes(call.job, *sums, count);
    call.run(Step::Backward);
    return result;
}

// In the contiguous format a channel is done with before the next one is read; in channels-last
// channels lie together, and the tensor is passed over twice.
std::tuple<Tensor, Tensor> batch_norm_act_training(const Tensor& input, const MaybeTensor& weight,
                                                   const MaybeTensor& bias,
                                                   const MaybeTensor& residual, double eps,
                                                   int64_t activation, double negative_slope) {
    BatchNormCall call(input);
    BatchNormJob& job = call.job;
    Tensor output = call.empty_like_input();
    if (residual) job.residual = call.like_input(*residual);
    job.y = output.data_ptr();
    set_activation(job, activation, negative_slope);
    if (job.numel() == 0) {
        Tensor stats = call.empty_sums();
        double* const data = static_cast<double*>(stats.data_ptr());
        std::fill(data, data + 2 * job.channels, 0.0);
        return {output, stats};
    }
    if (job.channels_last) {
        Tensor stats = stats_of(call);
        const Affines affines(job, stats, weight, bias, eps, is_double(input));
        call.run(Step::Act);
        return {output, stats};
    }
    Tensor stats = call.empty_sums();
    const ChannelArguments arguments(job, stats, weight, bias, eps);
    call.run(Step::Train);
    return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_training_backward(
    const Tensor& grad, const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& kept, double eps, int64_t activation,
    double negative_slope) {
    BatchNormCall call(input);
    BatchNormJob& job = call.job;
    Tensor result = call.empty_like_input();
    job.grad = call.like_input(grad);
    job.y = result.data_ptr();
    set_activation(job, activation, negative_slope);
    Tensor residual_grad = open_gate(call, kept);
    const Tensor gradient = keep_gradient(call);
    Tensor sums = call.empty_sums();
    double* const data = static_cast<double*>(sums.data_ptr());
    if (job.channels_last || job.numel() == 0) {
        Affines affines(job, stats, weight, bias, eps, is_double(input));
        call.run_sums(Step::Sums, Step::Total, sums);
        affines.about_mean(sums);
        affines.add_slopes(job, sums, call.count());
        if (writes_gradient(job.gate)) {
            job.grad = job.residual_grad;
            job.gate = Gate::None;
        }
        affines.normalize(data + job.channels);
        call.run(Step::Backward);
    } else {
        const ChannelArguments arguments(job, stats, weight, bias, eps);
        job.sums = data;
        call.run(Step::TrainBackward);
    }
    return {result, residual_grad, vector_like(weight, data + job.channels, job.channels),
            vector_like(bias, data, job.channels)};
}

// In float64, so that 16 bits are rounded once.
void batch_norm_update_running(Tensor running_mean, Tensor running_var, const Tensor& stats,
                               double count, double momentum) {
    const int64_t channels = running_mean.numel();
    const std::vector<double> moments = values_of(stats, 2 * channels, 0.0);
    const auto update = [&](Tensor& running, const double* batch, double factor) {
        STD_TORCH_CHECK(running.numel() == channels && running.dim() == 1,
                        "pooling_ext: running statistics must have a value per channel");
        const int64_t stride = running.strides()[0];
        with_values(running, [&](auto* to) {
            using Element = std::remove_pointer_t<decltype(to)>;
            for (int64_t c = 0; c < channels; ++c) {
                const double old = double(baseline::widen(to[c * stride])), now = batch[c] * factor;
                // As torch.lerp.
                const double mixed = std::abs(momentum) < 0.5 ? old + momentum * (now - old)
                                                              : now - (now - old) * (1 - momentum);
                to[c * stride] = baseline::narrow<Element>(baseline::Accumulator<Element>(mixed));
            }
        });
    };
    update(running_mean, moments.data(), 1.0);
    update(running_var, moments.data() + channels, count / (count - 1));
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("batch_norm_stats", TORCH_BOX(&pooling_ext::batch_norm_stats));
    m.impl("batch_norm_act_elemt", TORCH_BOX(&pooling_ext::batch_norm_act_elemt));
    m.impl("batch_norm_act_backward_reduce",
           TORCH_BOX(&pooling_ext::batch_norm_act_backward_reduce));
    m.impl("batch_norm_act_backward_elemt", TORCH_BOX(&pooling_ext::batch_norm_act_backward_elemt));
    m.impl("batch_norm_act_training", TORCH_BOX(&pooling_ext::batch_norm_act_training));
    m.impl("batch_norm_act_training_backward",
           TORCH_BOX(&pooling_ext::batch_norm_act_training_backward));
    m.impl("batch_norm_update_running", TORCH_BOX(&pooling_ext::batch_norm_update_running));
}

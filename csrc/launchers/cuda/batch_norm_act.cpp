// Launchers of batch normalization on a GPU. The operators are defined in
// pooling_ext/ops/batch_norm_operators.py.
#include "launchers/activation.h"
#include "launchers/cuda/batch_norm_call.h"

namespace pooling_ext {
namespace {

using cuda::ActivationFunction;
using cuda::BatchNormJob;
using cuda::ChannelVector;
using cuda::Norm;

ActivationFunction function_of(int64_t activation, double negative_slope) {
    return {activation_of(activation), negative_slope};
}

Tensor stats_of(const BatchNormCall& call) {
    Tensor stats = call.empty_sums();
    if (call.channels == 0) return stats;
    BatchNormJob job = call.job();
    job.tiles.divide_sums();
    if (call.empty()) job.tiles.splits = 0;
    const Tensor parts = call.parts(job);
    if (!call.empty()) cuda::batch_norm_stats(job, call.device.stream());
    cuda::batch_norm_merge(job, static_cast<double*>(stats.data_ptr()), call.device.stream());
    return stats;
}

// Bytes of a mask: each has the bits of 16 bytes of elements.
int64_t mask_bytes(const Tensor& input) {
    return ceil_div(input.numel(), 16 / int64_t(input.element_size()));
}

Tensor act(BatchNormCall& call, const Norm& norm, const MaybeTensor& residual,
           const ActivationFunction& activation, void* mask = nullptr) {
    Tensor output = call.empty_like_input();
    if (call.empty()) return output;
    const void* const added = residual ? call.like_input(*residual) : nullptr;
    BatchNormJob job = call.job({added});
    job.tiles.divide_elements();
    job.norm = norm;
    job.residual = added;
    job.y = output.data_ptr();
    job.activation = activation;
    job.mask = static_cast<uint8_t*>(mask);
    cuda::batch_norm_act_elemt(job, call.device.stream());
    return output;
}

// The gradient of what the activation was given, if something is kept, and its sums.
std::tuple<Tensor, Tensor> sums_of(BatchNormCall& call, const Tensor& grad, const Norm& norm,
                                   const MaybeTensor& kept, const ActivationFunction& activation,
                                   ChannelVector grad_weight = {}, ChannelVector grad_bias = {}) {
    STD_TORCH_CHECK(!kept || activation.kind != Activation::None,
                    "pooling_ext: kept is for an activation");
    Tensor residual_grad = kept ? call.empty_like_input() : call.none(call.input.scalar_type());
    Tensor sums = call.empty_sums();
    if (call.channels == 0) return {residual_grad, sums};
    const void* const grads = call.like_input(grad);
    const bool masked = kept && kept->scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(!masked || (kept->numel() == mask_bytes(call.input) && kept->is_contiguous()),
                    "pooling_ext: a mask must have a byte for 16 bytes of the input");
    const void* const kept_data = kept && !masked ? call.like_input(*kept) : nullptr;
    BatchNormJob job = call.job({grads, kept_data});
    job.tiles.divide_sums();
    if (call.empty()) job.tiles.splits = 0;
    const Tensor parts = call.parts(job);
    job.norm = norm;
    job.grad = grads;
    job.kept = kept_data;
    if (masked) job.mask = static_cast<uint8_t*>(kept->data_ptr());
    job.residual_grad = kept ? residual_grad.data_ptr() : nullptr;
    job.activation = activation;
    if (!call.empty()) cuda::batch_norm_sums(job, call.device.stream());
    cuda::batch_norm_total(norm, job.dtype, job.parts, job.tiles.splits,
                           static_cast<double*>(sums.data_ptr()), grad_weight, grad_bias,
                           call.device.stream());
    return {residual_grad, sums};
}

Tensor input_grad(BatchNormCall& call, const Tensor& grad, const Norm& norm,
                  const ActivationFunction& activation) {
    Tensor result = call.empty_like_input();
    if (call.empty()) return result;
    const void* const grads = call.like_input(grad);
    BatchNormJob job = call.job({grads});
    job.tiles.divide_elements();
    job.norm = norm;
    job.grad = grads;
    job.y = result.data_ptr();
    job.activation = activation;
    cuda::batch_norm_backward(job, call.device.stream());
    return result;
}

Tensor batch_norm_stats(const Tensor& input) { return stats_of(BatchNormCall(input)); }

Tensor batch_norm_act_elemt(const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
                            const MaybeTensor& bias, const MaybeTensor& residual, double eps,
                            int64_t activation, double negative_slope) {
    BatchNormCall call(input);
    return act(call, call.norm(stats, weight, bias, eps), residual,
               function_of(activation, negative_slope));
}

std::tuple<Tensor, Tensor> batch_norm_relu_mask(const Tensor& input, const Tensor& stats,
                                                const MaybeTensor& weight, const MaybeTensor& bias,
                                                const Tensor& residual, double eps) {
    BatchNormCall call(input);
    Tensor mask = call.empty_vector(mask_bytes(input), ScalarType::Byte);
    const ActivationFunction relu{Activation::Relu, 0};
    Tensor output = act(call, call.norm(stats, weight, bias, eps), residual, relu, mask.data_ptr());
    return {output, mask};
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_reduce(
    const Tensor& grad, const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& kept, double eps, int64_t activation,
    double negative_slope) {
    BatchNormCall call(input);
    return sums_of(call, grad, call.norm(stats, weight, bias, eps), kept,
                   function_of(activation, negative_slope));
}

Tensor batch_norm_act_backward_elemt(const Tensor& grad, const Tensor& input, const Tensor& stats,
                                     const MaybeTensor& weight, const MaybeTensor& bias,
                                     const MaybeTensor& sums, double count, double eps,
                                     int64_t activation, double negative_slope) {
    BatchNormCall call(input);
    Norm norm = call.norm(stats, weight, bias, eps);
    if (sums) norm.sums = call.sums(*sums);
    norm.count = count;
    return input_grad(call, grad, norm, function_of(activation, negative_slope));
}

std::tuple<Tensor, Tensor> batch_norm_act_training(const Tensor& input, const MaybeTensor& weight,
                                                   const MaybeTensor& bias,
                                                   const MaybeTensor& residual, double eps,
                                                   int64_t activation, double negative_slope) {
    BatchNormCall call(input);
    Tensor stats = stats_of(call);
    Tensor output = act(call, call.norm(stats, weight, bias, eps), residual,
                        function_of(activation, negative_slope));
    return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_training_backward(
    const Tensor& grad, const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& kept, double eps, int64_t activation,
    double negative_slope) {
    BatchNormCall call(input);
    const auto gradient_of = [&](const MaybeTensor& vector) {
        return vector ? call.empty_vector(call.channels, vector->scalar_type())
                      : call.none(ScalarType::Double);
    };
    Tensor grad_weight = gradient_of(weight), grad_bias = gradient_of(bias);
    Norm norm = call.norm(stats, weight, bias, eps);
    const ActivationFunction function = function_of(activation, negative_slope);
    const auto [residual_grad, sums] =
        sums_of(call, grad, norm, kept, function,
                weight ? vector_of(grad_weight, call.channels) : ChannelVector(),
                bias ? vector_of(grad_bias, call.channels) : ChannelVector());
    norm.sums = static_cast<const double*>(sums.data_ptr());
    norm.count = call.count();
    // What is kept is gone through already.
    Tensor grad_input =
        kept ? input_grad(call, residual_grad, norm, {}) : input_grad(call, grad, norm, function);
    return {grad_input, residual_grad, grad_weight, grad_bias};
}

void batch_norm_update_running(Tensor running_mean, Tensor running_var, const Tensor& stats,
                               double count, double momentum) {
    const Device device(running_mean);
    const int64_t channels = running_mean.numel();
    const Tensor both = dense(stats, false);
    STD_TORCH_CHECK(both.scalar_type() == ScalarType::Double && both.numel() == 2 * channels,
                    "pooling_ext: stats must be two rows of float64");
    if (channels == 0) return;
    cuda::batch_norm_update_running(vector_of(running_mean, channels),
                                    vector_of(running_var, channels),
                                    static_cast<const double*>(both.data_ptr()), channels,
                                    count / (count - 1), momentum, device.stream());
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("batch_norm_stats", TORCH_BOX(&pooling_ext::batch_norm_stats));
    m.impl("batch_norm_act_elemt", TORCH_BOX(&pooling_ext::batch_norm_act_elemt));
    m.impl("batch_norm_relu_mask", TORCH_BOX(&pooling_ext::batch_norm_relu_mask));
    m.impl("batch_norm_act_backward_reduce",
           TORCH_BOX(&pooling_ext::batch_norm_act_backward_reduce));
    m.impl("batch_norm_act_backward_elemt", TORCH_BOX(&pooling_ext::batch_norm_act_backward_elemt));
    m.impl("batch_norm_act_training", TORCH_BOX(&pooling_ext::batch_norm_act_training));
    m.impl("batch_norm_act_training_backward",
           TORCH_BOX(&pooling_ext::batch_norm_act_training_backward));
    m.impl("batch_norm_update_running", TORCH_BOX(&pooling_ext::batch_norm_update_running));
}

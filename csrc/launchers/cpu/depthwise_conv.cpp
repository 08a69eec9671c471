// Launchers of depthwise convolution on the CPU. The operators are defined in
// pooling_ext/ops/depthwise_conv.py, which checks the arguments.
#include "kernels/cpu/conv/depthwise.h"
#include "launchers/cpu/direct_conv.h"

namespace pooling_ext {
namespace {

class DepthwiseCall : public DirectConvCall<DepthwiseJob> {
  public:
    // Of an input of `sizes`, with the dtype of `like`.
    DepthwiseCall(const Ints& sizes, const Tensor& like, const Ints& weight_size,
                  const Ints& stride, const Ints& padding, bool channels_last, DepthwiseStep step)
        : DirectConvCall(like, channels_last) {
        STD_TORCH_CHECK(sizes.size() == 4 && weight_size.size() == 4 && stride.size() == 2 &&
                            padding.size() == 2,
                        "pooling_ext: depthwise convolution takes batches of planes");
        const int64_t kernel = weight_size[2];
        STD_TORCH_CHECK(weight_size[0] == sizes[1] && weight_size[1] == 1 &&
                            weight_size[3] == kernel && (kernel == 3 || kernel == 5 || kernel == 7),
                        "pooling_ext: a depthwise kernel must be 3x3, 5x5 or 7x7 for each channel");
        for (size_t i = 0; i < 2; ++i)
            STD_TORCH_CHECK((stride[i] == 1 || stride[i] == 2) && padding[i] >= 0,
                            "pooling_ext: strides must be 1 or 2, and padding not negative");
        set_sizes(sizes, weight_size, stride, padding);
        job.kernel = kernel;
        job.in_place = channels_last && job.channels >= kDepthwiseBlock && dtype != DType::Float16;
        job.step = step;
    }

    void run(DepthwiseStep step, int64_t count, int64_t work) const {
        launch(kernels::depthwise(dtype, step), job, {count, work});
    }
    void run_blocks(DepthwiseStep step, int64_t work) const {
        run(step, job.blocks(), kDepthwiseBlock * work);
    }

    // The output or the input's gradient, after its weights.
    void convolve() {
        const ThreadScratch<kSlot> prepared(job.prepared_count() * job.wide);
        job.prepared = prepared.get();
        run_blocks(DepthwiseStep::Prepare, job.taps());
        const DepthwisePlan plan(job);
        run(job.step, plan.units, plan.work);
    }

    static constexpr int kSlot = 2;  // the kernels have another
};

DepthwiseCall forward_call(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                           const Ints& stride, const Ints& padding) {
    DepthwiseCall call(sizes_of(input), input, sizes_of(weight), stride, padding,
                       gives_channels_last(input, weight), DepthwiseStep::Forward);
    call.job.x = call.read(input, call.job.channels_last);
    call.job.weight = call.read_weight(weight, sizes_of(weight));
    if (bias) call.job.bias = call.read_weight(*bias, {call.job.channels});
    return call;
}

Tensor depthwise_conv(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                      Ints stride, Ints padding, int64_t activation, double slope) {
    DepthwiseCall call = forward_call(input, weight, bias, stride, padding);
    Tensor output = call.empty_output();
    call.job.activation = activation_of(activation);
    call.job.slope = slope;
    if (output.numel() > 0) call.convolve();
    return output;
}

std::tuple<Tensor, Tensor> depthwise_conv_stats(const Tensor& input, const Tensor& weight,
                                                const MaybeTensor& bias, Ints stride,
                                                Ints padding) {
    DepthwiseCall call = forward_call(input, weight, bias, stride, padding);
    DepthwiseJob& job = call.job;
    Tensor output = call.empty_output();
    Tensor stats = call.stats_of(output, [&] {
        const int64_t pieces = job.batch * DepthwisePlan(job).bands;
        const std::unique_ptr<double[]> moments(new double[pieces * 2 * job.padded_channels()]);
        job.moments = moments.get();
        call.convolve();
        call.run_blocks(DepthwiseStep::Merge, 8 * pieces);
    });
    return {output, stats};
}

Tensor depthwise_conv_input_grad(const Tensor& grad, const Tensor& weight, Ints input_size,
                                 Ints stride, Ints padding, bool channels_last) {
    DepthwiseCall call(input_size, grad, sizes_of(weight), stride, padding, channels_last,
                       DepthwiseStep::InputGrad);
    call.job.grad = call.read_grad(grad);
    call.job.weight = call.read_weight(weight, sizes_of(weight));
    Tensor result = empty(input_size, grad.scalar_type(), channels_last);
    call.job.y = result.data_ptr();
    if (result.numel() > 0) call.convolve();
    return result;
}

std::tuple<Tensor, Tensor> depthwise_conv_weight_grad(const Tensor& grad, const Tensor& input,
                                                      Ints weight_size, Ints stride, Ints padding,
                                                      bool channels_last, bool bias) {
    DepthwiseCall call(sizes_of(input), input, weight_size, stride, padding, channels_last,
                       DepthwiseStep::WeightGrad);
    DepthwiseJob& job = call.job;
    Tensor weight_grad = empty(weight_size, input.scalar_type(), false);
    Tensor bias_grad = empty({bias ? job.channels : 0}, input.scalar_type(), false);
    if (input.numel() == 0) {
        torch::stable::zero_(weight_grad);
        torch::stable::zero_(bias_grad);
        return {weight_grad, bias_grad};
    }
    job.x = call.read(input, job.channels_last);
    job.grad = call.read_grad(grad);
    job.weight_grad = weight_grad.data_ptr();
    job.bias_grad = bias ? bias_grad.data_ptr() : nullptr;
    const DepthwisePlan plan(job);
    const int64_t sums = plan.pieces * (job.taps() + 1) * job.padded_channels();
    const ThreadScratch<DepthwiseCall::kSlot> memory(sums * job.wide);
    job.sums = memory.get();
    call.run(DepthwiseStep::WeightGrad, plan.units, plan.work);
    call.run_blocks(DepthwiseStep::Total, job.taps() * plan.pieces);
    return {weight_grad, bias_grad};
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("depthwise_conv", TORCH_BOX(&pooling_ext::depthwise_conv));
    m.impl("depthwise_conv_stats", TORCH_BOX(&pooling_ext::depthwise_conv_stats));
    m.impl("depthwise_conv_input_grad", TORCH_BOX(&pooling_ext::depthwise_conv_input_grad));
    m.impl("depthwise_conv_weight_grad", TORCH_BOX(&pooling_ext::depthwise_conv_weight_grad));
}

// Launchers of the convolution of images on the CPU. The operators are defined in
// pooling_ext/ops/image_conv.py, which checks the arguments.
#include "kernels/cpu/conv/image.h"
#include "launchers/cpu/direct_conv.h"
#include "launchers/cpu/non_temporal.h"

namespace pooling_ext {
namespace {

class ImageCall : public DirectConvCall<ImageJob> {
  public:
    ImageCall(const Tensor& input, const Ints& weight_size, const Ints& stride, const Ints& padding,
              bool channels_last)
        : DirectConvCall(input, channels_last) {
        const Ints sizes = sizes_of(input);
        STD_TORCH_CHECK(sizes.size() == 4 && weight_size.size() == 4 && stride.size() == 2 &&
                            padding.size() == 2 && weight_size[1] == sizes[1],
                        "pooling_ext: a convolution of images takes a batch of them, and a weight "
                        "of as many channels");
        for (size_t i = 0; i < 2; ++i)
            STD_TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && weight_size[2 + i] > 0,
                            "pooling_ext: strides and kernels must be positive, and padding not "
                            "negative");
        set_sizes(sizes, weight_size, stride, padding);
        job.features = weight_size[0];
        job.h.kernel = weight_size[2];
        job.w.kernel = weight_size[3];
        job.image_last = input.numel() > 0 && suggests_channels_last(input, 2);
        job.x = read(input, job.image_last);
    }

    void run(ImageStep step, int64_t count, int64_t work) const {
        launch(kernels::image(dtype, step), job, {count, work});
    }

    Tensor output() {
        Tensor result = empty_output();
        const int64_t size = result.element_size();
        const int64_t run = (job.channels_last ? job.features : job.w.out) * size;
        job.non_temporal = goes_past_cache(job.y, result.numel() * size, run);
        return result;
    }

    void convolve(const Tensor& weight, const MaybeTensor& bias) {
        job.weight = read_weight(weight, {job.features, job.channels, job.h.kernel, job.w.kernel});
        if (bias) job.bias = read_weight(*bias, {job.features});
        const ThreadScratch<kSlot> prepared(job.prepared_count() * job.wide);
        job.prepared = prepared.get();
        run(ImageStep::Prepare, 1, 0);
        const ImagePlan plan(job);
        run(ImageStep::Forward, plan.all_bands(job), plan.work);
    }

    static constexpr int kSlot = 3;  // the kernels have another
};

Tensor image_conv(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, Ints stride,
                  Ints padding, int64_t activation, double slope) {
    ImageCall call(input, sizes_of(weight), stride, padding, gives_channels_last(input, weight));
    Tensor output = call.output();
    call.job.activation = activation_of(activation);
    call.job.slope = slope;
    if (output.numel() > 0) call.convolve(weight, bias);
    return output;
}

std::tuple<Tensor, Tensor> image_conv_stats(const Tensor& input, const Tensor& weight,
                                            const MaybeTensor& bias, Ints stride, Ints padding) {
    ImageCall call(input, sizes_of(weight), stride, padding, gives_channels_last(input, weight));
    ImageJob& job = call.job;
    Tensor output = call.output();
    Tensor stats = call.stats_of(output, [&] {
        const int64_t pieces = ImagePlan(job).all_bands(job);
        const std::unique_ptr<double[]> moments(new double[pieces * 2 * job.padded_features()]);
        job.moments = moments.get();
        call.convolve(weight, bias);
        call.run(ImageStep::Merge, job.features, 8 * pieces);
    });
    return {output, stats};
}

Tensor image_conv_weight_grad(const Tensor& grad, const Tensor& input, Ints weight_size,
                              Ints stride, Ints padding) {
    ImageCall call(input, weight_size, stride, padding, suggests_channels_last(grad, 2));
    ImageJob& job = call.job;
    Tensor weight_grad = empty(weight_size, input.scalar_type(), false);
    if (input.numel() == 0) {
        torch::stable::zero_(weight_grad);
        return weight_grad;
    }
    job.grad = call.read_grad(grad);
    job.weight_grad = weight_grad.data_ptr();
    const ImagePlan plan(job);
    const ThreadScratch<ImageCall::kSlot> sums(plan.pieces * job.depth() * job.padded_features() *
                                               job.wide);
    job.sums = sums.get();
    call.run(ImageStep::WeightGrad, plan.pieces, plan.work * plan.all_bands(job) / plan.pieces);
    call.run(ImageStep::Total, job.features, job.depth() * plan.pieces);
    return weight_grad;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("image_conv", TORCH_BOX(&pooling_ext::image_conv));
    m.impl("image_conv_stats", TORCH_BOX(&pooling_ext::image_conv_stats));
    m.impl("image_conv_weight_grad", TORCH_BOX(&pooling_ext::image_conv_weight_grad));
}

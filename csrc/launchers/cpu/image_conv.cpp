// Launchers of the convolution of images on the CPU. The operators are defined in
// pooling_ext/ops/image_conv.py, which checks the arguments.
#include <algorithm>

#include "kernels/cpu/conv/image.h"
#include "launchers/activation.h"
#include "launchers/cpu/launch.h"
#include "launchers/cpu/non_temporal.h"

namespace pooling_ext {
namespace {

using MaybeTensor = std::optional<Tensor>;

class ImageCall {
  public:
    ImageJob job;
    const DType dtype;

    ImageCall(const Tensor& input, const Ints& weight_size, const Ints& stride, const Ints& padding,
              bool channels_last)
        : dtype(dtype_of(input)), type_(input.scalar_type()) {
        const Ints sizes = sizes_of(input);
        STD_TORCH_CHECK(sizes.size() == 4 && weight_size.size() == 4 && stride.size() == 2 &&
                            padding.size() == 2 && weight_size[1] == sizes[1],
                        "pooling_ext: a convolution of images takes a batch of them, and a weight "
                        "of as many channels");
        job.batch = sizes[0];
        job.channels = sizes[1];
        job.features = weight_size[0];
        job.wide = dtype == DType::Float64 ? 8 : 4;
        job.channels_last = channels_last;
        job.image_last = input.numel() > 0 && suggests_channels_last(input, 2);
        ImageAxis* const axes[] = {&job.h, &job.w};
        for (int i = 0; i < 2; ++i) {
            const int64_t in = sizes[2 + i], kernel = weight_size[2 + i];
            STD_TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && kernel > 0,
                            "pooling_ext: strides and kernels must be positive, and padding not "
                            "negative");
            *axes[i] = {in, output_size(in, kernel, stride[i], padding[i], padding[i], 1, false),
                        kernel, stride[i], padding[i]};
            STD_TORCH_CHECK(axes[i]->out > 0, "pooling_ext: the kernel does not fit the input");
        }
        job.x = read(input, job.image_last);
    }

    Ints output_shape() const { return {job.batch, job.features, job.h.out, job.w.out}; }

    const void* read_weight(const Tensor& x, const Ints& sizes) {
        STD_TORCH_CHECK(sizes_of(x) == sizes && dtype_of(x) == dtype,
                        "pooling_ext: weight and bias must have the convolution's shape and dtype");
        return read(x, false);
    }
    const void* read_grad(const Tensor& x) {
        STD_TORCH_CHECK(sizes_of(x) == output_shape() && dtype_of(x) == dtype,
                        "pooling_ext: grad must have the output's shape and dtype");
        return read(x, job.channels_last);
    }

    void run(ImageStep step, int64_t count, int64_t work) const {
        launch(kernels::image(dtype, step), job, {count, work});
    }

    Tensor output() {
        Tensor result = empty(output_shape(), type_, job.channels_last);
        job.y = result.data_ptr();
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

  private:
    const void* read(const Tensor& x, bool last) {
        kept_.push_back(dense(x, last));
        return kept_.back().data_ptr();
    }

    const ScalarType type_;
    std::vector<Tensor> kept_;
};

bool gives_channels_last(const Tensor& input, const Tensor& weight) {
    return suggests_channels_last(input, 2) || suggests_channels_last(weight, 2);
}

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
    Tensor stats = empty({2, job.features}, ScalarType::Double, false);
    job.stats = static_cast<double*>(stats.data_ptr());
    if (output.numel() == 0) {
        std::fill(job.stats, job.stats + 2 * job.features, 0.0);
        return {output, stats};
    }
    const int64_t pieces = ImagePlan(job).all_bands(job);
    const std::unique_ptr<double[]> moments(new double[pieces * 2 * job.padded_features()]);
    job.moments = moments.get();
    call.convolve(weight, bias);
    call.run(ImageStep::Merge, job.features, 8 * pieces);
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

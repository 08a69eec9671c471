// Launchers of batch normalization, ReLU and max pooling as one operator on a GPU, which is defined
// in pooling_ext/ops/batch_norm_relu_max_pool.py.
#include "kernels/cuda/norm/batch_norm_relu_max_pool.h"

#include "launchers/cuda/batch_norm_call.h"

namespace pooling_ext {
namespace {

// What all operators are given.
struct BnReluMaxPoolCall {
    BatchNormCall norm;
    Ints out;
    cuda::BnReluMaxPoolJob job;

    BnReluMaxPoolCall(const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
                      const MaybeTensor& bias, double eps, const Windows& windows)
        : norm(input),
          out(output_sizes(sizes_of(input), windows)),
          job({params_of(sizes_of(input), windows, norm.channels_last)}, dtype_of(input),
              norm.channels_last) {
        STD_TORCH_CHECK(input.dim() == 4, "pooling_ext: input must have four dimensions");
        STD_TORCH_CHECK(job.pool.p.window_size() <= kByteWindow,
                        "pooling_ext: kernel_size must have at most 255 elements");
        job.norm = norm.norm(stats, weight, bias, eps);
        job.x = norm.input.data_ptr();
    }

    Tensor empty_output(ScalarType dtype) const {
        return norm.device.empty(out, dtype, norm.channels_last);
    }

    // The normalization as the kernels of windows read it.
    void make_coefficients() {
        const bool wide = norm.input.scalar_type() == ScalarType::Double;
        kept_.push_back(
            norm.empty_vector(5 * norm.channels, wide ? ScalarType::Double : ScalarType::Float));
        job.coefficients = kept_.back().data_ptr();
        cuda::stem_coefficients(job, norm.device.stream());
    }

    void with_gradient(const Tensor& grad, const Tensor& offsets) {
        STD_TORCH_CHECK(sizes_of(grad) == out && sizes_of(offsets) == out &&
                            grad.scalar_type() == norm.input.scalar_type() &&
                            offsets.scalar_type() == ScalarType::Byte,
                        "pooling_ext: grad and offsets must have the output's size");
        kept_.push_back(dense(grad, norm.channels_last));
        job.pool.src = kept_.back().data_ptr();
        kept_.push_back(dense(offsets, norm.channels_last));
        job.pool.offsets_in = kept_.back().data_ptr();
    }

    void forward(const Tensor& output, void* offsets) {
        if (output.numel() == 0) return;
        job.pool.src = norm.input.data_ptr();
        job.pool.dst = output.data_ptr();
        job.pool.offsets_out = offsets;
        make_coefficients();
        cuda::stem_forward(job, norm.device.stream());
    }

  private:
    std::vector<Tensor> kept_;
};

Tensor pooled(const Tensor& input, const Tensor& stats, MaybeTensor weight, MaybeTensor bias,
              double eps, Ints output_size, Ints kernel_size, Ints stride, Ints padding,
              Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    Tensor output = call.empty_output(input.scalar_type());
    call.forward(output, nullptr);
    return output;
}

std::tuple<Tensor, Tensor, Tensor> pooled_winners(const Tensor& input, const Tensor& stats,
                                                  MaybeTensor weight, MaybeTensor bias, double eps,
                                                  Ints output_size, Ints kernel_size, Ints stride,
                                                  Ints padding, Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    Tensor output = call.empty_output(input.scalar_type());
    Tensor offsets = call.empty_output(ScalarType::Byte);
    Tensor winners = call.empty_output(input.scalar_type());
    call.job.winners = winners.data_ptr();
    call.forward(output, offsets.data_ptr());
    return {output, offsets, winners};
}

Tensor backward(const Tensor& grad, const Tensor& offsets, const Tensor& input, const Tensor& stats,
                MaybeTensor weight, MaybeTensor bias, MaybeTensor sums, double count, double eps,
                Ints output_size, Ints kernel_size, Ints stride, Ints padding, Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    call.with_gradient(grad, offsets);
    Tensor result = call.norm.empty_like_input();
    if (call.norm.empty()) return result;
    if (sums) call.job.norm.sums = call.norm.sums(*sums);
    call.job.norm.count = count;
    call.job.pool.dst = result.data_ptr();
    call.make_coefficients();
    cuda::stem_backward(call.job, call.norm.device.stream());
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("batch_norm_relu_max_pool", TORCH_BOX(&pooling_ext::pooled));
    m.impl("batch_norm_relu_max_pool_winners", TORCH_BOX(&pooling_ext::pooled_winners));
    m.impl("batch_norm_relu_max_pool_backward_elemt", TORCH_BOX(&pooling_ext::backward));
}

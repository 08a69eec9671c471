// Launchers of the convolutions with fused prologues and epilogues. The operators are defined in
// pooling_ext/ops/cuda_conv.py.
#include "kernels/cuda/conv/conv.h"

#include <optional>
#include <string>
#include <tuple>

#include "launchers/cuda/device.h"

namespace pooling_ext {
namespace {

using MaybeTensor = std::optional<Tensor>;
using cuda::Numbers;

// What offsets within an image, a window and a row of the weights have to stay below.
constexpr int64_t kMost = int64_t(1) << 30;

bool is_16_bits(DType dtype) { return dtype == DType::BFloat16 || dtype == DType::Float16; }

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// A convolution's tensors, dense in channels_last, and what the kernels are told of them.
class ConvCall {
  public:
    ConvCall(const Tensor& x, const Tensor& w, const MaybeTensor& bias, const Ints& stride,
             const Ints& padding, const Ints& dilation, int64_t tile)
        : device_(x), input_(dense(x, true)), weight_(dense(w, true)), dtype_(dtype_of(x)) {
        STD_TORCH_CHECK(dtype_ == DType::Float32 || is_16_bits(dtype_),
                        "pooling_ext: input must be float32, bfloat16 or float16");
        const auto in = input_.sizes(), window = weight_.sizes();
        STD_TORCH_CHECK(x.dim() == 4 && w.dim() == 4 && window[1] == in[1] && weight_.numel() > 0 &&
                            w.scalar_type() == x.scalar_type(),
                        "pooling_ext: weight does not go with input");
        STD_TORCH_CHECK(tile >= 0 && tile < cuda::kConvTileCount, "pooling_ext: there is no tile ",
                        tile);
        job_.input = input_.data_ptr();
        job_.weight = weight_.data_ptr();
        job_.channels = checked(in[1]);
        job_.features = checked(window[0]);
        job_.height = checked(in[2]);
        job_.width = checked(in[3]);
        job_.kernel_h = checked(window[2]);
        job_.kernel_w = checked(window[3]);
        STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                        "pooling_ext: stride, padding and dilation must be pairs");
        job_.stride_h = checked(stride[0]);
        job_.stride_w = checked(stride[1]);
        job_.padding_h = checked(padding[0]);
        job_.padding_w = checked(padding[1]);
        job_.dilation_h = checked(dilation[0]);
        job_.dilation_w = checked(dilation[1]);
        job_.out_height = windows(in[2], window[2], stride[0], padding[0], dilation[0]);
        job_.out_width = windows(in[3], window[3], stride[1], padding[1], dilation[1]);
        checked(in[1] * window[2] * window[3]);
        checked((in[2] + 2 * padding[0]) * (in[3] + 2 * padding[1]));
        job_.pixels = in[0] * job_.out_height * job_.out_width;
        output_ = device_.empty({in[0], window[0], job_.out_height, job_.out_width},
                                x.scalar_type(), true);
        job_.output = output_.data_ptr();
        job_.bias = numbers(bias, window[0]);
        job_.tile = int(tile);
        const int64_t vector = is_16_bits(dtype_) ? 8 : 4;
        job_.vectors_in = in[1] % vector == 0 && is_aligned(job_.input) && is_aligned(job_.weight);
        job_.vectors_out = window[0] % vector == 0 && is_aligned(job_.output);
    }

    const Tensor& output() const { return output_; }

    void add(const Tensor& residual) {
        STD_TORCH_CHECK(sizes_of(residual) == sizes_of(output_) &&
                            residual.scalar_type() == output_.scalar_type(),
                        "pooling_ext: residual must be like the output");
        residual_ = dense(residual, true);
        job_.residual = residual_->data_ptr();
        job_.vectors_out = job_.vectors_out && is_aligned(job_.residual);
    }

    void normalize(const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                   double eps, bool relu) {
        const Numbers scale = numbers(weight, job_.channels), shift = numbers(bias, job_.channels);
        STD_TORCH_CHECK(sizes_of(stats) == Ints({2, job_.channels}) &&
                            stats.scalar_type() == ScalarType::Double,
                        "pooling_ext: stats must be two rows of float64");
        const Tensor rows = dense(stats, false);
        affine_ = device_.empty({3, job_.channels}, ScalarType::Float, false);
        float* const affine = static_cast<float*>(affine_->data_ptr());
        cuda::batch_norm_affine(static_cast<const double*>(rows.data_ptr()), scale, shift, eps,
                                job_.channels, affine, device_.stream());
        job_.affine = affine;
        job_.prologue_relu = relu;
        // Rows of the coefficients are read as the input is.
        job_.vectors_in = job_.vectors_in && is_aligned(affine);
    }

    void run(bool relu) {
        job_.relu = relu;
        if (job_.pixels == 0) return;
        const auto kernel = dtype_ == DType::Float32    ? cuda::conv_float32
                            : dtype_ == DType::BFloat16 ? cuda::conv_bfloat16
                                                        : cuda::conv_float16;
        kernel(job_, device_.stream());
    }

    // Runs it and returns the statistics of the output.
    Tensor run_with_statistics() {
        cuda::CombineJob combine;
        combine.channels = job_.features;
        combine.total = job_.pixels;
        combine.unit = tile_pixels();
        combine.tiles = ceil_div(job_.pixels, combine.unit);
        combine.wide = dtype_ == DType::Float32;
        Tensor partials =
            device_.empty({combine.tiles, 2, job_.features},
                          combine.wide ? ScalarType::Double : ScalarType::Float, false);
        job_.partials = partials.data_ptr();
        run(false);
        for (;;) {
            const int64_t parts = combine.parts();
            Tensor combined =
                parts == 1 ? device_.empty({2, job_.features}, ScalarType::Double, false)
                           : device_.empty({parts, 2, job_.features}, ScalarType::Double, false);
            combine.partials = partials.data_ptr();
            combine.output = static_cast<double*>(combined.data_ptr());
            cuda::combine_means(combine, device_.stream());
            if (parts == 1) return combined;
            partials = combined;
            combine.wide = true;
            combine.tiles = parts;
            combine.unit *= cuda::kCombined;
        }
    }

  private:
    static int checked(int64_t value) {
        STD_TORCH_CHECK(value >= 0 && value < kMost,
                        "pooling_ext: the convolution is too large for the CUDA kernels");
        return int(value);
    }

    // How many windows there are along an axis.
    static int windows(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                       int64_t dilation) {
        const int64_t room = checked(in + 2 * padding) - checked(dilation * (kernel - 1)) - 1;
        STD_TORCH_CHECK(stride > 0 && dilation > 0 && room >= 0,
                        "pooling_ext: the windows do not go with the input's size");
        return int(room / stride) + 1;
    }

    Numbers numbers(const MaybeTensor& tensor, int64_t count) {
        if (!tensor) return {};
        STD_TORCH_CHECK(tensor->dim() == 1 && tensor->numel() == count,
                        "pooling_ext: there must be a number for each channel");
        const DType dtype = dtype_of(*tensor);
        STD_TORCH_CHECK(dtype == DType::Float32 || dtype == DType::Float64 || is_16_bits(dtype),
                        "pooling_ext: a channel's number must be floating-point");
        numbers_.push_back(dense(*tensor, false));
        return {numbers_.back().data_ptr(), dtype};
    }

    int64_t tile_pixels() const {
        return cuda::kConvTiles[job_.vectors_in ? job_.tile : cuda::kConvTileCount - 1].pixels;
    }

    Device device_;
    Tensor input_, weight_, output_;
    std::optional<Tensor> residual_, affine_;
    std::vector<Tensor> numbers_;
    DType dtype_;
    cuda::ConvJob job_;
};

Tensor conv_bias_act(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& residual, Ints stride, Ints padding, Ints dilation,
                     bool relu, int64_t tile) {
    ConvCall call(input, weight, bias, stride, padding, dilation, tile);
    if (residual) call.add(*residual);
    call.run(relu);
    return call.output();
}

std::tuple<Tensor, Tensor> conv_stats(const Tensor& input, const Tensor& weight,
                                      const MaybeTensor& bias, const MaybeTensor& stats,
                                      const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                                      double eps, bool relu, Ints stride, Ints padding,
                                      Ints dilation, int64_t tile) {
    ConvCall call(input, weight, bias, stride, padding, dilation, tile);
    if (stats) call.normalize(*stats, bn_weight, bn_bias, eps, relu);
    Tensor output_stats = call.run_with_statistics();
    return {call.output(), output_stats};
}

}  // namespace
}  // namespace pooling_ext

// The tiles there are, for Python: "pixels channels stages" of each, between semicolons.
extern "C" __attribute__((visibility("default"))) const char* pooling_ext_cuda_conv_tiles() {
    static const std::string text = [] {
        std::string all;
        for (const auto& tile : pooling_ext::cuda::kConvTiles) {
            if (!all.empty()) all += ";";
            for (const auto part : {tile.pixels, tile.channels, tile.stages})
                all += std::to_string(part) + " ";
            all.pop_back();
        }
        return all;
    }();
    return text.c_str();
}

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("conv_bias_act_cuda", TORCH_BOX(&pooling_ext::conv_bias_act));
    m.impl("conv_stats_cuda", TORCH_BOX(&pooling_ext::conv_stats));
}

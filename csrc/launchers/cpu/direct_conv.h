// What the launchers of direct convolutions on the CPU share: a call's tensors, its axes and its
// statistics.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "launchers/activation.h"
#include "launchers/cpu/launch.h"

namespace pooling_ext {

using MaybeTensor = std::optional<Tensor>;

inline bool gives_channels_last(const Tensor& input, const Tensor& weight) {
    return suggests_channels_last(input, 2) || suggests_channels_last(weight, 2);
}

// A call with a job of batches of planes.
template <class Job>
class DirectConvCall {
  public:
    Job job;
    const DType dtype;

    Ints output_shape() const { return {job.batch, features_, job.h.out, job.w.out}; }

    // The data of the output's gradient, dense in the output's layout.
    const void* read_grad(const Tensor& x) {
        STD_TORCH_CHECK(sizes_of(x) == output_shape() && dtype_of(x) == dtype,
                        "pooling_ext: grad must have the output's shape and dtype");
        return read(x, job.channels_last);
    }
    const void* read_weight(const Tensor& x, const Ints& sizes) {
        STD_TORCH_CHECK(sizes_of(x) == sizes && dtype_of(x) == dtype,
                        "pooling_ext: weight and bias must have the convolution's shape and dtype");
        return read(x, false);
    }
    // That of any tensor.
    const void* read(const Tensor& x, bool channels_last) {
        kept_.push_back(dense(x, channels_last));
        return kept_.back().data_ptr();
    }

    // The output, still to be written.
    Tensor empty_output() {
        Tensor result = empty(output_shape(), type_, job.channels_last);
        job.y = result.data_ptr();
        return result;
    }

    // Means and variances of the output's channels: what `make` writes, or zeros where the output
    // has no elements.
    template <class Make>
    Tensor stats_of(const Tensor& output, const Make& make) {
        Tensor result = empty({2, features_}, ScalarType::Double, false);
        job.stats = static_cast<double*>(result.data_ptr());
        if (output.numel() > 0)
            make();
        else
            std::fill(job.stats, job.stats + 2 * features_, 0.0);
        return result;
    }

  protected:
    // Of tensors with the dtype of `like`.
    DirectConvCall(const Tensor& like, bool channels_last)
        : dtype(dtype_of(like)), type_(like.scalar_type()) {
        job.channels_last = channels_last;
        job.wide = dtype == DType::Float64 ? 8 : 4;
    }

    // Sets batch, channels and axes, for an input and a weight of four dimensions.
    void set_sizes(const Ints& sizes, const Ints& weight_size, const Ints& stride,
                   const Ints& padding) {
        job.batch = sizes[0];
        job.channels = sizes[1];
        features_ = weight_size[0];
        const auto set = [&](auto& axis, size_t i) {
            axis.in = sizes[2 + i];
            axis.stride = stride[i];
            axis.padding = padding[i];
            axis.out = output_size(axis.in, weight_size[2 + i], axis.stride, axis.padding,
                                   axis.padding, 1, false);
            STD_TORCH_CHECK(axis.out > 0, "pooling_ext: the kernel does not fit the input");
        };
        set(job.h, 0);
        set(job.w, 1);
    }

  private:
    const ScalarType type_;
    int64_t features_ = 0;
    std::vector<Tensor> kept_;
};

}  // namespace pooling_ext

// From tensors to batch normalization's kernels on a GPU: what its launchers share.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "kernels/cuda/norm/batch_norm.h"
#include "launchers/cuda/device.h"

namespace pooling_ext {

using MaybeTensor = std::optional<Tensor>;

// A vector as kernels read it, whatever its stride.
inline cuda::ChannelVector vector_of(const Tensor& x, int64_t channels) {
    STD_TORCH_CHECK(x.dim() == 1 && x.numel() == channels,
                    "pooling_ext: vectors must have a value per channel");
    const DType dtype = dtype_of(x);
    STD_TORCH_CHECK(dtype == DType::Float32 || dtype == DType::Float64 ||
                        dtype == DType::BFloat16 || dtype == DType::Float16,
                    "pooling_ext: vectors of channels must be floating-point");
    return {x.data_ptr(), dtype, x.strides()[0]};
}

// An input and the tensors that lie as it does.
struct BatchNormCall {
    bool channels_last;
    Device device;
    Tensor input;
    int64_t batch, channels, inner = 1;
    std::vector<Tensor> kept;  // copies that are read

    explicit BatchNormCall(const Tensor& x)
        : channels_last(suggests_channels_last(x, x.dim() - 2)),
          device(x),
          input(dense(x, channels_last)) {
        const Ints sizes = sizes_of(x);
        batch = sizes[0];
        channels = sizes[1];
        for (size_t i = 2; i < sizes.size(); ++i) inner *= sizes[i];
    }

    bool empty() const { return input.numel() == 0; }

    // How many elements each channel's statistics are taken from.
    double count() const { return double(batch * inner); }

    Tensor empty_like_input() const {
        return device.empty(sizes_of(input), input.scalar_type(), channels_last);
    }
    Tensor empty_vector(int64_t n, ScalarType dtype) const {
        return device.empty({n}, dtype, false);
    }
    Tensor empty_sums() const { return device.empty({2, channels}, ScalarType::Double, false); }
    // What stands for a tensor that there is not.
    Tensor none(ScalarType dtype) const { return empty_vector(0, dtype); }

    // The data of a tensor of the input's shape and dtype, in the input's format.
    const void* like_input(const Tensor& x) {
        STD_TORCH_CHECK(sizes_of(x) == sizes_of(input) && x.scalar_type() == input.scalar_type(),
                        "pooling_ext: tensors must have input's shape and dtype");
        kept.push_back(dense(x, channels_last));
        return kept.back().data_ptr();
    }

    cuda::ChannelVector vector(const MaybeTensor& x) const {
        return x ? vector_of(*x, channels) : cuda::ChannelVector();
    }

    // Two rows of float64.
    const double* sums(const Tensor& x) {
        STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.numel() == 2 * channels,
                        "pooling_ext: stats and sums must be two rows of float64");
        kept.push_back(dense(x, false));
        return static_cast<const double*>(kept.back().data_ptr());
    }

    cuda::Norm norm(const Tensor& stats, const MaybeTensor& weight, const MaybeTensor& bias,
                    double eps) {
        cuda::Norm norm;
        norm.stats = sums(stats);
        norm.weight = vector(weight);
        norm.bias = vector(bias);
        norm.eps = eps;
        norm.channels = channels;
        return norm;
    }

    // With one pixel the formats are the same, and rows over channels are the longer ones.
    bool walks_pixels() const { return channels_last || inner == 1; }

    // A job on the input that reads `others` too.
    cuda::BatchNormJob job(std::initializer_list<const void*> others = {}) const {
        return walks_pixels() ? job(others, batch * inner, channels, 1)
                              : job(others, batch, channels, inner);
    }

    // A job on the input as some rows of channels of its own.
    cuda::BatchNormJob job(std::initializer_list<const void*> others, int64_t rows,
                           int64_t channels, int64_t inner, int64_t line = 128) const {
        bool aligned = reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 == 0;
        for (const void* data : others)
            aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
        cuda::BatchNormJob job(cuda::ChannelTiles(rows, channels, inner,
                                                  int64_t(input.element_size()), aligned, line));
        job.dtype = dtype_of(input);
        job.x = input.data_ptr();
        return job;
    }

    // Memory for the sums of every split of a job.
    Tensor parts(cuda::BatchNormJob& job) const {
        Tensor parts = empty_vector(job.tiles.splits * 2 * channels, ScalarType::Double);
        job.parts = static_cast<double*>(parts.data_ptr());
        return parts;
    }
};

}  // namespace pooling_ext

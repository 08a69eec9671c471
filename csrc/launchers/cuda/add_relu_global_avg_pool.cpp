// Launchers of residual add, ReLU and global average pooling as one operator on a GPU, which is
// defined in pooling_ext/ops/add_relu_global_avg_pool.py.
#include "launchers/cuda/batch_norm_call.h"

namespace pooling_ext {
namespace {

cuda::BatchNormJob job_of(const BatchNormCall& call, const void* residual) {
    const auto aligned = [](const void* data) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0;
    };
    const void* const x = call.input.data_ptr();
    cuda::BatchNormJob job =
        cuda::plane_job(call.batch, call.channels, call.inner, call.walks_pixels(),
                        int64_t(call.input.element_size()), aligned(x) && aligned(residual));
    job.dtype = dtype_of(call.input);
    job.x = x;
    job.residual = residual;
    return job;
}

Tensor pooled(const Tensor& input, const Tensor& residual) {
    BatchNormCall call(input);
    STD_TORCH_CHECK(input.dim() == 4 && call.inner > 0,
                    "pooling_ext: input must have four dimensions and a pixel");
    Tensor output = call.device.empty({call.batch, call.channels, 1, 1}, input.scalar_type(),
                                      call.channels_last);
    if (call.empty()) return output;
    cuda::BatchNormJob job = job_of(call, call.like_input(residual));
    job.y = output.data_ptr();
    std::optional<Tensor> parts;
    if (job.plane_splits > 1) {
        parts = call.empty_vector(job.tiles.splits * job.tiles.channels, ScalarType::Double);
        job.parts = static_cast<double*>(parts->data_ptr());
    }
    cuda::global_mean(job, call.device.stream());
    return output;
}

Tensor backward(const Tensor& grad, const Tensor& input, const Tensor& residual) {
    BatchNormCall call(input);
    STD_TORCH_CHECK(
        grad.numel() == call.batch * call.channels && grad.scalar_type() == input.scalar_type(),
        "pooling_ext: grad must have the output's size and dtype");
    Tensor result = call.empty_like_input();
    if (call.empty()) return result;
    const Tensor shares = dense(grad, false);
    cuda::BatchNormJob job = job_of(call, call.like_input(residual));
    job.grad = shares.data_ptr();
    job.y = result.data_ptr();
    cuda::add_relu_mean_backward(job, call.device.stream());
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("add_relu_global_avg_pool", TORCH_BOX(&pooling_ext::pooled));
    m.impl("add_relu_global_avg_pool_backward", TORCH_BOX(&pooling_ext::backward));
}

// Launchers of residual add, ReLU and global average pooling as one operator on the CPU, which is
// defined in pooling_ext/ops/add_relu_global_avg_pool.py.
#include "kernels/cpu/norm/add_relu_global_avg_pool.h"

#include "launchers/cpu/batch_norm_launch.h"

namespace pooling_ext {
namespace {

void run(BatchNormCall& call, bool backward) {
    BatchNormJob& job = call.job;
    if (job.numel() == 0) return;
    const int64_t units = job.channels_last ? job.batch : job.batch * job.channels;
    launch(kernels::add_relu_mean(dtype_of(call.input), backward), job,
           {units, job.numel() / units});
}

Tensor pooled(const Tensor& input, const Tensor& residual) {
    BatchNormCall call(input);
    STD_TORCH_CHECK(input.dim() == 4 && call.job.inner > 0,
                    "pooling_ext: input must have four dimensions and a pixel");
    Tensor output =
        empty({call.job.batch, call.job.channels, 1, 1}, input.scalar_type(), call.channels_last);
    call.job.residual = call.like_input(residual);
    call.job.y = output.data_ptr();
    run(call, false);
    return output;
}

Tensor backward(const Tensor& grad, const Tensor& input, const Tensor& residual) {
    BatchNormCall call(input);
    STD_TORCH_CHECK(grad.numel() == call.job.batch * call.job.channels &&
                        grad.scalar_type() == input.scalar_type(),
                    "pooling_ext: grad must have the output's size and dtype");
    const Tensor shares = dense(grad, false);
    Tensor result = call.empty_like_input();
    call.job.residual = call.like_input(residual);
    call.job.grad = shares.data_ptr();
    call.job.y = result.data_ptr();
    run(call, true);
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("add_relu_global_avg_pool", TORCH_BOX(&pooling_ext::pooled));
    m.impl("add_relu_global_avg_pool_backward", TORCH_BOX(&pooling_ext::backward));
}

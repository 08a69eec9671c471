// Launchers of average pooling, for each device. The operators are defined in
// pooling_ext/ops/avg_pool.py.
#include "launchers/forward_call.h"
#ifdef POOLING_EXT_CUDA
#include "kernels/cuda/pool/avg_pool.h"
#else
#include "kernels/cpu/pool/avg_pool.h"
#endif

namespace pooling_ext {
namespace {

#ifdef POOLING_EXT_CUDA
void run(const Device& device, const PoolJob& job, DType dtype) {
    std::optional<Tensor> memory;
    double* parts = nullptr;
    if (const int64_t n = cuda::avg_pool_parts(job, dtype)) {
        memory = device.empty({n}, ScalarType::Double, false);
        parts = static_cast<double*>(memory->data_ptr());
    }
    cuda::avg_pool(job, dtype, parts, device.stream());
}

void run_backward(const Device& device, const PoolJob& job, DType dtype) {
    cuda::avg_pool_backward(job, dtype, device.stream());
}
#else
void run(const Device&, const PoolJob& job, DType dtype) {
    run_forward(kernels::avg_pool(dtype), job, dtype, true);
}

void run_backward(const Device&, const PoolJob& call, DType dtype) {
    Job job{call};
    const Rows rows = plan_avg_backward(job, int64_t(size_of(dtype)));
    launch(kernels::avg_pool_backward(dtype), job, rows);
}
#endif

Tensor avg_pool(const Tensor& input, Ints output_size, Ints kernel_size, Ints stride, Ints padding,
                Ints dilation, bool count_include_pad, std::optional<int64_t> divisor_override) {
    Forward call(input, {output_size, kernel_size, stride, padding, dilation});
    call.job.count_include_pad = count_include_pad;
    call.job.divisor = divisor_override.value_or(0);
    if (call.any()) run(call.device, call.job, dtype_of(input));
    return call.output;
}

Tensor avg_pool_backward(const Tensor& grad, Ints input_size, bool channels_last, Ints output_size,
                         Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                         bool count_include_pad, std::optional<int64_t> divisor_override) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    STD_TORCH_CHECK(sizes_of(grad) == output_sizes(input_size, windows),
                    "pooling_ext: grad must have the output's size");
    const bool has_channels_last =
        windows.rank() > 1 && input_size.size() == output_size.size() + 2;
    STD_TORCH_CHECK(!channels_last || has_channels_last,
                    "pooling_ext: channels_last must be false unless input_size is (N, C, H, W) or "
                    "(N, C, D, H, W)");
    const Tensor dense_grad = dense(grad, channels_last);
    Device device(grad);
    Tensor result = device.empty(input_size, grad.scalar_type(), channels_last);
    PoolJob job;
    job.p = params_of(input_size, windows, channels_last);
    job.src = dense_grad.data_ptr();
    job.dst = result.data_ptr();
    job.count_include_pad = count_include_pad;
    job.divisor = divisor_override.value_or(0);
    if (result.numel() > 0) run_backward(device, job, dtype_of(grad));
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("avg_pool", TORCH_BOX(&pooling_ext::avg_pool));
    m.impl("avg_pool_backward", TORCH_BOX(&pooling_ext::avg_pool_backward));
}

// Launchers of max pooling, for each device. The operators are defined in
// pooling_ext/ops/max_pool.py.
#include "launchers/forward_call.h"
#ifdef POOLING_EXT_CUDA
#include "kernels/cuda/pool/max_pool.h"
#else
#include "kernels/cpu/pool/max_pool.h"
#include "launchers/cpu/max_pool_gather.h"
#endif

namespace pooling_ext {
namespace {

#ifdef POOLING_EXT_CUDA
void run(Forward& call, DType dtype, Offsets kind) {
    cuda::max_pool(call.job, dtype, kind, call.allocate_parts(), call.device.stream());
}

void run_backward(const Device& device, const PoolJob& job, DType dtype, Offsets kind) {
    cuda::max_pool_backward(job, dtype, kind, device.stream());
}

void run_gather(const Device& device, const PoolJob& job, DType dtype, Offsets kind) {
    cuda::max_pool_gather(job, dtype, kind, device.stream());
}
#else
void run(Forward& call, DType dtype, Offsets kind) {
    run_forward(kernels::max_pool(dtype, kind), call.job, dtype, false);
}

void run_backward(const Device&, const PoolJob& call, DType dtype, Offsets kind) {
    Job job{call};
    plan_max_backward(job, dtype, kind);
    launch(kernels::max_pool_backward(dtype, kind), job, max_backward_rows(job));
}

void run_gather(const Device&, const PoolJob& job, DType dtype, Offsets kind) {
    gather_winners(job, dtype, kind);
}
#endif

// Windows of so many elements remember indices instead of offsets, as offsets_dtype in max_pool.py
// says.
constexpr int64_t kManyElements = int64_t(1) << 30;

// Of so many elements nearly all are outside the input, and nothing that is remembered counts them.
void leave_outside_out(PoolParams& p) {
    if (p.window_size() < kManyElements) return;
    for (Axis* axis : {&p.d, &p.h, &p.w}) *axis = without_outside(*axis);
}

Tensor max_pool(const Tensor& input, Ints output_size, Ints kernel_size, Ints stride, Ints padding,
                Ints dilation) {
    Forward call(input, {output_size, kernel_size, stride, padding, dilation});
    leave_outside_out(call.job.p);
    if (call.any()) run(call, dtype_of(input), Offsets::None);
    return call.output;
}

std::tuple<Tensor, Tensor> max_pool_with_offsets(const Tensor& input, Ints output_size,
                                                 Ints kernel_size, Ints stride, Ints padding,
                                                 Ints dilation, bool indices) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    Forward call(input, windows);
    const int64_t window = call.job.p.window_size();
    leave_outside_out(call.job.p);
    STD_TORCH_CHECK(call.job.p.window_size() < kManyElements || is_whole(call.job.p),
                    "pooling_ext: kernel_size must have fewer than 2**30 elements in the input");
    const Offsets kind = indices || window >= kManyElements ? Offsets::Index
                         : window <= kByteWindow            ? Offsets::Byte
                                                            : Offsets::Int32;
    const ScalarType dtype = kind == Offsets::Index  ? ScalarType::Long
                             : kind == Offsets::Byte ? ScalarType::Byte
                                                     : ScalarType::Int;
    Tensor offsets = call.device.empty(sizes_of(call.output), dtype, call.channels_last);
    call.job.offsets_out = offsets.data_ptr();
    if (call.any()) run(call, dtype_of(input), kind);
    return {call.output, offsets};
}

Offsets kind_of(const Tensor& offsets) {
    switch (offsets.scalar_type()) {
        case ScalarType::Byte:
            return Offsets::Byte;
        case ScalarType::Int:
            return Offsets::Int32;
        case ScalarType::Long:
            return Offsets::Index;
        default:
            STD_TORCH_CHECK(false, "pooling_ext: offsets must be uint8, int32 or int64");
    }
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& offsets, Ints input_size,
                         Ints output_size, Ints kernel_size, Ints stride, Ints padding,
                         Ints dilation) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    const bool channels_last = suggests_channels_last(offsets, windows.rank());
    STD_TORCH_CHECK(
        sizes_of(grad) == sizes_of(offsets) && sizes_of(grad) == output_sizes(input_size, windows),
        "pooling_ext: grad and offsets must have the output's size");
    const Tensor dense_grad = dense(grad, channels_last);
    const Tensor dense_offsets = dense(offsets, channels_last);
    Device device(grad);
    Tensor result = device.empty(input_size, grad.scalar_type(), channels_last);
    PoolJob job;
    job.p = params_of(input_size, windows, channels_last);
    leave_outside_out(job.p);
    job.src = dense_grad.data_ptr();
    job.offsets_in = dense_offsets.data_ptr();
    job.dst = result.data_ptr();
    if (result.numel() > 0) run_backward(device, job, dtype_of(grad), kind_of(offsets));
    return result;
}

Tensor max_pool_gather(const Tensor& input, const Tensor& offsets, Ints output_size,
                       Ints kernel_size, Ints stride, Ints padding, Ints dilation) {
    const Windows windows{output_size, kernel_size, stride, padding, dilation};
    const bool channels_last = suggests_channels_last(offsets, windows.rank());
    const Tensor dense_input = dense(input, channels_last);
    const Tensor dense_offsets = dense(offsets, channels_last);
    const Ints sizes = output_sizes(sizes_of(input), windows);
    STD_TORCH_CHECK(sizes_of(offsets) == sizes, "pooling_ext: offsets must have the output's size");
    Device device(input);
    Tensor result = device.empty(sizes, input.scalar_type(), channels_last);
    PoolJob job;
    job.p = params_of(sizes_of(input), windows, channels_last);
    leave_outside_out(job.p);
    job.src = dense_input.data_ptr();
    job.offsets_in = dense_offsets.data_ptr();
    job.dst = result.data_ptr();
    if (result.numel() > 0) run_gather(device, job, dtype_of(input), kind_of(offsets));
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("max_pool", TORCH_BOX(&pooling_ext::max_pool));
    m.impl("max_pool_with_offsets", TORCH_BOX(&pooling_ext::max_pool_with_offsets));
    m.impl("max_pool_backward", TORCH_BOX(&pooling_ext::max_pool_backward));
    m.impl("max_pool_gather", TORCH_BOX(&pooling_ext::max_pool_gather));
}

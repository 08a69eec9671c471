// Launcher of power-average pooling, for each device. The operator is defined in
// pooling_ext/ops/lp_pool.py.
#include "launchers/forward_call.h"
#ifdef POOLING_EXT_CUDA
#include "kernels/cuda/pool/lp_pool.h"
#else
#include "kernels/cpu/pool/lp_pool.h"
#endif

namespace pooling_ext {
namespace {

#ifdef POOLING_EXT_CUDA
void run(Forward& call, DType dtype) {
    cuda::lp_pool(call.job, dtype, call.allocate_parts(), call.device.stream());
}
#else
void run(Forward& call, DType dtype) {
    run_forward(kernels::lp_pool(dtype), call.job, dtype, false);
}
#endif

Tensor lp_pool(const Tensor& input, Ints output_size, Ints kernel_size, Ints stride, Ints padding,
               Ints dilation, int64_t norm_type, bool safe) {
    STD_TORCH_CHECK(norm_type >= 1 && norm_type <= 3, "pooling_ext: norm_type must be 1, 2 or 3");
    Forward call(input, {output_size, kernel_size, stride, padding, dilation});
    call.job.norm = static_cast<int>(norm_type);
    call.job.magnitude = safe;
    if (call.any()) run(call, dtype_of(input));
    return call.output;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, POOLING_EXT_DISPATCH_KEY, m) {
    m.impl("lp_pool", TORCH_BOX(&pooling_ext::lp_pool));
}

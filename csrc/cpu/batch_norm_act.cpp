// Launchers of batch normalisation on the CPU. The operators are defined in
// pooling_ext/ops/batch_norm_act.py.
#include "cpu/batch_norm_launch.h"

namespace pooling_ext {
namespace {

Tensor batch_norm_stats(const Tensor& input) {
    BatchNormCall call(input);
    Tensor stats = call.run_sums(Step::Stats, Step::Merge);
    double* const variance = static_cast<double*>(stats.data_ptr()) + call.job.channels;
    const double count = double(call.job.batch * call.job.inner);
    for (int64_t c = 0; c < call.job.channels; ++c) variance[c] /= count;
    return stats;
}

Tensor batch_norm_act(const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
                      const MaybeTensor& bias, const MaybeTensor& residual, double eps, bool relu) {
    BatchNormCall call(input);
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor output = call.empty_like_input();
    if (residual) call.job.residual = call.like_input(*residual);
    call.job.y = output.data_ptr();
    call.job.relu = relu;
    call.run(Step::Act);
    return output;
}

std::tuple<Tensor, Tensor> batch_norm_act_sums(const Tensor& grad, const Tensor& input,
                                               const Tensor& stats, const MaybeTensor& weight,
                                               const MaybeTensor& bias, const MaybeTensor& output,
                                               double eps, bool relu) {
    BatchNormCall call(input);
    const Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor masked = output ? call.empty_like_input() : empty({0}, input.scalar_type(), false);
    call.job.grad = call.like_input(grad);
    call.job.mask = output ? Mask::Output : relu ? Mask::Input : Mask::None;
    if (output) {
        call.job.output = call.like_input(*output);
        call.job.masked = masked.data_ptr();
    }
    Tensor sums = call.run_sums(Step::Sums, Step::Total);
    affines.about_mean(sums);
    return {masked, sums};
}

Tensor batch_norm_act_backward(const Tensor& grad, const Tensor& input, const Tensor& stats,
                               const MaybeTensor& weight, const MaybeTensor& bias,
                               const MaybeTensor& sums, double count, double eps, bool relu) {
    BatchNormCall call(input);
    Affines affines(call.job, stats, weight, bias, eps, is_double(input));
    Tensor result = call.empty_like_input();
    call.job.grad = call.like_input(grad);
    call.job.y = result.data_ptr();
    call.job.mask = relu ? Mask::Input : Mask::None;
    if (sums) affines.add_slopes(call.job, *sums, count);
    call.run(Step::Backward);
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("batch_norm_stats", TORCH_BOX(&pooling_ext::batch_norm_stats));
    m.impl("batch_norm_act", TORCH_BOX(&pooling_ext::batch_norm_act));
    m.impl("batch_norm_act_sums", TORCH_BOX(&pooling_ext::batch_norm_act_sums));
    m.impl("batch_norm_act_backward", TORCH_BOX(&pooling_ext::batch_norm_act_backward));
}

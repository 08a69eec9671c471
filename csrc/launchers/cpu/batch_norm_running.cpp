// Launchers of batch normalization with running statistics on the CPU, and of folding them into a
// convolution. The operators are defined in pooling_ext/ops/batch_norm_running.py.
#include "launchers/cpu/batch_norm_launch.h"

namespace pooling_ext {
namespace {

// For each channel y = (x - center) * scale + shift, in memory that the thread keeps: around small
// layers, allocating takes longer than computing.
class RunningAffines {
  public:
    double *center, *scale, *shift;

    RunningAffines(int64_t channels, const Tensor& mean, const Tensor& variance,
                   const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool is_double)
        : memory_(4 * channels * sizeof(double)) {
        center = static_cast<double*>(memory_.get());
        scale = center + channels;
        shift = scale + channels;
        double* const __restrict variances = shift + channels;
        read_values(mean, channels, 0.0, center);
        read_values(variance, channels, 1.0, variances);
        read_values(weight, channels, 1.0, scale);
        read_values(bias, channels, 0.0, shift);
        for (int64_t c = 0; c < channels; ++c) {
            const Affine affine =
                affine_of(center[c], variances[c], scale[c], shift[c], eps, is_double);
            center[c] = affine.center;
            scale[c] = affine.scale;
            shift[c] = affine.shift;
        }
    }

  private:
    static constexpr int kSlot = 1;  // the kernels have the other
    ThreadScratch<kSlot> memory_;
};

void act(BatchNormCall& call, const Tensor& mean, const Tensor& variance, const MaybeTensor& weight,
         const MaybeTensor& bias, const MaybeTensor& residual, double eps, int64_t activation,
         double negative_slope, const Tensor& output) {
    BatchNormJob& job = call.job;
    const RunningAffines affines(job.channels, mean, variance, weight, bias, eps,
                                 is_double(call.input));
    job.center = affines.center;
    job.scale = affines.scale;
    job.shift = affines.shift;
    if (residual) job.residual = call.like_input(*residual);
    job.y = output.data_ptr();
    set_activation(job, activation, negative_slope);
    call.run(Step::Act);
}

Tensor batch_norm_act_running(const Tensor& input, const Tensor& mean, const Tensor& variance,
                              const MaybeTensor& weight, const MaybeTensor& bias,
                              const MaybeTensor& residual, double eps, int64_t activation,
                              double negative_slope) {
    BatchNormCall call(input);
    Tensor output = call.empty_like_input();
    act(call, mean, variance, weight, bias, residual, eps, activation, negative_slope, output);
    return output;
}

void batch_norm_act_running_in_place(Tensor input, const Tensor& mean, const Tensor& variance,
                                     const MaybeTensor& weight, const MaybeTensor& bias,
                                     const MaybeTensor& residual, double eps, int64_t activation,
                                     double negative_slope) {
    BatchNormCall call(input);
    act(call, mean, variance, weight, bias, residual, eps, activation, negative_slope, call.input);
    if (call.input.data_ptr() != input.data_ptr()) torch::stable::copy_(input, call.input);
}

// The weight and bias of one convolution that does both, each rounded once.
std::tuple<Tensor, Tensor> fold_batch_norm(const Tensor& weight, const MaybeTensor& bias,
                                           const Tensor& mean, const Tensor& variance,
                                           const MaybeTensor& norm_weight,
                                           const MaybeTensor& norm_bias, double eps,
                                           ScalarType dtype) {
    const bool channels_last = suggests_channels_last(weight, weight.dim() - 2);
    const Tensor input = dense(weight, channels_last);
    const Ints sizes = sizes_of(weight);
    const int64_t channels = sizes[0], row = channels ? input.numel() / channels : 0;
    const RunningAffines affines(channels, mean, variance, norm_weight, norm_bias, eps, true);
    const std::vector<double> own = values_of(bias, channels, 0.0);
    Tensor folded = empty(sizes, dtype, channels_last);
    Tensor offset = empty({channels}, dtype, false);
    with_values(offset, [&](auto* to) {
        using Out = std::remove_pointer_t<decltype(to)>;
        for (int64_t c = 0; c < channels; ++c) {
            const double value = (own[c] - affines.center[c]) * affines.scale[c] + affines.shift[c];
            to[c] = baseline::narrow<Out>(baseline::Accumulator<Out>(value));
        }
    });
    constexpr int64_t kWorkPerThread = 1 << 15;
    const int64_t grain = 1 + kWorkPerThread / (row + 1);
    with_values(input, [&](const auto* from) {
        with_values(folded, [&](auto* to) {
            using Out = std::remove_pointer_t<decltype(to)>;
            using T = baseline::Accumulator<Out>;
            const auto scale_rows = [&](int64_t begin, int64_t end) {
                for (int64_t c = begin; c < end; ++c) {
                    const T scale = T(affines.scale[c]);
                    const auto* __restrict values = from + c * row;
                    Out* __restrict results = to + c * row;
                    for (int64_t i = 0; i < row; ++i)
                        baseline::put(results, i,
                                      baseline::narrow<Out>(T(baseline::widen(values[i])) * scale));
                }
            };
            if (channels <= grain)
                scale_rows(0, channels);
            else
                parallel_for(0, channels, grain, scale_rows);
        });
    });
    return {folded, offset};
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("batch_norm_act_running", TORCH_BOX(&pooling_ext::batch_norm_act_running));
    m.impl("batch_norm_act_running_", TORCH_BOX(&pooling_ext::batch_norm_act_running_in_place));
    m.impl("fold_batch_norm", TORCH_BOX(&pooling_ext::fold_batch_norm));
}

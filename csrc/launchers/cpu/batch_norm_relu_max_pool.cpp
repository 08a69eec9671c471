// Launchers of batch normalization, ReLU and max pooling as one operator on the CPU, which is
// defined in pooling_ext/ops/batch_norm_relu_max_pool.py.
//
// In channels-last, windows of few elements have kernels of their own; the rest goes a tile at a
// time.
#include "kernels/cpu/norm/batch_norm_relu_max_pool.h"

#include <algorithm>

#include "launchers/cpu/batch_norm_relu_max_pool_tiles.h"

namespace pooling_ext {
namespace {

// What all four operators are given.
struct BnReluMaxPoolCall {
    BatchNormCall norm;
    Affines affines;
    Job pool;

    BnReluMaxPoolCall(const Tensor& input, const Tensor& stats, const MaybeTensor& weight,
                      const MaybeTensor& bias, double eps, const Windows& windows)
        : norm(input), affines(norm.job, stats, weight, bias, eps, is_double(input)) {
        STD_TORCH_CHECK(input.dim() == 4, "pooling_ext: input must have four dimensions");
        out_ = output_sizes(sizes_of(input), windows);
        // One pixel is the same in both formats; pooling goes by the output's.
        norm.job.channels_last = norm.channels_last;
        pool.p = params_of(sizes_of(input), windows, norm.channels_last);
        norm.job.activation = Activation::Relu;
        norm.job.gate = Gate::Relu;
    }

    Tensor empty_output(ScalarType dtype) const { return empty(out_, dtype, norm.channels_last); }

    void with_gradient(const Tensor& grad, const Tensor& offsets) {
        STD_TORCH_CHECK(sizes_of(grad) == out_ && sizes_of(offsets) == out_ &&
                            offsets.scalar_type() == ScalarType::Byte,
                        "pooling_ext: grad and offsets must have the output's size");
        grad_ = dense(grad, norm.channels_last);
        offsets_ = dense(offsets, norm.channels_last);
        pool.src = grad_.data_ptr();
        pool.offsets_in = offsets_.data_ptr();
    }

    BnReluMaxPoolTiles tiles() const {
        return BnReluMaxPoolTiles(norm.job, pool, dtype_of(norm.input), norm.input.element_size());
    }

    // Runs a step of the kernels for whole windows; false if there are none.
    bool run(BnReluMaxPoolStep step) const {
        const BnReluMaxPoolJob job{norm.job, pool};
        if (!job.taken(dtype_of(norm.input))) return false;
        const PoolParams& p = pool.p;
        const Rows rows = step == BnReluMaxPoolStep::Forward ? Rows{p.out_rows(), 4 * p.in_row()}
                          : step == BnReluMaxPoolStep::Sums
                              ? Rows{norm.job.batch * job.bands(), 1 << 20}
                              : Rows{p.in_rows(), 4 * p.in_row()};
        launch(kernels::bn_relu_max_pool(dtype_of(norm.input), step), job, rows);
        return true;
    }

    void forward() const {
        if (norm.job.numel() == 0 || run(BnReluMaxPoolStep::Forward)) return;
        const BnReluMaxPoolTiles all = tiles();
        parallel_for(0, all.tiles(true), 1,
                     [&](int64_t begin, int64_t end) { all.forward(begin, end); });
    }

  private:
    Ints out_;
    Tensor grad_, offsets_;
};

Tensor pooled(const Tensor& input, const Tensor& stats, MaybeTensor weight, MaybeTensor bias,
              double eps, Ints output_size, Ints kernel_size, Ints stride, Ints padding,
              Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    Tensor output = call.empty_output(input.scalar_type());
    call.pool.dst = output.data_ptr();
    call.forward();
    return output;
}

std::tuple<Tensor, Tensor> pooled_with_offsets(const Tensor& input, const Tensor& stats,
                                               MaybeTensor weight, MaybeTensor bias, double eps,
                                               Ints output_size, Ints kernel_size, Ints stride,
                                               Ints padding, Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    STD_TORCH_CHECK(call.pool.p.window_size() <= kByteWindow,
                    "pooling_ext: kernel_size must have at most 255 elements");
    Tensor output = call.empty_output(input.scalar_type());
    Tensor offsets = call.empty_output(ScalarType::Byte);
    call.pool.dst = output.data_ptr();
    call.pool.offsets_out = offsets.data_ptr();
    call.forward();
    return {output, offsets};
}

Tensor sums(const Tensor& grad, const Tensor& offsets, const Tensor& input, const Tensor& stats,
            MaybeTensor weight, MaybeTensor bias, double eps, Ints output_size, Ints kernel_size,
            Ints stride, Ints padding, Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    call.with_gradient(grad, offsets);
    const int64_t channels = call.norm.job.channels;
    Tensor result = empty({2, channels}, ScalarType::Double, false);
    double* const total = static_cast<double*>(result.data_ptr());
    std::fill(total, total + 2 * channels, 0.0);
    if (call.norm.job.numel() == 0) return result;
    const BnReluMaxPoolTiles all = call.tiles();
    const BnReluMaxPoolJob direct{call.norm.job, call.pool};
    const int64_t tiles =
        direct.taken(dtype_of(input)) ? call.norm.job.batch * direct.bands() : all.tiles(true);
    const BatchNormKernel add = kernels::batch_norm(dtype_of(input), Step::Sums);
    // Each tile's own sums, added up in their order.
    std::vector<double> parts(tiles * 2 * channels);
    call.norm.job.sums = parts.data();
    const auto run = [&](auto element) {
        parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
            int64_t i = begin;
            all.winners<decltype(element)>(
                begin, end, [&](BatchNormJob& job, const BnReluMaxPoolTiles::Tile& tile) {
                    // A tile of planes has two rows of its own channels, of which the operator has
                    // more.
                    double* const part = parts.data() + i++ * 2 * channels;
                    std::vector<double> own(2 * job.channels);
                    job.sums = own.data();
                    BnReluMaxPoolTiles::run_all(add, job, Units(job, Step::Sums).count);
                    const int64_t from = job.channels_last ? 0 : tile.begin;
                    std::copy(own.begin(), own.begin() + job.channels, part + from);
                    std::copy(own.begin() + job.channels, own.end(), part + channels + from);
                });
        });
    };
    const int64_t size = input.element_size();
    if (!call.run(BnReluMaxPoolStep::Sums))
        size == 8 ? run(uint64_t{}) : size == 4 ? run(uint32_t{}) : run(uint16_t{});
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t i = 0; i < 2 * channels; ++i) total[i] += parts[tile * 2 * channels + i];
    call.affines.about_mean(result);
    return result;
}

Tensor backward(const Tensor& grad, const Tensor& offsets, const Tensor& input, const Tensor& stats,
                MaybeTensor weight, MaybeTensor bias, MaybeTensor sums, double count, double eps,
                Ints output_size, Ints kernel_size, Ints stride, Ints padding, Ints dilation) {
    BnReluMaxPoolCall call(input, stats, weight, bias, eps,
                           {output_size, kernel_size, stride, padding, dilation});
    call.with_gradient(grad, offsets);
    if (sums) call.affines.add_slopes(call.norm.job, *sums, count);
    Tensor result = call.norm.empty_like_input();
    call.norm.job.y = result.data_ptr();
    if (call.norm.job.numel() == 0 || call.run(BnReluMaxPoolStep::Backward)) return result;
    const BnReluMaxPoolTiles all = call.tiles();
    const BatchNormKernel spread = kernels::batch_norm(dtype_of(input), Step::Backward);
    parallel_for(0, all.tiles(false), 1, [&](int64_t begin, int64_t end) {
        all.backward(begin, end, [&](const BatchNormJob& job, const BnReluMaxPoolTiles::Tile&) {
            BnReluMaxPoolTiles::run_all(spread, job, Units(job, Step::Backward).count);
        });
    });
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("batch_norm_relu_max_pool", TORCH_BOX(&pooling_ext::pooled));
    m.impl("batch_norm_relu_max_pool_with_offsets", TORCH_BOX(&pooling_ext::pooled_with_offsets));
    m.impl("batch_norm_relu_max_pool_backward_reduce", TORCH_BOX(&pooling_ext::sums));
    m.impl("batch_norm_relu_max_pool_backward_elemt", TORCH_BOX(&pooling_ext::backward));
}

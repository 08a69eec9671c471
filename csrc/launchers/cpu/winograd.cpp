// Launchers of Winograd's convolution on the CPU. The operators are defined in
// pooling_ext/ops/winograd.py.
#include "launchers/cpu/winograd.h"

#include "launchers/activation.h"
#include "launchers/cpu/non_temporal.h"
#include "launchers/cpu/scratch.h"

namespace pooling_ext {
namespace {

int64_t workers() { return int64_t(torch::stable::get_num_threads()); }

template <class Run>
void in_parallel(int64_t tasks, const Run& run) {
    const auto some = [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) run(task);
    };
    if (tasks == 1)
        some(0, 1);
    else
        parallel_for(0, tasks, 1, some);
}

int64_t padded_features(const WinogradShape& s) {
    return ceil_div(s.features, kWinogradChannels) * kWinogradChannels;
}

Ints transformed_size(const WinogradShape& s) {
    return {s.groups, s.tile().weight_points(), s.planes, s.channels, padded_features(s)};
}

Ints output_size(const WinogradShape& s, int64_t dims) {
    Ints sizes = {s.batch, s.groups * s.features, s.out_height, s.out_width};
    if (s.turned) std::swap(sizes[2], sizes[3]);
    if (dims == 5) sizes.insert(sizes.begin() + 2, s.out_depth);
    return sizes;
}

// Whether a weight is as PyTorch has it: kernels are smaller than the padded features of others.
bool is_plain(const Tensor& weight) {
    return weight.dim() == 4 || sizes_of(weight).back() < kWinogradChannels;
}

// The transformed weight of a convolution of stride 1 or 2: [groups, points, planes, channels,
// features rounded up], inside which each instruction set has its own order.
Tensor winograd_weight(const Tensor& weight, int64_t groups, bool transposed, int64_t stride) {
    const Ints sizes = sizes_of(weight);
    WinogradShape s;
    set_kernel(s, sizes, stride);
    STD_TORCH_CHECK(groups > 0 && sizes[0] % groups == 0 && weight.numel() > 0,
                    "pooling_ext: groups must divide the channels");
    const int64_t outs = sizes[0] / groups;
    s.groups = groups;
    s.channels = transposed ? outs : sizes[1], s.features = transposed ? sizes[1] : outs;
    WinogradWeightJob job = weight_job(weight, s, transposed);
    Tensor result = empty(transformed_size(s), computed_in(weight.scalar_type()), false);
    job.result = result.data_ptr();
    const auto kernel = winograd_kernels(weight.scalar_type(), s.kind).weight;
    const WinogradMachine m = machine_of(weight.scalar_type());
    const int64_t vectors = winograd_vectors(s.features, m);
    parallel_for(0, groups * vectors, 2 + 256 / s.inner(),
                 [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    // What of the padding no vector reaches.
    const int64_t size = s.weight_size(), used = size / padded_features(s) * vectors * m.lanes;
    for (int64_t group = 0; group < groups && used < size; ++group)
        std::memset(static_cast<char*>(job.result) + (group * size + used) * m.element, 0,
                    size_t((size - used) * m.element));
    return result;
}

// The means and biased variances of a convolution's output from those of its units, in their order.
Tensor merged(const WinogradShape& s, const std::vector<double>& units) {
    const int64_t channels = s.groups * s.features, count = s.units();
    std::vector<double> sizes(count, 0.0);
    for (int64_t tile = 0; tile < s.tiles(); ++tile) {
        const WinogradPosition at = s.position(tile / s.columns() / s.rows(),
                                               tile / s.columns() % s.rows(), tile % s.columns());
        sizes[tile / kWinogradUnit] += double(s.rows_of(at) * s.columns_of(at));
    }
    Tensor stats = empty({2, channels}, ScalarType::Double, false);
    double* const mean = static_cast<double*>(stats.data_ptr());
    double* const variance = mean + channels;
    const double all = double(s.pixels());
    constexpr int64_t kTogether = 64;
    parallel_for(0, ceil_div(channels, kTogether), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin * kTogether; c < std::min(end * kTogether, channels);
             c += kTogether) {
            const int64_t some = std::min(kTogether, channels - c);
            // As differences to the first, so that nothing is lost where means are large.
            double away[kTogether] = {}, square[kTogether] = {}, deviation[kTogether] = {};
            const double* const first = units.data() + c;
            for (int64_t unit = 0; unit < count; ++unit) {
                const double* const means = first + unit * 2 * channels;
                for (int64_t i = 0; i < some; ++i) {
                    const double difference = means[i] - first[i];
                    away[i] += sizes[unit] * difference;
                    square[i] += sizes[unit] * difference * difference;
                    deviation[i] += means[channels + i];
                }
            }
            for (int64_t i = 0; i < some; ++i) {
                mean[c + i] = first[i] + away[i] / all;
                variance[c + i] = (deviation[i] + square[i] - away[i] * away[i] / all) / all;
            }
        }
    });
    return stats;
}

// Whether the kernels read and write planes as they lie.
bool can_be_planar(const WinogradShape& s, const Tensor& input) {
    return is_dense(input, false) && !suggests_channels_last(input, input.dim() - 2) &&
           input.dim() == 4 && s.groups == 1 && s.dilation_y == 1 && s.dilation_x == 1 && !s.turned;
}

struct ForwardCall {
    bool channels_last;
    Tensor input, output;
    WinogradJob job;
    // Of a weight that is not transformed yet.
    bool plain;
    WinogradWeightJob weight_job;
    std::vector<Tensor> kept;

    // `weight` is transformed, or as PyTorch has it, and then `transposed` says for what.
    ForwardCall(const WinogradShape& s, const Tensor& x, const Tensor& weight,
                const MaybeTensor& bias, const MaybeTensor& residual, bool transposed = false)
        : channels_last(suggests_channels_last(x, x.dim() - 2)), input(x), output(x) {
        job.shape = s;
        // A residual would have to be turned too.
        job.shape.planar = !residual && can_be_planar(s, x);
        if (!job.shape.planar) input = dense(x, true);
        const int64_t features = s.groups * s.features;
        const ScalarType wide = computed_in(x.scalar_type());
        job.x = input.data_ptr();
        set_weight(weight, transposed);
        if (bias) {
            STD_TORCH_CHECK(bias->numel() == features,
                            "pooling_ext: bias must have a value per output channel");
            std::vector<double> values = values_of(bias, features, 0.0);
            kept.push_back(vector_like(empty({0}, wide, false), values.data(), features));
            job.bias = kept.back().data_ptr();
        }
        const Ints sizes = output_size(s, x.dim());
        if (residual) {
            STD_TORCH_CHECK(
                sizes_of(*residual) == sizes && residual->scalar_type() == x.scalar_type(),
                "pooling_ext: residual must have the output's shape and dtype");
            kept.push_back(dense(*residual, true));
            job.residual = kept.back().data_ptr();
        }
        output = empty(sizes, x.scalar_type(), !job.shape.planar);
        job.y = output.data_ptr();
    }

    void run() {
        const WinogradShape& s = job.shape;
        if (s.batch == 0) return;
        const WinogradKernels table = winograd_kernels(input.scalar_type(), s.kind);
        const WinogradMachine m = machine_of(input.scalar_type());
        job.non_temporal = non_temporal();
        const WinogradGrid grid = winograd_grid(s, m, job.stats != nullptr, workers(), plain);
        in_parallel(grid.tasks(), [&](int64_t task) {
            const WinogradShare share = grid.share(task, s, m);
            if (plain) return run_plain(table, m, share);
            WinogradJob own = job;
            own.share = share;
            own.block = winograd_block(s, m, share);
            const size_t bytes = size_t(WinogradScratch(s, m, own.block).bytes(m));
            table.forward(own, LargeScratch(bytes).get());
        });
    }

    Tensor result() const { return dense(output, channels_last); }

  private:
    bool non_temporal() const {
        const WinogradShape& s = job.shape;
        const int64_t run = s.features * input.element_size();  // of a group's pixel
        return !s.planar && goes_past_cache(job.y, s.pixels() * s.groups * run, run);
    }

    void set_weight(const Tensor& weight, bool transposed) {
        const WinogradShape& s = job.shape;
        plain = is_plain(weight);
        if (plain) {
            STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(),
                            "pooling_ext: weight must be of input's dtype");
            weight_job = pooling_ext::weight_job(weight, s, transposed);
            return;
        }
        STD_TORCH_CHECK(!transposed && weight.scalar_type() == computed_in(input.scalar_type()) &&
                            weight.is_contiguous() && sizes_of(weight) == transformed_size(s),
                        "pooling_ext: weight must be a winograd_weight for this kernel, these "
                        "channels, planes and dtype");
        job.weight = weight.data_ptr();
    }

    // Transforms the weight in parts that the last cache holds, each just before it is used.
    void run_plain(const WinogradKernels& table, const WinogradMachine& m,
                   const WinogradShare& share) const {
        const WinogradShape& s = job.shape;
        const std::vector<int64_t> parts = winograd_weight_parts(s, m, share);
        WinogradJob own = job;
        own.share = share;
        int64_t bytes = 0, most = 0;
        for (size_t i = 0; i + 1 < parts.size(); ++i) {
            const WinogradPanels panels(s, m, parts[i], parts[i + 1]);
            bytes = std::max(bytes, ceil_div((panels.end - panels.begin) * m.element, 64) * 64);
            most = std::max(most, parts[i + 1] - parts[i]);
        }
        // Blocks are the same for all parts, so that the transformed input may stay.
        own.share.last_vector = share.first_vector + most;
        own.block = winograd_block(s, m, own.share);
        const bool one_block = share.last_tile - share.first_tile <= own.block.tiles;
        const LargeScratch scratch(size_t(bytes + WinogradScratch(s, m, own.block).bytes(m)));
        char* const memory = static_cast<char*>(scratch.get());
        WinogradWeightJob weight = weight_job;
        for (size_t i = 0; i + 1 < parts.size(); ++i) {
            own.share.first_vector = parts[i], own.share.last_vector = parts[i + 1];
            // As if all panels were there.
            weight.result = memory - WinogradPanels(s, m, parts[i], parts[i + 1]).begin * m.element;
            own.weight = weight.result;
            table.weight(weight, parts[i], parts[i + 1]);
            own.input_is_there = i > 0 && s.groups == 1 && one_block;
            table.forward(own, memory + bytes);
        }
    }
};

// The shape of a weight, transformed or not, of which that is known: `kernel` says (rows, columns)
// of a transformed one.
WinogradShape kernel_of(const Tensor& weight, const Ints& kernel, const Ints& stride) {
    const Ints sizes = sizes_of(weight);
    STD_TORCH_CHECK(!stride.empty() && kernel.size() == 2,
                    "pooling_ext: stride must have a number per spatial axis, and kernel two");
    WinogradShape s;
    if (is_plain(weight)) {
        set_kernel(s, sizes, stride.back());
    } else {
        set_kernel(s, kernel[0], kernel[1], stride.back());
        s.planes = sizes[2];
    }
    return s;
}

Tensor winograd_conv(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& residual, const Ints& padding, int64_t features,
                     int64_t groups, int64_t activation, double slope, const Ints& stride,
                     const Ints& dilation, const Ints& kernel) {
    const WinogradShape s = shape_of(input, kernel_of(weight, kernel, stride), features, groups,
                                     {padding, stride, dilation});
    ForwardCall call(s, input, weight, bias, residual);
    call.job.activation = activation_of(activation);
    call.job.slope = slope;
    call.run();
    return call.result();
}

std::tuple<Tensor, Tensor> winograd_conv_stats(const Tensor& input, const Tensor& weight,
                                               const MaybeTensor& bias, const Ints& padding,
                                               int64_t features, int64_t groups, const Ints& stride,
                                               const Ints& dilation, const Ints& kernel) {
    const WinogradShape s = shape_of(input, kernel_of(weight, kernel, stride), features, groups,
                                     {padding, stride, dilation});
    ForwardCall call(s, input, weight, bias, {});
    if (s.batch == 0) {
        Tensor stats = empty({2, features}, ScalarType::Double, false);
        double* const data = static_cast<double*>(stats.data_ptr());
        std::fill(data, data + 2 * features, 0.0);
        return {call.result(), stats};
    }
    std::vector<double> units(size_t(2 * features * s.units()));
    call.job.stats = units.data();
    call.run();
    return {call.result(), merged(s, units)};
}

// The gradient of a convolution's input, from the weight as PyTorch has it.
Tensor winograd_input_grad(const Tensor& grad, const Tensor& weight, const Ints& padding,
                           int64_t groups, const Ints& stride, const Ints& dilation,
                           const Ints& input_size) {
    const WinogradShape s =
        input_grad_shape(grad, sizes_of(weight), input_size, groups, {padding, stride, dilation});
    ForwardCall call(s, grad, weight, {}, {}, true);
    call.run();
    return call.result();
}

Tensor winograd_weight_grad(const Tensor& input, const Tensor& grad, const Ints& padding,
                            int64_t groups, const Ints& stride, const Ints& dilation,
                            const Ints& weight_size) {
    STD_TORCH_CHECK(grad.dim() == input.dim() && grad.dim() >= 4,
                    "pooling_ext: grad must have input's rank");
    STD_TORCH_CHECK(stride.size() > 0, "pooling_ext: stride must have a number per spatial axis");
    const int64_t features = sizes_of(grad)[1];
    Ints result_size = weight_size;
    if (result_size.empty())
        result_size = {features, sizes_of(input)[1] / std::max<int64_t>(groups, 1), 3, 3};
    WinogradGradJob job;
    set_kernel(job.shape, result_size, stride.back());
    job.shape = shape_of(input, job.shape, features, groups, {padding, stride, dilation});
    const WinogradShape& s = job.shape;
    STD_TORCH_CHECK(
        sizes_of(grad) == output_size(s, input.dim()) && grad.scalar_type() == input.scalar_type(),
        "pooling_ext: grad must have the output's shape and input's dtype");
    job.shape.planar = can_be_planar(s, input) && can_be_planar(s, grad);
    const Tensor x = dense(input, !s.planar), dy = dense(grad, !s.planar);
    STD_TORCH_CHECK(int64_t(result_size.size()) == input.dim() && result_size[0] == features &&
                        result_size[1] == s.channels,
                    "pooling_ext: weight_size must fit input and grad");
    Tensor result = empty(result_size, input.scalar_type(), false);
    const WinogradWeightJob as_weight = weight_job(result, s, false);
    if (s.batch == 0) {
        std::memset(result.data_ptr(), 0, size_t(result.numel()) * result.element_size());
        return result;
    }
    job.x = x.data_ptr(), job.grad = dy.data_ptr(), job.result = result.data_ptr();
    std::copy(as_weight.strides, as_weight.strides + 5, job.strides);
    const WinogradKernels table = winograd_kernels(input.scalar_type(), s.kind);
    const WinogradMachine m = machine_of(input.scalar_type());
    const WinogradGradGrid grid = winograd_grad_grid(s, m, workers());
    job.block = grid.block;
    const int64_t regions = grid.regions(s), splits = grid.splits;
    const int64_t together = s.groups * s.inner() * winograd_vectors(s.features, m) * m.lanes *
                             s.tile().weight_points() * splits;
    // Where there is one split, a region's sums are transformed back while they are in the cache.
    const Tensor sums = empty({splits > 1 ? together : 0}, computed_in(input.scalar_type()), false);
    char* const base = static_cast<char*>(sums.data_ptr());
    std::vector<int64_t> offsets(size_t(regions) + 1, 0);
    for (int64_t i = 0; i < regions; ++i)
        offsets[i + 1] = offsets[i] + grid.region(i, s, m).size(s, m.lanes) * splits * m.element;
    in_parallel(splits * regions, [&](int64_t task) {
        const int64_t index = task / splits, split = task % splits;
        const WinogradRegion region = grid.region(index, s, m);
        const int64_t size = region.size(s, m.lanes) * m.element;
        const int64_t bytes = WinogradGradScratch(s, region, m, job.block).bytes(m);
        const int64_t aligned = ceil_div(bytes, 64) * 64;
        const LargeScratch scratch(size_t(aligned + (splits > 1 ? 0 : size)));
        char* const memory = static_cast<char*>(scratch.get());
        char* const own = splits > 1 ? base + offsets[index] + split * size : memory + aligned;
        table.grad(job, region, grid.first_tile(split, s), grid.first_tile(split + 1, s), own,
                   memory);
        if (splits == 1) table.grad_end(job, region, own, 1);
    });
    if (splits > 1)
        in_parallel(regions, [&](int64_t index) {
            table.grad_end(job, grid.region(index, s, m), base + offsets[index], splits);
        });
    return result;
}

}  // namespace
}  // namespace pooling_ext

STABLE_TORCH_LIBRARY_IMPL(pooling_ext, CPU, m) {
    m.impl("winograd_weight", TORCH_BOX(&pooling_ext::winograd_weight));
    m.impl("winograd_conv", TORCH_BOX(&pooling_ext::winograd_conv));
    m.impl("winograd_conv_stats", TORCH_BOX(&pooling_ext::winograd_conv_stats));
    m.impl("winograd_input_grad", TORCH_BOX(&pooling_ext::winograd_input_grad));
    m.impl("winograd_weight_grad", TORCH_BOX(&pooling_ext::winograd_weight_grad));
}

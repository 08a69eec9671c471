// Launchers of Winograd's convolution on the CPU. The operators are defined in
// pooling_ext/ops/winograd.py.
#include <unistd.h>

#include "cpu/batch_norm_launch.h"
#include "kernels/cpu/conv/winograd_plan.h"
#include "launchers/activation.h"
#include "launchers/scratch.h"

namespace pooling_ext {
namespace {

int64_t cache_size(int level, int64_t otherwise) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long size = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
    if (size > 0) return size;
#endif
    return otherwise;
}

WinogradMachine machine_of(ScalarType dtype) {
    static const int64_t second = cache_size(2, 1 << 20), third = cache_size(3, 0);
    WinogradMachine m;
    m.element = dtype == ScalarType::Double ? 8 : 4;
    m.lanes = kernels().winograd(m.element == 8 ? DType::Float64 : DType::Float32).lanes;
    m.near = second / 8 * 5;
    // Of the last cache a worker has a share, which no system tells.
    m.far = third > 0 ? std::clamp(third / 8, second, 8 * second) : second;
    return m;
}

ScalarType computed_in(ScalarType dtype) {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

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

void check_padding(const Ints& padding) {
    STD_TORCH_CHECK(padding.size() == 4, "pooling_ext: padding must be (top, left, bottom, right)");
}

WinogradShape shape_of(const Tensor& input, int64_t features, int64_t groups, const Ints& padding) {
    STD_TORCH_CHECK(input.dim() == 4, "pooling_ext: input must be (N, C, H, W)");
    check_padding(padding);
    const Ints sizes = sizes_of(input);
    STD_TORCH_CHECK(groups > 0 && sizes[1] % groups == 0 && features % groups == 0 &&
                        sizes[1] > 0 && features > 0,
                    "pooling_ext: groups must divide the channels");
    WinogradShape s;
    s.batch = sizes[0], s.groups = groups;
    s.channels = sizes[1] / groups, s.features = features / groups;
    s.height = sizes[2], s.width = sizes[3];
    s.pad_top = padding[0], s.pad_left = padding[1];
    s.out_height = s.height + padding[0] + padding[2] - 2;
    s.out_width = s.width + padding[1] + padding[3] - 2;
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0,
                    "pooling_ext: a window of 3x3 must fit into input with its padding");
    return s;
}

// The transform of a weight (out, in, 3, 3) of any strides; `result` is still to be set.
WinogradWeightJob weight_job(const Tensor& weight, int64_t groups, bool transposed) {
    const Ints sizes = sizes_of(weight);
    STD_TORCH_CHECK(sizes.size() == 4 && sizes[2] == 3 && sizes[3] == 3 && groups > 0 &&
                        sizes[0] % groups == 0 && weight.numel() > 0,
                    "pooling_ext: weight must be (out, in, 3, 3)");
    const int64_t outs = sizes[0] / groups;
    WinogradWeightJob job;
    job.groups = groups;
    job.channels = transposed ? outs : sizes[1];
    job.features = transposed ? sizes[1] : outs;
    job.transposed = transposed;
    job.weight = weight.data_ptr();
    std::copy(weight.strides().begin(), weight.strides().end(), job.strides);
    return job;
}

// The transformed weight: [groups, 36, channels, features rounded up], inside which each
// instruction set has its own order.
Tensor winograd_weight(const Tensor& weight, int64_t groups, bool transposed) {
    WinogradWeightJob job = weight_job(weight, groups, transposed);
    const int64_t padded = ceil_div(job.features, kWinogradChannels) * kWinogradChannels;
    Tensor result = empty({groups, kWinogradPoints, job.channels, padded},
                          computed_in(weight.scalar_type()), false);
    job.result = result.data_ptr();
    const auto kernel = kernels().winograd(dtype_of(weight)).weight;
    STD_TORCH_CHECK(kernel != nullptr, "pooling_ext: weight must be floating-point");
    const int64_t vectors =
        groups * winograd_vectors(job.features, machine_of(weight.scalar_type()));
    parallel_for(0, vectors, 2 + 256 / job.channels,
                 [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    return result;
}

// The means and biased variances of a convolution's output from those of its units, in their order.
Tensor merged(const WinogradShape& s, const std::vector<double>& units) {
    const int64_t channels = s.groups * s.features, count = s.units();
    std::vector<double> sizes(count, 0.0);
    for (int64_t tile = 0; tile < s.tiles(); ++tile) {
        const int64_t x = tile % s.columns() * kWinogradOut;
        const int64_t y = tile / s.columns() % s.rows() * kWinogradOut;
        sizes[tile / kWinogradUnit] += double(std::min(kWinogradOut, s.out_height - y) *
                                              std::min(kWinogradOut, s.out_width - x));
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

struct ForwardCall {
    bool channels_last;
    Tensor input, output;
    WinogradJob job;
    // Of a weight that is not transformed yet.
    bool plain;
    WinogradWeightJob weight_job;
    std::vector<Tensor> kept;

    // `weight` is transformed, or as PyTorch has it, and then `transposed` says for what.
    ForwardCall(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                const MaybeTensor& residual, const Ints& padding, int64_t features, int64_t groups,
                bool transposed = false)
        : channels_last(suggests_channels_last(x, 2)), input(dense(x, true)), output(x) {
        job.shape = shape_of(x, features, groups, padding);
        const WinogradShape& s = job.shape;
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
        const Ints sizes = {s.batch, features, s.out_height, s.out_width};
        if (residual) {
            STD_TORCH_CHECK(
                sizes_of(*residual) == sizes && residual->scalar_type() == x.scalar_type(),
                "pooling_ext: residual must have the output's shape and dtype");
            kept.push_back(dense(*residual, true));
            job.residual = kept.back().data_ptr();
        }
        output = empty(sizes, x.scalar_type(), true);
        job.y = output.data_ptr();
    }

    void run() {
        const WinogradShape& s = job.shape;
        if (s.batch == 0) return;
        const WinogradKernels table = kernels().winograd(dtype_of(input));
        STD_TORCH_CHECK(table.forward != nullptr, "pooling_ext: input must be floating-point");
        const WinogradMachine m = machine_of(input.scalar_type());
        job.streams = streams();
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
    // What no cache holds is not to drive out the rest, nor to be read before it is written.
    bool streams() const {
        constexpr int64_t kLeast = int64_t(32) << 20, kLine = 64;
        const WinogradShape& s = job.shape;
        const int64_t run = s.features * input.element_size();  // of a group's pixel
        return s.pixels() * s.groups * run >= kLeast && run % kLine == 0 &&
               uintptr_t(job.y) % kLine == 0;
    }

    void set_weight(const Tensor& weight, bool transposed) {
        const WinogradShape& s = job.shape;
        const Ints sizes = sizes_of(weight);
        plain = sizes.size() == 4 && sizes[2] == 3 && sizes[3] == 3;
        if (plain) {
            const int64_t outs = s.groups * (transposed ? s.channels : s.features);
            STD_TORCH_CHECK(sizes[0] == outs &&
                                sizes[1] == (transposed ? s.features : s.channels) &&
                                weight.scalar_type() == input.scalar_type(),
                            "pooling_ext: weight must fit the channels and dtype");
            weight_job = pooling_ext::weight_job(weight, s.groups, transposed);
            return;
        }
        const int64_t padded = ceil_div(s.features, kWinogradChannels) * kWinogradChannels;
        STD_TORCH_CHECK(
            !transposed && weight.scalar_type() == computed_in(input.scalar_type()) &&
                weight.is_contiguous() &&
                sizes == (Ints{s.groups, kWinogradPoints, s.channels, padded}),
            "pooling_ext: weight must be a winograd_weight for these channels and dtype");
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

Tensor winograd_conv(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& residual, const Ints& padding, int64_t features,
                     int64_t groups, int64_t activation, double slope) {
    ForwardCall call(input, weight, bias, residual, padding, features, groups);
    call.job.activation = activation_of(activation);
    call.job.slope = slope;
    call.run();
    return call.result();
}

std::tuple<Tensor, Tensor> winograd_conv_stats(const Tensor& input, const Tensor& weight,
                                               const MaybeTensor& bias, const Ints& padding,
                                               int64_t features, int64_t groups) {
    ForwardCall call(input, weight, bias, {}, padding, features, groups);
    const WinogradShape& s = call.job.shape;
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
                           int64_t groups) {
    STD_TORCH_CHECK(weight.dim() == 4, "pooling_ext: weight must be (out, in, 3, 3)");
    check_padding(padding);
    Ints turned = padding;
    for (int64_t& side : turned) side = 2 - side;
    ForwardCall call(grad, weight, {}, {}, turned, sizes_of(weight)[1] * groups, groups, true);
    call.run();
    return call.result();
}

Tensor winograd_weight_grad(const Tensor& input, const Tensor& grad, const Ints& padding,
                            int64_t groups) {
    STD_TORCH_CHECK(grad.dim() == 4, "pooling_ext: grad must be (N, C, H, W)");
    const int64_t features = sizes_of(grad)[1];
    WinogradGradJob job;
    job.shape = shape_of(input, features, groups, padding);
    const WinogradShape& s = job.shape;
    STD_TORCH_CHECK(sizes_of(grad) == (Ints{s.batch, features, s.out_height, s.out_width}) &&
                        grad.scalar_type() == input.scalar_type(),
                    "pooling_ext: grad must have the output's shape and input's dtype");
    const Tensor x = dense(input, true), dy = dense(grad, true);
    Tensor result = empty({features, s.channels, 3, 3}, input.scalar_type(), false);
    if (s.batch == 0) {
        std::memset(result.data_ptr(), 0, size_t(result.numel()) * result.element_size());
        return result;
    }
    job.x = x.data_ptr(), job.grad = dy.data_ptr(), job.result = result.data_ptr();
    std::copy(result.strides().begin(), result.strides().end(), job.strides);
    const WinogradKernels table = kernels().winograd(dtype_of(input));
    STD_TORCH_CHECK(table.grad != nullptr, "pooling_ext: input must be floating-point");
    const WinogradMachine m = machine_of(input.scalar_type());
    const WinogradGradGrid grid = winograd_grad_grid(s, m, workers());
    job.block = grid.block;
    const int64_t regions = grid.regions(s), splits = grid.splits;
    const int64_t together = s.groups * s.channels * winograd_vectors(s.features, m) * m.lanes *
                             kWinogradPoints * splits;
    // Where there is one split, a region's sums are transformed back while they are in the cache.
    const Tensor sums = empty({splits > 1 ? together : 0}, computed_in(input.scalar_type()), false);
    char* const base = static_cast<char*>(sums.data_ptr());
    std::vector<int64_t> offsets(size_t(regions) + 1, 0);
    for (int64_t i = 0; i < regions; ++i)
        offsets[i + 1] = offsets[i] + grid.region(i, s, m).size(m.lanes) * splits * m.element;
    in_parallel(splits * regions, [&](int64_t task) {
        const int64_t index = task / splits, split = task % splits;
        const WinogradRegion region = grid.region(index, s, m);
        const int64_t size = region.size(m.lanes) * m.element;
        const int64_t bytes = WinogradGradScratch(region, m, job.block).bytes(m);
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
